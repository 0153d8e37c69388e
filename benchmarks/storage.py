"""What a rank stores in a real step, beside the forecast: the bytes of tensors that are alive.

Parameters, gradients (of all microbatches, before they are reduced) and optimizer states are the storages of the tensors that the
owner of the states names, each once. Activations are all other storages that operations of the step have made and that are alive
between two actions of the schedule, at the most. Two things are neither: messages on their way, because gloo holds what it sends
until the other side has it, which depends on time; and parameters that ZeRO-3 has gathered, of which some are there inside an
action and none between two.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from benchmarks.counting import settled
from lightning_par.demo.gpt import GPT
from lightning_par.demo.language_model import LanguageModel
from lightning_par.engine import Engine
from lightning_par.host.batch import split_batch
from lightning_par.host.loss import loss_of
from lightning_par.layout import parse_layout
from lightning_par.memory import forecast, read_optimizer
from lightning_par.memory.living import LivingTensors
from lightning_par.pipeline.action import Action
from lightning_par.pipeline.tables import Tables, choose_schedule, splits_backward
from lightning_par.plan.memory import RankMemory
from lightning_par.prepare import prepare_plan
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.nested import tensors_in
from lightning_par.runtime.precision import FULL, PRECISIONS, Precision
from lightning_par.zero.option import STEP, ZeroOptions

WIDTH, DEPTH, HEADS, BATCH, LENGTH, VOCABULARY = 128, 8, 4, 8, 64, 250
TOLERANCE = 0.03  # of activations; all else must be exact
GATHERS = (torch.ops.c10d._allgather_base_.default, torch.ops.c10d.allgather_.default)
KINDS = ("parameters", "gradients", "states", "activations")


@dataclass(frozen=True)
class Case:
    """A layout that is measured.

    Attributes:
        word: the layout.
        schedule: of its pipeline; None for the usual one.
        recompute: what of the blocks is computed again.
        precision: Lightning's word.
        reduce: when ZeRO reduces gradients.
    """

    word: str
    schedule: str | None = None
    recompute: str = "none"
    precision: str = FULL.name
    reduce: str = STEP

    @property
    def name(self) -> str:
        """Such as ``pp2_vp2 interleaved-zb``."""
        usual = Case(self.word)
        unusual = {self.recompute, self.precision, self.reduce} - {usual.recompute, usual.precision, usual.reduce}
        words = (self.word, self.schedule, *unusual)
        return " ".join(word for word in words if word)


CASES = (
    Case("single"),
    Case("tp2"),
    Case("pp2"),
    Case("dp2_zero1"),
    Case("dp2_zero2"),
    Case("dp2_zero3"),
    Case("tp2_pp2"),
    Case("pp2_vp2", "interleaved-zb"),
)


@dataclass(frozen=True)
class Row:
    """One rank in one layout.

    Attributes:
        case: name of the layout.
        rank: of the process.
        measured, expected: bytes by `KINDS`.
    """

    case: str
    rank: int
    measured: Mapping[str, int]
    expected: Mapping[str, int]


def differences(rows: Iterable[Row]) -> list[str]:
    """One line for each number that is not what the forecast says."""
    found = []
    for row in rows:
        for kind in KINDS:
            measured, expected = row.measured[kind], row.expected[kind]
            allowed = TOLERANCE * expected if kind == "activations" else 0
            if abs(measured - expected) > allowed:
                found.append(f"{row.case}, rank {row.rank}: {kind} are {measured:,} bytes; the forecast says {expected:,}")
    return found


def make_model() -> pl.LightningModule:
    """The model of the comparison."""
    torch.manual_seed(0)
    return LanguageModel(GPT(VOCABULARY, WIDTH, DEPTH, HEADS))


def make_batch() -> dict[str, torch.Tensor]:
    """The batch of each replica."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator) for name in ("tokens", "targets")}


def make_optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW in two groups, as the demo has it; of a rank's module, those that it holds."""
    parameters = list(module.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3)


