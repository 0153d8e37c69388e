"""What a Trainer keeps, as JSON: loops, schedulers, callbacks, hyperparameters.

Values that JSON does not know are written with a tag: ``{"$": "tuple", "value": [1, 2]}``. Tensors go into a file of their own, of
which the JSON has the key. What is left can only be pickled, and reading a pickle may run any code: it goes into a file apart,
which is read on demand.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path, PosixPath
from typing import Any, NamedTuple

import numpy
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

_TAG = "$"


class Plain(NamedTuple):
    """Values taken apart by `take_apart`.

    Attributes:
        json: the values, with keys where tensors and odd ones were.
        tensors: by key.
        odd: what only a pickle can hold, by its place, such as ``callbacks.Mine.state``.
    """

    json: Any
    tensors: dict[str, torch.Tensor]
    odd: dict[str, Any]


def take_apart(value: Any) -> Plain:
    """Values of any kind as JSON, and copies of the tensors in them. Inverse of `put_together`."""
    plain = Plain({}, {}, {})
    return plain._replace(json=_encode(value, "", plain))


def put_together(json: Any, tensors: Mapping[str, torch.Tensor], odd: Mapping[str, Any] | None) -> Any:
    """The values that `take_apart` was given.

    Args:
        json, tensors, odd: what it gave. Without ``odd``, entries of dicts that would be an odd value are left out, and items of
            lists are None.

    Raises:
        KeyError, ValueError, TypeError: not what it gave.
    """

    def decode(each: Any) -> Any:
        if isinstance(each, list):
            return [decode(item) for item in each]
        if not isinstance(each, dict):
            return each
        if _TAG not in each:
            return {key: decode(item) for key, item in each.items() if not is_left_out(item)}
        tag, value = each[_TAG], each["value"]
        if tag == "tensor":
            return tensors[value]
        if tag == "odd":
            return None if odd is None else odd[value]
        if tag == "dict":
            return {decode(key): decode(item) for key, item in value if not is_left_out(item)}
        return _KINDS[tag].read(decode(value))

    def is_left_out(each: Any) -> bool:
        return odd is None and isinstance(each, dict) and each.get(_TAG) == "odd"

    return decode(json)


def odd_places(json: Any) -> list[str]:
    """Where odd values were in what `take_apart` gave."""
    if isinstance(json, dict):
        return [json["value"]] if json.get(_TAG) == "odd" else [place for each in json.values() for place in odd_places(each)]
    return [place for each in json for place in odd_places(each)] if isinstance(json, list) else []


def _encode(value: Any, where: str, plain: Plain) -> Any:
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized:
        key = str(len(plain.tensors))
        plain.tensors[key] = value.detach().cpu().contiguous().clone()
        return {_TAG: "tensor", "value": key}
    if type(value) is list:
        return [_encode(each, f"{where}[{index}]", plain) for index, each in enumerate(value)]
    if type(value) in (dict, defaultdict):
        items = [(key, _encode(each, f"{where}.{key}".lstrip("."), plain)) for key, each in value.items()]
        if all(type(key) is str and key != _TAG for key in value):
            return dict(items)
        return {_TAG: "dict", "value": [[_encode(key, where, plain), each] for key, each in items]}
    tag = _tag_of(value)
    if tag is not None:
        return {_TAG: tag, "value": _encode(_KINDS[tag].write(value), where, plain)}
    plain.odd[where] = value
    return {_TAG: "odd", "value": where}


def _tag_of(value: Any) -> str | None:
    if isinstance(value, (numpy.generic, numpy.ndarray)):
        return ("number" if isinstance(value, numpy.generic) else "array") if value.dtype.kind in "biufcSU" else None
    if isinstance(value, type):
        return "class" if value in _CLASSES else None
    return next((tag for tag, kind in _KINDS.items() if type(value) in kind.types), None)


class _Kind(NamedTuple):
    """How values of some types are written: as values that are easier to write."""

    types: tuple[type, ...]
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _write_array(array: Any) -> Any:
    return [array.dtype.str, list(array.shape), array.tobytes().hex()]


def _read_array(words: Any) -> Any:
    dtype, shape, data = words
    return numpy.frombuffer(bytes.fromhex(data), dtype).reshape(shape).copy()


_CLASSES = (DictConfig, ListConfig)  # what Lightning keeps as the type of hyperparameters
_KINDS = {
    "float": _Kind((float,), str, float),  # those that are not finite
    "tuple": _Kind((tuple,), list, tuple),
    "size": _Kind((torch.Size,), list, torch.Size),
    "set": _Kind((set,), list, set),
    "frozenset": _Kind((frozenset,), list, frozenset),
    "ordered": _Kind((OrderedDict,), lambda value: list(value.items()), OrderedDict),
    "bytes": _Kind((bytes,), bytes.hex, bytes.fromhex),
    "complex": _Kind((complex,), str, complex),
    "dtype": _Kind((torch.dtype,), lambda value: str(value).removeprefix("torch."), lambda name: _dtype(name)),
    "device": _Kind((torch.device,), str, torch.device),
    "duration": _Kind((timedelta,), lambda value: [value.days, value.seconds, value.microseconds], lambda each: timedelta(*each)),
    "path": _Kind((Path, PosixPath), str, Path),
    "config": _Kind(_CLASSES, OmegaConf.to_yaml, OmegaConf.create),
    "class": _Kind((), lambda kind: kind.__name__, lambda name: {kind.__name__: kind for kind in _CLASSES}[name]),
    "array": _Kind((), _write_array, _read_array),
    "number": _Kind((), _write_array, lambda words: _read_array(words)[()]),
}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch.{name} is no dtype")
    return dtype
