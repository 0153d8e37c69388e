"""Pictures of a pipeline: what they show, the page, the PNG and the trace, and `lightning-par simulate`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from lightning_par import Layout, cli
from lightning_par.picture import Lane, Panel, Picture, bubbles_of, chrome_trace, format_time, html_page, mean_costs, write_picture
from lightning_par.picture.colour import COLOURS, ink, tint
from lightning_par.picture.recording import Recording, picture_of, split_rounds
from lightning_par.picture.simulation import read_simulation
from lightning_par.pipeline.action import Action
from lightning_par.pipeline.schedules import SCHEDULES, build_schedule
from lightning_par.pipeline.simulate import Costs, Span, simulate

F0, F1, B0 = Action("F", 1, 0), Action("F", 1, 1), Action("B", 1, 0)


def rows_of(name: str, pp: int, vp: int, microbatches: int) -> tuple[tuple[Span, ...], ...]:
    return simulate(build_schedule(name, pp, vp, microbatches), Costs.equal(pp * vp, 0.02, 0.02, 0.02)).rows


def run_picture(layout: Layout, schedule: str, steps: int = 2, shift_seconds: float = 1.5) -> Picture:
    """As `PipelineTimeline` makes it, of ranks that do what the simulator says."""
    assert layout.microbatches is not None
    rows = rows_of(schedule, layout.pp, layout.vp, layout.microbatches)
    ranks = [
        [
            Recording(f"step {5 + step}", "here", round(step * shift_seconds * 1e9), rows[layout.coordinate_of(rank).pp])
            for step in range(steps)
        ]
        for rank in range(layout.world_size)
    ]
    return picture_of(f"Model: {schedule}, {layout}", layout, ranks)


def test_bubbles_and_mean_costs_in_numbers() -> None:
    row0 = (Span(Action("F", 0, 0), 1.0, 2.0), Span(Action("F", 0, 1), 2.0, 4.0), Span(Action("B", 0, 0), 7.0, 11.0, 3.0))
    row1 = (Span(Action("F", 1, 0), 2.5, 3.0, 1.0), Span(Action("I", 1, 0), 4.0, 5.0, 1.0), Span(Action("W", 1, 0), 5.0, 8.0))
    assert bubbles_of((row0, row1)) == pytest.approx((0.3, 0.55))  # from 1 to 11
    costs = mean_costs((row0, row1), 2)
    assert (costs.forward, costs.input_gradient, costs.weight_gradient) == ((1.5, 0.5), (2.0, 1.0), (2.0, 3.0))
    assert costs.transfer == 0


def test_a_measured_run_is_beside_its_schedule() -> None:
    panel = run_picture(Layout(pp=4, dp=1, microbatches=8), "gpipe").panels[0]
    assert list(panel.bubbles) == ["measured", "schedule", "equal costs"]
    for values in panel.bubbles.values():
        assert values == pytest.approx([3 / 11] * 4)  # GPipe: (p - 1) / (m + p - 1)


def test_the_panels_are_the_batches_of_each_replica() -> None:
    layout = Layout(tp=2, pp=2, dp=2, microbatches=4)
    picture = run_picture(layout, "1f1b")
    assert [(panel.step, panel.replica) for panel in picture.panels] == [
        (step, f"dp {dp}, tp {tp}") for step in ("step 5", "step 6") for dp in range(2) for tp in range(2)
    ]
    assert [lane.rank for lane in picture.panels[2].lanes] == [2, 6]  # dp 1, tp 0
    assert [panel.offset_seconds for panel in picture.panels] == [0.0] * 4 + [1.5] * 4
    assert run_picture(Layout(pp=2, dp=1, microbatches=4), "1f1b").panels[0].replica == ""


def test_ranks_of_a_machine_are_compared_by_its_clock_and_machines_by_the_barrier() -> None:
    zeros = [("a", 5_000_000_000), ("a", 5_250_000_000), ("b", 900_500_000_000), ("b", 900_000_000_000)]
    ranks = [
        [Recording("step 5", machine, zero, (Span(Action("F", rank, 0), 1.0, 2.0),))] for rank, (machine, zero) in enumerate(zeros)
    ]
    lanes = picture_of("run", Layout(pp=4, dp=1), ranks).panels[0].lanes
    assert [lane.spans[0].start_seconds for lane in lanes] == pytest.approx([1.0, 1.25, 1.5, 1.0])
    assert [lane.spans[0].end_seconds for lane in lanes] == pytest.approx([2.0, 2.25, 2.5, 2.0])


def test_a_closure_that_runs_twice_gives_two_rounds() -> None:
    spans = tuple(Span(action, at, at + 1.0) for at, action in enumerate((F0, F1, B0, F0, F1, B0)))
    assert split_rounds(spans) == [spans[:3], spans[3:]]
    assert split_rounds(()) == []


@pytest.mark.parametrize(("seconds", "text"), [(2.0, "2 s"), (0.01234567, "12.35 ms"), (0.0000042, "4.2 µs"), (123.456, "123.5 s")])
def test_times_have_four_digits_and_a_unit(seconds: float, text: str) -> None:
    assert format_time(seconds) == text
    assert format_time(seconds, has_seconds=False) == f"{seconds:.4g}"
    assert format_time(0.5, longest=2.0) == "0.5 s"


def test_later_stages_are_lighter_and_labels_can_be_read_on_all() -> None:
    def luminance(colour: str) -> float:
        red, green, blue = ((int(colour[place : place + 2], 16) / 255) ** 2.2 for place in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for kind, colour in COLOURS.items():
        tints = [tint(kind, position, 4) for position in range(4)]
        assert tints[0] == colour.lower()
        assert sorted(tints, key=luminance) == tints and len(set(tints)) == 4
        for background in tints:
            dark, light = sorted((luminance(background), luminance(ink(background))))
            assert (light + 0.05) / (dark + 0.05) > 4.5, "WCAG 2.1, contrast of text (1.4.3)"


# ---------------------------------------------------------------------- the writers


def page_data(page: str) -> Any:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_page_holds_every_action_of_every_panel(schedule: str) -> None:
    layout = Layout(pp=4, vp=SCHEDULES[schedule].least_chunks, dp=2, microbatches=8, placement=SCHEDULES[schedule].placement)
    picture = run_picture(layout, schedule)
    data = page_data(html_page(picture))
    assert data["title"] == picture.title and data["hasSeconds"] is True
    for shown, panel in zip(data["panels"], picture.panels, strict=True):
        assert (shown["step"], shown["replica"]) == (panel.step, panel.replica)
        assert shown["length"] == pytest.approx(panel.limits[1] - panel.limits[0])
        assert {bubble["name"]: bubble["values"] for bubble in shown["bubbles"]} == {
            name: pytest.approx(values, abs=1e-6) for name, values in panel.bubbles.items()
        }
        for drawn, lane in zip(shown["lanes"], panel.lanes, strict=True):
            assert (drawn["label"], drawn["stages"]) == (f"rank {lane.rank}", list(lane.stages))
            kinds = [entry["kind"] for entry in data["kinds"]]
            assert [f"{stage}{kinds[kind]}{number}" for kind, stage, number, *_ in drawn["spans"]] == [
                str(span.action) for span in lane.spans
            ]
            for (*_, start, end, wait), span in zip(drawn["spans"], lane.spans, strict=True):
                assert (start, end, wait) == pytest.approx((span.start_seconds, span.end_seconds, span.wait_seconds), abs=1e-9)


def test_times_in_the_page_count_from_the_first_start() -> None:
    late = (Span(F0, 7.0, 8.0, 0.5), Span(B0, 9.0, 11.0, 1.0))
    panel = page_data(html_page(Picture("late", (Panel("", "", (Lane("rank 0", 0, late),)),))))["panels"][0]
    assert panel["length"] == 4.0
    assert [span[3:] for span in panel["lanes"][0]["spans"]] == [[0.0, 1.0, 0.5], [2.0, 4.0, 1.0]]


def test_a_title_cannot_end_the_script_and_the_page_asks_for_nothing_else() -> None:
    lanes = (Lane("</script><b>", 0, (Span(F0, 0.0, 1.0),)),)
    page = html_page(Picture("</script><i>@SCRIPT@", (Panel("", "", lanes),)))
    assert page_data(page)["title"] == "</script><i>@SCRIPT@"
    assert "<i>@" not in page.replace('"title":"<\\/script><i>@', "") and page.count("</script>") == 2
    assert not re.search(r"""(src|href)=["'](?!data:,)|https?://|@import|url\(""", page)


