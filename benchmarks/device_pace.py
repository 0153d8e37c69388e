"""How long a step takes on a GPU, and how much memory, with each system."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_par import HybridParallelStrategy

WIDTH, INNER, DEPTH, HEADS, VOCABULARY, LENGTH, ROWS = 2048, 5632, 12, 16, 32000, 2048, 8
OURS, LIGHTNING = "lightning_par", "Lightning"
_NUM_WARM = 4
_TOLERANCE = 0.02  # of losses near 10: of bfloat16 and float8


@dataclass(frozen=True)
class Case:
    """A way to train.

    Attributes:
        system: whose.
        what: such as ``compiled``.
        precision: Lightning's word.
        options: of our strategy.
        change: what the other system's user does to the model.
        compiles: whether torch.compile is in it.
    """

    system: str
    what: str
    precision: str = "bf16-mixed"
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    change: Callable[[LlamaForCausalLM], None] | None = None
    compiles: bool = False

    @property
    def name(self) -> str:
        """Such as ``Lightning, compiled``."""
        return f"{self.system}, {self.what}"


@dataclass(frozen=True)
class Row:
    """What a way to train took.

    Attributes:
        system, what: of its `Case`.
        seconds: of a step, in the mean of several, some times.
        peak: bytes of tensors at the most.
        reserved: bytes that the allocator took from the device for them.
        foreseen: bytes that the forecast says; 0 where there is none.
        loss: of the last step.
        error: why there is nothing else.
    """

    system: str
    what: str
    seconds: tuple[float, ...] = ()
    peak: int = 0
    reserved: int = 0
    foreseen: int = 0
    loss: float = 0.0
    error: str = ""


def _compiled(model: LlamaForCausalLM) -> None:
    for block in model.model.layers:
        block.compile()


def _recomputed(model: LlamaForCausalLM) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _float8(recipe: str) -> Callable[[LlamaForCausalLM], None]:
    def change(model: LlamaForCausalLM) -> None:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        chosen: Any = Float8LinearConfig.from_recipe_name(recipe)
        convert_to_float8_training(model.model.layers, config=chosen)
        _compiled(model)

    return change


CASES = (
    Case(LIGHTNING, "plain"),
    Case(OURS, "plain"),
    Case(LIGHTNING, "bf16-true", "bf16-true"),
    Case(OURS, "bf16-true", "bf16-true"),
    Case(LIGHTNING, "recompute full", change=_recomputed),
    Case(OURS, "recompute full", options={"recompute": "full"}),
    Case(OURS, "recompute selective", options={"recompute": "selective"}),
    Case(OURS, "offload_activations", options={"offload_activations": True}),
    Case(LIGHTNING, "compiled", change=_compiled, compiles=True),
    Case(OURS, "compiled", options={"compile": True}, compiles=True),
    Case(LIGHTNING, "fp8 tensorwise, compiled", change=_float8("tensorwise"), compiles=True),
    Case(OURS, "fp8 tensorwise, compiled", options={"fp8": "tensorwise", "compile": True}, compiles=True),
    Case(LIGHTNING, "fp8 rowwise, compiled", change=_float8("rowwise"), compiles=True),
    Case(OURS, "fp8 rowwise, compiled", options={"fp8": "rowwise", "compile": True}, compiles=True),
)


class Decoder(pl.LightningModule):
    """A decoder of transformers, trained as its documentation shows."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)


def make_decoder() -> Decoder:
    """The same weights in every process that is forked afterwards."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        attn_implementation="sdpa",
    )
    return Decoder(LlamaForCausalLM(config))


def flops_of_step() -> float:
    """Of a step without recomputation, as PaLM counts (arXiv 2204.02311, appendix B): 6 N + 12 layers x width x length, a token."""
    num_weights = DEPTH * (4 * WIDTH**2 + 3 * WIDTH * INNER) + VOCABULARY * WIDTH  # of what multiplies: not the embedding
    return float((6 * num_weights + 12 * DEPTH * WIDTH * LENGTH) * ROWS * LENGTH)


class Stopwatch(pl.Callback):
    """Times some steps together, several times; waits for the device only between these times."""

    def __init__(self, num_steps: int) -> None:
        self.each, self._since = max(num_steps // 4, 1), 0.0
        self.seconds: list[float] = []
        self.losses: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = batch_idx + 1 - _NUM_WARM
        self.losses.append(outputs["loss"].detach())
        if step >= 0 and step % self.each == 0:
            torch.cuda.synchronize()
            now = time.perf_counter()
            if step:
                self.seconds.append((now - self._since) / self.each)
            self._since = now


def measure_case(rank: int, world_size: int, case: Case, decoder: Decoder, num_steps: int) -> Row:
    """Train one way, in this process.

    Args:
        rank, world_size: 0 of 1.
        case: the way.
        decoder: this process's copy.
        num_steps: that are timed.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    if case.change is not None:
        case.change(decoder.model)
    strategy: Any = "auto"
    if case.system == OURS:
        strategy = HybridParallelStrategy("single", print_plan=False, memory_gib=1000, **case.options)
    watch = Stopwatch(num_steps)
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator="cuda",
        devices=1,
        strategy=strategy,
        precision=case.precision,
        max_steps=_NUM_WARM + num_steps,
        callbacks=[watch],
        **silent,
    )
    batches: Any = [torch.randint(VOCABULARY, (ROWS, LENGTH)) for _ in range(2)] * ((_NUM_WARM + num_steps + 1) // 2)
    trainer.fit(decoder, DataLoader(batches, batch_size=None))
    memory = strategy.plan.memory if case.system == OURS else None
    return Row(
        case.system,
        case.what,
        tuple(watch.seconds),
        torch.cuda.max_memory_allocated(),
        torch.cuda.max_memory_reserved(),
        memory[0].total if memory else 0,
        float(watch.losses[-1]),
    )


def differences(rows: list[Row]) -> list[str]:
    """What failed, and losses that are not the first row's."""
    found = [f"{row.system}, {row.what}: {row.error}" for row in rows if row.error]
    whole = [row for row in rows if not row.error]
    return found + [
        f"{row.system}, {row.what}: the loss is {row.loss}, and {whole[0].loss} in {whole[0].system}"
        for row in whole
        if abs(row.loss - whole[0].loss) > _TOLERANCE * abs(whole[0].loss)
    ]
