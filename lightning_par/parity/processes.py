"""Functions run in forked processes: fast, and with the user's module, data and imports as they are in this one.

This process runs no forward or backward, so that it has no threads of torch that a fork would lose, and it starts no process group.
However it ends, the others end too: it ends them, and one that finds it gone ends itself.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from lightning_par.errors import ConfigurationError, ProcessError

_TURN_SECONDS = 0.5
Answer = tuple[str, Any]  # how a function ended: "returned", "misconfigured" or "raised"; and what it returned, or words


def run_forked(functions: Sequence[Callable[[], Any]], names: Sequence[str], method: str = "fork") -> list[Any]:
    """Run each function in a process of its own, all at once.

    Args:
        functions: what they return can be pickled; what they print goes to standard error.
        names: of the processes, for messages.
        method: how they start; ``spawn``, which takes seconds, where they use GPUs: a process that has used one cannot fork.

    Returns:
        What each returned, in order.

    Raises:
        ConfigurationError: one of them raised it; its words.
        ProcessError: one raised something else, with its traceback, or was killed. The others are ended.
    """
    context: Any = multiprocessing.get_context(method)
    sys.stdout.flush()
    sys.stderr.flush()
    threads = max(1, (os.cpu_count() or 1) // len(functions))
    pipes = [context.Pipe(duplex=False) for _ in functions]
    processes = [
        context.Process(target=_run, args=(function, sender, os.getpid(), threads), daemon=True)
        for function, (_, sender) in zip(functions, pipes, strict=True)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()  # the end of a process is then the end of its pipe
        return _collect([receiver for receiver, _ in pipes], processes, names)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _collect(receivers: list[Connection], processes: Sequence[Any], names: Sequence[str]) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(receivers):
        waiting = [receiver for index, receiver in enumerate(receivers) if index not in found]
        for ready in wait(waiting):
            index = next(index for index, receiver in enumerate(receivers) if receiver is ready)
            try:
                how, value = receivers[index].recv()
            except EOFError:
                how, value = "raised", _how_it_ended(processes[index])
            if how == "misconfigured":
                raise ConfigurationError(value)
            if how == "raised":
                raise ProcessError(f"{names[index]} failed: {value}")
            found[index] = value
    return [found[index] for index in range(len(receivers))]


def _how_it_ended(process: Any) -> str:
    process.join()
    code: int = process.exitcode
    return f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"


def _run(function: Callable[[], Any], sender: Connection, parent: int, num_threads: int) -> None:
    """The life of a forked process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; who started this process ends it
    threading.Thread(target=_live_with, args=(parent,), daemon=True).start()
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # a Trainer warns of what is meant to be so here: no validation, no workers
    torch.set_num_threads(num_threads)
    gc.freeze()  # DeepSpeed collects garbage for each engine, which would go through all that the parent has imported
    answer: Answer
    try:
        answer = "returned", function()
    except ConfigurationError as error:
        answer = "misconfigured", str(error)
    except BaseException:  # whatever ended it is what the user must see
        answer = "raised", traceback.format_exc()
    sender.send(answer)
    sys.stderr.flush()
    os._exit(0)  # no teardown: gloo's own can wait for peers


def _live_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_TURN_SECONDS)
    os._exit(1)
