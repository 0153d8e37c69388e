"""A backward in two actions gives the gradients of one, bit for bit: input gradients in I, weight gradients in W.

The products are the same ones, of the same tensors. Only where a weight has gradients of several uses does the order of
their sum differ, and with it the last bit.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  before the fork: else each rank spends seconds on it
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers import Gemma2ForCausalLM, GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401
from transformers.pytorch_utils import Conv1D

from lightning_par.errors import ConfigurationError
from lightning_par.install import install
from lightning_par.layout import parse_layout
from lightning_par.pipeline.tables import choose_schedule
from lightning_par.plan import Plan
from lightning_par.runtime.axis import Axis, LocalAxis
from lightning_par.runtime.deferral import DeferredGradients, Note
from lightning_par.runtime.mesh import Mesh
from lightning_par.split_backward import defer_weight_gradients
from lightning_par.tensor.whole_linear import WholeLinear
from lightning_par.zero.partitioned import DeepSpeedStates
from tests import models
from tests.axes import tp_axis
from tests.parity import MakeModel
from tests.planning import Block, Chain, plan_of
from tests.ranks import run_ranks
from tests.zero_model import Case, Model, build_mesh, build_optimizer, loss_of, microbatches

WIDTH, CPU, ALONE, EAGER = 16, torch.device("cpu"), LocalAxis("tp", 1, 0), "aot_eager"
KEY = (0, 0)
MODELS = {"gpt": models.gpt, "llama": models.llama, "gpt2": models.gpt2, "gemma2": models.gemma2}
Gradients = dict[str, torch.Tensor | None]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    for name in ("pytorch_lightning", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    yield
    torch.compiler.reset()


def gradients_of(module: nn.Module) -> Gradients:
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def differing(expected: Gradients, found: Gradients) -> list[str]:
    """Names of the gradients that are not the same bits."""
    assert expected.keys() == found.keys()
    return [name for name, grad in expected.items() if not same(grad, found[name])]


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other)


def backwards(
    step: Callable[[int], torch.Tensor], module: nn.Module, deferred: DeferredGradients | None, num: int = 1
) -> tuple[Gradients, Gradients]:
    """The gradients after all I of ``num`` microbatches, and after all W; without ``deferred`` twice those of the B."""
    losses = [step(index) for index in range(num)]
    for index, loss in enumerate(losses):
        if deferred is None:
            loss.backward()
        else:
            with deferred.collecting((0, index)):
                loss.backward()
    early = {name: None if grad is None else grad.clone() for name, grad in gradients_of(module).items()}
    for index in range(num) if deferred is not None else ():
        deferred.run((0, index))
    return early, gradients_of(module)


# ---------------------------------------------------------------------- whole modules


@cache
def plan_for(make: MakeModel, word: str, recompute: str, backend: str | None) -> Plan:
    """Made once for every training of a model, and before the fork for those of all ranks."""
    compiled = {} if backend is None else {"compile": backend}
    return plan_of(make(), word, models.make_batch(0, 2), {"recompute": {"*": recompute}, **compiled})


def trained(
    make: MakeModel,
    splits: bool,
    num: int = 1,
    precision: torch.dtype | None = None,
    word: str = "single",
    tp: Axis = ALONE,
    recompute: str = "none",
    backend: str | None = None,
) -> tuple[Gradients, Gradients]:
    """`backwards` of an installed module."""
    plan, deferred = plan_for(make, word, recompute, backend), DeferredGradients() if splits else None
    batches = [models.make_batch(index, 2) for index in range(num)]
    torch.manual_seed(0)
    module = make()
    module.__dict__["log"] = lambda name, value: None
    install(module, plan, 0, tp, CPU, deferred)
    torch.manual_seed(1)

    def step(index: int) -> torch.Tensor:
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            return module.training_step(batches[index], index)  # type: ignore[return-value]

    return backwards(step, module, deferred, num)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_gradients(name: str, recompute: str) -> None:
    _, expected = trained(MODELS[name], False, recompute=recompute)
    early, found = trained(MODELS[name], True, recompute=recompute)
    assert not differing(expected, found)
    late = {name for name, grad in early.items() if grad is None}
    products = {name for name, grad in expected.items() if grad is not None and grad.dim() == 2 and "embed" not in name}
    products -= {"model.transformer.wte.weight", "model.transformer.wpe.weight"}
    assert late >= products and not any("norm" in name or "ln_" in name for name in late)


@pytest.mark.parametrize("name", MODELS)
def test_several_microbatches(name: str) -> None:
    _, expected = trained(MODELS[name], False, num=3)
    _, found = trained(MODELS[name], True, num=3)
    tied = {"gpt2": "model.transformer.wte.weight", "gemma2": "model.model.embed_tokens.weight"}.get(name)
    assert set(differing(expected, found)) <= {tied}
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str, recompute: str) -> None:
    chosen: dict[str, Any] = {"precision": torch.bfloat16, "recompute": recompute}
    _, expected = trained(MODELS[name], False, **chosen)
    _, found = trained(MODELS[name], True, **chosen)
    assert not differing(expected, found)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("name", ["gpt", "gpt2"])
def test_compiled_blocks(name: str, recompute: str) -> None:
    _, expected = trained(MODELS[name], False, recompute=recompute)
    early, found = trained(MODELS[name], True, recompute=recompute, backend=EAGER)
    assert sum(grad is None for grad in early.values()) >= 4 * 4
    for key, grad in expected.items():  # the compiler takes norms and activation functions apart
        torch.testing.assert_close(found[key], grad, rtol=1e-5, atol=1e-7)
    torch.compiler.reset()
    _, found = trained(MODELS[name], True, recompute=recompute, backend="eager")
    assert not differing(expected, found)


# ---------------------------------------------------------------------- what a user's module may do


def check_alike(
    make: Callable[[], nn.Module], x: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[nn.Module, set[str]]:
    """Gradients in two actions are those in one; with ``dtype`` but for the order of a sum in it.

    Returns:
        The module, and what of it had none after I.
    """
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_() if x is None else x
    results = []
    for deferred in (None, DeferredGradients()):
        torch.manual_seed(0)
        module, own = make(), x.detach().clone().requires_grad_(x.requires_grad)
        if deferred is not None:
            defer_weight_gradients(module, deferred)
        early, late = backwards(lambda index, module=module, own=own: module(own).square().sum(), module, deferred)
        results.append((early, {**late, "input": own.grad}))
    (_, expected), (early, found) = results
    if dtype is None:
        assert not differing(expected, found)
    else:
        check_close(expected, found, dtype)
    return module, {name for name, grad in early.items() if grad is None and expected[name] is not None}


def check_close(expected: Gradients, found: Gradients, dtype: torch.dtype) -> None:
    """Within two roundings of the greatest element."""
    assert expected.keys() == found.keys()
    for name, grad in expected.items():
        assert (grad is None) == (found[name] is None), name
        if grad is not None:
            unit = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(found[name], grad, rtol=unit, atol=unit * float(grad.abs().max()))


class Wrapped(nn.Module):
    """Checkpointed by the user."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), Conv1D(WIDTH, 32)), use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_of_the_user(use_reentrant: bool) -> None:
    runs = []

    def make() -> nn.Module:
        module = Wrapped(use_reentrant)
        module.inner[1].register_forward_hook(lambda *_: runs.append(1))
        return module

    _, late = check_alike(make)
    assert late == {f"inner.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    assert len(runs) == 2 * 2  # W computes nothing again


class Adapted(nn.Linear):
    """A layer with an adapter in its own forward."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.up(self.down(x))


class Squared(nn.Linear):
    """A layer that computes something else with its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.square(), self.bias)


