"""Chains of every kind cut into stages: what the plan says crosses each boundary is all that the stages need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightning_par.errors import ModelError, PlanError
from lightning_par.layout import parse_layout
from lightning_par.plan import Plan, render_plan
from lightning_par.plan.plan import CarriedPlan
from lightning_par.prepare import prepare_plan
from lightning_par.runtime.template import arguments_of, leaf_at
from tests.chains import CHAINS, Diffusion, Experts, LongSkips, MakeModel, Pyramid, Reader, Relative, Skip, WithEmbeddings
from tests.models import gpt, make_batch
from tests.planning import Block, Chain, plan_of, tokens
from tests.zoo import ENCODER_DECODERS

ALL: dict[str, MakeModel] = {**CHAINS, **ENCODER_DECODERS}


def batch_for(name: str, size: int) -> Any:
    return make_batch(0, size) if name in ENCODER_DECODERS else tokens(size)


# ---------------------------------------------------------------------- stages by hand


class Exit(BaseException):
    """The first block of the next stage was called."""


@dataclass
class OneStage:
    """One stage of a plan, run by hand: what it does not hold is not a number, so that nothing of it may reach the loss."""

    module: nn.Module
    plan: Plan
    stage: int
    shown: dict[CarriedPlan, torch.Tensor] = field(default_factory=dict)  # objects that the code holds
    arrived: list[torch.Tensor] = field(default_factory=list)
    leaving: list[torch.Tensor] = field(default_factory=list)

    def run(self, batch: Any, received: list[torch.Tensor]) -> torch.Tensor | None:
        """The loss, or None where tensors leave: the hidden state, then what is carried."""
        chain, bounds = self.plan.chain, self.plan.stages[self.stage]
        assert chain is not None
        self._forget()
        for one in {*self._into(self.stage), *self._into(self.stage + 1)}:
            if one.place == "output":
                self.module.get_submodule(one.module).register_forward_hook(self._watch(one))
        for index, path in enumerate(chain.blocks):
            block = self.module.get_submodule(path)
            if index < bounds.first:
                block.forward = self._pass(index)  # type: ignore[method-assign]
            elif index == bounds.first > 0:
                block.register_forward_pre_hook(self._begin(index, received), with_kwargs=True)
            elif index == bounds.last:
                block.register_forward_pre_hook(self._end(index), with_kwargs=True)
        with torch.set_grad_enabled(self.stage == 0):
            try:
                loss: torch.Tensor = self.module.training_step(batch, 0)  # type: ignore[operator]
                return loss
            except Exit:
                return None

    def _into(self, stage: int) -> tuple[CarriedPlan, ...]:
        return self.plan.boundaries[stage - 1] if 0 < stage < len(self.plan.stages) else ()

    def _forget(self) -> None:
        for parameter in self.plan.parameters:
            if self.stage not in parameter.spec.stages:
                self.module.get_parameter(parameter.spec.name).data.fill_(torch.nan)

    def _watch(self, one: CarriedPlan) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.shown[one] = leaf_at(output, one.path)

        return hook

    def _pass(self, index: int) -> Callable[..., Any]:
        assert self.plan.chain is not None
        where, output = self.plan.chain.carry_argument[index], self.plan.chain.outputs[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = arguments_of(args, kwargs)[where]
            return output.build(hidden, output.placeholders(hidden, args, kwargs))

        return forward

    def _begin(self, index: int, received: list[torch.Tensor]) -> Callable[..., Any]:
        assert self.plan.chain is not None
        where = self.plan.chain.carry_argument[index]

        def hook(block: nn.Module, args: Any, kwargs: Any) -> Any:
            torch.set_grad_enabled(True)
            hidden = received[0].clone().requires_grad_()
            self.arrived = [hidden]
            for one, tensor in zip(self._into(self.stage), received[1:], strict=True):
                held = leaf_at(arguments_of(args, kwargs), one.path) if one.place == "argument" else self.shown[one]
                held.data = tensor.clone()
                self.arrived.append(held.requires_grad_(one.has_gradient))
            changed = {**arguments_of(args, kwargs), where: hidden}
            return tuple(changed[key] for key in range(len(args))), {key: changed[key] for key in kwargs}

        return hook

    def _end(self, index: int) -> Callable[..., Any]:
        assert self.plan.chain is not None
        where = self.plan.chain.carry_argument[index]

        def hook(block: nn.Module, args: Any, kwargs: Any) -> None:
            arguments = arguments_of(args, kwargs)
            carried = (
                leaf_at(arguments, one.path) if one.place == "argument" else self.shown[one] for one in self._into(self.stage + 1)
            )
            self.leaving = [arguments[where], *carried]
            raise Exit

        return hook

    def backward(self, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The gradients of what has arrived, from those of what has left."""
        pairs = [(tensor, grad) for tensor, grad in zip(self.leaving, gradients, strict=True) if tensor.requires_grad]
        torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])
        return [None if tensor.grad is None else tensor.grad for tensor in self.arrived]


