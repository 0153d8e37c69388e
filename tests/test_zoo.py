"""The promise on models that nobody prepared; see `tests.zoo`."""

from __future__ import annotations

import logging

import pytest

from tests.parity import check_parity
from tests.zoo import ZOO


@pytest.mark.slow
@pytest.mark.parametrize("word", ["tp2", "pp2", "tp2_pp2"])
def test_unprepared_models_equal_one_process(word: str) -> None:
    for name in ("pytorch_lightning", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    check_parity(ZOO, word, timeout=280)
