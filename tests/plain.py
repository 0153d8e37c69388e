"""Training in one process in a given precision, written with plain torch: what runs in a layout are held against.

It takes the same microbatches as the layout and adds up in float32, so that what differs is the order of sums and, over tp, where
a product is rounded.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from lightning_par.layout import Layout, parse_layout
from tests.models import ByteModel
from tests.parity import (
    CLIP,
    REPLICA_BATCH,
    STEPS,
    TOLERANCE,
    MakeModel,
    Run,
    Steps,
    assemble,
    compare,
    kept,
    relative_error,
    train_rank,
)
from tests.ranks import DEVICE, in_one_process, run_ranks

Plant = Callable[[int, nn.Module], None]  # changes the gradients of a step


class FrozenBlock(ByteModel):
    """The GPT of the main job with one frozen block."""

    def __init__(self) -> None:
        super().__init__()
        self.network.blocks[1].requires_grad_(False)


def frozen_block() -> pl.LightningModule:
    return FrozenBlock()


@contextmanager
def _default(dtype: torch.dtype) -> Any:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _context(precision: str) -> AbstractContextManager[Any]:
    if precision == "bf16-true":
        return _default(torch.bfloat16)
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return torch.autocast(DEVICE, dtypes[precision], cache_enabled=False) if precision in dtypes else nullcontext()


def train_plainly(
    make: MakeModel,
    layout: Layout,
    precision: str,
    steps: int = STEPS,
    scaler: torch.amp.GradScaler | None = None,
    plant: Plant = lambda step, module: None,
) -> Run:
    """Train on the batches of all replicas; float32 masters are stepped, with float32 gradients.

    Args:
        make: makes the module.
        layout: whose microbatches are taken, which must be in it.
        precision: one of Lightning's words.
        steps: so many.
        scaler: torch's own, for 16-mixed.
        plant: called before each step, with what has the summed gradients.
    """
    assert layout.microbatches is not None and layout.dp is not None
    torch.manual_seed(0)
    module, run, num_parts = make().to(DEVICE), Run(), layout.microbatches * layout.dp
    if precision == "bf16-true":
        module.bfloat16()
    masters = copy.deepcopy(module).float()
    optimizer: Any = masters.configure_optimizers()
    data = Steps(layout.dp)
    for step in range(steps):
        batch, total = {name: tensor.to(DEVICE) for name, tensor in data.make(step % STEPS, REPLICA_BATCH * layout.dp).items()}, 0.0
        for part in range(num_parts):
            rows = slice(part * REPLICA_BATCH // layout.microbatches, (part + 1) * REPLICA_BATCH // layout.microbatches)
            with _context(precision), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # self.log without a Trainer
                loss = module.training_step({name: tensor[rows] for name, tensor in batch.items()}, step)
            total += float(loss.detach().double()) / num_parts
            weighted = loss * (1 / layout.microbatches)
            (weighted if scaler is None else scaler.scale(weighted)).backward()
            _add_gradients(module, masters)
        for master in masters.parameters():
            if master.grad is not None:
                master.grad /= layout.dp  # after the backward, as in a layout: float16 is uneven near its end
        if step == 0:
            run.gradients = {name: kept(p.grad) for name, p in masters.named_parameters() if p.grad is not None}
        plant(step, masters)
        if scaler is not None:
            scaler.unscale_(optimizer)
        run.norms.append(float(nn.utils.clip_grad_norm_([p for p in masters.parameters() if p.requires_grad], CLIP)))
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
            run.scales.append(scaler.get_scale())
        optimizer.zero_grad()
        run.losses.append(total)
        with torch.no_grad():
            for ours, master in zip(module.parameters(), masters.parameters(), strict=True):
                ours.copy_(master)
    run.weights = {name: kept(p) for name, p in module.named_parameters()}
    return run


def _add_gradients(module: nn.Module, masters: nn.Module) -> None:
    """Move the gradients of one microbatch to the float32 sums."""
    for ours, master in zip(module.parameters(), masters.parameters(), strict=True):
        if ours.grad is not None:
            gradient, ours.grad = ours.grad.float(), None
            master.grad = gradient if master.grad is None else master.grad + gradient


def check_precisions(
    make: MakeModel,
    words: Sequence[str],
    precisions: Sequence[str],
    timeout: float = 120,
    steps: int = STEPS,
    **strategy_options: Any,
) -> None:
    """Train in every layout and precision, in one start of the ranks, and compare with `train_plainly`.

    Args:
        make: makes the module.
        words: layouts of equal size that differ in their ZeRO stage.
        precisions: Lightning's words.
        timeout: seconds for all together.
        steps: so many.
        **strategy_options: what the strategy is given besides the layout.

    Raises:
        AssertionError: names the layout, the precision, what differs, by how much.
    """
    layouts = {word: resolved(word) for word in words}
    first = layouts[words[0]]
    results = run_ranks(_all_runs, first.world_size, make, layouts, precisions, steps, strategy_options, timeout=timeout)
    truths = in_one_process(_all_plain, make, first, ["32-true", *precisions], steps)
    full = truths["32-true"]
    for precision in precisions:
        alone = truths[precision]
        for word, layout in layouts.items():
            try:
                ranks = [result[word, precision] for result in results]
                allowed = _allowed(alone, full, ranks, layout)
                _check_first_step(alone, ranks, allowed["numbers"])
                check_pieces(alone, ranks, layout, allowed["pieces"])
                truth = alone
                if strategy_options.get("zero", {}).get("reduce") == "microbatch":  # what a rank has made is gone by the hook
                    truth, ranks = replace(alone, gradients={}), [replace(run, gradients={}) for run in ranks]
                compare(truth, ranks, layout, allowed)
                if layout.tp > 1:
                    error = _error_of_all(dict(assemble(ranks, layout, "weights", total=False)), alone.weights)
                    tolerance = max(TOLERANCE, 1.5 * _error_of_all(alone.weights, full.weights))
                    assert error <= tolerance, f"all weights: relative error {error:.1e}, more than {tolerance:.1e}"
            except AssertionError as error:
                raise AssertionError(f"{word} in {precision}: {error}") from None


def _all_plain(make: MakeModel, layout: Layout, precisions: Sequence[str], steps: int) -> dict[str, Run]:
    return {precision: train_plainly(make, layout, precision, steps) for precision in precisions}


def resolved(word: str) -> Layout:
    layout = parse_layout(word)
    return layout.resolve(layout.world_size)


def own_errors(alone: Run, full: Run) -> dict[str, float]:
    """How far a precision itself is off: one process in it against one in float32, by field of `Run`.

    Of numbers, the larger error of losses and norms counts for both: one alone may be right by chance.
    """
    number = max(
        relative_error(torch.tensor(getattr(alone, what)), torch.tensor(getattr(full, what))) for what in ("losses", "norms")
    )
    tensors = {
        what: max(relative_error(tensor, getattr(full, what)[name]) for name, tensor in getattr(alone, what).items())
        for what in ("gradients", "weights")
    }
    return {"losses": number, "norms": number, **tensors}


def _error_of_all(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The relative error of all tensors as one vector."""
    return relative_error(*(torch.cat([tensors[name].double().flatten() for name in theirs]) for tensors in (ours, theirs)))


