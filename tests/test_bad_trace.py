"""Code that a dry run cannot see through: right as in one process, or whole with a note, or refused with the line to add."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_par.errors import ModelError, PlanError
from lightning_par.install import install
from lightning_par.plan import LayerPlan, Plan
from tests.axes import tp_axis
from tests.models import make_batch
from tests.parity import check_parity
from tests.planning import layer_of, plan_of
from tests.ranks import run_ranks
from tests.zoo_written import HEADS, WIDTH, Decoder

Run = Callable[[Any, torch.Tensor], torch.Tensor]
Make = Callable[[], nn.Module]
HEAD = WIDTH // HEADS


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Code(nn.Module):
    """A residual block around any code on a column layer ``up``, a row layer ``down`` and other modules."""

    def __init__(self, run: Run, **modules: Callable[[], Any]) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        for name, make in modules.items():
            setattr(self, name, make())
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.run(self, self.norm(x))


def code(run: Run, **modules: Callable[[], Any]) -> Callable[[], Decoder]:
    return lambda: Decoder(lambda: Code(run, **modules))


def linear(inputs: int, outputs: int) -> Callable[[], nn.Linear]:
    return lambda: nn.Linear(inputs, outputs)


def planned(make: Callable[[], Decoder], **lines: Any) -> Plan:
    return plan_of(make(), "tp2", make_batch(0, 8), lines)


def heads(y: torch.Tensor) -> torch.Tensor:
    return y.unflatten(-1, (-1, HEAD))


# ---------------------------------------------------------------------- right in spite of it


def branches_on_the_hidden_state(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.up(x)
    if x.abs().sum() > 0:  # the dry run assumes that it is not
        y = m.middle(y / y.norm(dim=-1, keepdim=True))
    return m.down(y)


def branches_on_parts(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.up(x)
    return m.down(y * 2 if y.sum() > 0 else y / y.abs().max().item())


def fills_a_buffer(m: Any, x: torch.Tensor) -> torch.Tensor:
    buffer = x.new_zeros(*x.shape[:2], 128)
    buffer[..., :64] = m.up(x)
    buffer[..., 64:].copy_(torch.tanh(m.up(x)))
    first, second = buffer.chunk(2, -1)
    return m.down(first * second)


def keeps_statistics(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.up(x)
    with torch.no_grad():
        m.seen.weight.lerp_(y.abs().amax((0, 1)), 0.5)
        scale = torch.empty_like(y)
        torch.mul(y, 0.5, out=scale)
    return m.down(y * scale / (1 + m.seen.weight))


def changes_data(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.up(x)
    y.data.div_(y.data.abs().amax(-1, keepdim=True))
    y.data = y.data * 0.5
    return m.down(y)


def changes_in_place(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.up(x)
    y *= 2
    return m.down(y.add_(1).relu_()).mul_(0.5)


def sums_over_other_heads(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k = heads(m.q(x)), heads(m.k(x))
    return m.o((q * torch.einsum("bthd,btgd->bth", q, k).unsqueeze(-1)).flatten(2))


def softmax_without_a_dim(m: Any, x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return m.o(F.softmax(heads(m.q(x)).transpose(1, 2)).transpose(1, 2).flatten(2))


def numbers_from_numpy(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.up(x)
    return m.down(y * torch.from_numpy(np.array([1 / y.shape[-1]], dtype=np.float32)))


def one_gate_for_each_position(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.down(F.gelu(m.up(x)) * torch.sigmoid(m.gate(x)) * m.scale.weight.exp()[0])


def normalises_heads_and_all(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.o(F.gelu(m.shared(heads(m.q(m.shared(heads(x)).flatten(2))))).flatten(2))


RIGHT: dict[str, Callable[[], Decoder]] = {
    "one column layer on two streams": code(lambda m, x: m.down(F.gelu(m.up(x)) * torch.sigmoid(m.up(x.flip(1))))),
    "an unseen branch": code(branches_on_the_hidden_state, middle=linear(64, 64)),
    "a branch on parts": code(branches_on_parts),
    "a buffer filled in place": code(fills_a_buffer),
    "statistics of parts": code(keeps_statistics, seen=lambda: nn.RMSNorm(64)),
    "data changed behind autograd": code(changes_data),
    "in place": code(changes_in_place),
    "attention over the heads": code(
        lambda m, x: m.o(F.scaled_dot_product_attention(*(heads(y(x)) for y in (m.q, m.k, m.v))).flatten(2)),
        q=linear(WIDTH, WIDTH), k=lambda: nn.Linear(WIDTH, WIDTH, bias=False), v=linear(WIDTH, WIDTH), o=linear(WIDTH, WIDTH),
    ),
    "a sum over other heads": code(sums_over_other_heads, q=linear(WIDTH, WIDTH), k=linear(WIDTH, WIDTH), o=linear(WIDTH, WIDTH)),
    "softmax over nothing named": code(softmax_without_a_dim, q=linear(WIDTH, WIDTH), o=linear(WIDTH, WIDTH)),
    "half of the outputs": code(lambda m, x: m.small(m.up(x).narrow(-1, 0, 32)), small=linear(32, WIDTH)),
    "every second output": code(
        lambda m, x: m.small(m.up(x).chunk(2, -1)[0] * m.up(x).chunk(2, -1)[1] + m.up(x)[..., ::2]), small=linear(32, WIDTH)
    ),
    "numbers from numpy": code(numbers_from_numpy),
    "a gate for each position": code(one_gate_for_each_position, gate=linear(WIDTH, 1), scale=lambda: nn.RMSNorm(64)),
    "one norm for heads and all": code(
        normalises_heads_and_all, shared=lambda: nn.LayerNorm(HEAD), q=linear(WIDTH, WIDTH), o=linear(WIDTH, WIDTH)
    ),
    "a hook on a gradient": code(lambda m, x: m.down(hooked(m.up(x)))),
    "a gradient inside the step": code(lambda m, x: m.down(F.gelu(m.up(x))) + gradient_of(m, x)),
}  # fmt: skip


def hooked(y: torch.Tensor) -> torch.Tensor:
    if y.requires_grad:
        y.register_hook(lambda grad: grad / (grad.norm() + 1e-3))
    return y


def gradient_of(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        return torch.autograd.grad(m.down(F.gelu(m.up(z))).sum(), z)[0]


def test_code_that_a_dry_run_cannot_see_through_is_right() -> None:
    check_parity(RIGHT, "tp2")


def test_what_reads_values_gets_global_shapes() -> None:
    plan = planned(RIGHT["an unseen branch"])
    assert layer_of(plan, "up").activation == "global"
    assert "blocks.0 reads a value of a tensor (__bool__); the dry run assumes False" in plan.notes
    assert any(note.startswith("2 x middle.weight not split over tp: the dry run did not come to it") for note in plan.notes)


def squashed(m: Any, z: torch.Tensor) -> torch.Tensor:
    return m.down(F.gelu(m.up(z)) if m.training else m.up(z).softmax(-1))


def fails_in_evaluation(m: Any, z: torch.Tensor) -> torch.Tensor:
    assert m.training
    return m.down(F.gelu(m.up(z)))


def evaluated(rank: int, world_size: int) -> float:
    """The loss in evaluation mode, alone or on two ranks."""
    torch.manual_seed(0)
    module, batch = code(squashed)(), make_batch(0, 8)
    module.log = lambda *args: None
    if world_size > 1:
        install(module, planned(code(squashed)), 0, tp_axis(), torch.device("cpu"))
    with torch.no_grad():
        return float(module.eval().training_step(batch, 0))


def test_code_that_evaluates_in_another_way_is_right_there_too() -> None:
    assert layer_of(planned(code(squashed)), "up").activation == "global"
    assert layer_of(planned(code(fails_in_evaluation)), "up").activation == "local"
    alone = evaluated(0, 1)
    assert run_ranks(evaluated, 2) == pytest.approx([alone] * 2, rel=1e-6)


# ---------------------------------------------------------------------- whole, with what it costs


class Halved(torch.autograd.Function):
    """A backward that no dry run can run."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.from_numpy(grad.numpy() / 2)


