"""Optimizer states in files: trains as one process does, resumes bit for bit, leaves nothing behind, and says what is missing."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder
from deepspeed.runtime.swap_tensor import optimizer_utils
from torch.utils.data import DataLoader

from lightning_par import HybridParallelStrategy
from lightning_par.errors import ConfigurationError
from lightning_par.layout import Layout
from lightning_par.private.deepspeed import load_async_io
from lightning_par.runtime.mesh import Mesh
from lightning_par.runtime.parameter import ParameterSpec, set_spec
from lightning_par.zero import nvme
from lightning_par.zero.nvme import StateFolder, check_folder, check_locked_memory, largest_group
from lightning_par.zero.optimizer import kept_states
from lightning_par.zero.option import ZeroOptions
from lightning_par.zero.partitioned import DeepSpeedStates
from tests.plain import check_precisions, frozen_block, resolved
from tests.planning import Block, Chain, tokens
from tests.ranks import COLLECTIVE_TIMEOUT, run_ranks
from tests.test_precisions import check_skipped_steps
from tests.test_zero import check_parity, resume, running
from tests.zero_model import Case, KeptStates

CPU = torch.device("cpu")
FP32, BLOCK = 4, 512  # bytes
NO_LIBAIO = "DeepSpeed's async_io needs libaio with its header, a C++ compiler and ninja: not all of them are here"


SLOW = pytest.mark.slow  # it compiles for minutes where it has not been compiled before


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for files, on a machine that can have them; the operator is compiled before ranks wait for each other."""
    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip(NO_LIBAIO)
    load_async_io(CPU)
    with mock.patch.object(optimizer_utils, "MIN_AIO_BYTES", 0):  # a megabyte: all groups of a small model would be in memory
        yield tmp_path


def in_files(folder: Path, sub_group_size: int = 100, reduce: str = "step", **offload: Any) -> ZeroOptions:
    zero = {"sub_group_size": sub_group_size, "offload_optimizer": offload}
    config = {"aio": {"block_size": BLOCK}, "zero_optimization": zero}
    return ZeroOptions(reduce, offload_optimizer="nvme", nvme_path=str(folder), config=config)


def section(folder: Path) -> dict[str, Any]:
    """The same, as a user writes it."""
    return {"offload_optimizer": "nvme", "nvme_path": str(folder), "config": in_files(folder).config}


def check_places(states: Any, folder: Path, rank: int) -> None:
    """Masters and two moments of each group are in files, but for groups that are smaller than a block; and nothing else is."""
    sizes = states.engine.zero.fp16_partitioned_groups_flat_numel
    small = [size for size in sizes if size * FP32 < BLOCK]
    assert sum(state.numel() for state in states.stored().states if state.dim() > 0) == 3 * sum(small)
    files = {str(path): path.stat().st_size for path in folder.glob(f"lightning_par_rank{rank}_*/**/*.swp")}
    assert files == states.engine.files_to_come(kept_states(states.optimizers[0]))
    assert len(files) == 3 * (len(sizes) - len(small))


def train(rank: int, world_size: int, cases: list[Case]) -> None:
    for case in cases:
        folder = Path(str(case.options.nvme_path))
        try:
            with running(case) as run:
                check_parity(run)
                check_places(run.states, folder, rank)
                KeptStates(run.states).refill(run.states)
                check_places(run.states, folder, rank)
        except Exception as error:
            raise AssertionError(f"{case}") from error
        assert not list(folder.glob(f"lightning_par_rank{rank}_*")), "files are left"


@SLOW
def test_states_in_files_train_as_one_process_does(folder: Path) -> None:
    (folder / "mine").touch()
    pipeline = Case(pp=2, dp=2, tp=1, zero=3, options=in_files(folder))
    cases = [
        replace(pipeline, num_accumulated=2),
        replace(pipeline, is_tied=False, frozen=("chain.0.", "norm.bias"), has_unused=True, max_value=0.01),
        replace(pipeline, is_tied=False, frozen=("chain.3.", "head.", "norm."), num_microbatches=1),  # a stage has nothing to train
        replace(pipeline, is_interleaved=True, options=in_files(folder, reduce="microbatch")),
        replace(pipeline, options=in_files(folder, pipeline_read=True, pipeline_write=True, buffer_count=12)),
        replace(pipeline, optimizer=torch.optim.NAdam),
    ]
    run_ranks(train, 4, cases)
    assert [path.name for path in folder.iterdir()] == ["mine"]


