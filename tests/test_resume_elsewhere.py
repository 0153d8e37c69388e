"""Data of a run that is resumed with other replicas or batches, after an error, or whose loaders save themselves."""

from __future__ import annotations

import logging
import random
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning_par import HybridParallelStrategy
from lightning_par.checkpoint.plain import put_together, take_apart
from lightning_par.host.data import DataResumption
from lightning_par.host.data.fitting import Manner
from lightning_par.runtime.generator_state import (
    Stream,
    find_generators,
    generator_states,
    restore,
    restore_generators,
    states_of,
)
from lightning_par.runtime.streams import MicrobatchStreams
from tests.ranks import run_ranks
from tests.test_resume import ROOTS, Noisy, user_module

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Own(DataLoader[torch.Tensor]):
    """A loader that a user made resumable; it remembers whose state it was given."""

    def __init__(self, replica: int, batch_size: int) -> None:
        super().__init__(Noisy(32), batch_size)
        self.replica = replica
        self.given: Any = None

    def state_dict(self) -> dict[str, int]:
        return {"replica": self.replica}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state


class Watch(pl.Callback):
    """Notes the samples of each batch, saves after some, and fails in one."""

    def __init__(self, folder: Path, stops: tuple[int, ...], fails_at: int) -> None:
        self.folder, self.stops, self.fails_at = folder, stops, fails_at
        self.seen: list[list[int]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch[:, 0].int().tolist())
        self.losses.append(outputs["loss"].item())
        if len(self.seen) in self.stops:
            trainer.save_checkpoint(self.folder / f"{len(self.seen)}.ckpt")

    def fail(self, *args: Any) -> None:
        """As a hook of a module, in the forward of a step."""
        if len(self.seen) + 1 == self.fails_at:
            raise KeyError("the step failed")

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyError):
            trainer.save_checkpoint(self.folder / "failed.ckpt")


