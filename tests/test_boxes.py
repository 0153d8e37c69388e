"""Boxes against torch: what a flat range of a shard is made of, for every kind of split."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lightning_par.checkpoint.box import Box, flat_boxes, places
from lightning_par.runtime.parameter import Split


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (2, 1, 3, 2), (1, 1), (0, 3), (4, 0)])
def test_boxes_are_a_flat_range_in_its_order(shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(tensor.numel() + 1), 2):
        boxes = list(flat_boxes(shape, start, stop))
        found = [box.of(tensor).reshape(-1) for box in boxes]
        assert torch.equal(torch.cat([torch.arange(0), *found]), tensor.view(-1)[start:stop])
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_the_common_part_of_two_boxes() -> None:
    one, other = Box((0, 2), (3, 4)), Box((1, 5), (4, 4))
    assert one & other == Box((1, 5), (2, 1))
    assert (one & other).inside(other) == Box((0, 0), (2, 1))  # type: ignore[union-attr]
    assert one & Box((3, 2), (1, 1)) is None


SPLITS = {
    "whole": ((5, 3), None, 2),
    "rows": ((6, 3), Split(0, (6,)), 2),
    "columns": ((3, 8), Split(1, (8,)), 4),
    "middle": ((2, 6, 3), Split(1, (6,)), 3),
    "fused": ((12, 2), Split(0, (4, 4, 4)), 2),
    "fused columns": ((2, 10), Split(1, (6, 4)), 2),
    "padded": ((7, 3), Split(0, (7,)), 4),
    "padded to nothing": ((2, 3), Split(0, (2,)), 4),
    "padded columns": ((3, 5), Split(1, (5,)), 2),
    "copied heads": ((16, 2), Split(0, (8, 4, 4), (1, 2, 2)), 4),
    "one head for all": ((10, 2), Split(0, (8, 2), (1, 4)), 4),
    "vector": ((7,), Split(0, (7,)), 2),
}


@pytest.mark.parametrize("name", SPLITS)
def test_places_of_every_range_of_every_shard(name: str) -> None:
    shape, split, size = SPLITS[name]
    tensor = torch.arange(1, math.prod(shape) + 1).view(shape)
    for coordinate in range(size):
        shard = tensor if split is None else split.shard(tensor, size, coordinate)
        flat = shard.reshape(-1)
        for start, stop in itertools.combinations(range(flat.numel() + 1), 2):
            piece, rebuilt = flat[start:stop], torch.zeros(stop - start, dtype=torch.long)
            for place in places(shape, split, size, coordinate, start, stop):
                assert torch.equal(place.of(piece), place.box.of(tensor)), (coordinate, start, stop)
                place.of(rebuilt).copy_(place.box.of(tensor))
            assert torch.equal(rebuilt, piece), "what is in no place is padding, which is zero"


@pytest.mark.parametrize("name", [name for name, (_, split, _) in SPLITS.items() if split])
def test_writers_cover_every_element_once(name: str) -> None:
    shape, split, size = SPLITS[name]
    assert split is not None
    count = torch.zeros(shape, dtype=torch.long)
    for coordinate in range(size):
        numel = math.prod(split.local_shape(shape, size))
        for start in range(0, numel, 5):
            for place in places(shape, split, size, coordinate, start, min(start + 5, numel), is_writer=True):
                place.box.of(count).add_(1)
    assert (count == 1).all()
