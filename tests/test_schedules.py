"""Schedules against their mathematics: idle time, memory, order, and the drawing in each docstring.

In the formulas p is the number of ranks, v of stages (chunks) on each, m of microbatches; F, I and W are the times of one
rank, so that a stage of a rank with v takes F / v.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator
from itertools import count, product

import pytest

from lightning_par.errors import ConfigurationError
from lightning_par.layout import Placement, pp_of_stage
from lightning_par.pipeline.action import Action, Kind, Row, Table, num_stages_of, source_of
from lightning_par.pipeline.draw import draw_table
from lightning_par.pipeline.progress import execution_order, source_keys
from lightning_par.pipeline.schedules import (
    SCHEDULES,
    build_schedule,
    check_schedule,
    default_chunks,
    default_schedule,
    forward_only,
)
from lightning_par.pipeline.schedules.rounds import rounds
from lightning_par.pipeline.simulate import Costs, Span, Timeline, peak_in_flight, simulate
from lightning_par.pipeline.validate import check_table, keeps_order

SIZES = tuple(product(range(1, 9), range(1, 5), range(1, 33)))  # p, v, m
SOME = tuple((p, v, m) for p, v, m in SIZES if m in (1, 2, 3, 4, 5, 7, 8, 11, 15, 16, 21, 24, 32))  # where each m costs too much
CHUNKS = {"gpipe": (1,), "1f1b": (1,), "zb-h1": (1,), "interleaved": (2, 3, 4), "interleaved-zb": (2, 3, 4), "zb-v": (2,)}
SPLIT = ("zb-h1", "interleaved-zb", "zb-v")


def tables(name: str, sizes: tuple[tuple[int, int, int], ...] = SIZES) -> Iterator[tuple[int, int, int, Table]]:
    for p, v, m in sizes:
        if v in CHUNKS[name]:
            yield p, v, m, build_schedule(name, p, v, m)


def read_table(*rows: str) -> Table:
    """Rows of words such as 0F0 (stage, kind, microbatch)."""
    words = [[re.fullmatch(r"(\d+)([FBIW])(\d+)", word) for word in row.split()] for row in rows]
    return tuple(tuple(Action(word[2], int(word[1]), int(word[3])) for word in row) for row in words)


def idle(table: Table, costs: Costs | None = None) -> list[float]:
    """Idle time of each rank, by default with F = I = W = 1 for each stage."""
    timeline = simulate(table, costs or Costs.equal(num_stages_of(table)))
    return [fraction * timeline.makespan_seconds for fraction in timeline.idle_fraction]


# ---------------------------------------------------------------------- every table


def test_every_schedule_has_its_chunks_here() -> None:
    assert {name: tuple(v for v in (1, 2, 3, 4) if SCHEDULES[name].has_chunks(v)) for name in SCHEDULES} == CHUNKS


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_table_is_valid(name: str) -> None:
    for p, v, m, table in tables(name):
        check_table(table)
        assert keeps_order(table), (p, v, m)
        assert [len(row) for row in table] == [(3 if SCHEDULES[name].splits_backward else 2) * v * m] * p
        for rank, row in enumerate(table):
            assert {pp_of_stage(action.stage, p, SCHEDULES[name].placement) for action in row} == {rank}


@pytest.mark.parametrize("placement", ["loop", "v"])
def test_forward_only_is_valid(placement: Placement) -> None:
    for p, v, m in SIZES:
        table = forward_only(p, v, m, placement)
        check_table(table, forward_only=True)
        assert keeps_order(table)
        assert [len(row) for row in table] == [v * m] * p
        assert simulate(table, Costs.equal(p * v)).peak_in_flight == (0,) * p


def test_forward_only_takes_turns_in_rounds() -> None:
    assert draw_table(forward_only(2, 2, 4)).splitlines() == [
        "rank 0  F0a F1a F0b F1b F2a F3a F2b F3b .",
        "rank 1  .   F0a F1a F0b F1b F2a F3a F2b F3b",
    ]


def test_forward_only_idles_while_the_pipeline_fills_and_drains() -> None:
    for p, v, m in SIZES:
        if m % p == 0:
            assert idle(forward_only(p, v, m)) == pytest.approx([p - 1] * p)
        if v == 2:
            assert idle(forward_only(p, v, m, "v")) == pytest.approx([2 * (p - 1)] * p)


@pytest.mark.parametrize(
    ("schedule", "sizes"),
    [
        (forward_only, (4, 1, 4)),
        (SCHEDULES["gpipe"].build, (4, 1, 4)),
        (SCHEDULES["1f1b"].build, (4, 1, 4)),
        (SCHEDULES["zb-h1"].build, (4, 1, 6)),
        (SCHEDULES["interleaved"].build, (2, 2, 4)),
        (SCHEDULES["interleaved-zb"].build, (2, 2, 4)),
        (SCHEDULES["zb-v"].build, (2, 2, 4)),
    ],
)
def test_docstring_draws_the_real_table(schedule, sizes: tuple[int, int, int]) -> None:
    drawn = [line.strip() for line in schedule.__doc__.splitlines() if re.match(r"\s+rank \d  ", line)]
    assert drawn == draw_table(schedule(*sizes)).splitlines()


# ---------------------------------------------------------------------- idle time and memory


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("backward", [1.0, 2.0])
def test_one_stage_on_each_rank_idles_for_p_minus_1(name: str, backward: float) -> None:
    for p, _, m, table in tables(name, SOME):
        timeline = simulate(table, Costs.equal(p, 1, backward / 2, backward / 2))
        assert timeline.makespan_seconds == (m + p - 1) * (1 + backward)
        assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("backward", [1.0, 2.0])
def test_interleaved_idles_for_p_minus_1_over_v(backward: float) -> None:
    for p, v, m, table in tables("interleaved", SOME):
        if m >= p:  # with fewer a rank also waits for the first microbatch to come round
            stage = Costs.equal(p * v, 1 / v, backward / 2 / v, backward / 2 / v)
            assert idle(table, stage) == pytest.approx([(p - 1) * (1 + backward) / v] * p)


@pytest.mark.parametrize("costs", [(1, 1, 1), (1, 1, 0.25), (1, 1.25, 0.5), (0.75, 1, 0.75), (1, 1, 1.25), (0.75, 1, 2)])
def test_zb_h1_idles_for_p_minus_1_forwards_and_input_gradients_without_weights(costs: tuple[float, float, float]) -> None:
    forward, input_gradient, weight_gradient = costs
    filled = min(costs)  # the papers' W, where it is not longer than what it fills
    for p, _, m, table in tables("zb-h1", SOME):
        if m >= p:
            each = (p - 1) * (forward + input_gradient - filled)
            assert idle(table, Costs.equal(p, forward, input_gradient, weight_gradient)) == pytest.approx([each] * p)


def test_interleaved_zb_idles_for_p_minus_1_over_v() -> None:
    for p, v, m, table in tables("interleaved-zb", SOME):
        if m % p == 0:  # a last round of fewer than p microbatches makes ranks wait for it to come round
            assert idle(table) == pytest.approx([p - 1] * p)
        elif m > p:
            assert max(idle(table)) <= p - 1 + v * (p - m % p)


def greedy_interleaved_zb(p: int, v: int, m: int) -> Table:
    """In the same order and memory, but with every I before every F, and both before every W."""
    order = rounds([p] * (m // p), v)
    forwards = [[(chunk * p + rank, i) for chunk, i in order] for rank in range(p)]
    backwards = [[((v - 1 - chunk) * p + rank, i) for chunk, i in order] for rank in range(p)]
    rows: list[list[Action]] = [[] for _ in range(p)]
    to_do: list[dict[Kind, deque[tuple[int, int]]]] = [
        {"I": deque(backwards[rank]), "F": deque(forwards[rank]), "W": deque(backwards[rank])} for rank in range(p)
    ]
    ends: dict[Action | None, int] = {None: 0}
    for slot in count():
        if not any(queue for queues in to_do for queue in queues.values()):
            return tuple(map(tuple, rows))
        for row, queues in zip(rows, to_do, strict=True):
            for kind in queues:
                is_full = kind == "F" and len(queues["W"]) - len(queues["F"]) == p * v
                action = Action(kind, *queues[kind][0]) if queues[kind] and not is_full else None
                if action is not None and ends.get(source_of(action, p * v), slot + 1) <= slot:
                    queues[kind].popleft()
                    row.append(action)
                    ends[action] = slot + 1
                    break
    raise AssertionError("a schedule ends")


def test_interleaved_zb_waits_for_a_third_fewer_messages_than_a_greedy_one() -> None:
    totals = [0.0, 0.0]
    for p, v, num_rounds in product((2, 3, 4, 8), (2, 3, 4), (2, 3, 4)):
        m = num_rounds * p
        for index, table in enumerate((build_schedule("interleaved-zb", p, v, m), greedy_interleaved_zb(p, v, m))):
            at_once, travelling = (simulate(table, Costs.equal(p * v, transfer=each)).makespan_seconds for each in (0.0, 0.01))
            assert at_once == 3 * v * m + p - 1
            totals[index] += travelling - at_once
    assert totals[0] < 2 / 3 * totals[1]


def test_zb_v_idles_for_half_of_p_minus_1_forwards() -> None:
    for p, _, m, table in tables("zb-v", SOME):
        if m >= 2 * p - 1:  # 2p in FIELD's words; with fewer the turns do not begin before the forwards end
            assert idle(table) == pytest.approx([p - 1] * p)  # slots of one stage, half of a rank's forward


# Published overhead over the ideal, in percent: arXiv 2401.10241 and 2405.15362, simulated with F = I = W.
@pytest.mark.parametrize(
    ("name", "v", "percent"),
    [
        ("1f1b", 1, (37.5, 21.9)),
        ("interleaved", 2, (18.8, 10.9)),
        ("interleaved-zb", 2, (6.2, 3.6)),
        ("interleaved-zb", 4, (3.1, 1.8)),
        ("zb-v", 2, (6.2, 3.6)),
    ],
)
def test_overhead_is_the_published(name: str, v: int, percent: tuple[float, float]) -> None:
    for (p, m), published in zip(((4, 8), (8, 32)), percent, strict=True):
        timeline = simulate(build_schedule(name, p, v, m), Costs.equal(p * v))
        assert 100 * (timeline.makespan_seconds / (3 * v * m) - 1) == pytest.approx(published, abs=0.051)


def test_peak_memory_is_the_papers() -> None:
    for p, _, m, table in tables("gpipe", SOME):
        assert simulate(table, Costs.equal(p)).peak_in_flight == (m,) * p
    for p, _, m, table in tables("1f1b", SOME):
        assert simulate(table, Costs.equal(p)).peak_in_flight == tuple(min(m, p - r) for r in range(p))
    for p, v, m, table in tables("interleaved", SOME):
        first = -(-m // max(1, m // p)) if m >= p else p  # microbatches of the first round
        bounds = [min(m, first + (2 * p - 1 - 2 * r - first) / v) for r in range(p)]
        if m % p == 0:
            assert bounds[0] == pytest.approx(min(m, p * (1 + (p - 1) / (p * v))))  # FIELD's formula
        peaks = simulate(table, Costs.equal(p * v)).peak_in_flight
        assert all(peak <= bound + 1e-9 for peak, bound in zip(peaks, bounds, strict=True))
        assert m < p or peaks == pytest.approx(bounds)


@pytest.mark.parametrize("name", SPLIT)
def test_split_backwards_need_no_more_memory_than_p_microbatches(name: str) -> None:
    for p, _, m, table in tables(name, SOME):
        peaks = [peak_in_flight(row) for row in table]
        assert max(peaks) == min(m, p)
        assert all(peak_in_flight(row, released_by=("B", "I")) <= peak for row, peak in zip(table, peaks, strict=True))
    assert [peak_in_flight(row, released_by=("B", "I")) for row in build_schedule("zb-h1", 4, 1, 8)] == [4, 3, 2, 1]


# ---------------------------------------------------------------------- the simulator


def test_slowest_stage_sets_the_pace() -> None:
    # stage 0: F until 1, waits for 1 + 0.5 + 3 (F) + 6 (B) + 0.5, then its own B of 2
    costs = Costs([1.0, 3.0], [1.0, 4.0], [1.0, 2.0], transfer=0.5)
    timeline = simulate(build_schedule("1f1b", 2, 1, 1), costs)
    assert timeline.rows[0] == (Span(Action("F", 0, 0), 0.0, 1.0), Span(Action("B", 0, 0), 11.0, 13.0, 10.0))
    assert timeline.idle_fraction == pytest.approx((1 - 3 / 13, 1 - 9 / 13))
    assert timeline.bubble_fraction == pytest.approx(1 - 12 / 26)
    # with many microbatches the bubble is gone and only the slow stage's work is left: m x (3 + 6), plus filling and draining
    steady = simulate(build_schedule("1f1b", 2, 1, 50), Costs([1.0, 3.0], [1.0, 4.0], [1.0, 2.0]))
    assert steady.makespan_seconds == pytest.approx(50 * 9 + 1 + 2)


def test_a_split_backward_sends_its_gradient_before_the_weights() -> None:
    timeline = simulate(build_schedule("zb-h1", 2, 1, 1), Costs([1.0, 3.0], [1.0, 4.0], [1.0, 2.0], transfer=0.5))
    assert [(str(span.action), span.end_seconds) for span in timeline.rows[0]] == [("0F0", 1), ("0I0", 10), ("0W0", 11)]
    assert timeline.rows[1][-1] == Span(Action("W", 1, 0), 8.5, 10.5)


def test_exposed_transfers_are_the_waits_for_what_is_computed_already() -> None:
    # rank 1 waits 1 for F0 and 0.25 for its way; rank 0 waits 1.25 + 1 + 2 for B0, and 0.25 of it for the way back
    timeline = simulate(build_schedule("1f1b", 2, 1, 1), Costs.equal(2, transfer=0.25))
    assert timeline.exposed_transfer_seconds == (0.25, 0.25)
    assert [row[-1].wait_seconds for row in timeline.rows] == [3.5, 0.0]
    # F1 of rank 1 arrives at 2.5 while F0 runs until 3: only the first transfer is exposed
    hidden = simulate(forward_only(2, 1, 2), Costs([1.0, 1.5], [], [], transfer=0.5))
    assert hidden.exposed_transfer_seconds == (0.0, 0.5)
    # F1 is computed at 2 and arrives at 2.5, while rank 1 waits from 2.25 on: 0.25 of its transfer is exposed
    partly = simulate(forward_only(2, 1, 2), Costs([1.0, 0.75], [], [], transfer=0.5))
    assert partly.exposed_transfer_seconds == (0.0, 0.5 + 0.25)
    # from the last stage of the first turn of a v to the next one nothing travels
    assert simulate(forward_only(1, 2, 1, "v"), Costs.equal(2, transfer=9)).makespan_seconds == 2


def test_a_measured_timeline_may_begin_late() -> None:
    timeline = Timeline(((Span(Action("F", 0, 0), 5.0, 7.0),), (Span(Action("F", 1, 0), 7.5, 9.0),)), (0.0, 0.0))
    assert timeline.makespan_seconds == 4
    assert timeline.idle_fraction == (0.5, 1 - 1.5 / 4)


def test_waits_and_work_fill_the_time_of_a_rank() -> None:
    for name in SCHEDULES:
        for row in simulate(build_schedule(name, 3, CHUNKS[name][-1], 7), Costs.equal(12, 1, 1.5, 0.5, 0.25)).rows:
            assert sum(span.wait_seconds + span.end_seconds - span.start_seconds for span in row) == pytest.approx(
                row[-1].end_seconds
            )


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_next_stage_is_the_source(name: str) -> None:
    """`source_keys` and `execution_order` against `source_of`, which the executor's messages follow."""
    for _, _, m, table in tables(name, ((3, 1, 5), (3, 2, 5), (2, 3, 4))):
        place, num_stages = [0] * len(table), num_stages_of(table)
        done: set[Action] = set()
        for rank in execution_order(table):
            action = table[rank][place[rank]]
            place[rank] += 1
            source = source_of(action, num_stages)
            assert source is None or source in done
            assert (source is None) == (source_keys(action, num_stages, m)[0] is None)
            assert source is None or source_keys(source, num_stages, m)[1] == source_keys(action, num_stages, m)[0]
            done.add(action)


