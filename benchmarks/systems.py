"""The systems that are counted: each takes the same model and gives a step over all ranks.

A step is forward, backward, and the sums over tp that are made once for all microbatches of a step; only forward and backward
are counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import LlamaForCausalLM

from benchmarks.llama import COLUMNS, NORMS, ROWS, LanguageModel, make_tokens
from lightning_par.gradients import sum_shared_gradients
from lightning_par.install import install
from lightning_par.layout import parse_layout
from lightning_par.pipeline.arrival import Arrival
from lightning_par.prepare import prepare_plan
from lightning_par.runtime.mesh import Mesh


@dataclass(frozen=True)
class Step:
    """One microbatch of a system, and what ends a step. Each call is collective over all ranks.

    Attributes:
        forward: the loss of a batch of tokens.
        backward: the backward of that loss.
        finish: what is done once for all microbatches, before gradients are whole.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward
    finish: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class System:
    """A row of the table.

    Attributes:
        name: as printed.
        install: splits a model over all ranks, in place. Collective over all ranks.
        is_ours: whether it must equal the formula.
        is_sequence_parallel: which formula is its own.
    """

    name: str
    install: Callable[[LlamaForCausalLM, int], Step]
    is_ours: bool = False
    is_sequence_parallel: bool = False


def install_ours(model: LlamaForCausalLM, tp: int, tokens: str = "", plan: Mapping[str, Any] | None = None) -> Step:
    """lightning_par, as its strategy installs it: trace, plan, install.

    Args:
        model: the whole model.
        tp: ranks.
        tokens: the layout after ``tp``.
        plan: the user's plan section.
    """
    module, batch, layout = LanguageModel(model), make_tokens(), parse_layout(f"tp{tp}{tokens}").resolve(tp)
    mesh = Mesh(layout, timedelta(seconds=30))
    stages = install(module, prepare_plan(module, batch, layout, plan), 0, mesh.tp, torch.device("cpu"))
    return Step(
        forward=lambda tokens: stages.run(0, lambda: module.training_step(tokens, 0), None, Arrival())[0],
        finish=lambda: sum_shared_gradients(module.parameters(), mesh),
    )


def install_dtensor(model: LlamaForCausalLM, tp: int) -> Step:
    """The plan of most tutorials: one style for each linear layer."""
    styles = {**dict.fromkeys(COLUMNS, ColwiseParallel()), **dict.fromkeys(ROWS, RowwiseParallel())}
    parallelize_module(model, init_device_mesh("cpu", (tp,)), {f"model.layers.*.{name}": style for name, style in styles.items()})
    return Step(lambda tokens: model(input_ids=tokens, labels=tokens).loss)


def install_dtensor_shared(model: LlamaForCausalLM, tp: int) -> Step:
    """The same, with one more line for each input that several layers read, so that its gradient is reduced once."""
    attention = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Replicate()}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
    )
    mlp = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
    shared: dict[str, ParallelStyle] = {"model.layers.*.self_attn": attention, "model.layers.*.mlp": mlp}
    parallelize_module(model, init_device_mesh("cpu", (tp,)), shared)
    return install_dtensor(model, tp)


def install_dtensor_sequence(model: LlamaForCausalLM, tp: int, head: ParallelStyle | None = None) -> Step:
    """The sequence-parallel plan of torch's tutorial, with another style of the head where one is given.

    "Large Scale Transformer model training with Tensor Parallel", section "Apply Sequence Parallel to LayerNorm/RMSNorm layers":
    https://docs.pytorch.org/tutorials/intermediate/TP_tutorial.html. Llama of transformers passes the hidden state to its
    attention by keyword, and reads the length of positions off the hidden state, so they are given.
    """
    styles: dict[str, ParallelStyle] = {
        **dict.fromkeys(NORMS, SequenceParallel()),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
        ),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        **dict.fromkeys(COLUMNS, ColwiseParallel()),
        **dict.fromkeys(ROWS, RowwiseParallel(output_layouts=Shard(1))),
    }
    outside = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
        "lm_head": head or ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    plan = {**outside, **{f"model.layers.*.{name}": style for name, style in styles.items()}}
    parallelize_module(model, init_device_mesh("cpu", (tp,)), plan)
    return Step(lambda tokens: model(input_ids=tokens, labels=tokens, position_ids=torch.arange(tokens.size(1))[None]).loss)


def install_autotp(model: LlamaForCausalLM, tp: int) -> Step:
    """DeepSpeed's AutoTP."""
    engine = autotp_engine(model, tp, make_tokens(), torch.optim.SGD(model.parameters(), lr=0.1))
    return Step(lambda tokens: engine(input_ids=tokens, labels=tokens).loss, backward=engine.backward)


def autotp_engine(model: LlamaForCausalLM, tp: int, tokens: torch.Tensor, optimizer: torch.optim.Optimizer) -> Any:
    """An engine of DeepSpeed's AutoTP for training, set up as in https://www.deepspeed.ai/tutorials/autotp-training."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Else a CPU engine compiles collectives of its own for half a minute; training does not use them.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": tokens.size(0),
        "gradient_clipping": 0.0,  # by default it clips to a norm of 1
        "tensor_parallel": {"autotp_size": tp},
        "zero_optimization": {"stage": 0},
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    engine(input_ids=tokens)  # the first forward also compares the batches of all ranks
    return engine


_GLOBAL = {"activation": {f"*.{name}": "global" for name in COLUMNS}}

SYSTEMS = (
    System("lightning_par", install_ours, is_ours=True),
    System("lightning_par, global shapes", partial(install_ours, plan=_GLOBAL), is_ours=True),
    System("lightning_par, sequence parallel", partial(install_ours, tokens="_sp"), is_ours=True, is_sequence_parallel=True),
    System("DTensor, column and row", install_dtensor),
    System("DTensor, shared inputs", install_dtensor_shared),
    System("DTensor, sequence parallel", install_dtensor_sequence, is_sequence_parallel=True),
    System("DeepSpeed AutoTP", install_autotp),
)
