"""The quick replay of tables against `simulate`, and what the search concludes from it against all tables replayed whole."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from lightning_par.memory.forecast import peak_bytes
from lightning_par.memory.profile import ActionMemory, StageMemory
from lightning_par.pipeline.action import Table, num_stages_of, without_split
from lightning_par.pipeline.replay import KINDS, Replay
from lightning_par.pipeline.schedules import SCHEDULES, build_schedule
from lightning_par.pipeline.simulate import Costs, simulate
from lightning_par.planner import Anatomy, Cluster, pipeline
from lightning_par.planner.candidate import candidates
from lightning_par.planner.estimate import Estimate, Estimator
from lightning_par.planner.pipeline import Pipelines
from lightning_par.planner.search import NUM_BEST, Limits, _divided, _fit, _fitted, _merit
from tests.test_planner import GPT, LanguageModel, cluster, found_by, take_apart

SIZES = [
    (name, p, v, m)
    for name in SCHEDULES
    for p, v, m in ((1, 1, 3), (2, 2, 1), (3, 1, 7), (3, 2, 7), (4, 1, 16), (4, 2, 16), (2, 3, 5))
    if SCHEDULES[name].has_chunks(v)
]


def random_costs(num_stages: int, seed: int) -> Costs:
    draw = random.Random(seed)
    forward, inputs, weights = (tuple(draw.uniform(0.5, 2.0) for _ in range(num_stages)) for _ in range(3))
    return Costs(forward, inputs, weights, draw.choice([0.0, 0.3]))


def check_replay(table: Table, seed: int) -> None:
    costs = random_costs(num_stages_of(table), seed)
    timeline, pace = simulate(table, costs), Replay(table).run(costs)
    assert pace.makespan_seconds == timeline.makespan_seconds
    assert pace.exposed_transfer_seconds == timeline.exposed_transfer_seconds


@pytest.mark.parametrize(("name", "p", "v", "m"), SIZES)
def test_a_replay_is_the_simulation_to_the_last_bit(name: str, p: int, v: int, m: int) -> None:
    table = build_schedule(name, p, v, m)
    for seed in range(4):
        check_replay(table, seed)
    check_replay(tuple(map(without_split, table)), 4)
    check_replay((*table[:-1], without_split(table[-1])), 5)  # rows of unequal length
    check_replay((table[0], *map(without_split, table[1:])), 6)


def test_a_table_that_deadlocks_is_one() -> None:
    first, last = build_schedule("1f1b", 2, 1, 2)
    with pytest.raises(AssertionError, match="deadlocks"):
        Replay((first[::-1], last))


@pytest.mark.parametrize(("name", "p", "v", "m"), SIZES)
def test_no_pipeline_is_quicker_than_it_can_be(name: str, p: int, v: int, m: int) -> None:
    for seed in range(8):
        costs = random_costs(p * v, seed)
        least = Pipelines().least_seconds((name, p, v), m, costs)
        assert 0.5 * simulate(build_schedule(name, p, v, m), costs).makespan_seconds < least
        assert least <= simulate(build_schedule(name, p, v, m), costs).makespan_seconds


def test_what_a_pipeline_cannot_fall_below_is_what_equal_stages_take() -> None:
    """1F1B and interleaved of equal stages take the textbook's (m + (p - 1) / v) (F + B), arXiv 2104.04473, section 2.2."""
    for name, v in (("1f1b", 1), ("interleaved", 2)):
        for schedule in (Pipelines().least_seconds, lambda *args: Pipelines().pace(*args).makespan_seconds):
            assert schedule((name, 4, v), 16, Costs((1.0,) * 4 * v, (1.0,) * 4 * v, (1.0,) * 4 * v)) == pytest.approx(
                3 * (16 * v + 3)
            )


