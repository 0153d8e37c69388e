"""The words of commands that are about the machines: which cluster, how many nodes and samples, what was measured of it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_par.errors import ConfigurationError
from lightning_par.layout import Layout, parse_layout

if TYPE_CHECKING:
    from lightning_par.planner import Cluster
    from lightning_par.planner.calibration import Calibration


@dataclass(frozen=True)
class Question:
    """What is asked for.

    Attributes:
        cluster: name or path of a YAML file.
        changes: words that change single numbers of it, such as ``device.memory_gib=40``.
        num_nodes: nodes; None for those of the run's Trainer.
        batch: samples of a step; None for those of the first batch.
        calibration: a file of what was measured, or ``none``; None for the one that is cached.
        layout: whose place among the others is asked for, if any.
        overrides: words about the rest of the run.
    """

    cluster: str
    changes: tuple[str, ...]
    num_nodes: int | None
    batch: int | None
    calibration: str | None
    layout: Layout | None
    overrides: tuple[str, ...]


def read_question(words: Sequence[str], command: str = "plan") -> Question:
    """Sort the words of a command line.

    Args:
        words: the line.
        command: whose it is, for messages.

    Raises:
        ConfigurationError: no cluster is named, a number is none, the layout is none, or is given to calibrate.
    """
    values: dict[str, str] = {}
    changes, overrides, layout = list[str](), list[str](), None
    for word in words:
        key, _, value = word.partition("=")
        if key in ("cluster", "num_nodes", "batch", "calibration"):
            values[key] = value
        elif key.startswith("cluster."):
            changes.append(word.removeprefix("cluster."))
        elif key == "parallel":
            if command != "plan":
                raise ConfigurationError(f"{word}: {command} times all layouts of a node: leave the word out")
            layout = parse_layout(value)
        else:
            overrides.append(word)
    if "cluster" not in values:
        raise ConfigurationError(f"{command} needs the machines: add cluster=NAME; there are {', '.join(sorted(_names(())))}")
    numbers = {key: _whole(key, values[key]) for key in ("num_nodes", "batch") if key in values}
    nodes, batch, calibration = numbers.get("num_nodes"), numbers.get("batch"), values.get("calibration")
    return Question(values["cluster"], tuple(changes), nodes, batch, calibration, layout, tuple(overrides))


def load_cluster(question: Question, config_dir: str | None) -> Cluster:
    """The cluster that is asked for, with what was measured of it; a folder ``cluster/`` of the user's wins over what is shipped.

    It has one node where the question leaves their number open.

    Raises:
        ConfigurationError: there is no such file, a number in it cannot be, or what was measured cannot be read.
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
    cluster = read_cluster(plain, path.stem, 1 if question.num_nodes is None else question.num_nodes)
    calibration = None if question.calibration == "none" else _calibration(question, cluster.name)
    return cluster if calibration is None else cluster.calibrated(calibration)


def _calibration(question: Question, cluster: str) -> Calibration | None:
    """What was measured, without the numbers in whose place the user has typed others.

    Raises:
        ConfigurationError: a file cannot be read, or several devices were measured for this cluster.
    """
    from lightning_par.planner.calibration import cached_of_cluster, read_calibration

    paths = cached_of_cluster(cluster) if question.calibration is None else [Path(question.calibration)]
    if len(paths) > 1:
        files = " or ".join(f"calibration={path}" for path in paths)
        raise ConfigurationError(f"cluster={cluster} was calibrated with {len(paths)} devices: say {files}, or calibration=none")
    if not paths:
        return None
    found = read_calibration(paths[0])
    typed = {change.partition("=")[0] for change in question.changes}
    links = {name: link for name, link in found.links.items() if not any(word.startswith(f"{name}.") for word in typed)}
    rates = {word for word in typed if word.startswith("device.")} - {"device.memory_gib", "device.reserve", "device.name"}
    return replace(found, links=links, series={} if rates else found.series)


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """The files of the shipped clusters and of the user's, by name."""
    from lightning_par.planner.cluster import SHIPPED

    return {path.stem: path for folder in (SHIPPED, *folders) for path in sorted(folder.glob("*.yaml"))}


def _whole(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigurationError(f"{key}={value}: it must be a whole number of at least 1")
    return int(value)