def by_stages(module: nn.Module, plan: Plan, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of the stages one after the other."""
    stages = [OneStage(copy.deepcopy(module), plan, stage) for stage in range(len(plan.stages))]
    received: list[torch.Tensor] = []
    for stage in stages:
        loss = stage.run(batch, [tensor.detach() for tensor in received])
        received = stage.leaving
    assert loss is not None
    loss.backward()
    gradients = [tensor.grad for tensor in stages[-1].arrived]
    for stage in reversed(stages[:-1]):
        zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(stage.leaving, gradients, strict=True)]
        gradients = stage.backward(zeros)
    sums: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, parameter in stage.module.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, torch.zeros(())) + parameter.grad
    return loss.detach(), sums


@pytest.mark.parametrize("word", ["pp2", "pp4"])
@pytest.mark.parametrize("name", ALL)
def test_stages_by_hand_equal_one_process(name: str, word: str) -> None:
    """On a smaller batch than that of the dry run, as microbatches are."""
    torch.manual_seed(0)
    module, batch = ALL[name](), batch_for(name, 2)
    plan = plan_of(module, word, batch_for(name, 4))
    loss, gradients = by_stages(module, plan, batch)
    alone = copy.deepcopy(module)
    expected: torch.Tensor = alone.training_step(batch, 0)
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, expected.detach())
    for parameter_name, parameter in alone.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[parameter_name], parameter.grad, msg=lambda m, n=parameter_name: f"{n}: {m}")


def test_the_gradient_of_what_crosses_counts() -> None:
    """The test above fails where a carried tensor is left out."""
    torch.manual_seed(0)
    module = Diffusion()
    plan = plan_of(module, "pp2")
    (received,) = plan.boundaries
    assert [(one.place, one.path, one.has_gradient) for one in received] == [("argument", (1,), True)]
    object.__setattr__(plan, "boundaries", ((),))
    loss, _ = by_stages(module, plan, tokens())
    assert loss.isnan()


# ---------------------------------------------------------------------- what the plan says


def boundaries(module: nn.Module, word: str, batch: Any = None) -> list[list[str]]:
    """``module(path)`` of arguments and ``module[path]`` of outputs, by boundary."""
    return [
        [
            f"{one.module}({'.'.join(map(str, one.path))})"
            if one.place == "argument"
            else f"{one.module}[{'.'.join(map(str, one.path))}]"
            for one in received
        ]
        for received in plan_of(module, word, batch).boundaries
    ]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Chain(Block, depth=4), [[], [], []]),
        (lambda: WithEmbeddings(Reader, depth=4), [["blocks.1(1)"], ["blocks.2(1)"], ["blocks.3(1)"]]),
        (lambda: Skip(Block, depth=4), [["embedding[]"], ["embedding[]"], ["embedding[]"]]),
        (Diffusion, [["blocks.1(1)"], ["blocks.2(1)"], ["blocks.3(1)"]]),
        (Relative, [["blocks.1(bias)"], ["blocks.2(bias)"], ["blocks.3(bias)"]]),
        (Experts, [["blocks.0[1]"], ["blocks.0[1]", "blocks.1[1]"], ["blocks.0[1]", "blocks.1[1]", "blocks.2[1]"]]),
        (LongSkips, [["blocks.1(0)"], ["blocks.0[]", "blocks.2(0)"], ["blocks.3(1)"]]),
    ],
    ids=["nothing", "embeddings", "a skip", "a condition", "a bias", "router logits", "long skips"],
)
def test_what_crosses(make: MakeModel, expected: list[list[str]]) -> None:
    assert boundaries(make(), "pp4") == expected


def test_an_encoder_and_a_decoder_are_one_chain() -> None:
    plan = plan_of(ENCODER_DECODERS["T5"](), "pp4", make_batch(0, 4))
    assert plan.chain is not None and plan.chain.paths == ("model.encoder.block", "model.decoder.block")
    assert plan.chain.blocks == tuple(f"model.{part}.block.{i}" for part in ("encoder", "decoder") for i in (0, 1))
    carried = {one.path: one.has_gradient for one in plan.boundaries[2]}
    # states of the encoder, the bias of the decoder; that of its cross attention is a mask, which only its first block makes
    assert carried == {(3,): True, (2,): True, (5,): False}
    stages = {parameter.spec.name: parameter.spec.stages for parameter in plan.parameters}
    assert stages["model.encoder.final_layer_norm.weight"] == (1,)
    assert stages["model.shared.weight"] == (0, 1, 3)  # tokens of the encoder, of the decoder, and the head
    assert [(stage.first, stage.last) for stage in plan.stages] == [(0, 1), (1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("word", ["single", "tp2"])
def test_both_chains_have_blocks_without_a_pipeline_too(word: str) -> None:
    plan = plan_of(ENCODER_DECODERS["cross attention"](), word, make_batch(0, 4), {"recompute": {"encoder.*": "full"}})
    assert plan.chain is not None and plan.chain.paths == ("encoder", "decoder") and plan.boundaries == ()
    assert plan.chain.recompute == ("full", "full", "none", "none")


def test_under_sp_the_larger_container_is_the_chain() -> None:
    plan = plan_of(ENCODER_DECODERS["cross attention"](), "tp2_sp", make_batch(0, 4))
    assert plan.chain is not None and plan.chain.paths == ("decoder",)


def test_the_chains_can_be_chosen() -> None:
    make = ENCODER_DECODERS["cross attention"]
    for chosen, paths in (("decoder", ("decoder",)), (["decoder", "encoder"], ("encoder", "decoder"))):
        chain = plan_of(make(), "pp2", make_batch(0, 4), {"chain": chosen}).chain
        assert chain is not None and chain.paths == paths


class Small(Chain):
    """A small container before the blocks, and one whose blocks run in turns with them."""

    def __init__(self) -> None:
        super().__init__(lambda: Block(64), depth=2, width=64)
        self.small = nn.ModuleList([Block(4), Block(4)])
        self.turns = nn.ModuleList([Block(64), Block(64)])
        self.inner = nn.Linear(4, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.embedding(tokens)[..., :4]
        for block in self.small:
            y = block(y)
        x = self.inner(y)
        for block, other in zip(self.blocks, self.turns, strict=True):
            x = other(block(x))
        logits: torch.Tensor = self.head(x)
        return logits


def test_small_containers_and_those_that_run_in_turns_stay_outside() -> None:
    chain = plan_of(Small(), "pp2").chain
    assert chain is not None and chain.paths == ("blocks",)
    with pytest.raises(
        ModelError, match=r"plan.chain=\[blocks, turns\] is no chain of blocks: the blocks of turns do not run once"
    ):
        plan_of(Small(), "pp2", overrides={"chain": ["blocks", "turns"]})
    chain = plan_of(Small(), "pp2", overrides={"chain": ["small", "blocks"]}).chain
    assert chain is not None and chain.paths == ("small", "blocks") and not chain.keeps_shape


def test_shapes() -> None:
    for make, keeps in ((lambda: Chain(Block), True), (Pyramid, False)):
        chain = plan_of(make(), "pp2").chain
        assert chain is not None and chain.keeps_shape is keeps and chain.is_static

    class Reading(Chain):
        def __init__(self, early: bool) -> None:
            super().__init__(Block)
            self.early = early

        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            length = int((batch["tokens"] > 0).sum()) if self.early else 6
            loss = self(batch["tokens"][:, :length]).mean()
            return loss if self.early or float(loss) > 0 else 2 * loss

    for early in (True, False):
        chain = plan_of(Reading(early), "pp2").chain
        assert chain is not None and chain.is_static is not early


def test_a_container_of_several_classes_is_a_chain_where_it_is_needed() -> None:
    assert plan_of(Pyramid(), "tp2").chain is None  # as one region, which tensor parallelism splits best
    for word, plan in (("pp2", {}), ("tp2", {"chain": "blocks"})):
        chain = plan_of(Pyramid(), word, overrides=plan).chain
        assert chain is not None and chain.paths == ("blocks",)


@pytest.mark.parametrize("name", ["a condition for every block", "dataclasses", "T5", "blocks of two classes and three shapes"])
def test_a_plan_of_a_chain_is_data(name: str) -> None:
    plan = plan_of(ALL[name](), "pp4", batch_for(name, 4))
    assert Plan.from_dict(yaml.safe_load(yaml.safe_dump(plan.to_dict()))) == plan


def test_the_tables_say_what_crosses() -> None:
    text = render_plan(plan_of(ENCODER_DECODERS["T5"](), "pp2", make_batch(0, 4)), width=200)
    assert "model.encoder.block.[0-1]" in text and "model.decoder.block.[0-1]" in text
    assert "into stage 1, beside the hidden state: model.decoder.block.0(3)\n" in text
    text = render_plan(plan_of(Experts(), "pp2"), width=200)
    assert "into stage 1, beside the hidden state: blocks.0[1], blocks.1[1]\n" in text


# ---------------------------------------------------------------------- cuts


def counts(plan: Plan) -> list[int]:
    return [stage.last - stage.first for stage in plan.stages]


def test_several_stages_on_each_rank() -> None:
    plan = plan_of(Chain(Block, depth=5), "pp2_vp2")
    assert len(plan.stages) == 4 and sum(counts(plan)) == 5 and len(plan.boundaries) == 3
    places = {parameter.spec.name: parameter.spec.stages for parameter in plan.parameters}
    assert places["embedding.weight"] == (0,) and places["head.weight"] == (1,)
    owners = [places[f"blocks.{index}.up.weight"] for index in range(5)]
    assert owners == [(stage % 2,) for stage, count in enumerate(counts(plan)) for _ in range(count)]
    chosen = plan_of(Chain(Block, depth=5), "pp2_vp2", overrides={"stages": [1, 1, 1, 2]})
    assert counts(chosen) == [1, 1, 1, 2]
    with pytest.raises(PlanError, match=r"plan.stages=\[2, 3\]: parallel=pp2_vp2 needs 4 numbers of at least 1"):
        plan_of(Chain(Block, depth=5), "pp2_vp2", overrides={"stages": [2, 3]})


@pytest.mark.parametrize(
    ("word", "depth", "text"),
    [
        ("pp2_vp4", 5, r"asks for 8 stages \(pp 2 x vp 4\), and blocks has 5 blocks: .* one, use parallel=pp2_vp2, or parallel="),
        ("pp4_vp2", 3, r"asks for 8 stages \(pp 4 x vp 2\), and blocks has 3 blocks: every stage needs one, use parallel="),
        ("pp4", 3, r"asks for 4 stages, and blocks has 3 blocks: every stage needs one, use parallel=pp2_dp2 or"),
    ],
)
def test_more_stages_than_blocks(word: str, depth: int, text: str) -> None:
    with pytest.raises(ModelError, match=text) as refused:
        plan_of(Chain(Block, depth=depth), word)
    for offered in str(refused.value).split("parallel=")[2:]:
        layout = parse_layout(offered.split(" ")[0].strip(",."))
        assert layout.num_stages <= depth


def test_stages_of_other_lengths_are_said() -> None:
    notes = plan_of(Chain(Block, depth=5), "pp2").notes
    assert any(
        note.startswith("5 blocks on 2 stages: stage 0 has 3 blocks, others 2; even would be 4 or 6 blocks") for note in notes
    )
    assert not any("blocks on" in note for note in plan_of(Chain(Block, depth=4), "pp2").notes)


def test_measured_seconds_win_over_operations() -> None:
    def cut(**costs: float) -> list[int]:
        return counts(plan_of(Chain(Block, depth=6), "pp3", overrides={"costs": costs}))

    assert cut(**{"blocks.*": 1.0}) == [2, 2, 2]
    assert cut(**{"blocks.*": 1.0, "last": 2.0}) == [3, 2, 1]  # 3, 2 and 1 + 2
    assert cut(**{"blocks.*": 1.0, "first": 2.0})[0] == 1  # of 3, where two blocks would make it 4
    assert cut(**{"blocks.*": 1.0, "blocks.5": 4.0}) == [3, 2, 1]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ({"costs": {"blocks.0": 1.0}}, r"plan.costs has no seconds for blocks.1: give every block some, because seconds and"),
        ({"costs": {"layers.*": 1.0}}, r"plan.costs=\{layers.\*: 1.0\} matches no block; the module has blocks.0, blocks.1"),
        ({"costs": {"blocks.*": "1s"}}, r"plan.costs=\{blocks.\*: 1s\}: write the seconds that a block takes, such as 0.011"),
        ({"costs": {"blocks.*": -1}}, r"plan.costs=\{blocks.\*: -1\}: write the seconds"),
        ({"chain": 3}, r"plan.chain=3: write the path of a container of blocks, or a list of paths"),
        ({"chain": ["blocks", "no"]}, r"plan.chain=no: no ModuleList or Sequential of that name; the module has: blocks"),
    ],
)
def test_lines_that_do_not_fit(lines: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        plan_of(Chain(Block), "pp2", overrides=lines)


# ---------------------------------------------------------------------- what cannot cross


class Doing(Chain):
    """Blocks around which some code runs."""

    def __init__(self, before: Callable[[Any, torch.Tensor], Any], after: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
        super().__init__(Block)
        self.before, self.after = before, after
        self.register_buffer("count", torch.zeros(()))
        self.mean = torch.zeros(16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        side = self.before(self, x)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.after(x, side))
        return logits


def test_a_value_that_no_module_shows_is_refused() -> None:
    module = Doing(lambda m, x: 2 * x, lambda x, side: x + side)
    match = (
        r"parallel=pp2: the step \(add\) reads a tensor of shape \[4, 6, 16\] that the step \(mul\) made before blocks.1, and "
        r"between pipeline stages a tensor travels that is an argument of a stage's first block, or that a module returned: make "
        r"it in a module of its own that the step calls once and that returns it, or pass it to the blocks, or use parallel=dp2 or"
    )
    with pytest.raises(ModelError, match=match):
        plan_of(module, "pp2")
    assert plan_of(Doing(lambda m, x: nn.Identity()(x) * 0 + 1, lambda x, side: x), "pp2").boundaries == ((),)


class Scaled(nn.Module):
    """A block that reads a tensor of its own, and of others."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.block, self.scale = Block(), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) * self.scale


def test_a_weight_that_is_no_parameter_is_refused_and_as_a_parameter_it_is_not() -> None:
    def chain(scale: torch.Tensor) -> Chain:
        return Chain(lambda: Scaled(scale))

    match = (
        r"parallel=pp2: blocks.1 \(mul\) reads a tensor of shape \[16\] that requires a gradient, is no parameter of the module "
        r"and was made by nothing that the dry run shows, and between pipeline stages a tensor travels that is an argument of a "
        r"stage's first block, or that a module returned: register it as an nn.Parameter of the modules that read it, or pass it "
        r"to the blocks, or use parallel=dp2 or"
    )
    with pytest.raises(ModelError, match=match):
        plan_of(chain(torch.ones(16, requires_grad=True)), "pp2")
    assert plan_of(chain(nn.Parameter(torch.ones(16))), "pp2").boundaries == ((),)


class Shared(Doing):
    """Has a module besides, to be called by the code before or after the blocks."""

    def __init__(self, before: Callable[[Any, torch.Tensor], Any], after: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
        super().__init__(before, after)
        self.shared = nn.Identity()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shared(lambda m, x: (m.shared(3 * x), m.shared(2 * x))[0], lambda x, side: x + side),
        lambda: Shared(lambda m, x: (m.shared, 2 * x), lambda x, side: x + side[0](side[1])),
    ],
    ids=["by a module that is called twice", "by a module that is called too late"],
)
def test_what_is_shown_where_a_stage_cannot_see_it_is_refused(make: MakeModel) -> None:
    with pytest.raises(ModelError, match=r"the step \(add\) reads .* make it in a module of its own that the step calls once"):
        plan_of(make(), "pp2")
    once = Shared(lambda m, x: m.shared(2 * x), lambda x, side: x + side)
    assert [one.module for one in plan_of(once, "pp2").boundaries[0]] == ["shared"]


