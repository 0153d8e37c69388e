"""A small model cut over tp and pp by hand, its data, and the same training in one process.

It has what makes ZeRO hard: a parameter of the outermost module, a weight that one module borrows from another, a
container whose forward ends by an exception on every stage but the last, odd sizes, and, where a case asks for it, tied,
frozen, unused and absent parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from lightning_par.layout import Layout
from lightning_par.runtime.axis import Axis, LocalAxis
from lightning_par.runtime.collective import copy_to, reduce_from
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.parameter import ParameterSpec, Split, get_spec, set_spec
from lightning_par.zero.held import WEIGHT, Held
from lightning_par.zero.option import ZeroOptions
from lightning_par.zero.states import OptimizerStates
from tests.ranks import COLLECTIVE_TIMEOUT

VOCABULARY, WIDTH, HIDDEN, LENGTH, NUM_BLOCKS, ROWS = 11, 6, 10, 5, 4, 2


@dataclass(frozen=True)
class Case:
    """One training: which layout, and what is awkward about it."""

    pp: int
    dp: int
    tp: int
    zero: int
    is_tied: bool = True
    frozen: tuple[str, ...] = ()
    has_unused: bool = False
    num_microbatches: int = 3
    num_accumulated: int = 1
    max_norm: float | None = 0.3
    max_value: float | None = None
    is_interleaved: bool = False
    bucket_elements: int | None = None
    options: ZeroOptions = field(default_factory=ZeroOptions)
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW

    @property
    def layout(self) -> Layout:
        return Layout(tp=self.tp, pp=self.pp, dp=self.dp, zero=self.zero)

    @property
    def tied_stages(self) -> tuple[int, ...]:
        return tuple(sorted({0, self.pp - 1})) if self.is_tied else (0,)

    def blocks(self, stage: int) -> range:
        """Unequal on purpose: the first stage has one block more than the rest."""
        rest = (NUM_BLOCKS - 1) // self.pp
        start = 0 if stage == 0 else NUM_BLOCKS - rest * (self.pp - stage)
        return range(start, NUM_BLOCKS - rest * (self.pp - stage - 1))

    def actions(self, stage: int) -> list[tuple[str, int]]:
        """Forwards and backwards of one stage: all forwards first, or 1F1B."""
        warmup = min(self.pp - stage - 1, self.num_microbatches) if self.is_interleaved else self.num_microbatches
        actions = [("F", i) for i in range(warmup)]
        for i in range(warmup, self.num_microbatches):
            actions += [("F", i), ("B", i - warmup)]
        return actions + [("B", i) for i in range(self.num_microbatches - warmup, self.num_microbatches)]


class Done(BaseException):
    """Carries a stage's output out of the module."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class Block(nn.Module):
    """``x + W2 gelu(W1 norm(x))``: W1 column-parallel, W2 row-parallel."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.gelu(self.up(copy_to(self.norm(x), self.axis)))
        return x + reduce_from(F.linear(inner, self.down.weight), self.axis) + self.down.bias

    @staticmethod
    def splits() -> dict[str, Split]:
        return {"up.weight": Split(0, (HIDDEN,)), "up.bias": Split(0, (HIDDEN,)), "down.weight": Split(1, (HIDDEN,))}


class Exit(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise Done(x)


class Chain(nn.ModuleDict):
    """A container that is called, and left by an exception."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.values():
            x = block(x)
        return x


class Model(nn.Module):
    """All of the model, or one stage of it with tp shards."""

    def __init__(self, case: Case, stage: int | None = None, axis: Axis | None = None) -> None:
        super().__init__()
        axis = axis or LocalAxis("tp", 1, 0)
        torch.manual_seed(3)
        self.is_first, self.is_last = stage in (None, 0), stage in (None, case.pp - 1)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.chain = Chain({str(i): Block(axis) for i in range(NUM_BLOCKS)})
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.unused = nn.Parameter(torch.randn(3)) if case.has_unused else None
        if case.is_tied:
            self.head = None
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not any(part in name for part in case.frozen))
        if stage is not None:
            self._cut(case, stage, axis)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_first:
            scale = self.embedding.weight.abs().mean()  # borrowed, then released by its owner
            x = self.embedding(x) * (scale + self.position.abs())
        x = self.norm(self.chain(x))
        return F.linear(x, self.embedding.weight if self.head is None else self.head.weight)

    def _cut(self, case: Case, stage: int, axis: Axis) -> None:
        """Keep one stage, shard it, and put the record on each parameter."""
        owners = {name: self._stages_of(name, case) for name, _ in self.named_parameters()}
        splits = {f"chain.{i}.{name}": split for i in range(NUM_BLOCKS) for name, split in Block.splits().items()}
        for name, parameter in self.named_parameters():
            split = splits.get(name)
            set_spec(parameter, ParameterSpec(name, tuple(parameter.shape), split, owners[name]))
            if split is not None:
                parameter.data = split.shard(parameter.data, axis.size, axis.coordinate)
        for i in range(NUM_BLOCKS):
            if i not in case.blocks(stage):
                del self.chain[str(i)]
        if not self.is_last:
            self.norm = self.head = None
            self.chain["exit"] = Exit()
        if not self.is_first:
            self.position = self.unused = None
            self.embedding = self.embedding if case.is_tied and self.is_last else None

    @staticmethod
    def _stages_of(name: str, case: Case) -> tuple[int, ...]:
        if name.startswith("chain."):
            return next((stage,) for stage in range(case.pp) if int(name.split(".")[1]) in case.blocks(stage))
        if name.startswith("embedding."):
            return case.tied_stages
        return (case.pp - 1,) if name.startswith(("norm.", "head.")) else (0,)


