"""Weights read from the files that transformers writes: each rank its shards, and what is wrong with them told before training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_par.config.run import take_weights
from lightning_par.errors import ConfigurationError
from lightning_par.host.strategy import HybridParallelStrategy
from lightning_par.materialize import deferred_init, match_weights
from lightning_par.materialize.weight_file import StoredTensor
from lightning_par.runtime.parameter import Split
from lightning_par.zero.partitioned import DeepSpeedStates
from tests.models import TransformersModel, gpt2, llama, make_batch
from tests.parity import check_parity
from tests.ranks import run_ranks
from tests.test_materialize import resident
from tests.zoo import ZOO

MakeModel = Callable[[], pl.LightningModule]
TOKENS = torch.arange(32).view(2, 16)
MAKERS: dict[str, MakeModel] = {"GPT-2": gpt2, "Llama": llama, "Llama, 131 tokens": ZOO["Llama, 131 tokens"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each model, in several files, its weights drawn from a seed of its own."""
    found = {}
    for name, make in MAKERS.items():
        torch.manual_seed(7)
        found[name] = tmp_path_factory.mktemp("weights")
        make().model.save_pretrained(found[name], max_shard_size="40KB")  # type: ignore[union-attr, operator]
        assert len(list(found[name].glob("*.safetensors"))) > 2
    return found


def pretrained(make: MakeModel, folder: Path) -> MakeModel:
    """The model that one process reads from the folder; on ranks, one without weights."""

    def read() -> pl.LightningModule:
        if dist.is_initialized():
            with deferred_init("fast"):
                return make()
        module: Any = make()
        module.model = type(module.model).from_pretrained(folder)
        return module

    return read


@pytest.mark.parametrize("word", ["tp2_pp2", pytest.param("tp2_pp2_dp2_zero3", marks=pytest.mark.slow)])
def test_training_is_that_of_one_process_with_these_weights(word: str, folders: dict[str, Path]) -> None:
    makers = {name: pretrained(make, folders[name]) for name, make in MAKERS.items() if word == "tp2_pp2" or name != "Llama"}
    check_parity(makers, word, options={name: {"weights": folders[name]} for name in makers})


class Logits(TransformersModel):
    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=batch["tokens"]).logits
        return logits


def predict_alone(rank: int, world_size: int, folders: dict[str, Path]) -> None:
    batch = {"tokens": torch.arange(32).view(2, 16)}
    module, expected = (Logits(llama().model) for _ in range(2))  # type: ignore[arg-type]
    expected.model = type(expected.model).from_pretrained(folders["Llama"])  # type: ignore[attr-defined]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy: Any = HybridParallelStrategy("single", weights=folders["Llama"], print_plan=False)
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, **quiet)  # type: ignore[arg-type]
    loader = torch.utils.data.DataLoader([batch], batch_size=None)  # type: ignore[arg-type, var-annotated]
    (logits,) = trainer.predict(module, loader)  # type: ignore[misc]
    with torch.no_grad():
        assert torch.equal(logits, expected.eval().predict_step(batch, 0))  # type: ignore[arg-type]


def test_a_module_with_weights_of_its_own_takes_those_of_the_files(folders: dict[str, Path]) -> None:
    """In one process, through the Trainer; the weights that the module had are replaced."""
    run_ranks(predict_alone, 1, folders)


