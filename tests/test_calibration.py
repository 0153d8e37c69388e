"""What was measured of a cluster: found again by what is computed, kept in a file, and what `lightning-par plan` computes with."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch import nn

from lightning_par import calibrate_command, deferred_init
from lightning_par.cli import main
from lightning_par.config.cluster import load_cluster, read_question
from lightning_par.demo.gpt import GPT
from lightning_par.demo.language_model import LanguageModel
from lightning_par.errors import ConfigurationError
from lightning_par.host.batch import repeat_samples
from lightning_par.host.calibrate import check_device
from lightning_par.host.here import cluster_here, device_name
from lightning_par.host.links import links_of_nodes
from lightning_par.host.loss import loss_of
from lightning_par.layout import Layout
from lightning_par.memory.matter import Solids
from lightning_par.memory.optimizer import GroupForm, OptimizerForm
from lightning_par.pipeline.action import Action
from lightning_par.planner import Anatomy, Link, search, timing
from lightning_par.planner.calibration import Calibration, Series, cached_path, read_calibration, write_calibration
from lightning_par.planner.calibration_report import print_calibration
from lightning_par.planner.candidate import Candidate
from lightning_par.planner.clock import Clock
from lightning_par.planner.cluster import shipped_cluster
from lightning_par.planner.estimate import Estimator
from lightning_par.planner.report import where_from
from lightning_par.planner.timing import Bench, Timings
from lightning_par.planner.traffic import Ring, fit_link
from lightning_par.runtime.nested import map_tensors
from lightning_par.runtime.precision import PRECISIONS
from tests import models
from tests.chains import CHAINS
from tests.planning import tokens
from tests.ranks import run_ranks
from tests.test_planner import GIB, SMALL, cluster, elsewhere, samples, take_apart

__all__ = ["elsewhere"]  # a fixture
CPU = torch.device("cpu")


def measured(series: dict[str, Series] | None = None, **links: Link) -> Calibration:
    return Calibration("test", "CPU of a test", "2.0", "2026-11-26", series or {}, links)


def known(anatomy: Anatomy, factor: float, rows: tuple[int, ...] = (1, 2, 4)) -> Calibration:
    """Every action of the module on one device, at some multiple of its seconds by the datasheet."""
    device, series = cluster().device, {}
    for block in anatomy.body(1, False, "none").blocks:
        for kind, line in block.work.items():
            series[line.digest] = Series(f"{kind} of a block", {each: factor * line.seconds(each, device) for each in rows})
    return measured(series)


@pytest.fixture(scope="module")
def demo() -> Anatomy:
    return take_apart(LanguageModel(GPT(vocab_size=256, width=64, depth=3, heads=4)))


# ---------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("rows", "seconds"), [(1, 2.0), (2, 3.0), (3, 4.0), (4, 5.0), (6, 7.0), (64, 65.0)])
def test_seconds_lie_on_the_line_through_the_nearest_two(rows: int, seconds: float) -> None:
    assert Series("F", {1: 2.0, 4: 5.0}).at(rows) == seconds


def test_a_series_goes_on_with_its_last_slope_which_never_falls() -> None:
    series = Series("F", {1: 1.0, 2: 1.5, 8: 7.5})
    assert (series.at(2), series.at(5), series.at(16)) == (1.5, 4.5, 15.5)
    assert Series("F", {1: 1.0, 2: 0.9}).at(64) == 0.9  # noise
    assert Series("F", {2: 1.0}).at(6) == 3.0


def test_actions_are_known_by_what_they_compute(demo: Anatomy) -> None:
    """In another run, under other names; not where the model, its batch or what it computes in has changed."""
    calibration = known(demo, 1.0)

    def is_known(module: pl.LightningModule, make: Callable[[int], Any] = samples) -> bool:
        block = take_apart(module, make).body(1, False, "none").blocks[1]
        return all(calibration.seconds(line.digest, 1) is not None for line in block.work.values())

    class Outer(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = LanguageModel(GPT(vocab_size=256, width=64, depth=4, heads=4))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.inner.network(batch["tokens"]).square().mean()

    assert is_known(Outer())
    assert not is_known(LanguageModel(GPT(vocab_size=256, width=72, depth=3, heads=4)))
    assert not is_known(LanguageModel(GPT(vocab_size=256, width=64, depth=3, heads=2)))
    shorter = {"tokens": torch.zeros(4, 16, dtype=torch.long), "targets": torch.zeros(4, 16, dtype=torch.long)}
    assert not is_known(LanguageModel(GPT(vocab_size=256, width=64, depth=3, heads=4)), lambda rows: repeat_samples(shorter, rows))
    split = demo.body(2, True, "none").blocks[1].work["F"]
    assert calibration.seconds(split.digest, 1) is None


def test_what_is_measured_is_what_a_step_takes(demo: Anatomy) -> None:
    candidate = Candidate(Layout(dp=1, microbatches=4), 3, "1f1b")
    by_datasheet, once, twice = (
        Estimator(demo, where).estimate(candidate).parts["compute"]
        for where in (cluster(), cluster().calibrated(known(demo, 1.0)), cluster().calibrated(known(demo, 2.0)))
    )
    assert once == pytest.approx(by_datasheet, rel=0.02)  # between two and four rows the datasheet is not quite a line
    assert twice == pytest.approx(2 * once)


def test_what_is_not_measured_takes_as_much_longer_as_what_is(demo: Anatomy) -> None:
    lines = [line for block in demo.body(1, False, "none").blocks for line in block.work.values()]
    other = demo.body(2, True, "none").blocks[1].work["F"]
    clock = Clock(cluster().calibrated(known(demo, 3.0)), lambda: lines)
    assert clock.pace(other, 2) == pytest.approx(3) and clock.pace(lines[0], 2) == pytest.approx(3)
    assert clock.coverage == (1, 2)
    assert Clock(cluster(), lambda: lines).pace(other, 2) == 1
    assert Clock(cluster().calibrated(measured()), lambda: lines).pace(other, 2) == 1


def test_a_slower_device_hides_more_of_what_travels(demo: Anatomy) -> None:
    line, device = demo.body(2, False, "none").blocks[1].work["B"], cluster().device
    waits = [line.waits(2, device, lambda kind, size: 1e-4, pace) for pace in (1.0, 2.0, 1e6)]
    assert waits[0] > waits[1] > 0 and waits[2] < waits[1]


def test_a_search_says_what_of_it_is_measured(demo: Anatomy) -> None:
    outlook = search(demo, cluster().calibrated(replace(known(demo, 1.0), links={"inside": Link(1e9, 1e-5)})), 8)
    few, count = outlook.measured
    assert 0 < few < count
    assert where_from(outlook) == {
        "compute": f"measured on CPU of a test on 2026-11-26 for {few} of {count} actions of blocks, the rest by the datasheet, "
        "scaled as those are to theirs",
        "inside a node": "measured",
        "between nodes": "datasheet",
    }
    other = search(demo, cluster().calibrated(measured({"0": Series("F", {1: 1.0})})), 8)
    assert where_from(other)["compute"] == "datasheet (of this model nothing is measured on CPU of a test)"
    assert set(where_from(search(demo, cluster(), 8)).values()) == {"datasheet"}


# ---------------------------------------------------------------------- links


def test_measured_links_are_in_the_place_of_the_datasheet() -> None:
    link = Link(5.0, 6.0)
    found = cluster().calibrated(measured(between=link))
    assert found.between == link and found.inside == cluster().inside


@pytest.mark.parametrize("size", [2, 8])
def test_the_link_of_a_ring_is_found_again(size: int) -> None:
    link = Link(3e9, 2e-5)
    ring = Ring(size, link, is_inside=True)
    times = [(float(4**power), ring.seconds("all_reduce", 4**power)) for power in range(5, 14)]
    found = fit_link(size, times)
    assert found.bytes_per_second == pytest.approx(link.bytes_per_second)
    assert found.latency_seconds == pytest.approx(link.latency_seconds)


def test_noise_makes_no_link_that_takes_less_than_no_time() -> None:
    found = fit_link(2, [(1024.0, 1.0), (1e8, 0.1)])
    assert found.latency_seconds > 0 and 0 < found.bytes_per_second < float("inf")


def _links(rank: int, size: int, on_node: int) -> dict[str, Link]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % on_node), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(on_node))
    return links_of_nodes(on_gpu=False)


def test_ranks_on_two_nodes_measure_both_links() -> None:
    found = run_ranks(_links, 4, 2)
    assert [set(links) for links in found] == [{"inside", "between"}, {"inside"}, {"between"}, set()]
    assert all(1e6 < link.bytes_per_second < 1e12 and 0 < link.latency_seconds < 1 for link in found[0].values())


# ---------------------------------------------------------------------- files


def test_a_calibration_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    given = measured({"ab": Series("F of a block", {1: 0.1, 2: 0.3})}, inside=Link(1e9, 1e-5))
    write_calibration(given, path)
    assert read_calibration(path) == given
    assert [each.name for each in path.parent.iterdir()] == ["file.json"]


def test_a_later_run_adds_to_an_earlier_one() -> None:
    first = measured({"a": Series("F", {1: 1.0, 2: 2.0}), "b": Series("W", {1: 5.0})}, inside=Link(1.0, 1.0))
    later = replace(measured({"a": Series("F", {2: 3.0, 4: 4.0})}, between=Link(2.0, 2.0)), date="2026-12-01")
    both = first.joined(later)
    assert both.series == {"a": Series("F", {1: 1.0, 2: 3.0, 4: 4.0}), "b": Series("W", {1: 5.0})}
    assert both.links == {**first.links, **later.links} and both.date == "2026-12-01"
    assert first.joined(replace(later, torch="3.0")).series == later.series


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data | {"version": 2}, r"\(ValueError: it is of another version of lightning_par\)"),
        (lambda data: data | {"series": {"a": {"of": "F", "seconds": {}}}}, r"\(ValueError: F takes no time\)"),
        (
            lambda data: data | {"links": {"there": {"bytes_per_second": 1, "latency_seconds": 1}}},
            r"\(ValueError: there is no link\)",
        ),
        (lambda data: {key: value for key, value in data.items() if key != "device"}, r"\(TypeError: .*device"),
        (lambda data: [], r"\(AttributeError|\(TypeError"),
    ],
)
def test_a_damaged_file_is_named(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(change(measured().to_json())))
    with pytest.raises(ConfigurationError, match=rf"calibration={path} is damaged {message}.*: remove it, and run lightning-par"):
        read_calibration(path)


def test_half_a_file_and_none_are_named(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with pytest.raises(ConfigurationError, match=rf"calibration={path} cannot be read \(No such file or directory\): name a file"):
        read_calibration(path)
    path.write_text(json.dumps(measured().to_json())[:40])
    with pytest.raises(ConfigurationError, match=rf"calibration={path} is damaged \(JSONDecodeError"):
        read_calibration(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lightning_par" / "calibration"


def test_a_cluster_takes_what_is_cached_of_its_name(cache: Path) -> None:
    link = Link(5.0, 6.0)
    write_calibration(measured({"a": Series("F", {1: 1.0})}, inside=link), cached_path("laptop", "CPU of a test"))

    def asked(*words: str) -> Any:
        return load_cluster(read_question([*words]), None)

    assert asked("cluster=laptop").inside == link and asked("cluster=laptop").calibration.series
    assert asked("cluster=your_own").calibration is None and asked("cluster=laptop", "calibration=none").calibration is None
    named = asked("cluster=your_own", f"calibration={cached_path('laptop', 'CPU of a test')}")
    assert named.inside == link
    # what is typed wins over what is measured
    assert asked("cluster=laptop", "cluster.inside.gb_per_s=2").inside.bytes_per_second == 2e9
    assert not asked("cluster=laptop", "cluster.device.attained=0.5").calibration.series
    assert asked("cluster=laptop", "cluster.device.memory_gib=2").calibration.series

    write_calibration(measured(), cached_path("laptop", "CPU of another"))
    with pytest.raises(
        ConfigurationError, match=r"cluster=laptop was calibrated with 2 devices: say calibration=/.*test.json or calibration=/"
    ):
        asked("cluster=laptop")


def test_devices_at_hand_take_what_is_cached_of_them(cache: Path) -> None:
    assert cluster_here(CPU, 1, 2).calibration is None
    write_calibration(measured(inside=Link(5.0, 6.0)), cached_path("any", device_name(CPU)))
    write_calibration(measured(inside=Link(7.0, 8.0)), cached_path("any", "another device"))
    here = cluster_here(CPU, 1, 2)
    assert here.inside == Link(5.0, 6.0) and here.source.startswith("measured on 2026-11-26 as far as they were, else of this CPU")


# ---------------------------------------------------------------------- timing


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is timed, and there is always time for it."""
    monkeypatch.setattr(timing, "_ROWS", [1, 2, 4])
    monkeypatch.setattr(timing, "_LEAST", 1)
    monkeypatch.setattr(timing, "_MOST", 1)


