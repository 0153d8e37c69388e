"""Numbers for the tensors of a running step: a new one for each version that a torch function makes."""

from __future__ import annotations

import torch

from lightning_par.private.torch import Place, beside_fakes, place_of, unseen_by_modes
from lightning_par.trace.record import Value

_SMALL = 1 << 16  # elements


class Numbering:
    """Knows every tensor that it was shown, by the object and by where its elements are.

    Attributes:
        values: what each number stands for.
        objects: for each number, the first one of the same tensor object.
        memories: for each number, the first one of a tensor in the same memory.
    """

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.objects: list[int] = []
        self.memories: list[int] = []
        self._memories: dict[int, int] = {}  # memory -> the first number in it
        self._numbers: dict[int, int] = {}  # id of a tensor -> number of its newest version
        self._places: dict[Place, int] = {}  # where a tensor's elements are -> number of their newest version
        self._views: dict[int, set[Place]] = {}  # memory -> places in it
        self._alive: list[torch.Tensor] = []  # so that no id is used twice

    def number(self, tensor: torch.Tensor, phase: int, new: Value | None = None) -> int:
        """The number of a tensor's newest version; ``new`` makes one."""
        key, place = id(tensor), place_of(tensor)
        if new is None and key in self._numbers:
            return self._numbers[key]
        if new is None and place is not None and place in self._places:  # what autograd saved comes back as another object
            return self._places[place]
        if new is None:  # seen for the first time: there before the step, unless a function that torch does not show made it
            made = tensor.requires_grad
            new = value_of(tensor, made, phase if made else -1, content=_content(tensor))
        number = len(self.values)
        self._alive.append(tensor)
        self.values.append(new)
        self.objects.append(self.objects[self._numbers[key]] if key in self._numbers else number)
        self.memories.append(number if place is None else self._memories.setdefault(place[0], number))
        self._numbers[key] = number
        if place is not None:
            self._places[place] = number
            self._views.setdefault(place[0], set()).add(place)
        return number

    def object_of(self, tensor: torch.Tensor) -> int | None:
        """The first number of this very tensor object; None for one that was not shown."""
        number = self._numbers.get(id(tensor))
        return None if number is None else self.objects[number]

    def has_views(self, tensor: torch.Tensor) -> bool:
        """Whether another tensor was seen that lies elsewhere in the same memory."""
        place = place_of(tensor)
        return place is not None and len(self._views.get(place[0], ())) > 1


def value_of(tensor: torch.Tensor, depends: bool, phase: int, is_batch: bool = False, content: int | None = None) -> Value:
    """What is known of a tensor's newest version."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Value(tuple(tensor.shape), tensor.is_floating_point(), depends, phase, is_batch, content, dtype)


def _content(tensor: torch.Tensor) -> int | None:
    """A number for the elements of a small tensor that numpy may have made."""
    is_plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu" and not tensor.requires_grad
    if not is_plain or place_of(tensor) is None or tensor.dtype == torch.bfloat16 or tensor.numel() > _SMALL:
        return None
    with unseen_by_modes(), beside_fakes():
        return hash(tensor.numpy().tobytes())
