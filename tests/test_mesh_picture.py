"""The device mesh as text, as a page and as a PNG: where ranks are, what they hold, what goes over which links."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from rich.console import Console

from lightning_par import cli
from lightning_par.host.launch.command import MAIN
from lightning_par.layout import Layout
from lightning_par.picture.colour import HUES, hue
from lightning_par.picture.mesh import Holding, MeshPicture, mesh_of, mesh_page, place_ranks, print_mesh, write_mesh
from tests.planning import Block, Chain, plan_of
from tests.test_picture import page_data

ROOT = Path(__file__).resolve().parents[1]


def mesh_for(layout: Layout, devices_per_node: int | None = None) -> MeshPicture:
    """Of a model of four blocks for each pp coordinate."""
    holdings = (
        Holding(layout.stages_of(pp), f"layers.[{4 * pp}-{4 * pp + 3}]", {"weights": f"{pp + 1}.0 GiB"}) for pp in range(layout.pp)
    )
    return MeshPicture(f"Model, {layout}", layout, devices_per_node, tuple(holdings))


SIXTY_FOUR = mesh_for(Layout(tp=4, pp=2, dp=8, zero=1), devices_per_node=8)
THOUSANDS = mesh_for(Layout(tp=8, pp=32, dp=64), devices_per_node=8)


def printed(mesh: MeshPicture, width: int = 132, color: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=color, color_system="truecolor" if color else None)
    print_mesh(mesh, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---------------------------------------------------------------------- what is known


def test_what_ranks_hold_is_the_plans() -> None:
    plan = plan_of(Chain(Block, depth=4), "tp2_pp2_vp2_dp2")
    mesh = mesh_of(plan, 4)
    assert [(one.stages, one.blocks) for one in mesh.holdings] == [
        ((0, 2), "blocks.0, blocks.2"),
        ((1, 3), "blocks.1, blocks.3"),
    ]
    num_bytes = sum(p.local_numel(2) * p.itemsize for p in plan.parameters if 0 in p.spec.stages)
    assert mesh.holdings[0].facts == {"weights": f"{num_bytes / 1024:.1f} KiB"}
    assert mesh.title == "Chain, tp2_pp2_vp2_dp2_mb4" and mesh.summary == "8 ranks on 2 nodes of 4, tp groups together"
    assert mesh_of(plan_of(Chain(Block), "dp2", overrides={"chain": "blocks"}), None).holdings[0].blocks == "blocks.[0-1]"


@pytest.mark.parametrize(
    ("devices", "where"),
    [
        (None, {"tp": "4 ranks side by side:", "dp": "8 ranks, 4 apart:", "pp": "2 ranks, 32 apart:"}),
        (2, {"tp": "inside nodes and between them", "dp": "between nodes", "pp": "between nodes"}),
        (4, {"tp": "inside a node", "dp": "between nodes", "pp": "between nodes"}),
        (8, {"tp": "inside a node", "dp": "inside nodes and between them", "pp": "between nodes"}),
        (32, {"tp": "inside a node", "dp": "inside a node", "pp": "between nodes"}),
        (64, {"tp": "inside a node", "dp": "inside a node", "pp": "inside a node"}),
    ],
)
def test_which_axis_talks_over_what(devices: int | None, where: dict[str, str]) -> None:
    links = mesh_for(SIXTY_FOUR.layout, devices).links
    assert list(links) == ["tp", "dp", "pp"]
    for axis, words in where.items():
        assert words in links[axis].split(":")[0] + ":", axis


@pytest.mark.parametrize(
    ("layout", "axis", "words"),
    [
        (Layout(tp=2, dp=1), "tp", "activations and their gradients, summed around each split layer"),
        (Layout(tp=2, dp=1, sp=True), "tp", "activations and their gradients, gathered and summed around each split layer"),
        (Layout(dp=2), "dp", "gradients, summed once a step"),
        (Layout(dp=2, zero=1), "dp", "gradients to the rank that steps them, and new weights back, once a step"),
        (Layout(dp=2, zero=2), "dp", "gradients to the rank that keeps them, and new weights back, once a step"),
        (Layout(dp=2, zero=3), "dp", "weights, gathered wherever they are read, and gradients to the rank that keeps them"),
        (Layout(pp=2, dp=1), "pp", "hidden states of each microbatch, and their gradients back"),
    ],
    ids=str,
)
def test_what_each_axis_sends(layout: Layout, axis: str, words: str) -> None:
    assert mesh_for(layout).links == {axis: f"2 ranks side by side: {words}"}


# ---------------------------------------------------------------------- text


def test_ranks_stand_in_their_nodes_in_tp_groups() -> None:
    assert printed(mesh_for(Layout(tp=2, pp=2, dp=4), devices_per_node=4)).splitlines()[:5] == [
        "Mesh: 16 ranks on 4 nodes of 4, tp groups together",
        "node 0  pp 0 dp 0 [ 0  1]  pp 0 dp 1 [ 2  3]",
        "node 1  pp 0 dp 2 [ 4  5]  pp 0 dp 3 [ 6  7]",
        "node 2  pp 1 dp 0 [ 8  9]  pp 1 dp 1 [10 11]",
        "node 3  pp 1 dp 2 [12 13]  pp 1 dp 3 [14 15]",
    ]


def test_without_nodes_a_line_is_a_pp_coordinate_and_goes_on_below_where_it_is_too_long() -> None:
    lines = printed(mesh_for(Layout(tp=2, pp=2, dp=3)), width=40).splitlines()
    assert lines[:5] == [
        "Mesh: 12 ranks, tp groups together",
        "pp 0  dp 0 [ 0  1]  dp 1 [ 2  3]",
        "      dp 2 [ 4  5]",
        "pp 1  dp 0 [ 6  7]  dp 1 [ 8  9]",
        "      dp 2 [10 11]",
    ]


def test_a_tp_group_of_two_nodes_goes_on_in_the_next_line() -> None:
    assert printed(mesh_for(Layout(tp=4, dp=1), devices_per_node=2)).splitlines()[1:3] == [
        "node 0  pp 0 dp 0 [0 1…",
        "node 1  pp 0 dp 0 …2 3]",
    ]


@pytest.mark.parametrize("width", [80, 132])
def test_sixty_four_ranks_fit_a_terminal(width: int) -> None:
    lines = printed(SIXTY_FOUR, width).splitlines()
    grid = lines[1:9]
    assert [line.split("  ")[0] for line in grid] == [f"node {node}" for node in range(8)]
    assert [int(number) for line in grid for group in re.findall(r"\[(.*?)\]", line) for number in group.split()] == list(range(64))
    assert max(map(len, grid)) <= width


def test_thousands_of_ranks_are_summarised() -> None:
    lines = printed(THOUSANDS).splitlines()
    assert lines[0] == "Mesh: 16,384 ranks on 2,048 nodes of 8, tp groups together"
    assert lines[1] == "pp 0  ranks 0-511, nodes 0-63, stages 0, 64 x tp 8"
    assert lines[15:18] == [
        "pp 14  ranks 7168-7679, nodes 896-959, stages 14, 64 x tp 8",
        "... 16 more",
        "pp 31  ranks 15872-16383, nodes 1984-2047, stages 31, 64 x tp 8",
    ]
    assert len(lines) == 18 + 3
    sixteen = printed(mesh_for(Layout(tp=8, pp=16, dp=1), 8)).splitlines()
    assert sixteen[2] == "pp 1  ranks 8-15, nodes 1, stages 1, 1 x tp 8"
    assert [line.split("  ")[0] for line in sixteen[1:17]] == [f"pp {pp}" for pp in range(16)]


def test_colours_are_those_of_pp_coordinates() -> None:
    red, green, blue = (int(hue(1)[place : place + 2], 16) for place in (1, 3, 5))
    text = printed(mesh_for(Layout(tp=2, pp=2, dp=1), 4), color=True)
    assert text.count(f"48;2;{red};{green};{blue}m") == 2
    assert len({hue(pp) for pp in range(len(HUES))}) == len(HUES) and hue(len(HUES)) == hue(0)


# ---------------------------------------------------------------------- where cells are


MESHES = {
    "nodes": SIXTY_FOUR,
    "no nodes": mesh_for(SIXTY_FOUR.layout),
    "thousands": THOUSANDS,
    "one long line": mesh_for(Layout(dp=1000)),
    "tp over nodes": mesh_for(Layout(tp=8, dp=2), 4),
    "odd": mesh_for(Layout(tp=3, pp=5, dp=7), 6),
    "one": mesh_for(Layout(dp=1)),
}


@pytest.mark.parametrize("name", MESHES)
def test_every_rank_has_a_place_of_its_own(name: str) -> None:
    mesh = MESHES[name]
    placed = place_ranks(mesh)
    assert len(placed.cells) == mesh.layout.world_size
    taken = {(math.floor(left), math.floor(top)) for left, top in placed.cells}
    assert len(taken) == mesh.layout.world_size, "cells whose corners are nearer than their sides overlap"
    assert all(0 < left <= placed.width - 0.999 and 0 <= top <= placed.height - 0.999 for left, top in placed.cells)
    for rank, (left, top) in enumerate(placed.cells[1:], start=1):
        before = placed.cells[rank - 1]
        if before[1] == top and before[0] < left:
            gap = left - before[0] - 1
            assert gap == pytest.approx(0 if mesh.layout.coordinate_of(rank).tp else 0.3, abs=2e-3), "tp groups are apart"
    assert 0.2 < placed.width / placed.height < 40


def test_a_column_is_whole_pp_coordinates_where_that_looks_well() -> None:
    columns = Counter(left for left, _ in place_ranks(THOUSANDS).cells)
    lefts = [left for left, top in place_ranks(THOUSANDS).cells if top == 0]
    assert len(lefts) % 8 == 0 and len(columns) == len(lefts)
    first_ranks = [rank for rank, (_, top) in enumerate(place_ranks(THOUSANDS).cells) if top == 0 and rank % 8 == 0]
    assert all(rank % 256 == 0 for rank in first_ranks), "a pp coordinate has 512 ranks"


# ---------------------------------------------------------------------- page and PNG


def test_the_page_has_the_data_and_asks_for_nothing_else() -> None:
    mesh = mesh_for(Layout(tp=2, pp=2, dp=2), 4)
    page = mesh_page(MeshPicture("</script><i>", mesh.layout, 4, mesh.holdings))
    data = page_data(page)
    assert data["title"] == "</script><i>" and page.count("</script>") == 2
    assert data["axes"] == {"tp": {"size": 2, "stride": 1}, "dp": {"size": 2, "stride": 2}, "pp": {"size": 2, "stride": 4}}
    assert [one["facts"] for one in data["holdings"]] == [{"weights": "1.0 GiB"}, {"weights": "2.0 GiB"}]
    assert data["cells"] == [list(cell) for cell in place_ranks(mesh).cells] and data["links"] == mesh.links
    assert not re.search(r"""(src|href)=["'](?!data:,)|https?://|@import|url\(""", page)


