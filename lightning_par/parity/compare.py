"""How far a layout's training is from that of one process, tensor by tensor, and how far it may be.

An error is relative: the norm of the difference over the norm of what one process has. It may be as large as the tolerance. But
some tensors are all rounding: the gradient of a key's bias, which softmax does not see, and what Adam makes of it, which divides by
it. No two correct runs agree on those. So one process trains once more with every weight moved by one rounding. What that changes
in a tensor, a layout may change ten times as much, where this is more than the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from lightning_par.errors import ConfigurationError
from lightning_par.parity.run import Piece, RankRun, Run

_FACTOR = 10.0  # how much more than one rounding of the weights those of a whole run may do, in other places and another order
_ROUNDING = 0.1  # what may be off by this much of itself says nothing


@dataclass(frozen=True)
class Difference:
    """One thing that both runs have.

    Attributes:
        name: a parameter's, or of a number such as ``loss of step 1``.
        error: relative.
        allowed: how large that may be.
        alone, found: the numbers themselves, where it is one.
    """

    name: str
    error: float
    allowed: float
    alone: float = math.nan
    found: float = math.nan

    @property
    def is_equal(self) -> bool:
        """Whether it is small enough; never where it is undefined."""
        return self.error <= self.allowed

    @property
    def is_rounding(self) -> bool:
        """Whether nothing can be said of it."""
        return self.allowed >= _ROUNDING

    @property
    def share(self) -> float:
        """The error in units of what is allowed."""
        return self.error / self.allowed if math.isfinite(self.allowed) else 0.0


@dataclass(frozen=True)
class Comparison:
    """All differences of a training; gradients and weights the worst first.

    Attributes:
        losses, norms: by step.
        gradients: of the first step.
        weights: in the end.
    """

    losses: list[Difference]
    norms: list[Difference]
    gradients: list[Difference]
    weights: list[Difference]

    @property
    def is_equal(self) -> bool:
        return all(each.is_equal for each in (*self.losses, *self.norms, *self.gradients, *self.weights))


def compare_runs(alone: Run, moved: Run, ranks: Sequence[RankRun], tolerance: float) -> Comparison:
    """The training of a layout beside that of one process.

    Args:
        alone: the run in one process.
        moved: the same from weights that one rounding has moved.
        ranks: what each rank found.
        tolerance: relative.
    """
    gradients = _errors((piece for rank in ranks for piece in rank.gradients), alone.gradients, _parts_of(ranks))
    weights = _errors((piece for rank in ranks for piece in rank.weights), alone.weights, {})
    return Comparison(
        losses=_numbers("loss", alone.losses, moved.losses, [rank.losses for rank in ranks], tolerance),
        norms=_numbers("gradient norm", alone.norms, moved.norms, [rank.norms for rank in ranks], tolerance),
        gradients=_sorted(gradients, alone.gradients, moved.gradients, tolerance),
        weights=_sorted(weights, alone.weights, moved.weights, tolerance),
    )


def check_can_compare(alone: Run, moved: Run, reseeded: Run, tolerance: float, module: str) -> None:
    """Check that one process gives something to be equal to.

    Args:
        alone, moved: as for `compare_runs`.
        reseeded: the first step again, where random numbers are others.
        tolerance: relative.
        module: name of its class.

    Raises:
        ConfigurationError: it computes no gradient or infinite ones, or draws random numbers that it depends on.
    """
    if not alone.gradients:
        raise ConfigurationError(
            f"{module}: no parameter has a gradient after one step in one process: there is nothing to compare"
        )
    broken = [f"loss of step {step + 1} is {loss}" for step, loss in enumerate(alone.losses) if not math.isfinite(loss)]
    broken += [f"gradient norm of step {step + 1} is {norm}" for step, norm in enumerate(alone.norms) if not math.isfinite(norm)]
    if broken:
        raise ConfigurationError(
            f"{module} in one process: the {broken[0]}, and nothing is equal to that: find out why, with parallel=single "
            "detect_anomaly=first"
        )
    for name, gradient in alone.gradients.items():
        allowed = _allowed(name, alone.gradients, moved.gradients, tolerance)
        error = relative_error(reseeded.gradients[name], gradient) if name in reseeded.gradients else math.inf
        if error > allowed:
            raise ConfigurationError(
                f"{module}.training_step draws random numbers: with another seed the first gradient of {name} is another one by "
                f"{error:.0e} in one process alone. Microbatches and replicas draw their own, so that no layout could be equal: "
                "draw them in the dataset, where they are a part of the batch, or turn them off for the check"
            )


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is right."""
    return _ratio(float((found.double() - right.double()).norm()) ** 2, float(right.double().norm()) ** 2)


