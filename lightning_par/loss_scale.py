"""The loss scale of a run in float16: one number on all ranks.

A gradient below 6e-8 is zero in float16. So the loss is multiplied by a large number before the backward, and the gradients are
divided by it before anyone reads them. The rule is that of ``torch.amp.GradScaler`` (arXiv 1710.03740, section 3.2)::

    a gradient is infinite or undefined on any rank    no rank steps; scale *= backoff_factor
    growth_interval steps without that                 scale *= growth_factor

torch's own scaler belongs to one process: it would step on the ranks whose part of the gradient is finite.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch.optim import Optimizer

from lightning_par.private.torch import unscale_gradients
from lightning_par.runtime.mesh import Mesh
from lightning_par.zero.states import OptimizerStates


@dataclass
class LossScale:
    """The scale, and when it changes. Every rank makes the same calls.

    Attributes:
        scale: factor of the loss now.
        growth_factor, backoff_factor, growth_interval: see above.
        growth_tracker: steps since the scale last changed.
    """

    scale: float = 2.0**16
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    growth_tracker: int = 0

    @classmethod
    def of(cls, scaler: torch.amp.GradScaler) -> LossScale:
        """With the settings of an enabled scaler of torch."""
        return cls(scaler.get_scale(), scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval())

    @torch.no_grad()
    def unscale(self, states: OptimizerStates, mesh: Mesh, optimizer: Optimizer | None = None) -> bool:
        """Divide the reduced gradients by the scale, in place. Collective over the world.

        Args:
            states: whose gradients; ``states.reduce()`` was called.
            mesh: the mesh of the run.
            optimizer: only the parameters of this one.

        Returns:
            Whether a gradient is infinite or undefined on any rank. Then no rank may step.
        """
        device = next(states.module.parameters()).device
        found, inverse = torch.zeros(1, device=device), torch.full((1,), 1 / self.scale, device=device)
        unscale_gradients([fragment.gradient for fragment in states.gradients(optimizer)], found, inverse)
        mesh.world.all_reduce(found, "max")
        return bool(found)

    def update(self, has_overflowed: bool) -> None:
        """Set the scale of the next step, after a step that was taken or was not."""
        self.growth_tracker = 0 if has_overflowed else self.growth_tracker + 1
        limits = torch.finfo(torch.float32)
        if has_overflowed:
            self.scale = max(limits.tiny, self.scale * self.backoff_factor)
        elif self.growth_tracker == self.growth_interval:
            self.scale, self.growth_tracker = min(limits.max, self.scale * self.growth_factor), 0

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on where `state_dict` was taken."""
        self.scale, self.growth_tracker = state["scale"], int(state["growth_tracker"])
