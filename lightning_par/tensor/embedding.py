"""An embedding whose rows are cut over the tp axis (arXiv 1909.08053, section 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lightning_par.errors import ModelError
from lightning_par.private.torch import runs_as_written
from lightning_par.runtime.axis import Axis
from lightning_par.runtime.collective import reduce_from
from lightning_par.tensor.parallel_class import ParallelLayer, convert
from lightning_par.tensor.vocabulary import local_rows


@dataclass(frozen=True)
class EmbeddingRecord:
    """How a converted embedding is cut.

    Attributes:
        axis: the tp axis.
        vocabulary: rows in all.
        padding_row: the local index of the padding row, ``None`` where another rank holds it.
    """

    axis: Axis
    vocabulary: int
    padding_row: int | None

    @property
    def rows(self) -> int:
        """Rows on each rank. Where the vocabulary does not divide, the last ones are no token's."""
        return -(-self.vocabulary // self.axis.size)

    def describe(self, module: nn.Module) -> str:
        return f"vocabulary-parallel over {self.axis.name}={self.axis.size}, local rows {self.rows}"

    def __deepcopy__(self, memo: dict[int, Any]) -> EmbeddingRecord:
        return self  # process groups cannot be copied


class VocabularyParallelEmbedding(ParallelLayer):
    """An embedding of which each rank looks up its own rows; the results are summed."""

    weight: nn.Parameter

    @runs_as_written
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Ids ``[...]`` to ``[..., embedding_dim]``, replicated. Collective over the axis.

        Raises:
            IndexError: an id outside the vocabulary (on a GPU, the same device-side assertion as ``nn.Embedding``).
        """
        record: EmbeddingRecord = self.record
        axis = record.axis
        index, elsewhere = local_rows(input, record.rows, axis.coordinate, record.vocabulary)
        found = functional.embedding(index, self.weight, record.padding_row)
        return reduce_from(found.masked_fill(elsewhere.unsqueeze(-1), 0), axis)


def convert_embedding(module: nn.Embedding, axis: Axis, vocabulary: int) -> None:
    """Make an embedding vocabulary-parallel, in place. Its weight is already the local shard of the rows.

    Args:
        module: an ``nn.Embedding`` or of a class derived from it.
        axis: the tp axis.
        vocabulary: rows in all.

    Raises:
        ModelError: an option of the embedding that needs all rows on one rank.
    """
    name = type(module).__name__
    options = {"max_norm": module.max_norm is not None, "scale_grad_by_freq": module.scale_grad_by_freq, "sparse": module.sparse}
    used = [option for option, is_used in options.items() if is_used]
    if used:
        raise ModelError(f"{name} with {' and '.join(used)} cannot be split over tp: leave it whole in the plan, or drop {used[0]}")
    record, padding = EmbeddingRecord(axis, vocabulary, None), module.padding_idx
    if padding is not None and padding // record.rows == axis.coordinate:
        record = replace(record, padding_row=padding % record.rows)
    convert(module, nn.Embedding, VocabularyParallelEmbedding, record)
