"""A module cut to one stage is still the user's: its names, objects, attributes, hooks and data."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler

from lightning_par.errors import DataError, ModelError
from lightning_par.host.first_batch import first_batch
from lightning_par.install import install, install_tensor_parallel
from lightning_par.pipeline.arrival import Arrival
from lightning_par.pipeline.stage import StageProgram
from lightning_par.plan import Plan
from lightning_par.runtime.axis import LocalAxis
from lightning_par.runtime.parameter import get_spec
from tests.planning import Chain, plan_of, tokens

WIDTH = 16
CPU = torch.device("cpu")


class Block(nn.Module):
    kind = "class attribute"

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.attention_type = "full"
        self.register_buffer("table", torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu()) * self.table


class Model(Chain):
    """Tied weights, and a forward that reads attributes of its blocks."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__(Block, depth=depth)
        self.head.weight = self.embedding.weight
        self.seen: list[Any] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            self.seen.append((block.attention_type, block.kind, block.up.out_features, isinstance(block, Block)))
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


def installed(stage: int, word: str = "pp2", device: torch.device = CPU) -> tuple[Model, StageProgram, Plan]:
    torch.manual_seed(0)
    module = Model()
    plan = plan_of(module, word)
    return module, install(module, plan, stage, LocalAxis("tp", plan.layout.tp, 0), device), plan


def program(module: pl.LightningModule) -> Any:
    return lambda: module.training_step(tokens(), 0)


# ---------------------------------------------------------------------- names, objects, placeholders


def test_names_and_objects_stay() -> None:
    module = Model()
    modules, parameters = dict(module.named_modules()), dict(module.named_parameters())
    plan = plan_of(module, "tp2_pp2")
    install(module, plan, 0, LocalAxis("tp", 2, 0), CPU)
    assert dict(module.named_modules()) == modules
    held = dict(module.named_parameters())
    assert all(parameters[name] is parameter and get_spec(parameter).name == name for name, parameter in held.items())
    assert {name for name in held if name.startswith("blocks")} == {
        f"blocks.{i}.{layer}.{name}" for i in (0, 1) for layer in ("up", "down") for name in ("weight", "bias")
    }
    assert module.blocks[0].up.weight.shape == (16, WIDTH) and get_spec(module.blocks[0].up.weight).shape == (32, WIDTH)


@pytest.mark.parametrize("device", [CPU, torch.device("meta")], ids=str)
def test_placeholders(device: torch.device) -> None:
    module, _, _ = installed(1, device=device)
    for owner, name, shape in (
        (module.embedding, "weight", (24, WIDTH)),
        (module.blocks[0].up, "bias", (32,)),
        (module.blocks[1], "table", (16,)),
    ):
        zeros = getattr(owner, name)
        assert type(zeros) is torch.Tensor and zeros.shape == shape and zeros.device == device
        assert set(zeros.stride()) == {0} and zeros.untyped_storage().nbytes() == zeros.element_size()
    assert set(dict(module.named_buffers())) == {"blocks.2.table", "blocks.3.table"}
    assert not any(name.startswith(("blocks.0", "blocks.1")) for name in module.state_dict())


def test_tied_weights_live_on_both_stages() -> None:
    first, _, _ = installed(0)
    last, _, _ = installed(1)
    for module, name in ((first, "embedding.weight"), (last, "head.weight")):
        parameter = dict(module.named_parameters(remove_duplicate=False))[name]
        assert get_spec(parameter).name == "embedding.weight" and get_spec(parameter).stages == (0, 1)
    assert "head.weight" not in dict(first.named_parameters(remove_duplicate=False))
    assert torch.equal(first.embedding.weight, last.head.weight)


def test_all_stages_at_once() -> None:
    module = Model()
    install_tensor_parallel(module, plan_of(module, "tp2"), LocalAxis("tp", 2, 1))
    assert module.embedding.weight is module.head.weight and module.embedding.weight.shape == (12, WIDTH)


# ---------------------------------------------------------------------- running one stage


def test_stages_one_after_the_other_are_the_whole() -> None:
    torch.manual_seed(0)
    expected = Model().training_step(tokens(), 0)
    first, first_stage, _ = installed(0)
    last, last_stage, _ = installed(1)
    _, left = first_stage.run(0, program(first), None, Arrival())
    assert len(left) == 1 and first.seen == last.seen + first.seen[: len(first.seen)]  # it stops at the next stage's block
    loss, nothing = last_stage.run(1, program(last), lambda held: [left[0].detach()], Arrival())
    assert nothing == [] and torch.equal(loss, expected)
    assert last.seen == [("full", "class attribute", 32, True)] * 4


def ones(held: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.ones_like(tensor) for tensor in held]


def test_an_error_in_the_step_leaves_nothing_behind() -> None:
    module, stage, _ = installed(1)

    def fails() -> None:
        module(tokens()["tokens"])
        raise ValueError("the user's")

    with pytest.raises(ValueError, match="the user's"):
        stage.run(1, fails, ones, Arrival())
    with pytest.raises(ModelError, match=r"blocks\.0 was called outside of a step: a pipeline runs its blocks inside steps"):
        module(tokens()["tokens"])
    loss, _ = stage.run(1, program(module), ones, Arrival())
    assert loss is not None


