"""What a part of a batch counts: the number of its target elements, as one process counts them.

A loss that is a mean over target elements (``cross_entropy`` with an ignored index) of microbatches with c_1 .. c_n of them,
on all replicas together, is the loss of one process when microbatch i counts for c_i / (c_1 + .. + c_n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch

from lightning_par.errors import ConfigurationError, DataError
from lightning_par.host.batch import split_batch
from lightning_par.plan.caution import IGNORED
from lightning_par.runtime.nested import at_path, paths_in

LossWeight: TypeAlias = str | int | Mapping[str, Any] | Callable[[Any], Any]


@dataclass(frozen=True)
class FieldCount:
    """Counts the elements of a tensor of the batch that are not ignored.

    Attributes:
        field: its path, such as ``labels``, ``decoder.labels`` or ``1`` for the second item of a tuple.
        ignore_index: the value of the elements that are no targets.
        shift: elements at the start of the last dim that the loss leaves out: 1 for a language model that predicts its own
            input, as transformers' do.
    """

    field: str
    ignore_index: int = IGNORED
    shift: int = 0

    def __str__(self) -> str:
        return f"loss_weight={self.field}"

    def is_in(self, batch: Any) -> bool:
        """Whether the batch has the field."""
        return bool(at_path(batch, self.field))

    def __call__(self, batch: Any) -> torch.Tensor:
        """The number of targets, a 0-dim tensor.

        Raises:
            DataError: the batch has no such field, or it is no tensor, or has no dim to shift along.
        """
        found = at_path(batch, self.field)
        if not found:
            known = paths_in(batch)
            listed = f"it has {', '.join(known[:20])}" if known else f"it is a {type(batch).__name__} without fields"
            raise DataError(f"{self}: the batch has no {self.field!r}: {listed}: name one of them, or give a function of the batch")
        targets = found[0]
        if not isinstance(targets, torch.Tensor):
            raise DataError(
                f"{self}: {self.field!r} of the batch is a {type(targets).__name__}: name the tensor with the loss's targets, or "
                "give a function of the batch that counts them"
            )
        if self.shift and targets.ndim < 2:
            raise DataError(
                f"{self}, shift={self.shift}: {self.field!r} of the batch has shape {tuple(targets.shape)}, and shift leaves out "
                "the start of a sequence, along a second dim: leave shift out"
            )
        return (targets[..., self.shift :] != self.ignore_index).sum()


class FunctionCount:
    """Counts by a function of the user's: a microbatch in, its number of target elements out."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        inner = getattr(function, "func", function)  # of a functools.partial
        self._name = getattr(inner, "__name__", type(inner).__name__)

    def __str__(self) -> str:
        return f"loss_weight={self._name}"

    def is_in(self, batch: Any) -> bool:
        """A function is asked for every batch."""
        return True

    def __call__(self, batch: Any) -> Any:
        """The number of targets, as the function gives it.

        Raises:
            DataError: it gives no number.
        """
        count = self._function(batch)
        if isinstance(count, torch.Tensor) and count.ndim == 0:
            return count
        if isinstance(count, (int, float)) and not isinstance(count, bool):
            return count
        raise _no_count(self, f"a tensor of shape {tuple(count.shape)}" if isinstance(count, torch.Tensor) else repr(count))


TargetCount: TypeAlias = FieldCount | FunctionCount


def read_loss_weight(given: LossWeight | None) -> TargetCount | None:
    """What counts the targets, from what the user typed; None for none.

    Args:
        given: a path into the batch, the attributes of a `FieldCount` as a mapping, or a function.

    Raises:
        ConfigurationError: it is none of these.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        return _read_field(given)
    if callable(given):
        return FunctionCount(given)
    if isinstance(given, (str, int)) and not isinstance(given, bool) and given != "":
        return FieldCount(str(given))
    raise ConfigurationError(
        f"loss_weight={given!r}: name the field of the batch with the loss's targets, such as loss_weight=labels, or give "
        "{field: labels, ignore_index: 0}, or a function of the batch"
    )


def _read_field(given: Mapping[str, Any]) -> FieldCount:
    known = {field.name for field in fields(FieldCount)}
    unknown = sorted(given.keys() - known)
    if unknown or "field" not in given:
        wrong = f"there is no key {unknown[0]!r}" if unknown else "the key 'field' is missing"
        raise ConfigurationError(f"loss_weight={dict(given)}: {wrong}: the keys are field, ignore_index and shift")
    numbers = {key: given[key] for key in ("ignore_index", "shift") if key in given}
    wrong_key = next((key for key, value in numbers.items() if type(value) is not int or (key == "shift" and value < 0)), None)
    if wrong_key is not None:
        raise ConfigurationError(
            f"loss_weight={dict(given)}: {wrong_key} must be an integer{', 0 or more' * (wrong_key == 'shift')}"
        )
    return FieldCount(str(given["field"]), **numbers)


def count_targets(count: TargetCount, microbatches: list[Any]) -> list[float]:
    """The targets of each microbatch. Waits for the device once.

    Raises:
        DataError: they cannot be counted.
    """
    counted = [count(microbatch) for microbatch in microbatches]
    devices = [each.device for each in counted if isinstance(each, torch.Tensor)]
    place = devices[0] if devices else None
    stacked = torch.stack([torch.as_tensor(each, dtype=torch.float64, device=place) for each in counted])
    numbers: list[float] = stacked.tolist()
    wrong = next((number for number in numbers if not 0 <= number < math.inf), None)
    if wrong is not None:
        raise _no_count(count, str(wrong))
    return numbers


def _no_count(count: TargetCount, what: str) -> DataError:
    return DataError(
        f"{count}: the function returned {what}: return the number of target elements in the batch that it is given, an int, a "
        "float or a 0-dim tensor, at least 0"
    )


def check_loss_weight(count: TargetCount, module: Any, batch: Any, num_microbatches: int) -> None:
    """Try ``count`` on the first batch, before any process is started.

    Raises:
        DataError: the batch has no such field, or counts of its parts are not those of the whole.
        ConfigurationError: the module runs its own backward, which nothing is weighed in.
    """
    if not module.automatic_optimization:
        raise ConfigurationError(
            f"{count}: {type(module).__name__} has automatic_optimization=False and runs its own backward, where losses are not "
            "weighed: leave loss_weight out, or use automatic optimization"
        )
    (whole,) = count_targets(count, [batch])
    parts = count_targets(count, [piece for piece, _ in split_batch(batch, num_microbatches)])
    if not math.isclose(sum(parts), whole, rel_tol=1e-6):
        raise DataError(
            f"{count}: it counts {whole:g} targets in the first batch and {' + '.join(f'{part:g}' for part in parts)} in its "
            f"{len(parts)} microbatches, which must be the same: count elements of tensors with the samples along dim 0"
        )
