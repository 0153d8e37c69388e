"""What is trained where: the models of the zoo in the layouts that are for them."""

from __future__ import annotations

from collections.abc import Mapping

from tests.parity import MakeModel
from tests.zoo import ENCODER_DECODERS, ZOO

CHAINS: Mapping[str, MakeModel] = {name: make for name, make in ZOO.items() if name != "Albert"}  # it runs one block several times
# the blocks of a ResNet pass pictures, and what has two chains passes more than a hidden state on
SEQUENCES: Mapping[str, MakeModel] = {name: make for name, make in CHAINS.items() if name not in ("ResNet", *ENCODER_DECODERS)}
MATRIX: Mapping[str, Mapping[str, MakeModel]] = {
    "tp2": ZOO,
    "tp4": ZOO,
    "pp2": CHAINS,
    "tp2_pp2": CHAINS,
    "tp2_sp": SEQUENCES,
    "tp4_sp": SEQUENCES,
    "tp2_pp2_sp": SEQUENCES,
}
