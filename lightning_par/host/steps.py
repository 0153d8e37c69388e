"""The hooks of a LightningModule run through an engine: a batch in, what one process would have returned out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from lightning_par.engine import Engine
from lightning_par.host.anomaly import AnomalyGuard, Trained
from lightning_par.host.batch import merge_outputs, split_batch
from lightning_par.host.fingerprint import check_same_batch
from lightning_par.host.last_stage import output_from_last_stage
from lightning_par.host.loss import give_no_gradient, loss_of
from lightning_par.host.loss_weight import TargetCount, count_targets
from lightning_par.host.stage_log import StageLog
from lightning_par.runtime.nested import map_tensors, tensors_in
from lightning_par.tensor import whole_tensor

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
        detects_anomaly: whether a loss that is not finite ends the run.

    Attributes:
        anomaly: who sees to that; None for nobody.
    """

    def __init__(self, engine: Engine, count: TargetCount | None = None, detects_anomaly: bool = False) -> None:
        self.engine, self.module, self.mesh, self._count = engine, engine.module, engine.mesh, count
        self._log = StageLog(self.module, self.mesh)
        self.anomaly = AnomalyGuard(engine, self._log) if detects_anomaly else None
        self._num_seen: dict[str, int] = {}
        self._has_warned = False
        self._may_loop = True  # whether predict_step may call its blocks again and again
        self._last: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = None  # what was predicted last

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
                give_no_gradient(loss_of(output))
            return output

        step = program, [scale * share for share in shares], loss_of, _shapes("training_step", pieces)
        if self.anomaly is not None:
            batches = [piece.batch if share else None for piece, share in zip(pieces, shares, strict=True)]
            self.anomaly.keep(Trained(args[0] if args else 0, batches, step, self.engine.streams.state_dict()))
        with self._log.step():
            outputs = self.engine.train(*step)
        return self._training_output(outputs, pieces, shares)

    def run_whole(self, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``training_step`` on the whole batch, for manual optimization, which runs its own backward."""
        with self._log.step():
            return self._program("training_step", self._cut("training_step", batch, 1), args, kwargs)(0)

    def evaluate(self, step: str, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A hook without gradients; the whole batch's output on every rank of the replica. Collective over the replica.

        Without a pipeline the batch stays whole. With parameters in parts (zero3) it is collective over the world, and for
        ``predict_step``, of which replicas have different numbers of batches, `end_predictions` must follow.
        """
        if step == "predict_step" and self._gathers:
            self._count_predicting(1)
            self._last = (batch, args, kwargs)
        if step == "predict_step" and self.mesh.layout.pp > 1 and self._may_loop:
            return self._predict_in_lockstep(batch, args, kwargs)
        pieces = self._cut(step, batch, (self.engine.plan.layout.microbatches or 1) if self.mesh.layout.pp > 1 else 1)
        with nullcontext() if step == "predict_step" else self._log.step():
            outputs = self.engine.evaluate(self._program(step, pieces, args, kwargs), len(pieces), _shapes(step, pieces))
        return output_from_last_stage(_merge(outputs, pieces), self.mesh, self.engine.device)

    def _predict_in_lockstep(self, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``predict_step`` on a whole batch by all stages together.

        A step that generates tokens runs its blocks once for each; if this one ran them once, the next batches are pipelined.
        """
        pieces = self._cut("predict_step", batch, 1)
        run = self._program("predict_step", pieces, args, kwargs)
        output, num_passes = self.engine.evaluate_in_lockstep(lambda: run(0))
        self._may_loop = num_passes > 1
        return output_from_last_stage(_merge([output], pieces), self.mesh, self.engine.device)

    def end_predictions(self) -> None:
        """Go on with the last batch, in vain, while other replicas have batches and need this one's parameters."""
        while self._last is not None and self._count_predicting(0):
            batch, args, kwargs = self._last
            pieces = [Microbatch(batch, 1, 1.0)]
            self.engine.evaluate(self._program("predict_step", pieces, args, kwargs), 1)
        self._last = None

    @property
    def _gathers(self) -> bool:
        """Whether a forward gathers parameters over dp."""
        return self.engine.states is not None and self.mesh.layout.zero == 3 and self.mesh.dp.size > 1

    def _count_predicting(self, own: int) -> int:
        """Replicas that are about to predict a batch. Collective over dp."""
        count = torch.tensor(own, device=self.engine.device)
        self.mesh.dp.all_reduce(count)
        return int(count)

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
            is_last = self.engine.runs_last_stage or not self.mesh.is_last_stage
            self._log.begin(index, pieces[index].size, pieces[index].weight, is_last)
            with self.engine.precision.computing(self.engine.device.type):
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
        mean, has_others = summary.tolist()  # one read: a GPU is waited for once
        if self.anomaly is not None:
            self.anomaly.check_loss(mean)
        loss = summary[0].float()
        return {"loss": loss, **output_from_last_stage(others, mesh, self.engine.device)} if has_others else loss

    def _check_batch(self, step: str, batch: Any) -> None:
        seen = self._num_seen[step] = self._num_seen.get(step, 0) + 1
        if seen <= NUM_CHECKED_BATCHES:
            check_same_batch(batch, self.mesh.replica, f"batch {seen - 1} of {step} on replica {self.mesh.coordinate.dp}")


def _shapes(step: str, pieces: list[Microbatch]) -> list[Hashable]:
    """For each microbatch what the shapes in a step follow from."""
    return [(step, *(tuple(tensor.shape) for tensor in tensors_in(piece.batch))) for piece in pieces]


def _merge(outputs: list[Any], pieces: list[Microbatch]) -> Any:
    """The outputs of all microbatches as one, without a graph, logits cut over the vocabulary made whole; None of none."""
    if not outputs:
        return None
    whole = [map_tensors(_whole, output) for output in outputs]
    return merge_outputs(whole, [piece.size for piece in pieces], [piece.weight for piece in pieces])


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return whole_tensor(tensor).detach()
