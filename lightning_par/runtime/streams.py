"""Random numbers of a training step: seeded for each microbatch, whatever the layout and the schedule.

    code before the blocks     one stream for all stages and tp ranks of a replica: every stage computes the same masks
    blocks of a later stage    a stream of the stage
    everything                 other streams on other replicas, steps and microbatches

Streams follow from (seed, replica, step, microbatch, stage), so that a resumed run and a recomputed forward draw what
they drew before, and the order of a schedule does not matter. numpy and Python are seeded like torch: models draw masks
over time and the layers to skip from them. Around a step the generators are put back, so that what the ranks of a
replica draw outside of it (shuffling, transforms) stays equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_par.runtime.generator import generators_put_back, seed_generators
from lightning_par.runtime.random import mix_seed


class MicrobatchStreams:
    """Seeds the default generators of torch (on the CPU and on ``device``), numpy and Python.

    Args:
        seed: of the run, the same on every rank.
        replica: this rank's dp coordinate.
        device: where the module runs.
    """

    def __init__(self, seed: int, replica: int, device: torch.device) -> None:
        self._seed, self._replica, self._device = seed, replica, device
        self._num_steps = 0
        self._num_evaluations = 0  # since the last step of training
        self._seed_of_step = 0

    @contextmanager
    def step(self, trains: bool = True) -> Iterator[None]:
        """Around all microbatches of one step, which is not counted if it fails: a resumed run does it again.

        Steps that evaluate are counted apart: a resumed run may leave some out.
        """
        with generators_put_back(self._device):
            self._num_steps, self._num_evaluations = self._num_steps + trains, 0 if trains else self._num_evaluations + 1
            seed = mix_seed(mix_seed(self._seed, self._replica), self._num_steps)
            self._seed_of_step = seed if trains else mix_seed(seed, -self._num_evaluations)
            try:
                yield
            except BaseException:
                self._num_steps -= trains
                raise

    def begin(self, microbatch: int) -> None:
        """Before the user's step runs on a microbatch."""
        self._set(mix_seed(self._seed_of_step, microbatch))

    def enter_stage(self, microbatch: int, stage: int) -> None:
        """Where the blocks of a later stage begin."""
        self._set(mix_seed(mix_seed(self._seed_of_step, microbatch), stage + 1))

    def state_dict(self) -> dict[str, int]:
        """Where the streams are, equal on all ranks: a resumed run draws on, whatever seed its script sets."""
        return {"seed": self._seed, "num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was called."""
        self._seed, self._num_steps = state["seed"], state["num_steps"]

    def _set(self, seed: int) -> None:
        seed_generators(seed, self._device)