class Named(nn.Linear):
    """A subclass that computes as its base does."""


def frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), Named(WIDTH, WIDTH))
    module[0].requires_grad_(False)
    module[1].bias.requires_grad_(False)
    return module


def replaced() -> nn.Module:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    module[0].forward = lambda x: F.linear(x, module[0].weight) * 2  # type: ignore[method-assign]
    return module


class Repeated(nn.Module):
    """Calls one layer twice, reads its weight besides, and leaves another out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(x).tanh()) + self.layer.weight.sum()


def test_which_layers_leave_their_gradient() -> None:
    module, late = check_alike(frozen)
    assert late == {"1.weight", "2.weight", "2.bias"} and type(module[0]) is nn.Linear  # type: ignore[index]
    assert module[1].bias.grad is None  # type: ignore[index]
    assert isinstance(module[2], Named) and repr(module[2]).startswith("Named(in_features=16, out_features=16, bias=True, weight")  # type: ignore[index]
    assert check_alike(lambda: nn.Sequential(Adapted()))[1] == {"0.down.weight", "0.up.weight"}
    module, late = check_alike(replaced)
    assert late == {"1.weight", "1.bias"} and type(module[0]) is nn.Linear  # type: ignore[index]
    module, late = check_alike(lambda: nn.Sequential(Squared(WIDTH, WIDTH)))
    assert late == set() and type(module[0]) is Squared  # type: ignore[index]
    module, late = check_alike(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))))
    assert late == set() and not isinstance(module[0], WholeLinear)  # type: ignore[index]
    assert check_alike(Repeated, dtype=torch.float32)[1] == {"layer.bias"}


@pytest.mark.parametrize("shape", [(WIDTH,), (4, WIDTH), (2, 3, 4, WIDTH), (0, WIDTH)])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(WIDTH, 8), lambda: nn.Linear(WIDTH, 8, bias=False), lambda: Conv1D(8, WIDTH)])
def test_shapes(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    _, late = check_alike(lambda: nn.Sequential(layer()), torch.randn(shape).requires_grad_())
    assert "0.weight" in late
    check_alike(lambda: nn.Sequential(layer()), torch.randn(shape))  # tokens need no gradient


class Mixed(nn.Module):
    """Under autocast: double precision, which stays so, and a weight that is read twice, whose gradients it adds up as bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.exact, self.layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            exact = self.exact(x.double())
            assert exact.dtype == torch.float64
            return F.linear(self.layer(exact.float()), self.layer.weight, self.layer.bias)


