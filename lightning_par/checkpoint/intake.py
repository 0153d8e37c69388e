"""Checkpoints made of what other programs wrote: transformers, safetensors, plain Lightning, DeepSpeed's ZeRO."""

from __future__ import annotations

import contextlib
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_par.checkpoint.index import BUFFER, EITHER, PARAMETER
from lightning_par.checkpoint.plain import take_apart
from lightning_par.checkpoint.save import Content, write_checkpoint
from lightning_par.checkpoint.share import Share, add_whole
from lightning_par.checkpoint.transformers_folder import find_configs, load_transformers
from lightning_par.errors import CheckpointError, ConfigurationError
from lightning_par.materialize.weight_file import stored_tensors
from lightning_par.zero.held import WEIGHT, is_elementwise
from lightning_par.zero.twin import hyperparameters

_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # torch/nn/modules/batchnorm.py
_WRAPPER = "_forward_module."  # what Lightning's strategy for DeepSpeed puts before names


@dataclass
class Intake:
    """What was found in a source.

    Attributes:
        kind: of source, in words.
        tensors: by name. One that is there under several names is the same object or the same memory.
        kinds: parameter or buffer, where it is known.
        trainer: what Lightning keeps.
        run: what a run of ours keeps beside that, as far as the source has it.
        states: of the optimizers, for each element of a parameter: ``states[name][key]``.
        notes: what is missing.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    kinds: Mapping[str, str] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    states: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def import_checkpoint(source: Path, out: Path, prefix: str = "", trust: bool = False) -> Intake:
    """Make a checkpoint. Memory: all of it.

    Args:
        source: a folder of transformers, a safetensors file, a file of Lightning or torch, or a folder of DeepSpeed.
        out: the checkpoint; nothing may be there.
        prefix: put before the names of tensors.
        trust: whether the source may be unpickled, which may run any code.

    Raises:
        ConfigurationError: the source is none of these, or ``out`` is there.
        CheckpointError: the source cannot be read without trust, or ``out`` cannot be written.
    """
    if out.exists():
        raise ConfigurationError(f"{out} exists: name another place, or remove it first")
    found = read_source(source, trust)
    share = Share()
    primary: dict[Any, str] = {}
    numbers: dict[str, Any] = found.run.get("numbers", {})
    for name, tensor in found.tensors.items():
        first = primary.setdefault(_memory_of(tensor), name)
        if first != name:
            share.entries[prefix + first].aliases.append(prefix + name)
            numbers.update({name: numbers[first]} if first in numbers else {})  # the module may know it by any of its names
            continue
        is_view = tensor.untyped_storage().nbytes() > tensor.nbytes  # of what others may be views too, and files have no such thing
        add_whole(share, prefix + name, WEIGHT, tensor.clone() if is_view else tensor, found.kinds.get(name, EITHER))
        for key, state in found.states.get(name, {}).items():
            add_whole(share, prefix + name, key, state)
    write_checkpoint(out, Content("single", share, take_apart(_prefixed(found, prefix))), None)
    return found


def _prefixed(found: Intake, prefix: str) -> dict[str, Any]:
    run = dict(found.run)
    for key in ("numbers", "configs"):
        if key in run:
            run[key] = {prefix + name: value for name, value in run[key].items()}
    if "members" in run:
        run["members"] = [[[prefix + name for name in group] for group in groups] for groups in run["members"]]
    # without these Lightning takes it for a file of an early version
    trainer = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": version("pytorch-lightning"), "state_dict": {}}
    return {"trainer": {**trainer, **found.trainer}, "run": run}


def _memory_of(tensor: Tensor) -> Any:
    """Equal for two tensors that are the same values in memory."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def read_source(source: Path, trust: bool) -> Intake:
    """Read whatever kind of source it is; see `import_checkpoint`."""
    if not source.exists():
        raise ConfigurationError(f"{source}: there is no such folder or file")
    if source.is_dir() and (source / "config.json").is_file():
        return _from_module("transformers", load_transformers(source))
    if (source.is_dir() and any(source.glob("*.safetensors"))) or source.suffix == ".safetensors":
        files = {each.file for each in stored_tensors(source).values()}
        return Intake("safetensors", {name: value for file in sorted(files) for name, value in load_file(file).items()})
    zero = _tag_in(source)
    if zero is not None:
        return _from_deepspeed(source, *zero, trust)
    if source.is_file():
        return _from_torch(source, trust)
    shown = ", ".join(sorted(path.name for path in source.iterdir())[:5]) or "nothing"
    raise ConfigurationError(
        f"{source} has {shown}: give a folder of transformers, a safetensors file, a .ckpt of Lightning, or a folder of DeepSpeed"
    )