def areas(path: Path) -> dict[str, int]:
    """Dots of each hue in a PNG."""
    image = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    return {colour: int((image == [int(colour[at : at + 2], 16) for at in (1, 3, 5)]).all(axis=-1).sum()) for colour in HUES}


def test_the_png_has_as_much_of_each_colour_as_there_are_ranks(tmp_path: Path) -> None:
    _, path = write_mesh(SIXTY_FOUR, tmp_path / "new" / "folder")
    found = areas(path)
    assert found[hue(0)] > 200_000 and found[hue(1)] == pytest.approx(found[hue(0)], rel=0.02)
    assert sum(found.values()) == found[hue(0)] + found[hue(1)]


def test_pictures_of_thousands_of_ranks_take_seconds(tmp_path: Path) -> None:
    start = time.perf_counter()
    page, image = write_mesh(THOUSANDS, tmp_path)
    assert time.perf_counter() - start < 20  # 1.3 s on a busy core
    assert min(areas(image).values()) > 20_000
    assert page.stat().st_size < 1_000_000
    height, width = matplotlib.image.imread(image).shape[:2]
    assert width / 3 < height < 2 * width


# ---------------------------------------------------------------------- the command


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-par"])
    monkeypatch.setenv(MAIN, "")  # so that it is forgotten again


