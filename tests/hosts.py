"""Two hosts on one machine: namespaces with a link between them whose rate is chosen.

A host is a process that sleeps, in a network, a name and a table of mounts of its own. It is gone with that process, and the link
with it, so that nothing is left to undo; and that one ends by itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

NAMES, ADDRESSES = ("one", "two"), ("10.77.0.1", "10.77.0.2")
_UNSHARE = ["unshare", "--net", "--uts", "--mount"]
_LIFE_SECONDS = 280


def lacking() -> str | None:
    """What keeps this machine from having hosts inside; None where nothing does."""
    missing = [name for name in ("unshare", "nsenter", "ip", "tc", "mount", "hostname") if shutil.which(name) is None]
    if missing:
        return f"needs the programs {', '.join(missing)}"
    tried = subprocess.run([*_UNSHARE, "tc", "qdisc", "add", "dev", "lo", "root", "tbf", *_rate(1)], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"may not make namespaces with slow links: {tried.stderr.strip()}"


class Host:
    """A host that is there.

    Args:
        process: the one that sleeps.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> subprocess.Popen[str]:
        """Start a program on it, in a session of its own."""
        enter = ["nsenter", "--target", str(self._process.pid), "--net", "--uts", "--mount", f"--wd={folder}"]
        return subprocess.Popen(
            [*enter, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def run(self, *command: str) -> None:
        """Run a short program in its network."""
        subprocess.run(["nsenter", "--target", str(self._process.pid), "--net", *command], check=True, capture_output=True)


@contextmanager
def two_hosts(folder: Path, megabits_per_second: int) -> Iterator[tuple[Host, Host]]:
    """Two hosts that know each other's names, ``one`` and ``two``; the second takes its own for 127.0.1.1, as Debian has it.

    Args:
        folder: for their files.
        megabits_per_second: of the link, each way.
    """
    with ExitStack() as stack:
        processes = [stack.enter_context(_sleeping(folder, name)) for name in NAMES]
        pids = [str(process.pid) for process in processes]
        link = ["ip", "link", "add", "eth0", "netns", pids[0], "type", "veth", "peer", "name", "eth0", "netns", pids[1]]
        subprocess.run(link, check=True, capture_output=True)
        hosts = Host(processes[0]), Host(processes[1])
        for host, address in zip(hosts, ADDRESSES, strict=True):
            host.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            host.run("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *_rate(megabits_per_second))
        yield hosts


def end(process: subprocess.Popen[str]) -> None:
    """End a program of `Host.start` and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


@contextmanager
def _sleeping(folder: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    known = {host: "127.0.1.1" if host == name == "two" else address for host, address in zip(NAMES, ADDRESSES, strict=True)}
    file = folder / f"hosts_{name}"
    file.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in known.items()))
    script = f"mount --bind {file} /etc/hosts && hostname {name} && ip link set lo up && echo ready && exec sleep {_LIFE_SECONDS}"
    process = subprocess.Popen([*_UNSHARE, "sh", "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def _rate(megabits_per_second: int) -> list[str]:
    return ["rate", f"{megabits_per_second}mbit", "burst", "64kb", "latency", "2s"]
