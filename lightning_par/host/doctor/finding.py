"""One thing that was looked at: what was found, whether it is usable, and one thing to do where it is not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["ok", "warning", "wrong"]


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        about: what was looked at.
        found: in words.
        status: ``ok``; ``warning``: usable, but slower, or not for everything; ``wrong``: a training will fail.
        remedy: one thing to do; empty where all is well.
    """

    about: str
    found: str
    status: Status = "ok"
    remedy: str = ""


def is_usable(findings: Iterable[Finding]) -> bool:
    """Whether nothing is wrong."""
    return all(finding.status != "wrong" for finding in findings)
