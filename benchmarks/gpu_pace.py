"""How long a step takes on a GPU, with how many kernels and how much memory, with each system."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_par import HybridParallelStrategy

WIDTH, INNER, DEPTH, HEADS, VOCABULARY, LENGTH, ROWS = 2048, 5632, 21, 16, 32000, 2048, 8
DEVICE = "cuda"
OURS, LIGHTNING, TORCH = "lightning_par", "Lightning", "PyTorch"
_NUM_WARM, _NUM_RECORDED = 4, 2
_RECORDED = {"cuda": torch.profiler.ProfilerActivity.CUDA, "cpu": torch.profiler.ProfilerActivity.CPU}  # what slows it least
_TOLERANCE = 0.02  # of losses near 10: of bfloat16 and float8


@dataclass(frozen=True)
class Case:
    """A way to train.

    Attributes:
        system: whose.
        what: such as ``compiled``.
        precision: Lightning's word.
        options: of our strategy.
        change: what the others' user does to the model.
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
        """Such as ``PyTorch, compiled``."""
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
        kernels: of a step, on the GPU.
        idle: of a step's time, the fraction in which no kernel runs and nothing is copied.
        loss: of the last step before those that are timed: later on rounding alone tells two runs apart.
        error: why there is nothing else.
    """

    system: str
    what: str
    seconds: tuple[float, ...] = ()
    peak: int = 0
    reserved: int = 0
    foreseen: int = 0
    kernels: int = 0
    idle: float = 0.0
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


_TENSORWISE, _ROWWISE = "fp8 tensorwise, compiled", "fp8 rowwise, compiled"
# There and back where it is about speed: what the GPU's temperature does falls on both.
CASES = (
    Case(TORCH, "compiled", change=_compiled, compiles=True),
    Case(OURS, "compiled", options={"compile": True}, compiles=True),
    Case(OURS, "compiled", options={"compile": True}, compiles=True),
    Case(TORCH, "compiled", change=_compiled, compiles=True),
    Case(LIGHTNING, "compiled", change=_compiled, compiles=True),
    Case(TORCH, _TENSORWISE, change=_float8("tensorwise"), compiles=True),
    Case(OURS, _TENSORWISE, options={"fp8": "tensorwise", "compile": True}, compiles=True),
    Case(TORCH, "plain"),
    Case(OURS, "plain"),
    Case(LIGHTNING, "plain"),
    Case(OURS, "bf16-true", "bf16-true"),
    Case(TORCH, "recompute full", change=_recomputed),
    Case(OURS, "recompute full", options={"recompute": "full"}),
    Case(OURS, "recompute selective", options={"recompute": "selective"}),
    Case(OURS, "offload_activations", options={"offload_activations": True}),
    Case(TORCH, _ROWWISE, change=_float8("rowwise"), compiles=True),
    Case(OURS, _ROWWISE, options={"fp8": "rowwise", "compile": True}, compiles=True),
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


def flops_of_step(causal: bool = False) -> float:
    """Of a step without recomputation, as PaLM counts (arXiv 2204.02311, appendix B): 6 N + 12 layers x width x length, a token.

    Args:
        causal: count the half of attention that a causal mask leaves.
    """
    num_weights = DEPTH * (4 * WIDTH**2 + 3 * WIDTH * INNER) + VOCABULARY * WIDTH  # of what multiplies: not the embedding
    attention = (6 if causal else 12) * DEPTH * WIDTH * LENGTH
    return float((6 * num_weights + attention) * ROWS * LENGTH)


class Stopwatch:
    """Times some steps together, several times, waiting for the device only between these times; then records what it runs.

    Args:
        num_steps: that are timed.
    """

    def __init__(self, num_steps: int) -> None:
        self._last, self._each, self._since = num_steps, max(num_steps // 4, 1), 0.0
        self._profiler: Any = None
        self._done = 0
        self.seconds: list[float] = []
        self.loss = torch.zeros(())
        self.kernels, self.idle = 0, 0.0

    def step_done(self, loss: torch.Tensor) -> None:
        """After each step, the warm ones too."""
        self._done += 1
        step = self._done - _NUM_WARM
        if step == self._last + _NUM_RECORDED:
            torch.cuda.synchronize()
            self._profiler.__exit__(None, None, None)
            self.kernels, self.idle = read_kernels(self._profiler.events())
        if not 0 <= step <= self._last or step % self._each:
            return
        torch.cuda.synchronize()
        now = time.perf_counter()
        if step:
            self.seconds.append((now - self._since) / self._each)
        else:
            self.loss = loss.detach()
        if step == self._last:
            self._profiler = torch.profiler.profile(activities=[_RECORDED[DEVICE]])
            self._profiler.__enter__()
        self._since = time.perf_counter()


class Watched(pl.Callback):
    """A Trainer's steps, by a `Stopwatch`."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._watch.step_done(outputs["loss"])


