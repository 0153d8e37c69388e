"""Batches: cut into microbatches, outputs put together again, compared between ranks."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from transformers import BatchEncoding
from transformers.modeling_outputs import CausalLMOutput

from lightning_par.errors import DataError, ReplicaError
from lightning_par.host.batch import batch_size, merge_outputs, split_batch
from lightning_par.host.fingerprint import check_same_batch, fingerprint
from lightning_par.layout import Layout
from lightning_par.runtime.mesh import Mesh
from tests.ranks import run_ranks

Pair = namedtuple("Pair", "inputs labels")


@dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    name: str = "all"


def rows(size: int, *shape: int) -> torch.Tensor:
    """A tensor whose every element is its own number."""
    return torch.arange(size * int(np.prod(shape or (1,)))).reshape(size, *shape).float()


BATCHES: dict[str, Any] = {
    "tensor": rows(5, 3),
    "list": [rows(5, 3), rows(5)],
    "tuple of strings": (rows(5), ("a", "b", "c", "d", "e")),
    "dict": {"x": rows(5, 2), "names": ["a", "b", "c", "d", "e"], "mask": torch.ones(4, 4), "scale": torch.tensor(2.0)},
    "namedtuple": Pair(rows(5, 2), {"y": rows(5)}),
    "dataclass": Sample(rows(5, 2)),
    "numpy": {"x": rows(5), "weights": np.arange(10.0).reshape(5, 2)},
    "UserDict": UserDict(x=rows(5, 2)),
    "BatchEncoding": BatchEncoding({"input_ids": rows(5, 4), "attention_mask": rows(5, 4)}),
    "read-only": MappingProxyType({"x": rows(5)}),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_merging_the_pieces_gives_the_batch(name: str, num_microbatches: int) -> None:
    batch = BATCHES[name]
    pieces = split_batch(batch, num_microbatches)
    assert [size for _, size in pieces] == {1: [5], 2: [3, 2], 4: [2, 1, 1, 1]}[num_microbatches]
    assert all(type(piece) is type(batch) and batch_size(piece) == size for piece, size in pieces)
    merged = merge_outputs([piece for piece, _ in pieces], [size for _, size in pieces])
    assert type(merged) is type(batch)
    assert fingerprint(merged) == fingerprint(batch)


def test_pieces_are_views_and_the_rest_is_passed_whole() -> None:
    batch = BATCHES["dict"]
    (first, _), (second, _) = split_batch(batch, 2)
    assert first["x"].data_ptr() == batch["x"].data_ptr()
    assert second["mask"] is batch["mask"] and second["scale"] is batch["scale"]
    assert first["names"] == ["a", "b", "c"] and second["names"] == ["d", "e"]


def test_one_microbatch_is_the_batch_itself() -> None:
    batch = {"captions": ["no", "tensor"]}
    assert split_batch(batch, 1)[0][0] is batch
    assert split_batch(BATCHES["list"], 1) == [(BATCHES["list"], 5)]


def test_a_batch_smaller_than_the_microbatches_has_fewer_pieces() -> None:
    assert [size for _, size in split_batch(rows(2, 3), 4)] == [1, 1]
    batch = rows(1, 3)
    assert split_batch(batch, 4)[0][0] is batch


def test_batch_size_is_that_of_the_first_tensor_with_a_dim() -> None:
    assert batch_size({"scale": torch.tensor(1.0), "x": rows(3, 7), "y": rows(9)}) == 3


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"text": ["a", "b"]}, r"the batch \(a dict\) holds no tensor with a batch dim.*or use one microbatch \(mb1\)"),
        ({"x": pack_sequence([rows(3), rows(2)])}, r"batch\['x'\] is a PackedSequence.*or use mb1"),
    ],
)
def test_a_batch_that_cannot_be_cut(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_batch(batch, 2)


def test_outputs_are_merged_by_what_they_are() -> None:
    outputs = [
        {"loss": torch.tensor(float(value)), "top": float(value), "text": ["t"] * size, "names": ("n",) * size, "none": None,
         "k": 5, "boxes": [torch.full((box, 4), value) for box in range(size)], "pair": [rows(size, 2), rows(size)]}
        for value, size in ((1, 3), (2, 2), (5, 1))
    ]  # fmt: skip
    merged = merge_outputs(outputs, [3, 2, 1])
    assert merged["loss"] == 2.0 and merged["loss"].dtype == torch.float32  # (1 x 3 + 2 x 2 + 5 x 1) / 6
    assert merged["top"] == 2.0
    assert merged["text"] == ["t"] * 6 and merged["names"] == ("n",) * 6
    assert merged["none"] is None and merged["k"] == 5
    assert [len(box) for box in merged["boxes"]] == [0, 1, 2, 0, 1, 0]
    assert [tensor.shape[0] for tensor in merged["pair"]] == [6, 6]


def test_several_rows_for_each_sample_are_concatenated() -> None:
    merged = merge_outputs([rows(6, 2), rows(3, 2) + 9], [2, 1])
    assert merged.tolist() == [*rows(6, 2).tolist(), *(rows(3, 2) + 9).tolist()]
    assert len(merge_outputs([torch.zeros(6), torch.zeros(3)], [2, 1])) == 9  # equal, but as many as there are samples
    assert len(merge_outputs([np.zeros(4), np.ones(4)], [2, 2])) == 8
    assert len(merge_outputs([torch.zeros(4), torch.zeros(4)], [1, 1])) == 4  # the same thing of the batch every time
    with pytest.raises(DataError, match=r"output of the step \(Tensor\) is neither one value for each sample"):
        merge_outputs([rows(6), rows(4)], [2, 1])


def test_a_list_of_samples_is_one_where_any_microbatch_shows_it() -> None:
    merged = merge_outputs([[rows(1)], [rows(2)], [rows(3)]], [1, 1, 1])  # the first could be a container of one tensor
    assert [len(each) for each in merged] == [1, 2, 3]
    assert [len(each) for each in merge_outputs([[rows(1)], [rows(1)]], [1, 1])] == [2]


def test_a_mean_is_weighted_by_what_is_counted() -> None:
    outputs = [{"loss": torch.tensor(1.0), "top": 2.0}, {"loss": torch.tensor(5.0), "top": 4.0}, {"loss": torch.tensor(torch.nan)}]
    outputs[2]["top"] = float("nan")
    assert merge_outputs(outputs, [2, 2, 2], [3.0, 1.0, 0.0]) == {"loss": 2.0, "top": 2.5}
    assert merge_outputs(outputs[:2], [3, 1], [0.0, 0.0]) == {"loss": 2.0, "top": 2.5}  # nothing is counted: by samples


def test_a_model_output_keeps_its_type() -> None:
    outputs = [
        CausalLMOutput(loss=torch.tensor(v), logits=torch.full((n, 2), v), hidden_states=(rows(n), rows(n)))
        for v, n in ((1.0, 3), (6.0, 2))
    ]
    merged = merge_outputs(outputs, [3, 2])
    assert isinstance(merged, CausalLMOutput)
    assert merged.loss == merged["loss"] == 3.0
    assert merged.logits.tolist() == [[1.0, 1.0]] * 3 + [[6.0, 6.0]] * 2
    assert isinstance(merged.hidden_states, tuple) and merged.hidden_states[1].shape == (5,)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([{"n": 1}, {"n": 2}], r"output\['n'\] of the step \(int\) is neither one value for each sample nor a floating mean"),
        ([{"correct": torch.tensor(1)}, {"correct": torch.tensor(2)}], r"output\['correct'\] of the step \(Tensor\) is neither"),
        ([(rows(2), {"a": 1}), (rows(1), {"b": 1})], r"output\[1\] of the step has other keys"),
        ([None, rows(1)], r"output of the step is NoneType and Tensor between the microbatches"),
        ([rows(2, 3), rows(1, 4)], r"output of the step has shapes \(2, 3\), \(1, 4\), which do not fit"),
        ([Sample(rows(2), "x"), Sample(rows(1), "y")], r"output.name of the step \(str\) is neither.*or use one microbatch"),
    ],
)  # fmt: skip
def test_an_output_that_cannot_be_merged_names_the_place(outputs: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        merge_outputs(outputs, [2, 1])


def test_fingerprints_tell_any_change() -> None:
    batch: dict[str, Any] = {
        "x": rows(4, 2),
        "half": rows(4).bfloat16(),
        "path": ["a", "b"],
        "array": np.arange(3),
        "scale": 1.5,
        "object": object(),
    }
    same = {**batch, "x": batch["x"].t().contiguous().t(), "object": object()}
    assert fingerprint(same) == fingerprint(batch)
    for key, other in {
        "x": rows(4, 2).flip(0),
        "half": -batch["half"],
        "path": ["b", "a"],
        "array": np.arange(3)[::-1],
        "scale": 2,
    }.items():
        assert fingerprint({**batch, key: other}) != fingerprint(batch), key


def compare_batches(rank: int, world_size: int) -> list[str]:
    """What `check_same_batch` says about several batches, on a rank of two replicas of two stages."""
    mesh = Mesh(Layout(pp=2, dp=2), timedelta(seconds=20))
    dp, pp = mesh.coordinate.dp, mesh.coordinate.pp
    cases = [
        {"x": rows(4, 2) + dp},
        {"x": rows(4, 2) + (pp if dp == 1 else 0)},
        [rows(4 + pp), rows(4)],
        {"x": rows(4), **({"y": 1} if pp else {})},
        {"x": rows(4).to(torch.float64 if pp else torch.float32)},
    ]
    said = []
    for batch in cases:
        try:
            check_same_batch(batch, mesh.replica, f"training batch 3 of dp {dp}")
            said.append("same")
        except ReplicaError as error:
            said.append(str(error))
    return said


def test_ranks_of_a_replica_must_read_the_same_batch() -> None:
    said = run_ranks(compare_batches, 4)
    assert [each[0] for each in said] == ["same"] * 4  # replicas differ from each other, as they must
    assert said[0] == said[2] and said[1] == said[3]  # ranks 0 and 2 are replica 0
    assert said[0][1] == "same"
    values = (
        "training batch 3 of dp 1: rank 3 got another batch than rank 1: batch['x'] of shape (4, 2) has other values. All 2 ranks"
    )
    assert said[1][1].startswith(values)
    assert "shard your sampler or iterable dataset by the strategy's dp_rank and dp_size" in said[1][1]
    assert "batch[0] has shape (4,) on rank 0 and (5,) on rank 2" in said[0][2]
    assert "batch['y'] is missing on rank 0" in said[0][3]
    assert "batch['x'] has dtype torch.float32 on rank 0 and torch.float64 on rank 2" in said[0][4]
