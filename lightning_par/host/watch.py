"""Has an engine's steps watched for ranks that hang."""

from __future__ import annotations

from typing import Any

import torch

from lightning_par.engine import Engine
from lightning_par.errors import ConfigurationError
from lightning_par.runtime.watchdog import LOOK_SECONDS, Watch


def check_hang_seconds(hang_seconds: float | None) -> float | None:
    """Check a number of seconds.

    Raises:
        ConfigurationError: it is no time that a watchdog could wait.
    """
    if hang_seconds is not None and not hang_seconds >= LOOK_SECONDS:
        raise ConfigurationError(
            f"hang_seconds={hang_seconds}: a watchdog looks once a second, so that it needs {LOOK_SECONDS:.0f} at the least: "
            "use 20, or None to let ranks hang"
        )
    return hang_seconds


def watch_engine(engine: Engine, launcher: Any, hang_seconds: float | None) -> None:
    """Watch the steps that the engine is given from now on; with several ranks, because a single one keeps nobody waiting.

    Args:
        engine: whose steps.
        launcher: ours; it ends a rank that hangs.
        hang_seconds: as `HybridParallelStrategy` takes it; None: watch nothing.
    """
    mesh = engine.mesh
    engine.observers[:] = [observer for observer in engine.observers if observer is not engine.watchdog]
    if hang_seconds is None or mesh.world.size == 1:
        engine.watchdog.stop()
        return
    timeout = mesh.timeout.total_seconds()
    is_busy = _is_busy_with(torch.cuda.current_stream(engine.device)) if engine.device.type == "cuda" else _is_never_busy
    engine.observers.append(engine.watchdog)
    engine.watchdog.start(Watch(launcher.supervisor, launcher.describe(mesh.rank), hang_seconds, timeout, is_busy))


def _is_busy_with(stream: torch.cuda.Stream) -> Any:
    """On a GPU the host runs ahead: what looks like its own time may be a wait for work that waits for other ranks."""
    return lambda: not stream.query()


def _is_never_busy() -> bool:
    return False