@pytest.mark.usefixtures("_elsewhere")
def test_explain_draws_nodes_where_it_was_told_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["explain", "parallel=tp2_pp2", "trainer.devices=2", "+trainer.num_nodes=2", "--output", "drawn"])
    output = capsys.readouterr().out
    assert "Mesh: 4 ranks on 2 nodes of 2, tp groups together\nnode 0  pp 0 dp 0 [0 1]\nnode 1  pp 1 dp 0 [2 3]\n" in output
    assert "tp: 2 ranks side by side, inside a node: " in output and "pp: 2 ranks, 2 apart, between nodes: " in output
    assert output.endswith("drawn: drawn/mesh.html, drawn/mesh.png\n")
    data: Any = page_data((tmp_path / "drawn" / "mesh.html").read_text())
    assert data["devicesPerNode"] == 2 and json.dumps(data["holdings"][1]).count("network.blocks.[2-3]") == 1
    assert list(data["holdings"][0]["facts"]) == ["parameters", "gradients", "states", "activations", "peak"]
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"mesh.html", "mesh.png"}


@pytest.mark.usefixtures("_elsewhere")
def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        cli.main(["explain", "parallel=tp2", "--output", "file"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert re.search(r"--output file cannot be written \(File exists\): name another folder", captured.err)
    assert "Mesh: 2 ranks, tp groups together\npp 0  dp 0 [0 1]\n" in captured.out, "of nodes it was told nothing"
