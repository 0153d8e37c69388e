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

from lightning_par.errors import ConfigurationError
from lightning_par.private.deepspeed import Traffic, ZeroEngine, mark_stepped, start_zero_engine
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.nested import tensors_in
from lightning_par.runtime.ring import ring_bytes
from lightning_par.zero.bucket import gradient_dtype, set_gradient
from lightning_par.zero.config import deepspeed_config
from lightning_par.zero.early import EarlyReduction
from lightning_par.zero.held import WEIGHT, Held, Source, agreed, is_elementwise, placed
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
        self._traffic = Traffic(ring_bytes)
        self._folder.reserve(self.engine.files_to_come(kept))
        self._early = EarlyReduction(self.engine, self._shapes, mesh) if options.reduce == MICROBATCH else None

    @property
    def sent_bytes(self) -> float:
        return self._traffic.sent_bytes

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

    def weights(self) -> Iterator[Held]:
        for parameter in self.module.parameters():
            yield Held(parameter, WEIGHT, *self.engine.stored_piece(parameter))

    def held(self) -> Iterator[Held]:
        for parameter, values, start, is_shared in self._constants():
            yield Held(parameter, WEIGHT, values, start, is_shared)
        for group in range(len(self.engine.masters)):
            master, states = self.engine.read_state(group)
            flats = {WEIGHT: master, **{key: value for key, value in states.items() if is_elementwise(key, value, master)}}
            for parameter, start, place, length in self._pieces(group):
                for key, flat in flats.items():
                    yield Held(parameter, key, flat.detach().narrow(0, place, length), start, is_shared=False)

    def numbers(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        for group in range(len(self.engine.masters)):
            master, states = self.engine.read_state(group)
            numbers = {key: value for key, value in states.items() if not is_elementwise(key, value, master)}
            for parameter, _, _, _ in self._pieces(group) if numbers else ():
                yield parameter, numbers

    @torch.no_grad()
    def refill(self, source: Source) -> None:
        for parameter, values, start, is_shared in self._constants():
            source.fill(Held(parameter, WEIGHT, values, start, is_shared))
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        for group in range(len(self.engine.masters)):
            pieces = list(self._pieces(group))
            if not pieces:
                continue  # padding alone, or the stand-in
            members = [parameter for parameter, _, _, _ in pieces]
            dtypes = {key: dtype for parameter in members for key, dtype in source.states_of(parameter).items()}
            numbers = agreed({names[parameter]: source.numbers_of(parameter) for parameter in members})
            with self.engine.state_replaced(group) as master:
                states = {key: torch.zeros_like(master, dtype=dtype) for key, dtype in dtypes.items()}
                for parameter, start, place, length in pieces:
                    for key, values in {WEIGHT: master, **states}.items():
                        if key == WEIGHT or key in source.states_of(parameter):
                            source.fill(Held(parameter, key, values.narrow(0, place, length), start, is_shared=False))
                options = self.optimizers[0].param_groups[0]
                loaded = {key: placed(key, value, master, options) for key, value in numbers.items()}
                self.engine.inner.state[master] = {**loaded, **states}
        self.engine.publish()

    def _pieces(self, group: int) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        """`ZeroEngine.pieces` without the stand-in, which is nobody's, and without empty ones."""
        for parameter, start, place, length in self.engine.pieces(group):
            if length and parameter in self._shapes:
                yield parameter, start, place, length

    def _constants(self) -> Iterator[tuple[nn.Parameter, Tensor, int, bool]]:
        """Parameters that are not stepped, as this rank stores them: the masters do not have them."""
        for parameter in self.module.parameters():
            if parameter not in self._shapes:
                yield parameter, *self.engine.stored_piece(parameter)

    def close(self) -> None:
        if self._early is not None:
            self._early.close()
        self._traffic.close()
        self.engine.destroy()
        self._folder.close()
        self._shapes = {}

    def dissolve(self) -> None:
        values = [value.clone() for _, value in self.full_parameters()]
        self.close()
        for parameter, value in zip(self.module.parameters(), values, strict=True):
            parameter.data = value


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