def _parts_of(ranks: Sequence[RankRun]) -> dict[tuple[str, int], tuple[int, float]]:
    return {key: part for rank in ranks for key, part in rank.parts.items()}


def _errors(
    pieces: Iterable[Piece], expected: Mapping[str, torch.Tensor], parts: Mapping[tuple[str, int], tuple[int, float]]
) -> dict[str, float]:
    """The relative error of each tensor, from its pieces on all ranks. Of copies the worst counts.

    What nobody has is missing, and so different by all that it is in one process. A part that several ranks hold (a head of
    keys) counts for each of them, so that an error can only look larger.
    """
    difference: dict[str, float] = {}
    lengths: dict[tuple[str, int], int] = {}
    seen: dict[tuple[str, int], float] = {}
    ordered = sorted(pieces)
    for (name, part, _), copies in groupby(ordered, key=lambda piece: piece[:3]):
        worst = max(copies, key=lambda piece: piece.difference if not math.isnan(piece.difference) else math.inf)
        difference[name] = difference.get(name, 0.0) + worst.difference
        lengths[name, part] = lengths.get((name, part), 0) + worst.length
        seen[name, part] = seen.get((name, part), 0.0) + worst.expected
    for (name, part), (length, squares) in parts.items():
        if lengths.get((name, part), 0) < length:
            difference[name] = difference.get(name, 0.0) + max(0.0, squares - seen.get((name, part), 0.0))
    sizes = {name: float(tensor.double().norm()) ** 2 for name, tensor in expected.items()}
    return {name: _ratio(difference.get(name, sizes.get(name, 0.0)), sizes.get(name, 0.0)) for name in {*difference, *sizes}}


def _sorted(
    errors: Mapping[str, float], alone: Mapping[str, torch.Tensor], moved: Mapping[str, torch.Tensor], tolerance: float
) -> list[Difference]:
    """The differences, those first that are largest for what they may be, and last those that are nothing but rounding."""
    found = [Difference(name, error, _allowed(name, alone, moved, tolerance)) for name, error in errors.items()]
    return sorted(found, key=lambda each: (each.is_equal, each.is_rounding, -each.share, each.name))


def _allowed(name: str, alone: Mapping[str, torch.Tensor], moved: Mapping[str, torch.Tensor], tolerance: float) -> float:
    """How large an error may be."""
    if name not in alone or name not in moved:
        return tolerance
    return max(tolerance, _FACTOR * relative_error(moved[name], alone[name]))


def _numbers(
    what: str, alone: Sequence[float], moved: Sequence[float], ranks: Sequence[Sequence[float]], tolerance: float
) -> list[Difference]:
    """A number of each step; of the ranks, the one that is furthest off. A step that one side does not have is different."""
    found = []
    for step in range(max(len(alone), *map(len, ranks))):
        right = alone[step] if step < len(alone) else math.nan
        values = [rank[step] if step < len(rank) else math.nan for rank in ranks]
        value = max(values, key=lambda value: math.inf if math.isnan(value) else abs(value - right))
        rounding = _ratio((moved[step] - right) ** 2, right**2) if step < len(moved) else 0.0
        allowed = max(tolerance, _FACTOR * rounding)
        found.append(Difference(f"{what} of step {step + 1}", _ratio((value - right) ** 2, right**2), allowed, right, value))
    return found


def _ratio(difference: float, expected: float) -> float:
    """The root of a ratio of squares; infinite where there should be nothing."""
    if difference == 0:
        return 0.0
    return math.sqrt(difference / expected) if expected else math.inf
