"""Damaged checkpoints: each is one clear error that names the file, and the parameters that it held. No pickle runs unasked."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_par import cli
from lightning_par.checkpoint import Checkpoint
from lightning_par.checkpoint.index import checksum_of
from lightning_par.checkpoint.plain import take_apart
from lightning_par.checkpoint.save import Content, write_checkpoint
from lightning_par.checkpoint.share import Share, add_whole
from lightning_par.checkpoint.whole import read_whole_checkpoint
from lightning_par.errors import CheckpointError
from lightning_par.host.strategy import HybridParallelStrategy
from tests.parity import fit
from tests.ranks import run_ranks
from tests.written import Written, loader, write_run

FIRST, SECOND = "rank-00000.safetensors", "rank-00001.safetensors"
TIED = "model.transformer.wte.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "last.ckpt"
    write_run("pp2_mb2", path)
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "last.ckpt"))


def flip(path: Path, place: int) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(one: Path, other: Path) -> None:
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the index, and give it the checksum of what it then says: what a bug or malice would write."""
    path = folder / "checkpoint.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    change(content)
    path.write_text(json.dumps({**content, "checksum": checksum_of(json.dumps(content, sort_keys=True).encode())}))


def pieces_of(content: dict[str, Any], name: str = TIED) -> list[Any]:
    found: list[Any] = content["tensors"][name]["values"]["weight"]["pieces"]
    return found


def rename_file(content: dict[str, Any], name: str) -> None:
    content["files"][name] = content["files"].pop(FIRST)
    for entry in content["tensors"].values():
        for values in entry["values"].values():
            for piece in values["pieces"]:
                piece[0] = name if piece[0] == FIRST else piece[0]


def halve_twice(content: dict[str, Any]) -> None:
    """The upper half of a tensor in the place of both."""
    pieces = pieces_of(content)
    pieces[0][3][0] = 64
    pieces.append(pieces[0])


