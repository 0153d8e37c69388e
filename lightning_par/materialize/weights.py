"""Which tensor in the files is which parameter of the user's module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lightning_par.errors import ConfigurationError
from lightning_par.materialize.weight_file import StoredTensor, stored_tensors
from lightning_par.runtime.parameter import Split

_DEEPEST = 4  # modules that names may stand below, on either side


@dataclass(frozen=True)
class Weights:
    """The values of a module's parameters and persistent buffers, by their names.

    A tied parameter may stand in the files under any of its names.
    """

    tensors: Mapping[str, StoredTensor]

    def read_shard(
        self,
        names: Iterable[str],
        split: Split | None,
        size: int,
        coordinate: int,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """This rank's shard of the tensor of one of these names, in ``out`` or new; None where the files have none of them."""
        stored = next((self.tensors[name] for name in names if name in self.tensors), None)
        return None if stored is None else stored.read_shard(split, size, coordinate, dtype, out)

    def read_buffers(self, module: nn.Module) -> None:
        """Read the buffers that a module still has, in place."""
        for name, buffer in module.named_buffers():
            if name in self.tensors:
                buffer.copy_(self.tensors[name].read_shard(None, 1, 0, buffer.dtype))


def match_weights(module: nn.Module, path: str | Path) -> Weights:
    """Find a file's tensor for every parameter and persistent buffer of a module.

    Names may stand below other modules than in the files: the LightningModule's ``model.`` is found where it is the one way in
    which most names fit.

    Raises:
        ConfigurationError: the files cannot be read; names are missing, unexpected or of another shape, all in one message; or
            several ways fit.
    """
    stored = stored_tensors(Path(path))
    ours: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    persistent = persistent_buffers(module).keys()
    names = _names_in(path, ours.keys() | persistent, stored)
    tensors = {name: stored[key] for name, key in names.items()}
    held = {id(ours[name]) for name in tensors if name in ours}
    missing = [name for name, parameter in module.named_parameters() if id(parameter) not in held]
    missing += [name for name in sorted(persistent) if name not in tensors]
    known = set(names.values()) | {key for key in stored if any(name.endswith(f".{key}") or name == key for name in buffers)}
    unexpected = sorted(stored.keys() - known)
    every = {**buffers, **ours}
    shaped = [
        f"{name} is {list(every[name].shape)} in {type(module).__name__} and {list(found.shape)} in the files"
        for name, found in tensors.items()
        if tuple(every[name].shape) != found.shape
    ]
    _refuse(module, path, {"missing": missing, "unexpected": unexpected, "of another shape": shaped})
    return Weights(tensors)


def _refuse(module: nn.Module, path: str | Path, faults: Mapping[str, list[str]]) -> None:
    found = {what: names for what, names in faults.items() if names}
    if found:
        lines = "".join(f"\n  {what}: {len(names)}{_listed(names)}" for what, names in found.items())
        raise ConfigurationError(
            f"weights={path} do not fit {type(module).__name__}:{lines}\nUse the weights of this model, or build the model with "
            "the configuration in their folder"
        )


def _listed(names: list[str]) -> str:
    return "".join(f"\n    {name}" for name in names[:20]) + (f"\n    and {len(names) - 20} more" if len(names) > 20 else "")


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that belong to a module's state, under all their names."""
    left_out = {
        f"{path}.{name}".lstrip(".")
        for path, child in module.named_modules(remove_duplicate=False)
        for name in child._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name not in left_out}


def _names_in(path: str | Path, ours: Iterable[str], stored: Mapping[str, StoredTensor]) -> dict[str, str]:
    """For each of our names that the files have, its name there.

    Raises:
        ConfigurationError: they fit below several modules equally well.
    """
    by_end: dict[str, list[tuple[str, str]]] = {}
    for name in ours:
        for above, end in _ends(name):
            by_end.setdefault(end, []).append((above, name))
    ways: Counter[tuple[str, str]] = Counter()
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for key in stored:
        for above_there, end in _ends(key):
            for above, name in by_end.get(end, ()):
                ways[above, above_there] += 1
                pairs.setdefault((above, above_there), {})[name] = key
    if not ways:
        return {}
    most = max(ways.values())
    best = {tuple(sorted(pairs[way].items())): way for way, count in ways.items() if count == most}
    if len(best) > 1 and most * 2 < len(stored):
        return {}  # names of another model, some of which are alike
    if len(best) > 1:
        places = ", ".join(sorted({above.rstrip(".") or "the module itself" for above, _ in best.values()}))
        raise ConfigurationError(
            f"weights={path} fit several parts of the module ({places}): build a module that contains the model once, or read "
            "them in its constructor"
        )
    return dict(next(iter(best)))


def _ends(name: str) -> list[tuple[str, str]]:
    """A name cut into what it stands below and the rest, in every way."""
    parts = name.split(".")
    return [
        ("".join(f"{part}." for part in parts[:count]), ".".join(parts[count:])) for count in range(min(_DEEPEST + 1, len(parts)))
    ]