@SLOW
def test_states_in_files_without_a_pipeline(folder: Path) -> None:
    options = in_files(folder, sub_group_size=10**8)
    run_ranks(train, 2, [Case(pp=1, dp=2, tp=1, zero=3, options=replace(options, offload_param="cpu"))])


@SLOW
def test_training_resumed_from_files_is_bitwise_the_same(folder: Path) -> None:
    pipeline = Case(pp=2, dp=2, tp=1, zero=3, frozen=("chain.1.",), options=in_files(folder))
    ahead = in_files(folder, pipeline_read=True, pipeline_write=True, buffer_count=12)
    run_ranks(resume, 4, [pipeline, replace(pipeline, options=ahead)])


def files_of_a_step(rank: int, world_size: int, options: ZeroOptions) -> int:
    mesh = Mesh(Layout(dp=world_size, zero=3), COLLECTIVE_TIMEOUT)
    layer = torch.nn.Linear(32, 32, bias=False)  # its gradient fills more than a block on each rank
    set_spec(layer.weight, ParameterSpec("weight", tuple(layer.weight.shape)))
    states = DeepSpeedStates(layer, [torch.optim.AdamW(layer.parameters())], 3, mesh, options)
    with states.accumulate():
        loss = layer(torch.ones(2, 32)).square().mean()
        states.after_forward()
        loss.backward()
        states.after_backward()
    states.reduce()
    states.step()
    count = len(list(Path(str(options.nvme_path)).glob(f"lightning_par_rank{rank}_*/**/*.swp")))
    states.close()
    return count


@SLOW
def test_gradients_are_not_written_to_files(folder: Path) -> None:
    assert run_ranks(files_of_a_step, 2, in_files(folder)) == [3, 3]


@SLOW
def test_every_precision_of_the_strategy(folder: Path) -> None:
    """A frozen block, two parameter groups, clipping."""
    check_precisions(frozen_block, ["pp2_dp2_zero3_mb2"], ["32-true", "bf16-mixed", "bf16-true"], zero=section(folder))
    assert not list(folder.iterdir())


@SLOW
def test_skipped_steps_leave_nothing_behind(folder: Path) -> None:
    check_skipped_steps([(resolved("pp2_dp2_zero3_mb2"), section(folder))])


def test_what_a_machine_lacks_for_files_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def has_function(self: AsyncIOBuilder, *args: Any) -> bool:
        logging.getLogger("compilers").info("a command")  # as distutils does
        return False  # as without the package

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(AsyncIOBuilder, "has_function", has_function)
    with pytest.raises(
        ConfigurationError, match=r"operator async_io .* machine: install libaio with its header \(apt install libaio-dev\), or"
    ):
        load_async_io(CPU)
    monkeypatch.setenv("CXX", "/no/compiler")
    with pytest.raises(ConfigurationError, match=r"install a C\+\+ compiler \(g\+\+\), or use zero.offload_optimizer=cpu"):
        load_async_io(CPU)
    assert not [record for record in caplog.records if record.name == "compilers"]


def test_an_operator_that_fails_to_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncIOBuilder, "has_function", lambda self, *args, **kwargs: True)
    monkeypatch.setattr(AsyncIOBuilder, "include_paths", lambda self: 1 / 0)
    monkeypatch.setattr(PinMemoryBuilder, "load", lambda self, verbose: None)
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    with pytest.raises(
        ConfigurationError, match=r"operator async_io cannot be built on this machine \(division by zero\): install a C"
    ):
        load_async_io(CPU)