def test_the_chrome_trace_has_a_process_for_each_rank_and_an_event_for_each_action() -> None:
    layout = Layout(tp=2, pp=2, dp=1, microbatches=3)
    picture = run_picture(layout, "1f1b")
    trace = json.loads(chrome_trace(picture))
    names = {event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert names == {rank: f"rank {rank} (tp {rank % 2})" for rank in range(4)}
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    actions = [event for event in events if event["cat"] != "wait"]
    spans = [(panel, lane, span) for panel in picture.panels for lane in panel.lanes for span in lane.spans]
    assert len(actions) == len(spans) == 2 * 2 * 2 * 6
    for event, (panel, lane, span) in zip(actions, spans, strict=True):
        assert (event["name"], event["pid"], event["args"]["step"]) == (str(span.action), lane.rank, panel.step)
        assert event["args"]["stage"] == span.action.stage and event["args"]["microbatch"] == span.action.microbatch
        assert event["ts"] == pytest.approx((panel.offset_seconds + span.start_seconds) * 1e6)
        assert event["dur"] == pytest.approx((span.end_seconds - span.start_seconds) * 1e6)
    waits = [event for event in events if event["cat"] == "wait"]
    assert sum(event["dur"] for event in waits) == pytest.approx(1e6 * sum(span.wait_seconds for *_, span in spans))
    for pid in names:  # a viewer nests events that overlap
        mine = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event["pid"] == pid)
        assert all(later[0] >= earlier[1] - 1e-3 for earlier, later in pairwise(mine))


