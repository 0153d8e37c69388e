"""One training, watched: in one process, whose numbers are what is right; and on a rank, which compares its own with them.

A rank compares what it holds, so that nothing is put together: of each gradient and weight it has the part that `ParameterSpec`
says, and of that with ZeRO a range. It gives the squares of differences, whose sum over the ranks is that of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from lightning_par.gradients import global_norm
from lightning_par.host.namespace import bind
from lightning_par.parity.dropout import WithoutDropout
from lightning_par.parity.subject import Subject
from lightning_par.runtime.generator import seed_generators
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.parameter import ParameterSpec, get_spec

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import Callback as Host
else:
    Host = object  # the class of the caller's Lightning, by `bind`

Tensors = dict[str, torch.Tensor]
MakeTrainer = Callable[..., Any]  # given options of the Trainer


@dataclass
class Run:
    """A training in one process.

    Attributes:
        losses: of each step.
        norms: of the whole gradient, each time that an optimizer steps, before clipping.
        gradients: of the first step, before clipping, by the user's names.
        weights: in the end.
        has_dropped: whether dropout was turned off.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: Tensors = field(default_factory=dict)
    weights: Tensors = field(default_factory=dict)
    has_dropped: bool = False


class Piece(NamedTuple):
    """A range of a part of a tensor, on one rank, beside the same range in one process.

    Attributes:
        name: of the tensor, the user's.
        part: of the tensor, by tp coordinate; 0 where every tp rank has all of it.
        start, length: the range in the part, read flat. Ranks that hold the same are copies.
        difference: sum of squares.
        expected: sum of squares of what one process has there.
    """

    name: str
    part: int
    start: int
    length: int
    difference: float
    expected: float


class RankRun(NamedTuple):
    """A training, as one rank sees it.

    Attributes:
        losses, norms: as in `Run`.
        gradients, weights: what the rank holds of them.
        parts: what it has to do with, whole: for each name and part of what takes part in training, how many elements, and the
            sum of squares of the gradient that one process has there.
    """

    losses: list[float]
    norms: list[float]
    gradients: list[Piece]
    weights: list[Piece]
    parts: dict[tuple[str, int], tuple[int, float]]


def train_alone(make_trainer: MakeTrainer, root: str, subject: Subject, file: Path, seed: int, is_moved: bool = False) -> None:
    """Train in this process alone, and write the `Run` to a file.

    Args:
        make_trainer: makes it with the options given.
        root: the Lightning namespace of its Trainer.
        subject: what to train; changed.
        file: where to.
        seed: of what draws random numbers.
        is_moved: whether to begin at weights that are one rounding away, see `move_weights`.
    """
    watch = bind(AloneWatch, root, "callbacks.Callback")()
    seed_generators(seed)
    if is_moved:
        move_weights(subject.module)
    with WithoutDropout() as dropout:
        trainer = make_trainer(strategy="auto", devices=1, callbacks=[watch], max_steps=len(subject.batches))
        clip_exactly(trainer.precision_plugin)
        trainer.fit(subject.module, subject.data(1, 0))
    run: Run = watch.run
    run.weights = {name: parameter.detach() for name, parameter in subject.module.named_parameters()}
    run.has_dropped = dropout.has_dropped
    torch.save(vars(run), file)


def read_run(file: Path) -> Run:
    """What `train_alone` wrote; tensors are read when they are needed."""
    return Run(**torch.load(file, mmap=True, weights_only=True))