def timed(
    anatomy: Anatomy, samples: Callable[[int], Any], memory: int = GIB, seconds: float = 1000.0, per_node: int = 1
) -> Timings:
    return Bench(anatomy, CPU, memory, samples, lambda words: None).time(per_node, seconds)


def of_body(anatomy: Anatomy, tp: int, sp: bool, word: Any = "none") -> set[str]:
    return {block.work[kind].digest for block in anatomy.body(tp, sp, word).blocks for kind in ("F", "I", "W")}


@pytest.mark.slow
@pytest.mark.usefixtures("briefly")
def test_every_action_of_every_split_is_timed_and_the_module_stays(demo: Anatomy) -> None:
    before = {name: tensor.clone() for name, tensor in demo._module.state_dict().items()}
    state = torch.get_rng_state()
    found = timed(demo, samples, per_node=2)
    assert of_body(demo, 1, False) | of_body(demo, 2, True) | of_body(demo, 2, False, "full") <= set(found.series)
    assert all(seconds > 0 for series in found.series.values() for seconds in series.seconds.values())
    assert all(tuple(series.seconds) == (1, 2, 4) for series in found.series.values()) and not found.left_out
    assert {"F of network.blocks.1, tp1", "W of network.blocks.2, tp2_sp"} <= {series.of for series in found.series.values()}
    assert all(torch.equal(before[name], tensor) for name, tensor in demo._module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in demo._module.parameters())