def build_mesh(case: Case) -> Mesh:
    """Collective over the world: the mesh, with the axis of the tied stages."""
    mesh = Mesh(case.layout, COLLECTIVE_TIMEOUT)
    if len(case.tied_stages) > 1:
        mesh.tied(case.tied_stages)
    return mesh


def build_optimizer(model: nn.Module, kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW) -> torch.optim.Optimizer:
    """Groups as users write them: by dimension, one that only the first stage fills, one of whatever is frozen.

    eps is 1e-4: at AdamW's 1e-8 the step is the sign of the gradient where it is tiny, and the order of a sum over ranks
    decides the sign.
    """
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1 and p is not named.get("position")], "weight_decay": 0.1},
        {"params": [named[name] for name in ("position",) if name in named], "lr": 3e-2},
        {"params": [p for p in named.values() if p.ndim == 1 and p.requires_grad], "weight_decay": 0.0},
        {"params": [p for p in named.values() if p.ndim == 1 and not p.requires_grad], "betas": (0.5, 0.5)},
    ]
    return kind(groups, lr=1e-2, eps=1e-4)


Batch = list[tuple[torch.Tensor, torch.Tensor]]


def microbatches(case: Case, step: int, replica: int) -> Iterator[Batch]:
    """The tokens and targets of one optimizer step on one replica: as many batches as are accumulated."""
    for part in range(case.num_accumulated):
        generator = torch.Generator().manual_seed(1000 * step + 100 * part + replica)
        shape = (2, case.num_microbatches, ROWS, LENGTH)
        tokens, targets = torch.randint(VOCABULARY, shape, generator=generator)
        yield list(zip(tokens, targets, strict=True))


def loss_of(case: Case, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """This microbatch's share of the replica's loss."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / (case.num_microbatches * case.num_accumulated)


def train_alone(case: Case, num_steps: int) -> Iterator[tuple[Model, float, float]]:
    """The training in one process. Yields the model with its gradients, the loss and the norm; then steps."""
    model = Model(case)
    optimizer = build_optimizer(model, case.optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(num_steps):
        total = 0.0
        for replica in range(case.dp):
            for tokens, targets in (pair for batch in microbatches(case, step, replica) for pair in batch):
                loss = loss_of(case, model(tokens), targets) / case.dp
                loss.backward()
                total += loss.item()
        if case.zero:
            for parameter in model.parameters():  # ZeRO takes a missing gradient for zero; weight decay acts
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        parameters = [p for p in model.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(parameters, case.max_norm or float("inf"))
        if case.max_value is not None:
            nn.utils.clip_grad_value_(parameters, case.max_value)
        yield model, total, norm.item()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    yield model, 0.0, 0.0


def local(reference: torch.Tensor, parameter: nn.Parameter, mesh: Mesh) -> torch.Tensor:
    """The part of a global tensor that this rank should have of a parameter."""
    split = get_spec(parameter).split
    return reference if split is None else split.shard(reference, mesh.tp.size, mesh.tp.coordinate)


def run_stage(model: Model, x: torch.Tensor) -> torch.Tensor:
    try:
        return model(x)
    except Done as done:
        return done.hidden


def receive(like: torch.Tensor | None, mesh: Mesh, step: int) -> torch.Tensor | None:
    """A hidden state, or its gradient, from the neighbour at ``step`` along the pipeline; ``like`` where there is none."""
    neighbour = mesh.pp.coordinate + step
    if not 0 <= neighbour < mesh.pp.size:
        return like
    received = torch.empty(ROWS, LENGTH, WIDTH)
    dist.recv(received, mesh.pp.ranks[neighbour], group=mesh.pp.group)
    return received


def send(hidden: torch.Tensor | None, mesh: Mesh, step: int) -> Any:
    """Start to send to the neighbour at ``step`` along the pipeline, where there is one; what to wait for, and to keep."""
    neighbour = mesh.pp.coordinate + step
    if hidden is None or not 0 <= neighbour < mesh.pp.size:
        return None
    hidden = hidden.detach().contiguous()
    return dist.isend(hidden, mesh.pp.ranks[neighbour], group=mesh.pp.group), hidden


class KeptStates:
    """A copy of what a rank's states held, from which those of the same rank can be filled again."""

    def __init__(self, states: OptimizerStates) -> None:
        self.names = {parameter: name for name, parameter in states.module.named_parameters()}
        self.held = {(self.names[each.parameter], each.key, each.start): each.values.clone() for each in states.held()}
        self.numbers = {self.names[parameter]: copy.deepcopy(values) for parameter, values in states.numbers()}
        self.groups = copy.deepcopy(states.groups())

    def refill(self, states: OptimizerStates) -> None:
        self.names = {parameter: name for name, parameter in states.module.named_parameters()}
        states.refill(self)
        states.refill_groups(self.groups)

    def fill(self, held: Held) -> None:
        held.values.copy_(self.held[self.names[held.parameter], held.key, held.start])

    def states_of(self, parameter: nn.Parameter) -> dict[str, torch.dtype]:
        name = self.names[parameter]
        return {key: value.dtype for (owner, key, _), value in self.held.items() if owner == name and key != WEIGHT}

    def numbers_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return self.numbers.get(self.names[parameter], {})
