"""Folders of transformers: written from a checkpoint and read into one, by the model's own `save_pretrained` and `from_pretrained`.

They know which names tied weights have in files, and which fused weights stand in them in parts.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_par.checkpoint.load import Checkpoint
from lightning_par.checkpoint.whole import Advance, read_weight
from lightning_par.errors import ConfigurationError

CONFIG, GENERATION = "config", "generation_config"


def find_configs(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The configurations of the models of transformers in a module, to be saved with it.

    Returns:
        By the model's name in the module with a dot after it, such as ``model.``: its ``config`` and, where it generates,
        ``generation_config``, as JSON holds them.
    """
    transformers: Any = sys.modules.get("transformers")
    if transformers is None:  # not imported, so nothing in the module is of it
        return {}
    found: dict[str, dict[str, Any]] = {}
    for name, child in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(child, transformers.PreTrainedModel) and not prefix.startswith(tuple(found)):
            config = json.loads(child.config.to_json_string())
            config["architectures"] = config.get("architectures") or [type(child).__name__]
            found[prefix] = {CONFIG: config}
            if child.can_generate() and child.generation_config is not None:
                found[prefix][GENERATION] = json.loads(child.generation_config.to_json_string())
    return found


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a folder of transformers, or in its config.json.

    Raises:
        ConfigurationError: there is none.
    """
    folder, file = (path, path / "config.json") if path.is_dir() else (path.parent, path)
    try:
        found = {CONFIG: json.loads(file.read_text())}
        if (folder / "generation_config.json").is_file():
            found[GENERATION] = json.loads((folder / "generation_config.json").read_text())
        return found
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path} has no configuration to read ({error}): give a model's folder, or its config.json"
        ) from None


def write_transformers(
    checkpoint: Checkpoint,
    folder: Path,
    max_shard_bytes: int,
    advance: Advance,
    config: Path | None = None,
    prefix: str | None = None,
) -> None:
    """Write a folder that ``from_pretrained`` loads. Memory: all weights of the model.

    Args:
        checkpoint: whose.
        folder: is there, and empty.
        max_shard_bytes: of the tensors in a file.
        advance: called after each tensor.
        config: where the model's configuration is; by default what was saved with the checkpoint.
        prefix: what the model's names begin with in the module; by default found.

    Raises:
        ConfigurationError: there is no configuration, or the weights are not those of its model.
    """
    found, prefix = _chosen(checkpoint, config, prefix)
    model = _build(found)
    names = {alias: name for name, entry in checkpoint.index.entries.items() for alias in (name, *entry.aliases)}
    wanted = list(model.state_dict())
    prefix = _find_prefix(wanted, names) if prefix is None else prefix
    _check_fit(checkpoint, model, prefix, names)
    read: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(names[prefix + key] for key in wanted):
        read[name] = read_weight(checkpoint, name)
        advance(read[name].nbytes)
    model.load_state_dict({key: read[names[prefix + key]] for key in wanted}, assign=True)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=max_shard_bytes)


def _chosen(checkpoint: Checkpoint, config: Path | None, prefix: str | None) -> tuple[Mapping[str, Any], str | None]:
    if config is not None:
        return read_config(config), prefix
    saved = checkpoint.trainer()["run"].get("configs", {})
    if prefix is not None:
        saved = {name: found for name, found in saved.items() if name == prefix}
    if len(saved) != 1:
        which = f"those of {', '.join(saved)}: choose one with --prefix" if saved else "none: give one with --config FOLDER"
        raise ConfigurationError(f"--format transformers needs the model's configuration, and the checkpoint has {which}")
    ((prefix, found),) = saved.items()
    return found, prefix


def _build(found: Mapping[str, Any]) -> Any:
    """The model of a configuration, without memory for its weights."""
    import transformers  # here: it takes seconds, and few need it

    names = found[CONFIG].get("architectures") or ["none"]
    kind = getattr(transformers, names[0], None)
    if kind is None:
        raise ConfigurationError(
            f"the configuration is for {names[0]}, which transformers {transformers.__version__} does not have: write a class of "
            "transformers into architectures of the config.json that --config names, or use --format safetensors"
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(found[CONFIG]))
        config = kind.config_class.from_pretrained(folder)
    with torch.device("meta"):
        model = kind(config)
    if GENERATION in found:
        model.generation_config = transformers.GenerationConfig.from_dict(found[GENERATION])
    return model


def _find_prefix(wanted: Iterable[str], names: Iterable[str]) -> str:
    """What stands before all names of a model; the one way in which most fit."""
    keys, counts = set(wanted), Counter[str]()
    for name in names:
        parts = name.split(".")
        cuts = (("".join(f"{part}." for part in parts[:count]), ".".join(parts[count:])) for count in range(len(parts)))
        counts.update(prefix for prefix, end in cuts if end in keys)
    most = max(counts.values(), default=0)
    best = [prefix for prefix, number in counts.items() if number == most]
    if len(best) != 1:
        words = f"stand at several places ({', '.join(best)})" if best else "are none of the checkpoint's"
        raise ConfigurationError(f"the weights of the configured model {words}: say what its names begin with, as --prefix model.")
    return best[0]


def _check_fit(checkpoint: Checkpoint, model: nn.Module, prefix: str, names: Mapping[str, str]) -> None:
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    missing = [key for key in shapes if prefix + key not in names]
    entries = checkpoint.index.entries
    other = [key for key, shape in shapes.items() if prefix + key in names and entries[names[prefix + key]].shape != shape]
    more = [name for name in names if name.startswith(prefix) and name.removeprefix(prefix) not in shapes]
    faults = {"missing": missing, "of another shape": other, "not of the model": more}
    if missing or other:
        lines = "".join(f"\n  {what}: {len(found)} ({', '.join(found[:5])})" for what, found in faults.items() if found)
        raise ConfigurationError(
            f"{checkpoint.folder} does not hold a {type(model).__name__} under {prefix!r}:{lines}\nGive its own configuration with "
            "--config, or --prefix"
        )


def load_transformers(folder: Path) -> Any:
    """The model in a folder of transformers, in the dtype that it is saved in.

    Raises:
        ConfigurationError: transformers cannot load it.
    """
    import transformers  # here: it takes seconds, and few need it

    names = read_config(folder)[CONFIG].get("architectures") or ["AutoModel"]
    try:
        return getattr(transformers, names[0]).from_pretrained(folder, dtype="auto")
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        raise ConfigurationError(f"{folder} cannot be loaded as {names[0]} of transformers: {error}") from None