def move_weights(module: nn.Module) -> None:
    """Multiply every weight by 1 + eps or 1 - eps, by chance. Rounding changes a result by up to half of eps, 2^-23 in float32."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            sign = torch.randint(0, 2, parameter.shape, generator=generator, dtype=torch.int8).to(parameter.dtype) * 2 - 1
            parameter.data += parameter.data * sign * torch.finfo(parameter.dtype).eps


def clip_exactly(plugin: Any) -> None:
    """Have one process clip by a norm that is summed in float64, as layouts do.

    torch sums in float32: for a tensor of 40 million elements that is off by 3e-3 on one thread of a CPU (measured in torch 2.13).
    """

    def clip_grad_by_norm(optimizer: Any, clip_val: float) -> None:
        parameters = [parameter for parameter in plugin.main_params(optimizer) if parameter.grad is not None]
        norm = sum(_squares(parameter.grad) for parameter in parameters) ** 0.5
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_val, torch.tensor(norm))

    vars(plugin)["clip_grad_by_norm"] = clip_grad_by_norm


def train_rank(make_trainer: MakeTrainer, root: str, subject: Subject, file: Path, rank: int, folder: Path) -> RankRun:
    """Train on one rank of the layout and compare. Collective over the world.

    Args:
        make_trainer, root, subject: as for `train_alone`.
        file: of the run in one process.
        rank: this one.
        folder: where the ranks meet.
    """
    layout = subject.layout
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=layout.world_size)
    alone = read_run(file)
    watch = bind(RankWatch, root, "callbacks.Callback")(alone.gradients)
    with WithoutDropout():
        trainer = make_trainer(callbacks=[watch], max_steps=len(subject.batches))
        trainer.fit(subject.module, subject.data(layout.dp or 1, layout.coordinate_of(rank).dp))
    strategy = trainer.strategy
    specs = {name: get_spec(parameter) for name, parameter in subject.module.named_parameters()}
    weights = [
        compare_piece(specs[name], 0, value, alone.weights, strategy.mesh) for name, value in strategy.states.full_parameters()
    ]
    strategy.states.close()
    return RankRun(watch.losses, watch.norms, watch.gradients, weights, watch.parts)


class AloneWatch(Host):
    """Writes down a training in one process."""

    root = ""  # the Lightning namespace, set by `bind`

    def __init__(self) -> None:
        super().__init__()
        self.run = Run()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if id(p) in stepped and p.grad is not None}
        self.run.norms.append(sum(_squares(gradient) for gradient in gradients.values()) ** 0.5)
        if _is_first(trainer):
            self.run.gradients.update({name: gradient.detach().clone() for name, gradient in gradients.items()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.run.losses += _losses_in(outputs)


class RankWatch(Host):
    """Compares a training on a rank with one in one process, while it runs.

    Args:
        expected: the gradients of the first step, by name.
    """

    root = ""  # the Lightning namespace, set by `bind`

    def __init__(self, expected: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.expected = expected
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: list[Piece] = []
        self.parts: dict[tuple[str, int], tuple[int, float]] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        states, mesh = trainer.strategy.states, trainer.strategy.mesh
        only = optimizer if len(states.optimizers) > 1 else None
        self.norms.append(float(global_norm(states, mesh, only)))
        if not _is_first(trainer):
            return
        for each in states.gradients(only):
            self.gradients.append(compare_piece(get_spec(each.parameter), each.start, each.gradient, self.expected, mesh))
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                spec = get_spec(parameter)
                part = _part_of(spec, self.expected, mesh)
                self.parts[spec.name, _part_number(spec, mesh)] = part.numel(), _squares(part)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses += _losses_in(outputs)


@torch.no_grad()
def compare_piece(spec: ParameterSpec, start: int, found: torch.Tensor, expected: Mapping[str, torch.Tensor], mesh: Mesh) -> Piece:
    """What a rank holds of a tensor, beside what one process has; a tensor that it does not have is zero.

    Args:
        spec: of the parameter.
        start: where ``found`` begins in the rank's part, read flat.
        found: of any shape; what is longer than the part ends in padding.
        expected: by name.
        mesh: of the rank.
    """
    part = _part_of(spec, expected, mesh).reshape(-1)[start:][: found.numel()].double()
    difference = found.reshape(-1)[: part.numel()].double() - part
    return Piece(spec.name, _part_number(spec, mesh), start, part.numel(), _squares(difference), _squares(part))


def _part_of(spec: ParameterSpec, tensors: Mapping[str, torch.Tensor], mesh: Mesh) -> torch.Tensor:
    """The part that a rank holds of a tensor of one process."""
    whole = tensors[spec.name] if spec.name in tensors else torch.zeros(spec.shape)
    return whole if spec.split is None else spec.split.shard(whole, mesh.tp.size, mesh.coordinate.tp)


def _part_number(spec: ParameterSpec, mesh: Mesh) -> int:
    return 0 if spec.split is None else mesh.coordinate.tp


def _squares(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64)) ** 2


def _is_first(trainer: Any) -> bool:
    """Whether no optimizer has stepped twice."""
    first: bool = trainer.global_step < len(trainer.optimizers)
    return first


def _losses_in(outputs: Any) -> Iterator[float]:
    """The loss in what a step gave to a callback; none where it steps its optimizers itself and returns none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if isinstance(loss, torch.Tensor):
        yield float(loss)
