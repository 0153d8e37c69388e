"""Ends a run whose loss or gradient is not finite, before the optimizer steps, with the place where that began.

While all is well it costs nothing: the loss is read from the message that every training step ends with, and is equal on all ranks,
so that all come here together. No hook is on any module. Where gradients are clipped by norm, on a CPU that norm is read before the
step; the host would wait for that of a GPU. There, and without clipping, a bad gradient shows in the next loss, as a bad
parameter. A gradient that overflows under a loss scale is the scale's own affair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lightning_par.engine import Engine
from lightning_par.errors import ConfigurationError, NumericsError
from lightning_par.guard.finding import Finding, describe_backward, describe_forward, describe_ranks, first_of
from lightning_par.guard.search import Search
from lightning_par.host.stage_log import StageLog
from lightning_par.runtime.parameter import get_spec

FIRST = "first"
_GO_ON = "; detect_anomaly=null goes on regardless"


@dataclass(frozen=True)
class Trained:
    """A batch that was trained on, so that it can be again.

    Attributes:
        batch_idx: its number in the epoch.
        batches: its microbatches; None for one that counts for nothing.
        step: what the engine was told to train.
        streams: where the random numbers were before.
    """

    batch_idx: int
    batches: list[Any]
    step: tuple[Any, ...]
    streams: dict[str, int]


class AnomalyGuard:
    """Looks at losses and norms. Every rank makes the same calls with the same numbers.

    Args:
        engine: the module in motion.
        log: what the module logs, which it does not for a batch that is run again.
    """

    def __init__(self, engine: Engine, log: StageLog) -> None:
        self._engine, self._log = engine, log
        self._trained: list[Trained] = []

    def keep(self, trained: Trained) -> None:
        """Remember a batch until `forget`: it is alive as long in one step, and longer only where steps accumulate."""
        self._trained.append(trained)

    def forget(self) -> None:
        """A step was taken, or its gradients were forgotten."""
        self._trained.clear()

    def check_loss(self, loss: float) -> None:
        """Check the loss of the batch that was kept last. Collective over the world where it is not finite.

        Raises:
            NumericsError: it is not; names the module and ranks where that began.
        """
        if not math.isfinite(loss):
            trained = self._trained[-1:]
            self._end(f"the loss of {self._name(trained[0])} is {loss}", trained, in_backward=False)

    def check_norm(self, norm: torch.Tensor) -> None:
        """Check the gradient norm before a step, where that takes no waiting. Collective over the world where it is not finite.

        Raises:
            NumericsError: as `check_loss`.
        """
        is_known = self._trained and not norm.is_cuda  # nothing is kept in manual optimization, where nothing can be run again
        if is_known and not math.isfinite(float(norm)):
            words = f"the gradient norm of {self._name(self._trained[-1])} is {float(norm)}, and its loss is finite"
            self._end(words, self._trained, in_backward=True)

    def _name(self, trained: Trained) -> str:
        module: Any = self._engine.module
        return f"step {module.global_step} (epoch {module.current_epoch}, batch {trained.batch_idx})"

    def _end(self, words: str, trained: list[Trained], in_backward: bool) -> None:
        engine = self._engine
        bad = self._bad_parameters()
        if in_backward and engine.states is not None:
            engine.states.zero_grad()  # reduced ones; where there are none yet, what is there is in nobody's way
        found: Finding | None = None
        for place, each in enumerate(trained):
            search = Search(engine.module, in_backward, place, each.batches, bad)
            engine.streams.load_state_dict(each.streams)
            with self._log.recording():
                engine.search(search, *each.step)
            found = found or search.first
        first = first_of(dict(enumerate(self._gather(found))))
        if first is None:
            reason = "a sum of finite gradients is not" if in_backward else "run again, it is finite: the step is not repeatable"
            raise NumericsError(f"{words}: {reason}{_GO_ON}")
        finding, ranks = first
        named = describe_ranks(bad[finding.what] if finding.cause == "parameter" else ranks, engine.mesh.layout)
        batch = trained[finding.order[0]]
        of = f" of batch {batch.batch_idx}" if len(trained) > 1 else ""
        describe = describe_backward if in_backward else describe_forward
        where = f"on {named}, microbatch {finding.microbatch} of {len(batch.batches)}{of}"
        raise NumericsError(f"{words}: {describe(finding, where)}{_GO_ON}")

    def _bad_parameters(self) -> dict[str, list[int]]:
        """Names of parameters that are not finite, with the ranks that hold such a piece. Collective over the world."""
        assert self._engine.states is not None
        pieces = self._engine.states.weights()
        own = [get_spec(piece.parameter).name for piece in pieces if not bool(torch.isfinite(piece.values).all())]
        bad: dict[str, list[int]] = {}
        for rank, names in enumerate(self._gather(own)):
            for name in names:
                bad.setdefault(name, []).append(rank)
        return bad

    def _gather(self, value: Any) -> list[Any]:
        """What each rank passed, by rank. Collective over the world."""
        world = self._engine.mesh.world
        every: list[Any] = [value]
        if world.size > 1:
            every = [None] * world.size
            dist.all_gather_object(every, value, group=world.group)
        return every


def check_anomaly_word(word: str | None) -> bool:
    """Whether anomalies are to be detected.

    Raises:
        ConfigurationError: a word that is unknown.
    """
    if word not in (None, FIRST):
        raise ConfigurationError(f"detect_anomaly={word} is unknown: use {FIRST}, or null to go on with whatever numbers there are")
    return word == FIRST