def test_precisions_beside_each_other() -> None:
    _, late = check_alike(Mixed, dtype=torch.bfloat16)
    assert late == {"exact.weight", "exact.bias"}


def test_tensors_without_memory() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, 8, device="meta"))
    defer_weight_gradients(module, DeferredGradients())
    assert module(torch.ones(2, WIDTH, device="meta")).shape == (2, 8)


def test_an_output_can_be_changed_in_place() -> None:
    check_alike(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)))


def test_hooks_on_weights_see_their_gradient() -> None:
    seen: list[str] = []
    deferred = DeferredGradients()
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    defer_weight_gradients(module, deferred)
    module[0].weight.register_hook(lambda grad: seen.append("weight") or grad * 0)  # after the installation
    module[1].bias.register_post_accumulate_grad_hook(lambda bias: seen.append("bias"))
    early, late = backwards(lambda index: module(torch.ones(2, WIDTH)).sum(), module, deferred)
    assert sorted(seen) == ["bias", "weight"] and not late["0.weight"].any()  # type: ignore[union-attr]
    assert {name for name, grad in early.items() if grad is None} == {"2.weight", "2.bias"}


def test_weights_put_in_place_of_the_own() -> None:
    deferred, module = DeferredGradients(), nn.Sequential(nn.Linear(WIDTH, WIDTH))
    defer_weight_gradients(module, deferred)
    given = {name: p.detach().clone().requires_grad_() * 1 for name, p in module.named_parameters()}
    for tensor in given.values():
        tensor.retain_grad()
    with deferred.collecting(KEY):
        torch.func.functional_call(module, given, torch.ones(2, WIDTH)).sum().backward()
    assert all(tensor.grad is not None for tensor in given.values()) and module[0].weight.grad is None


class Inward(nn.Module):
    """Asks for a gradient inside its forward, which a recomputation in action I does again."""

    def __init__(self, create_graph: bool) -> None:
        super().__init__()
        self.layer, self.create_graph = nn.Linear(WIDTH, WIDTH), create_graph

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self._forward, x, use_reentrant=False)  # type: ignore[no-any-return]

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x).tanh()
        (slope,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True, create_graph=self.create_graph)
        return y * slope


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gradient_inside_of_a_recomputed_forward(create_graph: bool) -> None:
    check_alike(lambda: Inward(create_graph), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives(dtype: torch.dtype) -> None:
    results = []
    for deferred in (None, DeferredGradients()):
        torch.manual_seed(0)
        module, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)), torch.randn(4, WIDTH).requires_grad_()
        if deferred is not None:
            defer_weight_gradients(module, deferred)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            output = module(x)
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        loss = slope.square().sum() + output.sum()
        backwards(lambda index, loss=loss: loss, module, deferred)
        results.append(gradients_of(module))
    check_close(*results, dtype)


def test_a_copy_leaves_gradients_of_its_own() -> None:
    deferred, module = DeferredGradients(), nn.Sequential(nn.Linear(WIDTH, WIDTH))
    defer_weight_gradients(module, deferred)
    twin = copy.deepcopy(module)
    with deferred.collecting(KEY):
        twin(torch.ones(2, WIDTH)).sum().backward()
    deferred.run(KEY)
    assert twin[0].weight.grad is not None and module[0].weight.grad is None


