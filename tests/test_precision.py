"""Which precision is chosen and what it means; the optimizer step inside the Trainer of both namespaces; what is refused."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from lightning_par.engine import Engine
from lightning_par.errors import ConfigurationError
from lightning_par.host.check import check_split
from lightning_par.host.precision import check_device, precision_class, read_precision, read_scale
from lightning_par.layout import parse_layout
from lightning_par.loss_scale import LossScale
from lightning_par.runtime.precision import PRECISIONS
from lightning_par.zero.masters import Masters, accumulate_in_float32

ROOTS = ("pytorch_lightning", "lightning.pytorch")
LIGHTNING = {root: import_module(root) for root in ROOTS}


class Owner:
    """Notes what it is asked for, in ``calls``."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls
        self.root_device = torch.device("cpu")
        self.updates: Any = self
        self.checkpoints: Any = self

    def settle(self) -> None:
        self.calls.append("settle")

    def reduce(self, optimizer: Any) -> None:
        self.calls.append("reduce")

    def clip(self, optimizer: Any, value: float, algorithm: str) -> None:
        self.calls.append((value, algorithm))

    def step(self, optimizer: Any) -> None:
        self.calls.append("step")


def train(root: str, calls: list[Any], **options: Any) -> Any:
    """Train two batches in one process with the plugin; the module notes its hooks in ``calls``."""

    class Module(LIGHTNING[root].LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            calls.append("training_step")
            return (self.weight * batch).sum()

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            calls.append("on_before_optimizer_step")

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data: Any = [torch.ones(2)] * 2
    trainer = LIGHTNING[root].Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        plugins=precision_class(root)(Owner(calls)),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=None))
    return trainer


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
def test_gradients_are_reduced_before_hooks_and_clipped_before_the_step(root: str, algorithm: str | None) -> None:
    calls: list[Any] = []
    trainer = train(root, calls, gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)
    assert calls == ["training_step", "reduce", "on_before_optimizer_step", (0.5, algorithm or "norm"), "settle", "step"] * 2
    assert trainer.global_step == 2


def test_without_a_limit_nothing_is_clipped_and_accumulation_steps_once() -> None:
    calls: list[Any] = []
    train(ROOTS[0], calls, accumulate_grad_batches=2)
    assert calls == ["training_step", "training_step", "reduce", "on_before_optimizer_step", "settle", "step"]


@pytest.mark.parametrize("root", ROOTS)
def test_the_words_of_lightning_choose(root: str) -> None:
    plugins = import_module(f"{root}.plugins.precision")
    chosen = {
        "32-true": plugins.Precision(),
        "bf16-mixed": plugins.MixedPrecision("bf16-mixed", "cpu"),
        "16-mixed": plugins.MixedPrecision("16-mixed", "cpu"),
        "bf16-true": plugins.HalfPrecision("bf16-true"),
    }
    assert chosen.keys() == PRECISIONS.keys()
    for name, plugin in chosen.items():
        assert read_precision(plugin) is PRECISIONS[name]
        assert read_precision(precision_class(root)(Owner([]), PRECISIONS[name])) is PRECISIONS[name]
        assert read_scale(plugin) == (LossScale() if name == "16-mixed" else None)  # torch's defaults are ours
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=5)
    assert read_scale(plugins.MixedPrecision("16-mixed", "cpu", scaler)) == LossScale(4.0, 3.0, 0.25, 5)


