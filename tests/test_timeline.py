"""What happened in a pipeline: the clock of a rank, and the callback that draws what all ranks did."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_par import ConfigurationError, Layout, PipelineTimeline
from lightning_par.host.timeline import write
from lightning_par.pipeline.action import Action, Row
from lightning_par.pipeline.clock import Clock, CudaClock, WallClock
from lightning_par.pipeline.schedules import build_schedule
from lightning_par.pipeline.simulate import Span
from tests.planning import Block, Chain, quiet_trainer, tokens
from tests.ranks import run_ranks
from tests.test_picture import page_data, run_picture

F0, F1, B0 = Action("F", 1, 0), Action("F", 1, 1), Action("B", 1, 0)


class FakeEvent:
    """An event of a device whose time goes on by 1 ms with each record."""

    clock = count(1)

    def record(self) -> None:
        self.at = next(self.clock)

    def elapsed_time(self, other: FakeEvent) -> float:
        return float(other.at - self.at)


def played(clock: Clock[Any]) -> tuple[Span, ...]:
    """A forward that waits, one that does not, a backward that waits twice; each call is one unit of time later."""
    clock.zero()  # 0
    clock.begin(F0)  # 1
    clock.wait()  # 2
    clock.arrive()  # 3
    clock.end()  # 4
    clock.begin(F1)  # 5
    clock.end()  # 6
    clock.begin(B0)  # 7
    clock.wait()  # 8
    clock.arrive()  # 9
    clock.wait()  # 10
    clock.arrive()  # 11
    clock.end()  # 12
    return clock.spans()


PLAYED = ((F0, 2, 4, 1), (F1, 5, 6, 0), (B0, 9, 12, 2))


def assert_played(spans: tuple[Span, ...], unit: float) -> None:
    assert [span.action for span in spans] == [action for action, *_ in PLAYED]
    for span, (_, start, end, wait) in zip(spans, PLAYED, strict=True):
        assert (span.start_seconds, span.end_seconds, span.wait_seconds) == pytest.approx((start * unit, end * unit, wait * unit))


def test_the_host_clock_notes_work_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(WallClock, "_now", staticmethod(lambda: next(ticks) * 1000))
    clock = WallClock()
    monkeypatch.setattr(WallClock, "_settled", staticmethod(lambda: next(ticks) * 1000))
    assert_played(played(clock), 1e-6)
    assert_played(played(clock), 1e-6)  # zero forgets what was before


def test_the_device_clock_does_not_wait_during_the_step() -> None:
    synchronized = 0

    def synchronize() -> None:
        nonlocal synchronized
        synchronized += 1

    clock = CudaClock(FakeEvent, synchronize)
    before = synchronized
    spans = played(clock)
    assert_played(spans, 1e-3)
    assert synchronized == before + 2, "once in zero, once in spans"


def test_both_clocks_name_the_hosts_time_of_their_zero() -> None:
    for clock in (WallClock(), CudaClock(FakeEvent, lambda: None)):
        before = time.perf_counter_ns()
        clock.zero()
        assert before <= clock.zero_ns <= time.perf_counter_ns()


@pytest.mark.alone
def test_a_call_of_the_host_clock_takes_less_than_a_microsecond() -> None:
    clock, fastest = WallClock(), float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            clock.begin(F0)
            clock.wait()
            clock.arrive()
            clock.end()
        fastest = min(fastest, (time.perf_counter() - start) / 400)
    assert fastest < 1e-6


@pytest.mark.parametrize("root", ["pytorch_lightning", "lightning.pytorch"])
def test_the_callback_is_of_the_namespace_in_use(root: str) -> None:
    module = pytest.importorskip(root)
    made: dict[str, Any] = {"library": module, "PipelineTimeline": PipelineTimeline}
    exec("callback = PipelineTimeline(steps=[3])", made)
    assert isinstance(made["callback"], module.Callback) and isinstance(made["callback"], PipelineTimeline)
    assert made["callback"].steps == {3}


@pytest.mark.parametrize("steps", [[], [-1], [1.5], 5, "5"])
def test_steps_that_name_none_are_refused(steps: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"PipelineTimeline\(steps=.*counted from 0: give at least one, such as \[5, 6\]"):
        PipelineTimeline(steps=steps)


def test_a_layout_without_a_pipeline_is_refused_before_anything_starts() -> None:
    trainer = quiet_trainer("tp2", callbacks=[PipelineTimeline()])
    with pytest.raises(ConfigurationError, match=r"parallel=tp2.* has none \(pp 1\): add pp2 or more, or remove the callback"):
        trainer.fit(Chain(Block), [tokens(4)])


def test_another_strategy_is_refused() -> None:
    trainer = SimpleNamespace(strategy=object(), global_step=0)
    with pytest.raises(ConfigurationError, match="the Trainer's strategy is object: use HybridParallelStrategy with pp2 or more"):
        PipelineTimeline().on_train_start(trainer, torch.nn.Linear(1, 1))


def _steps_of_two_ranks(rank: int, world_size: int, folder: str) -> list[str]:
    """The hooks around four batches of 1F1B, with real waiting between two processes; what rank 0 wrote."""
    row: Row = build_schedule("1f1b", 2, 1, 3)[rank]
    engine = SimpleNamespace(observers=[])
    strategy = SimpleNamespace(
        engine=engine,
        schedule="1f1b",
        root_device=torch.device("cpu"),
        barrier=lambda name: dist.barrier(),
        plan=SimpleNamespace(module="Model", layout=Layout(pp=2, dp=1, microbatches=3)),
        mesh=SimpleNamespace(world=SimpleNamespace(group=dist.group.WORLD)),
    )
    trainer = SimpleNamespace(
        strategy=strategy, global_step=0, accumulate_grad_batches=1, log_dir=None, default_root_dir=folder, loggers=[]
    )
    callback = PipelineTimeline(steps=[1, 2])
    callback._is_done = False
    for step in range(4):
        callback.on_train_batch_start(trainer, None, None, step)
        assert len(engine.observers) == (step in (1, 2))
        for clock in engine.observers:
            _run(row, clock, rank)
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, None, None, None, step)
        assert not engine.observers
    callback.on_train_end(trainer, None)
    dist.barrier()
    return sorted(path.name for path in Path(folder, "timeline").iterdir())


def _run(row: Row, clock: Clock[Any], rank: int) -> None:
    message, sent = torch.zeros(1), []
    for action in row:
        clock.begin(action)
        if (action.kind == "F") == (rank == 1):
            clock.wait()
            dist.recv(message, 1 - rank)
            clock.arrive()
        time.sleep(0.01 if action.kind == "F" else 0.02)
        clock.end()
        if (action.kind == "F") == (rank == 0):
            sent.append(dist.isend(message.clone(), 1 - rank))
    for work in sent:
        assert work is not None
        work.wait()


@pytest.mark.alone
def test_the_callback_draws_what_all_ranks_did_on_one_axis_of_time(tmp_path: Path) -> None:
    for names in run_ranks(_steps_of_two_ranks, 2, str(tmp_path)):
        assert names == ["timeline.html", "timeline.png", "trace.json"]
    data = page_data((tmp_path / "timeline" / "timeline.html").read_text())
    assert data["title"] == "Model: 1f1b, pp2_mb3"
    assert [panel["step"] for panel in data["panels"]] == ["step 1", "step 2"]
    kinds = [entry["kind"] for entry in data["kinds"]]
    for panel in data["panels"]:
        spans = {f"{stage}{kinds[kind]}{number}": times for lane in panel["lanes"] for kind, stage, number, *times in lane["spans"]}
        assert len(spans) == 12
        for number in range(3):
            assert spans[f"1F{number}"][0] >= spans[f"0F{number}"][1] - 2e-4, "nothing arrives before it was sent"
            assert spans[f"0B{number}"][0] >= spans[f"1B{number}"][1] - 2e-4
            assert spans[f"0F{number}"][2] == 0
        assert spans["1F0"][2] == pytest.approx(spans["0F0"][1] - spans["0F0"][0], abs=8e-3), "it waits for the first forward"
        measured, schedule, equal = (bubble["values"] for bubble in panel["bubbles"])
        assert equal == pytest.approx([1 / 4] * 2, abs=1e-6)  # (p - 1) / (m + p - 1)
        assert schedule == pytest.approx([1 / 4] * 2, abs=0.08)
        assert measured == pytest.approx(schedule, abs=0.1)


def test_a_training_that_ends_before_the_steps_says_so() -> None:
    callback = PipelineTimeline(steps=[5, 6])
    callback._first = 0
    with pytest.warns(UserWarning, match=r"began at step 0 and is at step 3, and none of steps=\[5, 6\] is between: choose steps"):
        callback.on_train_end(SimpleNamespace(global_step=3), None)


def test_a_folder_that_cannot_be_written_does_not_end_a_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    picture = run_picture(Layout(pp=2, dp=1, microbatches=2), "1f1b")
    with pytest.warns(UserWarning, match=r"file/below cannot be written \(Not a directory\), so there is no picture: name another"):
        write(picture, tmp_path / "file" / "below")


RUNS = {"pp2_mb4": ("1f1b", 1), "pp2_vp2_mb4": ("interleaved", 2)}  # the schedule of each layout, and stages on a rank


def _trainings(rank: int, world_size: int, folder: str) -> None:
    for word in RUNS:
        trainer = quiet_trainer(word, world_size, callbacks=[PipelineTimeline(steps=[1], folder=f"{folder}/{word}")], max_steps=3)
        trainer.fit(Chain(Block, depth=4), DataLoader([{"tokens": row} for row in tokens(24)["tokens"]], batch_size=8))


def test_a_training_draws_its_timeline(tmp_path: Path) -> None:
    run_ranks(_trainings, 2, str(tmp_path))
    for word, (schedule, num_chunks) in RUNS.items():
        data = page_data((tmp_path / word / "timeline.html").read_text())
        assert data["title"] == f"Chain: {schedule}, {word}"
        [panel] = data["panels"]
        table = build_schedule(schedule, 2, num_chunks, 4)
        assert [[span[1:3] for span in lane["spans"]] for lane in panel["lanes"]] == [
            [[action.stage, action.microbatch] for action in row] for row in table
        ]
        assert panel["lanes"][0]["spans"][0][5] == 0
        assert panel["lanes"][1]["spans"][0][5] > 0, "the second rank waits for its first activation"