# ---------------------------------------------------------------------- the store


def note(weight: nn.Parameter, value: float = 1.0) -> Note:
    return Note(weight, None, torch.full((2, 3), value, dtype=weight.dtype), torch.ones(2, 4, dtype=weight.dtype), False)


@contextmanager
def kept(deferred: DeferredGradients, *notes: Note) -> Iterator[None]:
    with deferred.collecting(KEY):
        for each in notes:
            deferred.note(each)
    yield
    deferred.run(KEY)


def test_gradients_add_up_as_those_of_autograd() -> None:
    deferred, weight = DeferredGradients(), nn.Parameter(torch.zeros(4, 3))
    with kept(deferred, note(weight), note(weight, 2.0)):
        assert weight.grad is None
    held = weight.grad
    assert torch.equal(held, torch.full((4, 3), 6.0))  # 2 rows of 1 and of 2
    with kept(deferred, note(weight)):
        pass
    assert weight.grad is held and torch.equal(held, torch.full((4, 3), 8.0))
    with pytest.raises(KeyError):
        deferred.run(KEY)  # each microbatch once
    ordered = nn.Parameter(torch.zeros(4, 3))
    with kept(deferred, *(note(ordered, value) for value in (1e8, -1e8, 1.0))):
        pass
    assert torch.equal(ordered.grad, torch.full((4, 3), 2.0))  # any other order loses the 1 beside 1e8
    lying = nn.Parameter(torch.zeros(3, 4).t())
    with kept(deferred, note(lying)):
        pass
    assert lying.grad is not None and lying.grad.stride() == lying.stride()


def test_gradients_have_the_dtype_that_the_parameter_asks_for() -> None:
    deferred, weight = DeferredGradients(), nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16))
    for dtype in (torch.bfloat16, torch.float32):
        weight.grad, weight.grad_dtype = None, dtype
        for _ in range(2):
            with kept(deferred, note(weight)):
                pass
        assert weight.grad is not None and weight.grad.dtype == dtype


def test_a_failed_step_leaves_nothing() -> None:
    deferred, module = DeferredGradients(), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    defer_weight_gradients(module, deferred)

    def fail(grad: torch.Tensor) -> None:
        raise ValueError("the user's")

    hidden = module[0](torch.ones(2, WIDTH))
    hidden.register_hook(fail)
    with pytest.raises(ValueError, match="the user's"), deferred.collecting(KEY):
        module[1](hidden).sum().backward()
    with pytest.raises(KeyError):
        deferred.run(KEY)
    with deferred.collecting(KEY):
        module(torch.ones(2, WIDTH)).sum().backward()
    deferred.forget()
    with pytest.raises(KeyError):
        deferred.run(KEY)
    module(torch.ones(2, WIDTH)).sum().backward()  # outside of an action I at once
    assert all(grad is not None for grad in gradients_of(module).values())


# ---------------------------------------------------------------------- memory


