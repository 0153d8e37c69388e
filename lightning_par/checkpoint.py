"""Checkpoints of one layout: a folder with what Lightning keeps, once, and the shards of every rank.

    epoch=1-step=200.ckpt/
      layout.json       the layout that wrote it
      lightning.pt      loops, callbacks, schedulers, hyperparameters: equal on all ranks, written by rank 0
      rank_00000.pt     one rank's parameters, buffers and optimizer states

A save is written beside its place and renamed when every rank has finished, so that a killed save leaves nothing that
could be taken for a checkpoint. One that is replaced is put aside first and removed last.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lightning_par.errors import CheckpointError, LayoutError
from lightning_par.layout import Layout
from lightning_par.runtime.mesh import Mesh


def save_checkpoint(path: Path, shared: dict[str, Any], state: dict[str, Any], mesh: Mesh) -> None:
    """Write a checkpoint. Collective over the world.

    Args:
        path: the folder to publish; one that exists is replaced.
        shared: what is equal on all ranks.
        state: this rank's own.
        mesh: this rank's axes.
    """
    draft = path.with_name(f".{path.name}.saving")
    if mesh.rank == 0:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        (draft / "layout.json").write_text(json.dumps(_degrees(mesh.layout)))
        torch.save(shared, draft / "lightning.pt")
    mesh.barrier()
    torch.save(state, draft / _file_of(mesh.rank))
    mesh.barrier()
    if mesh.rank == 0:
        earlier = path.with_name(f".{path.name}.earlier")
        _remove(earlier)
        if path.exists() or path.is_symlink():
            path.rename(earlier)  # kept until the new one is in its place
        draft.rename(path)
        _remove(earlier)
    mesh.barrier()


def check_layout(path: Path, layout: Layout) -> None:
    """Check that a checkpoint can be resumed in a layout.

    Raises:
        CheckpointError: it is none of ours.
        LayoutError: another layout wrote it.
    """
    if not (path / "layout.json").is_file():
        found = "there is nothing" if not path.exists() else "it is a single file" if path.is_file() else "it has no layout.json"
        raise CheckpointError(f"ckpt_path={path} is not a checkpoint of this strategy ({found}): give the folder that it wrote")
    written = json.loads((path / "layout.json").read_text())
    if written != _degrees(layout):
        raise LayoutError(
            f"ckpt_path={path} was written with parallel={Layout(**written)}, and this run has parallel={layout}: resume in the "
            "layout that wrote it"
        )


def load_checkpoint(path: Path, weights_only: bool | None) -> dict[str, Any]:
    """What is equal on all ranks of a checkpoint. ``weights_only`` as in `torch.load`."""
    shared: dict[str, Any] = torch.load(path / "lightning.pt", map_location="cpu", weights_only=bool(weights_only))
    return shared


def load_rank_state(path: Path, mesh: Mesh) -> dict[str, Any]:
    """This rank's own part of a checkpoint."""
    state: dict[str, Any] = torch.load(path / _file_of(mesh.rank), map_location="cpu", weights_only=True)
    return state


def _file_of(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _degrees(layout: Layout) -> dict[str, Any]:
    """What must be equal to resume; the number of microbatches may change."""
    return {key: value for key, value in asdict(layout).items() if key != "microbatches"}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
