"""`lightning-par doctor`: what it says of machines that are described, and of this one with two ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet

from lightning_par import cli, doctor_command
from lightning_par.errors import ProcessError
from lightning_par.host.doctor import axes, library, preparation
from lightning_par.host.doctor.axes import AxisPace, judge_axes, measure_axes, slowest
from lightning_par.host.doctor.device import Devices, judge_devices, read_ways
from lightning_par.host.doctor.finding import Finding, is_usable
from lightning_par.host.doctor.library import judge_libraries
from lightning_par.host.doctor.preparation import judge_calibrations, judge_operators
from lightning_par.host.doctor.surroundings import Surroundings, judge_surroundings
from lightning_par.layout import Layout
from lightning_par.planner.calibration import Calibration, write_calibration
from lightning_par.planner.link import Link
from lightning_par.runtime.axis import GroupAxis
from tests.ranks import run_ranks

GIB = 2**30
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-55\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tPIX\t0-55\t0\t\tN/A
GPU2\tSYS\tSYS\t X \tSYS\t56-111\t1\t\tN/A
NIC0\tPIX\tPIX\tSYS\t X

Legend:
  X    = Self
"""
GPUS = Devices(("NVIDIA H100 80GB HBM3",) * 8, 80 * GIB, 104, "12.8", "2.27.3", ("570.86", 8), {"NV18": 28})
CPU = Devices(("CPU of a test",), 16 * GIB, 4)
AROUND = Surroundings(8 * GIB, 65_536, None, False, ("lo", "eth0"), "here", "10.0.0.1", {})
VERSIONS = {"torch": "2.13.0+cpu", "pytorch-lightning": "2.6.0", "deepspeed": "0.19.8", "hydra-core": "1.3.2"}
WANTED = {"torch": SpecifierSet(">=2.10,<3"), "deepspeed": SpecifierSet(">=0.19.8,<0.20")}
PACE = AxisPace("tp", 4, True, 20e-6, 256 * 2**20, 0.001)


def said(findings: list[Finding]) -> list[tuple[str, str, str, str]]:
    """Those that are not well."""
    return [(each.status, each.about, each.found, each.remedy) for each in findings if each.status != "ok"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"torch": "2.9.1"}, [("wrong", "torch", "2.9.1, and <3,>=2.10 is needed", "pip install 'torch<3,>=2.10'")]),
        ({"deepspeed": None}, [("wrong", "deepspeed", "not installed", "pip install 'deepspeed<0.20,>=0.19.8'")]),
        ({"transformers": "5.23.0"}, []),
    ],
)
def test_libraries_are_held_against_what_is_needed(changes: dict[str, Any], expected: list[Any]) -> None:
    installed = {name: found for name, found in {**VERSIONS, **changes}.items() if found is not None}
    findings = judge_libraries((3, 11, 7), installed, WANTED)
    assert said(findings) == expected
    assert [each.about for each in findings if each.about in installed] == [name for name in library.NAMED if name in installed]


def test_a_deepspeed_without_the_names_that_are_used_and_another_python_are_wrong() -> None:
    findings = said(judge_libraries((3, 9, 1), VERSIONS, WANTED, "DeepSpeed 0.19.8 is not the one"))
    assert [(each[0], each[1], each[2]) for each in findings] == [
        ("wrong", "python", "3.9.1"),
        ("wrong", "deepspeed", "DeepSpeed 0.19.8 is not the one"),
    ]
    assert findings[0][3] == "make an environment of Python 3.10 to 3.13"


def test_pairs_of_gpus_are_counted_by_their_way() -> None:
    assert read_ways(TOPOLOGY) == {"NV18": 1, "SYS": 2}
    assert read_ways("") == {}


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (CPU, []),
        (GPUS, []),
        (replace(GPUS, ways={"NV18": 1, "SYS": 2}), [("warning", "links", "1 pairs by 18 NVLinks, 2 pairs by two CPUs", "tp at")]),
        (replace(GPUS, names=(*GPUS.names[:7], "NVIDIA A100")), [("warning", "devices", "1 x NVIDIA A100", "GPUs of one kind")]),
        (replace(CPU, driver=("570.86", 8)), [("wrong", "devices", "sees none: it is a build for CPUs", "driver 570.86 can run")]),
        (replace(CPU, driver=("470.1", 8), cuda="12.8"), [("wrong", "devices", "built for CUDA 12.8", "or a newer driver")]),
    ],
)
def test_devices(devices: Devices, expected: list[tuple[str, str, str, str]]) -> None:
    found = said(judge_devices(devices))
    assert len(found) == len(expected)
    for (status, about, words, remedy), (wanted_status, wanted_about, part, remedy_part) in zip(found, expected, strict=True):
        assert (status, about) == (wanted_status, wanted_about) and part in words and remedy_part in remedy


