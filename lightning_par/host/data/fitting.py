"""The state of a loader, where the run that is resumed reads in batches of another size or in another order."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn


@dataclass(frozen=True)
class Manner:
    """How a loader is read.

    Attributes:
        global_batch: samples that all replicas together take of it for a batch.
        sampler: the class that makes the order.
    """

    global_batch: int
    sampler: str

    def fit(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state in batches of this size: at the next that begins after all samples that were used."""
        kept, ratio = state["pass"], Fraction(state["global_batch"], self.global_batch)
        if kept is None or ratio == 1:
            return state
        position = {**state["position"], "batches": ceil(state["position"]["batches"] * ratio)}
        return {**state, "position": position, "pass": {**kept, "start": ceil(kept["start"] * ratio), "before": {}, "workers": {}}}

    def warn(self, state: dict[str, Any], batches: int) -> None:
        """Warn where the rest of an epoch cannot have the samples that are left, if it goes on after so many ``batches``."""
        if state["global_batch"] != self.global_batch:
            rank_zero_warn(
                f"the checkpoint was saved inside an epoch with {state['global_batch']} samples in a batch of all replicas, now "
                f"they are {self.global_batch}: the epoch goes on after {batches} batches, so some samples may be left out. Keep "
                "the batch size times dp, and all are used once"
            )
        if state["sampler"] != self.sampler:
            rank_zero_warn(
                f"the checkpoint was saved inside an epoch in the order of a {state['sampler']}, and now it is that of a "
                f"{self.sampler}: the rest of the epoch has other samples. With one replica your sampler makes the order, with "
                "several Lightning's does: resume with dp1 if it was dp1, and all samples are used once"
            )
