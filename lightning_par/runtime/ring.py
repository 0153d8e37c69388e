"""What a rank sends in a collective, by the ring (Thakur et al. 2005).

With d ranks and a whole tensor of n bytes each of them sends::

    all_reduce                     2 n (d-1)/d
    all_gather, reduce_scatter       n (d-1)/d
    reduce                           n            but for its root, which sends nothing
"""

from __future__ import annotations


def ring_bytes(kind: str, whole_bytes: float, size: int) -> float:
    """Bytes that one of ``size`` ranks sends.

    Args:
        kind: of the collective, as above.
        whole_bytes: of what is reduced, gathered to, or scattered.
        size: ranks.
    """
    return whole_bytes if kind == "reduce" else (2 if kind == "all_reduce" else 1) * whole_bytes * (size - 1) / size