class Watched(nn.Module):
    """Notes the memory of what its layers read and of what nothing reads after the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read, between = self.norm(x), None
        between = self.up(read)
        mixed = F.gelu(between)
        left = self.down(mixed)
        self.graph = weakref.ref(left.grad_fn)
        self.kept = [StorageWeakRef(tensor.untyped_storage()) for tensor in (read, mixed)]
        self.freed = [StorageWeakRef(tensor.untyped_storage()) for tensor in (between, left)]
        return left.sin()  # whose backward needs what left the layer


def test_what_is_held_between_the_actions() -> None:
    deferred, module = DeferredGradients(), Watched()
    defer_weight_gradients(module, deferred)
    loss = module(torch.randn(2, WIDTH).requires_grad_() * 1).sum()
    assert not any(storage.expired() for storage in module.kept + module.freed)
    with deferred.collecting(KEY):
        loss.backward()
    del loss
    assert module.graph() is None
    assert all(storage.expired() for storage in module.freed) and not any(storage.expired() for storage in module.kept)
    deferred.run(KEY)
    assert all(storage.expired() for storage in module.kept)
    with deferred.collecting(KEY):
        module(torch.randn(2, WIDTH)).sum().backward()
    deferred.forget()
    assert all(storage.expired() for storage in module.kept)


# ---------------------------------------------------------------------- ZeRO


def under_zero(rank: int, world_size: int) -> None:
    for stage in (1, 2):
        case = Case(pp=1, dp=2, tp=1, zero=stage, is_tied=False)
        whole, split = (weights_after(case, build_mesh(case), deferred) for deferred in (None, DeferredGradients()))
        assert not differing(whole, split), stage


def weights_after(case: Case, mesh: Mesh, deferred: DeferredGradients | None, num_steps: int = 3) -> Gradients:
    """The weights after some steps, each of several microbatches."""
    model = Model(case, 0, mesh.tp)
    if deferred is not None:
        defer_weight_gradients(model, deferred)
    states = DeepSpeedStates(model, [build_optimizer(model)], case.zero, mesh)
    for step in range(num_steps):
        (batch,) = microbatches(case, step, mesh.dp.coordinate)
        with states.accumulate():
            early, _ = backwards(
                lambda index, batch=batch: one_loss(case, model, states, *batch[index]), model, deferred, len(batch)
            )
        assert (early["chain.0.up.weight"] is None) == (deferred is not None)
        states.reduce()
        states.step()
        states.zero_grad()
    weights: Gradients = {name: p.detach().clone() for name, p in states.full_parameters()}
    states.close()
    return weights


def one_loss(case: Case, model: Model, states: DeepSpeedStates, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model(ids)
    states.after_forward()
    return loss_of(case, logits, targets)


def test_partitioned_states() -> None:
    run_ranks(under_zero, 2)


@pytest.mark.parametrize(
    ("word", "schedule", "instead"), [("pp2_zero3", "zb-h1", "1f1b"), ("pp2_vp2_dp2_zero3", "interleaved-zb", "interleaved")]
)
def test_zero_3_is_refused(word: str, schedule: str, instead: str) -> None:
    layout = parse_layout(word)
    rule = f"schedule={schedule} computes weight gradients after the backward of their layer, and zero3 has released the weights"
    with pytest.raises(ConfigurationError, match=f"parallel={word}: {rule} by then: use zero2, or schedule={instead}$"):
        choose_schedule(schedule, layout)
    for chosen, other in ((instead, layout), (schedule, parse_layout(word.replace("zero3", "zero2")))):
        assert choose_schedule(chosen, other)[0] == chosen


# ---------------------------------------------------------------------- layers split over tp


SPLIT_MODELS: dict[str, MakeModel] = {**MODELS, "encoder": models.encoder}
SPLIT_CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((name, "tp2", {}) for name in SPLIT_MODELS),
    *((name, "tp2_sp", {}) for name in ("llama", "gpt2")),
    ("llama", "tp2_sp", {"recompute": "full"}),
    ("gpt2", "tp2", {"recompute": "selective"}),
    ("llama", "tp2", {"precision": torch.bfloat16}),
    ("gpt", "tp2", {"backend": EAGER}),
]


def split_cases(rank: int, world_size: int) -> None:
    for name, word, options in SPLIT_CASES:
        what = f"{name} {word} {options}"
        whole_axis, split_axis = tp_axis(), tp_axis()
        _, expected = trained(SPLIT_MODELS[name], False, word=word, tp=whole_axis, **options)
        torch.compiler.reset()
        early, found = trained(SPLIT_MODELS[name], True, word=word, tp=split_axis, **options)
        torch.compiler.reset()
        assert not differing(expected, found), what
        assert whole_axis.calls == split_axis.calls, what
        late = {name for name, grad in early.items() if grad is None}
        assert late >= {name for name in found if is_split(name)}, (what, late)


def is_split(name: str) -> bool:
    """Of the weights of blocks and heads; encoder, demo and transformers have their own names for the same."""
    words = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj c_attn c_proj c_fc lm_head query key value output qkv up down"
    return name.endswith(".weight") and name.split(".")[-2] in words.split()


def test_layers_split_over_tp() -> None:
    for name, word, options in SPLIT_CASES:
        plan_for(SPLIT_MODELS[name], word, options.get("recompute", "none"), options.get("backend"))
    run_ranks(split_cases, 2, timeout=300)


def test_all_linear_layers_of_a_chain_are_converted() -> None:
    module = Chain(Block)
    install(module, plan_of(module, "single"), 0, ALONE, CPU, DeferredGradients())
    linears = [child for child in module.modules() if isinstance(child, nn.Linear)]
    assert len(linears) == 5 and all(isinstance(child, WholeLinear) for child in linears)
