"""The Mersenne Twister MT19937 moved on by any number of steps, in a time that hardly grows with it.

A step is linear over GF(2), and its characteristic polynomial p maps every state to zero. So with q = x^n mod p, of degree under
19937, the state after n steps is the sum of those of the next 19937 states whose power stands in q: word j after n steps is the
exclusive or of the words i + j for all i in q. (Haramoto, Matsumoto, Nishimura, Panneton and L'Ecuyer, Efficient Jump Ahead for
F2-Linear Random Number Generators, INFORMS Journal on Computing 20, 2008, section 3.)

Polynomials over GF(2) are integers here: bit i is the coefficient of x^i.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy
import numpy.typing as npt

Words = npt.NDArray[numpy.uint32]
BLOCK = 624  # words of a state
_MIDDLE, _MATRIX, _LOWER = 397, 0x9908B0DF, 31  # m, a and r of Matsumoto and Nishimura
_DEGREE = 32 * BLOCK - _LOWER  # 19937
_ROWS = 128  # windows gathered at once: 320 KB, which stays in the processor's cache


def twister_at(key: Words, position: int) -> Any:
    """Numpy's twister, of whose block ``position`` words are drawn."""
    twister: Any = numpy.random.MT19937(0)
    twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": position}}
    return twister


def jump(key: Words, blocks: int) -> Words:
    """The words of a block, from those of the one that lies ``blocks`` (at least 1) before. 3 ms, and 20 more for a new distance.

    The lowest 31 bits of a state's first word are not part of it, and no sum of later words gives them where that word was not
    drawn. So the sum begins one word later, and is one step shorter.
    """
    twister, following = twister_at(key, BLOCK), [key]
    for _ in range(-(-(_DEGREE + BLOCK) // BLOCK)):
        twister.random_raw(BLOCK, output=False)
        following.append(twister.state["state"]["key"])
    windows = numpy.lib.stride_tricks.sliding_window_view(numpy.concatenate(following)[1:], BLOCK)
    powers, result = _bits(power(BLOCK * blocks - 1)), numpy.zeros(BLOCK, numpy.uint32)
    for first in range(0, len(powers), _ROWS):
        result ^= numpy.bitwise_xor.reduce(windows[powers[first : first + _ROWS]], axis=0)
    return result


@lru_cache(maxsize=1024)  # 2.5 KB each
def power(steps: int) -> int:
    """x^steps modulo the characteristic polynomial."""
    known = max(steps.bit_length() - (_DEGREE.bit_length() - 1), 0)  # bits of the exponent that are still to come
    result = 1 << (steps >> known)
    for bit in reversed(range(known)):
        result = int(f"{result:b}", 4)  # the square: every second bit is zero
        result = _remainder(result << (steps >> bit & 1))
    return result


def characteristic() -> int:
    """The characteristic polynomial of a step, with 135 terms.

    Matsumoto and Nishimura, Mersenne Twister, ACM TOMACS 8, 1998, appendix A: with w = 32, r = 31 and a_i the bits of a, it is
    f g^31 + a_0 f g^30 + ... + a_30 f + a_31, for f = x^624 + x^397 and g = x^623 + x^396.
    """
    inner, powers = 0, 1  # of g
    for coefficient in (_MATRIX >> bit & 1 for bit in reversed(range(_LOWER))):
        inner ^= powers * coefficient
        powers = powers << (BLOCK - 1) ^ powers << (_MIDDLE - 1)
    inner ^= powers
    return inner << BLOCK ^ inner << _MIDDLE ^ _MATRIX >> _LOWER


def _remainder(polynomial: int) -> int:
    """Modulo the characteristic polynomial. Its second power is 19314, so that each round takes 623 off the degree."""
    exponents = _exponents()
    while high := polynomial >> _DEGREE:
        for exponent in exponents:
            polynomial ^= high << exponent
    return polynomial


@lru_cache(maxsize=1)
def _exponents() -> list[int]:
    exponents: list[int] = _bits(characteristic()).tolist()
    return exponents


def _bits(polynomial: int) -> npt.NDArray[numpy.intp]:
    """Which powers it has."""
    raw = numpy.frombuffer(polynomial.to_bytes(_DEGREE // 8 + 1, "little"), numpy.uint8)
    return numpy.flatnonzero(numpy.unpackbits(raw, bitorder="little"))
