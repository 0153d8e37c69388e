"""ZeRO stages 1, 2 and 3 by DeepSpeed: one engine per rank around the parameters that the rank holds.

Source: ZeRO, arXiv 1910.02054; DeepSpeed's insides are in `lightning_par.private.deepspeed`. DeepSpeed steps a copy of the
user's optimizer, because it takes apart the one it gets: flat partitions in place of parameters, empty groups dropped. The
hyperparameters of the user's groups are copied over before each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_par.errors import CheckpointError, ConfigurationError
from lightning_par.private.deepspeed import ZeroEngine, mark_stepped, start_zero_engine
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.nested import tensors_in
from lightning_par.zero.bucket import gradient_dtype, set_gradient
from lightning_par.zero.config import deepspeed_config
from lightning_par.zero.early import EarlyReduction
from lightning_par.zero.masters import accumulate_in_float32
from lightning_par.zero.mpu import MeshUnit
from lightning_par.zero.nvme import StateFolder, check_files, check_locked_memory
from lightning_par.zero.optimizer import check_optimizer
from lightning_par.zero.option import MICROBATCH, ZeroOptions
from lightning_par.zero.states import Fragment, OptimizerStates, Stored
from lightning_par.zero.twin import hyperparameters, twin_of


class DeepSpeedStates(OptimizerStates):
    """Optimizer states (stage 1), gradients too (2), parameters too (3), partitioned over dp.

    States, gradients and what is stepped are float32. Parameters are too, and mixed precision is left to autocast; or they are
    bfloat16, and DeepSpeed keeps float32 masters. Collective over the world to build.

    Args:
        module: the module on this rank. It may hold only parameters that this rank has, no placeholders.
        optimizers: exactly one, whose update of an element reads that element alone (Adam, AdamW, SGD and the like).
        stage: 1, 2 or 3.
        mesh: the mesh of the run, dp at least 2.
        options: the section ``zero``.
        has_masters: whether the parameters are bfloat16.
        units: modules whose parameters stage 3 gathers all at once, such as the blocks: a collective for each of their small
            layers would cost more than it saves.
        fill: in stage 3, gives a parameter its memory, just before it is partitioned; None where all have it.

    Raises:
        ConfigurationError: several optimizers, one that is not elementwise, parameters of another dtype, no
            DeepSpeed of the right version, or a machine that cannot keep states in files.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        stage: int,
        mesh: Mesh,
        options: ZeroOptions | None = None,
        has_masters: bool = False,
        units: Iterable[nn.Module] = (),
        fill: Callable[[nn.Parameter], None] | None = None,
    ) -> None:
        super().__init__(module, optimizers)
        options = options or ZeroOptions()
        self.stage = stage
        _check(stage, module, optimizers, torch.bfloat16 if has_masters else torch.float32)
        trainable = [[p for p in group["params"] if p.requires_grad] for group in optimizers[0].param_groups]
        self._sources = [i for i, parameters in enumerate(trainable) if parameters]
        groups = [{**optimizers[0].param_groups[i], "params": trainable[i]} for i in self._sources]
        self._shapes = {p: tuple(p.shape) for group in groups for p in group["params"]}
        root: nn.Module = nn.ModuleList([module]) if stage == 3 else nn.ParameterList(self._shapes)
        device = next(module.parameters()).device
        if not groups:  # DeepSpeed cannot start without a parameter, and its peers would wait
            stand_in = nn.Parameter(torch.zeros(1, device=device))
            root.add_module("stand_in", nn.ParameterList([stand_in]))
            groups = [{**optimizers[0].defaults, "params": [stand_in]}]
        if has_masters:
            accumulate_in_float32(self._shapes)
        kept = check_files(options, optimizers[0], device)
        self._folder = StateFolder(options.nvme_path, mesh.rank)
        files = self._folder.config(len(kept))
        config = deepspeed_config(stage, sum(p.numel() for p in self._shapes), options, device, has_masters, files)
        check_locked_memory(config, [[p.numel() for p in group["params"]] for group in groups], mesh.dp.size)
        self.engine: ZeroEngine = start_zero_engine(
            stage, root, twin_of(optimizers[0], groups), MeshUnit(mesh), config, device, units, fill
        )
        self._folder.reserve(self.engine.files_to_come(kept))
        self._early = EarlyReduction(self.engine, self._shapes, mesh) if options.reduce == MICROBATCH else None

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        self.engine.detect_borrowed(True)
        try:
            with self.engine.saving():
                yield
        finally:
            self.engine.detect_borrowed(False)

    @contextmanager
    def evaluate(self) -> Iterator[None]:
        self.engine.detect_borrowed(True)
        try:
            yield
            self.engine.settle(keep=False)
        finally:
            self.engine.detect_borrowed(False)

    def after_forward(self) -> None:
        self.engine.settle(keep=torch.is_grad_enabled())

    def after_backward(self) -> None:
        """Also, where gradients are reduced at every microbatch, a collective over dp."""
        if self._early is not None:
            self._early.after_backward()
        self.engine.release_backward()

    def reduce(self, optimizer: Optimizer | None = None) -> None:
        """Average gradients over dp. A missing one counts as zero: stage 3 would apply the one of the last step again."""
        if self._early is not None:
            self._early.finish()
            return
        for parameter, shape in self._shapes.items():
            if parameter.grad is None:
                set_gradient(parameter, torch.zeros(shape, dtype=gradient_dtype(parameter), device=parameter.device))
        self.engine.flush()

    def gradients(self, optimizer: Optimizer | None = None) -> Iterator[Fragment]:
        for gradient, parameter, start in self.engine.fragments():
            if parameter in self._shapes:  # the stand-in is nobody's
                yield Fragment(gradient, parameter, start, is_counted=True)

    def step(self, optimizer: Optimizer | None = None) -> None:
        for i, group in zip(self._sources, self.engine.inner.param_groups, strict=False):
            group.update(hyperparameters(self.optimizers[0].param_groups[i]))
        self.engine.step()
        mark_stepped(self.optimizers[0])

    def zero_grad(self, optimizer: Optimizer | None = None) -> None:
        self.engine.forget_gradients()
        if self._early is not None:
            self._early.forget()

    def stored(self) -> Stored:
        parameters = list(self.module.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        moments = tensors_in(list(self.engine.inner.state.values()))
        stored = [self.engine.stored(parameter) for parameter in parameters]
        return Stored(stored, gradients + self.engine.buffers, self.engine.masters + moments)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.module.named_parameters():
            with self.engine.whole(parameter):
                yield name, parameter.detach()

    def state_dict(self) -> dict[str, Any]:
        states = [self.engine.read_state(group) for group in range(len(self.engine.masters))]
        return {
            "zero_stage": self.stage,
            "constants": self._constants(),
            "masters": [master for master, _ in states],
            "moments": [moments for _, moments in states],
            "groups": [hyperparameters(group) for group in self.optimizers[0].param_groups],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        here, there = _outline(self.state_dict()), _outline(state)
        for what, value in here.items():
            if value != there[what]:
                raise CheckpointError(f"the checkpoint is of another layout or module: its {what}: {there[what]}, here {value}")
        with torch.no_grad():
            for name, tensor in self._constants().items():
                tensor.copy_(state["constants"][name])
            for index, (value, moments) in enumerate(zip(state["masters"], state["moments"], strict=True)):
                with self.engine.state_replaced(index) as master:
                    master.copy_(value)
                    self.engine.inner.state[master] = {key: self._placed(each, master) for key, each in moments.items()}
        for group, saved in zip(self.optimizers[0].param_groups, state["groups"], strict=True):
            group.update(saved)
        self.engine.publish()

    def close(self) -> None:
        if self._early is not None:
            self._early.close()
        self.engine.destroy()
        self._folder.close()
        self._shapes = {}

    def dissolve(self) -> None:
        values = [value.clone() for _, value in self.full_parameters()]
        self.close()
        for parameter, value in zip(self.module.parameters(), values, strict=True):
            parameter.data = value

    def _constants(self) -> dict[str, Tensor]:
        """Parameters that are not stepped, by name, as this rank stores them: the masters do not have them."""
        others = {name: p for name, p in self.module.named_parameters() if p not in self._shapes}
        return {name: self.engine.stored(p) for name, p in others.items()}

    def _placed(self, value: Any, master: Tensor) -> Any:
        """A copy of a loaded optimizer state. Step counts stay on the CPU unless the kernel reads them, as in torch."""
        if not isinstance(value, Tensor):
            return value
        is_on_device = value.dim() > 0 or any(g.get("fused") or g.get("capturable") for g in self.optimizers[0].param_groups)
        return value.to(master.device, copy=True) if is_on_device else value.clone()


def _check(stage: int, module: nn.Module, optimizers: Sequence[Optimizer], dtype: torch.dtype) -> None:
    check_optimizer(stage, optimizers)
    for name, parameter in module.named_parameters():
        if parameter.dtype != dtype and (parameter.requires_grad or stage == 3):  # stages 1 and 2 leave frozen ones alone
            keeps, remedy = str(dtype).removeprefix("torch."), "precision=bf16-true"
            if dtype is torch.bfloat16 or parameter.dtype is not torch.bfloat16:
                remedy = f"module.{'bfloat16' if dtype is torch.bfloat16 else 'float'}() before the run"
            raise ConfigurationError(
                f"zero{stage} keeps parameters in {keeps} here, and {name} is {parameter.dtype}: use {remedy}, or zero0"
            )


def _outline(state: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a state to be loaded."""
    return {
        "ZeRO stage": state.get("zero_stage", 0),
        "parameters without optimizer": {name: tuple(value.shape) for name, value in state.get("constants", {}).items()},
        "sizes of partitions": [master.numel() for master in state.get("masters", [])],
        "number of parameter groups": len(state.get("groups", [])),
    }
