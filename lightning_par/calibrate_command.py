"""The command `lightning-par calibrate`: how long the blocks of a model take on this device, and how fast its links are.

    lightning-par calibrate cluster=h100_8x trainer.precision=bf16-true
    lightning-par calibrate --seconds 300 cluster=laptop model.network.width=512
    torchrun --nnodes 2 --nproc_per_node 8 ... -m lightning_par.cli calibrate cluster=h100_8x     # the links between nodes, too

Exit codes: 0 done, 2 what was typed cannot work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_par.config.command import add_config_options, quiet_lightning, run_composed, written
from lightning_par.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from lightning_par.planner import Cluster, Link
    from lightning_par.planner.calibration import Calibration
    from lightning_par.planner.timing import Timings

_ABOUT = """\
Build the model and its first batch as train.py would, and time its blocks one by one on the GPU of this machine, or else on one
thread of its CPU: forward, backward and weight gradients, over every tp of a node and with 1 to 64 rows. Then `lightning-par plan`
for the same cluster computes with these seconds. Links are measured between the GPUs of this machine, or between processes on its
CPU; those between nodes where torchrun has started this on several.
"""
_EPILOG = """\
keys are those of `lightning-par plan`. What was measured is kept in ~/.cache/lightning_par/calibration, for each cluster and
device, with what was measured there before; a model that was changed must be measured anew.

examples:
  lightning-par calibrate cluster=laptop
  lightning-par calibrate --seconds 300 cluster=h100_8x model.network.width=4096 trainer.precision=bf16-true
"""


def add_calibrate_command(commands: Any) -> None:
    """Add `calibrate` to the subcommands of a parser. Imports nothing that is slow."""
    parser = commands.add_parser(
        "calibrate",
        help="measure the blocks of a model on this device, and its links, for `plan` to compute with",
        description=_ABOUT,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_options(parser)
    parser.add_argument("--seconds", type=float, default=60.0, metavar="N", help="how long blocks are timed (default: 60)")
    parser.add_argument("--output", metavar="FILE", help="where to write (default: in ~/.cache, where plan looks)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the machines and Hydra overrides, see below")
    parser.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> None:
    from lightning_par.config.cluster import load_cluster, read_question

    try:
        if not 0 < options.seconds < math.inf:
            raise ConfigurationError(f"--seconds {options.seconds:g}: it must be a positive number")
        question = replace(read_question(options.overrides, "calibrate"), calibration="none")
        cluster = load_cluster(question, options.config_dir)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None

    options.overrides = [*question.overrides, "parallel=single"]
    try:
        run_composed(lambda config: _measure(config, cluster, options), options)
    except KeyboardInterrupt:  # its processes are gone, and nothing is written
        raise SystemExit(128 + signal.SIGINT) from None


def _measure(config: DictConfig, cluster: Cluster, options: argparse.Namespace) -> None:
    """Measure a composed config, and write and say what was found.

    Raises:
        ConfigurationError: this device is not the cluster's, the run cannot be taken apart, or nothing can be written.
    """
    import torch

    from lightning_par.planner.calibration import Calibration, cached_path

    quiet_lightning()
    print("lightning-par calibrate: measuring links", file=sys.stderr)
    device, name, links = _machine(cluster)
    if int(os.environ.get("RANK", 0)):  # the first rank does the rest
        return
    path = Path(options.output) if options.output else cached_path(cluster.name, name)
    before = _before(path, name)
    with _progress(options.seconds) as say:
        timings = _time(config, cluster, device, options.seconds, say)
    found = Calibration(cluster.name, name, torch.__version__, date.today().isoformat(), timings.series, links)
    kept = found if before is None else before.joined(found)
    _write(kept, path)
    if options.json:
        print(json.dumps({"file": str(path), **found.to_json(), "left_out": timings.left_out}))
    else:
        _print(found, timings, path)


def _machine(cluster: Cluster) -> tuple[torch.device, str, Mapping[str, Link]]:
    """What computes here, its name, and its links.

    Raises:
        ConfigurationError: it is not the cluster's.
    """
    import torch

    from lightning_par.host.calibrate import check_device
    from lightning_par.host.here import device_name

    count = torch.cuda.device_count()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if count else torch.device("cpu")
    name = device_name(device)
    check_device(cluster, name)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return device, name, _joined_links(count > 0)
    return device, name, _forked_links(min(cluster.devices_per_node, count or max(2, os.cpu_count() or 1)), count > 0)


def _joined_links(on_gpu: bool) -> dict[str, Link]:
    """Between the ranks that torchrun has started; each calls it."""
    import torch.distributed as dist

    from lightning_par.host.links import backend, links_of_nodes

    dist.init_process_group(backend(on_gpu))
    try:
        return links_of_nodes(on_gpu)
    finally:
        dist.destroy_process_group()


def _forked_links(size: int, on_gpu: bool) -> dict[str, Link]:
    """Between processes on this machine, which end with this one."""
    from lightning_par.host.links import link_between_processes
    from lightning_par.parity.processes import run_forked

    if size < 2:
        return {}
    with tempfile.TemporaryDirectory(prefix="lightning_par-") as folder:
        meeting = Path(folder, "rendezvous")
        ranks = [partial(link_between_processes, rank, size, meeting, on_gpu) for rank in range(size)]
        names = [f"process {rank} that measures links" for rank in range(size)]
        return {"inside": run_forked(ranks, names, "spawn" if on_gpu else "fork")[0]}


def _time(config: DictConfig, cluster: Cluster, device: torch.device, seconds: float, say: Any) -> Timings:
    import torch

    from lightning_par.config.run import build_run
    from lightning_par.host.calibrate import time_run

    say("building the model")
    torch.set_num_threads(1)
    trainer, module, data = build_run(config, accelerator="cpu", devices=1, num_nodes=1, logger=False, callbacks=[])
    return time_run(trainer, module, data, cluster, device, seconds, say)


@contextmanager
def _progress(seconds: float) -> Iterator[Any]:
    """A bar that shows how much of the time is gone, and a function that says for what."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task, began = progress.add_task("", total=seconds), list[float]()

        def say(words: str) -> None:
            if words.startswith("timing") and not began:
                began.append(time.monotonic())
            progress.update(task, description=words, completed=time.monotonic() - began[0] if began else 0)

        yield say


def _before(path: Path, name: str) -> Calibration | None:
    """What is in the file.

    Raises:
        ConfigurationError: it is damaged, or of another device.
    """
    from lightning_par.planner.calibration import read_calibration

    if not path.exists():
        return None
    found = read_calibration(path)
    if found.device != name:
        raise ConfigurationError(f"--output {path} has what was measured on {found.device}, and this is {name}: name another file")
    return found


def _write(calibration: Calibration, path: Path) -> None:
    from lightning_par.planner.calibration import write_calibration

    def write() -> list[Path]:
        write_calibration(calibration, path)
        return [path]

    written(path.parent, write)


def _print(found: Calibration, timings: Timings, path: Path) -> None:
    from rich.console import Console

    from lightning_par.planner.calibration_report import print_calibration

    print_calibration(found, timings.left_out, Console(width=None if sys.stdout.isatty() else 132))
    print(f"written: {path}")
