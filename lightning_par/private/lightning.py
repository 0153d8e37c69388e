"""Every private name of Lightning that this package uses, each with its reason. Read in Lightning 2.6.6.

Lightning comes under two names (`lightning.pytorch` and `pytorch_lightning`) whose classes are disjoint, so each function
takes the ``root`` to import from.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def script_launcher_class(root: str) -> type[Any]:
    """The launcher that starts the other ranks as scripts.

    `Trainer` ends ranks on Ctrl-C and forwards SIGTERM to them only if the launcher is an instance of it
    (trainer/call.py, trainer/connectors/signal_connector.py).
    """
    return import_module(f"{root}.strategies.launchers.subprocess_script")._SubprocessScriptLauncher


def share_threads(root: str, num_processes: int) -> None:
    """Divide this machine's threads between its ranks, unless OMP_NUM_THREADS is set; the base launcher does the same."""
    fabric = "lightning.fabric" if root.startswith("lightning.") else "lightning_fabric"
    import_module(f"{fabric}.utilities.distributed")._set_num_threads_if_needed(num_processes=num_processes)
