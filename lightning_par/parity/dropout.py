"""Training without dropout: a layout draws other masks than one process, and with none both compute the same.

Every way to drop in torch ends in one of the functions below, so it is these that are changed, and no module of the user's:
dropout that a forward calls itself with a probability of its own is found too. Dropout inside torch's LSTM and GRU is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Of each function: the position and the name of the argument that turns dropout off, and the value that does.
_OFF: dict[Callable[..., Any], tuple[int, str, Any]] = {
    **dict.fromkeys(
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), (2, "training", False)
    ),
    **dict.fromkeys((torch.dropout, torch.dropout_, torch.alpha_dropout, torch.alpha_dropout_), (2, "train", False)),
    **dict.fromkeys((torch.feature_dropout, torch.feature_dropout_, torch.native_dropout), (2, "train", False)),
    **dict.fromkeys((torch.feature_alpha_dropout, torch.feature_alpha_dropout_), (2, "train", False)),
    F.scaled_dot_product_attention: (4, "dropout_p", 0.0),
    F.multi_head_attention_forward: (10, "dropout_p", 0.0),
}


class WithoutDropout(TorchFunctionMode):
    """Inside, nothing is dropped.

    Attributes:
        has_dropped: whether anything would have been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.has_dropped = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _OFF:
            position, name, off = _OFF[func]
            given = args[position] if len(args) > position else kwargs.get(name, off)
            self.has_dropped |= given != off and (off is not False or _probability(args, kwargs) > 0)
            if len(args) > position:
                args = (*args[:position], off, *args[position + 1 :])
            else:
                kwargs[name] = off
        return func(*args, **kwargs)


def _probability(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """With which a function drops whose second argument says it."""
    probability: float = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    return probability
