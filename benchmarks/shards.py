"""The systems whose tensor parallelism is timed: each splits the same Llama over all ranks and trains it on the same data."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from transformers import LlamaForCausalLM

from benchmarks.contest import OURS, Run, System, in_steps
from benchmarks.llama import HEADS, LanguageModel, make_llama
from benchmarks.stepping import MakeOptimizer, Step, engine_step, plain_step
from benchmarks.systems import autotp_engine, install_dtensor, install_dtensor_sequence, install_dtensor_shared

NUM_RANKS = 2
WIDTH, INNER, DEPTH, VOCABULARY = 256, 768, 4, 512
ROWS, LENGTH = 4, 128


def make_model() -> LlamaForCausalLM:
    """The same weights at every call."""
    return make_llama(DEPTH, HEADS, WIDTH, INNER, VOCABULARY)


def make_tokens() -> torch.Tensor:
    """``[ROWS, LENGTH]``, the batch of every step."""
    return torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def install_ours(rank: int, make_optimizer: MakeOptimizer, word: str) -> Run:
    """lightning_par, as its strategy installs it and steps."""
    return in_steps(engine_step(LanguageModel(make_model()), make_tokens(), word, NUM_RANKS, make_optimizer))


def install_columns(rank: int, make_optimizer: MakeOptimizer) -> Run:
    """DTensor with the plan of most tutorials."""
    model = make_model()
    return _with_vocabulary(model, install_dtensor(model, NUM_RANKS).forward, make_optimizer)


def install_shared(rank: int, make_optimizer: MakeOptimizer) -> Run:
    """DTensor, with the inputs that several layers read prepared once."""
    model = make_model()
    return _with_vocabulary(model, install_dtensor_shared(model, NUM_RANKS).forward, make_optimizer)


def install_sequence(rank: int, make_optimizer: MakeOptimizer) -> Run:
    """DTensor with the sequence-parallel plan of torch's tutorial, its section on the parallel loss included."""
    model = make_model()
    head = ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
    return _in_parallel_loss(install_dtensor_sequence(model, NUM_RANKS, head).forward, make_optimizer(model.parameters()))


def install_autotp(rank: int, make_optimizer: MakeOptimizer) -> Run:
    """DeepSpeed's AutoTP, which leaves embedding and head whole."""
    model, tokens = make_model(), make_tokens()
    engine = autotp_engine(model, NUM_RANKS, tokens, make_optimizer(model.parameters()))

    def step() -> torch.Tensor:
        loss: torch.Tensor = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return in_steps(step)


def _with_vocabulary(model: LlamaForCausalLM, forward: Any, make_optimizer: MakeOptimizer) -> Run:
    """Embedding and head split too, as torch's tutorial does."""
    outside = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(use_local_output=False),
    }
    parallelize_module(model, init_device_mesh("cpu", (NUM_RANKS,)), outside)
    return _in_parallel_loss(forward, make_optimizer(model.parameters()))


def _in_parallel_loss(forward: Any, optimizer: torch.optim.Optimizer) -> Run:
    """Logits stay in parts, of which the loss is computed: forward and backward must run inside `loss_parallel`."""
    tokens = make_tokens()
    step = plain_step(lambda: forward(tokens), optimizer)

    def inside() -> torch.Tensor:
        with loss_parallel():
            return step()

    return in_steps(inside)


def train_alone(make_optimizer: MakeOptimizer, num_steps: int) -> list[float]:
    """The loss in each step of one process."""
    model, tokens = LanguageModel(make_model()), make_tokens()
    step: Step = plain_step(lambda: model.training_step(tokens, 0), make_optimizer(model.parameters()))
    return [float(step()) for _ in range(num_steps)]


_PLAIN, _SEQUENCE = f"tp{NUM_RANKS}", f"tp{NUM_RANKS}_sp"
SYSTEMS = {
    NUM_RANKS: (
        System("DeepSpeed AutoTP", _PLAIN, install_autotp),
        System("DTensor", _PLAIN, install_columns),
        System("DTensor, shared inputs", _PLAIN, install_shared),
        System(OURS, _PLAIN, partial(install_ours, word=_PLAIN)),
        System("DTensor", _SEQUENCE, install_sequence),
        System(OURS, _SEQUENCE, partial(install_ours, word=_SEQUENCE)),
    )
}
