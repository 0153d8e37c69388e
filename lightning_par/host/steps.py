"""The hooks of a LightningModule run through an engine: a batch in, what one process would have returned out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lightning_par.engine import Engine
from lightning_par.errors import ModelError
from lightning_par.host.batch import merge_outputs, split_batch
from lightning_par.host.fingerprint import check_same_batch
from lightning_par.host.loss_weight import TargetCount, count_targets
from lightning_par.host.stage_log import StageLog
from lightning_par.host.stage_metric import from_last_stage
from lightning_par.runtime.nested import map_tensors
from lightning_par.tensor import ShardedTensor

NUM_CHECKED_BATCHES = 3  # of each hook, compared between the ranks of a replica


@dataclass(frozen=True)
class Microbatch:
    """A part of a batch.

    Attributes:
        batch: the part.
        size: samples in it.
        weight: how much its means count: its targets where they are counted, else its samples.
    """

    batch: Any
    size: int
    weight: float


class StepRunner:
    """Cuts a batch into microbatches, runs a hook on each where its stages are, puts the outputs together.

    Every rank makes the same calls.

    Args:
        engine: the module in motion.
        count: what counts the targets of a batch; None to count its samples.
    """

    def __init__(self, engine: Engine, count: TargetCount | None = None) -> None:
        self.engine, self.module, self.mesh, self._count = engine, engine.module, engine.mesh, count
        self._log = StageLog(self.module, self.mesh)
        self._num_seen: dict[str, int] = {}
        self._has_warned = False

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
        pieces = self._cut("training_step", batch, self.engine.plan.layout.microbatches or 1)
        shares = self._shares(pieces)
        run = self._program("training_step", pieces, args, kwargs)

        def program(index: int) -> Any:
            output = run(index)
            if not shares[index]:
                _give_no_gradient(loss_of(output))
            return output

        with self._log.step():
            outputs = self.engine.train(program, [scale * share for share in shares], loss_of)
        return self._training_output(outputs, pieces, shares)

    def run_whole(self, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``training_step`` on the whole batch, for manual optimization, which runs its own backward."""
        with self._log.step():
            return self._program("training_step", self._cut("training_step", batch, 1), args, kwargs)(0)

    def evaluate(self, step: str, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A hook without gradients; the whole batch's output on every rank of the replica. Collective over the replica.

        Without a pipeline the batch stays whole.
        """
        pieces = self._cut(step, batch, (self.engine.plan.layout.microbatches or 1) if self.mesh.layout.pp > 1 else 1)
        with nullcontext() if step == "predict_step" else self._log.step():
            outputs = self.engine.evaluate(self._program(step, pieces, args, kwargs), len(pieces))
        return from_last_stage(_merge(outputs, pieces), self.mesh)

    def close(self) -> None:
        """Undo what logging did to the module."""
        self._log.close()

    def _cut(self, step: str, batch: Any, num_microbatches: int) -> list[Microbatch]:
        """The parts of a batch, their targets counted where the means are made: on the last stage."""
        self._check_batch(step, batch)
        pieces = split_batch(batch, num_microbatches)
        weights = [float(size) for _, size in pieces]
        count = self._count if self.mesh.is_last_stage and step != "predict_step" else None
        if count is not None and (step == "training_step" or count.is_in(batch)):
            weights = count_targets(count, [piece for piece, _ in pieces])
        return [Microbatch(*piece, weight) for piece, weight in zip(pieces, weights, strict=True)]

    def _shares(self, pieces: list[Microbatch]) -> list[float]:
        """The factor of each microbatch in the loss of this replica; the mean over replicas is taken after the backward.

        With n replicas, c targets in a microbatch and C in all of all replicas it is n c / C. Collective over dp on the last
        stage where targets are counted.
        """
        total = sum(piece.weight for piece in pieces)
        if self._count is not None and self.mesh.is_last_stage:
            summed = torch.tensor(total, dtype=torch.float64, device=self.engine.device)
            self.mesh.dp.all_reduce(summed)
            total = float(summed) / self.mesh.dp.size
        if not total and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._count} counts no target in a whole batch: its loss is taken as 0 and its gradient as zero, here and in "
                "any later batch like it",
                stacklevel=2,
            )
        return [piece.weight / (total or 1.0) for piece in pieces]

    def _program(self, step: str, pieces: list[Microbatch], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[int], Any]:
        run = getattr(self.module, step)

        def program(index: int) -> Any:
            self._log.begin(index, pieces[index].size, pieces[index].weight)
            return run(pieces[index].batch, *args, **kwargs)

        return program

    def _training_output(self, outputs: list[Any], pieces: list[Microbatch], shares: list[float]) -> Any:
        mesh, others = self.mesh, None
        summary = torch.zeros(2, dtype=torch.float64, device=self.engine.device)  # the mean loss; whether there is more
        if outputs:  # on the last stage
            losses = [share * loss_of(output).detach().double() for output, share in zip(outputs, shares, strict=True) if share]
            summary[0] = sum(losses) / (mesh.tp.size * mesh.dp.size)
            if isinstance(outputs[0], Mapping):
                rest = [{key: value for key, value in output.items() if key != "loss"} for output in outputs]
                others = _merge(rest, pieces) or None
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
        ModelError: there is none, or it is more than one number.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, torch.Tensor):
        raise ModelError(
            f"training_step returned {'None' if loss is None else type(loss).__name__} for a batch: a parallel run needs the loss "
            "of every batch; return the loss tensor"
        )
    if loss.numel() != 1:
        raise ModelError(
            f"training_step returned a loss of shape {tuple(loss.shape)} for a batch, and the backward starts from one number: "
            "return its mean, loss.mean()"
        )
    return loss


def _give_no_gradient(loss: torch.Tensor) -> None:
    """Let the backward of ``loss`` pass zeros on, through its whole graph.

    A mean over no target is undefined, and a gradient of 0 times that is too. The backward itself must run: other stages and
    replicas wait for what it sends.
    """
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node.next_functions and node not in seen:  # the ends are the parameters', for all microbatches
            seen.add(node)
            node.register_prehook(_zeros)
            waiting += [following for following, _ in node.next_functions]


def _zeros(gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if gradient is None else torch.zeros_like(gradient) for gradient in gradients)


def _merge(outputs: list[Any], pieces: list[Microbatch]) -> Any:
    """The outputs of all microbatches as one, logits cut over the vocabulary made whole; None where there are none."""
    if not outputs:
        return None
    whole = [map_tensors(_whole, output) for output in outputs]
    return merge_outputs(whole, [piece.size for piece in pieces], [piece.weight for piece in pieces])


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, ShardedTensor) else tensor
