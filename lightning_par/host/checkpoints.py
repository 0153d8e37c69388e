"""The checkpoints of a run: what Lightning keeps, with the model states of every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_par.checkpoint import Checkpoint, Content, Saver, merge_members, take_apart, together
from lightning_par.engine import Engine
from lightning_par.host.launch.restart import this_run


class RunCheckpoints:
    """Saves and loads. Every rank makes the same calls; collective over the world to build.

    Args:
        engine: the module in motion.
        is_async: whether files are written in the background.

    Attributes:
        engine: the same.
    """

    def __init__(self, engine: Engine, is_async: bool) -> None:
        self.engine = engine
        mesh = engine.mesh
        # of its own: what is written in the background agrees on it while training uses the others
        self._group = dist.new_group(backend="gloo", timeout=mesh.timeout) if mesh.world.size > 1 else None
        self._saver = Saver(self._group, is_async)
        self._opened: tuple[Checkpoint, dict[str, Any]] | None = None

    def save(self, path: Path, trainer: dict[str, Any], data: dict[str, Any] | None = None) -> None:
        """Write a checkpoint, or begin to. Collective over the world.

        Args:
            path: the folder.
            trainer: what Lightning keeps, of which rank 0's is written.
            data: what this replica keeps of its data; None outside of ``fit``.

        Raises:
            CheckpointError: it, or the one before in the background, could not be written.
        """
        self.wait()  # it may be using the group
        has_states = "optimizer_states" in trainer
        recorded = this_run()
        if recorded is not None and has_states:
            recorded.note_save(path)
        run, mesh = self.engine.run_state(has_states), self.engine.mesh
        if data is not None:
            run["streams"]["num_steps"] -= data["unfinished"]  # they are computed again
        spoken = {} if data is None or mesh.replica.coordinate else {mesh.dp.coordinate: data}
        numbers: dict[str, dict[str, Any]] = {}
        replicas: dict[int, dict[str, Any]] = {}
        own = run.pop("numbers", {}), run.pop("members", []), spoken
        every = together(self._group, f"{path} could not be written", lambda: own)
        for each, _, kept in every:
            replicas.update(kept)
            for name, values in each.items():
                numbers.setdefault(name, {}).update(values)
        names = [parameter.spec.name for parameter in self.engine.plan.parameters]
        parts = {
            "numbers": numbers,
            "members": merge_members([members for _, members, _ in every], names),
            "data": [replicas[replica] for replica in sorted(replicas)],
        }
        content = {"trainer": trainer, "run": {**run, **parts}} if mesh.rank == 0 else {}
        layout = str(self.engine.plan.layout)
        self._saver.save(path, Content(layout, self.engine.share(has_states), take_apart(content)))

    def open(self, path: Path, trust: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Open a checkpoint. Collective over the world.

        Args:
            path: the folder.
            trust: whether what is pickled is read too, which may run any code.

        Returns:
            What Lightning keeps, and what each replica keeps of its data.

        Raises:
            CheckpointError: on every rank, where one cannot read it.
        """
        self.wait()
        together(self._group, f"ckpt_path={path} could not be read", lambda: self._open(path, trust))
        assert self._opened is not None
        content = self._opened[1]
        return content["trainer"], content["run"].get("data", [])

    def _open(self, path: Path, trust: bool) -> None:
        checkpoint = Checkpoint(path)
        left_out = [] if trust else checkpoint.odd_places()
        if left_out:
            rank_zero_warn(
                f"{path}: {', '.join(left_out)} can only be unpickled, which may run any code, and is left out: give "
                "weights_only=False to fit, if you trust where the checkpoint comes from"
            )
        self._opened = checkpoint, checkpoint.trainer(trust)

    def restore(self, is_strict: bool) -> None:
        """Take over the model states of what was opened. Collective over the world."""
        assert self._opened is not None, "Lightning opens a checkpoint before it restores from it"
        (checkpoint, content), self._opened = self._opened, None
        self.settle()
        self.engine.restore(checkpoint, content["run"], is_strict)

    def remove(self, path: Path) -> None:
        """Remove a checkpoint, once the one that is being saved is there. On rank 0."""
        self._saver.remove(path)

    def settle(self) -> None:
        """Wait until the weights and optimizer states may be changed. Before each step of an optimizer."""
        self._saver.settle()

    def check(self) -> None:
        """Raise what the save in the background has ended with."""
        self._saver.check()

    def wait(self) -> None:
        """Wait for the save in the background, and raise what it has ended with."""
        self._saver.wait()
