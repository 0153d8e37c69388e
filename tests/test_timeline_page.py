"""The timeline's page in a real browser: what it draws, and what the mouse and the keys do. Skipped where none is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_par import Layout
from lightning_par.picture import html_page
from tests import browser
from tests.browser import Page, browse
from tests.test_picture import run_picture

pytestmark = pytest.mark.skipif(
    browser.EXECUTABLE is None, reason="no Chromium or Chrome is installed (Debian: apt install chromium)"
)
SIZES = [(1280, 720), (420, 700)]
PICTURE = run_picture(Layout(pp=4, vp=2, dp=2, microbatches=8), "interleaved-zb")
STATE = "({...document.getElementById('chart').dataset})"
BOX = "(({x, y, width, height}) => [x, y, width, height])(document.getElementById('chart').getBoundingClientRect())"


class Chart:
    """The canvas of an open page: where lanes and times are on it, and what it says of itself."""

    def __init__(self, page: Page) -> None:
        self.page = page

    async def state(self) -> dict[str, str]:
        await self.page.frame()
        return dict(await self.page.value(STATE))

    async def interval(self) -> tuple[float, float]:
        state = await self.state()
        return float(state["from"]), float(state["to"])

    async def text(self, selector: str) -> str:
        return str(await self.page.value(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def point(self, share: float, lane: int) -> tuple[float, float]:
        """A point of the window: ``share`` of the plot's width from its left, in the middle of a lane of four."""
        x, y, width, height = await self.page.value(BOX)
        left = float((await self.state())["left"])
        return x + left + share * (width - left), y + 26 + (lane + 0.45) * (height - 26) / 4

    async def paper(self) -> list[int]:
        """The colour of the canvas where nothing is drawn."""
        await self.page.frame()
        return await self._colour(1, 1)

    async def pixel(self, share: float, lane: int) -> list[int]:
        """The colour drawn there, near the top of the lane, where no label is."""
        x, y, *_ = await self.page.value(BOX)
        at_x, at_y = await self.point(share, lane)
        return await self._colour(at_x - x, at_y - y - 8)

    async def _colour(self, x: float, y: float) -> list[int]:
        """By a copy: the browser warns of a canvas that is read again and again."""
        make = "const copy = new OffscreenCanvas(1, 1).getContext('2d');"
        draw = f"copy.drawImage(document.getElementById('chart'), {-round(x)}, {-round(y)});"
        return list(
            await self.page.value(f"(() => {{ {make} {draw} return [...copy.getImageData(0, 0, 1, 1).data].slice(0, 3); }})()")
        )


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "timeline.html"
    path.write_text(html_page(PICTURE), encoding="utf-8")
    return path.as_uri()


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_everything_is_drawn_and_can_be_read(address: str, width: int, height: int) -> None:
    async def visit(page: Page) -> None:
        chart, panel = Chart(page), PICTURE.panels[0]
        state, num_actions = await chart.state(), sum(len(lane.spans) for lane in panel.lanes)
        assert state["total"] == state["actions"] == str(num_actions)
        assert 0 < int(state["bars"]) <= num_actions
        assert (int(state["labels"]) > num_actions / 2) == (width > 1000), "labels are there where they fit"
        assert await chart.text("h1") == PICTURE.title
        rows = await page.value(
            "[...document.querySelectorAll('#bubbles tbody tr')].map((row) => [...row.cells].map((cell) => cell.innerText))"
        )
        assert [row[0] for row in rows] == ["rank 0", "rank 2", "rank 4", "rank 6"]
        assert [row[1] for row in rows] == ["0, 4", "1, 5", "2, 6", "3, 7"]
        assert [row[4] for row in rows] == [f"{100 * value:.1f} %" for value in panel.bubbles["measured"]]
        legend = await chart.text("#legend")
        assert all(name in legend for name in ("F forward", "I input gradient", "W weight gradient", "wait", "lighter"))
        assert "B backward" not in legend
        assert await page.value("document.documentElement.scrollWidth <= window.innerWidth"), "the page does not scroll sideways"
        first = panel.lanes[0].spans[0]
        middle = (first.start_seconds + first.end_seconds) / 2 / (panel.limits[1] - panel.limits[0])
        assert await chart.pixel(middle, 0) == [0x00, 0x72, 0xB2], "F of the first stage"

    browse(address, width, height, visit)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_mouse(address: str, width: int, height: int) -> None:
    async def visit(page: Page) -> None:
        chart, panel = Chart(page), PICTURE.panels[0]
        length = panel.limits[1] - panel.limits[0]
        span = panel.lanes[1].spans[3]
        at = (span.start_seconds + span.end_seconds) / 2 / length
        await page.mouse("mouseMoved", *await chart.point(at, 1))
        assert (await chart.state())["chosen"] == str(span.action) == "1F3"
        tip = (await chart.text("#tip")).split("\n")
        assert tip[0] == "1F3: forward on rank 2"
        assert tip[tip.index("stage") + 1] == "1" and tip[tip.index("microbatch") + 1] == "3"
        assert tip[tip.index("start") + 1] == f"{1000 * span.start_seconds:.4g} ms" and tip[tip.index("duration") + 1] == "20 ms"
        box = await page.value("(({left, right}) => [left, right])(document.getElementById('tip').getBoundingClientRect())")
        assert box[0] >= 0 and box[1] <= width, "the tip is inside the window"

        x, y = await chart.point(0.5, 2)
        await page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-500)
        start, end = await chart.interval()
        assert end - start == pytest.approx(length / 2.718, rel=0.01)
        assert (start + end) / 2 == pytest.approx(length / 2, rel=0.01), "the time under the mouse stays"
        assert int((await chart.state())["actions"]) < sum(len(lane.spans) for lane in panel.lanes)

        to_x, _ = await chart.point(0.25, 2)
        await page.drag(x, y, to_x)
        moved, moved_end = await chart.interval()
        assert moved - start == pytest.approx((end - start) / 4, rel=0.05) and moved_end - moved == pytest.approx(end - start)
        await page.drag(x, y, x + 10 * width)
        assert (await chart.interval())[0] == 0, "not beyond the first start"
        await page.value("document.getElementById('whole').click()")
        assert await chart.interval() == pytest.approx((0, length))
        await page.mouse("mouseMoved", 5, 5)
        assert (await chart.state())["chosen"] == ""

    browse(address, width, height, visit)


