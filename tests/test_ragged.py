"""Hooks, outputs and callbacks on 17 samples in batches of 4, of three lengths: under the stock Trainer and in stages, the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import BasePredictionWriter
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers.modeling_outputs import CausalLMOutput

from lightning_par.host.strategy import HybridParallelStrategy
from lightning_par.runtime.nested import children
from tests.models import VOCABULARY, adamw
from tests.ranks import run_ranks

NUM_SAMPLES, BATCH, CLASSES = 17, 4, 5
LENGTHS = (5, 8, 6)  # of one batch after the other


@dataclass
class Record:
    """What a user's predict_step may return."""

    scores: torch.Tensor
    names: list[str]
    nothing: None = None


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = x + self.down(F.gelu(self.up(x))) + x.cumsum(1) / 8
        return mixed


class Everything(pl.LightningModule):
    """Uses every hook, and writes down what each is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, CLASSES)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.accuracy = nn.ModuleDict(
            {stage: MulticlassAccuracy(CLASSES, average="micro") for stage in ("train_", "val0", "val1", "test0")}
        )
        self.told: list[Any] = []

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        x = self.embedding(batch["tokens"])
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x.mean(1))
        return logits

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        logits = self(batch)
        loss = F.cross_entropy(logits, batch["label"])
        self.accuracy["train_"](logits, batch["label"])
        self.log("train_accuracy", self.accuracy["train_"], on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return {"loss": loss, "logits": logits, "names": batch["name"], "step": self.global_step}

    def _evaluate(self, stage: str, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        logits = self(batch)
        loss = F.cross_entropy(logits, batch["label"])
        accuracy = self.accuracy[f"{stage}{dataloader_idx}"]
        accuracy.update(logits, batch["label"])
        self.log(f"{stage}_loss", loss)
        self.log(f"{stage}_accuracy", accuracy, on_step=False, on_epoch=True)
        return {"loss": loss, "logits": logits, "from": dataloader_idx}

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return self._evaluate("test", batch, 0)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        logits = self(batch)
        return {
            "pairs": [(logits, logits.argmax(-1)), (logits.softmax(-1).numpy(), None)],
            "record": Record(logits.max(-1).values, batch["name"]),
            "output": CausalLMOutput(logits=logits, hidden_states=(logits, logits + 1)),
            "each": [row[: 1 + index % 3] for index, row in zip(batch["index"].tolist(), logits, strict=True)],
            "three": logits.repeat_interleave(3, 0),
            "from": dataloader_idx,
            "nothing": None,
        }

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.told.append(("train", outputs, batch, batch_idx, self.trainer.global_step))

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.told.append(("validation", outputs, batch, batch_idx, dataloader_idx, self.trainer.sanity_checking))

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.told.append(("test", outputs, batch, batch_idx))

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.told.append(("predict", outputs, batch, batch_idx, dataloader_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self)


class Told(BasePredictionWriter):
    """A callback that is given the same, and writes predictions batch by batch."""

    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.told: list[Any] = []
        self.written: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.told.append(("train", outputs, batch, batch_idx, trainer.global_step, dict(trainer.callback_metrics)))

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *indices: int) -> None:
        self.told.append(("validation", outputs, batch, *indices))

    def write_on_batch_end(
        self, trainer: Any, module: Any, prediction: Any, batch_indices: Any, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if dataloader_idx == 0:
            self.written.update(zip(batch_indices, prediction["pairs"][0][0], strict=True))

    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, batch_indices: Any) -> None:
        self.told.append(("written", len(predictions), batch_indices))


def samples(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (NUM_SAMPLES, max(lengths)), generator=generator)
    labels = torch.randint(0, CLASSES, (NUM_SAMPLES,), generator=generator)
    return [
        {
            "tokens": tokens[index, : lengths[index // BATCH % len(lengths)]],
            "label": labels[index],
            "name": f"{seed}-{index}",
            "index": index,
        }
        for index in range(NUM_SAMPLES)
    ]


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Pads to the longest of a batch."""
    tokens = nn.utils.rnn.pad_sequence([item["tokens"] for item in items], batch_first=True)
    numbers = {key: torch.tensor([int(item[key]) for item in items]) for key in ("label", "index")}
    return {"tokens": tokens, "name": [item["name"] for item in items], **numbers}


def loader(seed: int, *lengths: int) -> DataLoader[Any]:
    return DataLoader(samples(seed, lengths or LENGTHS), BATCH, collate_fn=collate)  # type: ignore[arg-type]


def run_all(rank: int, world_size: int, words: tuple[str, ...], replicas: str) -> tuple[dict[str, Any], Any]:
    return {word: run(world_size, word) for word in words}, predict(world_size, replicas)


