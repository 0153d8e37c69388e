"""What each stage costs, measured while it trains: what a schedule that is built from costs is built from after the first steps."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from lightning_par.pipeline.action import Action
from lightning_par.pipeline.simulate import Costs
from lightning_par.runtime.axis import GroupAxis

_KINDS = "FBIW"


class CostMeter:
    """Adds up the seconds of each stage's actions, without those of waiting for another rank.

    On a GPU the device is waited for at both ends of an action, so it is for a few steps only.

    Args:
        num_stages: of the pipeline.
        device: where the actions run.
    """

    def __init__(self, num_stages: int, device: torch.device) -> None:
        self._device = device
        self._seconds = torch.zeros(num_stages, len(_KINDS), dtype=torch.float64)
        self._counts = torch.zeros_like(self._seconds)
        self._action: Action | None = None
        self._start = self._wait = 0.0

    def begin(self, action: Action) -> None:
        self._action, self._start = action, self._now()

    def wait(self) -> None:
        self._wait = self._now()

    def arrive(self) -> None:
        self._start += self._now() - self._wait

    def end(self) -> None:
        assert self._action is not None
        at = self._action.stage, _KINDS.index(self._action.kind)
        self._seconds[at] += self._now() - self._start
        self._counts[at] += 1

    def costs(self, world: GroupAxis) -> Costs:
        """The mean costs of each stage over all ranks, the same on every rank. Collective over ``world``."""
        totals = torch.stack([self._seconds, self._counts]).to(self._device)
        dist.all_reduce(totals, group=world.group)
        seconds, counts = totals.cpu()
        forward, whole, inputs, weights = (seconds / counts.clamp_min(1)).T.tolist()
        halves = [b / 2 for b in whole]  # of what was not split, each part has a product of the same size
        return Costs(
            forward=forward,
            input_gradient=[i or half for i, half in zip(inputs, halves, strict=True)],
            weight_gradient=[w or half for w, half in zip(weights, halves, strict=True)],
            transfer=0.0,
        )

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
