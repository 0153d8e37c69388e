"""The systems whose replicas are timed: each trains the same model on the same data over all ranks."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contest import OURS, Run, System, in_steps
from benchmarks.stepping import CPU, MakeOptimizer, Step, engine_step, plain_step
from lightning_par.demo.gpt import GPT
from lightning_par.private.deepspeed import quieten_deepspeed

NUM_RANKS = 2
VOCABULARY, WIDTH, DEPTH, HEADS = 256, 256, 6, 4
ROWS, LENGTH = 4, 128  # of each replica's batch


class Trainee(nn.Module):
    """A GPT with the loss of the next token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = GPT(VOCABULARY, WIDTH, DEPTH, HEADS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.network(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """The mean loss."""
        return self(tokens)


def make_tokens(replica: int) -> torch.Tensor:
    """The batch of one replica [ROWS, LENGTH + 1], the same in every step."""
    generator = torch.Generator().manual_seed(1 + replica)
    return torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=generator)


def install_ours(rank: int, make_optimizer: MakeOptimizer, word: str) -> Run:
    """lightning_par, as its strategy installs it and steps."""
    return in_steps(engine_step(Trainee(), make_tokens(rank), word, NUM_RANKS, make_optimizer))


def install_deepspeed(rank: int, make_optimizer: MakeOptimizer, zero: int) -> Run:
    """DeepSpeed's own loop with its defaults, except two: buckets are as large as the model, not 2 GB, and it replaces no
    function of torch, which would slow down all others in this process."""
    import deepspeed

    quieten_deepspeed(CPU)
    model, tokens = Trainee(), make_tokens(rank)
    size = 2 * (sum(p.numel() for p in model.parameters()) // 2 + 1)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero,
            "reduce_bucket_size": size,
            "allgather_bucket_size": size,
            "memory_efficient_linear": False,
        },
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model.parameters()), config=config)

    def step() -> torch.Tensor:
        loss: torch.Tensor = engine(tokens)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return in_steps(step)


def install_ddp(rank: int, make_optimizer: MakeOptimizer) -> Run:
    """torch's DistributedDataParallel."""
    model = DistributedDataParallel(Trainee(), gradient_as_bucket_view=True)
    return in_steps(_plain(model, make_optimizer, make_tokens(rank)))


def install_fsdp(rank: int, make_optimizer: MakeOptimizer) -> Run:
    """torch's fully_shard (FSDP2), block by block, as its tutorial shows."""
    model, mesh = Trainee(), init_device_mesh("cpu", (NUM_RANKS,))
    for block in model.network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return in_steps(_plain(model, make_optimizer, make_tokens(rank)))


def _plain(model: nn.Module, make_optimizer: MakeOptimizer, tokens: torch.Tensor) -> Step:
    return plain_step(lambda: model(tokens), make_optimizer(model.parameters()))


def train_alone(make_optimizer: MakeOptimizer, num_steps: int) -> list[float]:
    """The mean loss of all replicas in each step of one process."""
    step = _plain(Trainee(), make_optimizer, torch.cat([make_tokens(rank) for rank in range(NUM_RANKS)]))
    return [float(step()) for _ in range(num_steps)]


# DeepSpeed first: an engine of its stage 3 may not be built above one of ours, on the stack that they share in a process
_WORKS = tuple(f"dp{NUM_RANKS}_zero{zero}" for zero in range(4))
SYSTEMS = {
    NUM_RANKS: (
        *(System("DeepSpeed", work, partial(install_deepspeed, zero=zero)) for zero, work in enumerate(_WORKS)),
        System("DDP", _WORKS[0], install_ddp),
        System("FSDP2", _WORKS[3], install_fsdp),
        *(System(OURS, work, partial(install_ours, word=work)) for work in _WORKS),
    )
}
