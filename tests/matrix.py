"""What is trained where: the models of the zoo in the layouts that are for them."""

from __future__ import annotations

from collections.abc import Mapping

from tests.parity import MakeModel
from tests.zoo import DECODERS, ENCODERS, ZOO

# Albert runs one block again and again, and what has two chains passes more than a hidden state on
CHAINS: Mapping[str, MakeModel] = {name: make for name, make in {**DECODERS, **ENCODERS}.items() if name != "Albert"}
SEQUENCES: Mapping[str, MakeModel] = {name: make for name, make in CHAINS.items() if name != "ResNet"}  # its blocks pass pictures
MATRIX: Mapping[str, Mapping[str, MakeModel]] = {
    "tp2": ZOO,
    "tp4": ZOO,
    "pp2": CHAINS,
    "tp2_pp2": CHAINS,
    "tp2_sp": SEQUENCES,
    "tp4_sp": SEQUENCES,
    "tp2_pp2_sp": SEQUENCES,
}
