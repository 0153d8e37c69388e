"""The calls of blocks that a run makes, of all containers, and the chain that they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_par.runtime.nested import tensors_in
from lightning_par.runtime.template import arguments_of, describe, tensors_by_path
from lightning_par.trace.chain import Containers, blocks_of
from lightning_par.trace.loop import Loop
from lightning_par.trace.parts import Parts, in_phases, joined
from lightning_par.trace.passage import BlockCall, NoChain, follow_blocks
from lightning_par.trace.record import Block, Op, Value


class Calls:
    """Follows a run from block to block.

    Args:
        module: the copy that runs.
        containers: of its blocks.
        number: gives the number of a tensor.
        may_loop: whether the blocks may run again after they have all run, see `Loop`.

    Attributes:
        parts: the parts of the run.
        open_blocks: paths of the blocks that are running, outermost first.
        fault: why the main container's blocks are no chain.
        num_blocks: of the main container.
        leaving: numbers of what blocks of other containers returned.
        loop: tells the passes over the blocks apart.
        chains, blocks: once `follow` has been called, the containers of the chain and its blocks.
    """

    def __init__(self, module: nn.Module, containers: Containers, number: Callable[[torch.Tensor], int], may_loop: bool) -> None:
        self._containers, self._number = containers, number
        paths = [path for path in (containers.main, *containers.others) if path is not None]
        names = {path: blocks_of(module, path) for path in paths}
        self._sizes = {path: len(blocks) for path, blocks in names.items()}
        self._places = {name: (path, index) for path, blocks in reversed(names.items()) for index, name in enumerate(blocks)}
        self.num_blocks = 0 if containers.main is None else self._sizes[containers.main]
        self.parts = Parts()
        self.open_blocks: list[str] = []
        self.fault: str | None = None
        self.leaving: set[int] = set()
        self.loop = Loop() if may_loop else None
        self.chains: tuple[str, ...] = ()
        self.blocks: tuple[Block, ...] = ()
        self._calls: list[BlockCall] = []  # of this pass over the blocks
        self._first_calls: list[BlockCall] = []  # of the first pass, once a second has begun
        self._open_calls: list[BlockCall | None] = []  # None where a call begins no part
        self._num_main = 0  # calls of the main container's blocks in this pass

    @property
    def is_complete(self) -> bool:
        """Whether all blocks of the main container have been called in this pass."""
        return self._num_main == self.num_blocks

    @property
    def is_first_pass(self) -> bool:
        return not self._first_calls

    def is_block(self, name: str) -> bool:
        return name in self._places

    def enter(self, name: str, args: Any, kwargs: Any, num_ops: int) -> None:
        """A block is called, after ``num_ops`` operations."""
        container, index = self._places[name]
        is_main = container == self._containers.main
        if is_main:
            self._enter_main(index, name, num_ops)
        call = None
        if self.fault is None if is_main else not self.open_blocks:
            self.parts.begin(name, is_call=True)
            arguments = {path: self._number(tensor) for path, tensor in tensors_by_path(arguments_of(args, kwargs))}
            call = BlockCall(name, container, index, arguments, torch.is_grad_enabled())
            self._calls.append(call)
        self._open_calls.append(call)
        self.open_blocks.append(name)

    def _enter_main(self, index: int, name: str, num_ops: int) -> None:
        if self.loop is not None and index == 0 and self._num_main in (0, self.num_blocks):
            self.loop.enter_blocks(num_ops)
            self._first_calls, self._calls, self._num_main = self._first_calls or self._calls, [], 0
        if index != self._num_main:
            last = next((call.path for call in reversed(self._calls) if call.container == self._containers.main), None)
            after = "first" if last is None else f"after {last}"
            self.fault = self.fault or f"its blocks do not run once each, in order ({name} ran {after})"
        self._num_main += 1

    def leave(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        """A block has returned."""
        call = self._open_calls.pop()
        self.open_blocks.pop()
        if call is not None:
            self.parts.begin(name, is_call=False)
            given = {id(tensor): path for path, tensor in reversed(list(tensors_by_path(arguments_of(args, kwargs))))}
            results = list(tensors_by_path(output))
            call.template = describe(output)
            call.results = {path: self._number(tensor) for path, tensor in results}
            call.passed = {path: given[id(tensor)] for path, tensor in results if id(tensor) in given}
        if self._places[name][0] != self._containers.main:
            self.leaving.update(self._number(tensor) for tensor in tensors_in(output))

    def follow(self, ops: Sequence[Op], values: Sequence[Value], returned: Sequence[int]) -> None:
        """After the run: the blocks as a chain, or why they are none.

        Args:
            ops: of the run or its first pass, by part.
            values: by part.
            returned: numbers of what the step returned.
        """
        main, must, calls = self._containers.main, self._containers.must_join, self._first_calls or self._calls
        if main is None:
            return
        num_run = sum(call.container == main for call in calls)
        if num_run < self.num_blocks:
            self.fault = self.fault or f"the step runs {num_run} of its {self.num_blocks} blocks"
        sizes = {path: self._sizes[path] for path in (*must, *self._containers.may_join)}
        while self.fault is None and not self.blocks:
            chains = joined(calls, main, sizes)
            missing = next((path for path in must if path not in chains), None)
            if missing is not None:
                self.fault = f"the blocks of {missing} do not run once each, in order, before or after the others"
                return
            chosen = [call for call in calls if call.container in chains]
            phases = self.parts.phases([call.path for call in chosen])
            try:
                self.blocks = follow_blocks(chosen, in_phases(ops, phases), in_phases(values, phases), returned)
                self.chains = chains
            except NoChain as fault:
                self.fault = str(fault) if fault.container in (main, *must) else None
                sizes.pop(fault.container, None)
