"""What happened in a pipeline, and what would: the clock of a rank, the pictures, `lightning-par simulate`, the callback.

The page itself is tested in a browser by `tests/test_timeline_page.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest
import torch
import torch.distributed as dist

from lightning_par import ConfigurationError, Layout, PipelineTimeline, cli, parse_layout
from lightning_par.picture import Lane, Panel, Picture, bubbles_of, chrome_trace, format_time, html_page, mean_costs, write_picture
from lightning_par.picture.colour import COLOURS, ink, tint
from lightning_par.picture.recording import Recording, picture_of, split_rounds
from lightning_par.picture.simulation import read_simulation
from lightning_par.pipeline.action import Action, Row
from lightning_par.pipeline.clock import Clock, CudaClock, WallClock
from lightning_par.pipeline.schedules import SCHEDULES, build_schedule
from lightning_par.pipeline.simulate import Costs, Span, simulate
from tests.planning import Block, Chain, quiet_trainer, tokens
from tests.ranks import run_ranks

F0, F1, B0 = Action("F", 1, 0), Action("F", 1, 1), Action("B", 1, 0)


class FakeEvent:
    """An event of a device whose time goes on by 1 ms with each record."""

    clock = count(1)

    def record(self) -> None:
        self.at = next(self.clock)

    def elapsed_time(self, other: FakeEvent) -> float:
        return float(other.at - self.at)


def played(clock: Clock[Any]) -> tuple[Span, ...]:
    """A forward that waits, one that does not, a backward that waits twice; each call is one unit of time later."""
    clock.zero()  # 0
    clock.begin(F0)  # 1
    clock.wait()  # 2
    clock.arrive()  # 3
    clock.end()  # 4
    clock.begin(F1)  # 5
    clock.end()  # 6
    clock.begin(B0)  # 7
    clock.wait()  # 8
    clock.arrive()  # 9
    clock.wait()  # 10
    clock.arrive()  # 11
    clock.end()  # 12
    return clock.spans()


PLAYED = ((F0, 2, 4, 1), (F1, 5, 6, 0), (B0, 9, 12, 2))


def assert_played(spans: tuple[Span, ...], unit: float) -> None:
    assert [span.action for span in spans] == [action for action, *_ in PLAYED]
    for span, (_, start, end, wait) in zip(spans, PLAYED, strict=True):
        assert (span.start_seconds, span.end_seconds, span.wait_seconds) == pytest.approx((start * unit, end * unit, wait * unit))


def test_the_host_clock_notes_work_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = count()
    monkeypatch.setattr(WallClock, "_now", staticmethod(lambda: next(ticks) * 1000))
    clock = WallClock()
    monkeypatch.setattr(WallClock, "_settled", staticmethod(lambda: next(ticks) * 1000))
    assert_played(played(clock), 1e-6)
    assert_played(played(clock), 1e-6)  # zero forgets what was before


def test_the_device_clock_does_not_wait_during_the_step() -> None:
    synchronized = 0

    def synchronize() -> None:
        nonlocal synchronized
        synchronized += 1

    clock = CudaClock(FakeEvent, synchronize)
    before = synchronized
    spans = played(clock)
    assert_played(spans, 1e-3)
    assert synchronized == before + 2, "once in zero, once in spans"


def test_both_clocks_name_the_hosts_time_of_their_zero() -> None:
    for clock in (WallClock(), CudaClock(FakeEvent, lambda: None)):
        before = time.perf_counter_ns()
        clock.zero()
        assert before <= clock.zero_ns <= time.perf_counter_ns()


def test_a_call_of_the_host_clock_takes_less_than_a_microsecond() -> None:
    clock, fastest = WallClock(), float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            clock.begin(F0)
            clock.wait()
            clock.arrive()
            clock.end()
        fastest = min(fastest, (time.perf_counter() - start) / 400)
    assert fastest < 1e-6


# ---------------------------------------------------------------------- what is shown


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


def test_the_png_has_the_colours_of_what_ran_by_their_time(tmp_path: Path) -> None:
    picture = run_picture(Layout(pp=4, dp=1, microbatches=8), "zb-h1")
    _, path, _ = write_picture(picture, tmp_path / "new" / "folder")
    image = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    assert image.shape[1] == 2080 and 400 < image.shape[0] < 600
    lanes = image[image.shape[0] // 3 :]  # below the legend
    areas = {
        kind: int((lanes == [int(colour[at : at + 2], 16) for at in (1, 3, 5)]).all(axis=-1).sum())
        for kind, colour in COLOURS.items()
    }
    assert areas["B"] == 0
    assert areas["F"] == pytest.approx(areas["I"], rel=0.1) and areas["I"] == pytest.approx(areas["W"], rel=0.1)
    assert areas["F"] > 0.05 * lanes.shape[0] * lanes.shape[1]


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


# ---------------------------------------------------------------------- the callback


@pytest.mark.parametrize("root", ["pytorch_lightning", "lightning.pytorch"])
def test_the_callback_is_of_the_namespace_in_use(root: str) -> None:
    module = pytest.importorskip(root)
    made: dict[str, Any] = {"library": module, "PipelineTimeline": PipelineTimeline}
    exec("callback = PipelineTimeline(steps=[3])", made)
    assert isinstance(made["callback"], module.Callback) and isinstance(made["callback"], PipelineTimeline)
    assert made["callback"].steps == {3}


@pytest.mark.parametrize("steps", [[], [-1], [1.5]])
def test_steps_that_name_none_are_refused(steps: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"PipelineTimeline\(steps=.*counted from 0: give at least one, such as \[5, 6\]"):
        PipelineTimeline(steps=steps)


def test_a_layout_without_a_pipeline_is_refused_before_anything_starts() -> None:
    trainer = quiet_trainer("tp2", callbacks=[PipelineTimeline()])
    with pytest.raises(ConfigurationError, match=r"parallel=tp2.* has none \(pp 1\): add pp2 or more, or remove the callback"):
        trainer.fit(Chain(Block), [tokens(4)])


def test_another_strategy_is_refused() -> None:
    trainer = SimpleNamespace(strategy=object(), global_step=0)
    with pytest.raises(ConfigurationError, match="the Trainer's strategy is object: use HybridParallelStrategy with pp2 or more"):
        PipelineTimeline().on_train_start(trainer, torch.nn.Linear(1, 1))


def _steps_of_two_ranks(rank: int, world_size: int, folder: str) -> list[str]:
    """The hooks around four batches of 1F1B, with real waiting between two processes; what rank 0 wrote."""
    row: Row = build_schedule("1f1b", 2, 1, 3)[rank]
    engine = SimpleNamespace(clock=None, schedule="1f1b")
    strategy = SimpleNamespace(
        engine=engine,
        root_device=torch.device("cpu"),
        barrier=lambda name: dist.barrier(),
        plan=SimpleNamespace(module="Model", layout=Layout(pp=2, dp=1, microbatches=3)),
        mesh=SimpleNamespace(world=SimpleNamespace(group=dist.group.WORLD)),
    )
    trainer = SimpleNamespace(
        strategy=strategy, global_step=0, accumulate_grad_batches=1, log_dir=None, default_root_dir=folder, loggers=[]
    )
    callback = PipelineTimeline(steps=[1, 2])
    callback._is_done = False
    for step in range(4):
        callback.on_train_batch_start(trainer, None, None, step)
        assert (engine.clock is not None) == (step in (1, 2))
        if engine.clock is not None:
            _run(row, engine.clock, rank)
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, None, None, None, step)
        assert engine.clock is None
    callback.on_train_end(trainer, None)
    dist.barrier()
    return sorted(path.name for path in Path(folder, "timeline").iterdir())


def _run(row: Row, clock: Clock[Any], rank: int) -> None:
    message, sent = torch.zeros(1), []
    for action in row:
        clock.begin(action)
        if (action.kind == "F") == (rank == 1):
            clock.wait()
            dist.recv(message, 1 - rank)
            clock.arrive()
        time.sleep(0.01 if action.kind == "F" else 0.02)
        clock.end()
        if (action.kind == "F") == (rank == 0):
            sent.append(dist.isend(message.clone(), 1 - rank))
    for work in sent:
        assert work is not None
        work.wait()


def test_the_callback_draws_what_all_ranks_did_on_one_axis_of_time(tmp_path: Path) -> None:
    for names in run_ranks(_steps_of_two_ranks, 2, str(tmp_path)):
        assert names == ["timeline.html", "timeline.png", "trace.json"]
    data = page_data((tmp_path / "timeline" / "timeline.html").read_text())
    assert data["title"] == "Model: 1f1b, pp2_mb3"
    assert [panel["step"] for panel in data["panels"]] == ["step 1", "step 2"]
    kinds = [entry["kind"] for entry in data["kinds"]]
    for panel in data["panels"]:
        spans = {f"{stage}{kinds[kind]}{number}": times for lane in panel["lanes"] for kind, stage, number, *times in lane["spans"]}
        assert len(spans) == 12
        for number in range(3):
            assert spans[f"1F{number}"][0] >= spans[f"0F{number}"][1] - 2e-4, "nothing arrives before it was sent"
            assert spans[f"0B{number}"][0] >= spans[f"1B{number}"][1] - 2e-4
            assert spans[f"0F{number}"][2] == 0
        assert spans["1F0"][2] == pytest.approx(spans["0F0"][1] - spans["0F0"][0], abs=8e-3), "it waits for the first forward"
        measured, schedule, equal = (bubble["values"] for bubble in panel["bubbles"])
        assert equal == pytest.approx([1 / 4] * 2, abs=1e-6)  # (p - 1) / (m + p - 1)
        assert schedule == pytest.approx([1 / 4] * 2, abs=0.08)
        assert measured == pytest.approx(schedule, abs=0.1)


def test_a_training_that_ends_before_the_steps_says_so() -> None:
    callback = PipelineTimeline(steps=[5, 6])
    callback._first = 0
    with pytest.warns(UserWarning, match=r"began at step 0 and is at step 3, and none of steps=\[5, 6\] is between: choose steps"):
        callback.on_train_end(SimpleNamespace(global_step=3), None)


def _training(rank: int, world_size: int, folder: str) -> None:
    trainer = quiet_trainer("pp2_mb4", callbacks=[PipelineTimeline(steps=[1], folder=folder)], max_steps=3)
    trainer.fit(Chain(Block), [tokens(8)] * 3)


def test_a_training_draws_its_timeline(tmp_path: Path) -> None:
    run_ranks(_training, 2, str(tmp_path))
    panel = page_data((tmp_path / "timeline.html").read_text())["panels"][0]
    table = build_schedule("1f1b", 2, 1, 4)
    assert [[span[1:3] for span in lane["spans"]] for lane in panel["lanes"]] == [
        [[a.stage, a.microbatch] for a in row] for row in table
    ]
    assert panel["lanes"][1]["spans"][0][5] > 0, "the last stage waits for its first activation"
    assert parse_layout("pp2_mb4").pp == len(panel["lanes"])
