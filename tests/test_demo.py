"""The demo on one device: what it computes, what it reads, and that plain Lightning runs it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BertTokenizer, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from lightning_par.demo.classifier import Classifier
from lightning_par.demo.corpus import SEPARATOR, StandardLibrary, Windows, list_sources, read_text, split_files
from lightning_par.demo.glyphs import Glyphs, pixels
from lightning_par.demo.gpt import GPT, rotary_angles, rotate
from lightning_par.demo.image_folder import ImageFolder, middle_crop, random_crop
from lightning_par.demo.language_model import LanguageModel
from lightning_par.demo.optimizer import warmup_cosine
from lightning_par.demo.packages import PACKAGES, PAD, START, Packages
from lightning_par.demo.sample import SampleText
from lightning_par.demo.text_files import TextFiles


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


def test_glyphs_are_the_same_everywhere_and_all_letters() -> None:
    data = Glyphs(image_size=24, batch_size=26, num_training=52, num_validation=26)
    batch = next(iter(data.val_dataloader()))
    assert batch["pixel_values"].shape == (26, 3, 24, 24) and batch["pixel_values"].dtype == torch.float32
    assert sorted(batch["labels"].tolist()) == list(range(26))
    assert -1 <= batch["pixel_values"].min() < batch["pixel_values"].max() <= 1
    assert batch["pixel_values"].flatten(1).std(dim=1).min() > 0.05, "a letter that is not seen"
    assert torch.equal(data.training[3]["pixel_values"], Glyphs(image_size=24, num_training=52).training[3]["pixel_values"])
    assert not torch.equal(data.training[3]["pixel_values"], data.training[29]["pixel_values"])  # the same letter again


def test_packages_are_split_by_file() -> None:
    data = Packages(length=64, batch_size=16)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (16, 64)
    assert set(batch["input_ids"][:, 0].tolist()) == {START}
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == PAD)
    labels = [label for _, label in data.training.pieces]
    assert len(data.training) > 5000 and 0 <= min(labels) < max(labels) < len(PACKAGES)
    texts = {piece for piece, _ in data.training.pieces}
    assert sum(piece in texts for piece, _ in data.validation.pieces) < 0.02 * len(data.validation)  # licences are alike


def test_images_of_the_users_are_read_by_class(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 1)):
        for label, grey in (("cat", 60), ("dog", 200)):
            (tmp_path / part / label).mkdir(parents=True)
            for index in range(count):
                Image.new("L", (40, 30 + index), grey).save(tmp_path / part / label / f"{index}.png")
    data = ImageFolder(str(tmp_path), image_size=16, batch_size=6, num_workers=0)
    data.setup("fit")
    for loader, count in ((data.train_dataloader(), 6), (data.val_dataloader(), 2)):
        batch = next(iter(loader))
        assert batch["pixel_values"].shape == (count, 3, 16, 16)
        found = [(round((pixels.mean().item() + 1) * 127.5), label) for pixels, label in zip(*batch.values(), strict=True)]
        assert sorted(found) == [(60, 0)] * (count // 2) + [(200, 1)] * (count // 2)
    with pytest.raises(FileNotFoundError, match=r"train has no images: data.path needs train/CLASS/\*.jpg and val/CLASS/\*.jpg"):
        ImageFolder(str(tmp_path / "nowhere")).setup("fit")


def test_crops_stay_inside_and_the_middle_is_the_middle() -> None:
    picture = Image.new("RGB", (64, 32), (0, 0, 0))
    picture.paste((255, 255, 255), (30, 14, 34, 18))
    middle = pixels(middle_crop(picture, 28))  # 28 x 28 of the middle, as they are
    assert middle[:, 12:16, 12:16].min() == 1 and middle.sum() == pytest.approx(3 * (16 - (28 * 28 - 16)))
    bright = Image.new("RGB", (64, 32), (255, 255, 255))
    assert all(pixels(random_crop(bright, 20)).min() == 1 for _ in range(50)), "a crop reaches beyond the picture"


def test_texts_of_the_users_are_encoded_by_their_tokenizer(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(tmp_path)
    for name in ("train", "validation"):
        lines = [{"text": "good good", "label": 1}, {"text": "bad " * 9, "label": 0}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = TextFiles(str(tmp_path), str(tmp_path), length=6, batch_size=2)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch["input_ids"].tolist() == [[2, 5, 5, 3, 0, 0], [2, 6, 6, 6, 6, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6] and batch["labels"].tolist() == [1, 0]
    assert len(data.train_dataloader()) == 1


def test_a_classifier_learns_letters_in_plain_lightning() -> None:
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_labels=26
    )
    module = Classifier(ViTForImageClassification(config), lr=1e-2, warmup_steps=1)
    data = Glyphs(image_size=16, batch_size=52, num_training=52, num_validation=52)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=50, limit_val_batches=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    assert trainer.callback_metrics["train_loss"] < math.log(26) - 0.2
    (found,) = trainer.validate(module, data.val_dataloader(), verbose=False)
    assert 0 < found["val_loss"] < 10 and found["val_accuracy"] * 52 == pytest.approx(round(found["val_accuracy"] * 52), abs=1e-4)


def test_logits_of_transformers_are_read() -> None:
    tokens = torch.randint(100, (2, 8))
    network = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    loss = LanguageModel(network.eval())._loss({"tokens": tokens, "targets": tokens})
    logits = network(tokens).logits.flatten(0, 1)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, tokens.flatten()).item())