def test_a_change_in_place_of_what_has_travelled_is_refused() -> None:
    module = Doing(lambda m, x: x, lambda x, side: side.mul_(2) + x)
    match = (
        r"parallel=pp2: the step \(mul_\) changes a tensor of shape \[4, 6, 16\] in place that embedding \(embedding\) made on an"
    )
    with pytest.raises(ModelError, match=match):
        plan_of(module, "pp2")
    assert len(plan_of(Doing(lambda m, x: x, lambda x, side: side.mul(2) + x), "pp2").boundaries[0]) == 1


def test_sp_carries_the_hidden_state_alone() -> None:
    match = r"parallel=tp2_sp_pp2: .* reads a tensor of shape \[4, 6, 16\] that was computed from the samples before blocks"
    with pytest.raises(ModelError, match=match):
        plan_of(WithEmbeddings(Reader, depth=4), "tp2_sp_pp2")


def test_a_type_that_only_one_function_knows_is_refused() -> None:
    @dataclass
    class Local:
        hidden: torch.Tensor

    class Giving(Block):
        def forward(self, x: torch.Tensor) -> Any:
            return Local(super().forward(x))

    class Taking(Chain):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x).hidden
            logits: torch.Tensor = self.head(x)
            return logits

    with pytest.raises(
        ModelError, match=r"parallel=pp2: blocks.0 returns a .*Local, which .* define Local at the top level of its"
    ):
        plan_of(Taking(Giving), "pp2")
    assert plan_of(Taking(Giving), "single").chain is not None


