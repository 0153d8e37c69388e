"""Pictures of the device mesh: which rank is where, what it holds and whom it talks to, as text, a page and a PNG."""

from __future__ import annotations

from pathlib import Path

from lightning_par.picture.mesh.html import mesh_page
from lightning_par.picture.mesh.mesh import Holding, MeshPicture, mesh_of
from lightning_par.picture.mesh.place import place_ranks
from lightning_par.picture.mesh.png import write_mesh_png
from lightning_par.picture.mesh.report import print_mesh

__all__ = ["Holding", "MeshPicture", "mesh_of", "mesh_page", "place_ranks", "print_mesh", "write_mesh", "write_mesh_png"]


def write_mesh(mesh: MeshPicture, folder: Path) -> tuple[Path, Path]:
    """Write ``mesh.html`` and ``mesh.png`` into ``folder``, which is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    page, image = folder / "mesh.html", folder / "mesh.png"
    page.write_text(mesh_page(mesh), encoding="utf-8")
    write_mesh_png(mesh, image)
    return page, image
