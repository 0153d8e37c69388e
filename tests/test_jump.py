"""The Mersenne Twister moved on without drawing is where drawing takes it."""

from __future__ import annotations

from functools import reduce
from operator import xor

import numpy
import pytest
import torch

from lightning_par.materialize.jump import BLOCK, Words, characteristic, jump, power, twister_at
from lightning_par.materialize.stream import skip


def following_words(key: Words, blocks: int) -> Words:
    """The words of a block and of those after it, as the generator keeps them."""
    twister, found = twister_at(key, BLOCK), [key]
    for _ in range(blocks):
        twister.random_raw(BLOCK, output=False)
        found.append(twister.state["state"]["key"])
    return numpy.concatenate(found)


def fresh_key(seed: int) -> Words:
    """A block that no generator draws from: its first word is no sum of the words after it."""
    key: Words = numpy.random.MT19937(seed).state["state"]["key"]
    return key


def test_characteristic_polynomial() -> None:
    """The degree, the terms, and that the sum of the words at its powers is zero, from wherever it is counted."""
    polynomial = characteristic()
    assert polynomial.bit_length() - 1 == 19937 and polynomial.bit_count() == 135
    words = following_words(fresh_key(2), 40)
    powers = numpy.flatnonzero([polynomial >> i & 1 for i in range(19938)])
    assert not any(reduce(xor, words[powers + start].tolist()) for start in range(1, 200))


def test_powers_add_up() -> None:
    """x^a x^b = x^(a + b), by the schoolbook."""
    first, second, product = power(123_456_789), power(987_654_321), 0
    for bit in range(19937):
        product ^= (first << bit) * (second >> bit & 1)
    modulus = characteristic()
    while product.bit_length() > 19937:
        product ^= modulus << product.bit_length() - 19938
    assert power(123_456_789 + 987_654_321) == product
    assert power(5) == 1 << 5


@pytest.mark.parametrize("blocks", [1, 2, 26, 27, 31, 32, 33, 34, 1000, 9999, 20_011])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_jump_is_as_many_blocks(seed: int, blocks: int) -> None:
    key = fresh_key(seed)
    twister = twister_at(key, BLOCK)
    twister.random_raw(blocks * BLOCK, output=False)
    assert (jump(key, blocks) == twister.state["state"]["key"]).all()


@pytest.mark.parametrize("words", [(1 << 23) - 1, 1 << 23, 13445 * BLOCK, 13445 * BLOCK + 1])
@pytest.mark.parametrize("before", [0, 1, 623, 624, 5000])
def test_far_states_are_those_of_a_generator_that_draws(before: int, words: int) -> None:
    """From positions at both ends of a block and within, to such positions; near and far states are found in different ways."""
    generator = torch.Generator().manual_seed(before)
    torch.empty(before).uniform_(generator=generator)
    start = generator.get_state()
    torch.empty(words).uniform_(generator=generator)
    assert torch.equal(skip(start, words), generator.get_state())
    generator.set_state(skip(skip(start, words), 3))
    assert torch.equal(skip(start, words + 3), generator.get_state())


def test_jumps_add_up() -> None:
    """Where nobody would wait for a generator: twice half the way is the whole way."""
    start = torch.Generator().manual_seed(4).get_state()
    for half in (10**9 + 7, 10**12 + 1):
        assert torch.equal(skip(skip(start, half), half), skip(start, 2 * half))
