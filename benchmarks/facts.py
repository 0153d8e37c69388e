"""Where a result was made."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version


def machine() -> str:
    """Such as ``x86_64, 2 cores, Linux, gloo``."""
    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, gloo"


def versions(*packages: str) -> str:
    """Of Python and the packages."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
