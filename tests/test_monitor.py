"""What the monitor says of a training is what it took: against truth worked out by hand, and at the cost that is promised."""

from __future__ import annotations

import csv
import importlib
import os
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_par import ConfigurationError, HybridParallelStrategy, Monitor
from lightning_par.host import here, stopwatch
from lightning_par.host.here import peak_flops_here
from lightning_par.host.measurement import Seen, measure
from lightning_par.host.monitor_report import Interval, Record
from lightning_par.host.stopwatch import Stopwatch
from lightning_par.layout import parse_layout
from lightning_par.plan import Plan
from lightning_par.plan.plan import ForwardWork
from lightning_par.runtime.nested import tensors_in, tokens_of
from tests.models import LENGTH, gpt, make_batch
from tests.planning import Block, Chain, loader_of, plan_of, quiet_trainer, tokens
from tests.ranks import run_ranks

ROWS, TOKENS, STEPS, EVERY = 4, 6, 5, 2
ELEMENTS, PARAMETERS = 24 * 16 + 2 * (16 * 32 + 32 + 32 * 16 + 16) + 16 * 24, 10  # of a Chain
FP32 = 4


# ---------------------------------------------------------------------- arithmetic


def seen(**numbers: float) -> Seen:
    usual = dict.fromkeys(Seen.__dataclass_fields__, 0.0) | {"tokens": 600.0, "samples": 60.0, "seconds": 3.0, "peak_bytes": 10.0}
    return Seen(**{**usual, **numbers})


def test_replicas_count_once_and_the_slowest_rank_says_how_long() -> None:
    layout = parse_layout("tp2_dp2").resolve(4)
    ranks = [seen(), seen(seconds=4.0, peak_bytes=30.0, tp_bytes=80.0), seen(dp_bytes=100.0), seen()]
    found = measure(ranks, layout, num_steps=2)
    assert found["tokens_per_second"] == 2 * 600 / 4 and found["samples_per_second"] == 2 * 60 / 4
    assert found["step_seconds"] == 2.0 and found["peak_memory_bytes"] == 30
    assert found["sent_tp_bytes_per_step"] == 80 / 4 / 2 and found["sent_dp_bytes_per_step"] == 100 / 4 / 2
    assert not {"sent_pp_bytes_per_step", "bubble_fraction", "mfu_fraction", "device_flops_per_second"} & found.keys()


def test_the_bubble_of_several_pipelines() -> None:
    layout = parse_layout("pp2_dp2").resolve(4)
    times = {(0, 0): (6.0, 10.0), (1, 0): (8.0, 9.0), (0, 1): (5.0, 10.0), (1, 1): (5.0, 7.0)}  # by pp and dp: work, in all
    ranks = [seen()] * 4
    for (pp, dp), (busy, whole) in times.items():
        ranks[layout.rank_of(pp, dp, 0)] = seen(busy_seconds=busy, pipeline_seconds=whole)
    found = measure(ranks, layout, num_steps=1)
    assert found["bubble_fraction"] == pytest.approx((0.3 + 0.5) / 2)
    assert found["stage_imbalance_fraction"] == pytest.approx(13 / 12 - 1)


def test_utilization_by_both_conventions() -> None:
    layout, work = parse_layout("dp2").resolve(2), ForwardWork(6e9, 8e9, samples=10, tokens=20)
    found = measure([seen(), seen()], layout, 1, work, peak_flops=1e11)
    share = 2 * 600 / 200  # of the traced batch
    assert found["device_flops_per_second"] == pytest.approx(3 * 8e9 * share / 3 / 2)
    assert found["mfu_fraction"] == pytest.approx(3 * 8e9 * share / 3 / 2 / 1e11)
    assert found["mfu_causal_fraction"] == pytest.approx(found["mfu_fraction"] * 6 / 8)
    images = measure([seen(tokens=0.0)] * 2, layout, 1, ForwardWork(6e9, 8e9, samples=10, tokens=None))
    assert images["device_flops_per_second"] == pytest.approx(3 * 8e9 * 2 * 60 / 10 / 3 / 2) and "mfu_fraction" not in images