class Still(Logits):
    """Steps, and stays where it is."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def large() -> Still:
    """0.7 GiB."""
    sizes = dict(vocab_size=16000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16)
    return Still(LlamaForCausalLM(LlamaConfig(**sizes)))  # type: ignore[arg-type]


def write_large(rank: int, world_size: int, folder: Path) -> np.ndarray:
    """Save it; the logits of one process."""
    torch.manual_seed(7)
    module = large().eval()
    module.model.save_pretrained(folder, max_shard_size="200MB")  # type: ignore[operator]
    with torch.no_grad():
        return module.predict_step({"tokens": TOKENS}, 0).numpy()


def predict_logits(rank: int, world_size: int, word: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Logits after a step that has started ZeRO, what the rank holds of the weights, and the most that it took to read them.

    An array, because tensors cannot leave a process that ends.
    """
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    base, seen, initialize = resident("VmRSS"), {}, deepspeed.initialize

    def look(**given: Any) -> Any:
        seen["peak"] = resident("VmHWM") - base  # before there are gradients and optimizer states
        seen["held"] = sum(parameter.ds_tensor.nbytes for parameter in given["model"].parameters())
        return initialize(**given)

    monkeypatch.setattr(deepspeed, "initialize", look)
    with deferred_init("fast"):
        module = large()
    strategy: Any = HybridParallelStrategy(word, weights=folder, print_plan=False)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=world_size, max_steps=1, **quiet)  # type: ignore[arg-type]
    trainer.fit(module, torch.utils.data.DataLoader([make_batch(0, 4)] * 2, batch_size=None))  # type: ignore[arg-type]
    assert isinstance(strategy.states, DeepSpeedStates)
    loader: Any = torch.utils.data.DataLoader([{"tokens": TOKENS}] * 2, batch_size=None)  # type: ignore[list-item]
    (logits,) = trainer.predict(module, loader)  # type: ignore[misc]
    return logits.numpy(), seen  # type: ignore[union-attr]


@pytest.mark.slow
def test_no_rank_ever_has_more_weights_than_its_partition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (truth,) = run_ranks(write_large, 1, tmp_path, timeout=200)
    for logits, seen in run_ranks(predict_logits, 8, "tp2_pp2_dp2_zero3", tmp_path, monkeypatch, timeout=280):
        np.testing.assert_allclose(logits, truth, rtol=1e-4, atol=1e-5)
        assert 80e6 < seen["held"] < 110e6  # an eighth, and stages differ a little
        assert seen["peak"] < 1.1 * seen["held"] + 100e6, f"{seen['peak'] / 2**20:.0f} MiB"