@pytest.mark.parametrize(("name", "v"), [("1f1b", 1), ("zb-h1", 1), ("interleaved", 2), ("interleaved-zb", 2), ("zb-v", 2)])
def test_a_few_microbatches_tell_what_all_of_them_take(name: str, v: int) -> None:
    for p, (seed, transfer) in itertools.product((2, 3, 4), enumerate((0.0, 0.1, 0.5))):
        costs = replace(random_costs(p * v, seed), transfer=transfer)
        for m in (8 * p, 9 * p):
            whole = simulate(build_schedule(name, p, v, m), costs)
            assert Pipelines().pace((name, p, v), m, costs).makespan_seconds == pytest.approx(whole.makespan_seconds, rel=0.02)


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_with_slow_links_microbatches_come_and_go_together(name: str) -> None:
    """As many as there are ranks: what one more takes says nothing of what all take."""
    for p, transfer in itertools.product((2, 3, 4, 8), (0.0, 0.3, 3.0, 10.0)):
        costs = Costs((1.0,) * (p - 1) + (1.4,), (1.1,) * (p - 1) + (1.5,), (0.9,) * (p - 1) + (1.2,), transfer)
        for m in (8 * p, 9 * p):
            whole, pace = simulate(build_schedule(name, p, 1, m), costs), Pipelines().pace((name, p, 1), m, costs)
            assert pace.makespan_seconds == pytest.approx(whole.makespan_seconds, rel=1e-9)
            assert pace.exposed_transfer_seconds == pytest.approx(whole.exposed_transfer_seconds)


@pytest.mark.parametrize(("name", "p", "v", "m"), SIZES)
def test_what_ranks_hold_is_what_their_rows_make_of_it(name: str, p: int, v: int, m: int) -> None:
    draw = random.Random(m)
    stages: list[StageMemory] = []
    for _ in range(p * v):
        held = draw.randrange(1000)
        after = {"F": held, "B": 0, "I": held // 2, "W": 0}
        before = {"F": 0, "B": held, "I": held, "W": held // 2}
        stages.append({kind: ActionMemory(before[kind], after[kind], before[kind] + draw.randrange(1000)) for kind in KINDS})
    rows = build_schedule(name, p, v, m)
    assert Pipelines().peaks((name, p, v), m, stages) == [peak_bytes(row, stages) for row in rows]


@pytest.fixture(scope="module")
def deep() -> Anatomy:
    return take_apart(LanguageModel(GPT(vocab_size=256, width=64, depth=16, heads=4)))


def exhaustive(anatomy: Anatomy, where: Cluster, batch: int) -> list[Estimate]:
    """Of each mesh and ZeRO stage the best of every way that fits, each replayed."""
    estimator = Estimator(anatomy, where)
    best: dict[object, Estimate] = {}
    words = Limits().recompute
    for mesh, sp, samples in _divided(anatomy, where, batch, Limits(), []):
        for plain in candidates(mesh, samples, sp):
            fits, _ = _fit(estimator, plain, words)
            tried = None if fits is None else _fitted(estimator, fits, where.device.usable_bytes, words)
            kind = mesh.tp, mesh.pp, plain.layout.zero
            if tried is not None and (kind not in best or _merit(tried) < _merit(best[kind])):
                best[kind] = tried
    return sorted(best.values(), key=_merit)[:NUM_BEST]


@pytest.mark.parametrize(
    ("per_node", "nodes", "memory", "between", "batch"),
    [
        (4, 2, 1.0, 1e8, 32),
        (4, 4, 0.02, 1e8, 64),
        (2, 8, 0.02, 1e7, 48),
        pytest.param(4, 1, 0.004, 1e8, 24, marks=pytest.mark.slow),
        pytest.param(8, 2, 0.006, 1e9, 128, marks=pytest.mark.slow),
    ],
)
def test_the_ten_best_are_those_of_all_ways(
    per_node: int, nodes: int, memory: float, between: float, batch: int, deep: Anatomy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was left out unreplayed is better; and with every table replayed whole the order is the same."""
    where = cluster(per_node, nodes, memory, between=between)
    found = found_by(deep, where, batch).best
    assert [estimate.candidate for estimate in found] == [estimate.candidate for estimate in exhaustive(deep, where, batch)]
    monkeypatch.setattr(pipeline, "_few", lambda sizes, count: count)
    whole = exhaustive(deep, where, batch)
    assert [estimate.candidate for estimate in found] == [estimate.candidate for estimate in whole]
    for mine, its in zip(found, whole, strict=True):
        assert mine.step_seconds == pytest.approx(its.step_seconds, rel=1e-3)
        assert mine.most_bytes == pytest.approx(its.most_bytes, rel=1e-4)
