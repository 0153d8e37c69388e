"""The comparison with all peers: what it says of times, when it fails, and that every system in it computes the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks import all as all_benchmarks
from benchmarks import contest, pace, peers, tensor, trainer, zero
from benchmarks.contest import Effort, Row, System, Taken, measure_rank
from benchmarks.peers import Match, losses, matches
from benchmarks.peers_table import HEADINGS, lines
from benchmarks.replicas import SYSTEMS as REPLICAS
from benchmarks.shards import SYSTEMS as SHARDS
from benchmarks.stepping import MakeOptimizer
from benchmarks.trainers import SYSTEMS as TRAINERS
from tests.pages import PAGES, shell_lines
from tests.ranks import run_ranks

OURS = Row("lightning_par", "tp2", (0.3, 0.4, 0.5), (0.2,))
EQUAL = Row("DTensor", "tp2", (0.302, 0.4), (0.4,))
QUICKER = Row("AutoTP", "tp2", (0.2, 0.3), (0.2,))
LUCKY = Row("FSDP2", "tp2", (0.2, 0.41, 0.42), (0.2,))  # a single quick step
OTHER = Row("DDP", "dp2", (0.1,), (0.1,))
WRONG = Row("plain", "tp2", wrong="the losses are [1.0], and [2.0] in one process")


def found(*rows: Row) -> list[Match]:
    return matches("tensor", [OURS, *rows])


def test_ours_is_compared_with_who_does_the_same_work_and_does_it_right() -> None:
    assert [match.theirs for match in found(EQUAL, OTHER, QUICKER, WRONG)] == [EQUAL, QUICKER]
    (match,) = found(QUICKER)
    assert (match.least, match.middle, match.cpu) == (pytest.approx(1.5), pytest.approx(1.6), 1.0)
    line = dict(zip(HEADINGS, lines([match])[0], strict=True))
    assert line == {
        "benchmark": "tensor",
        "work": "tp2",
        "peer": "AutoTP",
        "ours ms": "300.0",
        "peer's ms": "200.0",
        "ratio": "1.50",
        "median": "1.60",
        "CPU": "1.00",
        "where the peer is quicker": "unknown",
    }


def test_a_peer_is_quicker_where_its_quickest_and_its_median_step_are(monkeypatch: pytest.MonkeyPatch) -> None:
    every = found(EQUAL, LUCKY, QUICKER)
    assert [match.is_slower for match in every] == [False, False, True]
    assert losses(every) == ["tensor, tp2: a step takes 1.50 times the quickest of AutoTP, and 1.60 times in the median"]
    assert [match.reason for match in every] == ["within noise", "within noise", "unknown"]
    assert found(Row("slow", "tp2", (0.9,), (0.9,)))[0].reason == ""
    monkeypatch.setattr(peers, "REASONS", {("tensor", "tp2", "AutoTP"): "it leaves out half"})
    assert every[2].reason == "it leaves out half" and losses(every) == []


def test_the_command_fails_for_wrong_losses_and_for_slow_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [OURS, EQUAL, WRONG]
    monkeypatch.setattr(all_benchmarks, "measure", lambda effort: {"tensor": rows, "zero": [OTHER]})
    assert all_benchmarks.main(["--output", str(tmp_path / "peers.png")]) == 1
    assert "tensor: plain, tp2: the losses are [1.0]" in capsys.readouterr().err
    assert (tmp_path / "peers.png").read_bytes()[:4] == b"\x89PNG"
    rows[2] = QUICKER
    assert all_benchmarks.main(["--json"]) == 1
    printed = capsys.readouterr()
    assert "1.50 times the quickest of AutoTP" in printed.err
    assert json.loads(printed.out)["matches"][1]["ratio"] == pytest.approx(1.5)
    rows.pop()
    assert all_benchmarks.main(["--markdown"]) == 0
    assert "| tensor | tp2 | DTensor | 300.0 | 302.0 | 0.99 |" in capsys.readouterr().out


def test_all_benchmarks_are_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    slept = [
        pace.Row(name, "1f1b", (1.5,), (1.6,), (0.08,), (cpu,), 0.375) for name, cpu in (("torch", 0.04), ("lightning_par", 0.02))
    ]
    asked: list[tuple[str, str]] = []

    def stand_in(name: str, rows: list[Any]) -> Callable[[str], list[Any]]:
        return lambda effort: asked.append((name, effort)) or rows  # type: ignore[func-returns-value]

    for name in all_benchmarks.BENCHMARKS:
        module = import_module(f"benchmarks.{name}")
        monkeypatch.setattr(module, "measure", stand_in(name, slept if name == "pipeline" else [OURS]))
    assert all_benchmarks.main(["--quick", "--markdown"]) == 0
    assert asked == [(name, "quick") for name in all_benchmarks.BENCHMARKS]
    printed = capsys.readouterr().out
    assert "| pipeline | pp4 1f1b | torch | 1500.0 | 1500.0 | 1.00 | 1.00 | 0.50 |" in printed
    titles = ["Peers", "Tensor parallelism", "ZeRO", "Under a Trainer", "Pipeline schedules"]
    assert re.findall(r"^## (.*)$", printed, re.MULTILINE) == titles
    assert all(effort in contest.EFFORTS and effort in pace.EFFORTS for effort in ("quick", "brief", "full"))


def alone(make_optimizer: MakeOptimizer, num_steps: int) -> list[float]:
    return [3.0, 2.0, 1.0]


def made_up(name: str, *values: float) -> System:
    """A system of these losses, whose first step in a run takes no time, and each one more a second more."""

    def run(num_steps: int) -> list[Taken]:
        return [Taken(values[step % len(values)], float(step), 0.5) for step in range(num_steps)]

    return System(name, "tp1", lambda rank, make_optimizer: run)


def contend(rank: int, world_size: int) -> list[Row]:
    systems = (made_up("right", 3.0, 2.0, 1.0), made_up("wrong", 3.0, 2.0, 1.1))
    return measure_rank(rank, world_size, systems, alone, Effort(2, 3))


def test_a_system_is_checked_and_then_timed_without_its_first_steps() -> None:
    ((right, wrong),) = run_ranks(contend, 1)
    assert right == Row("right", "tp1", (1.0, 2.0, 3.0) * 4, (0.5,) * 12)
    assert wrong.wrong == "the losses are [3.0, 2.0, 1.1], and [3.0, 2.0, 1.0] in one process"
    assert not wrong.seconds


def test_the_page_names_commands_that_there_are() -> None:
    commands = shell_lines(PAGES["comparison.md"])
    assert [words[:3] for words in commands] == [
        ["python", "-m", f"benchmarks.{name}"] for name in ("all", *all_benchmarks.BENCHMARKS)
    ]
    for _, _, module, *words in commands:
        import_module(module)._parser().parse_args(words)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "systems"), [(tensor, SHARDS), (trainer, TRAINERS), (zero, REPLICAS)])
def test_every_system_computes_what_one_process_does(module: Any, systems: dict[int, tuple[System, ...]]) -> None:
    rows = module.measure("quick")
    assert not [row for row in rows if row.wrong]
    assert [(row.system, row.work) for row in rows] == [(system.name, system.work) for its in systems.values() for system in its]
    assert all(row.seconds for row in rows)
