"""A second opinion on a plan: the table for tensor parallelism that some models carry themselves.

Models of transformers have ``tp_plan``, from the ``base_model_tp_plan`` of their configuration: module paths, with ``*``
for the number of a layer, each with a style such as ``colwise``
(https://huggingface.co/docs/transformers/main/en/perf_infer_gpu_multi). Any module may have one. It decides nothing here:
where it cuts a weight another way than the plan does, the plan says so, and why.

What is between the layers is not compared: a style that gathers the output of a fused layer and cuts it again
(``colwise_gather_output``, ``rowwise_split_input``) cuts the same weights as a plan with segments, which gathers nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from lightning_par.plan.plan import Kind, Plan

_WORDS: dict[Kind, str] = {"column": "by column", "row": "by row", "vocabulary": "by vocabulary", "replicate": "not at all"}
_REASONS: dict[Kind, str] = {  # of layers that the plan gives no reason for
    "column": "it reads the hidden state",
    "row": "it reads only what column layers give",
    "replicate": "only Linear and Conv1D layers of the blocks, and those of the vocabulary, are split",
}


def differences(module: nn.Module, plan: Plan, chosen: Collection[str] = ()) -> tuple[str, ...]:
    """A note for each pattern of a module's own table that cuts a weight in another way than the plan.

    Args:
        module: the user's module, of which any submodule may have a table.
        plan: the plan for it, with its layers decided.
        chosen: layers that the user's plan section speaks of.
    """
    ours = _cuts(plan, chosen)
    notes = []
    for path, table in _tables(module):
        prefix = f"{path}." if path else ""
        for pattern, style in table.items():
            theirs = _kind(style)
            matching = re.compile(re.escape(prefix + pattern).replace(r"\*", r"\d+"))
            others = [cut for name, cut in ours.items() if matching.fullmatch(name) and theirs not in (None, cut[0])]
            if theirs is not None and others:
                kind, why = others[0]
                notes.append(f"{prefix}tp_plan splits {pattern} {_WORDS[theirs]} ({style}), this plan {_WORDS[kind]}: {why}")
    return tuple(notes)


def _tables(module: nn.Module) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Every table with the path of its owner; that of an outer module contains those of the modules in it."""
    found: list[str] = []
    for path, child in module.named_modules():
        table = getattr(child, "tp_plan", None)
        words = {name: style for name, style in table.items() if isinstance(style, str)} if isinstance(table, Mapping) else {}
        if words and not any(path.startswith(outer) for outer in found):
            found.append(f"{path}." if path else "")
            yield path, words


def _cuts(plan: Plan, chosen: Collection[str]) -> dict[str, tuple[Kind, str]]:
    """How the plan cuts each layer, with the reason; and each parameter that belongs to none, under its name and its owner's."""
    layers: dict[str, tuple[Kind, str]] = {}
    for layer in plan.layers:
        why = "as the plan section says" if layer.name in chosen else layer.why
        layers[layer.name] = (layer.kind, why or _REASONS[layer.kind])
    whole: tuple[Kind, str] = ("replicate", _REASONS["replicate"])
    names = {alias for parameter in plan.parameters for alias, _ in parameter.aliases}
    return {part: whole for name in names for part in (name, name.rpartition(".")[0])} | layers


def _kind(style: str) -> Kind | None:
    """What a style does to a weight; None for those that are about something else, such as experts or norms."""
    if style == "embedding_rowwise":
        return "vocabulary"
    if style.startswith("replicate"):
        return "replicate"
    return "column" if "colwise" in style else "row" if "rowwise" in style else None
