"""The device mesh as one page, made as that of `lightning_par.picture.html`."""

from __future__ import annotations

from typing import Any

from lightning_par.picture.colour import hue, ink
from lightning_par.picture.html import fill_page
from lightning_par.picture.mesh.mesh import MeshPicture
from lightning_par.picture.mesh.place import place_ranks
from lightning_par.plan.render import listed


def mesh_page(mesh: MeshPicture) -> str:
    """The page's text. It shows every rank, and of a chosen one what it holds and whom it talks to."""
    return fill_page("mesh.html", mesh.title, _data(mesh), ["mesh.js"])


def _data(mesh: MeshPicture) -> dict[str, Any]:
    placed = place_ranks(mesh)
    return {
        "title": mesh.title,
        "summary": mesh.summary,
        "devicesPerNode": mesh.devices_per_node,
        "axes": {name: {"size": size, "stride": stride} for name, (size, stride) in mesh.axes.items()},
        "links": mesh.links,
        "holdings": [
            {"stages": listed(one.stages), "blocks": one.blocks, "facts": one.facts, "colour": hue(pp), "ink": ink(hue(pp))}
            for pp, one in enumerate(mesh.holdings)
        ],
        "cells": placed.cells,
        "labels": placed.labels,
        "width": placed.width,
        "height": placed.height,
    }
