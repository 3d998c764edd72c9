"""MARLIN's GPU layout of 4-bit matrices, to exchange files with engines that run its kernels.

As IST-DASLab/marlin has it: W is [K inputs, N outputs], value = scale * (code - 8). Codes lie in tiles of
16 x 16; four tiles side by side are 128 words of 32 bits, of which thread t of 32 owns four, one per tile:
the fragments that it multiplies, in the order in which masks take them out of the word.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError
from gristmill.formats import group_int
from gristmill.formats.packed import Packed

_NIBBLES = np.array([0, 2, 4, 6, 1, 3, 5, 7])
"""Nibble of a word, lowest first -> which of the thread's eight codes of the tile it holds."""
_THREAD = np.arange(32)
# Row and column in the tile of each thread's codes: [32, 8].
_ROWS = (2 * (_THREAD % 4))[:, None] + np.array([0, 1, 8, 9, 0, 1, 8, 9])
_COLUMNS = (_THREAD // 4)[:, None] + np.array([0, 0, 0, 0, 8, 8, 8, 8])
_GROUPED = (np.arange(8)[:, None] + 8 * np.arange(8)).reshape(-1)
_PER_COLUMN = (2 * np.arange(4)[:, None] + np.array([0, 1, 8, 9, 16, 17, 24, 25])).reshape(-1)
"""Stored place -> column, in every 64 and every 32 columns."""


def pack(packed: Packed) -> tuple[NDArray[np.int32], NDArray[np.float16]]:
    """Codes int32 [K / 16, 2 N] and scales float16 [G, N] of a symmetric 4-bit matrix with float16 scales.

    ModelError for another format, or where K is no multiple of 16, N of 64, or K of the group.
    """
    s = packed.spec
    if (s.format, s.bits, s.offset, s.scales, s.mins) != ("group_int", 4, 8, "f16", False):
        raise ModelError("MARLIN's layout holds symmetric 4-bit codes with f16 scales only")
    codes, scales, _ = group_int.unpack(packed)
    n, k = s.shape
    if k % 16 or n % 64 or (s.groups > 1 and k % s.group):
        raise ModelError(
            f"a matrix of {n} outputs and {k} inputs in groups of {s.group} has no MARLIN layout"
        )
    # [K / 16, N / 64, tile, 16 rows, 16 columns]
    tiles = codes.T.reshape(k // 16, 16, n // 64, 4, 16).transpose(0, 2, 3, 1, 4)
    held = tiles[..., _ROWS, _COLUMNS][..., _NIBBLES].astype(np.uint32)
    words = np.bitwise_or.reduce(held << (4 * np.arange(8, dtype=np.uint32)), axis=-1)
    # A thread's four tiles side by side.
    words = np.ascontiguousarray(words.transpose(0, 1, 3, 2)).reshape(k // 16, 2 * n)
    order = _order(s.groups)
    stored = scales.T.reshape(s.groups, -1, len(order))[..., order].reshape(s.groups, n)
    return words.view(np.int32), np.ascontiguousarray(stored)


def unpack(words: NDArray[np.int32], scales: NDArray[np.float16]) -> Packed:
    """The matrix [N, K]: the inverse of `pack`. ModelError if the shapes do not fit each other."""
    if words.ndim != 2 or scales.ndim != 2 or words.dtype != np.int32 or scales.dtype != np.float16:
        raise ModelError("MARLIN's layout is a matrix of int32 words and one of float16 scales")
    k, n = 16 * words.shape[0], words.shape[1] // 2
    groups = scales.shape[0]
    if not k or not n or words.shape[1] % 128 or scales.shape[1] != n or not groups or k % groups:
        raise ModelError(f"words {list(words.shape)} and scales {list(scales.shape)} are no MARLIN matrix")
    parts = words.view(np.uint32).reshape(k // 16, n // 64, 32, 4).transpose(0, 1, 3, 2)
    held = (parts[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & np.uint32(15)).astype(np.uint8)
    tiles = np.empty((k // 16, n // 64, 4, 16, 16), np.uint8)
    tiles[..., _ROWS[:, _NIBBLES], _COLUMNS[:, _NIBBLES]] = held
    codes = np.ascontiguousarray(tiles.transpose(0, 3, 1, 2, 4).reshape(k, n).T)
    order = _order(groups)
    plain = scales.reshape(groups, -1, len(order))[..., np.argsort(order)].reshape(groups, n).T
    return group_int.pack(codes, np.ascontiguousarray(plain), bits=4, group=k // groups, offset=8)


def _order(groups: int) -> NDArray[Any]:
    return _GROUPED if groups > 1 else _PER_COLUMN
