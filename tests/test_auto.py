"""``parallel=auto``: the planner's choice trains as one process does, on every rank the same, and says why it was made."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning_par import HybridParallelStrategy
from lightning_par.cli import main
from lightning_par.config.devices import choose_devices
from lightning_par.config.parallel import ParallelConfig, read_layout
from lightning_par.errors import ConfigurationError, LayoutError, ModelError
from lightning_par.host.auto import Choice, with_recompute
from lightning_par.host.here import cluster_here
from lightning_par.host.option import Options
from lightning_par.host.outlook import taken_apart
from lightning_par.layout import Layout, parse_layout
from lightning_par.planner import Limits, search
from lightning_par.runtime.parameter import get_spec
from tests.models import gpt, make_batch
from tests.parity import REPLICA_BATCH, STEPS, Run, Steps, compare, fit, kept, machines
from tests.planning import Block, Chain, loader_of, quiet_trainer, tokens
from tests.ranks import run_ranks


@pytest.fixture(autouse=True)
def _nothing_is_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_par.host.here.cached_of_device", lambda name: [])


LITTLE = 2.1e-5  # GiB: less than one rank needs for the whole model

# ---------------------------------------------------------------------- the word


def test_the_word() -> None:
    auto = parse_layout("auto")
    assert auto.auto and str(auto) == "auto" and str(auto.resolve(4)) == "auto"
    assert read_layout(vars(ParallelConfig.of(auto))) == auto
    with pytest.raises(LayoutError, match="parallel=tp2 with auto, which chooses the sizes: leave one of them out"):
        Layout(tp=2, auto=True)


def test_on_a_cpu_each_core_has_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for cores, processes in ((1, 1), (6, 6), (64, 8)):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert choose_devices({"accelerator": "cpu"}, parse_layout("auto"))["devices"] == processes


def train_here(module: pl.LightningModule, **options: Any) -> None:
    strategy = HybridParallelStrategy("auto", **options)
    quiet_trainer("auto", 2, strategy=strategy, max_steps=1).fit(module, loader_of(tokens(8)))


def test_what_cannot_be_chosen_for() -> None:
    with pytest.raises(ConfigurationError, match=r"parallel=auto does not foresee what options of zero do .* name the layout"):
        train_here(Chain(Block, depth=4), zero={"reduce": "microbatch"})
    with pytest.raises(ModelError, match=r"parallel=auto: batch=8 on 2 devices of here: nothing fits.*; or name a layout"):
        train_here(Chain(Block, depth=4), memory_gib=1e-6)
    match = r"parallel=auto chooses for trainer.fit, and trainer.predict comes without it: name"
    with pytest.raises(ConfigurationError, match=match):
        quiet_trainer("auto", 2).predict(Chain(Block), loader_of(tokens(8)))


class LBFGS(Chain):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters())


def test_an_optimizer_that_the_planner_does_not_know() -> None:
    with pytest.raises(ModelError, match=r"parallel=auto: the planner takes one optimizer .* gives LBFGS: .* such as parallel=dp2"):
        train_here(LBFGS(Block))


def test_check_wants_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["check", "parallel=auto"])
    assert raised.value.code == 2
    assert "parallel=auto: check compares one layout with one process: name it" in capsys.readouterr().err


# ---------------------------------------------------------------------- the search


def test_replicas_have_a_batch_each() -> None:
    """Samples add up over replicas, and what counts is the time for one."""
    trainer = quiet_trainer("single", 1)
    with taken_apart(trainer, lambda words: None, Chain(Block, depth=4), loader_of(tokens(8))) as (anatomy, _):
        cluster = cluster_here(torch.device("cpu"), 1, 4)
        shared, each = (search(anatomy, cluster, 8, Limits(per_replica)) for per_replica in (False, True))
        only = search(anatomy, cluster, 8, Limits(recompute=("full",), schedule="gpipe"))
    assert {estimate.candidate.samples for estimate in shared.best} == {8}
    assert all(estimate.candidate.samples == 8 * (estimate.candidate.layout.dp or 1) for estimate in each.best)
    assert len({estimate.candidate.samples for estimate in each.best}) > 1
    merits = [estimate.sample_seconds for estimate in each.best]
    assert merits == sorted(merits)
    assert {estimate.candidate.recompute for estimate in only.best} == {"full"}
    assert {estimate.candidate.schedule for estimate in only.best if estimate.candidate.layout.pp > 1} <= {"gpipe"}


def test_a_batch_smaller_than_the_planner_looks_at() -> None:
    trainer = quiet_trainer("single", 1)
    with taken_apart(trainer, lambda words: None, gpt(), loader_of(make_batch(0, 1))) as (anatomy, first):
        found = search(anatomy, cluster_here(torch.device("cpu"), 1, 2), len(first["tokens"]), Limits(per_replica=True))
    assert {estimate.candidate.rows for estimate in found.best} == {1}


def test_where_memory_is_limited_recomputation_fits_it_block_by_block() -> None:
    choice = Choice(Layout(dp=2), None, "selective")

    def chosen(memory_gib: float | None, said: dict[str, Any]) -> Any:
        options = HybridParallelStrategy("auto", memory_gib=memory_gib, plan={"recompute": said}).options
        assert isinstance(options, Options)
        return with_recompute(options, choice).overrides["recompute"]

    assert chosen(None, {}) == {"*": "selective"}
    assert chosen(1.0, {"blocks.0": "full"}) == {"*": "auto", "blocks.0": "full"}


# ---------------------------------------------------------------------- training


class Small(Chain):
    def __init__(self) -> None:
        super().__init__(Block)

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self(batch["tokens"])


def batch(step: int, size: int) -> dict[str, torch.Tensor]:
    return {"tokens": torch.randint(0, 24, (size, 6), generator=torch.Generator().manual_seed(step))}


def _train(rank: int, world_size: int, options: dict[str, Any]) -> tuple[Layout, Run, tuple[str, ...]]:
    """All replicas read the same batches, so that every layout trains as one process does on them."""
    strategy = HybridParallelStrategy("auto", print_plan=False, **options)
    assert strategy.choice is None
    loader: DataLoader[Any] = DataLoader(Steps(1, 0, batch), batch_size=None)
    trainer, module, run = fit(Small, loader, strategy=strategy, **machines(world_size))
    assert (strategy.choice is not None) == (rank == 0) and not strategy.layout.auto
    run.weights = {name: kept(value) for name, value in strategy.states.full_parameters()}
    run.specs = {name: get_spec(p) for name, p in module.named_parameters()}
    again = HybridParallelStrategy("auto", print_plan=False)  # takes a module as it is split
    quiet_trainer("auto", world_size, strategy=again).predict(module, loader)
    assert again.layout == strategy.layout and trainer.global_step == STEPS
    return strategy.layout, run, strategy.plan.notes


@pytest.mark.parametrize("options", [{}, {"memory_gib": LITTLE}], ids=["free", "little memory"])
def test_what_is_chosen_trains_as_one_process(options: dict[str, Any]) -> None:
    results = run_ranks(_train, 2, options, timeout=300, collective_timeout=timedelta(seconds=200))  # rank 0 chooses alone
    layouts, runs, notes = zip(*results, strict=True)
    assert layouts[0] == layouts[1] and layouts[0].world_size == 2
    assert not options or layouts[0].model_size * (layouts[0].zero or 1) > 1
    _, module, alone = fit(Small, DataLoader(Steps(1, None, batch), batch_size=None), devices=1)
    alone.weights = {name: kept(parameter) for name, parameter in module.named_parameters()}
    compare(alone, list(runs), layouts[0])
    assert notes[0] == notes[1] and "is the quickest of" in notes[0][0]
    assert options or (layouts[0].dp == 2 and "next: parallel=" in notes[0][1])
    assert f": a step of {REPLICA_BATCH * (layouts[0].dp or 1)} samples in " in notes[0][0]  # replicas have a batch each


def test_explain_says_which_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", "parallel=auto", "trainer.devices=2", "model.network.width=32", "model.network.depth=4"])
    printed = capsys.readouterr().out
    assert printed.startswith("parallel=auto: parallel=") and "tp 1 x pp" in printed
