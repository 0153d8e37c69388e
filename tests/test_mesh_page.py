"""The mesh's page in a real browser: what it draws, and what the mouse and the keys do. Skipped where none is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_par.layout import Layout
from lightning_par.picture.colour import hue
from lightning_par.picture.mesh import mesh_page, place_ranks
from tests import browser
from tests.browser import Page, browse
from tests.test_mesh_picture import SIXTY_FOUR, THOUSANDS, mesh_for
from tests.test_timeline_page import BOX, SIZES, STATE

pytestmark = pytest.mark.skipif(
    browser.EXECUTABLE is None, reason="no Chromium or Chrome is installed (Debian: apt install chromium)"
)
PLACED = place_ranks(SIXTY_FOUR)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "mesh.html"
    path.write_text(mesh_page(SIXTY_FOUR), encoding="utf-8")
    return path.as_uri()


async def state_of(page: Page) -> dict[str, str]:
    await page.frame()
    return dict(await page.value(STATE))


async def corner(page: Page, rank: int) -> tuple[float, float, float]:
    """Left and top of a rank's square on the canvas, and its side."""
    cell = float((await state_of(page))["cell"])
    left, top = PLACED.cells[rank]
    return cell * left, cell * top, cell


async def pixel(page: Page, rank: int, inset: float) -> list[int]:
    """The colour so many pixels inside a rank's square, from its left top."""
    left, top, _ = await corner(page, rank)
    make = "const copy = new OffscreenCanvas(1, 1).getContext('2d');"
    draw = f"copy.drawImage(document.getElementById('chart'), {-round(left + inset)}, {-round(top + inset)});"
    read = "return [...copy.getImageData(0, 0, 1, 1).data].slice(0, 3);"
    return list(await page.value(f"(() => {{ {make} {draw} {read} }})()"))


async def hover(page: Page, rank: int) -> None:
    x, y, *_ = await page.value(BOX)
    left, top, side = await corner(page, rank)
    await page.mouse("mouseMoved", x + left + side / 2, y + top + side / 2)


async def tip(page: Page) -> dict[str, str]:
    lines = "[...document.querySelectorAll('#tip div')].map((line) => [...line.children].map((part) => part.innerText))"
    return dict(await page.value(lines))


def rgb(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_everything_is_drawn_and_can_be_read(address: str, width: int, height: int) -> None:
    async def visit(page: Page) -> None:
        state = await state_of(page)
        assert state["ranks"] == "64" and state["words"] == "true"
        for rank, pp in ((0, 0), (31, 0), (32, 1), (63, 1)):
            assert await pixel(page, rank, 3) == rgb(hue(pp))
        assert await page.value("document.querySelector('h1').innerText") == SIXTY_FOUR.title
        text = await page.value("document.body.innerText")
        assert SIXTY_FOUR.summary in text and all(words in text for words in SIXTY_FOUR.links.values())
        rows = "[...document.querySelectorAll('#holdings tbody tr')].map((row) => [...row.cells].map((cell) => cell.innerText))"
        assert await page.value(rows) == [["0", "0", "layers.[0-3]", "1.0 GiB"], ["1", "1", "layers.[4-7]", "2.0 GiB"]]
        assert await page.value("document.documentElement.scrollWidth <= window.innerWidth"), "the page does not scroll sideways"

    browse(address, width, height, visit)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_mouse(address: str, width: int, height: int) -> None:
    async def visit(page: Page) -> None:
        await hover(page, 13)  # pp 0, dp 3, tp 1
        assert (await state_of(page))["chosen"] == "13"
        assert await page.value("document.querySelector('#tip b').innerText") == "rank 13"
        assert await tip(page) == {
            "coordinate": "pp 0, dp 3, tp 1",
            "node": "1, device 5",
            "stages": "0",
            "blocks": "layers.[0-3]",
            "weights": "1.0 GiB",
        }
        box = await page.value("(({left, right}) => [left, right])(document.getElementById('tip').getBoundingClientRect())")
        assert box[0] >= 0 and box[1] <= width, "the tip is inside the window"
        assert await pixel(page, 12, 1) == await pixel(page, 15, 1) != rgb(hue(0)), "its tp group is outlined"
        assert await pixel(page, 45, 1) != rgb(hue(1)), "and its pp group"
        assert await pixel(page, 9, 1) != rgb(hue(0)) and await pixel(page, 8, 1) == rgb(hue(0)), "and its dp group"
        await page.mouse("mouseMoved", 3, 3)
        assert (await state_of(page))["chosen"] == ""
        assert await pixel(page, 12, 1) == rgb(hue(0))

    browse(address, width, height, visit)


def test_keys(address: str) -> None:
    async def visit(page: Page) -> None:
        await page.value("document.getElementById('chart').focus()")

        async def chosen(*keys: str) -> str:
            for key in keys:
                await page.key(key)
            return (await state_of(page))["chosen"]

        assert await chosen("ArrowRight") == "0"
        assert await chosen("ArrowRight", "ArrowRight") == "2"
        spoken = await page.value("document.getElementById('spoken').textContent")
        assert spoken.startswith("rank 2, coordinate pp 0, dp 0, tp 2, node 0, device 2, stages 0"), "a screen reader says it"
        assert await chosen("ArrowDown") == "10" and await chosen("ArrowUp", "ArrowUp") == "2"
        assert await chosen("ArrowLeft", "ArrowLeft", "ArrowLeft") == "0"
        assert await chosen("Escape") == ""
        assert await chosen("ArrowLeft", "ArrowRight") == "63"

    browse(address, 1000, 700, visit)


def test_theme_and_size(address: str) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"

    async def visit(page: Page) -> None:
        cell = float((await state_of(page))["cell"])
        light = await page.value(paper)
        await page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert await page.value(paper) != light
        await page.send("Emulation.setDeviceMetricsOverride", width=300, height=500, deviceScaleFactor=2, mobile=False)
        state = await state_of(page)
        widths = await page.value("[document.getElementById('chart').width, document.getElementById('frame').clientWidth]")
        assert float(state["cell"]) < cell and widths[0] == 2 * widths[1], "as many dots as the screen has"

    browse(address, 1000, 700, visit)


def test_without_nodes_none_is_named(tmp_path: Path) -> None:
    mesh = mesh_for(Layout(pp=3, dp=1))
    (tmp_path / "mesh.html").write_text(mesh_page(mesh), encoding="utf-8")

    async def visit(page: Page) -> None:
        await page.value("document.getElementById('chart').focus()")
        await page.key("ArrowRight")
        assert list(await tip(page)) == ["coordinate", "stages", "blocks", "weights"]

    browse((tmp_path / "mesh.html").as_uri(), 800, 500, visit)


def test_thousands_of_ranks_do_not_lag(tmp_path: Path) -> None:
    (tmp_path / "mesh.html").write_text(mesh_page(THOUSANDS), encoding="utf-8")
    milliseconds: list[float] = []

    async def visit(page: Page) -> None:
        assert (await state_of(page))["ranks"] == str(THOUSANDS.layout.world_size)
        assert (await state_of(page))["words"] == "false"
        await page.value("document.getElementById('chart').focus()")
        timed = (
            "(async () => { const start = performance.now(); for (let turn = 0; turn < 10; turn++) {"
            "document.getElementById('chart').dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowDown' }));"
            "await new Promise(requestAnimationFrame); } return (performance.now() - start) / 10; })()"
        )
        milliseconds.append(await page.value(timed))

    browse((tmp_path / "mesh.html").as_uri(), 1000, 900, visit)
    assert milliseconds[0] < 250
