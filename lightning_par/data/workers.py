"""Tasks shared out to processes, of which none outlives the call."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

from lightning_par.errors import DataError, ProcessError

Job = TypeVar("Job")
Result = TypeVar("Result")
Advance = Callable[[int], None]
Prepare = Callable[[Job], Callable[[int, Advance], Result]]


def run_all(
    prepare: Prepare[Job, Result], job: Job, tasks: Sequence[int], processes: int, advance: Advance
) -> Iterator[tuple[int, Result]]:
    """What each task gives, as it is done.

    The processes are started anew (no fork: threads of other libraries may be running). They leave Ctrl-C to this one, which ends
    them, and end by themselves when it is gone.

    Args:
        prepare: called with ``job`` in each process; what it gives is called with a task and ``advance``. A function of a module.
        job: for ``prepare``; can be pickled.
        tasks: numbers; one goes to whoever is free.
        processes: how many, at most; with 1 it is this one.
        advance: is told what the tasks tell.

    Raises:
        DataError: a task raised it.
        ProcessError: a process raised another error, or died.
    """
    if processes == 1 or len(tasks) < 2:
        run = prepare(job) if tasks else None
        for task in tasks:
            assert run is not None
            yield task, run(task, advance)
        return
    waiting = list(reversed(tasks))
    with _started(prepare, job, min(processes, len(tasks))) as connections:
        busy = {connection: waiting.pop() for connection in connections}
        for connection, task in busy.items():
            connection.send(task)
        while busy:
            for connection in cast(list[Connection], wait(list(busy))):
                kind, value = _received(connection, busy[connection])
                if kind == "advance":
                    advance(value)
                    continue
                yield busy.pop(connection), value
                if waiting:
                    busy[connection] = waiting.pop()
                    connection.send(busy[connection])


@contextmanager
def _started(prepare: Prepare[Job, Result], job: Job, count: int) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")
    started: list[Any] = []
    connections: list[Connection] = []
    try:
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, prepare, job), daemon=True)
            process.start()
            there.close()  # so that its end is seen here
            started.append(process)
            connections.append(here)
        yield connections
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.join()


def _received(connection: Connection, task: int) -> tuple[str, Any]:
    try:
        kind, value = connection.recv()
    except (EOFError, ConnectionResetError):
        raise ProcessError(
            f"the process that wrote shard {task} died, maybe for want of memory: run again to go on, with fewer --processes"
        ) from None
    if kind == "refused":
        raise DataError(value)
    if kind == "failed":
        raise ProcessError(f"the process that wrote shard {task} failed: run again to go on\n{value}")
    return kind, value


def _serve(connection: Connection, prepare: Prepare[Any, Any], job: Any) -> None:
    """What a process does until nobody is there to send it anything."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads: the processes are enough
    try:
        run = prepare(job)
        while True:
            result = run(connection.recv(), lambda size: connection.send(("advance", size)))
            connection.send(("done", result))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except DataError as error:
        connection.send(("refused", str(error)))
    except Exception:
        import traceback

        connection.send(("failed", traceback.format_exc()))