@pytest.mark.parametrize("root", ROOTS)
def test_other_precisions_are_refused(root: str) -> None:
    plugins = import_module(f"{root}.plugins.precision")
    for plugin, message in (
        (plugins.HalfPrecision("16-true"), r"precision=16-true is not supported .*: use precision=16-mixed or bf16-true"),
        (plugins.DoublePrecision(), r"precision=64-true is not supported .*: use precision=32-true"),
        (plugins.FSDPPrecision("bf16-mixed"), r"the precision plugin FSDPPrecision is not supported"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            read_precision(plugin)

    class MyPrecision(plugins.Precision):  # type: ignore[name-defined]
        pass

    with pytest.raises(
        ConfigurationError,
        match=r"the precision plugin MyPrecision is not supported.*leave it out of Trainer\(plugins=\.\.\.\), and choose with "
        r"Trainer\(precision=\.\.\.\): 32-true, bf16-mixed, 16-mixed, bf16-true",
    ):
        read_precision(MyPrecision())
    disabled = plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", enabled=False))
    with pytest.raises(
        ConfigurationError, match=r"precision=16-mixed scales the loss, and the scaler .* is not enabled: leave out"
    ):
        read_scale(disabled)


def test_a_gpu_without_bfloat16_is_refused() -> None:
    gpu = torch.device("cuda", 0)
    with (
        mock.patch("torch.cuda.is_bf16_supported", return_value=False),
        mock.patch("torch.cuda.get_device_capability", return_value=(7, 0)),
        mock.patch("torch.cuda.get_device_name", return_value="Tesla V100"),
    ):
        for name in ("bf16-mixed", "bf16-true"):
            with pytest.raises(
                ConfigurationError,
                match=rf"precision={name}: Tesla V100 \(compute capability 7\.0\) has no bfloat16, which needs 8\.0: use "
                "precision=16-mixed or precision=32-true",
            ):
                check_device(PRECISIONS[name], gpu)
        check_device(PRECISIONS["16-mixed"], gpu)
        check_device(PRECISIONS["bf16-true"], torch.device("cpu"))


class Buffered(torch.nn.Linear):
    """Makes a tensor without a dtype in its forward."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.register_buffer("shift", torch.ones(2))
        self.register_buffer("count", torch.ones(2, dtype=torch.int64))
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        self.seen += [torch.zeros(1).dtype, y.dtype]
        return y


def test_contexts_and_casts() -> None:
    for name, inside in (
        ("32-true", [torch.float32, torch.float32]),
        ("bf16-mixed", [torch.float32, torch.bfloat16]),
        ("16-mixed", [torch.float32, torch.float16]),
        ("bf16-true", [torch.bfloat16, torch.bfloat16]),
    ):
        plugin, module = precision_class(ROOTS[0])(Owner([]), PRECISIONS[name]), Buffered()
        assert plugin.precision == name
        weight = module.weight
        assert plugin.convert_module(module) is module and module.weight is weight
        stored = torch.bfloat16 if name == "bf16-true" else torch.float32
        assert (weight.dtype, module.shift.dtype, module.count.dtype) == (stored, stored, torch.int64)
        batch = plugin.convert_input({"x": torch.ones(1, 2), "labels": [torch.ones(1, dtype=torch.int64)], "name": "a"})
        assert (batch["x"].dtype, batch["labels"][0].dtype, batch["name"]) == (stored, torch.int64, "a")
        with plugin.forward_context():
            module(batch["x"])
        assert module.seen == inside and torch.get_default_dtype() is torch.float32
        with plugin.module_init_context(), plugin.tensor_init_context():
            assert torch.nn.Linear(1, 1).weight.dtype is stored


def test_masters_step_what_is_too_small_for_bfloat16() -> None:
    """An update of 2**-10 of a weight is lost in bfloat16; frozen parameters and those in float32 have no masters."""
    half, full = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), torch.nn.Parameter(torch.ones(2))
    frozen = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16), requires_grad=False)
    optimizer = torch.optim.SGD([{"params": [half, frozen]}, {"params": [full], "lr": 0.5}], lr=2.0**-10)
    masters = Masters(optimizer)
    for _ in range(8):
        (half.sum() + full.sum()).backward()
        masters.step()
        optimizer.zero_grad()
    assert half.tolist() == [1 - 8 * 2.0**-10] * 2 and full.tolist() == [-3.0, -3.0] and frozen.tolist() == [1.0, 1.0]
    assert masters.stepped(half).dtype is torch.float32 and masters.stepped(full) is None and masters.stepped(frozen) is None
    assert optimizer.param_groups[0]["params"][0] is half
    optimizer.param_groups[0]["lr"] = 1.0  # a scheduler's
    optimizer.add_param_group({"params": [late := torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))], "lr": 2.0**-10})
    assert masters.optimizer is optimizer
    (half.sum() + late.sum()).backward()
    masters.step()
    assert half.tolist() == [round((1 - 8 * 2.0**-10 - 1) * 256) / 256] * 2
    assert masters.stepped(late).tolist() == [1 - 2.0**-10] * 2


def test_gradients_of_microbatches_add_up_in_float32() -> None:
    """64 of them, each 1 but the first one: in bfloat16 the sum would stop growing at 256 with every step lost."""
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    accumulate_in_float32([parameter])
    for factor in [256.0] + [0.5] * 64:
        (parameter * factor).sum().backward()
    assert parameter.grad is not None and parameter.grad.dtype is torch.float32 and parameter.grad.item() == 288.0


def test_a_module_that_is_split_in_another_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, module = parse_layout("tp2").resolve(2), nn.Linear(2, 2)
    engine = SimpleNamespace(mesh=SimpleNamespace(layout=layout), precision=PRECISIONS["bf16-true"])
    monkeypatch.setattr(Engine, "of", lambda module: engine)
    assert check_split(module, layout, PRECISIONS["bf16-true"]) is engine  # type: ignore[comparison-overlap]
    words = r"precision=32-true: this Linear is already split with precision=bf16-true: use that, or build the module anew"
    with pytest.raises(ConfigurationError, match=words):
        check_split(module, layout, PRECISIONS["32-true"])
