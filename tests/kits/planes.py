"""Integer products by bit planes, AND and popcount (FlexQ, arXiv 2508.04405): another witness of the kernels.

A code of b bits in two's complement is sum_p c_p 2^p x_p, with c_p = 1 but -1 for the top bit. So is the
product of two codes a sum over pairs of planes, each counted in one AND and one popcount.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD = 32


def split(codes: NDArray[np.integer[Any]], bits: int) -> NDArray[np.uint32]:
    """Codes [R, K] -> planes [bits, R, ceil(K / 32)], lowest first; column 32 w + i is bit i of word w."""
    r, k = codes.shape
    padded = np.zeros((r, -(-k // WORD) * WORD), np.int64)
    padded[:, :k] = codes
    digits = (padded.reshape(r, -1, WORD) >> np.arange(bits)[:, None, None, None]) & 1
    return (digits << np.arange(WORD)).sum(-1).astype(np.uint32)


def product(x: NDArray[np.uint32], w: NDArray[np.uint32]) -> NDArray[np.int64]:
    """X W^T of codes in planes [p, M, words] and [q, N, words]: int64 [M, N]."""
    total = np.zeros((x.shape[1], w.shape[1]), np.int64)
    for p, plane in enumerate(x):
        for q, other in enumerate(w):
            count = np.bitwise_count(plane[:, None] & other[None]).sum(-1, dtype=np.int64)
            negative = (p == len(x) - 1) != (q == len(w) - 1)
            total += (-count if negative else count) << (p + q)
    return total
