"""Values of a Trainer as JSON and back."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lightning_par.checkpoint.plain import odd_places, put_together, take_apart


def through_json(value: Any, is_trusted: bool = False) -> Any:
    plain = take_apart(value)
    return put_together(json.loads(json.dumps(plain.json)), plain.tensors, plain.odd if is_trusted else None)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        2**70,
        0.1,
        math.inf,
        "words",
        [1, [2.5, None]],
        (1, (2, "a")),
        {"a": {"b": [1, (2,)]}},
        {1: "a", (2, 3): "b", None: "c"},
        {"$": "tuple", "value": [1]},
        {1, 2},
        frozenset({"a"}),
        OrderedDict([("b", 1), ("a", (2,))]),
        b"\x00\xff",
        1 + 2j,
        torch.bfloat16,
        torch.device("cuda", 1),
        torch.Size((2, 3)),
        timedelta(days=1, microseconds=3),
        Path("a/b"),
        np.float32(0.1),
        np.int64(7),
        np.bool_(True),
    ],
    ids=repr,
)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    back = through_json({"key": value})["key"]
    assert type(back) is type(value)
    assert back == value


def test_tensors_arrays_and_configs_come_back() -> None:
    value = {"t": torch.arange(6.0).view(2, 3).bfloat16().t(), "s": torch.tensor(3), "a": np.arange(6).reshape(2, 3)}
    back = through_json(value)
    for key in "ts":
        assert torch.equal(back[key], value[key]) and back[key].dtype == value[key].dtype
    np.testing.assert_array_equal(back["a"], value["a"])
    assert math.isnan(through_json({"a": math.nan})["a"])
    config = OmegaConf.create({"a": {"b": [1, "${a.c}"], "c": 2}})
    assert through_json([config])[0] == config


def test_copies_are_taken() -> None:
    tensor = torch.ones(2)
    plain = take_apart([tensor])
    tensor.zero_()
    assert put_together(plain.json, plain.tensors, None)[0].tolist() == [1, 1]


class Odd:
    """Only a pickle can hold it."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd)


def test_odd_values_are_left_out_unless_they_are_trusted() -> None:
    value = {"callbacks": {"Mine": {"state": Odd(), "count": 3}}, "list": [1, Odd()], 4: Odd()}
    plain = take_apart(value)
    assert sorted(odd_places(plain.json)) == ["4", "callbacks.Mine.state", "list[1]"]
    assert through_json(value) == {"callbacks": {"Mine": {"count": 3}}, "list": [1, None]}
    assert through_json(value, is_trusted=True) == value
    assert odd_places(take_apart({"objects": np.array([Odd()], dtype=object)}).json) == ["objects"]