@pytest.mark.parametrize("shape", [(13,), (13, 5), (5, 13), (3, 13, 4), ()])
def test_a_shard_is_read_alone(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = torch.randn(shape)
    save_file({"a": tensor}, tmp_path / "x.safetensors")
    stored = StoredTensor(tmp_path / "x.safetensors", "a", shape)
    assert torch.equal(stored.read_shard(None, 1, 0, torch.float32), tensor)
    assert torch.equal(stored.read_shard(None, 4, 0, torch.bfloat16), tensor.bfloat16())
    for dim in range(len(shape)):
        for split in (Split(dim, (shape[dim],)), Split(dim, (1, shape[dim] - 1)), Split(dim, (shape[dim],), (2,))):
            for coordinate in range(4):
                assert torch.equal(stored.read_shard(split, 4, coordinate, torch.float32), split.shard(tensor, 4, coordinate))


def test_large_tensors_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(37, 11)
    save_file({"a": tensor}, tmp_path / "x.safetensors")
    monkeypatch.setattr("lightning_par.materialize.weight_file._BLOCK", 3 * 11 * 4)
    stored = StoredTensor(tmp_path / "x.safetensors", "a", (37, 11))
    for split in (Split(0, (20, 17)), Split(1, (11,))):
        assert torch.equal(stored.read_shard(split, 2, 1, torch.float32), split.shard(tensor, 2, 1))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = (llama().model for _ in range(2))


def refusal(module: nn.Module, path: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        match_weights(module, path)
    return str(caught.value)


def copied(folder: Path, target: Path) -> Path:
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_missing_files(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["Llama"], tmp_path)
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    (folder / names[1]).unlink()
    assert f"1 of the {len(names)} files in model.safetensors.index.json are missing: {names[1]}: copy them too" in refusal(
        llama(), folder
    )
    (folder / "model.safetensors.index.json").unlink()
    assert f"{len(names) - 1} safetensors files and no model.safetensors.index.json" in refusal(llama(), folder)


def test_damaged_files(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["Llama"], tmp_path)
    index, first = folder / "model.safetensors.index.json", min(folder.glob("*.safetensors"))
    whole, places = index.read_text(), json.loads(index.read_text())
    places["weight_map"]["model.norm.scale"] = first.name
    index.write_text(json.dumps(places))
    assert "names tensors that no file has: model.norm.scale: copy the files again" in refusal(llama(), folder)
    index.write_text("{}")
    assert "model.safetensors.index.json is no index of safetensors files: KeyError('weight_map')" in refusal(llama(), folder)
    index.write_text(whole)
    first.write_bytes(first.read_bytes()[:100])
    assert f"{first}: not a whole safetensors file:" in refusal(llama(), folder)


def test_no_files(tmp_path: Path) -> None:
    assert "there is no such folder or file" in refusal(llama(), tmp_path / "none")
    (tmp_path / "pytorch_model.bin").touch()
    assert "no safetensors file, but pytorch_model.bin: save the model with transformers'" in refusal(llama(), tmp_path)


def test_another_model(folders: dict[str, Path], tmp_path: Path) -> None:
    message = refusal(gpt2(), folders["Llama"])
    assert "do not fit TransformersModel:\n  missing: 5" in message and "\n  unexpected: 3" in message
    assert "model.transformer.h.0.attn.c_attn.weight" in message and "and 32 more" in message
    message = refusal(llama(), folders["Llama, 131 tokens"])
    assert "model.model.embed_tokens.weight is [128, 32] in TransformersModel and [131, 32] in the files" in message
    tensors = load_file(min(folders["Llama"].glob("*.safetensors")))
    save_file({**tensors, "model.layers.0.extra": torch.ones(2)}, tmp_path / "model.safetensors")
    message = refusal(llama(), tmp_path)
    assert "\n  missing: " in message and "\n  unexpected: 1\n    model.layers.0.extra\n" in message


def test_two_copies_of_a_model(folders: dict[str, Path]) -> None:
    assert "fit several parts of the module (student, teacher): build a module that contains" in refusal(Twice(), folders["Llama"])


def test_names_that_stand_elsewhere(folders: dict[str, Path], tmp_path: Path) -> None:
    """The base model of a causal model's files; a module of deeper nesting; tied names that the files leave out."""
    module = nn.Module()
    module.outer = llama()
    weights = match_weights(module, folders["Llama"])
    assert weights.tensors["outer.model.model.norm.weight"].name == "model.norm.weight"
    weights = match_weights(gpt2(), folders["GPT-2"])
    assert "model.lm_head.weight" not in weights.tensors and "model.transformer.wte.weight" in weights.tensors
    tensors = {f"extra.{name}": value for file in folders["Llama"].glob("*.safetensors") for name, value in load_file(file).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert match_weights(llama(), tmp_path / "model.safetensors").tensors["model.lm_head.weight"].name == "extra.lm_head.weight"


class Takes(nn.Module):
    def __init__(self, weights: str) -> None:
        super().__init__()


def test_the_key_of_the_model() -> None:
    model = OmegaConf.create({"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 2, "weights": "folder"})
    left, weights = take_weights(model)
    assert weights == "folder" and "weights" not in left and left.in_features == 2
    model = OmegaConf.create({"_target_": "tests.test_weights.Takes", "weights": "folder"})
    assert take_weights(model) == (model, None)


def test_no_process_is_started_for_weights_that_do_not_fit(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process is started")

    monkeypatch.setattr("lightning_par.host.launch.processes.RankProcesses.__init__", refuse)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy: Any = HybridParallelStrategy("tp2", weights=folders["GPT-2"], print_plan=False)
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, max_steps=1, **quiet)  # type: ignore[arg-type]
    loader = torch.utils.data.DataLoader([make_batch(0, 4)], batch_size=None)  # type: ignore[arg-type, var-annotated]
    with pytest.raises(ConfigurationError, match=r"do not fit TransformersModel:\n  missing: "):
        trainer.fit(llama(), loader)
