"""The words of `lightning-par plan` that are about the machines: which cluster, how many nodes, how many samples."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_par.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning_par.planner import Cluster


@dataclass(frozen=True)
class Question:
    """What is asked for.

    Attributes:
        cluster: name or path of a YAML file.
        changes: words that change single numbers of it, such as ``device.memory_gib=40``.
        num_nodes: nodes.
        batch: samples of a step; None for those of the first batch.
        overrides: words about the rest of the run.
    """

    cluster: str
    changes: tuple[str, ...]
    num_nodes: int
    batch: int | None
    overrides: tuple[str, ...]


def read_question(words: Sequence[str]) -> Question:
    """Sort the words of a command line.

    Raises:
        ConfigurationError: no cluster is named, a number is none, or a layout is given.
    """
    values: dict[str, str] = {}
    changes, overrides = list[str](), list[str]()
    for word in words:
        key, _, value = word.partition("=")
        if key in ("cluster", "num_nodes", "batch"):
            values[key] = value
        elif key.startswith("cluster."):
            changes.append(word.removeprefix("cluster."))
        elif key == "parallel":
            raise ConfigurationError(f"{word}: plan finds the layout: leave the word out, or see `lightning-par explain {word}`")
        else:
            overrides.append(word)
    if "cluster" not in values:
        raise ConfigurationError(f"plan needs the machines: add cluster=NAME; there are {', '.join(sorted(_names(())))}")
    numbers = {key: _whole(key, values[key]) for key in ("num_nodes", "batch") if key in values}
    return Question(values["cluster"], tuple(changes), numbers.get("num_nodes", 1), numbers.get("batch"), tuple(overrides))


def load_cluster(question: Question, config_dir: str | None) -> Cluster:
    """The cluster that is asked for; a folder ``cluster/`` of the user's wins over what is shipped.

    Raises:
        ConfigurationError: there is no such file, or a number in it cannot be.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from lightning_par.planner import read_cluster

    folders = [Path(config_dir, "cluster")] if config_dir else []
    names = _names(folders)
    path = Path(question.cluster) if question.cluster.endswith((".yaml", ".yml")) else names.get(question.cluster)
    if path is None or not path.is_file():
        near = difflib.get_close_matches(question.cluster, names, n=1)
        hint = f"did you mean cluster={near[0]}?" if near else f"there are {', '.join(sorted(names))}"
        raise ConfigurationError(f"cluster={question.cluster}: there is no such file: {hint}")
    try:
        config = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(question.changes)))
        plain: Any = OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigurationError(f"cluster={question.cluster}: {path} cannot be read: {error}") from None
    return read_cluster(plain, path.stem, question.num_nodes)


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """The files of the shipped clusters and of the user's, by name."""
    from lightning_par.planner.cluster import SHIPPED

    return {path.stem: path for folder in (SHIPPED, *folders) for path in sorted(folder.glob("*.yaml"))}


def _whole(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigurationError(f"{key}={value}: it must be a whole number of at least 1")
    return int(value)