def test_handlers_of_the_user_do_not_stop_a_stage() -> None:
    module, stage, _ = installed(0)

    def careful() -> Any:
        try:
            return module.training_step(tokens(), 0)
        except Exception:
            return None

    output, left = stage.run(0, careful, None, Arrival())
    assert output is None and len(left) == 1


def test_hooks_of_the_user_still_fire() -> None:
    torch.manual_seed(0)
    module = Model()
    fired: list[tuple[str, bool]] = []
    watched = ("embedding", "blocks.0", "blocks.1.up", "blocks.2", "blocks.2.up", "blocks.3", "head")
    for name in watched:
        child = module.get_submodule(name)
        child.register_forward_pre_hook(lambda child, args, name=name: fired.append((name, bool((args[0] == 7).all()))))
        child.register_forward_hook(lambda child, args, output, name=name: fired.append((name, False)))
    plan = plan_of(module, "tp2_pp2")
    fired.clear()
    stage = install(module, plan, 1, LocalAxis("tp", 2, 0), CPU)
    stage.run(1, program(module), lambda held: [torch.full_like(tensor, 7) for tensor in held], Arrival())
    names = [name for name, _ in fired]
    assert [name for name in watched if names.count(name) == 2] == ["embedding", "blocks.2", "blocks.2.up", "blocks.3", "head"]
    assert ("blocks.2", True) in fired  # sees what was received
    assert "blocks.0" not in names and "blocks.1.up" not in names  # they run on the stage before


# ---------------------------------------------------------------------- the first batch


class Numbers(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(10))


class Augmented(Dataset[torch.Tensor]):
    """Draws from all three generators."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(()) + random.random() + np.random.rand()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


RANGE = TensorDataset(torch.arange(10))
LOADERS = {
    "in order": lambda: DataLoader(RANGE, 4),
    "shuffled": lambda: DataLoader(RANGE, 4, shuffle=True),
    "own generator": lambda: DataLoader(RANGE, 4, shuffle=True, generator=seeded()),
    "sampler": lambda: DataLoader(RANGE, 4, sampler=RandomSampler(RANGE, generator=seeded())),
    "weighted": lambda: DataLoader(RANGE, 4, sampler=WeightedRandomSampler([1.0] * 10, 10, generator=seeded())),
    "sampler with a generator in a batch sampler": lambda: DataLoader(
        RANGE, batch_sampler=torch.utils.data.BatchSampler(RandomSampler(RANGE, generator=seeded()), 4, False)
    ),
    "iterable": lambda: DataLoader(Numbers(), 4),
    "iterable, no batches": lambda: DataLoader(Numbers(), batch_size=None),
    "no batches": lambda: DataLoader(RANGE, batch_size=None),
    "augmented": lambda: DataLoader(Augmented(), 4, shuffle=True),
    "dict": lambda: {"a": DataLoader(RANGE, 4, shuffle=True), "b": DataLoader(Augmented(), 2)},
    "list": lambda: [DataLoader(RANGE, 4), DataLoader(Numbers(), 3)],
    "own class": lambda: [torch.arange(4), torch.arange(8)],
}


def values(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {key: values(value) for key, value in batch.items()}
    return [values(item) for item in batch] if isinstance(batch, (list, tuple)) else batch.tolist()


def read(loaders: Any) -> Any:
    if isinstance(loaders, dict):
        return {key: read(loader) for key, loader in loaders.items()}
    if isinstance(loaders, list) and isinstance(loaders[0], DataLoader):
        return [read(loader) for loader in loaders]
    return [values(batch) for batch in loaders]


@pytest.mark.parametrize("name", LOADERS)
def test_peeking_does_not_disturb_the_data(name: str) -> None:
    results = []
    for peeks in (False, True):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        loaders = LOADERS[name]()
        peeked = values(first_batch(loaders)) if peeks and name != "own class" else None
        results.append(read(loaders))
    assert results[0] == results[1]
    if name in ("in order", "iterable", "sampler", "weighted"):
        assert peeked == results[0][0]


def test_data_that_cannot_be_read() -> None:
    with pytest.raises(DataError, match="is a generator, which can be read only once"):
        first_batch(batch for batch in [1])
    with pytest.raises(DataError, match="gives no batch"):
        first_batch(DataLoader(TensorDataset(torch.empty(0, 2)), 4))

    class Stream(IterableDataset[int]):
        """Gives every number once, however often it is iterated."""

        def __init__(self, source: Any) -> None:
            self.source, self.given = source, 0

        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            self.given += 1
            return self.given

    stream = Stream(None)
    assert first_batch(DataLoader(stream, 4)).tolist() == [1, 2, 3, 4] and next(stream) == 1
    with pytest.raises(DataError, match="the loader's IterableDataset is a Stream, which can be read only once"):
        first_batch(DataLoader(Stream(threading.Lock()), 4))
