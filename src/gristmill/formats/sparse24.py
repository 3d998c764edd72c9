"""2:4 sparse matrices: of every four neighbouring columns at most two are kept, as 4-bit codes.

value = scale * (code - 8) where kept, else 0; 3 bits per weight and the scales. The idea is Sparse-MARLIN's
(arXiv 2408.11743); the layout is ours. Every 32 columns are three vectors of 64 bytes (16 lanes, 4 bytes
each), a lane being an output row and four columns a quad:

- vectors 0 and 1: the kept values of quads 0 to 3 and 4 to 7, as signed nibbles (code - 8). The low nibbles
  of a lane are those of the first quad (bytes 0, 1) and the second (bytes 2, 3), the high nibbles those of
  the third and fourth.
- vector 2: nibble v of the lane's 32 bits is the number of quad v's pair of columns in `PAIRS`; 6 and 7 mean
  that none is kept, and the nibble's highest bit is not looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError
from gristmill.formats import group_int
from gristmill.formats.packed import ROWS, Packed, PackedSpec, round_up

OFFSET = 8
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""The columns of a quad that are kept, by number."""

_COLUMNS = np.array(PAIRS, np.intp)
# Kept columns as bits -> the first pair that has them all.
_PAIR_OF = np.array(
    [next((i for i, (a, b) in enumerate(PAIRS) if bits & ~(1 << a | 1 << b) == 0), -1) for bits in range(16)],
    np.int8,
)


def spec(shape: tuple[int, int], group: int, *, scales: str = "f16") -> PackedSpec:
    """The spec of a 2:4 matrix; `group` is a multiple of 32, 0 the whole row."""
    return PackedSpec("sparse24", shape, 4, group or round_up(shape[1], 32), OFFSET, scales)


def pack(codes: NDArray[np.uint8], mask: NDArray[np.bool_], scales: NDArray[Any], *, group: int) -> Packed:
    """Packs codes [N, K] (0 to 15) where mask [N, K] is set, with scales [N, G] (float16 or float32).

    ModelError where more than two of four neighbouring columns are kept.
    """
    n, k = codes.shape
    kind = "f16" if scales.dtype == np.float16 else "f32"
    result = spec((n, k), group, scales=kind)
    kept = np.zeros((result.blocks * ROWS, result.columns), bool)
    kept[:n, :k] = mask
    nibbles = np.zeros(kept.shape, np.uint8)
    nibbles[:n, :k] = np.where(mask, codes ^ np.uint8(OFFSET), 0)
    quads = kept.reshape(len(kept), -1, 4)
    pair = _PAIR_OF[quads @ np.array([1, 2, 4, 8])]
    if (pair < 0).any():
        raise ModelError("a 2:4 matrix keeps more than two of four neighbouring columns")
    two = np.take_along_axis(nibbles.reshape(quads.shape), _COLUMNS[pair], axis=2)
    # [R, pieces, vector, half (low or high nibble), quad of the half and its value]
    halves = two.reshape(len(kept), -1, 2, 2, 4)
    words = np.empty((len(kept), halves.shape[1], 3, 4), np.uint8)
    words[:, :, :2] = halves[:, :, :, 0] | halves[:, :, :, 1] << np.uint8(4)
    numbers = pair.astype(np.uint8).reshape(len(kept), -1, 4, 2)
    words[:, :, 2] = numbers[..., 0] | numbers[..., 1] << np.uint8(4)
    out = group_int.interleave_words(words.view(np.uint32).reshape(len(kept), -1), result)
    return Packed(result, {"codes": out, "scales": group_int.interleave_groups(scales, result)})


def unpack(packed: Packed) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[Any]]:
    """Codes [N, K] (8 where none is kept), the mask [N, K] and scales [N, G]: the inverse of `pack`.

    Of a quad with fewer than two kept columns others are in the mask, too, with the code 8.
    """
    n, k = packed.shape
    rows = group_int.rows_of_words(packed.arrays["codes"])
    words = rows.view(np.uint8).reshape(len(rows), -1, 3, 4)
    halves = np.stack([words[:, :, :2] & 15, words[:, :, :2] >> 4], axis=3)
    two = halves.reshape(len(rows), -1, 2) ^ np.uint8(OFFSET)
    pair = np.stack([words[:, :, 2] & 7, words[:, :, 2] >> 4 & 7], axis=3).reshape(two.shape[:2])
    codes = np.full((*pair.shape, 4), OFFSET, np.uint8)
    mask = np.zeros(codes.shape, bool)
    for number, columns in enumerate(PAIRS):
        where = pair == number
        for i, column in enumerate(columns):
            codes[where, column] = two[where, i]
            mask[where, column] = True
    return (
        codes.reshape(len(rows), -1)[:n, :k],
        mask.reshape(len(rows), -1)[:n, :k],
        group_int.rows_of_groups(packed.arrays["scales"], n),
    )


def decode(packed: Packed) -> NDArray[np.float64]:
    """The matrix [N, K] in float64, exact."""
    codes, _, scales = unpack(packed)
    return group_int.values_of(codes, scales, None, packed.spec, np.float64)


def decode_f32(packed: Packed) -> NDArray[np.float32]:
    """The matrix [N, K] in float32: `decode` rounded once."""
    codes, _, scales = unpack(packed)
    return group_int.values_of(codes, scales, None, packed.spec, np.float32)
