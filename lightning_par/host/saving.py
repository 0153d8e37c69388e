"""The checkpoints of a run as Lightning sees them: its hooks to save, load and remove them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning_par.engine import Engine
from lightning_par.host.checkpoints import RunCheckpoints
from lightning_par.host.option import Options
from lightning_par.host.ranks import RankedStrategy
from lightning_par.layout import Layout


class SavingStrategy(RankedStrategy):
    """The part of `HybridParallelStrategy` that saves and loads.

    Args:
        layout, typed, timeout: as for `RankedStrategy`.
    """

    options: Options

    def __init__(self, layout: Layout, typed: str, timeout: timedelta) -> None:
        super().__init__(layout, typed, timeout)
        self._engine: Engine | None = None
        self._checkpoints: RunCheckpoints | None = None
        self._trusts = False  # whether what is pickled in a checkpoint is read

    @property
    def engine(self) -> Engine:
        """The module in motion; there once the Trainer has set it up."""
        assert self._engine is not None
        return self._engine

    @property
    def checkpoints(self) -> RunCheckpoints:
        """Who saves and loads; there once the Trainer has set the strategy up."""
        if self._checkpoints is None or self._checkpoints.engine is not self.engine:
            self._checkpoints = RunCheckpoints(self.engine, self.options.async_save)
        return self._checkpoints

    def finish_saving(self) -> None:
        """Wait for what is written in the background."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    restore_checkpoint_after_setup = True  # a rank reads its own shards, which exist after setup
    lightning_restore_optimizer = False  # optimizer states are read with the shards

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: each rank's shards are written by `save_checkpoint`."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing, as for the weights."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder: what Lightning gives, once, and every rank's shards. Collective over the world."""
        data = None if self._data is None else self._data.state(checkpoint)
        self.checkpoints.save(Path(self.broadcast(str(filepath))), checkpoint, data)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read what Lightning gave to `save_checkpoint`. The shards follow in `load_model_state_dict`."""
        kept, data = self.checkpoints.open(Path(checkpoint_path), trust=self._trusts or weights_only is False)
        if self._data is not None and data:
            self._data.load(kept, data, self.dp_rank)
        return kept

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self.checkpoints.restore(strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The optimizer states came with the shards."""

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            self.checkpoints.remove(Path(filepath))
