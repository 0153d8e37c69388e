"""Checkpoints of any layout, read by one process that knows nothing of layouts: `load_from_checkpoint`, and a plain Trainer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from lightning_par.checkpoint.plain import take_apart
from lightning_par.checkpoint.save import Content, write_checkpoint
from lightning_par.checkpoint.share import Share, add_whole
from lightning_par.checkpoint.whole import read_whole_checkpoint
from lightning_par.errors import CheckpointError
from tests.models import make_batch
from tests.parity import TOLERANCE
from tests.written import EPOCH, Written, loader, train_plain, write_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "last.ckpt"
    write_run("tp2_pp2_zero1_mb2", path)
    return path


@pytest.fixture(scope="module")
def plain() -> tuple[pl.LightningModule, list[float]]:
    """The module after an epoch in one process; the losses of two."""
    _, module, _ = train_plain(1)
    return module, train_plain(2)[2]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def test_load_from_checkpoint_gives_the_module_of_one_process(saved: Path, plain: Any) -> None:
    module = Written.load_from_checkpoint(saved)
    assert module.model.lm_head.weight is module.model.transformer.wte.weight
    for name, value in plain[0].named_parameters():
        assert relative_error(module.get_parameter(name), value) < TOLERANCE, name
    assert module.seen.tolist() == [3, 4] and module.hparams == {"width": 32, "lr": 0.01}
    tokens = make_batch(9, 2)["tokens"]
    logits, expected = (each.eval().model(tokens).logits for each in (module, plain[0]))
    assert relative_error(logits, expected) < TOLERANCE


class Other(lightning.pytorch.LightningModule):
    """The same names under the other name of Lightning."""

    def __init__(self, width: int = 8, more: bool = False) -> None:
        super().__init__()
        self.model = Written(width).model
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
        if more:
            self.more = torch.nn.Linear(1, 1)


def test_the_other_name_of_lightning_reads_it_too(saved: Path, plain: Any) -> None:
    module = Other.load_from_checkpoint(str(saved))
    error = relative_error(module.model.lm_head.weight, plain[0].model.lm_head.weight)
    assert error < TOLERANCE and module.seen.tolist() == [3, 4]


def test_its_options_do_what_they_do_elsewhere(saved: Path, tmp_path: Path) -> None:
    assert Written.load_from_checkpoint(saved, lr=0.5).hparams.lr == 0.5
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"more.weight\""):
        Other.load_from_checkpoint(saved, more=True)
    with pytest.warns(UserWarning, match=r"not in the checkpoint: \['more.weight', 'more.bias'\]"):
        Other.load_from_checkpoint(saved, more=True, strict=False)
    (tmp_path / "more.yaml").write_text("width: 32\nmore: false\n")
    Other.load_from_checkpoint(saved, hparams_file=tmp_path / "more.yaml")


@pytest.mark.parametrize(
    "location", ["meta", torch.device("meta"), {"cpu": "meta"}, lambda storage, place: torch.UntypedStorage(0, device="meta")]
)
def test_map_location_says_where_weights_go(saved: Path, location: Any) -> None:
    found = read_whole_checkpoint(saved, location)["state_dict"]
    assert {value.device.type for value in found.values()} == {"meta"}


@pytest.mark.parametrize("location", [None, {"cuda:0": "meta"}, lambda storage, place: None])
def test_map_location_may_leave_them(saved: Path, location: Any) -> None:
    assert {value.device.type for value in read_whole_checkpoint(saved, location)["state_dict"].values()} == {"cpu"}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_the_state_dict_is_the_module_s_own(precision: str, tmp_path: Path) -> None:
    """To the last bit, under the same names, in the dtype of the module: of bfloat16 weights the masters are saved."""
    expected = write_run("tp1", tmp_path / "last.ckpt", precision)
    content = read_whole_checkpoint(tmp_path / "last.ckpt")
    assert content["state_dict"].keys() == expected.keys()
    for name, value in expected.items():
        found = content["state_dict"][name]
        assert found.dtype == value.dtype and torch.equal(found, value), name
    assert content["mine"]["tensor"].tolist() == [0, 1, 2] and content["mine"]["number"] == float("inf")
    assert (content["epoch"], content["global_step"]) == (1, EPOCH)


def test_another_strategy_tests_and_resumes(saved: Path, plain: Any) -> None:
    trainer, _, losses = train_plain(2, str(saved))
    assert losses == pytest.approx(plain[1][EPOCH:], rel=TOLERANCE)
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert schedule.get_last_lr() == [0.01 / 4, 0.01 / 4]  # two epochs, each halves it
    tester = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (metrics,) = tester.test(Written(), loader(), ckpt_path=str(saved), verbose=False)
    (expected,) = tester.test(plain[0], loader(), verbose=False)
    assert metrics == pytest.approx(expected, rel=TOLERANCE)


def test_files_of_lightning_are_left_to_lightning(tmp_path: Path) -> None:
    trainer, module, _ = train_plain(1)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    found = Written.load_from_checkpoint(tmp_path / "plain.ckpt")
    assert torch.equal(found.model.lm_head.weight, module.model.lm_head.weight)
    with pytest.raises(FileNotFoundError):
        Written.load_from_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of this strategy \(it has no checkpoint.json\)"):
        Written.load_from_checkpoint(tmp_path)


class Data(pl.LightningDataModule):
    def __init__(self, size: int, word: str = "a") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.place = 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.place = state_dict["place"]


def write(path: Path, trainer: dict[str, Any]) -> Path:
    share = Share()
    add_whole(share, "weight", "weight", torch.ones(2))
    kept = {"pytorch-lightning_version": pl.__version__, **trainer}
    write_checkpoint(path, Content("single", share, take_apart({"trainer": kept, "run": {}})), None)
    return path


def test_a_datamodule_is_loaded(tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt", {"datamodule_hyper_parameters": {"size": 3}, "Data": {"place": 7}})
    data = Data.load_from_checkpoint(path, word="b")
    assert (data.hparams.size, data.hparams.word, data.place) == (3, "b", 7)


class Plain(pl.LightningModule):
    """One weight, and hyperparameters of any kind."""

    def __init__(self, options: Any = None) -> None:
        super().__init__()
        self.options = options
        self.weight = torch.nn.Parameter(torch.zeros(2))


class Unknown:
    """What only a pickle can hold."""


def test_what_only_a_pickle_holds_needs_trust(tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt", {"hyper_parameters": {"options": Unknown()}, "callbacks": {"mine": Unknown()}})
    with pytest.warns(UserWarning, match=r"left out: hyper_parameters.options. Reading them may run .* pass weights_only=False"):
        module = Plain.load_from_checkpoint(path)
    assert module.options is None and module.weight.tolist() == [1, 1]
    assert isinstance(Plain.load_from_checkpoint(path, weights_only=False).options, Unknown)


def test_hyperparameters_of_omegaconf_need_no_trust(tmp_path: Path) -> None:
    config = OmegaConf.create({"width": 3, "twice": "${width}"})
    kept = {"hyper_parameters": config, "hparams_type": type(config), "hparams_name": "options"}
    module = Plain.load_from_checkpoint(write(tmp_path / "last.ckpt", kept))
    assert module.options.twice == 3 and type(module.options) is type(config)
    assert not (tmp_path / "last.ckpt" / "pickled.pt").exists()


def test_one_that_was_being_replaced_is_read(tmp_path: Path) -> None:
    write(tmp_path / "last.ckpt", {}).rename(tmp_path / ".last.ckpt.earlier")
    assert Plain.load_from_checkpoint(tmp_path / "last.ckpt").weight.tolist() == [1, 1]


def test_lightning_may_be_imported_after_us() -> None:
    code = (
        "import sys, lightning_par; assert 'torch' not in sys.modules; import pytorch_lightning.core.saving as saving; "
        "import lightning_fabric.plugins.io.torch_io as io; assert saving.pl_load.__wrapped__ is io.pl_load.__wrapped__; "
        "assert saving.__spec__.loader.get_source(saving.__name__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_lightning_may_be_imported_before_us() -> None:
    code = (
        "import pytorch_lightning.core.saving as saving, lightning_fabric.plugins.io.torch_io as io; plain = saving.pl_load; "
        "import lightning_par; assert saving.pl_load.__wrapped__ is plain and io.pl_load.__wrapped__ is plain"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