@pytest.mark.parametrize("name", ["tied", "a bias from the first block", "blocks of two classes and three shapes"])
@pytest.mark.usefixtures("briefly")
def test_modules_of_many_kinds_are_timed(name: str) -> None:
    if name == "tied":
        module, make = models.gpt2(), lambda rows: models.make_batch(0, rows)
    else:
        module, make = CHAINS[name](), tokens
    anatomy = take_apart(module, make)
    assert anatomy.pipeline_error is None
    assert of_body(anatomy, 1, False) <= set(timed(anatomy, make).series)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.usefixtures("briefly")
def test_blocks_are_timed_in_the_precision_of_the_run(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 computes other operations than float32, which the digest knows."""
    monkeypatch.setattr(timing, "_SHARES", {"none": 1})
    module = models.gpt()
    form = OptimizerForm((GroupForm(frozenset(name for name, _ in module.named_parameters()), 8, 4),))
    pieces = models.make_batch(0, 2), models.make_batch(0, 3)
    anatomy = Anatomy(module, pieces, loss_of, form, PRECISIONS[precision])
    found = timed(anatomy, lambda rows: models.make_batch(0, rows))
    assert of_body(anatomy, 1, False) == set(found.series)
    assert not set(found.series) & of_body(Anatomy(module, pieces, loss_of, form), 1, False)


@pytest.mark.usefixtures("briefly")
def test_a_lack_of_memory_or_time_is_said(demo: Anatomy) -> None:
    block, stage = demo.body(1, False, "none").blocks[1], demo.body(1, False, "none").plan.stages[1]
    enough_for_2 = 3 * stage.parameter_bytes + max(block.stored(kind, 2).peak for kind in block.work)
    found = timed(demo, samples, memory=enough_for_2)
    assert "no memory for 4 rows of network.blocks.1, tp1" in found.left_out
    series = found.series[block.work["F"].digest]
    assert tuple(series.seconds) == (1, 2)
    hasty = timed(demo, samples, seconds=1e-9, per_node=2)
    assert hasty.left_out[:2] == ["no time for tp1", "no time for tp2_sp"] and not hasty.series


@pytest.mark.usefixtures("briefly")
def test_an_allocator_that_is_at_its_end_ends_a_series(demo: Anatomy, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Solids.given

    def fail(self: Solids, tensor: torch.Tensor) -> torch.Tensor:
        if len(tensor) == 4:
            raise torch.OutOfMemoryError("of a GPU")
        return given(self, tensor)

    monkeypatch.setattr(Solids, "given", fail)
    found = timed(demo, samples)
    assert "no memory for 4 rows of network.blocks.1, tp1" in found.left_out
    assert {tuple(series.seconds) for series in found.series.values()} == {(1, 2)}


def test_the_clock_starts_when_a_block_has_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=iter([0.0, 5.0, 6.0, 10.0, 13.0]).__next__))
    watch = timing._Stopwatch(CPU)
    watch.begin(Action("F", 1, 0))
    watch.wait()
    watch.arrive()
    watch.end()
    watch.begin(Action("W", 1, 0))
    watch.end()
    assert watch.read() == {"F": 1.0, "W": 3.0}


def test_the_tensors_of_a_timed_rank_are_real_and_random() -> None:
    """Buffers are the user's; weights in the precision of the run, also those of a module that has no memory for them."""
    matter = Solids(CPU, PRECISIONS["bf16-true"])
    with deferred_init():
        module = nn.BatchNorm1d(300)
        module.register_parameter("whole", nn.Parameter(torch.ones(4, dtype=torch.long), requires_grad=False))
    state = {name: matter.state(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    assert state["running_var"].tolist() == [1.0] * 300 and state["running_var"].dtype == torch.bfloat16
    twin = nn.BatchNorm1d(300)
    twin.weight, twin.whole = (
        nn.Parameter(state[name], requires_grad=state[name].is_floating_point()) for name in ("weight", "whole")
    )
    matter.settle(twin)
    assert twin.weight.dtype == torch.bfloat16 and 0.01 < twin.weight.float().std() < 0.03
    assert state["weight"].requires_grad and twin.whole.tolist() == [0] * 4
    hidden, places = matter.received(((50, 3), torch.bfloat16)), matter.received(((2, 3), torch.long))
    assert hidden.dtype == torch.bfloat16 and 0.5 < hidden.float().std() < 2
    assert places.dtype == torch.long and not places.any()


def test_batches_are_made_as_long_as_they_must_be() -> None:
    batch = {"x": torch.arange(3), "names": ["a", "b", "c"], "whole": torch.ones(2), "t": 0.5}
    found = repeat_samples(batch, 5)
    assert found["x"].tolist() == [0, 1, 2, 0, 1] and found["names"] == ["a", "b", "c", "a", "b"]
    assert found["whole"] is batch["whole"] and found["t"] == 0.5
    assert map_tensors(len, repeat_samples(batch, 2))["x"] == 2


# ---------------------------------------------------------------------- the command


@pytest.mark.usefixtures("elsewhere", "briefly")
def test_plan_computes_with_what_calibrate_has_measured(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cluster=laptop", "cluster.devices_per_node=2", *SMALL]
    main(["calibrate", "--seconds", "1000", *words])
    shown = capsys.readouterr().out.splitlines()
    (path,) = cache.iterdir()
    found = read_calibration(path)
    assert shown[0].startswith(f"measured on {device_name(CPU)}, torch {torch.__version__}") and shown[-1] == f"written: {path}"
    assert any(line.startswith("inside a node: ") and "GB/s" in line for line in shown) and set(found.links) == {"inside"}

    main(["plan", *words])
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("compute: "))
    assert told.startswith(f"compute: measured on {found.device} on {found.date} for ")
    assert told.endswith(" actions of blocks; inside a node: measured; between nodes: datasheet")  # all of them


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cluster=laptop", "--seconds", "0"], "--seconds 0: it must be a positive number"),
        (["model=gpt"], "calibrate needs the machines: add cluster=NAME; there are a100_8x"),
        (["cluster=laptop", "parallel=tp2"], "parallel=tp2: calibrate times all layouts of a node: leave the word out"),
        (["cluster=h100_8x"], "cluster=h100_8x has devices with H100 in their name, and this process has CPU"),
    ],
)
@pytest.mark.usefixtures("elsewhere", "cache")
def test_a_calibration_that_cannot_be_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["calibrate", *words])
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.usefixtures("elsewhere")
def test_a_file_of_another_device_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.json"
    write_calibration(measured(), path)
    monkeypatch.setattr(calibrate_command, "_machine", lambda cluster: (CPU, "CPU of mine", {}))
    with pytest.raises(SystemExit) as end:
        main(["calibrate", "cluster=laptop", "--output", str(path)])
    message = f"--output {path} has what was measured on CPU of a test, and this is CPU of mine: name another file"
    assert end.value.code == 2 and message in capsys.readouterr().err and read_calibration(path) == measured()


