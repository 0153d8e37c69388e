"""Outputs of blocks that are passed over: the same types around other tensors."""

from __future__ import annotations

from collections import UserDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers.modeling_outputs import BaseModelOutput

from lightning_par.plan.output import LeafPlan, OutputPlan, dims_like
from lightning_par.runtime.template import Template, describe, fill, leaf_at, tensors_by_path, types_in


class Named(NamedTuple):
    hidden: Any
    weights: Any


@dataclass(frozen=True)
class Data:
    hidden: Any
    weights: Any
    extra: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        assert not isinstance(self.hidden, str), "runs no code"


ONE, TWO = torch.ones(2, 3), torch.zeros(2)
TREES: dict[str, Callable[[], Any]] = {
    "tensor": lambda: ONE,
    "tuple": lambda: (ONE, None, TWO),
    "list": lambda: [3, ONE, "text", True, 0.5],
    "dict": lambda: {"h": ONE, 7: (TWO,)},
    "namedtuple": lambda: Named(ONE, TWO),
    "dataclass": lambda: Data(ONE, TWO),
    "ModelOutput": lambda: BaseModelOutput(last_hidden_state=ONE, attentions=(TWO,)),
    "UserDict": lambda: UserDict({"h": ONE}),
    "defaultdict": lambda: defaultdict(None, h=ONE),
    "nested": lambda: [Named((ONE,), {"w": Data(TWO, [None])}), ()],
}


def plain(template: Template) -> Template:
    """As a plan in YAML brings it back."""

    def lists(node: Any) -> Any:
        return [lists(item) for item in node] if isinstance(node, tuple) else node

    def tuples(node: Any) -> Any:
        return tuple(tuples(item) for item in node) if isinstance(node, list) else node

    return tuples(yaml.safe_load(yaml.safe_dump(lists(template))))


@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_built_again_from_plain_data(name: str) -> None:
    tree = TREES[name]()
    template = describe(tree)
    assert plain(template) == template
    leaves = {path: tensor + 1 for path, tensor in tensors_by_path(tree)}
    built = fill(template, leaves)
    assert type(built) is type(tree) and describe(built) == template
    found = dict(tensors_by_path(built))
    assert found.keys() == leaves.keys() and all(found[path] is leaves[path] for path in leaves)
    assert all(leaf_at(built, path) is leaves[path] for path in leaves)


def test_what_is_no_container_and_no_constant_is_none() -> None:
    assert describe((object(), torch.float32, ONE)) == ("tuple", (0, 1, 2), (None, None, None))
    assert list(types_in(describe([Named(1, {})]))) == ["list", "tests.test_output:Named", "dict"]


@pytest.mark.parametrize(
    ("shape", "other", "expected"),
    [
        ((4, 6, 16), (2, 9, 16), (2, 9, 16)),
        ((1, 3, 6, 6), (2, 9, 16), (1, 3, 9, 9)),
        ((4, 12, 8), (2, 9, 16), (2, 18, 8)),
        ((), (2, 9, 16), ()),
        ((24, 5), (2, 9, 16), (12, 5)),
    ],
)
def test_shapes_follow_those_of_the_hidden_state(shape: tuple[int, ...], other: tuple[int, ...], expected: tuple[int, ...]) -> None:
    leaf = LeafPlan((1,), dims_like(shape, (4, 6, 16)), "int64")
    plan = OutputPlan(("tuple", (0, 1), (None, None)), (0,), (LeafPlan((0,), dims_like((4, 6, 16), (4, 6, 16))), leaf))
    hidden = torch.ones(other, requires_grad=True)
    placeholders = plan.placeholders(hidden, (hidden,), {})
    assert placeholders.keys() == {(1,)} and placeholders[1,].shape == expected and placeholders[1,].dtype == torch.int64
    first, second = plan.build(hidden, placeholders)
    assert second is placeholders[1,] and first.shape == hidden.shape and first.requires_grad
    assert first is not hidden and first.data_ptr() == hidden.data_ptr()


def test_arguments_are_passed_on_as_the_objects_that_they_are() -> None:
    leaves = (LeafPlan((0,), dims_like((4, 6), (4, 6)), argument=(0,)), LeafPlan((1,), (), argument=("side", "mask")))
    plan = OutputPlan(("tuple", (0, 1), (None, None)), (0,), leaves)
    hidden, mask = torch.ones(4, 6), torch.ones(4)
    built = plan.build(hidden, plan.placeholders(hidden, (hidden,), {"side": {"mask": mask}}))
    assert built[0] is hidden and built[1] is mask


def test_a_hidden_state_of_another_shape_or_dtype_gets_a_placeholder() -> None:
    for leaf, shape, dtype in (
        (LeafPlan((), dims_like((4, 12, 16), (4, 6, 16))), (2, 6, 16), torch.float32),
        (LeafPlan((), dims_like((4, 6, 16), (4, 6, 16)), "bfloat16"), (2, 3, 16), torch.bfloat16),
    ):
        plan, hidden = OutputPlan(None, (), (leaf,)), torch.ones(2, 3, 16)
        built = plan.build(hidden, plan.placeholders(hidden, (hidden,), {}))
        assert (tuple(built.shape), built.dtype) == (shape, dtype)
