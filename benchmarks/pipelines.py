"""The systems that are timed: each cuts the same chain over all ranks and gives a step.

A step is the forwards and backwards of all microbatches, one step of SGD, and the gradients taken away.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from copy import copy
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from io import StringIO
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from benchmarks.napping import (
    MICROBATCH_SIZE,
    NUM_BLOCKS,
    NUM_MICROBATCHES,
    NUM_RANKS,
    Block,
    Chain,
    Naps,
    make_batch,
    make_chain,
)
from lightning_par.engine import Engine
from lightning_par.layout import Layout, Placement, parse_layout, pp_of_stage
from lightning_par.pipeline.action import Action, Table
from lightning_par.pipeline.schedules import AUTO, SCHEDULES, build_schedule
from lightning_par.pipeline.tables import choose_schedule
from lightning_par.prepare import prepare_plan
from lightning_par.runtime.deferral import Note
from lightning_par.runtime.mesh import Mesh

LEARNING_RATE = 1.0  # of the step whose gradients are compared: they are what the weights change by


@dataclass(frozen=True)
class Pipeline:
    """A chain cut over all ranks, seen from this one.

    Attributes:
        step: one step, collective over all ranks; the mean loss, on the ranks that are told.
        parameters: what this rank holds, by the name in the whole chain.
        optimizer: over them.
        table: gives what all ranks do in a step, for its theory.
    """

    step: Callable[[], float | None]
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    table: Callable[[], Table]


@dataclass(frozen=True)
class System:
    """A row of the table.

    Attributes:
        name: who runs it.
        schedule: as lightning_par calls it.
        chunks: stages on each rank.
        install: cuts a new chain. Collective over all ranks.
        learns: whether it makes its table from its own first steps.
    """

    name: str
    schedule: str
    chunks: int
    install: Callable[[int, Naps], Pipeline]
    learns: bool = False

    @property
    def title(self) -> str:
        """Schedule and stages, as ``interleaved v4``."""
        return self.schedule if self.chunks == 1 else f"{self.schedule} v{self.chunks}"


def install_ours(rank: int, naps: Naps, schedule: str, chunks: int) -> Pipeline:
    """lightning_par, as its strategy installs it: trace, plan, engine."""
    module, (inputs, targets) = make_chain(naps, NUM_RANKS * chunks), make_batch()
    typed = parse_layout(f"pp{NUM_RANKS}_vp{chunks}_mb{NUM_MICROBATCHES}").resolve(NUM_RANKS)
    _, layout = choose_schedule(schedule, typed)
    splits_backward = schedule == AUTO or SCHEDULES[schedule].splits_backward
    for block in module.blocks:
        assert isinstance(block, Block)
        block.naps_in_graph = not splits_backward  # else the gradient is computed outside of the graph, see `nap_in_notes`
    plan = prepare_plan(module, (inputs, targets), layout)
    engine = Engine(module, plan, _mesh(layout), torch.device("cpu"), schedule)
    held = {alias for parameter in plan.parameters for alias, holders in parameter.aliases if engine.mesh.coordinate.pp in holders}
    parameters = {name: parameter for name, parameter in module.named_parameters() if name in held}
    optimizer = torch.optim.SGD(parameters.values(), LEARNING_RATE)
    engine.own_states([optimizer])
    pieces = list(zip(inputs.split(MICROBATCH_SIZE), targets.split(MICROBATCH_SIZE), strict=True))
    weights, shapes = [1 / NUM_MICROBATCHES] * NUM_MICROBATCHES, [(MICROBATCH_SIZE,)] * NUM_MICROBATCHES

    def step() -> float | None:
        losses = engine.train(lambda index: module.training_step(pieces[index], 0), weights, lambda loss: loss, shapes)
        optimizer.step()
        optimizer.zero_grad()
        return sum(loss.item() for loss in losses) / NUM_MICROBATCHES if losses else None

    return Pipeline(step, parameters, optimizer, lambda: engine.tables.training(NUM_MICROBATCHES))


def _mesh(layout: Layout) -> Mesh:
    """The mesh of a layout, on the groups that other systems have made.

    Each group of gloo has a thread on every rank that wakes a hundred times in a second, whether or not its system has its turn.
    """
    mesh = copy(_groups(replace(layout, vp=2, placement="loop")))
    mesh.layout = layout
    if layout.vp == 1:  # as in a mesh of its own
        mesh.gradients = mesh.activations
    return mesh


@cache
def _groups(layout: Layout) -> Mesh:
    return Mesh(layout, timedelta(seconds=60))


def nap_in_notes(naps: Naps) -> None:
    """Have lightning_par sleep where it computes the gradient of a linear layer apart from the graph; in this process."""
    computed = Note.gradients

    def gradients(note: Note) -> Any:
        naps.begin("W")
        found = computed(note)
        naps.end("W")
        naps.sleep(getattr(note.weight, "num_naps", 0) * naps.weight_gradient)
        return found

    setattr(Note, "gradients", gradients)  # noqa: B010  # mypy


def install_torch(rank: int, naps: Naps, schedule: Any, chunks: int, placement: Placement = "loop") -> Pipeline:
    """torch.distributed.pipelining, as its documentation sets it up."""
    num_stages = NUM_RANKS * chunks
    chain, (inputs, targets), device = make_chain(naps, num_stages), make_batch(), torch.device("cpu")
    own = [stage for stage in range(num_stages) if pp_of_stage(stage, NUM_RANKS, placement) == rank]
    modules = [_blocks(chain, stage, num_stages) for stage in own]
    stages = [
        PipelineStage(module, stage, num_stages, device, group=dist.group.WORLD) for module, stage in zip(modules, own, strict=True)
    ]
    is_single = schedule in (ScheduleGPipe, Schedule1F1B)
    runner = schedule(stages[0] if is_single else stages, NUM_MICROBATCHES, loss_fn=F.mse_loss)
    parameters = {f"blocks.{name}": parameter for module in modules for name, parameter in module.named_parameters()}
    optimizer = torch.optim.SGD(parameters.values(), LEARNING_RATE)
    args = (inputs,) if 0 in own else ()
    is_last = num_stages - 1 in own

    def step() -> float | None:
        losses: list[torch.Tensor] = []
        runner.step(*args, target=targets if is_last else None, losses=losses if is_last else None, return_outputs=False)
        optimizer.step()
        optimizer.zero_grad()
        return sum(loss.item() for loss in losses) / NUM_MICROBATCHES if is_last else None

    if is_single:  # torch's own table of 1F1B is wrong on the last rank
        name = "gpipe" if schedule is ScheduleGPipe else "1f1b"
        return Pipeline(step, parameters, optimizer, lambda: build_schedule(name, NUM_RANKS, 1, NUM_MICROBATCHES))
    return Pipeline(step, parameters, optimizer, lambda: _read_table(runner.pipeline_order))


def install_deepspeed(rank: int, naps: Naps) -> Pipeline:
    """DeepSpeed's PipelineEngine, set up as in https://www.deepspeed.ai/tutorials/pipeline."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Else a CPU engine compiles collectives of its own for half a minute; training does not use them.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    layers = list(make_chain(naps).blocks)
    with redirect_stdout(StringIO()):  # it prints its stages where a page is printed
        module = PipelineModule(layers=layers, num_stages=NUM_RANKS, loss_fn=F.mse_loss, partition_method="uniform")
    parameters = {f"blocks.{name}": parameter for name, parameter in module.named_parameters()}
    config = {
        "train_micro_batch_size_per_gpu": MICROBATCH_SIZE,
        "gradient_accumulation_steps": NUM_MICROBATCHES,
        "gradient_clipping": 0.0,  # by default it clips to a norm of 1
        "steps_per_print": None,
    }
    optimizer = torch.optim.SGD(parameters.values(), LEARNING_RATE)
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
    inputs, targets = make_batch()
    batches = cycle(zip(inputs.split(MICROBATCH_SIZE), targets.split(MICROBATCH_SIZE), strict=True))

    def table() -> Table:
        return build_schedule("1f1b", NUM_RANKS, 1, NUM_MICROBATCHES)

    return Pipeline(lambda: float(engine.train_batch(batches)), parameters, optimizer, table)


