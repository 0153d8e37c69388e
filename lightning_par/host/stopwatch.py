"""The time in which a training trains, and the most that its rank has stored: what the audit and the monitor both go by."""

from __future__ import annotations

import resource
import time

import torch


class Stopwatch:
    """Runs from the start of a batch until something else than training begins: a validation, a checkpoint.

    Loaders, loggers and callbacks between two batches are training; what a loader does just after a validation is not seen.

    Args:
        device: where this rank computes.

    Attributes:
        batches: seconds from the start of a batch to the start of the next, where nothing else was between.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.batches: list[float] = []
        self._began: float | None = None  # the batch that runs, uninterrupted
        self._runs_since: float | None = None
        self._lap_seconds = 0.0  # of this lap, before it last ran

    def begin_batch(self) -> None:
        """A training batch begins."""
        now = time.perf_counter()
        if self._began is not None:
            self.batches.append(now - self._began)
        self._began = now
        if self._runs_since is None:
            self._runs_since = now

    def interrupt(self) -> None:
        """Something else begins, until the next batch. Waits for the device, whose work until here is training."""
        self._began = None
        if self._runs_since is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._lap_seconds += time.perf_counter() - self._runs_since
            self._runs_since = None

    def lap(self) -> float:
        """Seconds of training since the last lap. The caller sees to it that the device has done its work."""
        now = time.perf_counter()
        running = 0.0 if self._runs_since is None else now - self._runs_since
        lap, self._lap_seconds = self._lap_seconds + running, 0.0
        self._runs_since = None if self._runs_since is None else now
        return lap


def peak_bytes(device: torch.device) -> int:
    """The most that this rank has stored: of a GPU's memory its tensors; of a host's the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