def measure_rank(
    rank: int,
    world_size: int,
    case: Case,
    make: Callable[[], pl.LightningModule] = make_model,
    foreseen: Sequence[RankMemory] | None = None,
) -> Row:
    """Train two steps and count in the second. Collective over the world.

    Args:
        rank, world_size: of this process.
        case: the layout.
        make: the model; every rank makes the same.
        foreseen: what to compare with, by pp coordinate; by default the forecast of the real plan.
    """
    warnings.simplefilter("ignore")  # a log without a Trainer
    schedule, layout = choose_schedule(case.schedule, parse_layout(case.word).resolve(world_size))
    module, batch = make(), make_batch()
    precision = PRECISIONS[case.precision]
    lines = {"recompute": {"*": case.recompute}} if case.recompute != "none" else None
    plan = prepare_plan(module, batch, layout, lines, precision=precision)
    pieces = split_batch(batch, plan.layout.microbatches or 1)
    options = ZeroOptions(reduce=case.reduce)
    if foreseen is None:
        foreseen = _forecast(module, pieces[0][0], plan, schedule, precision, options)
    expected = foreseen[layout.coordinate_of(rank).pp]
    engine = Engine(module, plan, Mesh(layout, timedelta(seconds=60)), torch.device("cpu"), schedule, precision=precision)
    states = engine.own_states([make_optimizer(module)], options)
    shapes = [("training_step", size) for _, size in pieces]
    weights = [size / BATCH for _, size in pieces]
    step: Any = module.training_step

    def program(index: int) -> Any:
        with precision.computing("cpu"):
            return step(pieces[index][0], 0)

    measured: dict[str, int] = {}
    for is_last in (False, True):
        ledger = _Ledger(engine, batch)
        with ledger:
            engine.train(program, weights, loss_of, shapes)
        if is_last:
            measured = {**_count(states.stored()._asdict()), "activations": ledger.most}
        states.reduce()
        states.step()
        states.zero_grad()
    states.close()
    return Row(case.name, rank, measured, {kind: getattr(expected, kind) for kind in KINDS})


def _forecast(
    module: pl.LightningModule, piece: Any, plan: Any, schedule: str, precision: Precision, options: ZeroOptions
) -> tuple[RankMemory, ...]:
    from lightning_par.engine import traced_costs

    form = read_optimizer(make_optimizer(module), dict(module.named_parameters()))
    assert form is not None
    table = Tables(schedule, plan.layout, traced_costs(plan)).training(plan.layout.microbatches or 1)
    return forecast(module, piece, plan, table, form, loss_of, splits_backward(schedule, plan.layout), precision, options)


def _count(stored: Mapping[str, list[torch.Tensor]]) -> dict[str, int]:
    """Bytes of the storages of each kind, each storage once, where it is first."""
    seen, counts = set[int](), dict[str, int]()
    for kind, tensors in stored.items():
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
        counts[kind] = sum(size for key, size in storages.items() if key not in seen)
        seen |= storages.keys()
    return counts


class _Saved:
    """A tensor that autograd saves."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class LivingParameters(LivingTensors):
    """Knows besides which storages hold parameters that were gathered over dp.

    Args:
        before: as in `LivingTensors`.
        dp: name of the process group.

    Attributes:
        most_gathered: the most bytes of them at once; to be set to 0 to begin anew.
    """

    def __init__(self, before: Iterable[torch.Tensor], dp: str) -> None:
        super().__init__(before, has_peak=False)
        self._dp, self._gathered, self.most_gathered = dp, list[tuple[StorageWeakRef, int]](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in GATHERS and dist.ProcessGroup.unbox(args[2]).group_name == self._dp:
            self._note_gathered(tensors_in(args[0]))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.cat.default:  # the parameters of a block, gathered in one collective, out of each rank's part
            gathered = self.gathered()
            if any(tensor.untyped_storage()._cdata in gathered for tensor in args[0]):
                self._note_gathered([result])
        return result

    def gathered(self) -> dict[int, int]:
        """Bytes of the storages that are still there, by key."""
        self._gathered = [entry for entry in self._gathered if not entry[0].expired()]
        return {reference.cdata: size for reference, size in self._gathered}

    def _note_gathered(self, tensors: Iterable[torch.Tensor]) -> None:
        self._gathered += [(StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()) for tensor in tensors]
        self.most_gathered = max(self.most_gathered, sum(self.gathered().values()))


class _Ledger:
    """An observer that counts what is alive between the actions of a step.

    Attributes:
        most: bytes of activations.
    """

    def __init__(self, engine: Engine, batch: Any) -> None:
        self._engine, self.most = engine, 0
        before = [*engine.module.parameters(), *engine.module.buffers(), *tensors_in(batch)]
        self._living = LivingParameters(before, engine.mesh.dp.group.group_name)
        self._saved: WeakSet[_Saved] = WeakSet()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._saved.add(saved)
        return saved

    def __enter__(self) -> None:
        self._engine.observers.append(self)
        self._hooks.__enter__()
        self._living.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._living.__exit__(*raised)
        self._hooks.__exit__(*raised)
        self._engine.observers.remove(self)

    def begin(self, action: Action) -> None:
        """Nothing of its own is there yet."""

    def wait(self) -> None:
        """Waiting stores nothing."""

    def arrive(self) -> None:
        """What has arrived is counted at the end."""

    def end(self) -> None:
        """An action has ended."""
        self.most = max(self.most, settled(self._held_bytes))

    def _held_bytes(self) -> int:
        states = self._engine.states
        assert states is not None
        saved = {each.tensor.untyped_storage()._cdata for each in self._saved}
        messages = [tensor for tensor in self._engine.on_the_way if tensor.untyped_storage()._cdata not in saved]
        others = [*(tensor for tensors in states.stored() for tensor in tensors), *messages]
        keys = self._living.gathered().keys() | {tensor.untyped_storage()._cdata for tensor in others}
        return self._living.num_bytes(keys)
