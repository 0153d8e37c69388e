"""Schedules against their mathematics: bubble, memory, order, and the drawing in each docstring."""

from __future__ import annotations

import time
from itertools import product

import pytest

from lightning_par.errors import ConfigurationError
from lightning_par.pipeline.action import Action, Table
from lightning_par.pipeline.draw import draw_table
from lightning_par.pipeline.schedules import SCHEDULES, build_schedule, forward_only, gpipe, one_f_one_b
from lightning_par.pipeline.simulate import simulate
from lightning_par.pipeline.validate import check_table

SIZES = tuple(product(range(1, 9), range(1, 33)))  # stages, microbatches


def read_table(*rows: str) -> Table:
    return tuple(tuple(Action("F" if word[0] == "F" else "B", int(word[1:])) for word in row.split()) for row in rows)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_table_is_valid(name: str) -> None:
    for num_stages, num_microbatches in SIZES:
        table = build_schedule(name, num_stages, num_microbatches)
        check_table(table)
        assert [len(row) for row in table] == [2 * num_microbatches] * num_stages


def test_forward_only_is_valid() -> None:
    for num_stages, num_microbatches in SIZES:
        table = forward_only(num_stages, num_microbatches)
        check_table(table, kinds=("F",))
        timeline = simulate(table, [1.0] * num_stages, [])
        assert timeline.makespan_seconds == num_microbatches + num_stages - 1
        assert timeline.peak_in_flight == (0,) * num_stages


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b, forward_only])
def test_docstring_draws_the_real_table(schedule) -> None:
    drawn = [line.strip() for line in schedule.__doc__.splitlines() if line.strip().startswith("stage ")]
    assert drawn == draw_table(schedule(4, 4)).splitlines()


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
@pytest.mark.parametrize("backward_seconds", [1.0, 2.0])
def test_bubble_is_the_papers(schedule, backward_seconds: float) -> None:
    for p, m in SIZES:  # p stages, m microbatches
        timeline = simulate(schedule(p, m), [1.0] * p, [backward_seconds] * p)
        assert timeline.makespan_seconds == (m + p - 1) * (1 + backward_seconds)
        assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))


def test_peak_memory_is_the_papers() -> None:
    for p, m in SIZES:
        ones = [1.0] * p
        assert simulate(gpipe(p, m), ones, ones).peak_in_flight == (m,) * p
        assert simulate(one_f_one_b(p, m), ones, ones).peak_in_flight == tuple(min(m, p - r) for r in range(p))


def test_slowest_stage_sets_the_pace() -> None:
    # stage 0: F until 1, waits for 1 + 0.5 + 3 (F) + 6 (B) + 0.5, then its own B of 2
    timeline = simulate(gpipe(2, 1), [1.0, 3.0], [2.0, 6.0], transfer_seconds=0.5)
    assert [(span.start_seconds, span.end_seconds) for span in timeline.rows[0]] == [(0.0, 1.0), (11.0, 13.0)]
    assert timeline.bubble_fraction == pytest.approx(1 - 12 / 26)
    # with many microbatches the bubble is gone and only the slow stage's work is left: m x (3 + 6), plus filling and draining
    assert simulate(one_f_one_b(2, 50), [1.0, 3.0], [2.0, 6.0]).makespan_seconds == pytest.approx(50 * 9 + 1 + 2)


def test_longer_backwards_are_drawn_as_long() -> None:
    assert draw_table(one_f_one_b(2, 2), backward_slots=2).splitlines() == [
        "stage 0  F0 F1 .  .  B0 == .  B1 ==",
        "stage 1  .  F0 B0 == F1 B1 == .  .",
    ]


def test_simulation_is_fast() -> None:
    table = one_f_one_b(8, 64)
    start = time.process_time()
    simulate(table, [1.0] * 8, [2.0] * 8)
    assert time.process_time() - start < 0.1


BROKEN = {
    "is empty": (),
    r"stage 1 never runs B1": ("F0 F1 B0 B1", "F0 F1 B0"),
    r"stage 0 runs F0 more than once": ("F0 F0 B0", "F0 B0"),
    r"stage 0 runs B0 before F0": ("B0 F0", "F0 B0"),
    r"stage 1 takes its F in another order than stage 0": ("F0 F1 B0 B1", "F1 F0 B0 B1"),
    r"(?s)deadlocks.*stage 0  F0 \[B0\] F1 B1   waits for B0 of stage 1.*stage 1  F0 \[F1\] B0 B1   waits for F1 of stage 0": (
        "F0 B0 F1 B1",
        "F0 F1 B0 B1",
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_table_is_refused(message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_table(read_table(*BROKEN[message]))


def test_backward_in_evaluation_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"stage 0 must not run B0, B1:\nstage 0  F0 F1 B0 B1"):
        check_table(gpipe(2, 2), kinds=("F",))


def test_unknown_schedule_lists_the_known() -> None:
    with pytest.raises(ConfigurationError, match=r"schedule=gpip: no such pipeline schedule: use one of 1f1b, gpipe"):
        build_schedule("gpip", 2, 2)