def _blocks(chain: Chain, stage: int, num_stages: int) -> nn.Sequential:
    """The blocks of a stage under the names that they have in the chain."""
    size = NUM_BLOCKS // num_stages
    part = nn.Sequential()
    for index in range(stage * size, (stage + 1) * size):
        part.add_module(str(index), chain.blocks[index])
    return part


def _read_table(order: Mapping[int, list[Any]]) -> Table:
    """torch's actions print as ours do: ``2F0``."""
    rows = []
    for rank in sorted(order):
        words = [re.fullmatch(r"(\d+)([FBIW])(\d+)", str(action)) for action in order[rank] if action is not None]
        rows.append(tuple(Action(word[2], int(word[1]), int(word[3])) for word in words if word is not None))  # type: ignore[arg-type]
    return tuple(rows)


def _ours(schedule: str, chunks: int = 1) -> System:
    install = partial(install_ours, schedule=schedule, chunks=chunks)
    return System("lightning_par", schedule, chunks, install, learns=schedule == AUTO)


def _torch(name: str, schedule: Any, chunks: int = 1, placement: Placement = "loop") -> System:
    return System("torch", name, chunks, partial(install_torch, schedule=schedule, chunks=chunks, placement=placement))


SYSTEMS = (
    _ours("gpipe"),
    _torch("gpipe", ScheduleGPipe),
    _ours("1f1b"),
    _torch("1f1b", Schedule1F1B),
    System("DeepSpeed", "1f1b", 1, install_deepspeed),
    _ours("interleaved", 2),
    _torch("interleaved", ScheduleInterleaved1F1B, 2),
    _ours("interleaved", 4),
    _torch("interleaved", ScheduleInterleaved1F1B, 4),
    _ours("zb-h1"),
    _ours("interleaved-zb", 2),
    _torch("interleaved-zb", ScheduleInterleavedZeroBubble, 2),
    _ours("interleaved-zb", 4),
    _torch("interleaved-zb", ScheduleInterleavedZeroBubble, 4),
    _ours("zb-v", 2),
    _torch("zb-v", ScheduleZBVZeroBubble, 2, "v"),
    _ours(AUTO),
    _ours(AUTO, 2),
)