def test_keys(address: str) -> None:
    async def visit(page: Page) -> None:
        chart = Chart(page)
        await page.value("document.getElementById('chart').focus()")

        async def chosen(*keys: str) -> str:
            for key in keys:
                await page.key(key)
            return (await chart.state())["chosen"]

        lanes = PICTURE.panels[0].lanes
        assert await chosen("ArrowRight") == str(lanes[0].spans[0].action)
        assert await chosen("ArrowRight", "ArrowRight", "ArrowLeft") == str(lanes[0].spans[1].action)
        spoken = await page.value("document.getElementById('spoken').textContent")
        assert spoken.startswith("0F1: forward on rank 0, stage 0, microbatch 1, start 20 ms"), "a screen reader says it"
        assert (await chosen("ArrowDown")).startswith("1F")
        assert (await chosen("ArrowUp")).startswith("0F")
        whole = await chart.interval()
        await page.key("+")
        start, end = await chart.interval()
        assert end - start == pytest.approx((whole[1] - whole[0]) / 1.5)
        await page.send("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", modifiers=8)
        assert (await chart.interval())[0] == pytest.approx(start + (end - start) / 5, rel=0.2)
        for _ in lanes[0].spans:
            await page.key("ArrowRight")
        state = await chart.state()
        assert state["chosen"] == str(lanes[0].spans[-1].action)
        assert float(state["to"]) == pytest.approx(whole[1], rel=0.05), "the chosen action is brought into view"
        assert await chosen("Escape") == ""
        await page.key("Home")
        assert await chart.interval() == whole

    browse(address, 1000, 700, visit)


def test_choices_theme_and_size(address: str) -> None:
    async def choose(page: Page, name: str, value: str) -> None:
        element = f"document.getElementById({json.dumps(name)})"
        await page.value(f"{element}.value = {json.dumps(value)}; {element}.dispatchEvent(new Event('change'))")

    async def visit(page: Page) -> None:
        chart = Chart(page)
        options = await page.value("[...document.querySelectorAll('option')].map((option) => option.value)")
        assert options == ["step 5", "step 6", "dp 0", "dp 1"]
        await choose(page, "replica", "dp 1")
        await choose(page, "step", "step 6")
        assert (await chart.text("#summary")).startswith("step 6 · dp 1")
        assert "rank 1" in await chart.text("#bubbles") and "rank 0" not in await chart.text("#bubbles")
        light = await chart.paper()
        await page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        await page.frame()
        dark = await chart.paper()
        assert min(light) > 240 and max(dark) < 60, "the canvas follows the theme"
        widths = "[document.getElementById('chart').width, document.getElementById('frame').clientWidth]"
        before = await page.value(widths)
        await page.send("Emulation.setDeviceMetricsOverride", width=600, height=500, deviceScaleFactor=2, mobile=False)
        await page.frame()
        after = await page.value(widths)
        assert before[0] == before[1] > after[1] and after[0] == 2 * after[1], "as many dots as the screen has"
        assert int((await chart.state())["actions"]) > 0

    browse(address, 1000, 700, visit)


def test_thousands_of_actions_on_sixty_four_ranks_do_not_lag(tmp_path: Path) -> None:
    picture = run_picture(Layout(pp=64, vp=2, dp=1, microbatches=256), "interleaved", steps=1)
    (tmp_path / "timeline.html").write_text(html_page(picture), encoding="utf-8")
    milliseconds: list[float] = []

    async def visit(page: Page) -> None:
        chart = Chart(page)
        state = await chart.state()
        assert state["actions"] == state["total"] == str(64 * 1024)
        assert int(state["bars"]) <= 64 * (1000 - float(state["left"])), "at most one bar for each pixel of a lane"
        timed = (
            "(async () => { const start = performance.now(); for (let turn = 0; turn < 10; turn++) {"
            "document.getElementById(turn < 5 ? 'zoom-in' : 'zoom-out').click(); await new Promise(requestAnimationFrame); }"
            "return (performance.now() - start) / 10; })()"
        )
        milliseconds.append(await page.value(timed))

    browse((tmp_path / "timeline.html").as_uri(), 1000, 900, visit)
    assert milliseconds[0] < 250  # about 50 on a busy core, without a graphics card