def _from_module(kind: str, module: nn.Module) -> Intake:
    parameters = dict.fromkeys(dict(module.named_parameters(remove_duplicate=False)), PARAMETER)
    tensors = {name: value.detach() for name, value in module.state_dict(keep_vars=True).items()}
    kinds = {name: parameters.get(name, BUFFER) for name in tensors}
    return Intake(kind, tensors, kinds, run={"configs": find_configs(module)})


# ---------------------------------------------------------------------- DeepSpeed


def _tag_in(source: Path) -> tuple[Path, str | None] | None:
    """The folder of a DeepSpeed checkpoint and its tag, None for what its file ``latest`` names; None for another folder."""
    if (source / "latest").is_file():
        return source, None
    return (source.parent, source.name) if any(source.glob("*optim_states.pt")) else None


def _from_deepspeed(source: Path, folder: Path, tag: str | None, trust: bool) -> Intake:
    if not trust:
        raise CheckpointError(
            f"{source} is a checkpoint of DeepSpeed, whose files are pickles, and reading one may run any code: add --trust if you "
            "know where it comes from"
        )
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # here: it takes seconds

    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints
            tensors = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag)
    except Exception as error:  # its files are pickles, and its checks are of any kind
        raise CheckpointError(f"{source} cannot be read as a checkpoint of DeepSpeed: {error}") from error
    notes = ["weights only, as float32: loops and optimizer states of DeepSpeed are in another form"]
    return Intake("DeepSpeed ZeRO", {name.removeprefix(_WRAPPER): value for name, value in tensors.items()}, notes=notes)


# ---------------------------------------------------------------------- torch and Lightning


def _from_torch(file: Path, trust: bool) -> Intake:
    try:
        content = torch.load(file, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))  # as torch words it, the same in all versions that we allow
        if refused is None:
            raise CheckpointError(f"{file} is damaged, or no file of torch: copy it again") from error
        raise CheckpointError(
            f"{file} holds {refused[1]}, which only a pickle can, and reading one may run any code: add --trust if you know where "
            "it comes from"
        ) from None
    except Exception as error:  # a damaged archive raises anything
        raise CheckpointError(f"{file} cannot be read by torch.load ({error}): copy it again") from error
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"{file} holds a {type(content).__name__}, not a dict of tensors or a checkpoint of Lightning")
    if "state_dict" not in content:
        return Intake("a state_dict of torch", {name: value for name, value in content.items() if isinstance(value, Tensor)})
    return _from_lightning(content)


def _from_lightning(content: Mapping[str, Any]) -> Intake:
    trainer = {key: value for key, value in content.items() if key not in ("state_dict", "optimizer_states")}
    tensors = {name: value for name, value in content["state_dict"].items() if isinstance(value, Tensor)}
    found = Intake("Lightning", tensors, trainer=trainer)
    others = content["state_dict"].keys() - tensors.keys()
    if others:
        found.notes.append(f"without what is no tensor in the state_dict: {', '.join(sorted(others)[:5])}")
    saved = content.get("optimizer_states")
    if not saved:
        return found
    members = [_members_of(state, found.tensors) for state in saved]
    if any(each is None for each in members):
        found.notes.append(
            "without optimizer states: which one is of which parameter does not follow from their shapes and order; weights, "
            "loops, callbacks and schedulers are there"
        )
        return found
    return _with_states(found, saved, [each for each in members if each is not None])