@pytest.mark.alone
def test_simulation_is_fast() -> None:
    table = build_schedule("interleaved-zb", 8, 4, 64)
    taken = list[float]()
    for _ in range(3):  # see `test_auto_is_fast`
        start = time.process_time()
        simulate(table, Costs.equal(32))
        taken.append(time.process_time() - start)
    assert min(taken) < 0.1


def test_longer_actions_are_drawn_as_long() -> None:
    table = build_schedule("1f1b", 2, 1, 2)
    assert draw_table(table, Costs.equal(2)).splitlines() == [
        "rank 0  F0 F1 .  .  B0 == .  B1 ==",
        "rank 1  .  F0 B0 == F1 B1 == .  .",
    ]


# ---------------------------------------------------------------------- what is refused

BROKEN = {
    "is empty": (),
    "rank 1 never runs 1B1": ("0F0 0F1 0B0 0B1", "1F0 1F1 1B0"),
    "rank 1 never runs 1F1": ("0F0 0F1 0B0 0B1", "1F0 1B0"),
    "rank 1 never runs 1W0": ("0F0 0B0", "1F0 1I0"),
    "no rank runs stage 1:": ("0F0 0B0", "2F0 2B0"),
    "ranks 0 and 1 both run stage 1": ("0F0 0B0 1F0", "1B0"),
    "rank 0 runs 0F0 more than once": ("0F0 0F0 0B0", "1F0 1B0"),
    "rank 0 runs 0B0 before 0F0": ("0B0 0F0", "1F0 1B0"),
    "rank 0 runs 0W0 before 0I0": ("0F0 0W0 0I0", "1F0 1B0"),
    "rank 0 runs 0W0 beside 0B0: a backward is B, or I and W": ("0F0 0B0 0W0", "1F0 1B0"),
    "rank 0 runs 0B0 beside 0I0": ("0F0 0I0 0B0", "1F0 1B0"),
    "rank 1 runs 1F0 out of turn: F of a stage go from the first": ("0F0 0F1 0B0 0B1", "1F1 1F0 1B0 1B1"),
    "rank 1 runs 1I0 out of turn: B and I of a stage": ("0F0 0F1 0B0 0B1", "1F0 1F1 1B1 1I0 1W0"),
    "rank 1 runs 1W0 out of turn: B and W of a stage": ("0F0 0F1 0B0 0B1", "1F0 1F1 1I0 1B1 1W0"),
    r"(?s)deadlocks.*rank 0  0F0 \[0B0\] 0F1 0B1   waits for 1B0.*rank 1  1F0 \[1F1\] 1B0 1B1   waits for 0F1": (
        "0F0 0B0 0F1 0B1",
        "1F0 1F1 1B0 1B1",
    ),
    r"(?s)deadlocks.*rank 0  0F0 \[0I0\] 2F0 0W0 2B0   waits for 1I0.*rank 1  1F0 \[1B0\]   waits for 2B0": (
        "0F0 0I0 2F0 0W0 2B0",
        "1F0 1B0",
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_table_is_refused(message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_table(read_table(*BROKEN[message]))


def test_halves_and_whole_backwards_can_be_mixed() -> None:
    check_table(read_table("0F0 0F1 0I0 0W0 0B1", "1F0 1F1 1B0 1I1 1W1"))


def test_backward_in_evaluation_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"rank 0 must not run 0B0: evaluation has no backward:\nrank 0  0F0 0F1 0B0 0B1"):
        check_table(build_schedule("gpipe", 2, 1, 2), forward_only=True)


def _moved(row: Row, start: int, end: int) -> Row:
    rest = [*row[:start], *row[start + 1 :]]
    return (*rest[:end], row[start], *rest[end:])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_moved_action_is_refused_or_runs(name: str) -> None:
    """No table that passes the check deadlocks, whatever is moved, and each refusal has a reason."""
    table = build_schedule(name, 2, CHUNKS[name][0], 3)
    refused = 0
    for rank, row in enumerate(table):
        for start, end in product(range(len(row)), repeat=2):
            changed = tuple(_moved(row, start, end) if r == rank else other for r, other in enumerate(table))
            try:
                check_table(changed)
            except AssertionError:
                refused += 1
            else:
                simulate(changed, Costs.equal(num_stages_of(table)))
    assert refused > 0


def test_unknown_schedule_lists_the_known() -> None:
    known = "1f1b, gpipe, interleaved, zb-h1, interleaved-zb, zb-v, auto"
    for ask in (lambda: build_schedule("gpip", 2, 1, 2), lambda: check_schedule("gpip", 2, 1), lambda: default_chunks("gpip")):
        with pytest.raises(ConfigurationError, match=f"^schedule=gpip: no such pipeline schedule: use one of {known}$"):
            ask()


@pytest.mark.parametrize(
    ("name", "vp", "message"),
    [
        ("1f1b", 2, "schedule=1f1b runs one stage on each rank, and the layout has vp2: use schedule=interleaved, or leave vp out"),
        (
            "gpipe",
            4,
            "schedule=gpipe runs one stage on each rank, and the layout has vp4: use schedule=interleaved, or leave vp out",
        ),
        (
            "zb-h1",
            2,
            "schedule=zb-h1 runs one stage on each rank, and the layout has vp2: use schedule=interleaved-zb, or leave vp out",
        ),
        (
            "interleaved",
            1,
            "schedule=interleaved takes turns between several stages of a rank, and the layout has one: "
            "use vp2 or more, or schedule=1f1b",
        ),
        (
            "interleaved-zb",
            1,
            "schedule=interleaved-zb takes turns between several stages of a rank, and the layout has one: "
            "use vp2 or more, or schedule=zb-h1",
        ),
        (
            "zb-v",
            3,
            "schedule=zb-v runs exactly 2 stages on each rank, and the layout has vp3: use vp2 or schedule=interleaved-zb",
        ),
        ("zb-v", 1, "schedule=zb-v runs exactly 2 stages on each rank, and the layout has one: use vp2 or schedule=zb-h1"),
    ],
)
def test_stages_that_a_schedule_cannot_have(name: str, vp: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}$"):
        check_schedule(name, 4, vp, 8)


@pytest.mark.parametrize("name", ["interleaved", "zb-h1", "interleaved-zb", "zb-v"])
def test_too_few_microbatches(name: str) -> None:
    vp = CHUNKS[name][0]
    plain = "schedule=1f1b" if vp == 1 else "schedule=1f1b without vp"
    message = (
        f"schedule={name} on pp4 needs at least 4 microbatches, one for each rank, and the layout has mb3: "
        f"use mb4 or more, or {plain}, which runs with any number"
    )
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}$"):
        check_schedule(name, 4, vp, 3)
    check_schedule(name, 4, vp, 4)
    check_schedule(name, 4, vp)


def test_what_is_chosen_where_nothing_is_said() -> None:
    assert [default_schedule(v) for v in (1, 2, 4)] == ["1f1b", "interleaved", "interleaved"]
    assert {name: default_chunks(name) for name in [*SCHEDULES, "auto"]} == {
        **dict.fromkeys([*SCHEDULES, "auto"], 1),
        "zb-v": 2,
    }
    check_schedule("gpipe", 4, 1, 1)
    check_schedule("auto", 4, 3, 1)