def test_operations_are_those_of_the_textbook() -> None:
    """6 N and 12 L h s for each token without causal credit, 6 L h s with it: a third of that in the forward (PaLM, appendix B)."""
    module = gpt()
    work = plan_of(module, "single", make_batch(0, 8)).work
    assert work is not None and (work.samples, work.tokens) == (8, LENGTH)
    linear = [each for each in module.modules() if isinstance(each, nn.Linear)]
    layers = len({name.split(".blocks.")[1].split(".")[0] for name, _ in module.named_modules() if ".blocks." in name})
    width = next(each.embedding_dim for each in module.modules() if isinstance(each, nn.Embedding))
    products = 2 * sum(each.weight.numel() for each in linear)
    positions = LENGTH - 1  # the last token is a target only
    assert work.whole_flops == 8 * positions * (products + 4 * layers * width * positions)
    assert work.causal_flops == 8 * positions * (products + 2 * layers * width * positions)


def test_what_counts_as_tokens() -> None:
    words, pixels = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    assert tokens_of({"mask": torch.ones(3, 5, dtype=torch.bool), "pixels": pixels, "labels": torch.zeros(3).long()}) is None
    assert tokens_of((torch.randn(3, 5), [words])) == 7


def test_a_peak_is_known_by_the_name_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(here, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops_here(cuda, torch.bfloat16) == 989e12 and peak_flops_here(cuda, torch.float32) == 67e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops_here(cuda, torch.float32) is None and peak_flops_here(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(here, "device_name", lambda device: "GeForce 256")
    assert peak_flops_here(cuda, torch.bfloat16) is None


def test_a_lap_is_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    watch = Stopwatch(torch.device("cpu"))
    assert watch.lap() == 0
    for seconds in (1.0, 2.0):
        watch.begin_batch()
        now[0] += seconds
    watch.interrupt()
    watch.interrupt()
    now[0] += 100.0  # a validation, and a checkpoint
    watch.begin_batch()
    now[0] += 4.0
    assert watch.lap() == 7.0 and watch.batches == [1.0]
    now[0] += 0.5
    assert watch.lap() == 0.5


# ---------------------------------------------------------------------- what is said at the end


def record_of(word: str, world_size: int) -> Record:
    plan = cast(Plan, SimpleNamespace(layout=parse_layout(word).resolve(world_size), module="Model"))
    found: dict[str, float] = {"tokens_per_second": 1200.0, "step_seconds": 0.25, "bubble_fraction": 0.2}
    found |= {"device_flops_per_second": 2e12, "sent_pp_bytes_per_step": 2048.0, "peak_memory_bytes": 2.0**30}
    intervals = [Interval(10 * (1 + i), 2.0 - i, {**found, "tokens_per_second": 1000.0 * (1 + i)}) for i in range(3)]
    return Record(plan, 10, intervals, [2.0**30] * world_size)


def test_the_table() -> None:
    lines = [line.strip() for line in record_of("pp2", 2).render().splitlines()]
    assert lines[0].startswith("Model, pp2") and lines[0].endswith(": 3 intervals of 10 steps")
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    rows = {name: numbers for name, *numbers in cells}
    assert rows["tokens_per_second"] == ["2,000", "3,000"] and rows["bubble_fraction"] == ["20.0%", "20.0%"]
    assert rows["step_seconds"][0] == "250 ms" and rows["device_flops_per_second"][0] == "2 T"
    assert rows["sent_pp_bytes_per_step"][0] == "2.0 KiB"
    assert lines[-1] == "Peak memory by rank: 0: 1.0 GiB, 1: 1.0 GiB"
    many = record_of("pp2_tp16", 32).render().splitlines()[-1]
    assert many == "Peak memory by rank: pp 0: 1.0 GiB to 1.0 GiB, pp 1: 1.0 GiB to 1.0 GiB"


def test_the_picture(tmp_path: Path) -> None:
    record_of("pp2", 2).draw(tmp_path / "run" / "monitor.png")
    assert (tmp_path / "run" / "monitor.png").stat().st_size > 10_000


@pytest.mark.parametrize("peak", [0, -1.0])
def test_a_peak_must_be_positive(peak: float) -> None:
    with pytest.raises(ConfigurationError, match="what a device could multiply in a second, in 1e12 operations, must be positive"):
        Monitor(peak_tflops=peak)


def _stock(rank: int, world_size: int) -> str:
    trainer = quiet_trainer("single", 1, strategy="auto", callbacks=[Monitor()], max_steps=1)
    with pytest.raises(ConfigurationError) as caught:
        trainer.fit(Chain(Block), loader_of(tokens()))
    return str(caught.value)


def test_another_strategy_is_refused() -> None:
    (words,) = run_ranks(_stock, 1)
    assert words.startswith("Monitor measures a HybridParallelStrategy, and the Trainer's strategy is SingleDeviceStrategy: use")


# ---------------------------------------------------------------------- trainings


class Rows(Logger):
    """Keeps what it is given."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}
        self._folder = folder

    @property
    def name(self) -> str:
        return "rows"

    @property
    def version(self) -> int:
        return 0

    @property
    def save_dir(self) -> str | None:
        return None if self._folder is None else str(self._folder)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        monitored = {key.removeprefix("monitor/"): value for key, value in metrics.items() if key.startswith("monitor/")}
        if monitored:
            assert step is not None and step not in self.rows
            self.rows[step] = monitored


class Collectives(TorchDispatchMode):
    """Counts what this rank asks of process groups of two ranks, and the bytes that it sends for what is no small number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent_bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.calls[func._opname] += 1
            most = max((tensor.nbytes for tensor in tensors_in(args)), default=0)
            if most > 200 and func._opname in ("allreduce_", "_allgather_base_", "_reduce_scatter_base_"):
                self.sent_bytes += most if func._opname == "allreduce_" else most / 2
        return func(*args, **(kwargs or {}))


class Watch(pl.Callback):
    """Lets half a second of a made-up clock pass in each batch and an hour in each validation, and counts collectives by batch."""

    def __init__(self) -> None:
        self.now, self.collectives = 0.0, Collectives()
        self.calls: list[int] = []
        self.sent: list[float] = []
        self.bar: list[dict[str, Any]] = []

    def on_train_start(self, *args: Any) -> None:
        self.collectives.__enter__()

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self._note(trainer)

    def on_train_batch_end(self, *args: Any) -> None:
        self.now += 0.5

    def on_validation_end(self, *args: Any) -> None:
        self.now += 3600.0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._note(trainer)
        self.collectives.__exit__(None, None, None)

    def _note(self, trainer: Any) -> None:
        self.calls.append(self.collectives.calls.total())
        self.sent.append(self.collectives.sent_bytes)
        self.bar.append(dict(trainer.progress_bar_metrics))


class Validated(Chain):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)


def train(word: str, world_size: int, strategy: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A training on a made-up clock, of 4 samples of 6 tokens, the same on all replicas: what was logged, shown and sent."""
    torch.manual_seed(0)
    watch, rows = Watch(), Rows()
    batches = loader_of(*[tokens(ROWS, TOKENS)] * STEPS)
    options = {"logger": [rows, Rows()], "max_epochs": 1, "log_every_n_steps": EVERY, "use_distributed_sampler": False, **options}
    options["callbacks"] = [watch, *options.get("callbacks", ())]
    chosen = HybridParallelStrategy(word, print_plan=False, **(strategy or {}))
    trainer = quiet_trainer(word, world_size, strategy=chosen, num_sanity_val_steps=0, **options)
    module = Validated(Block)
    with mock.patch.object(stopwatch, "time", SimpleNamespace(perf_counter=lambda: watch.now)):
        trainer.fit(module, batches, loader_of(tokens(ROWS, TOKENS)))
    calls = [after - before for before, after in zip(watch.calls, watch.calls[1:], strict=False)]
    sent = [after - before for before, after in zip(watch.sent, watch.sent[1:], strict=False)]
    every = [logger.rows for logger in trainer.loggers if isinstance(logger, Rows)]
    assert all(each == every[0] for each in every)
    return {
        "rows": every[0] if every else {}, "bar": watch.bar, "calls": calls, "sent": sent,
        "monitors": sum(isinstance(callback, Monitor) for callback in trainer.callbacks),
        "observers": len(chosen.engine.observers), "finds_norm": chosen.updates.finds_norm,
    }  # fmt: skip


def norms() -> list[float]:
    """Of the gradients of each step, in one process in plain torch."""
    torch.manual_seed(0)
    module, found = Chain(Block), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        module.training_step(tokens(ROWS, TOKENS), 0).backward()
        found.append(float(nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])))
        optimizer.step()
    return found


SCALED = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]}
TRAININGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dp": ("dp2", {}, {"val_check_interval": 1}),
    "off": ("dp2", {"monitor": False}, {}),
    "clipped": ("dp2", {}, {"gradient_clip_val": 0.01}),
    "clipped off": ("dp2", {"monitor": False}, {"gradient_clip_val": 0.01}),
    "tp": ("tp2", {}, {}),
    "pp": ("pp2_mb2", {}, {}),
    "zero": ("dp2_zero1", {}, {"accumulate_grad_batches": 2, "log_every_n_steps": 1}),
    "scaled": ("dp2", {}, SCALED),
    "dry": ("pp2_mb2", {}, {"fast_dev_run": 2}),
    "never": ("dp2", {}, {"log_every_n_steps": 0}),
    "mine": ("dp2", {}, {"callbacks": [Monitor(peak_tflops=1e-6)], "logger": False}),
}


def _train(rank: int, world_size: int, folder: Path) -> tuple[dict[str, dict[str, Any]], list[float]]:
    os.chdir(folder)
    return {name: train(word, world_size, strategy, **options) for name, (word, strategy, options) in TRAININGS.items()}, norms()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, dict[str, Any]], list[float]]]:
    return run_ranks(_train, 2, tmp_path_factory.mktemp("trained"), timeout=200)


def test_all_ranks_say_the_same_on_the_steps_that_the_trainer_logs(trained: Any) -> None:
    (first, _), (second, _) = trained
    for name, ran in first.items():
        assert ran["rows"] == second[name]["rows"], name
        assert ran["bar"] == second[name]["bar"], name
        assert not ran["finds_norm"] and ran["observers"] == first["off"]["observers"], name
    assert list(first["dp"]["rows"]) == [1, 3] and list(first["zero"]["rows"]) == [0, 1, 2]
    assert first["dry"]["bar"][1]["tokens/s"] and not first["dry"]["rows"]  # which has no logger
    assert not first["off"]["rows"] and not first["off"]["monitors"] and not first["never"]["rows"] and first["never"]["monitors"]


def test_time_and_throughput_are_those_of_the_clock(trained: Any) -> None:
    (first, _), _ = trained
    for row in first["dp"]["rows"].values():
        assert row["step_seconds"] == 0.5 and row["samples_per_second"] == 2 * ROWS / 0.5
        assert row["tokens_per_second"] == 2 * ROWS * TOKENS / 0.5
    for name in ("tp", "pp"):
        assert all(row["tokens_per_second"] == ROWS * TOKENS / 0.5 for row in first[name]["rows"].values())
    assert [row["step_seconds"] for row in first["zero"]["rows"].values()] == [1.0, 1.0, 0.5]  # the last batch is alone


def test_the_norm_is_that_of_one_process_whether_it_is_clipped_or_not(trained: Any) -> None:
    (first, norms), _ = trained
    for name in ("dp", "tp", "pp"):
        assert [row["gradient_norm"] for row in first[name]["rows"].values()] == pytest.approx([norms[1], norms[3]], rel=1e-5)
    assert first["clipped"]["rows"][1]["gradient_norm"] == pytest.approx(norms[0], rel=1e-2)  # before clipping
    assert first["zero"]["rows"][0]["gradient_norm"] == pytest.approx(norms[0], rel=1e-5)
    assert first["scaled"]["rows"][1]["loss_scale"] == 1024.0 and "loss_scale" not in first["dp"]["rows"][1]


def test_bytes_are_those_of_the_formulas(trained: Any) -> None:
    """A ring of two ranks: an all-reduce sends the whole tensor, every other collective half of it."""
    (first, _), _ = trained
    flags = PARAMETERS  # one number for each parameter: which ranks have a gradient
    assert [row["sent_dp_bytes_per_step"] for row in first["dp"]["rows"].values()] == [FP32 * (ELEMENTS + flags)] * 2
    hidden = FP32 * ROWS * TOKENS * 16
    assert first["pp"]["rows"][3]["sent_pp_bytes_per_step"] == hidden  # activations by one rank, gradients by the other
    zero = [row["sent_dp_bytes_per_step"] for row in first["zero"]["rows"].values()]
    assert zero[1:] == [FP32 * ELEMENTS] * 2  # gradients reduced to either rank, weights gathered
    tp = sum(first["tp"]["sent"][2:4]) / EVERY
    assert tp > hidden and first["tp"]["rows"][3]["sent_tp_bytes_per_step"] == pytest.approx(tp, rel=5e-3)  # and small numbers


def test_steps_that_are_not_logged_have_no_collective_more(trained: Any) -> None:
    (first, _), _ = trained
    for on, off, more in (("mine", "off", 2), ("clipped", "clipped off", 1)):  # the gather, and a norm where nobody else finds it
        extra = [a - b for a, b in zip(first[on]["calls"], first[off]["calls"], strict=True)]
        assert extra == [0, more, 0, more, 0]


def test_the_progress_bar_shows_it(trained: Any) -> None:
    (first, _), _ = trained
    assert "tokens/s" not in first["pp"]["bar"][1] and first["pp"]["bar"][2]["tokens/s"] == ROWS * TOKENS / 0.5
    assert 0 <= first["pp"]["bar"][2]["bubble"] < 1 and not {"samples/s", "MFU"} & first["pp"]["bar"][2].keys()
    assert first["mine"]["bar"][2]["MFU"] > 0 and first["mine"]["monitors"] == 1


class Nap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        time.sleep(0.04)
        return gradient


class Napping(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(Nap.apply(x))


def _nap(rank: int, world_size: int, stages: list[int], folder: Path) -> dict[str, float]:
    os.chdir(folder)
    strategy = HybridParallelStrategy("pp2_mb4", print_plan=False, plan={"stages": stages})
    rows = Rows()
    trainer = quiet_trainer("pp2", 2, strategy=strategy, max_steps=2, logger=rows, log_every_n_steps=2)
    trainer.fit(Chain(Napping, depth=sum(stages)), loader_of(*[tokens()] * 2))
    return rows.rows[1]


@pytest.mark.parametrize("stages", [[1, 1], pytest.param([1, 3], marks=pytest.mark.slow)])
def test_the_bubble_of_a_sleeping_pipeline_is_that_of_its_schedule(stages: list[int], tmp_path: Path) -> None:
    first, second = run_ranks(_nap, 2, stages, tmp_path)
    assert first == second
    # 1F1B of equal stages: (p-1)/(m+p-1). The longer stage works all the time but for the first forward and the last backward
    makespan = 4 * max(stages) + min(stages)
    assert first["bubble_fraction"] == pytest.approx(1 - 4 * sum(stages) / 2 / makespan, abs=0.04)
    assert first["stage_imbalance_fraction"] == pytest.approx(max(stages) / (sum(stages) / 2) - 1, abs=0.05)


# ---------------------------------------------------------------------- files, names, resuming


def _written(rank: int, world_size: int, folder: Path) -> list[str]:
    lightning: Any = importlib.import_module("lightning.pytorch")
    logger = lightning.loggers.CSVLogger(folder, name="", version="")
    options = {"log_every_n_steps": 1, "accelerator": "cpu", "devices": 1, "logger": logger, "enable_model_summary": False}
    options |= {"enable_progress_bar": False, "default_root_dir": folder}

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = loader_of(*[torch.randn(3, 4)] * 4)
    found = []
    for steps in (2, 4):  # the second goes on where the first has ended
        strategy = lightning_strategy()
        trainer = lightning.Trainer(strategy=strategy, max_steps=steps, **options)
        trainer.fit(Module(), data, ckpt_path=str(folder / "a.ckpt") if steps == 4 else None)
        trainer.save_checkpoint(folder / "a.ckpt")
        found += [type(each).__mro__[2].__module__ for each in trainer.callbacks if isinstance(each, Monitor)]
    return found


def lightning_strategy() -> Any:
    """A strategy for Lightning's other name."""
    from lightning_par.host.namespace import bind

    return bind(HybridParallelStrategy, "lightning.pytorch")("single", print_plan=False)


def test_it_writes_beside_the_log_goes_on_when_resumed_and_works_under_both_names(tmp_path: Path) -> None:
    (found,) = run_ranks(_written, 1, tmp_path)
    assert found == ["lightning.pytorch.callbacks.callback"] * 2
    assert (tmp_path / "monitor.png").stat().st_size > 10_000
    with (tmp_path / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row.get("monitor/samples_per_second")]
    assert steps[-2:] == [2, 3]


def _unwritable(rank: int, world_size: int, folder: Path) -> str:
    (folder / "file").touch()
    monitor = Monitor(folder / "file")
    trainer = quiet_trainer("single", 1, callbacks=[monitor], max_steps=1, log_every_n_steps=1)
    with pytest.warns(UserWarning, match="Monitor: .* cannot be written") as warned:
        trainer.fit(Chain(Block), loader_of(tokens()))
    return next(str(each.message) for each in warned if "Monitor" in str(each.message))


def test_a_folder_that_cannot_be_written_ends_no_training(tmp_path: Path) -> None:
    (words,) = run_ranks(_unwritable, 1, tmp_path)
    assert words.startswith("Monitor: ") and words.endswith("so there is no picture: name another folder")
