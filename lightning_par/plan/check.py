"""Rules that a module and a batch must keep for a layout, each with what to do when it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_par.errors import DataError, ModelError, PlanError
from lightning_par.layout import Layout
from lightning_par.plan.nearest import use_instead
from lightning_par.plan.segments import OutputUse
from lightning_par.runtime.parameter import Split
from lightning_par.trace import Layer, ParameterInfo, Trace


def check_chain(trace: Trace, layout: Layout, module: str) -> None:
    """A pipeline needs a chain of blocks, with at least one block for each stage.

    Raises:
        ModelError: none found (names what was looked at and the line that would say it), too few blocks, or blocks that run several
            times.
    """
    if layout.pp == 1:
        return
    if not trace.blocks:
        raise ModelError(
            f"parallel={layout} needs a chain of blocks, and {module} has none that the step runs in order "
            f"({looked(trace, module)}): name the container of the blocks with plan.chain=PATH, or "
            f"{use_instead(layout, lambda near: near.pp == 1)}"
        )
    if layout.num_stages > trace.num_blocks:
        product = f" (pp {layout.pp} x vp {layout.vp})" if layout.vp > 1 else ""
        raise ModelError(
            f"parallel={layout} asks for {layout.num_stages} stages{product}, and {trace.chain_name} has {trace.num_blocks} "
            f"blocks: every stage needs one, {_fewer_stages(layout, trace.num_blocks)}"
        )
    if trace.again and trace.step != "predict_step":
        raise ModelError(
            f"parallel={layout}: {trace.step} of {module} calls the blocks of {trace.chain_name} again and again (model.generate "
            f"does, for each token), which a pipeline does in predict_step alone: generate there with trainer.predict, or "
            f"{use_instead(layout, lambda near: near.pp == 1)}"
        )


def check_recompute(trace: Trace, chosen: Mapping[str, str], module: str) -> None:
    """Blocks are recomputed one by one, so a step that trains needs a chain of them. Called where there is none.

    Raises:
        ModelError: some are to be recomputed.
    """
    mode = next((mode for mode in chosen.values() if mode != "none"), None)
    if mode is not None and trace.step == "training_step":
        raise without_blocks(trace, module, f"recompute={mode} works block by block", "use recompute=none")


def check_offload_chain(trace: Trace, chosen: Mapping[str, bool], module: str) -> None:
    """Blocks are offloaded one by one, so it needs a chain of them. Called where there is none.

    Raises:
        ModelError: some are to be offloaded.
    """
    if any(chosen.values()) and trace.step == "training_step":
        raise ModelError(
            f"offload_activations works block by block, and {module} has no chain of blocks that the step runs in order "
            f"({looked(trace, module)}): name the container of the blocks with plan.chain=PATH, or leave it out"
        )


def check_offload(offloaded: Mapping[str, str], compile: str | None) -> None:
    """What is saved of an offloaded block must go through autograd's hooks.

    Args:
        offloaded: what is recomputed of each block that is offloaded, by its path.
        compile: the backend of torch.compile, if any.

    Raises:
        PlanError: a block is recomputed selectively, or compiled.
    """
    if offloaded and compile is not None:
        raise PlanError(
            "compile with offload_activations: a compiled block decides by itself what it saves, and how: leave one of them out"
        )
    path = next((path for path, word in offloaded.items() if word in ("selective", "auto")), None)
    if path is not None:
        raise PlanError(
            f"offload_activations of {path} with recompute={offloaded[path]}: what selective recomputation keeps stays on the "
            "device: use recompute=full, whose inputs are offloaded, or recompute=none"
        )


def check_divides(layer: Layer, use: OutputUse, layout: Layout, what: str, queries: int = 0) -> None:
    """Every head and every fused part of a split layer has an equal share for each tp rank, or for each of some ranks in a row.

    Args:
        what: the parts of the dim that is cut, in the plural, for the message.
        queries: query heads that may read the layer's heads, see `OutputUse.copies`.

    Raises:
        ModelError: with the tp sizes that work.
    """
    bad = _indivisible(use, layout.tp, what, queries)
    if bad is not None:
        working = [tp for tp in range(1, max(bad[0], queries) + 1) if _indivisible(use, tp, what, queries) is None]
        raise ModelError(
            f"parallel={layout}: {layer.name} has {bad[0]} {bad[1]}, which {layout.tp} tensor-parallel ranks cannot share equally; "
            f"tp {', '.join(map(str, working[:8]))} would work: {use_instead(layout, lambda near: near.tp in working)}, "
            f"or keep it whole with plan.split={{{layer.name}: replicate}}"
        )


def _indivisible(use: OutputUse, tp: int, what: str, queries: int) -> tuple[int, str] | None:
    """The first number that ``tp`` ranks cannot share, and what it counts."""
    alone = [index for index, copies in enumerate(use.copies(tp, queries)) if copies == 1]
    sizes = [(use.heads[index], "heads") for index in alone] + [(use.segments[index], what) for index in alone]
    return next(((size, unit) for size, unit in sizes if size % tp), None)


def check_one_split(info: ParameterInfo, splits: Mapping[str, Split]) -> None:
    """A weight that several layers share is cut in one way.

    Raises:
        ModelError: they take their outputs apart in different ways.
    """
    found = {splits[alias]: alias for alias in info.aliases if alias in splits}
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        layers = [alias.rsplit(".", 1)[0] for alias in (first, second)]
        raise ModelError(
            f"{layers[0]} and {layers[1]} share one weight and take it apart in parts of {list(one.segments)} and "
            f"{list(other.segments)}: keep both whole with plan.split={{{layers[0]}: replicate, {layers[1]}: replicate}}"
        )


def check_second_derivatives(trace: Trace, layout: Layout) -> None:
    """The collectives of tensor parallelism have a gradient, and no gradient of that.

    Raises:
        ModelError: the step differentiates a gradient.
    """
    found = next((op for op in trace.ops if op.name == "grad" and op.argument(4, "create_graph")), None)
    if found is not None and layout.tp > 1:
        raise ModelError(
            f"parallel={layout}: {found.module or 'the step'} calls torch.autograd.grad with create_graph=True, and tensor "
            f"parallelism has no second derivatives: {use_instead(layout, lambda near: near.tp == 1)}"
        )


def check_batch_statistics(trace: Trace, layout: Layout) -> None:
    """A norm over the samples of a batch gives other results on a part of them.

    Args:
        trace: a dry run of a training step, or of another.
        layout: with its number of microbatches resolved.

    Raises:
        ModelError: a BatchNorm in training mode meets microbatches.
    """
    found = next((op for op in trace.ops if op.name == "batch_norm" and ("training", True) in op.arguments), None)
    if found is not None and (layout.microbatches or 1) > 1:
        raise ModelError(
            f"parallel={layout}: {found.module} normalises over the samples of a batch, and {layout.microbatches} microbatches "
            "would each have statistics of their own: use GroupNorm or LayerNorm, or one microbatch (mb1)"
        )


def resolve_microbatches(layout: Layout, batch_size: int) -> int:
    """Microbatches of a batch: as the layout says, else twice the stages or the next smaller number that divides the batch.

    A number that does not divide the batch makes microbatches whose sizes differ by one.

    Raises:
        DataError: the layout asks for more than there are samples.
    """
    if layout.microbatches is None:
        return 1 if layout.pp == 1 else max(count for count in range(1, 2 * layout.pp + 1) if batch_size % count == 0)
    if layout.microbatches > batch_size:
        raise DataError(
            f"parallel={layout}: a batch of {batch_size} samples cannot be cut into {layout.microbatches} microbatches: use "
            f"mb{batch_size} or less, or a larger batch"
        )
    return layout.microbatches


def _fewer_stages(layout: Layout, num_blocks: int) -> str:
    """What to type instead where there are too few blocks: fewer stages on each rank where these suffice, else fewer ranks."""
    vp = num_blocks // layout.pp
    if vp == 0:
        return use_instead(layout, lambda near: near.num_stages <= num_blocks)
    return f"use parallel={replace(layout, vp=vp)}, or {use_instead(layout, lambda near: near.num_stages <= num_blocks)[4:]}"


def without_blocks(trace: Trace, module: str, what: str, instead: str) -> ModelError:
    """The error where something is for blocks and there are none.

    Args:
        trace: a dry run of the step.
        module: class name of the user's module.
        what: what it is, and that it is for blocks.
        instead: what to do without it.
    """
    return ModelError(
        f"{what}, and {module} has no chain of blocks that the step runs in order ({looked(trace, module)}): name the container of "
        f"the blocks with plan.chain=PATH, or {instead}"
    )


def looked(trace: Trace, module: str) -> str:
    """Where a chain was looked for, and why each was none."""
    seen = "; ".join(f"{name or module}: {reason}" for name, reason in trace.chains_seen)
    return f"looked at {seen or 'no ModuleList or Sequential at all'}"
