"""The command `lightning-par doctor`: is this machine ready for a training, and what is to be mended?

    lightning-par doctor                               # versions, devices, links, operators, memory, network
    lightning-par doctor parallel=tp2_dp2              # and a collective on each axis of that layout
    torchrun --nproc-per-node 8 ... -m lightning_par.cli doctor parallel=tp8_pp2    # over several nodes

Exit codes: 0 all is usable, 1 something is wrong, 2 what was typed cannot work.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_par.errors import ConfigurationError, ProcessError
from lightning_par.layout import Layout, parse_layout

if TYPE_CHECKING:
    from lightning_par.host.doctor.axes import AxisPace
    from lightning_par.host.doctor.device import Devices
    from lightning_par.host.doctor.finding import Finding

_ABOUT = """\
Look at what a training stands on: versions, devices and their links, DeepSpeed's operators, shared memory, limits, the network,
what was measured for the planner. With a layout, start its ranks on this machine and time an all-reduce on each axis. Nothing is
trained and nothing is written.
"""
_EPILOG = """\
Exit code 0: usable. 1: something is wrong, and what to do about it is said. 2: what was typed cannot work.

examples:
  lightning-par doctor parallel=tp2_dp2
  lightning-par doctor --json parallel=tp8
"""
_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "wrong": "[red]wrong[/]"}


def add_doctor_command(commands: Any) -> None:
    """Add `doctor` to the subcommands of a parser. Imports nothing that is slow."""
    parser = commands.add_parser(
        "doctor",
        help="look at versions, devices, links and limits, time a collective on each axis, and say what to mend",
        description=_ABOUT,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("words", nargs="*", metavar="parallel=WORD", help="a layout whose axes are tried (default: none)")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> None:
    try:
        asked = _read(options.words)
        from lightning_par.host.doctor.device import find_devices

        devices = find_devices()
        layout = None if asked is None else _resolve(asked, devices)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    try:
        findings, paces = _examine(devices, layout)
    except KeyboardInterrupt:  # its processes are gone
        raise SystemExit(128 + signal.SIGINT) from None
    if int(os.environ.get("RANK", 0)):  # the first rank says it
        return
    from lightning_par.host.doctor.finding import is_usable

    if options.json:
        print(json.dumps({"findings": [asdict(each) for each in findings], "axes": [asdict(each) for each in paces]}))
    else:
        _print(findings)
    if not is_usable(findings):
        raise SystemExit(1)


def _read(words: Sequence[str]) -> Layout | None:
    """The layout that was typed, if any.

    Raises:
        ConfigurationError: it is none, or there are other words.
    """
    layout = None
    for word in words:
        key, _, value = word.partition("=")
        if key != "parallel":
            raise ConfigurationError(f"{word}: doctor takes one word, the layout whose axes are tried: parallel=tp2_dp2")
        layout = parse_layout(value)
    if layout is not None and layout.auto:
        raise ConfigurationError("parallel=auto: doctor tries the axes of one layout: name it, such as parallel=tp2_dp2")
    return layout


def _resolve(layout: Layout, devices: Devices) -> Layout:
    """The layout for what torchrun has started, for the GPUs of this machine, or for as many processes as it needs.

    Raises:
        ConfigurationError: it does not fit them.
    """
    from lightning_par.config.devices import needed_devices

    count = len(devices.names) if devices.are_gpus else needed_devices(layout)
    return layout.resolve(int(os.environ.get("WORLD_SIZE", count)))


def _examine(devices: Devices, layout: Layout | None) -> tuple[list[Finding], list[AxisPace]]:
    import torch

    from lightning_par.host.doctor.device import judge_devices
    from lightning_par.host.doctor.library import library_findings
    from lightning_par.host.doctor.preparation import calibration_finding, operator_findings
    from lightning_par.host.doctor.surroundings import find_surroundings, judge_surroundings

    axes, paces = _axes(layout, devices)
    device = torch.device("cuda" if devices.are_gpus else "cpu")
    operators = operator_findings(device)  # first, because it tells DeepSpeed the device before that is imported
    findings = [*library_findings(), *judge_devices(devices), *operators, *judge_surroundings(find_surroundings())]
    return [*findings, calibration_finding(devices.names[0]), *axes], paces


def _axes(layout: Layout | None, devices: Devices) -> tuple[list[Finding], list[AxisPace]]:
    """A collective on each axis: between the ranks of torchrun, or between processes that end with this one."""
    from lightning_par.host.doctor.axes import judge_axes, slowest
    from lightning_par.host.doctor.finding import Finding

    if layout is None or layout.world_size == 1:
        return [], []
    print(f"lightning-par doctor: a collective on each axis of {layout}", file=sys.stderr)
    try:
        by_rank = (_joined if "WORLD_SIZE" in os.environ else _forked)(layout, devices.are_gpus)
    except ProcessError as error:
        last = str(error).strip().splitlines()[-1]
        return [Finding("axes", f"{layout}: {last}", "wrong", "mend what else is wrong here; NCCL_DEBUG=INFO says more")], []
    paces = slowest(by_rank)
    return judge_axes(paces, _expected(devices)), paces


def _joined(layout: Layout, on_gpu: bool) -> list[list[AxisPace]]:
    """Between the ranks that torchrun has started; each calls it."""
    import torch.distributed as dist

    from lightning_par.host.doctor.axes import measure_axes
    from lightning_par.host.links import backend, device_of

    dist.init_process_group(backend(on_gpu))
    try:
        mine = measure_axes(layout, device_of(int(os.environ["LOCAL_RANK"]), on_gpu))
        by_rank: list[Any] = [None] * layout.world_size
        dist.all_gather_object(by_rank, mine)
        return by_rank
    finally:
        dist.destroy_process_group()


def _forked(layout: Layout, on_gpu: bool) -> list[list[AxisPace]]:
    """Between processes on this machine."""
    from lightning_par.host.doctor.axes import axes_of_process
    from lightning_par.parity.processes import run_forked

    with tempfile.TemporaryDirectory(prefix="lightning_par-") as folder:
        meeting, ranks = Path(folder, "rendezvous"), range(layout.world_size)
        functions = [partial(axes_of_process, rank, layout, meeting, on_gpu) for rank in ranks]
        names = [f"rank {rank} ({layout.coordinate_of(rank)})" for rank in ranks]
        return run_forked(functions, names, "spawn" if on_gpu else "fork")


def _expected(devices: Devices) -> float | None:
    """Bytes per second that the links of a node have by the datasheet, of GPUs that are known and on one machine."""
    import torch

    from lightning_par.host.here import cluster_here, file_of

    if not devices.are_gpus or file_of(devices.names[0]) is None or "WORLD_SIZE" in os.environ:
        return None
    return cluster_here(torch.device("cuda"), 1, len(devices.names)).inside.bytes_per_second


def _print(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table("", "what", "found")
    for finding in findings:
        table.add_row(_MARKS[finding.status], finding.about, finding.found)
    console.print(table)
    for finding in findings:
        if finding.remedy:
            console.print(f"{_MARKS[finding.status]} {finding.about}:", end=" ")
            console.print(finding.remedy, markup=False, soft_wrap=True)
    count = sum(finding.status == "wrong" for finding in findings)
    console.print(f"{count} wrong: a training will fail here" if count else "usable")
