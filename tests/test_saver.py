"""Saving: published whole or not at all, in the background too; what is written is the state, once."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_par.checkpoint import Checkpoint, Content, Saver, Share, take_apart
from lightning_par.checkpoint import save as saving
from lightning_par.checkpoint.box import Box
from lightning_par.checkpoint.index import PARAMETER, Entry
from lightning_par.checkpoint.save import write_checkpoint
from lightning_par.errors import CheckpointError
from tests.ranks import run_ranks

ROWS = 4


def content(value: float, rank: int = 0, size: int = 1) -> Content:
    """Rank ``rank``'s rows of a tensor that is filled with a value."""
    share = Share({"w": Entry((ROWS * size, 3), "float32", PARAMETER)})
    share.pieces.append(("w", "weight", Box((ROWS * rank, 0), (ROWS, 3)), torch.full((ROWS, 3), value)))
    return Content("tp1", share, take_apart({"trainer": {"value": value}, "run": {}}))


def value_in(path: Path) -> float:
    checkpoint = Checkpoint(path)
    (value,) = set(checkpoint.read_whole("w").view(-1).tolist())
    assert checkpoint.trainer()["trainer"] == {"value": value}
    return float(value)


def test_a_later_save_replaces_an_earlier_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        write_checkpoint(tmp_path / "last.ckpt", content(value), None)
        assert value_in(tmp_path / "last.ckpt") == value
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert sorted(path.name for path in (tmp_path / "last.ckpt").iterdir()) == [
        "checkpoint.json",
        "rank-00000.safetensors",
        "trainer.json",
    ]


@pytest.mark.parametrize(("least", "expected"), [(1, 7), (48, 5), (1 << 20, 1)])
def test_a_rank_writes_several_files(least: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 pieces of 12 bytes in at most 8 files, of at least ``least`` bytes each; synced before the index names them."""
    monkeypatch.setattr(saving, "FILE_BYTES", least)
    synced = list[str]()
    monkeypatch.setattr(saving, "sync", lambda path: synced.append(path.name))
    values = torch.arange(60.0).view(20, 3)
    share = Share({"w": Entry((20, 3), "float32", PARAMETER)})
    share.pieces += [("w", "weight", Box((row, 0), (1, 3)), values[row : row + 1]) for row in range(20)]
    write_checkpoint(tmp_path / "last.ckpt", Content("tp1", share, take_apart({"trainer": {}, "run": {}})), None)
    files = sorted(path.name for path in (tmp_path / "last.ckpt").glob("rank-*"))
    assert files == sorted(["rank-00000.safetensors", *(f"rank-00000.{n}.safetensors" for n in range(1, expected))])
    assert sorted(synced) == files
    assert torch.equal(Checkpoint(tmp_path / "last.ckpt").read_whole("w"), values)


@pytest.mark.parametrize("moment", range(12))
def test_a_save_that_is_killed_at_any_moment_loses_nothing(moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before each of its calls that change a disk: what can be read is what was there, or the new one."""
    write_checkpoint(tmp_path / "last.ckpt", content(1.0), None)
    calls = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise KeyboardInterrupt  # and everything after it: a process that is killed does not clean up
            return function(*args, **kwargs)

        return call

    for owner, name in ((Path, "mkdir"), (Path, "rename"), (Path, "write_text"), (saving, "write_tensors"), (saving, "remove")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    monkeypatch.setattr("shutil.rmtree", counted(__import__("shutil").rmtree))
    killed = False
    try:
        write_checkpoint(tmp_path / "last.ckpt", content(2.0), None)
    except KeyboardInterrupt:
        killed = True
    monkeypatch.undo()
    assert value_in(tmp_path / "last.ckpt") in ((1.0, 2.0) if killed else (2.0,))
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".") and path.name != "last.ckpt"]
    write_checkpoint(tmp_path / "last.ckpt", content(3.0), None)
    assert value_in(tmp_path / "last.ckpt") == 3.0
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".removed")] == ["last.ckpt"]
    assert moment < 11 or not killed, "every call was tried"


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_an_error_and_what_was_there_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "last.ckpt", content(1.0), None)
    monkeypatch.setattr(saving, "write_tensors", full)
    with pytest.raises(CheckpointError, match=r"last.ckpt could not be written: No space left on device \(free some space"):
        write_checkpoint(tmp_path / "last.ckpt", content(2.0), None)
    assert value_in(tmp_path / "last.ckpt") == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def fail_on_one(rank: int, world_size: int, folder: Path) -> list[str]:
    group, words = dist.group.WORLD, []
    if rank == 1:
        saving.write_tensors = full
    for save in (
        lambda: write_checkpoint(folder / "a.ckpt", content(1.0, rank, world_size), group),
        background(group, folder, rank),
    ):
        with pytest.raises(CheckpointError) as error:
            save()
        words.append(str(error.value))
    return words


def background(group: Any, folder: Path, rank: int) -> Any:
    def save() -> None:
        saver = Saver(group, is_async=True)
        saver.save(folder / "b.ckpt", content(1.0, rank, 2))
        saver.wait()

    return save


def test_one_rank_that_cannot_write_is_named_on_all_of_them(tmp_path: Path) -> None:
    for words in run_ranks(fail_on_one, 2, tmp_path):
        for name, each in zip("ab", words, strict=True):
            assert each.startswith("rank 1 on ") and f"{name}.ckpt could not be written: No space left on device" in each
    assert list(tmp_path.iterdir()) == []


class Slow:
    """Holds a write up until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, write = threading.Event(), saving.write_tensors

        def wait(*args: Any) -> None:
            assert self.gate.wait(20)
            write(*args)

        monkeypatch.setattr(saving, "write_tensors", wait)


def test_in_the_background_training_goes_on_and_old_ones_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(None, is_async=True)
    write_checkpoint(tmp_path / "old.ckpt", content(1.0), None)
    slow, new = Slow(monkeypatch), content(2.0)
    saver.save(tmp_path / "new.ckpt", new)
    saver.settle()
    new.share.pieces[0][3].fill_(5.0)  # the next step
    saver.remove(tmp_path / "old.ckpt")
    saver.check()
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["old.ckpt"]
    slow.gate.set()
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["new.ckpt"]
    assert value_in(tmp_path / "new.ckpt") == 2.0


def test_what_goes_wrong_in_the_background_is_raised_at_the_next_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(None, is_async=True)
    write_checkpoint(tmp_path / "old.ckpt", content(1.0), None)
    slow = Slow(monkeypatch)
    monkeypatch.setattr(saving, "write_text", full)
    saver.save(tmp_path / "new.ckpt", content(2.0))
    saver.remove(tmp_path / "old.ckpt")
    slow.gate.set()
    saver._thread.join(20)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match=r"new.ckpt could not be written: No space left"):
        saver.check()
    assert value_in(tmp_path / "old.ckpt") == 1.0, "nothing is removed for one that was not written"
    saver.check()
    saver.wait()


def test_weights_that_change_while_they_are_copied_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, changed = Saver(None, is_async=True), content(1.0)
    stage, begun, gate = Saver._stage, threading.Event(), threading.Event()

    def slowly(self: Saver, piece: Any) -> torch.Tensor:
        begun.set()
        assert gate.wait(20)
        return stage(self, piece)

    monkeypatch.setattr(Saver, "_stage", slowly)
    saver.save(tmp_path / "new.ckpt", changed)
    assert begun.wait(20)
    changed.share.pieces[0][3].mul_(2)
    gate.set()
    with pytest.raises(CheckpointError, match=r"w was changed between the save and the next step .* use async_save=false"):
        saver.wait()
    assert not list(tmp_path.iterdir())
