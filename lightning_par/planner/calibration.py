"""What was measured of a cluster: seconds of actions, found again by what they compute, and its links; a JSON file.

An action is known by the digest of its operations (`lightning_par.planner.work.Line`): a layer of another run finds its numbers, a
model that was changed finds none. Files that nobody named are in ``lightning_par/calibration`` of the user's cache folder, one for
each cluster and device.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_par.errors import ConfigurationError
from lightning_par.planner.link import Link

LINKS = ("inside", "between")
_VERSION = 1


@dataclass(frozen=True)
class Series:
    """One action, measured.

    Attributes:
        of: what was measured, in words, such as ``F of network.blocks.1 over tp2``.
        seconds: by the rows of the microbatch, fewer rows first.
    """

    of: str
    seconds: Mapping[int, float]

    def at(self, rows: int) -> float:
        """Seconds with any number of rows: on the line through the nearest two that were measured, proportional to a single one."""
        known = sorted(self.seconds)
        if len(known) == 1:
            return self.seconds[known[0]] * rows / known[0]
        right = min(max(bisect_left(known, rows), 1), len(known) - 1)
        few, more = known[right - 1], known[right]
        slope = (self.seconds[more] - self.seconds[few]) / (more - few)
        if not few <= rows <= more:  # more rows never take less time, whatever noise says
            slope = max(slope, 0.0)
        end = more if rows > more else few
        return max(self.seconds[end] + slope * (rows - end), 0.0)


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        cluster: its name.
        device: the name by which its devices call themselves.
        torch: the version that computed.
        date: of the last measurement, as ``2026-11-26``.
        series: by digest.
        links: ``inside`` and ``between``, those that were measured.
    """

    cluster: str
    device: str
    torch: str
    date: str
    series: Mapping[str, Series] = field(default_factory=dict)
    links: Mapping[str, Link] = field(default_factory=dict)

    def seconds(self, digest: str, rows: int) -> float | None:
        """Of an action; None where it was not measured."""
        series = self.series.get(digest)
        return None if series is None else series.at(rows)

    def joined(self, newer: Calibration) -> Calibration:
        """This one, with what a later run has measured in its place. Nothing is left of what another version of torch computed."""
        if self.torch != newer.torch:
            return newer
        series = dict(self.series)
        for digest, found in newer.series.items():
            before = series[digest].seconds if digest in series else {}
            series[digest] = Series(found.of, dict(sorted({**before, **found.seconds}.items())))
        return Calibration(newer.cluster, newer.device, newer.torch, newer.date, series, {**self.links, **newer.links})

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"version": _VERSION, **asdict(self)}


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write a file, whole or not at all; its folder is made where there is none.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(calibration.to_json(), indent=1) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_calibration(path: Path) -> Calibration:
    """Read a file.

    Raises:
        ConfigurationError: it is not there, or nothing that `write_calibration` has written.
    """
    try:
        data = json.loads(path.read_text())
        if data.pop("version") != _VERSION:
            raise ValueError("it is of another version of lightning_par")
        links = {name: _link(name, **link) for name, link in data.pop("links").items()}
        series = {digest: _series(**found) for digest, found in data.pop("series").items()}
        return Calibration(**data, series=series, links=links)
    except OSError as error:
        raise ConfigurationError(f"calibration={path} cannot be read ({error.strerror}): name a file of calibrate") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(
            f"calibration={path} is damaged ({type(error).__name__}: {error}): remove it, and run lightning-par calibrate again"
        ) from None


def _series(of: str, seconds: Mapping[str, float]) -> Series:
    if not seconds or not min(seconds.values()) > 0:
        raise ValueError(f"{of} takes no time")
    return Series(of, {int(rows): float(value) for rows, value in seconds.items()})


def _link(name: str, bytes_per_second: float, latency_seconds: float) -> Link:
    if name not in LINKS or not min(bytes_per_second, latency_seconds) > 0:
        raise ValueError(f"{name} is no link")
    return Link(bytes_per_second, latency_seconds)


def cached_path(cluster: str, device: str) -> Path:
    """Where the calibration of a cluster is kept."""
    return _folder() / f"{_slug(cluster)}--{_slug(device)}.json"


def cached_of_cluster(cluster: str) -> list[Path]:
    """The files of a cluster, one for each device that it was calibrated with."""
    return sorted(_folder().glob(f"{_slug(cluster)}--*.json"))


def cached_of_device(device: str) -> list[Path]:
    """The files of a device, one for each cluster that it was calibrated for, the newest last."""
    return sorted(_folder().glob(f"*--{_slug(device)}.json"), key=lambda path: path.stat().st_mtime)


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lightning_par", "calibration")


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", name)
