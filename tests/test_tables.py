"""Which schedule a run has, and what it refuses."""

from __future__ import annotations

import re

import pytest

from lightning_par.errors import ConfigurationError
from lightning_par.layout import parse_layout
from lightning_par.pipeline.simulate import Costs, simulate
from lightning_par.pipeline.tables import Tables, choose_schedule


@pytest.mark.parametrize(
    ("typed", "word", "chosen", "layout", "last_pp"),
    [
        (None, "pp4", "1f1b", "pp4", 3),
        (None, "pp4_vp2", "interleaved", "pp4_vp2", 3),
        (None, "tp2", "1f1b", "tp2", 0),
        ("interleaved", "dp2", "1f1b", "dp2", 0),  # without a pipeline there is nothing to schedule
        ("zb-v", "pp4", "zb-v", "pp4_vp2", 0),
        ("auto", "pp4_vp2", "auto", "pp4_vp2", 3),
        ("auto", "pp2_dp2_zero3", "auto", "pp2_dp2_zero3", 1),
    ],
)
def test_the_schedule_and_where_it_has_the_stages(typed: str | None, word: str, chosen: str, layout: str, last_pp: int) -> None:
    name, placed = choose_schedule(typed, parse_layout(word))
    assert (name, str(placed), placed.last_pp) == (chosen, layout, last_pp)


@pytest.mark.parametrize(
    ("typed", "word", "message"),
    [
        ("zigzag", "single", "schedule=zigzag: no such pipeline schedule: use one of"),
        ("1f1b", "pp2_vp2", "schedule=1f1b runs one stage on each rank, and the layout has vp2: use schedule="),
        ("zb-v", "pp2_vp3", "schedule=zb-v runs exactly 2 stages on each rank, and the layout has vp3: use vp2"),
        (
            "zb-h1",
            "pp4_mb3",
            "schedule=zb-h1 on pp4 needs at least 4 microbatches, one for each rank, and the layout has mb3: use mb4",
        ),
        ("zb-h1", "pp2_zero3", "schedule=zb-h1 computes weight gradients after the backward of their layer, and zero3 has"),
    ],
)
def test_what_cannot_be(typed: str, word: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        choose_schedule(typed, parse_layout(word))


def test_a_table_from_costs_follows_them() -> None:
    equal, uneven = Costs.equal(2), Costs([1.0, 3.0], [1.0, 3.0], [1.0, 3.0])
    tables = Tables("auto", parse_layout("pp2"), equal)
    before = tables.training(8)
    assert tables.training(8) is before
    tables.costs = uneven
    assert simulate(tables.training(8), uneven).makespan_seconds <= simulate(before, uneven).makespan_seconds
    assert len(tables.training(3)[0]) < len(tables.training(8)[0])


def test_without_split_backwards_under_zero3() -> None:
    table = Tables("auto", parse_layout("pp2_zero3"), Costs.equal(2)).training(4)
    assert {action.kind for row in table for action in row} == {"F", "B"}