class Twice(Chain):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self(batch["tokens"]) - self(batch["tokens"].flip(1))).square().mean()


def test_a_step_that_runs_the_chain_twice_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"looked at blocks: its blocks do not run once each, in order \(blocks.0 ran after blocks.1\)"
    ):
        plan_of(Twice(Block), "pp2")


def test_what_is_changed_before_the_blocks_is_said() -> None:
    def counts_and_averages(m: Any, x: torch.Tensor) -> None:
        m.count += 1
        m.mean.lerp_(x.detach().mean((0, 1)), 0.1)

    notes = plan_of(Doing(counts_and_averages, lambda x, side: x), "pp2").notes
    for path, name in (("count", "add_"), ("mean", "lerp_")):
        assert any(
            note.startswith(f"{path} is changed before the last stage's blocks ({name}): that happens on every later")
            for note in notes
        )
    after = plan_of(Doing(lambda m, x: m, lambda x, m: (m.count.add_(1), x)[1]), "pp2").notes
    assert not any("is changed" in note for note in after)
    assert not any("is changed" in note for note in plan_of(Doing(counts_and_averages, lambda x, side: x), "dp2").notes)


def test_values_of_placeholders_that_are_read_are_said() -> None:
    notes = plan_of(Doing(lambda m, x: bool(x.isnan().any()), lambda x, side: x), "pp2").notes
    start = "the step reads a value (__bool__) of a tensor of shape [] made with parameters, before the last stage's blocks: later"
    assert any(note.startswith(start) for note in notes)
    after = plan_of(Doing(lambda m, x: x.isnan, lambda x, side: x if x.isnan().any() else x + 1), "pp2").notes
    assert not any("of a placeholder" in note for note in after)


