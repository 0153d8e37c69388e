"""How optimizers step on gradients that are spread over ranks: reduced once, clipped as those of the whole model, then the step."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from lightning_par.engine import Engine
from lightning_par.gradients import clip_by_norm, clip_by_value, global_norm, sum_shared_gradients
from lightning_par.guard.drift import DriftGuard
from lightning_par.host.anomaly import AnomalyGuard


class Updates:
    """The steps of a run's optimizers. Methods take one of them, or what Lightning has wrapped around it.

    All methods are collective over the world.

    Args:
        engine: the module in motion; its optimizer states have their owner.
        anomaly: looks at norms; None where nobody does.
        drift_guard: after how many steps the ranks compare what they hold; 0 for never.

    Attributes:
        grad_norm: of the whole model, before it was last clipped by norm; None where it has not been.
        finds_norm: whether to find that of the next steps, too, that are not clipped by norm: as they are stepped with, for a pass
            over the gradients and an all-reduce of one number.
    """

    def __init__(self, engine: Engine, anomaly: AnomalyGuard | None = None, drift_guard: int = 0) -> None:
        assert engine.states is not None
        self.grad_norm: torch.Tensor | None = None
        self.finds_norm = False
        self._is_found = False  # the norm of this step
        self._mesh, self._scale, self._states = engine.mesh, engine.loss_scale, engine.states
        self._anomaly = anomaly
        self._drift = DriftGuard(engine.states, engine.mesh, drift_guard) if drift_guard else None
        self._reduced: dict[int, bool] = {}  # optimizers whose gradients are reduced, by position; whether they have overflowed

    def reduce(self, optimizer: Any) -> None:
        """Sum shared gradients, average over dp, take the loss scale out; once for each step of an optimizer."""
        position = self._position_of(optimizer)
        if position not in self._reduced:
            groups = self._states.optimizers[position].param_groups
            sum_shared_gradients([p for group in groups for p in group["params"]], self._mesh)
            only = self._only(position)
            self._states.reduce(only)
            self._reduced[position] = self._scale is not None and self._scale.unscale(self._states, self._mesh, only)

    def clip(self, optimizer: Any, value: float, algorithm: str) -> None:
        """Clip the reduced gradients of the whole model to a positive ``value``, by ``norm`` or by ``value``."""
        self.reduce(optimizer)
        only = self._only(self._position_of(optimizer))
        if algorithm == "value":
            clip_by_value(self._states, value, only)
        else:
            norm = self._find_norm(only)
            clip_by_norm(self._states, value, norm, only)
            if self._anomaly is not None and self._scale is None:
                self._anomaly.check_norm(norm)

    def step(self, optimizer: Any) -> None:
        """Step with the reduced gradients; where they have overflowed, forget them."""
        if self._drift is not None:
            self._drift.before_step()
        position = self._position_of(optimizer)
        only = self._only(position)
        if self.finds_norm and not self._is_found:
            self._find_norm(only)
        self._is_found = False
        has_overflowed = self._reduced.pop(position)
        if has_overflowed:
            self._states.zero_grad(only)
        else:
            self._states.step(only)
        if self._scale is not None:
            self._scale.update(has_overflowed)
        if self._anomaly is not None:
            self._anomaly.forget()

    def _find_norm(self, only: Optimizer | None) -> torch.Tensor:
        self.grad_norm, self._is_found = global_norm(self._states, self._mesh, only), True
        return self.grad_norm

    def _position_of(self, optimizer: Any) -> int:
        """Which of the optimizers is meant; Lightning hands out wrappers, which share the groups."""
        return next(index for index, own in enumerate(self._states.optimizers) if own.param_groups is optimizer.param_groups)

    def _only(self, position: int) -> Optimizer | None:
        """How the states are told which optimizer's gradients are meant; None for those of the only one."""
        return self._states.optimizers[position] if len(self._states.optimizers) > 1 else None
