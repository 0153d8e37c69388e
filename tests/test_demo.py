"""The demo on one device: what it computes, what it reads, and that plain Lightning runs it."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F

from lightning_par.demo.corpus import SEPARATOR, StandardLibrary, Windows, list_sources, read_text, split_files
from lightning_par.demo.gpt import GPT, rotary_angles, rotate
from lightning_par.demo.language_model import LanguageModel, warmup_cosine
from lightning_par.demo.sample import SampleText


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def library() -> StandardLibrary:
    library = StandardLibrary(context=32, batch_size=8, num_validation_windows=20)
    library.setup("fit")
    return library


def small_model() -> LanguageModel:
    return LanguageModel(GPT(width=32, depth=2, heads=2), warmup_steps=1)


def fit(library: StandardLibrary, *callbacks: pl.Callback) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=2, limit_val_batches=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(small_model(), library)
    return trainer


def test_untrained_gpt_predicts_uniformly() -> None:
    tokens, targets = torch.randint(256, (2, 4, 64))
    logits = GPT()(tokens)
    assert logits.shape == (4, 64, 256)
    assert F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item() == pytest.approx(math.log(256), abs=0.1)


def test_gpt_is_causal() -> None:
    model = GPT(width=32, depth=2, heads=2)
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 256
    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:10].max() == 0 and difference[10:].min() > 0


def test_rotated_products_depend_on_distance_only() -> None:
    query, key = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 12, 8)  # the same vector at 12 positions
    angles = rotary_angles(12, 8, torch.device("cpu"))
    products = (rotate(query, angles) @ rotate(key, angles).transpose(-1, -2))[0, 0]
    for distance in range(-11, 12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert rotate(query.bfloat16(), angles).dtype == torch.bfloat16


def test_dropout_acts_in_training_only() -> None:
    model = GPT(width=32, depth=2, heads=2, dropout=0.5)
    tokens = torch.randint(256, (1, 16))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    factors = [warmup_cosine(step, warmup_steps=4, num_steps=24) for step in range(30)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[14] == pytest.approx(0.55)  # halfway down
    assert factors[24:] == pytest.approx([0.1] * 6)
    assert warmup_cosine(100, warmup_steps=4, num_steps=math.inf) == 1.0  # a run without an end


def test_corpus_is_split_by_file() -> None:
    files = list_sources()
    training, validation = split_files(files)
    assert sorted(training + validation) == sorted(set(files))
    assert len(validation) == math.ceil(len(files) / 20)
    assert any(file.name == "argparse.py" for file in files)
    assert not any({"test", "site-packages"} & set(file.parts) for file in files)


@pytest.mark.alone
def test_corpus_loads_fast_and_the_same_each_time(library: StandardLibrary) -> None:
    start = time.process_time()
    again = StandardLibrary(context=32, batch_size=8, num_validation_windows=20)
    again.setup("fit")
    assert time.process_time() - start < 3
    assert len(again.training_windows.text) > 5_000_000
    for name in ("train_dataloader", "val_dataloader"):
        batch, same = (next(iter(getattr(module, name)())) for module in (library, again))
        assert batch["tokens"].shape == (8, 32) and batch["tokens"].dtype == torch.int64
        assert torch.equal(batch["tokens"], same["tokens"])
        assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


def test_windows_are_spread_over_the_text(tmp_path: Path) -> None:
    for name, text in (("a.py", b"x = 1\n"), ("b.py", b"y = 2\n")):
        (tmp_path / name).write_bytes(text)
    text = read_text([tmp_path / "a.py", tmp_path / "b.py"])
    assert bytes(text.tolist()) == b"x = 1\n" + SEPARATOR + b"y = 2\n"
    most = Windows(text, context=4)  # 15 bytes: three windows of 4, each with a byte after it
    assert [most[i]["tokens"].tolist() for i in range(len(most))] == [text[i : i + 4].tolist() for i in (0, 5, 10)]
    spread = Windows(text, context=4, count=2)
    assert [spread[i]["targets"].tolist() for i in range(len(spread))] == [text[1:5].tolist(), text[11:15].tolist()]


def test_plain_trainer_runs_the_demo(library: StandardLibrary) -> None:
    trainer = fit(library)
    assert trainer.global_step == 2
    metrics = trainer.callback_metrics
    assert math.isfinite(metrics["train_loss"]) and metrics["val_loss"] == pytest.approx(math.log(256), abs=0.5)
    decay, no_decay = trainer.optimizers[0].param_groups
    assert len(no_decay["params"]) == 5 and no_decay["weight_decay"] == 0  # two norms per block and the last
    assert len(decay["params"]) == 14 and decay["weight_decay"] == 0.1
    assert decay["lr"] == pytest.approx(3e-4)  # the schedule ends with the trainer's two steps


def test_samples_are_printed_and_repeatable(library: StandardLibrary, capsys: pytest.CaptureFixture[str]) -> None:
    sampler = SampleText(prompts=["def ", "import "], num_bytes=5, context=16)
    trainer = fit(library, sampler)
    printed = capsys.readouterr().out
    assert "--- what follows 'def ' ---\ndef " in printed and "--- what follows 'import ' ---\nimport " in printed
    with torch.no_grad():
        assert sampler.generate(trainer) == sampler.generate(trainer)