def test_devices_that_are_well_are_described() -> None:
    (cpu,) = judge_devices(CPU)
    assert cpu.found == "CPU of a test, 4 cores, 16.0 GiB: over gloo, to try layouts out"
    gpus, links = judge_devices(GPUS)
    assert gpus.found == "8 x NVIDIA H100 80GB HBM3, 80.0 GiB each; CUDA 12.8, NCCL 2.27.3, driver 570.86"
    assert links.found == "28 pairs by 18 NVLinks"


@pytest.mark.parametrize(
    ("changes", "status", "about", "found", "remedy"),
    [
        ({"shared_bytes": None}, "warning", "shared memory", "there is no /dev/shm", "--shm-size=16g"),
        ({"shared_bytes": GIB // 2}, "warning", "shared memory", "0.50 GiB free", "--shm-size=16g"),
        ({"shared_bytes": GIB // 32}, "wrong", "shared memory", "0.03 GiB free", "--shm-size=16g"),
        ({"open_files": 1024}, "warning", "open files", "1024 for each process", "ulimit -n 65536"),
        ({"locked_bytes": 2**23, "has_infiniband": True}, "warning", "locked memory", "8 MiB", "ulimit -l unlimited"),
        ({"address": None}, "wrong", "network", "the name of this machine, here, has no address", "127.0.1.1 here"),
        ({"environment": {"GLOO_SOCKET_IFNAME": "eth1"}}, "wrong", "network", "GLOO_SOCKET_IFNAME=eth1", "one of lo, eth0"),
        ({"environment": {"NCCL_P2P_DISABLE": "1"}}, "warning", "network", "NCCL_P2P_DISABLE=1", "unset NCCL_P2P_DISABLE"),
    ],
)
def test_surroundings(changes: dict[str, Any], status: str, about: str, found: str, remedy: str) -> None:
    ((seen_status, seen_about, words, seen_remedy),) = said(judge_surroundings(replace(AROUND, **changes)))
    assert (seen_status, seen_about) == (status, about) and found in words and remedy in seen_remedy


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"open_files": -1},
        {"has_infiniband": True},
        {"locked_bytes": 2**23},
        {"address": None, "environment": {"GLOO_SOCKET_IFNAME": "lo"}},
        {"environment": {"NCCL_SOCKET_IFNAME": "=eth0", "NCCL_P2P_DISABLE": "0"}},
        {"environment": {"NCCL_SOCKET_IFNAME": "^docker,virbr"}},
    ],
)
def test_surroundings_that_are_well(changes: dict[str, Any]) -> None:
    assert said(judge_surroundings(replace(AROUND, **changes))) == []


def test_operators() -> None:
    findings = judge_operators({"cpu_adam": None, "async_io": ["ninja (pip install ninja)", "libaio"]})
    assert said(findings) == [
        ("warning", "operator async_io", "cannot be compiled, which zero.offload_optimizer=nvme needs",
         "install ninja (pip install ninja) and libaio")
    ]  # fmt: skip
    assert findings[0].found.startswith("compiled, for zero.offload_optimizer=cpu")
    assert judge_operators({"cpu_adam": []})[0].status == "ok"


def test_what_was_measured_is_named_and_a_damaged_file_is_wrong(tmp_path: Path) -> None:
    assert "until lightning-par calibrate" in judge_calibrations([]).found
    file = tmp_path / "measured.json"
    write_calibration(Calibration("laptop", "CPU", "2.13", "2026-11-26", {}, {"inside": Link(1e9, 1e-5)}), file)
    assert judge_calibrations([file]).found == "of 2026-11-26, torch 2.13: 0 actions of blocks; links: inside"
    file.write_text("{")
    damaged = judge_calibrations([file])
    assert damaged.status == "wrong" and damaged.remedy == f"rm {file}"


def test_the_slowest_rank_and_a_wrong_sum_count() -> None:
    (pace,) = slowest([[PACE], [replace(PACE, small_seconds=1.0, is_right=False)], [replace(PACE, large_seconds=2.0)]])
    assert (pace.small_seconds, pace.large_seconds, pace.is_right) == (1.0, 2.0, False)
    assert said(judge_axes([pace]))[0][:3] == ("wrong", "axis tp", "an all-reduce over 4 ranks gave a wrong sum")


def test_a_ring_sends_each_byte_one_and_a_half_times_over_four_ranks() -> None:
    assert PACE.bytes_per_second == pytest.approx(1.5 * 256 * 2**20 / 0.001)
    assert judge_axes([PACE], expected=450e9)[0].found == "4 ranks: 20 us for 1 KiB, 403 GB/s for 256 MiB"
    ((status, _, found, _),) = said(judge_axes([replace(PACE, large_seconds=0.01)], expected=450e9))
    assert status == "warning" and found.endswith("of 450 GB/s by the datasheet")


def measured(rank: int, world_size: int, words: list[Layout]) -> list[list[AxisPace]]:
    axes._LARGE_BYTES["cpu"] = 2**16
    return [measure_axes(layout, torch.device("cpu")) for layout in words]


def damaged(rank: int, world_size: int) -> AxisPace:
    """What an axis says of whose sums the second rank gets something else."""
    if rank == 1:
        reduce = GroupAxis.all_reduce

        def spoil(axis: GroupAxis, tensor: torch.Tensor, op: str = "sum") -> None:
            reduce(axis, tensor, op)
            tensor[0] += 1

        GroupAxis.all_reduce = spoil
    axes._LARGE_BYTES["cpu"] = 2**16
    return measure_axes(Layout(tp=2, dp=1), torch.device("cpu"))[0]


def test_a_wrong_sum_on_one_rank_is_found() -> None:
    first, second = run_ranks(damaged, 2)
    assert first.is_right and not second.is_right
    assert judge_axes(slowest([[first], [second]]))[0].status == "wrong"


def test_each_axis_is_tried_by_its_ranks() -> None:
    layouts = [Layout(tp=2, dp=2), Layout(pp=4, dp=1), Layout(tp=2, pp=2, vp=2, dp=1)]
    by_rank = run_ranks(measured, 4, layouts)
    found = [slowest(each) for each in zip(*by_rank, strict=True)]
    assert [[(pace.name, pace.size) for pace in each] for each in found] == [
        [("tp", 2), ("dp", 2)],
        [("pp", 4)],
        [("tp", 2), ("pp", 2)],
    ]
    assert all(pace.is_right and 0 < pace.small_seconds < 1 and pace.large_seconds > 0 for each in found for pace in each)


def doctor(*words: str) -> int:
    try:
        cli.main(["doctor", *words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without DeepSpeed's import, a compiler's answers, and what was measured on this machine."""
    monkeypatch.setattr(library, "check_deepspeed", lambda: None)
    monkeypatch.setattr(preparation, "missing_for_operators", lambda device: {"cpu_adam": []})
    monkeypatch.setitem(axes._LARGE_BYTES, "cpu", 2**16)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("_quick")
def test_the_command_starts_the_ranks_and_prints_json(capfd: pytest.CaptureFixture[str]) -> None:
    code = doctor("--json", "parallel=tp2")
    found = json.loads(capfd.readouterr().out)
    about = [each["about"] for each in found["findings"]]
    assert {"python", "torch", "deepspeed", "devices", "operator cpu_adam", "shared memory", "calibration", "axis tp"} <= set(about)
    ((name, size, is_right),) = [(each["name"], each["size"], each["is_right"]) for each in found["axes"]]
    assert (name, size, is_right) == ("tp", 2, True)
    assert code == (0 if all(each["status"] != "wrong" for each in found["findings"]) else 1)


@pytest.mark.usefixtures("_quick")
def test_a_process_that_fails_is_a_finding_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(layout: Layout, on_gpu: bool) -> Any:
        raise ProcessError("rank 1 (pp 0, dp 0, tp 1) failed: Traceback\nRuntimeError: no route")

    monkeypatch.setattr(doctor_command, "_forked", fail)
    assert doctor("parallel=tp2") == 1
    printed = capsys.readouterr().out
    assert "tp2: RuntimeError: no route" in printed and "axes: mend what else is wrong here" in printed
    assert "1 wrong: a training will fail here" in printed
    assert not is_usable([Finding("a", "b", "wrong")]) and is_usable([Finding("a", "b", "warning")])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("parallel=tp0", "tensor-parallel size must be"),
        ("model=gpt", "model=gpt: doctor takes one word, the layout whose axes are tried"),
        ("parallel=auto", "parallel=auto: doctor tries the axes of one layout"),
    ],
)
def test_what_cannot_work(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(word) == 2
    assert message in capsys.readouterr().err


def test_a_layout_for_other_gpus_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning_par.host.doctor.device.find_devices", lambda: GPUS)
    assert doctor("parallel=tp3") == 2
    assert "the trainer has 8" in capsys.readouterr().err
