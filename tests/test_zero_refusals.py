"""Options and optimizers that ZeRO cannot have are refused before any process is started, in the words that were typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # else the first engine spends seconds on it
import pytest
import pytorch_lightning as pl
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.ops.op_builder.builder import OpBuilder
from torch.utils.data import DataLoader

from lightning_par import HybridParallelStrategy
from lightning_par.errors import ConfigurationError
from lightning_par.private.deepspeed import check_operator
from lightning_par.zero.config import deepspeed_config, overwritten
from lightning_par.zero.optimizer import check_optimizer
from lightning_par.zero.option import ZeroOptions, read_zero_options
from tests.planning import Block, Chain, tokens

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("word", "zero", "schedule", "message"),
    [
        ("dp2_zero2", {"offload": "cpu"}, None, "zero.offload: there is no such option; there are reduce, offload_optimizer, "),
        ("dp2_zero2", {"reduce": "often"}, None, "zero.reduce=often: it is step or microbatch"),
        ("dp2_zero2", {"offload_optimizer": "disk"}, None, "zero.offload_optimizer=disk: it is cpu or nvme, or null"),
        (
            "dp2_zero3",
            {"offload_param": "nvme"},
            None,
            "zero.offload_param=nvme: DeepSpeed has a fixed number of buffers .*: use cpu",
        ),
        ("dp2_zero3", {"offload_param": "disk"}, None, "zero.offload_param=disk: it is cpu, or null"),
        ("dp2_zero3", {"offload_optimizer": "nvme"}, None, "offload_optimizer=nvme: say where .*: zero.nvme_path=FOLDER"),
        (
            "dp2_zero3",
            {"nvme_path": "/disk"},
            None,
            "zero.nvme_path=/disk: nothing would go there: use zero.offload_opt",
        ),
        (
            "dp2_zero2",
            {"offload_optimizer": "nvme", "nvme_path": "/disk"},
            None,
            "parallel=dp2_zero2: zero.offload_optimizer=nvme is for ZeRO 3, .*: use zero3, or zero.offload_optimizer=cpu",
        ),
        (
            "dp2_zero3",
            {"config": {"zero_optimization": {"offload_optimizer": {"nvme_path": "/disk"}}}},
            None,
            "zero.config.zero_optimization.offload_optimizer.nvme_path: this is said by zero.nvme_path: leave it out",
        ),
        ("dp2_zero3", {"hpz_partition_size": 0}, None, "zero.hpz_partition_size=0: it is a number of ranks"),
        ("dp2_zero3", {"quantized_weights": 8}, None, "zero.quantized_weights=8: it is true or false"),
        ("dp2_zero3", {"config": "file.json"}, None, "zero.config=file.json: it is a mapping"),
        (
            "dp2_zero2",
            {"config": {"zero_optimization": {"stage": 3}}},
            None,
            "zero_optimization.stage: .* by the layout word",
        ),
        ("dp2_zero2", {"config": {"bf16": {"enabled": True}}}, None, r"zero.config.bf16.enabled: .* by Trainer\(precision=...\)"),
        ("dp2", {"offload_optimizer": "cpu"}, None, "parallel=dp2: zero.offload_optimizer=cpu is for ZeRO 1, 2 and 3: use zero1"),
        ("dp2", {"config": {"seed": 1}}, None, "parallel=dp2: zero.config is for ZeRO 1, 2 and 3: use zero1"),
        ("dp2_zero1", {"reduce": "microbatch"}, None, "zero.reduce=microbatch is for ZeRO 2 and 3: use zero2, or leave it out"),
        ("dp2_zero2", {"offload_param": "cpu"}, None, "zero.offload_param=cpu is for ZeRO 3: use zero3"),
        ("dp2_zero2", {"quantized_gradients": True}, None, "zero.quantized_gradients=true is for ZeRO 3: use zero3"),
        ("pp2_dp2_zero2", {"reduce": "microbatch"}, "zb-h1", "schedule=zb-h1 makes those of weights later: use schedule=1f1b, or"),
        ("pp2_dp2_zero2", {"reduce": "microbatch"}, "auto", "schedule=auto makes those of weights later: use schedule=1f1b, or"),
        ("pp2_vp2_dp2_zero2", {"reduce": "microbatch"}, "interleaved-zb", "use schedule=interleaved, or zero.reduce=step"),
        ("tp2_dp2_zero3", {"hpz_partition_size": 2}, None, "zero.hpz_partition_size=2 needs groups of consecutive ranks"),
    ],
)
def test_what_a_layout_cannot_have_is_refused(word: str, zero: dict[str, Any], schedule: str | None, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        HybridParallelStrategy(word, zero=zero, schedule=schedule)


def test_none_is_the_default_of_every_option() -> None:
    assert read_zero_options(dict.fromkeys(vars(ZeroOptions()))) == read_zero_options(None) == ZeroOptions()


def test_a_config_wins_section_by_section_and_what_it_replaces_is_told() -> None:
    given = {"zero_optimization": {"overlap_comm": True, "sub_group_size": 7}, "communication_data_type": "fp32"}
    options = ZeroOptions(offload_optimizer="cpu", config=given)
    merged = deepspeed_config(2, 10, options, CPU)
    assert merged["communication_data_type"] == "fp32"
    assert merged["zero_optimization"] == {
        **deepspeed_config(2, 10, ZeroOptions(offload_optimizer="cpu"), CPU)["zero_optimization"],
        **given["zero_optimization"],
    }
    assert merged["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    (told,) = overwritten(2, options)
    assert told.startswith("zero.config.zero_optimization.overlap_comm=True takes the place of False, ")


def test_quantised_traffic_is_refused_without_cuda() -> None:
    with pytest.raises(ConfigurationError, match=r"zero.quantized_weights=true: .* on CUDA devices only, and this is cpu"):
        deepspeed_config(3, 10, ZeroOptions(quantized_weights=True), CPU)


class Lamb(torch.optim.SGD):
    """Scales each step by the norm of the parameter, as LAMB and LARS do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.sub_(parameter.grad, alpha=0.1 * float(parameter.norm() / parameter.grad.norm()))