def clamps_its_weight(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        m.up.weight.clamp_(-0.1, 0.1)
    return m.down(F.gelu(m.up(x)))


class Aliased(Code):
    """Reads a weight past its layer, by an attribute of its own."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: m.down(F.gelu(m.up(x))) + F.linear(x, m.alias[:WIDTH]))
        self.alias = self.up.weight.data


class Tied(Code):
    def __init__(self) -> None:
        super().__init__(lambda m, x: m.second(F.gelu(m.first(x))), first=linear(WIDTH, WIDTH), second=linear(WIDTH, WIDTH))
        self.second.weight = self.first.weight  # type: ignore[assignment, union-attr]


class Hooked(Code):
    """The user's own code sees gradients: of a weight, or of what goes through a module."""

    def __init__(self, of_weight: bool) -> None:
        super().__init__(lambda m, x: m.down(m.act(m.up(x))), act=nn.GELU)
        if of_weight:
            self.up.weight.register_hook(lambda grad: grad / (1 + grad.norm()))
        else:
            self.act.register_full_backward_hook(lambda module, into, out: (into[0] / (1 + into[0].norm()),))  # type: ignore[operator, union-attr]


twice = code(lambda m, x: m.square(F.gelu(m.square(x))), square=linear(WIDTH, WIDTH))
WHOLE: dict[str, tuple[Callable[[], Decoder], str, str]] = {
    "column and row": (twice, "square", "it reads the hidden state in one call and parts of it in another"),
    "weight read": (
        code(lambda m, x: m.down(F.gelu(m.up(x))) + F.linear(x, m.up.weight[:WIDTH])),
        "up",
        "its weight is read by __getitem__ in the block",
    ),
    "bias read": (
        code(lambda m, x: m.down(F.gelu(m.up(x))) * m.up.bias.norm()),
        "up",
        "its bias is read by norm in the block",
    ),
    "weight changed": (code(clamps_its_weight), "up", "its weight is read by clamp_ in the block"),
    "weight aliased": (lambda: Decoder(Aliased), "up", "its weight is bound: alias shares its memory"),
    "weights tied": (lambda: Decoder(Tied), "first", "tied to blocks.0.second"),
    "weight hooked": (lambda: Decoder(lambda: Hooked(True)), "up", "its weight is bound: a hook on it sees its gradient"),
    "module hooked": (lambda: Decoder(lambda: Hooked(False)), "up", "its output goes into a backward hook of GELU"),
    "backward unseen": (
        code(lambda m, x: m.down(F.gelu(Halved.apply(m.up(x))))),
        "up",
        "its output goes into the autograd.Function Halved, whose backward cannot be run dry",
    ),
    "meets the hidden state": (
        code(lambda m, x: m.wide(torch.cat([F.gelu(m.up(x)), x], -1)), wide=linear(64 + WIDTH, WIDTH)),
        "up",
        "its output meets the hidden state before a row layer (cat in the block)",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_cannot_be_decided_stays_whole_with_a_note(name: str) -> None:
    make, layer, why = WHOLE[name]
    plan = planned(make)
    assert layer_of(plan, layer).kind == "replicate"
    (note,) = (note for note in plan.notes if f" x {layer} not split over tp: {why}" in note)
    numel = make().blocks[0].get_submodule(layer).weight.numel() * int(note.split(" x ")[0])
    assert f"every rank keeps {numel:,} parameters and 0." in note and "GFLOP of the forward" in note


def test_what_stays_whole_is_right() -> None:
    check_parity({name: make for name, (make, _, _) in WHOLE.items()}, "tp2")


def test_a_line_settles_what_could_not_be_decided() -> None:
    assert any(note.endswith("plan.split={blocks.*.square: row}") for note in planned(twice).notes)
    for kind in ("row", "column"):
        lines = {"split": {"blocks.*.square": kind}}
        assert layer_of(planned(twice, **lines), "square").kind == kind
        check_parity({kind: twice}, "tp2", plan=lines)


# ---------------------------------------------------------------------- refused


class Normed(torch.autograd.Function):
    """The backward mixes what ranks hold apart."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad / (1 + grad.norm())


def writes_into_a_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.up(x).clone()
    y[..., : y.size(-1) // 2].mul_(3)
    return m.down(y)


def picks_rows(m: Any, x: torch.Tensor) -> torch.Tensor:
    kept, out = x[..., 0] > 0, torch.zeros_like(x)
    out[kept] = m.down(F.gelu(m.up(x[kept])))
    return out


class TiedFused(Code):
    def __init__(self) -> None:
        super().__init__(self.gated, one=linear(WIDTH, 64), small=linear(32, WIDTH))
        self.one.weight = self.up.weight  # type: ignore[assignment, union-attr]

    @staticmethod
    def gated(m: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = m.one(x).chunk(2, -1)
        return m.small(F.silu(gate) * up) + m.down(F.gelu(m.up(x)))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (code(lambda m, x: m.down(F.gelu(Normed.apply(m.up(x))))), "apply in blocks.0 .* Normed was applied to a sharded tensor"),
        (code(writes_into_a_view), "mul_ in blocks.0 changes a view of split activations in place"),
        (code(picks_rows), "__getitem__ in blocks.0 depends on local sizes"),
        (lambda: Decoder(TiedFused), r"share one weight and take it apart in parts of \[.*\] and \[.*\]"),
    ],
    ids=["a backward that mixes parts", "a write into a view", "shapes that depend on values", "one weight, two cuts"],
)  # fmt: skip
def test_an_error_names_module_reason_and_the_line_that_settles_it(make: Callable[[], Decoder], text: str) -> None:
    with pytest.raises(ModelError, match=text) as refused:
        planned(make)
    written = re.search(r"plan\.split=\{(.*)\}", str(refused.value))
    assert written is not None
    split = dict(line.split(": ") for line in written.group(1).split(", "))
    assert set(split.values()) == {"replicate"}
    every_block = {re.sub(r"(?<=\.)\d+(?=\.)", "*", pattern): kind for pattern, kind in split.items()}
    assert all(kind(planned(make, split=every_block), pattern) == "replicate" for pattern in every_block)


def kind(plan: Plan, pattern: str) -> str:
    found: LayerPlan | None = plan.layer(pattern.replace(".*.", ".0."))
    return found.kind if found is not None else "replicate"


def test_second_derivatives_are_refused() -> None:
    def penalised(m: Any, x: torch.Tensor) -> torch.Tensor:
        z = x.detach().requires_grad_()
        return m.down(m.up(x)) + torch.autograd.grad(m.down(m.up(z).square()).sum(), z, create_graph=True)[0]

    with pytest.raises(
        ModelError, match=r"blocks\.0 calls torch.autograd.grad with create_graph=True, .* no second derivatives: use"
    ):
        planned(code(penalised))


# ---------------------------------------------------------------------- the user's own lines


@pytest.mark.parametrize(
    ("name", "layer", "why"),
    [
        ("softmax over nothing named", "q", "softmax in blocks.0 works along the dim that is split"),
        ("half of the outputs", "up", "narrow in blocks.0"),
        ("attention over the heads", "q", "scaled_dot_product_attention in blocks.0 works along the dim that is split"),
        ("a sum over other heads", "q", "einsum in blocks.0 works along the dim that is split"),
        ("one norm for heads and all", "q", "layer_norm in blocks.0.shared reads blocks.0.shared.*, which is also used on whole"),
        ("a gate for each position", "up", "mul in blocks.0 reads a whole tensor made of parameters"),
    ],
)
def test_a_consumer_that_needs_it_whole_is_found_on_fake_tensors(name: str, layer: str, why: str) -> None:
    with pytest.raises(PlanError, match=rf"plan.activation=.*: local}}: {why}.*: remove the line"):
        planned(RIGHT[name], split={f"blocks.*.{layer}": "column"}, activation={f"blocks.*.{layer}": "local"})


def test_a_column_layer_whose_consumer_needs_it_whole_is_gathered() -> None:
    make, _, _ = WHOLE["meets the hidden state"]
    lines = {"split": {"blocks.*.up": "column"}}
    assert layer_of(planned(make, **lines), "up").activation == "global"
    check_parity({"gathered": make}, "tp2", plan=lines)
