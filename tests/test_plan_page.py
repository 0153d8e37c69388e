"""The page of a search in a real browser: what it shows, and bars as long as their numbers. Skipped where none is installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_par.layout import Layout
from lightning_par.pipeline.schedules import build_schedule
from lightning_par.pipeline.simulate import Costs
from lightning_par.plan.memory import RankMemory
from lightning_par.planner.candidate import Candidate
from lightning_par.planner.estimate import Estimate
from lightning_par.planner.page import PARTS, STORED, plan_page
from lightning_par.planner.search import Miss, Outlook
from tests import browser
from tests.browser import Page, browse
from tests.test_mesh_page import rgb
from tests.test_planner import cluster
from tests.test_timeline_page import SIZES, STATE

pytestmark = pytest.mark.skipif(
    browser.EXECUTABLE is None, reason="no Chromium or Chrome is installed (Debian: apt install chromium)"
)
GIB = 2**30
LAYOUT = Layout(tp=2, pp=4, dp=2, zero=1, microbatches=16)
MEMORY = tuple(RankMemory(GIB // 8, GIB // 8, GIB // 16, GIB * (4 - pp) // 16, GIB // 32, 0) for pp in range(4))
FIRST = Estimate(
    Candidate(LAYOUT, 1, "1f1b"),
    0.02,
    {"compute": 0.01, "tp": 0.002, "pp": 0.0005, "bubble": 0.005, "dp": 0.002, "optimizer": 0.0005},
    MEMORY,
    {"tp": 3e8, "pp": 1e8, "dp": 0.0},
    {"tp": True, "pp": False, "dp": False},
    (1e9, 1.2e9),
    (build_schedule("1f1b", 4, 1, 8), Costs((0.001,) * 4, (0.001,) * 4, (0.001,) * 4, 0.0001)),
)
SECOND = replace(
    FIRST,
    candidate=Candidate(Layout(tp=4, dp=4, microbatches=8), 1, "1f1b", "full"),
    step_seconds=0.04,
    parts={"compute": 0.03, "tp": 0.01, "pp": 0.0, "bubble": 0.0, "dp": 0.0, "optimizer": 0.0},
    memory=MEMORY[:1],
    replayed=None,
)
OUTLOOK = Outlook(
    cluster(4, 4), 32, (FIRST, SECOND), (Miss("parallel=tp8", "does not divide: <b>4 heads</b> </script>"),), 1234, alone=()
)
BARS = """(table) => [...document.querySelectorAll(`#${table} .bar`)].map((bar) => [bar.clientWidth,
    [...bar.querySelectorAll('i')].map((part) => [part.title, part.getBoundingClientRect().width,
        getComputedStyle(part).backgroundColor])])"""
TABLE = "(table) => [...document.querySelectorAll(`#${table} tbody tr`)].map((row) => [...row.cells].map((cell) => cell.innerText))"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "plan.html"
    path.write_text(plan_page(OUTLOOK, 128), encoding="utf-8")
    return path.as_uri()


async def rows(page: Page, table: str) -> list[list[str]]:
    return list(await page.value(f"({TABLE})({table!r})"))


async def check_bars(page: Page, table: str, line: int, parts: dict[str, float], longest: float, colours: dict[str, str]) -> None:
    """A line's bar has a part for each number that is not 0, in its colour, as long as its share."""
    width, drawn = list(await page.value(f"({BARS})({table!r})"))[line]
    expected = {name: size for name, size in parts.items() if size}
    assert [title.split()[0] for title, *_ in drawn] == [name for name in colours if name in expected]
    for title, length, colour in drawn:
        name = title.split()[0]
        assert length == pytest.approx(width * expected[name] / longest, abs=1)
        assert colour == f"rgb({', '.join(map(str, rgb(colours[name])))})"


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_all_of_a_search_can_be_read(address: str, width: int, height: int) -> None:
    async def visit(page: Page) -> None:
        assert await page.value("document.querySelector('h1').innerText") == f"{FIRST.candidate.words} on 4 x 4 devices of test"
        text = await page.value("document.body.innerText")
        assert "32 samples a step in 20 ms; of 1,234 ways that fit. Rates: made up" in text
        best = await rows(page, "best")
        assert [line[0] for line in best] == [FIRST.candidate.words, SECOND.candidate.words]
        assert best[0][2:4] == ["20 ms", "1.28e+04"] and best[0][5:10] == ["608.0 MiB", "25.0%", "10.0%", "2.5%", "10.0%"]
        memory = await rows(page, "memory")
        assert [line[0] for line in memory] == ["pp 0", "pp 1", "pp 2", "pp 3"] and memory[3][5] == "64.0 MiB"
        traffic = await rows(page, "traffic")
        assert [[line[0], *line[2:4]] for line in traffic] == [
            ["tp", "286.1 MiB", "in a node"], ["pp", "95.4 MiB", "between nodes"], ["dp", "nothing", ""],
        ]  # fmt: skip
        shown = await page.value("[...document.querySelectorAll('#misses *')].map((each) => each.innerText)")
        assert shown == ["parallel=tp8", "does not divide: <b>4 heads</b> </script>"], "words are no markup"
        assert await page.value("document.querySelectorAll('#advice li').length") > 0
        legend = await page.value("[...document.querySelectorAll('#kinds li')].map((each) => each.innerText)")
        assert legend == ["parameters", "gradients", "states", "activations", "working"], "what nobody stores is not explained"
        assert await page.value("document.documentElement.scrollWidth <= window.innerWidth"), "the page does not scroll sideways"

    browse(address, width, height, visit)


def test_bars_are_as_long_as_their_numbers(address: str) -> None:
    async def visit(page: Page) -> None:
        for line, estimate in enumerate(OUTLOOK.best):
            await check_bars(page, "best", line, dict(estimate.parts), 0.04, PARTS)
        for line, memory in enumerate(MEMORY):
            sizes = {kind: float(getattr(memory, kind)) for kind in STORED}
            await check_bars(page, "memory", line, sizes, GIB, STORED)
        await check_bars(page, "traffic", 1, {"pp": 1e8}, 3e8, PARTS)
        marks = "[...document.querySelectorAll('#memory .bar b')].map((mark) => mark.offsetLeft / mark.parentElement.clientWidth)"
        assert await page.value(marks) == pytest.approx([1.0] * 4, abs=0.01), "where the memory ends"

    browse(address, 1280, 720, visit)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_timeline_is_there_and_can_be_used(address: str, width: int, height: int) -> None:
    async def visit(page: Page) -> None:
        await page.frame()
        state: dict[str, Any] = await page.value(STATE)
        assert state["total"] == str(4 * 8 * 2) == state["actions"]
        assert "forecast, 8 of 16 microbatches" in await page.value("document.getElementById('summary').innerText")
        await page.value("document.getElementById('chart').focus()")
        await page.key("ArrowRight")
        await page.frame()
        assert (await page.value(STATE))["chosen"] == "0F0"

    browse(address, width, height, visit)


def test_without_a_pipeline_there_is_no_timeline(tmp_path: Path) -> None:
    (tmp_path / "plan.html").write_text(plan_page(replace(OUTLOOK, best=(SECOND,)), None), encoding="utf-8")

    async def visit(page: Page) -> None:
        assert await page.value("document.getElementById('timeline') === null && document.querySelector('canvas') === null")
        assert await page.value("document.querySelector('h1').innerText") == f"{SECOND.candidate.words} on 4 x 4 devices of test"
        assert "samples/s/device" in await page.value("document.getElementById('best').innerText")

    browse((tmp_path / "plan.html").as_uri(), 1000, 700, visit)