def colour_areas(path: Path) -> dict[str, int]:
    """Dots of each kind's colour below the legend of a PNG."""
    image = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    lanes = image[image.shape[0] // 3 :]
    rgb = {kind: [int(colour[place : place + 2], 16) for place in (1, 3, 5)] for kind, colour in COLOURS.items()}
    return {kind: int((lanes == rgb[kind]).all(axis=-1).sum()) for kind in rgb}


@pytest.mark.parametrize(("schedule", "microbatches", "lengths"), [("zb-h1", 8, "F I W"), ("1f1b", 128, "F B B")])
def test_the_png_has_the_colours_of_what_ran_by_their_time(schedule: str, microbatches: int, lengths: str, tmp_path: Path) -> None:
    picture = run_picture(Layout(pp=4, dp=1, microbatches=microbatches), schedule)
    _, path, _ = write_picture(picture, tmp_path / "new" / "folder")
    areas, units = colour_areas(path), lengths.split()  # a forward takes one unit, a whole backward two
    assert areas["F"] > 50_000
    for kind in COLOURS:
        assert areas[kind] == pytest.approx(units.count(kind) * areas["F"], rel=0.1)


def test_pictures_of_thousands_of_actions_take_seconds(tmp_path: Path) -> None:
    picture = run_picture(Layout(pp=16, vp=4, dp=1, microbatches=64), "interleaved", steps=1)
    start = time.perf_counter()
    write_picture(picture, tmp_path)
    assert time.perf_counter() - start < 20  # 8,192 actions: one second on an idle core


# ---------------------------------------------------------------------- lightning-par simulate


def test_simulate_prints_numbers_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    cli.main(["simulate", "parallel=pp2_mb4", "schedule=gpipe"])
    output = capsys.readouterr().out
    assert "rank 0  F0 F1 F2 F3 .  .  .  B0 == B1 == B2 == B3 ==\n" in output
    assert re.search(r"│ 1 +│ 1 +│ +12 │ +20\.0% │ +20\.0% │ +4 │", output)
    assert "makespan 15, ideal 12 " in output and "overhead 25.0%" in output
    folder = tmp_path / "simulate" / "pp2_mb4-gpipe"
    assert sorted(path.name for path in folder.iterdir()) == ["timeline.html", "timeline.png", "trace.json"]
    assert str(folder.relative_to(tmp_path) / "timeline.html") in output
    data = page_data((folder / "timeline.html").read_text())
    assert data["hasSeconds"] is False and data["panels"][0]["length"] == 15


def test_simulate_says_when_the_terminal_is_too_narrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    cli.main(["simulate", "parallel=pp4_mb16", "--output", str(tmp_path / "here")])
    output = capsys.readouterr().out
    assert "rank 0  F0" not in output and "characters wide and this terminal 60" in output
    assert (tmp_path / "here" / "timeline.png").exists()


@pytest.mark.parametrize(
    ("words", "stages", "makespan"),
    [
        ("parallel=pp4_mb8", 4, 33.0),  # (m + p - 1) x 3
        ("parallel=pp4_vp2_mb8", 8, 57.0),  # interleaved: (m + (p - 1) / v) x 3 v
        ("parallel=pp4", 4, 33.0),  # twice as many microbatches as ranks
        ("parallel=tp2_pp4_mb8_dp2_zero1", 4, 33.0),
        ("parallel=pp4_mb8 schedule=zb-v", 8, 51.0),  # 48 of work, 3 of bubble
        ("parallel=pp2_mb1 forward=[1,10] input=[2,20] weight=[3,30]", 2, 66.0),
        ("parallel=pp2_mb1 transfer=5", 2, 16.0),
    ],
)
def test_simulate_reads_words(words: str, stages: int, makespan: float) -> None:
    simulation = read_simulation(words.split())
    assert simulation.layout.num_stages == stages
    assert simulation.timeline.makespan_seconds == pytest.approx(makespan)


def test_simulate_builds_a_table_from_the_costs() -> None:
    words = ["parallel=pp4_mb8", "forward=[1,1,2,1]", "input=[1,1,2,1]", "weight=[1,1,2,1]"]
    simulation = read_simulation([*words, "schedule=auto"])
    named = [read_simulation([*words, f"schedule={name}"]) for name in ("1f1b", "gpipe", "zb-h1")]
    assert simulation.timeline.makespan_seconds <= min(other.timeline.makespan_seconds for other in named)
    assert simulation.name == "pp4_mb8-auto"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("schedule=1f1b", "simulate needs a layout with a pipeline: add a word such as parallel=pp4_mb8"),
        ("parallel=tp2", r"parallel=tp2 has no pipeline to simulate \(pp 1\): add pp2 or more"),
        ("parallel=pq2", "parallel=pq2: unknown token 'pq2'"),
        ("parallel=pp2 fwd=1", "fwd=1: simulate takes parallel, schedule, forward, input, weight, transfer, each as KEY=VALUE"),
        ("parallel=pp2 forward=", "forward=: simulate takes"),
        ("parallel=pp2 forward=1 forward=2", "forward=2: forward is given twice, and first as 1: keep one of them"),
        ("parallel=pp2 forward=-1", r"forward=-1 is no time: write a number of at least 0, or one for each stage as \[1,1,2,1\]"),
        ("parallel=pp2 weight=nan", "weight=nan is no time"),
        ("parallel=pp2 weight=1,2", "weight=1,2 is no time"),
        ("parallel=pp2 input=[1,2,3]", r"input=\[1,2,3\] has 3 times, and pp2_mb4 has 2 stages: give one time for each stage"),
        ("parallel=pp2 transfer=[1,2]", r"transfer=\[1,2\]: every transfer takes the same time: write one number"),
        ("parallel=pp2 forward=0 input=0 weight=0", "forward, input and weight are all 0"),
        ("parallel=pp4_mb2 schedule=zb-h1", "schedule=zb-h1 on pp4 needs at least 4 microbatches"),
        ("parallel=pp2_vp3 schedule=1f1b", "schedule=1f1b runs one stage on each rank"),
        ("parallel=pp2 schedule=best", "schedule=best: no such pipeline schedule: use one of"),
        (
            "parallel=pp2 --output /dev/null/here",
            r"--output /dev/null/here cannot be written \(Not a directory\): name another folder",
        ),
    ],
)
def test_simulate_says_what_cannot_work(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["simulate", *words.split()])
    assert end.value.code == 2
    assert re.match(message, capsys.readouterr().err)


def test_simulate_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys; from lightning_par import cli; cli.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "simulate", "parallel=pp2_mb2", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