def begin(world_size: int, word: str) -> tuple[pl.Trainer, Everything, Told]:
    """A Trainer of a layout, the stock one of one process, and what it is used on."""
    torch.manual_seed(1)
    callback = Told()
    layout, _, schedule = word.partition(" ")
    strategy = None if word == "stock" else HybridParallelStrategy(layout, schedule=schedule or None, print_plan=False)
    options: dict[str, Any] = {} if strategy is None else {"strategy": strategy}
    options |= dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    options |= {"max_epochs": 2, "accumulate_grad_batches": 2, "num_sanity_val_steps": 2, "callbacks": [callback]}
    return pl.Trainer(accelerator="cpu", devices=world_size, **options), Everything(), callback


def predict(world_size: int, word: str) -> Any:
    """Predictions of a new model: those returned, and those written, by index."""
    trainer, module, callback = begin(world_size, word)
    predicted = trainer.predict(module, loader(4, 6))
    return plain((predicted, callback.written))


def predict_sharded(rank: int, world_size: int) -> tuple[list[int], int]:
    """Predict with the parameters that a fit has left in parts, which all replicas gather for each batch of any of them."""
    trainer, module, callback = begin(world_size, "dp2_zero3")
    trainer.fit(module, loader(0))
    predicted = trainer.predict(module, [loader(4), loader(5)])
    assert predicted is not None
    return sorted(callback.written), len(predicted[0])  # type: ignore[arg-type]


def run(world_size: int, word: str) -> Any:
    """All of a user's day in one layout."""
    trainer, module, callback = begin(world_size, word)
    evaluated: list[Any] = [*trainer.validate(module, loader(1), verbose=False)]
    trainer.fit(module, loader(0), [loader(1), loader(2)])
    metrics = dict(trainer.callback_metrics)
    evaluated += [*trainer.test(module, loader(3), verbose=False), metrics, trainer.global_step]
    predicted = trainer.predict(module, [loader(4), loader(5)])
    return plain(
        {
            "told": module.told,
            "callback": callback.told,
            "evaluated": evaluated,
            "predicted": predicted,
            "written": callback.written,
            "names": [output["record"].names for output in predicted[0]],  # type: ignore[index, union-attr, call-overload]
        }
    )


def plain(node: Any) -> Any:
    """Arrays for tensors, which cannot leave a process that ends; the kind of every container beside what is in it."""
    if isinstance(node, (torch.Tensor, np.ndarray)):
        return np.asarray(node.detach() if isinstance(node, torch.Tensor) else node)
    pairs = children(node)
    return node if pairs is None else (type(node).__name__, {key: plain(child) for key, child in pairs})


def check_alike(ours: Any, theirs: Any, path: str) -> None:
    assert type(ours) is type(theirs), path
    if isinstance(theirs, np.ndarray):
        assert ours.dtype == theirs.dtype, path
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5, err_msg=path)
    elif isinstance(theirs, tuple) and len(theirs) == 2 and isinstance(theirs[1], dict):
        assert ours[0] == theirs[0] and list(ours[1]) == list(theirs[1]), path
        for key, value in theirs[1].items():
            check_alike(ours[1][key], value, f"{path}.{key}")
    else:
        assert ours == (pytest.approx(theirs, rel=2e-4) if isinstance(theirs, float) else theirs), path


LOOPS = ("pp2", "pp2_mb3", "pp2_vp2", "pp2 zb-v")  # with zb-v the first and the last stage are on one rank


def test_every_hook_gets_what_one_process_gets() -> None:
    ((stock, predicted),) = run_ranks(run_all, 1, ("stock",), "stock")
    told = [each[1][0] for each in stock["stock"][1]["told"][1].values()]
    assert [told.count(name) for name in ("train", "validation", "test", "predict")] == [10, 5 + 4 + 20, 5, 10]
    alone = predicted[1][1][1]
    for rank, (result, (_, parts)) in enumerate(run_ranks(run_all, 2, LOOPS, "dp2")):
        for word in LOOPS:
            check_alike(result[word], stock["stock"], f"{word} on rank {rank}: ")
        written = parts[1][1]
        assert sorted(written) == list(range(rank, NUM_SAMPLES, 2))  # Lightning's sampler for predictions repeats none
        check_alike(("", written), ("", {index: alone[index] for index in written}), f"predictions of replica {rank}")
        returned = [output[1]["pairs"][1][0][1][0] for output in parts[0][1].values()]
        check_alike(np.concatenate(returned), np.stack(list(written.values())), f"predictions returned to replica {rank}")


def test_replicas_with_different_numbers_of_batches_predict_with_sharded_parameters() -> None:
    (first, num_first), (second, num_second) = run_ranks(predict_sharded, 2)
    assert sorted(first + second) == list(range(NUM_SAMPLES)) and (num_first, num_second) == (3, 2)
