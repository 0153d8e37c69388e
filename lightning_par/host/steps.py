"""The hooks of a LightningModule run through an engine: a batch in, what one process would have returned out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from lightning_par.engine import Engine
from lightning_par.errors import ModelError
from lightning_par.host.batch import merge_outputs, split_batch
from lightning_par.host.fingerprint import check_same_batch
from lightning_par.host.stage_log import StageLog
from lightning_par.host.stage_metric import from_last_stage
from lightning_par.runtime.nested import map_tensors
from lightning_par.tensor import ShardedTensor

NUM_CHECKED_BATCHES = 3  # of each hook, compared between the ranks of a replica


class StepRunner:
    """Cuts a batch into microbatches, runs a hook on each where its stages are, puts the outputs together.

    Every rank makes the same calls.

    Args:
        engine: the module in motion.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.module, self.mesh = engine, engine.module, engine.mesh
        self._log = StageLog(self.module, self.mesh)
        self._num_seen: dict[str, int] = {}

    def train(self, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any], scale: float) -> Any:
        """``training_step`` and its backward on every microbatch. Collective over the world.

        Args:
            batch: this replica's batch.
            args, kwargs: what the hook gets besides.
            scale: factor of the loss in the backward.

        Returns:
            The mean loss over the batch and all replicas, without a graph, equal on every rank; where the hook returns a
            dict, the merged other entries beside it.
        """
        self._check_batch("training_step", batch)
        pieces = split_batch(batch, self.engine.plan.layout.microbatches or 1)
        sizes = [size for _, size in pieces]
        with self._log.step():
            outputs = self.engine.train(self._program("training_step", pieces, args, kwargs), sizes, loss_of, scale)
        return self._training_output(outputs, sizes)

    def run_whole(self, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``training_step`` on the whole batch, for manual optimization, which runs its own backward."""
        self._check_batch("training_step", batch)
        with self._log.step():
            return self._program("training_step", split_batch(batch, 1), args, kwargs)(0)

    def evaluate(self, step: str, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A hook without gradients; the whole batch's output on every rank of the replica. Collective over the replica.

        Without a pipeline the batch stays whole.
        """
        self._check_batch(step, batch)
        pieces = split_batch(batch, (self.engine.plan.layout.microbatches or 1) if self.mesh.layout.pp > 1 else 1)
        with nullcontext() if step == "predict_step" else self._log.step():
            outputs = self.engine.evaluate(self._program(step, pieces, args, kwargs), len(pieces))
        return from_last_stage(_merge(outputs, [size for _, size in pieces]), self.mesh)

    def close(self) -> None:
        """Undo what logging did to the module."""
        self._log.close()

    def _program(
        self, step: str, pieces: list[tuple[Any, int]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[int], Any]:
        run = getattr(self.module, step)

        def program(index: int) -> Any:
            microbatch, self._log.size = pieces[index]
            return run(microbatch, *args, **kwargs)

        return program

    def _training_output(self, outputs: list[Any], sizes: list[int]) -> Any:
        mesh, others = self.mesh, None
        summary = torch.zeros(2, dtype=torch.float64, device=self.engine.device)  # the mean loss; whether there is more
        if outputs:  # on the last stage
            losses = [size * loss_of(output).detach().double() for output, size in zip(outputs, sizes, strict=True)]
            summary[0] = sum(losses) / (sum(sizes) * mesh.tp.size * mesh.dp.size)
            if isinstance(outputs[0], Mapping):
                rest = [{key: value for key, value in output.items() if key != "loss"} for output in outputs]
                others = _merge(rest, sizes) or None
            summary[1] = float(others is not None)
        mesh.world.all_reduce(summary)
        loss = summary[0].float()
        return {"loss": loss, **from_last_stage(others, mesh)} if float(summary[1]) else loss

    def _check_batch(self, step: str, batch: Any) -> None:
        seen = self._num_seen[step] = self._num_seen.get(step, 0) + 1
        if seen <= NUM_CHECKED_BATCHES:
            check_same_batch(batch, self.mesh.replica, f"batch {seen - 1} of {step} on replica {self.mesh.coordinate.dp}")


def loss_of(output: Any) -> torch.Tensor:
    """The loss in what ``training_step`` returned.

    Raises:
        ModelError: there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, torch.Tensor):
        raise ModelError(
            f"training_step returned {'None' if loss is None else type(loss).__name__} for a batch: a parallel run needs the loss "
            "of every batch; return the loss tensor"
        )
    return loss


def _merge(outputs: list[Any], sizes: list[int]) -> Any:
    """The outputs of all microbatches as one, logits cut over the vocabulary made whole; None where there are none."""
    return merge_outputs([map_tensors(_whole, output) for output in outputs], sizes) if outputs else None


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, ShardedTensor) else tensor