def read_kernels(events: Iterable[Any]) -> tuple[int, float]:
    """Kernels of a step, and the fraction of its time in which the device does nothing.

    Args:
        events: of torch's profiler, over `_NUM_RECORDED` steps.
    """
    spans, count = [], 0
    for event in events:
        if event.device_type.name == "CUDA":
            spans.append((event.time_range.start, event.time_range.end))
            count += not event.name.startswith(("Memcpy", "Memset"))
    if not spans:
        return 0, 0.0
    spans.sort()
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(end - max(start, until), 0)
        until = max(until, end)
    return round(count / _NUM_RECORDED), 1 - busy / (until - spans[0][0])


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
    watch, count = Stopwatch(num_steps), _NUM_WARM + num_steps + _NUM_RECORDED
    batches = [torch.randint(VOCABULARY, (ROWS, LENGTH)) for _ in range(2)] * ((count + 1) // 2)
    foreseen = (_train_alone if case.system == TORCH else _train)(case, decoder, batches[:count], watch)
    return Row(
        case.system,
        case.what,
        tuple(watch.seconds),
        torch.cuda.max_memory_allocated(),
        torch.cuda.max_memory_reserved(),
        foreseen,
        watch.kernels,
        watch.idle,
        float(watch.loss),
    )


def _train_alone(case: Case, decoder: Decoder, batches: list[torch.Tensor], watch: Stopwatch) -> int:
    """The loop that everybody writes."""
    device = torch.device(DEVICE)
    decoder.to(device)
    optimizer = decoder.configure_optimizers()
    for index, batch in enumerate(DataLoader(batches, batch_size=None, pin_memory=device.type == "cuda")):  # type: ignore[arg-type]
        with torch.autocast(device.type, torch.bfloat16):
            loss = decoder.training_step(batch.to(device, non_blocking=True), index)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        watch.step_done(loss)
    return 0


def _train(case: Case, decoder: Decoder, batches: list[torch.Tensor], watch: Stopwatch) -> int:
    """Under a Trainer; the bytes that the forecast says, of ours."""
    strategy: Any = "auto"
    if case.system == OURS:
        strategy = HybridParallelStrategy("single", print_plan=False, memory_gib=1000, audit=False, **case.options)
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    trainer = pl.Trainer(
        accelerator=DEVICE,
        devices=1,
        strategy=strategy,
        precision=case.precision,
        max_steps=len(batches),
        callbacks=[Watched(watch)],
        **silent,
    )
    trainer.fit(decoder, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    memory = strategy.plan.memory if case.system == OURS else None
    return memory[0].total if memory else 0


def differences(rows: list[Row]) -> list[str]:
    """What failed, and losses that are not the first row's."""
    found = [f"{row.system}, {row.what}: {row.error}" for row in rows if row.error]
    whole = [row for row in rows if not row.error]
    return found + [
        f"{row.system}, {row.what}: the loss is {row.loss}, and {whole[0].loss} in {whole[0].system}"
        for row in whole
        if abs(row.loss - whole[0].loss) > _TOLERANCE * abs(whole[0].loss)
    ]
