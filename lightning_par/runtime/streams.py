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

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

from lightning_par.runtime.generator import generators_put_back, torch_generators
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
        self._generators = torch_generators(device)
        self._num_steps = 0
        self._seed_of_step = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around all microbatches of one step."""
        with generators_put_back(self._device):
            self._num_steps += 1
            self._seed_of_step = mix_seed(mix_seed(self._seed, self._replica), self._num_steps)
            yield

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
        random.seed(seed)
        numpy.random.seed(seed % 2**32)  # it takes no more
        for generator in self._generators:
            generator.manual_seed(seed)
