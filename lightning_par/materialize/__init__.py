"""Models larger than a host: the constructor runs without memory for weights, and each rank makes its shards alone."""

from lightning_par.materialize.late import LateValues
from lightning_par.materialize.module import (
    defer_values,
    deferred_init,
    give_values,
    is_deferred,
    materialize_attributes,
    materialize_rest,
    records_in,
    seeing_deferred,
    share_records,
    shares_record,
    whole_value,
)
from lightning_par.materialize.shard import materialize_shard
from lightning_par.materialize.weights import Weights, match_weights, persistent_buffers

__all__ = [
    "LateValues",
    "Weights",
    "defer_values",
    "deferred_init",
    "give_values",
    "is_deferred",
    "match_weights",
    "materialize_attributes",
    "materialize_rest",
    "materialize_shard",
    "persistent_buffers",
    "records_in",
    "seeing_deferred",
    "share_records",
    "shares_record",
    "whole_value",
]