def test_a_folder_that_cannot_hold_the_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"zero.nvme_path=\S+/none: there is no such folder: make one on a disk"):
        check_folder(str(tmp_path / "none"))
    with pytest.raises(ConfigurationError, match=r"zero.nvme_path=/sys: no file can be written there, .*Permission denied"):
        check_folder("/sys")
    monkeypatch.setattr(nvme, "_open_directly", lambda name: os.open("/", os.O_WRONLY))  # as where there is no direct access
    with pytest.raises(ConfigurationError, match=r"no file can be written there, past the cache of the system \(Is a directory\)"):
        check_folder(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_runs_in_one_folder_stay_apart_and_clean_up(tmp_path: Path) -> None:
    first, second = (StateFolder(str(tmp_path), rank=0) for _ in range(2))
    assert first.path != second.path
    first.reserve({f"{first.path}/x": 5000})
    assert Path(f"{first.path}/x").stat().st_blocks * 512 >= 5000
    first.close()
    assert [str(path) for path in tmp_path.iterdir()] == [second.path]
    del second  # as when a run ends by an exception
    assert not list(tmp_path.iterdir())
    StateFolder(None, rank=0).close()


def test_a_full_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: int, offset: int, num_bytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    folder = StateFolder(str(tmp_path), rank=3)
    with pytest.raises(
        ConfigurationError, match=r"the states of rank 3 need 1.500 GiB there, .* \(No space left on device\): make room"
    ):
        folder.reserve({f"{folder.path}/x": 2**30, f"{folder.path}/y": 2**29})


def test_memory_that_cannot_be_locked_is_found_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = {"zero_optimization": {"sub_group_size": 100, "offload_optimizer": {"buffer_count": 4}}}
    check_locked_memory(config, [[50]], 2)
    check_locked_memory({"zero_optimization": {}}, [[50]], 2)

    def fail(*area: Any) -> int:
        ctypes.set_errno(errno.ENOMEM)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: SimpleNamespace(mlock=fail))
    with pytest.raises(ConfigurationError, match=r"locks 4.0 MiB of memory on each rank, .*\(Cannot allocate memory\): allow it"):
        check_locked_memory(config, [[2**19]], 2)


def test_the_largest_group_is_counted_as_deepspeed_makes_them() -> None:
    assert largest_group([[10, 10, 11], [7]], 2, limit=9) == 10  # 5 + 5, then 6; and 4
    assert largest_group([[10, 10, 11], [7]], 2, limit=100) == 16


class Renewing(torch.optim.SGD):
    """Puts another tensor in the place of its state."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter]["mean"] = parameter.grad.clone()


class Halving(torch.optim.SGD):
    """Keeps its state in half precision."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            held = self.state[parameter].setdefault("sum", torch.zeros_like(parameter, dtype=torch.bfloat16))
            held.add_(parameter.grad)


def test_what_an_optimizer_keeps_is_found_out() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3))]
    assert kept_states(torch.optim.AdamW(parameters)) == ["exp_avg", "exp_avg_sq"]
    assert kept_states(torch.optim.AdamW(parameters, amsgrad=True)) == ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    assert kept_states(torch.optim.SGD(parameters)) == []
    with pytest.raises(ConfigurationError, match=r"Renewing does not keep its state mean so: use cpu"):
        kept_states(Renewing(parameters))
    with pytest.raises(ConfigurationError, match=r"Halving does not keep its state sum so: use cpu"):
        kept_states(Halving(parameters))
    with pytest.raises(ConfigurationError, match=r"LBFGS cannot be tried out on the host \(.*closure.*\): use cpu"):
        kept_states(torch.optim.LBFGS(parameters))


def test_a_missing_folder_is_found_before_ranks_start() -> None:
    zero = {"offload_optimizer": "nvme", "nvme_path": "/no/disk"}
    strategy = HybridParallelStrategy("dp2_zero3", print_plan=False, zero=zero)
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigurationError, match=r"zero.nvme_path=/no/disk: there is no such folder"):
        trainer.fit(Chain(Block), DataLoader([tokens()], batch_size=None))
