"""The one harness for multi-process tests: forked ranks, gloo, a file rendezvous, a timeout.

Forking with the imports already loaded starts four ranks in one or two seconds where spawning takes thirty; so the
parent imports what is slow, and never runs a parallel region of its own (one thread, set below).

With ``LIGHTNING_PAR_TEST_DEVICE=cuda`` the ranks share the GPU of this machine, and talk as in `tests.staged`; this process
does not see it, because one that has used CUDA cannot fork (see ``tests/__init__.py``).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._triton import has_triton

from tests import staged

torch.set_num_threads(1)
DEVICE = os.environ["DS_ACCELERATOR"]
COLLECTIVE_TIMEOUT = timedelta(seconds=30)
GPU: dict[str, Any] = {"accelerator": "cuda", "devices": 1}


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 90,
    have_workers: bool = False,
    collective_timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> list[Any]:
    """Run ``function(rank, world_size, *args)`` in ``world_size`` forked processes of one gloo group.

    Args:
        function: what each rank runs.
        world_size: ranks.
        *args: for the function.
        timeout: seconds until all must have returned.
        have_workers: whether ranks start processes of their own, such as a loader's.
        collective_timeout: how long a rank may wait for the others in a collective.

    Returns:
        What each rank returned (picklable), by rank.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died, or outlived ``timeout`` seconds.
    """
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = os.path.join(folder, "rendezvous")
        processes = [
            context.Process(
                target=_rank_main,
                args=(function, rank, world_size, rendezvous, collective_timeout, results, args),
                daemon=not have_workers,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, results, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def machines(world_size: int) -> dict[str, Any]:
    """What a `Trainer` of a rank is told: so many ranks on this CPU, or one on each of so many machines with a GPU."""
    return {"accelerator": DEVICE, "devices": world_size} if DEVICE == "cpu" else {**GPU, "num_nodes": world_size}


def in_one_process(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``; on a GPU in a process of its own."""
    return function(*args) if DEVICE == "cpu" else run_ranks(_apply, 1, function, args, timeout=200)[0]


def _apply(rank: int, world_size: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(*args)


def _collect(processes: list[Any], results: Any, timeout: float) -> list[Any]:
    done: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(done) < len(processes):
        try:
            rank, error, value = results.get(timeout=0.2)
        except queue.Empty:
            missing = [rank for rank in range(len(processes)) if rank not in done]
            assert time.monotonic() < deadline, f"ranks {missing} did not finish within {timeout} s"
            dead = [rank for rank in missing if processes[rank].exitcode not in (None, 0)]
            assert not dead, f"ranks {dead} died with {[processes[rank].exitcode for rank in dead]}"
            continue
        assert error is None, f"rank {rank} of {len(processes)} raised:\n{error}"
        done[rank] = pickle.loads(value)
    return [done[rank] for rank in range(len(processes))]


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    rendezvous: str,
    collective_timeout: timedelta,
    results: Any,
    args: tuple[Any, ...],
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage for each engine, which would go through all that the parent has imported
    try:
        backend = "gloo"
        if DEVICE == "cuda":  # as if each rank were on a machine of its own
            os.environ.update(NODE_RANK=str(rank), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", CUDA_VISIBLE_DEVICES="0")
            has_triton.cache_clear()
            backend = staged.NAME
            staged.register()
        dist.init_process_group(
            backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=collective_timeout
        )
        value = function(rank, world_size, *args)
        results.put((rank, None, pickle.dumps(value)))  # by value: torch would share memory that dies with this process
    except BaseException:  # whatever ended this rank is what the test must show
        results.put((rank, traceback.format_exc(), None))
    results.close()
    results.join_thread()
    os._exit(0)  # no teardown: the parent ends every rank, and gloo's own can wait for peers