def _allowed(alone: Run, full: Run, ranks: Sequence[Run], layout: Layout) -> dict[str, float]:
    """Tolerances by field of `Run`, and for the first step's ``pieces`` and ``numbers`` of their own.

    Without tp the same products are rounded in the same places, so that in the first step only the order of float32 sums
    differs. It leaves other last bits in the weights, which a cast to half precision makes a difference of 2**-8 in a few of
    them: from then on runs differ by less than the precision itself is off. One more: with parameters in half precision autograd
    adds what two readers of a tied weight give in half precision, and here each stage's is float32.

    Over tp each rank rounds its part of a product: two runs that are rounded independently differ by sqrt(2) of what each is off,
    and numbers by 2**-8, the distance of two bfloat16, where one run is right by chance. Adam divides a gradient near zero by its
    own size, sign and all, so that a bias of near-zero gradients says nothing: weights are then compared as one vector.
    """
    own = own_errors(alone, full)
    if not any(own.values()):
        return {"pieces": 1e-6 if layout.tp == 1 else TOLERANCE, "numbers": TOLERANCE}
    if layout.tp > 1:
        own = {what: 1.5 * error for what, error in own.items()}
        number = max(own["norms"], 2**-8)
        return {**own, "losses": number, "norms": number, "pieces": own["gradients"], "numbers": number, "weights": 1.0}
    is_half = any(tensor.dtype is torch.bfloat16 for tensor in alone.weights.values())
    if is_half and any(len(spec.stages) > 1 for run in ranks for spec in run.specs.values()):
        return {**own, "pieces": own["gradients"], "numbers": own["norms"]}
    return {**own, "gradients": TOLERANCE, "pieces": 1e-6, "numbers": 1e-6}


def _check_first_step(alone: Run, ranks: Sequence[Run], tolerance: float) -> None:
    for run in ranks:
        for what in ("losses", "norms"):
            ours, theirs = getattr(run, what)[0], getattr(alone, what)[0]
            assert abs(ours - theirs) <= tolerance * abs(theirs), f"{what} of the first step: {ours} instead of {theirs}"


def check_pieces(alone: Run, ranks: Sequence[Run], layout: Layout, tolerance: float) -> None:
    """Check that every rank holds float32 pieces of the summed gradient, each right by itself."""
    for run in ranks:
        specs = {spec.name: spec for spec in run.specs.values()}
        assert run.pieces
        for name, tp, start, piece in run.pieces:
            spec, whole = specs[name], alone.gradients[name]
            assert piece.dtype is torch.float32, f"the gradient of {name} is {piece.dtype}"
            part = whole if spec.split is None else spec.split.shard(whole, layout.tp, tp)
            expected = part.flatten()[start : start + piece.numel()]  # what is longer than the parameter ends in padding
            error = float((piece.flatten()[: expected.numel()] - expected).norm() / whole.norm())
            assert error <= tolerance, f"the reduced gradient of {name} at {start}: relative error {error:.1e}"


def _all_runs(
    rank: int,
    world_size: int,
    make: MakeModel,
    layouts: dict[str, Layout],
    precisions: Sequence[str],
    steps: int,
    strategy_options: dict[str, Any],
) -> dict[tuple[str, str], Run]:
    return {
        (word, precision): train_rank(make, layout, rank, trainer={"precision": precision, "max_steps": steps}, **strategy_options)
        for word, layout in layouts.items()
        for precision in precisions
    }