class Trained(Chain):
    """A chain with any optimizer."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(Block)
        self.make_optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), lr=0.1)


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, torch.optim.Adagrad, Lamb])
def test_an_optimizer_that_needs_whole_parameters_is_refused_before_ranks_start(optimizer: Any) -> None:
    strategy = HybridParallelStrategy("dp2_zero1", print_plan=False)
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigurationError, match=f"zero1 steps flat pieces .*, and {optimizer.__name__} needs whole ones"):
        trainer.fit(Trained(optimizer), DataLoader([tokens()], batch_size=None))


def test_an_optimizer_of_matrices_is_refused() -> None:
    optimizer = torch.optim.Muon([torch.nn.Parameter(torch.ones(3, 4))])
    with pytest.raises(ConfigurationError, match="Muon needs whole ones"):
        check_optimizer(1, [optimizer])


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adamax", "Adadelta", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"])
def test_elementwise_optimizers_are_taken_and_left_as_they_were(name: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = getattr(torch.optim, name)([parameter], lr=0.1)
    state = torch.random.get_rng_state()
    check_optimizer(2, [optimizer])
    assert not optimizer.state
    assert torch.equal(torch.random.get_rng_state(), state)
    assert parameter.tolist() == [1.0] * 3


def test_an_operator_that_cannot_be_built_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(CPUAdamBuilder, "is_compatible", lambda self, verbose=False: False)  # as without a compiler
    with pytest.raises(RuntimeError) as raised:
        DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(3))])
    message = r"operator cpu_adam cannot be built .* install a C\+\+ compiler \(g\+\+\) and ninja \(pip install ninja\), or use"
    with pytest.raises(ConfigurationError, match=message):
        check_operator(raised.value)
    check_operator(ValueError("of the user"))
