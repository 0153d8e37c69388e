"""The script that tests/test_launcher.py starts: three ranks, each doing what the case says, without Lightning or torch.

    python tests/launched.py FOLDER CASE [CASE of rank 1] [CASE of rank 2] [MAX_RESTARTS]

Each rank writes FOLDER/<rank>: its process id and the environment it got; in a run that may be restarted FOLDER/<start>/<rank>. A
case of several words joined by "; " is one for each start; the last one also for those after it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_par.errors import LayoutError, NumericsError
from lightning_par.host.launch import launcher, processes
from lightning_par.host.launch.ending import Stopped
from lightning_par.host.launch.link import join_parent
from lightning_par.host.launch.record import this_attempt
from lightning_par.host.launch.restart import this_run
from lightning_par.layout import Layout


class ScriptLauncher:
    """Stands in for the part of Lightning's launcher that ours relies on."""

    def __init__(self, cluster_environment: Any, num_processes: int, num_nodes: int) -> None:
        self.cluster_environment, self.num_processes, self.num_nodes = cluster_environment, num_processes, num_nodes
        self.procs: list[Any] = []


class Environment:
    """As Lightning's default one: ranks are ours to start unless LOCAL_RANK says that it was done."""

    main_address, main_port = "127.0.0.1", 29500

    @property
    def creates_processes_externally(self) -> bool:
        return "LOCAL_RANK" in os.environ

    def validate_settings(self, num_devices: int, num_nodes: int) -> None: ...

    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", 0))

    def node_rank(self) -> int:
        return 0


def build(num_processes: int, preflight: Any = None, max_restarts: int = 0) -> Any:
    """A launcher over the stand-ins."""
    stand_in = ModuleType("lightning")
    stand_in.script_launcher_class = lambda root: ScriptLauncher  # type: ignore[attr-defined]
    stand_in.share_threads = lambda root, num_processes: None  # type: ignore[attr-defined]
    launcher.lightning = stand_in  # type: ignore[assignment]
    layout = Layout(tp=num_processes, dp=1)

    def describe(rank: int) -> str:
        return f"rank {rank} ({layout.coordinate_of(rank)})"

    return launcher.launcher_class("stand_in")(
        Environment(), num_processes, 1, describe=describe, preflight=preflight, max_restarts=max_restarts
    )


def is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "T"
    except OSError:  # gone
        return False


def sleep_deep_down(depth: int) -> None:
    time.sleep(60) if depth == 0 else sleep_deep_down(depth - 1)


def stop(number: int, frame: Any) -> None:
    """As the end of a step does once the ranks have agreed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another copy of it
    raise Stopped


def act(case: str, folder: Path) -> None:
    """What one rank does."""
    if case == "stop":
        link = join_parent()
        assert link is not None
        link.expect(1)
        for _ in range(50):  # stacks that take a while to be shown
            threading.Thread(target=sleep_deep_down, args=(90,), daemon=True).start()
        os.kill(os.getpid(), signal.SIGSTOP)
    if case == "raise with it":  # as in a collective whose peer ends: as soon as rank 1, which is stopped, is made to go on
        while not is_stopped(peer := int((folder / "1").read_text().split()[0])):
            time.sleep(0.01)
        while is_stopped(peer):
            time.sleep(0.01)
    if case.startswith("step "):
        run = this_run()
        assert run is not None
        run.note_step()
        case = case.removeprefix("step ")
        time.sleep(0.3)  # the first rank notes it
    if case == "stop politely":
        signal.signal(signal.SIGTERM, stop)
    if case == "misconfigured":
        os._exit(2)
    if case.startswith("raise"):
        time.sleep(0.3 if case.endswith("later") else 0)
        raise (NumericsError if case.endswith("undefined") else RuntimeError)("raised on purpose")
    if case == "exit":
        os._exit(3)  # as a crash in C++ does: nothing is said
    if case.startswith("die"):
        time.sleep(0.1 if case.endswith("later") else 0)
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "stubborn":  # as a rank whose signal handler only sets a flag, inside a collective
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if case != "return":
        time.sleep(1 if case == "late" else 60)


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[2:5]
    attempt = this_attempt()
    if attempt is not None:
        folder = folder / str(attempt.restart)
        folder.mkdir(exist_ok=True)
        each = [case.split("; ") for case in cases]
        cases = [case[min(attempt.restart, len(case) - 1)] for case in each]
    processes.GRACE_SECONDS = 0.5
    processes.TERMINATE_SECONDS = 0.5

    def work() -> None:
        rank = os.environ["LOCAL_RANK"]
        names = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE")
        (folder / f"{rank}.part").write_text(f"{os.getpid()} " + " ".join(os.environ[name] for name in names))
        (folder / f"{rank}.part").rename(folder / rank)
        while len(list(folder.glob("[0-9]"))) < 3:  # as the ranks of a group: nobody is off before all are there
            time.sleep(0.01)
        act(cases[int(rank)], folder)
        (folder / f"{rank}.done").touch()

    def preflight(trainer: Any) -> None:
        if cases[0] == "refuse":
            raise LayoutError("refused before any process")

    ranks = build(3, preflight, int(sys.argv[5]) if sys.argv[5:] else 0)
    ranks.launch(work)
    ranks.launch(lambda: None)  # a second call, as fit then validate, starts no more ranks


if __name__ == "__main__":
    main()