def test_logs_of_placeholders_are_refused() -> None:
    early = Doing(lambda m, x: m.log("norm", x.norm()), lambda x, side: x)
    match = r"parallel=pp2: training_step logs a tensor of shape \[\] that was computed with parameters before blocks.1, and"
    with pytest.raises(ModelError, match=match):
        plan_of(early, "pp2")
    assert plan_of(early, "tp2").boundaries == ()
    batch_only = Doing(lambda m, x: m.log("size", torch.ones(())), lambda x, side: x)
    assert plan_of(batch_only, "pp2").boundaries == ((),)

    class Logging(Doing):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            first = self.embedding(batch["tokens"])
            loss = self.head(self.blocks[1](self.blocks[0](first))).mean()
            self.log_dict({"loss": loss, "first": first})
            return loss

    assert boundaries(Logging(lambda m, x: None, lambda x, side: x), "pp2") == [["embedding[]"]]


def test_what_the_step_returns_is_read() -> None:
    class Predicting(Chain):
        def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
            first = self.embedding(batch["tokens"])
            return {"first": first, "last": [self.blocks[1](self.blocks[0](first))]}

    layout = parse_layout("pp2")
    plan = prepare_plan(Predicting(Block), tokens(), layout.resolve(2), step="predict_step")
    assert [one.module for one in plan.boundaries[0]] == ["embedding"]


def test_todays_models_carry_nothing_more() -> None:
    assert plan_of(gpt(), "pp4", make_batch(0, 4)).boundaries == ((), (), ())