@pytest.mark.usefixtures("elsewhere")
def test_whoever_stops_it_finds_no_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_command, "_machine", lambda cluster: (CPU, "CPU of mine", {}))
    monkeypatch.setattr(calibrate_command, "_time", stop)
    with pytest.raises(SystemExit) as end:
        main(["calibrate", "cluster=laptop"])
    assert end.value.code == 130 and not cache.exists()


def test_a_device_with_the_clusters_name_is_its_own() -> None:
    check_device(shipped_cluster("h100_8x", 1), "NVIDIA H100 80GB HBM3")
    check_device(shipped_cluster("your_own", 1), "anything")
    with pytest.raises(
        ConfigurationError, match=r"cluster=a100_8x has devices with A100 in their name, .*your_own\.yaml can be one"
    ):
        check_device(shipped_cluster("a100_8x", 1), "NVIDIA H100 80GB HBM3")


def test_a_calibration_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    series = {"a": Series("F of a.0, tp1", {1: 1e-3, 8: 2e-3}), "b": Series("W of a.0, tp1", {1: 5e-4, 8: 2.0})}
    print_calibration(measured(series, between=Link(2e9, 1e-5)), ["no time for tp2"], Console(width=120))
    shown = capsys.readouterr().out
    assert re.search(r"│ a\.0, tp1 │ 1 to 8 │ 1 ms to 2 ms │ +│ +0\.5 ms to 2 s │", shown)
    assert "inside a node: not measured\nbetween nodes: 2 GB/s, 10 us a message\n- no time for tp2\n" in shown