def fit(
    world_size: int, layout: str, loader: Any, folder: Path, stops: tuple[int, ...] = (), start: str = "", fails_at: int = 0
) -> tuple[list[list[int]], list[str], list[float]]:
    """What samples each batch of this replica had, what was warned of, and the losses."""
    logging.getLogger(ROOTS[0]).setLevel(logging.ERROR)
    watch = Watch(folder, stops, fails_at)
    strategy = HybridParallelStrategy(layout, print_plan=False)
    shards = {"use_distributed_sampler": not isinstance(loader, Own)}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=strategy,
        callbacks=[watch],
        max_epochs=2,
        **shards,
        **QUIET,  # type: ignore[arg-type]
    )
    torch.manual_seed(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = user_module(ROOTS[0], lambda: loader, 0)
        module.blocks[1].register_forward_hook(watch.fail)
        try:
            trainer.fit(module, ckpt_path=str(folder / f"{start}.ckpt") if start else None)
        except KeyError:
            assert fails_at
    said = [str(each.message) for each in caught if "the checkpoint was saved inside" in str(each.message)]
    return watch.seen, said, watch.losses


def of_replicas(rank: int, world_size: int, layout: str, batch: int, folder: Path, options: dict[str, Any]) -> Any:
    return fit(world_size, layout, DataLoader(Noisy(32), batch, shuffle=True), folder, **options)


def together(found: list[Any]) -> list[list[int]]:
    """The samples of each batch of all replicas."""
    return [sorted(chain.from_iterable(parts)) for parts in zip(*(seen for seen, *_ in found), strict=True)]


def test_another_number_of_replicas_reads_the_samples_that_are_left(tmp_path: Path) -> None:
    whole = together(run_ranks(of_replicas, 2, "dp2", 4, tmp_path, {"stops": (3,)}))  # 4 batches of 8 in an epoch
    finer = run_ranks(of_replicas, 4, "dp4", 2, tmp_path, {"start": "3"})
    assert together(finer) == whole[3:] and not any(said for _, said, _ in finer)
    halves = run_ranks(of_replicas, 2, "dp2", 2, tmp_path, {"start": "3"})
    rest = together(halves)
    assert len(rest) == 2 + 8 and sorted(rest[0] + rest[1]) == whole[3]
    assert "inside an epoch with 8 samples in a batch of all replicas, now they are 4: the epoch goes on after 6" in halves[0][1][0]
    (alone,) = run_ranks(of_replicas, 1, "single", 8, tmp_path, {"start": "3"})
    assert len(alone[0]) == 1 + 4
    assert "in the order of a DistributedSampler, and now it is that of a RandomSampler: the rest" in alone[1][0]


def test_a_position_in_batches_of_another_size_passes_over_no_sample_that_was_not_used() -> None:
    kept = {"start": 0, "before": {3: {}}, "workers": {0: {}}}
    state = {"position": {"batches": 3, "begins": False}, "global_batch": 8, "sampler": "S", "pass": kept}
    for size, batches in ((4, 6), (8, 3), (16, 2), (5, 5)):
        fitting = Manner(size, "S").fit(state)
        assert fitting["position"]["batches"] == batches
        assert fitting is state if size == 8 else not fitting["pass"]["before"] and not fitting["pass"]["workers"]


def own_loader(rank: int, world_size: int, folder: Path) -> tuple[Any, Any]:
    saved, resumed = Own(rank // 2, 4), Own(7, 4)
    fit(world_size, "tp2_dp2", saved, folder, (1,))
    fit(world_size, "tp2_dp2", resumed, folder, (), "1")
    return saved.given, resumed.given


def test_a_loader_with_a_state_of_its_own_gets_that_of_its_replica(tmp_path: Path) -> None:
    found = run_ranks(own_loader, 4, tmp_path)
    assert found == [(None, {"replica": rank // 2}) for rank in range(4)]


def fail_and_resume(rank: int, world_size: int, folder: Path) -> Any:
    def loader() -> Any:
        return DataLoader(Noisy(32), 4, shuffle=True, num_workers=2)

    whole = fit(world_size, "single", loader(), folder)
    before = fit(world_size, "single", loader(), folder, fails_at=4)
    return whole, before, fit(world_size, "single", loader(), folder, start="failed")


def test_a_step_that_failed_is_run_again(tmp_path: Path) -> None:
    ((whole, before, after),) = run_ranks(fail_and_resume, 1, tmp_path, have_workers=True)
    assert len(before[0]) == 3
    assert (before[0] + after[0], before[2] + after[2]) == (whole[0], whole[2])


def resume_from_another_program(rank: int, world_size: int, folder: Path) -> Any:
    fit(world_size, "single", DataLoader(Noisy(32), 4), folder, (3,))
    DataResumption.load = lambda *args: None  # type: ignore[method-assign]  # as where the checkpoint says nothing
    return fit(world_size, "single", DataLoader(Noisy(32), 4), folder, start="3")


def test_a_checkpoint_that_does_not_say_where_its_loaders_were(tmp_path: Path) -> None:
    ((seen, said, _),) = run_ranks(resume_from_another_program, 1, tmp_path)
    assert seen[0] == [0, 1, 2, 3]
    (words,) = said
    assert "does not say where its loaders were: another program wrote it, and the data of the epoch begin again" in words


def test_states_of_generators_of_every_kind_are_restored_from_a_checkpoint() -> None:
    class Owner:
        def __init__(self) -> None:
            self.a, self.b = torch.Generator().manual_seed(1), random.Random(2)
            self.c, self.d = np.random.default_rng(3), np.random.RandomState(4)
            self.again, self.other = self.a, 5

    def draw(owner: Owner) -> list[float]:
        gauss = [owner.b.gauss(0, 1), owner.d.randn(), random.gauss(0, 1), np.random.randn()]
        return [*gauss, float(torch.rand((), generator=owner.a)), float(torch.rand(())), owner.c.random()]

    owner = Owner()
    draw(owner)
    generators = find_generators([owner])
    assert list(generators) == [f"0 Owner.{name}" for name in "abcd"]
    states, own = generator_states(), states_of(generators)
    expected = draw(owner)
    restore_generators(states)
    restore(generators, own)
    assert draw(owner) == expected
    json, tensors, odd = take_apart([states, own])
    assert not odd
    states, own = put_together(json, tensors, None)
    restore_generators(states)
    restore(generators, own)
    assert draw(owner) == expected


def test_a_stream_is_the_same_whatever_is_drawn_between() -> None:
    def drawn(between: int) -> list[float]:
        stream, numbers = Stream(3), []
        for _ in range(3):
            torch.rand(between)
            before = torch.get_rng_state()
            with stream.drawn():
                numbers += [float(torch.rand(())), random.random(), float(np.random.rand())]
            assert torch.equal(torch.get_rng_state(), before)
        return numbers

    assert drawn(1) == drawn(4) and len(set(drawn(1))) == 9


def test_evaluations_do_not_move_the_streams_of_training() -> None:
    def drawn(evaluations: int) -> tuple[list[float], list[float]]:
        streams = MicrobatchStreams(7, 0, torch.device("cpu"))
        trained, evaluated = [], []
        for trains in (True, *[False] * evaluations, True):
            with streams.step(trains):
                streams.begin(0)
                (trained if trains else evaluated).append(float(torch.rand(())))
        return trained, evaluated

    trained, evaluated = drawn(3)
    assert trained == drawn(0)[0] and evaluated[:2] == drawn(2)[1]
    assert len({*trained, *evaluated}) == 5