def of_another_run(folder: Path) -> None:
    """A file of the same names and size, with other values."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / FIRST)
    size = (folder / FIRST).stat().st_size
    save_file({name: value + 1 for name, value in tensors.items()}, folder / FIRST)
    assert (folder / FIRST).stat().st_size == size


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def to_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


HOLDS = rf"it holds {re.escape(TIED)}, model\.transformer\.wpe\.weight, .* and \d+ more: use another checkpoint"
INDEX_DAMAGED = r"checkpoint\.json is damaged: "

# name: what happens to the folder, and the words of the error
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, r"last\.ckpt is not a checkpoint of this strategy \(there is nothing\): give the folder"),
    "a file": (to_file, r"last\.ckpt is not a checkpoint of this strategy \(it is a single file\): give the folder"),
    "an empty folder": (empty, r"last\.ckpt is not a checkpoint of this strategy \(it has no checkpoint\.json\): give the folder"),
    "no index": (lambda folder: (folder / "checkpoint.json").unlink(), r"\(it has no checkpoint\.json\): give the folder"),
    "a truncated index": (lambda folder: truncate(folder / "checkpoint.json"), INDEX_DAMAGED + "it is no index"),
    "a flipped bit in the index": (
        lambda folder: flip(folder / "checkpoint.json", (folder / "checkpoint.json").read_text().index(TIED)),
        INDEX_DAMAGED + "its checksum does not fit",
    ),
    "an index that is a list": (lambda folder: (folder / "checkpoint.json").write_text("[]"), INDEX_DAMAGED + "it is no index"),
    "another version": (
        lambda folder: rewrite(folder, lambda content: content.update(version=9)),
        r"checkpoint\.json is of format lightning_par 9, and this lightning_par reads 1: update it",
    ),
    "a missing shard": (lambda folder: (folder / FIRST).unlink(), rf"{FIRST} is missing; {HOLDS}"),
    "a truncated shard": (lambda folder: truncate(folder / FIRST), rf"{FIRST} is damaged: it has \d+ bytes of \d+; {HOLDS}"),
    "a flipped bit in a shard": (
        lambda folder: flip(folder / FIRST, -9),
        rf"{FIRST} is damaged: model\S+: the checksum of .*; {HOLDS}",
    ),
    "a damaged header of a shard": (lambda folder: flip(folder / FIRST, 9), rf"{FIRST} is damaged: .*; {HOLDS}"),
    "swapped shards": (
        lambda folder: swap(folder / FIRST, folder / SECOND),
        rf"({FIRST} is damaged: it has \d+ bytes of \d+; {HOLDS}|{SECOND} is damaged: .*; it holds)",
    ),
    "a shard of another run": (of_another_run, rf"{FIRST} is damaged: model\S+: the checksum of .*; {HOLDS}"),
    "a file outside of the folder": (
        lambda folder: rewrite(folder, lambda content: rename_file(content, f"../{FIRST}")),
        INDEX_DAMAGED + rf"'\.\./{FIRST}' is no name of a file in it",
    ),
    "a file that is not listed": (
        lambda folder: rewrite(folder, lambda content: content["files"].pop(FIRST)),
        INDEX_DAMAGED + rf"model\S+ \(\w+\) is in {FIRST}, which is not listed",
    ),
    "a box outside of its tensor": (
        lambda folder: rewrite(folder, lambda content: pieces_of(content)[0][2].__setitem__(0, 1000)),
        INDEX_DAMAGED + rf"a piece of {re.escape(TIED)} \(weight\) lies outside of it",
    ),
    "a gap between boxes": (
        lambda folder: rewrite(folder, lambda content: pieces_of(content)[0][3].__setitem__(0, 127)),
        INDEX_DAMAGED + rf"the pieces of {re.escape(TIED)} \(weight\) have {127 * 32} of its {128 * 32} elements",
    ),
    "a box twice, and so a gap": (
        lambda folder: rewrite(folder, halve_twice),
        INDEX_DAMAGED + rf"the pieces of {re.escape(TIED)} \(weight\) have {64 * 32} of its {128 * 32} elements",
    ),
    "a box of other dims": (
        lambda folder: rewrite(folder, lambda content: [box.append(0) for box in pieces_of(content)[0][2:4]]),
        INDEX_DAMAGED + rf"a piece of {re.escape(TIED)} \(weight\) lies outside of it",
    ),
    "a dtype that is none": (
        lambda folder: rewrite(folder, lambda content: content["tensors"][TIED]["values"]["weight"].update(dtype="float33")),
        INDEX_DAMAGED + rf"{re.escape(TIED)} is of 'float33', which is no dtype",
    ),
    "a damaged trainer.json": (lambda folder: flip(folder / "trainer.json", 9), r"trainer\.json is damaged: its checksum does not"),
    "no trainer.safetensors": (lambda folder: (folder / "trainer.safetensors").unlink(), r"trainer\.safetensors is missing: use"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_clear_error(name: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = DAMAGES[name]
    damage(copy)
    with pytest.raises(CheckpointError, match=words) as error:
        read_whole_checkpoint(copy, has_states=True)
    assert str(copy) in str(error.value)
    with pytest.raises(SystemExit) as end:
        cli.main(["checkpoint", "verify", str(copy)])
    shown = capsys.readouterr()
    assert end.value.code == 1 and re.search(words, shown.err) and shown.out == f"{copy}: damaged\n"


def test_there_are_twenty() -> None:
    assert len(DAMAGES) >= 20


def resume(rank: int, world_size: int, path: Path) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "max_steps": -1, "max_epochs": 2, "gradient_clip_val": None}
    fit(Written, loader(), ckpt_path=str(path), strategy=HybridParallelStrategy("pp2_mb2", print_plan=False), **options)


@pytest.mark.parametrize("name", ["a truncated index", "a flipped bit in a shard"])
def test_a_run_that_resumes_says_the_same(name: str, copy: Path) -> None:
    damage, words = DAMAGES[name]
    damage(copy)
    with pytest.raises(AssertionError, match=words):  # the traceback of a rank
        run_ranks(resume, 2, copy, timeout=120)


def test_verify_names_every_damaged_file(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(copy / FIRST, -9)
    flip(copy / SECOND, -9)
    with pytest.raises(SystemExit):
        cli.main(["checkpoint", "verify", str(copy)])
    first, second = capsys.readouterr().err.splitlines()
    assert f"{FIRST} is damaged: " in first and f"{SECOND} is damaged: " in second


# ---------------------------------------------------------------------- pickles


class Payload:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


class Holder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self.weight * batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def planted(folder: Path, trace: Path) -> Path:
    """A checkpoint with a payload as the state of a callback, which is listed, and beside its files, which are not."""
    trainer = {
        "pytorch-lightning_version": pl.__version__,
        "state_dict": {},
        "epoch": 0,
        "global_step": 0,
        "optimizer_states": [],
        "lr_schedulers": [],
        "callbacks": {"Mine": Payload(trace)},
    }
    share = Share()
    add_whole(share, "weight", "weight", torch.ones(2))
    write_checkpoint(folder, Content("single", share, take_apart({"trainer": trainer, "run": {}})), None)
    for name in ("rank_00000.pt", "lightning.pt", "data.pkl", "rank-00001.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Payload(trace)))
    assert (folder / "pickled.pt").exists() and not trace.exists()
    return folder


def resume_alone(rank: int, world_size: int, path: Path, trust: bool) -> None:
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        strategy=HybridParallelStrategy("single", print_plan=False), devices=1, accelerator="cpu", max_epochs=1, **options
    )
    loader = torch.utils.data.DataLoader(torch.ones(2, 2), batch_size=2)
    trainer.fit(Holder(), loader, ckpt_path=str(path), weights_only=False if trust else None)


@pytest.mark.filterwarnings("ignore:.*left out")
def test_a_planted_pickle_never_runs_unasked(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = planted(tmp_path / "last.ckpt", trace)
    assert Holder.load_from_checkpoint(path).weight.tolist() == [1, 1]
    Holder.load_from_checkpoint(path, weights_only=True)
    tester = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    tester.test(Holder(), torch.utils.data.DataLoader(torch.ones(2, 2)), ckpt_path=str(path), verbose=False)
    for words in (["show"], ["show", "--json"], ["verify"]):
        cli.main(["checkpoint", words[0], str(path), *words[1:]])
    for format in ("safetensors", "lightning"):
        cli.main(["checkpoint", "export", str(path), str(tmp_path / format), "--format", format])
    run_ranks(resume_alone, 1, path, False, timeout=120)
    assert not trace.exists()


def test_a_planted_pickle_runs_with_trust(tmp_path: Path) -> None:
    """That the test above could fail."""
    trace = tmp_path / "trace"
    path = planted(tmp_path / "last.ckpt", trace)
    Holder.load_from_checkpoint(path, weights_only=False)
    assert trace.exists()
    trace.unlink()
    cli.main(["checkpoint", "export", str(path), str(tmp_path / "plain.ckpt"), "--format", "lightning", "--trust"])
    assert trace.exists()
    trace.unlink()
    run_ranks(resume_alone, 1, path, True, timeout=120)
    assert trace.exists()


def test_an_odd_value_that_cannot_be_unpickled_is_said(tmp_path: Path) -> None:
    path = planted(tmp_path / "last.ckpt", tmp_path / "gone" / "trace")  # where no trace can be left
    with pytest.raises(CheckpointError, match=r"pickled\.pt cannot be unpickled: FileNotFoundError.*: import what its"):
        Checkpoint(path).trainer(trust=True)
