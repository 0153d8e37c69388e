"""The optimizer step: what runs in which order inside the Trainer of both namespaces, and what is refused."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from lightning_par.errors import ConfigurationError
from lightning_par.host.precision import check_precision, precision_class

ROOTS = ("pytorch_lightning", "lightning.pytorch")
LIGHTNING = {root: import_module(root) for root in ROOTS}


class Owner:
    """Notes what it is asked for, in ``calls``."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def reduce_gradients(self, optimizer: Any) -> None:
        self.calls.append("reduce")

    def clip_gradients(self, optimizer: Any, value: float, algorithm: str) -> None:
        self.calls.append((value, algorithm))

    def step_optimizer(self, optimizer: Any) -> None:
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
    assert calls == ["training_step", "reduce", "on_before_optimizer_step", (0.5, algorithm or "norm"), "step"] * 2
    assert trainer.global_step == 2


def test_without_a_limit_nothing_is_clipped_and_accumulation_steps_once() -> None:
    calls: list[Any] = []
    train(ROOTS[0], calls, accumulate_grad_batches=2)
    assert calls == ["training_step", "training_step", "reduce", "on_before_optimizer_step", "step"]


@pytest.mark.parametrize("root", ROOTS)
def test_only_plain_float32_is_taken(root: str) -> None:
    plugins = import_module(f"{root}.plugins.precision")
    check_precision(plugins.Precision())
    check_precision(precision_class(root)(Owner([])))
    with pytest.raises(ConfigurationError, match=r"precision=bf16-mixed is not supported yet.*use precision=32-true"):
        check_precision(plugins.MixedPrecision("bf16-mixed", "cpu"))

    class MyPrecision(plugins.Precision):  # type: ignore[name-defined]
        pass

    with pytest.raises(
        ConfigurationError, match=r"the precision plugin MyPrecision is not supported.*leave it out of Trainer\(plugins="
    ):
        check_precision(MyPrecision())
