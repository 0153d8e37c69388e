"""The systems whose replicas are timed: each trains the same model on the same data over all ranks.

A step is forward and backward of a replica's batch, the reductions over replicas, and one step of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_par.demo.gpt import GPT
from lightning_par.engine import Engine
from lightning_par.gradients import sum_shared_gradients
from lightning_par.layout import parse_layout
from lightning_par.prepare import prepare_plan
from lightning_par.private.deepspeed import quieten_deepspeed
from lightning_par.runtime.mesh import Mesh

NUM_RANKS = 2
VOCABULARY, WIDTH, DEPTH, HEADS = 256, 256, 6, 4
ROWS, LENGTH = 4, 128  # of each replica's batch
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Step = Callable[[], torch.Tensor]  # one step, collective over all ranks; the loss of this replica
_CPU = torch.device("cpu")


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


@dataclass(frozen=True)
class System:
    """A row of the table.

    Attributes:
        name: who trains.
        zero: what is sharded, as a ZeRO stage.
        install: shards a new model. Collective over all ranks.
    """

    name: str
    zero: int
    install: Callable[[int, MakeOptimizer], Step]


def install_ours(rank: int, make_optimizer: MakeOptimizer, zero: int) -> Step:
    """lightning_par, as its strategy installs it and steps."""
    model, tokens = Trainee(), make_tokens(rank)
    layout = parse_layout(f"dp{NUM_RANKS}_zero{zero}").resolve(NUM_RANKS)
    plan = prepare_plan(model, tokens, layout)
    mesh = Mesh(layout, timedelta(seconds=60))
    engine = Engine(model, plan, mesh, _CPU)
    parameters = list(model.parameters())
    states = engine.own_states([make_optimizer(parameters)])

    def step() -> torch.Tensor:
        (loss,) = engine.train(lambda index: model.training_step(tokens, 0), [1.0], lambda loss: loss, [tuple(tokens.shape)])
        sum_shared_gradients(parameters, mesh)
        states.reduce()
        states.step()
        states.zero_grad()
        return loss.detach()

    return step


def install_deepspeed(rank: int, make_optimizer: MakeOptimizer, zero: int) -> Step:
    """DeepSpeed's own loop with its defaults, except two: buckets are as large as the model, not 2 GB, and it replaces no
    function of torch, which would slow down all others in this process."""
    import deepspeed

    quieten_deepspeed(_CPU)
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

    return step


def install_ddp(rank: int, make_optimizer: MakeOptimizer) -> Step:
    """torch's DistributedDataParallel."""
    model = DistributedDataParallel(Trainee(), gradient_as_bucket_view=True)
    return _plain_loop(model, make_optimizer(model.parameters()), make_tokens(rank))


def install_fsdp(rank: int, make_optimizer: MakeOptimizer) -> Step:
    """torch's fully_shard (FSDP2), block by block, as its tutorial shows."""
    model, mesh = Trainee(), init_device_mesh("cpu", (NUM_RANKS,))
    for block in model.network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _plain_loop(model, make_optimizer(model.parameters()), make_tokens(rank))


def _plain_loop(model: nn.Module, optimizer: Optimizer, tokens: torch.Tensor) -> Step:
    def step() -> torch.Tensor:
        loss: torch.Tensor = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def train_alone(make_optimizer: MakeOptimizer, num_steps: int) -> list[float]:
    """The mean loss of all replicas in each step of one process."""
    model = Trainee()
    step = _plain_loop(model, make_optimizer(model.parameters()), torch.cat([make_tokens(rank) for rank in range(NUM_RANKS)]))
    return [float(step()) for _ in range(num_steps)]


def mean_loss(loss: torch.Tensor) -> float:
    """Over the replicas. Collective over all ranks."""
    total = loss.clone()
    dist.all_reduce(total)
    return float(total) / NUM_RANKS


# DeepSpeed first: an engine of its stage 3 may not be built above one of ours, on the stack that they share in a process
SYSTEMS = (
    *(System("DeepSpeed", zero, partial(install_deepspeed, zero=zero)) for zero in range(4)),
    System("DDP", 0, install_ddp),
    System("FSDP2", 3, install_fsdp),
    *(System("lightning_par", zero, partial(install_ours, zero=zero)) for zero in range(4)),
)
