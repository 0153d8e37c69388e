"""Publishing a checkpoint, and what is refused as one; resuming is in tests/test_lightning.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_par.checkpoint import check_layout, load_checkpoint, load_rank_state, save_checkpoint
from lightning_par.errors import CheckpointError, LayoutError
from lightning_par.layout import parse_layout

MESH: Any = SimpleNamespace(rank=0, layout=parse_layout("tp2_mb4").resolve(2), barrier=lambda: None)


def save(path: Path, value: float) -> None:
    save_checkpoint(path, {"step": value}, {"weight": torch.tensor(value)}, MESH)


def test_a_later_save_replaces_an_earlier_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save(tmp_path / "last.ckpt", value)
    assert load_checkpoint(tmp_path / "last.ckpt", None) == {"step": 2.0}
    assert load_rank_state(tmp_path / "last.ckpt", MESH) == {"weight": torch.tensor(2.0)}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_save_that_dies_while_publishing_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "last.ckpt", 1.0)
    rename = Path.rename

    def die(self: Path, target: Path) -> Path:
        if self.name.endswith(".saving"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "last.ckpt", 2.0)
    found = {path.name: load_checkpoint(path, None)["step"] for path in tmp_path.iterdir()}
    assert sorted(found.values()) == [1.0, 2.0] and "last.ckpt" not in found


def test_only_a_checkpoint_of_the_same_layout_is_taken(tmp_path: Path) -> None:
    save(tmp_path / "last.ckpt", 1.0)
    check_layout(tmp_path / "last.ckpt", parse_layout("tp2_dp1_mb8"))
    with pytest.raises(LayoutError, match=r"last.ckpt was written with parallel=tp2, and this run has parallel=pp2: resume in"):
        check_layout(tmp_path / "last.ckpt", parse_layout("pp2").resolve(2))
    (tmp_path / "file.ckpt").write_text("")
    (tmp_path / "folder.ckpt").mkdir()
    for name, found in (("none", "there is nothing"), ("file", "it is a single file"), ("folder", "it has no layout.json")):
        with pytest.raises(
            CheckpointError, match=rf"{name}.ckpt is not a checkpoint of this strategy \({found}\): give the folder"
        ):
            check_layout(tmp_path / f"{name}.ckpt", parse_layout("tp2").resolve(2))