def _with_states(found: Intake, saved: Sequence[Mapping[str, Any]], members: list[list[list[str]]]) -> Intake:
    states: dict[str, dict[str, Tensor]] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, (state, groups) in enumerate(zip(saved, members, strict=True)):
        names = [name for group in groups for name in group]
        places = [place for group in state["param_groups"] for place in group["params"]]
        for name, place in zip(names, places, strict=True):
            for key, value in state["state"].get(place, {}).items():
                kept = f"{index}:{key}" if index else key
                is_each = is_elementwise(key, value, found.tensors[name])
                (states if is_each else numbers).setdefault(name, {})[kept] = value
    found.states, found.kinds = states, {name: PARAMETER for groups in members for group in groups for name in group}
    options = [[hyperparameters(group) for group in state["param_groups"]] for state in saved]
    found.run = {"groups": options, "members": members, "numbers": numbers}
    found.trainer["optimizer_states"] = [{} for _ in saved]
    return found


def _members_of(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[list[str]] | None:
    """The names of the parameters in each group of an optimizer; None where the shapes of states allow several answers, or none.

    Each group has its parameters in the order of the module. With one group, tensors may be left out: buffers, frozen weights.
    """
    first = {_memory_of(tensor): name for name, tensor in reversed(list(tensors.items()))}  # of tied ones
    names = [name for name, tensor in tensors.items() if first[_memory_of(tensor)] == name and _may_be_trained(name, tensor)]
    groups = [[_shape_in(state["state"].get(place, {})) for place in group["params"]] for group in state["param_groups"]]
    answer = _only_assignment([tuple(tensors[name].shape) for name in names], groups)
    if answer is None:
        return None
    return [[name for name, chosen in zip(names, answer, strict=True) if chosen == group] for group in range(len(groups))]


def _may_be_trained(name: str, tensor: Tensor) -> bool:
    return tensor.is_floating_point() and name.rpartition(".")[2] not in _NORM_BUFFERS


Shape = tuple[int, ...]


def _only_assignment(shapes: Sequence[Shape], groups: Sequence[Sequence[Shape | None]]) -> list[int | None] | None:
    """Which group takes each tensor, where there is exactly one way in which every group takes its shapes in order.

    Args:
        shapes: of the tensors.
        groups: the shapes that each takes; None for any.

    Returns:
        For each tensor the position of its group, or None for no group; None where there is no way or more than one.
    """
    total = sum(map(len, groups))
    start = (0,) * len(groups)
    # by how many each group has taken: in how many ways (2 for more), and one of them, the last choice first
    ways: dict[tuple[int, ...], tuple[int, Any]] = {start: (1, None)}
    for shape in shapes:
        following: dict[tuple[int, ...], tuple[int, Any]] = {}
        for taken, (number, path) in ways.items():
            steps: list[tuple[int | None, tuple[int, ...]]] = [(None, taken)] if total < len(shapes) else []
            for group, (wanted, count) in enumerate(zip(groups, taken, strict=True)):
                if count < len(wanted) and wanted[count] in (None, shape):
                    steps.append((group, (*taken[:group], count + 1, *taken[group + 1 :])))
            for choice, reached in steps:
                following[reached] = (min(2, number + following.get(reached, (0, None))[0]), (choice, path))
        ways = following
    number, path = ways.get(tuple(map(len, groups)), (0, None))
    if number != 1:
        return None
    chosen = []
    while path is not None:
        choice, path = path
        chosen.append(choice)
    return chosen[::-1]


def _shape_in(state: Mapping[str, Any]) -> Shape | None:
    """The shape of the parameter whose states these are; None where they do not say."""
    shapes = [tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor) and key != "step"]
    return shapes[0] if shapes else None
