"""A step that calls its blocks again and again, as one that generates tokens does, run by all stages together.

Every rank runs the whole step. Each block runs on the rank that holds it; where two neighbouring blocks are on different ranks,
what crosses is sent, and takes the place of what the receiver made of placeholders. After the last block only the rank of
the last stage has numbers: what the modules that are called there, or that hold the chain, return is sent from it to the others,
so that every rank draws the same token and goes on.

    rank 0    embed  block 0  block 1 ->        ...           -> logits   next token   embed  block 0 ...
    rank 1    embed        ...        -> block 2  block 3  head  logits ->  next token   embed        ...

One rank computes at a time. A cache of keys is kept by every rank for its own blocks; see `lightning_par.pipeline.cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_par.pipeline.action import Action
from lightning_par.pipeline.arrival import Arrival
from lightning_par.pipeline.blocks import Seen, see_output
from lightning_par.pipeline.cache import keep_length
from lightning_par.pipeline.stage import StageProgram
from lightning_par.pipeline.transport import Transport
from lightning_par.runtime.axis import GroupAxis
from lightning_par.runtime.nested import map_tensors, tensors_in


class Lockstep:
    """Runs whole steps on all ranks of a pipeline, without gradients; a `Runner`.

    Args:
        module: the user's module.
        stages: its stages on this rank.
        transport: the way to the other ranks.
        pp: the ranks of the pipeline.
    """

    def __init__(self, module: nn.Module, stages: StageProgram, transport: Transport, pp: GroupAxis) -> None:
        assert stages.blocks is not None
        self._module, self._stages, self._blocks, self._transport, self._pp = module, stages, stages.blocks, transport, pp
        self._first = {cut.first: cut for cut in stages.cuts}
        self._stage_of = [cut.stage for cut in stages.cuts for _ in range(cut.first, cut.last)]
        self._last_pp = transport.pp_of(len(stages.cuts) - 1)
        self._carried = [carried for cut in stages.cuts for carried in cut.arriving]
        self.num_passed = 0  # each call of a block may have something to send
        self._seen: Seen = {}
        self._is_after = False  # the last block has run, and no block since
        self._num_calls = 0  # of blocks
        self._open: list[int] = []  # for each running module around the blocks, the calls of blocks before it was entered
        self._before: set[nn.Module] = set()  # modules that are called before the blocks
        self.num_passes = 0

    def run(self, program: Callable[[], Any]) -> Any:
        """What the step returns, on every rank. Collective over the pipeline.

        Afterwards ``num_passes`` says how often it called its last block.
        """
        self._seen, self._is_after, self._num_calls, self.num_passes = {}, False, 0, 0
        self._open.clear()
        self._before.clear()
        with self._watching():
            self._blocks.runner = self
            try:
                return program()
            finally:
                self._blocks.runner = None
                self._transport.flush()

    # ------------------------------------------------------------------ blocks

    def call_block(self, index: int, through: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stage = self._stage_of[index]
        if index in self._first and stage > 0:
            self._cross(stage, index, args, kwargs)
        self._num_calls += 1
        self._is_after = index == len(self._stage_of) - 1
        self.num_passes += self._is_after
        hidden = self._blocks.hidden(index, args, kwargs)
        if stage not in self._stages.stages:
            block = self._module.get_submodule(self._blocks.chain.blocks[index])
            keep_length(block, hidden, (args, kwargs))
            output = self._blocks.pass_over(index, args, kwargs)
            self.see(self._blocks.chain.blocks[index], output)
            return output
        carry, is_entrance = self._stages.carry, index in self._first
        if is_entrance and stage == 0:
            hidden = carry.enter(hidden)
        elif is_entrance:
            hidden = carry.arrive(carry.leave(hidden) if self._is_mine(stage - 1) else self._hidden, hidden)
        return self._blocks.call_with(index, hidden, through, args, kwargs)

    def see(self, module: str, output: Any) -> None:
        see_output(self._seen, self._carried, module, output)

    def _cross(self, stage: int, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Send or receive what crosses to ``stage``, whose first block is called."""
        sends, receives = self._is_mine(stage - 1), self._is_mine(stage)
        if sends == receives:
            return
        message, carry = Action("F", stage, self.num_passes), self._stages.carry
        hidden, sides = self._blocks.hidden(index, args, kwargs), self._first[index].arriving
        if sends:
            held = self._blocks.find(sides, self._seen, args, kwargs)
            self._transport.send(message, [carry.leave(hidden), *map(self._stages.whole, held)], with_header=True)
            return
        held = self._blocks.find(sides, self._seen, args, kwargs)
        received = self._transport.receive(message, self._transport.receive_header(message, 1 + len(held)))
        arrival = Arrival()
        arrival.put(received, held, [False] * len(received))
        self._hidden = received[0]

    def _is_mine(self, stage: int) -> bool:
        return stage in self._stages.stages

    # ------------------------------------------------------------------ after the blocks

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Inside, modules that are called after the blocks, or around them, return on every rank what they do on the last stage."""
        handles = []
        paths = tuple(f"{path}." for path in self._blocks.chain.blocks)
        for name, child in self._module.named_modules():
            if name and name not in self._blocks.chain.blocks and not name.startswith(paths) and _takes_hooks(child):
                handles.append(child.register_forward_pre_hook(self._enter, prepend=True))
                handles.append(child.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._open.append(self._num_calls)
        if self._num_calls == 0:
            self._before.add(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        is_around = self._open.pop() < self._num_calls
        if self._open or not self._is_after:
            return None
        return self._from_last_stage(output) if is_around or module not in self._before else None

    def _from_last_stage(self, output: Any) -> Any:
        """``output`` with the tensors that it has on the last stage. Collective over the pipeline."""
        output = map_tensors(self._stages.whole, output)
        tensors, source = tensors_in(output), self._pp.ranks[self._last_pp]
        likes: list[Any] = [[(tuple(tensor.shape), tensor.dtype) for tensor in tensors]]
        dist.broadcast_object_list(likes, src=source, group=self._pp.group)
        for mine, (shape, dtype) in zip(tensors, likes[0], strict=True):
            is_source = self._pp.coordinate == self._last_pp
            value = mine.contiguous() if is_source else torch.empty(shape, dtype=dtype, device=mine.device)
            dist.broadcast(value, src=source, group=self._pp.group)
            if not is_source:
                mine.data = value
        return output


def _takes_hooks(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule)
