"""Where a number stopped being finite, as plain data that ranks send each other, and in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_par.layout import Layout

Cause = Literal["parameter", "batch", "input", "output", "operation"]
NUM_SHOWN = 4  # of ranks that have the same to say
STEP = "training_step"  # stands for the code of the step that is in no module


@dataclass(frozen=True)
class Finding:
    """What a rank saw first.

    Attributes:
        order: sorts findings of all ranks as one process would have met them: the batch among those of the step, the microbatch,
            the stage (in a backward from the last one on) and how many calls or operations of the stage came before.
        module: in whose call it was, by the user's own name; `STEP` for code in no module.
        cause: a ``parameter`` or the ``batch`` was not finite, the ``input`` of the module, or neither, so that the module made it
            in its ``output``; in a backward the ``operation`` that made it.
        what: which parameter, tensor of the batch or operation; empty where there is no more to say.
        microbatch: in which.
    """

    order: tuple[int, ...]
    module: str
    cause: Cause
    what: str
    microbatch: int


def first_of(findings: Mapping[int, Finding | None]) -> tuple[Finding, list[int]] | None:
    """The first of what the ranks found, and those that found it at once, ascending; None where nobody found anything.

    Args:
        findings: by rank.
    """
    found = {rank: finding for rank, finding in findings.items() if finding is not None}
    if not found:
        return None
    first = min(found.values(), key=lambda finding: finding.order)
    same = [rank for rank, finding in found.items() if (finding.order, finding.cause) == (first.order, first.cause)]
    return first, sorted(same)


def describe_forward(finding: Finding, where: str) -> str:
    """A finding of a forward, with what to do about it.

    Args:
        finding: what was found first.
        where: which ranks found it, see `describe_ranks`, and in which microbatch.
    """
    name, what = finding.module, finding.what
    reason, remedy = {
        "parameter": (
            f"where the parameter {what} was not finite before the step",
            "go on from a checkpoint from before, with gradient_clip_val, so that each gradient is looked at before its step",
        ),
        "batch": (f"where {what} of the batch was not finite", "mend the sample in the dataset"),
        "input": (
            "whose input was not finite, while all modules before it gave finite outputs",
            f"look at the code that calls {name}",
        ),
        "output": ("in its output, while its input and all parameters were finite", f"look at the code of {name}"),
    }[finding.cause]
    if name == STEP and finding.cause == "output":
        reason, remedy = "after all modules had given finite outputs", "look at how the loss is computed"
    return f"it began in {name}, {reason}, {where}: {remedy}"


def describe_backward(finding: Finding, where: str) -> str:
    """A finding of a backward, as `describe_forward` has it."""
    return (
        f"it began in the backward of {finding.module}, in {finding.what}, whose output gradient was finite, "
        f"{where}: look at the code of {finding.module}"
    )


def describe_ranks(ranks: Iterable[int], layout: Layout) -> str:
    """Ranks with their coordinates: ``rank 1 (pp 0, dp 0, tp 1)``; of many, some."""
    first, *others = ranks
    shown = " and ".join(f"rank {rank} ({layout.coordinate_of(rank)})" for rank in [first, *others[: NUM_SHOWN - 1]])
    return shown if len(others) < NUM_SHOWN else f"{shown} and {len(others) + 1 - NUM_SHOWN} more"
