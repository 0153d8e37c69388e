"""Checkpoints that fit any layout: boxes of global tensors in safetensors files, an index, and JSON."""

from lightning_par.checkpoint.buffers import add_buffers, read_buffers
from lightning_par.checkpoint.load import Checkpoint, RankSource
from lightning_par.checkpoint.numbers import check_optimizers, member_names, merge_members, name_numbers
from lightning_par.checkpoint.plain import take_apart
from lightning_par.checkpoint.publish import together
from lightning_par.checkpoint.save import Content, Saver
from lightning_par.checkpoint.share import Share, add_parameters, weights_of
from lightning_par.checkpoint.transformers_folder import find_configs

__all__ = [
    "Checkpoint",
    "Content",
    "RankSource",
    "Saver",
    "Share",
    "add_buffers",
    "add_parameters",
    "check_optimizers",
    "find_configs",
    "member_names",
    "merge_members",
    "name_numbers",
    "read_buffers",
    "take_apart",
    "together",
    "weights_of",
]
