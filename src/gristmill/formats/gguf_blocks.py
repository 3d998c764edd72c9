"""GGUF's tensor types, and their blocks taken apart into group integers without loss.

Each quantised type becomes codes, scales and perhaps mins so that scale * (code - offset) + min, rounded once
to float32, is what GGUF's own dequantisation gives:

==========  ====  =====  ======  ============================  ==========================
type        bits  group  offset  scale                         min
==========  ====  =====  ======  ============================  ==========================
Q4_0         4     32      8     d (f16)
Q4_1         4     32      0     d (f16)                       m (f16)
Q5_0         5     32     16     d (f16)
Q5_1         5     32      0     d (f16)                       m (f16)
Q8_0         8     32    128     d (f16)
Q2_K         2     16      0     d * sc (f32, sc 4 bits)       -dmin * m (f32, m 4 bits)
Q3_K         4     16      4     d * sc (f32, sc 6 bits)
Q4_K         4     32      0     d * sc (f32, sc 6 bits)       -dmin * m (f32, m 6 bits)
Q5_K         5     32      0     d * sc (f32, sc 6 bits)       -dmin * m (f32, m 6 bits)
Q6_K         6     16     32     d * sc (f32, sc 8 bits)
==========  ====  =====  ======  ============================  ==========================

Codes of 3 bits come in pieces of 32 columns, more than a group of Q3_K has, so that those take 4. The
products d * sc have at most 11 + 7 significant bits, so float32 holds them exactly. Bit layouts follow
the block structures in ggml's sources (ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.formats import dense, group_int
from gristmill.formats.packed import Packed, PackedSpec

Bytes = NDArray[np.uint8]
Parts = tuple[Bytes, NDArray[Any], NDArray[Any] | None]
"""Codes [R, B, block], scales [R, B, groups of a block], mins likewise or None."""


@dataclass(frozen=True, slots=True)
class GgufType:
    """One tensor type: `block` values in `nbytes` bytes; `split` is None for float types."""

    name: str
    block: int
    nbytes: int
    bits: int = 0
    group: int = 0
    offset: int = 0
    scales: str = ""
    mins: bool = False
    split: Callable[[Bytes], Parts] | None = None

    def spec(self, shape: tuple[int, int]) -> PackedSpec:
        """The packed form that a matrix [N, K] of this type is kept in."""
        if self.split is None:
            return dense.spec(shape, self.name.lower())
        return group_int.spec(shape, self.bits, self.group, self.offset, scales=self.scales, mins=self.mins)

    def pack(self, rows: Bytes, k: int) -> Packed:
        """Packs rows [R, bytes of K values] as they lie in the file."""
        if self.split is None:
            dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[self.name]
            return dense.pack(rows.view(dtype), self.name.lower())
        codes, scales, mins = self.split(rows.reshape(len(rows), k // self.block, self.nbytes))
        return group_int.pack(
            codes.reshape(len(rows), k),
            scales.reshape(len(rows), -1),
            None if mins is None else mins.reshape(len(rows), -1),
            bits=self.bits,
            group=self.group,
            offset=self.offset,
        )


def _half(field: Bytes) -> NDArray[np.float16]:
    """[R, B, 2] bytes -> [R, B, 1] float16."""
    return np.ascontiguousarray(field).view(np.float16)


def _nibbles(field: Bytes) -> Bytes:
    """[R, B, s, w] bytes -> [R, B, s, 2, w]: the low nibbles of each of s runs, then its high ones."""
    out = np.empty((*field.shape[:-1], 2, field.shape[-1]), np.uint8)
    np.bitwise_and(field, 15, out=out[..., 0, :])
    np.right_shift(field, 4, out=out[..., 1, :])
    return out


def _shifted(field: Bytes, shifts: tuple[int, ...], mask: int) -> Bytes:
    """[R, B, s, w] bytes -> [R, B, s, len(shifts), w]: (byte >> shift) & mask."""
    out = np.empty((*field.shape[:-1], len(shifts), field.shape[-1]), np.uint8)
    for index, shift in enumerate(shifts):
        np.right_shift(field, shift, out=out[..., index, :])
    out &= np.uint8(mask)
    return out


def _fifth_bit(field: Bytes) -> Bytes:
    """[R, B, 4] bytes of 32 bits, lowest first -> [R, B, 32] of 0 or 16."""
    return np.unpackbits(np.ascontiguousarray(field), axis=-1, bitorder="little") << np.uint8(4)


def _q4_0(b: Bytes) -> Parts:
    return _nibbles(b[..., None, 2:]), _half(b[..., :2]), None


def _q4_1(b: Bytes) -> Parts:
    return _nibbles(b[..., None, 4:]), _half(b[..., :2]), _half(b[..., 2:4])


def _q5_0(b: Bytes) -> Parts:
    codes = _nibbles(b[..., None, 6:]).reshape(*b.shape[:2], 32)
    codes |= _fifth_bit(b[..., 2:6])
    return codes, _half(b[..., :2]), None


def _q5_1(b: Bytes) -> Parts:
    codes = _nibbles(b[..., None, 8:]).reshape(*b.shape[:2], 32)
    codes |= _fifth_bit(b[..., 4:8])
    return codes, _half(b[..., :2]), _half(b[..., 2:4])


def _q8_0(b: Bytes) -> Parts:
    return b[..., 2:] ^ np.uint8(128), _half(b[..., :2]), None


def _product(d: NDArray[np.float16], factors: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(invalid="ignore"):
        return d.astype(np.float32) * factors.astype(np.float32)


def _q2_k(b: Bytes) -> Parts:
    codes = _shifted(b[..., 16:80].reshape(*b.shape[:2], 2, 32), (0, 2, 4, 6), 3)
    scales = _product(_half(b[..., 80:82]), b[..., :16] & 15)
    return codes, scales, -_product(_half(b[..., 82:84]), b[..., :16] >> 4)


def _q3_k(b: Bytes) -> Parts:
    low = _shifted(b[..., 32:96].reshape(*b.shape[:2], 2, 32), (0, 2, 4, 6), 3).reshape(*b.shape[:2], 8, 32)
    # The high bit, when set, means "do not subtract 4": with the offset 4 it is simply bit 2 of the code.
    high = _shifted(b[..., None, :32], tuple(range(8)), 1).reshape(*b.shape[:2], 8, 32)
    low |= high << np.uint8(2)
    packed = b[..., 96:108]
    six = np.empty((*b.shape[:2], 16), np.uint8)
    six[..., :8] = packed[..., :8] & 15
    six[..., 8:] = packed[..., :8] >> 4
    for quarter in range(4):
        six[..., 4 * quarter : 4 * quarter + 4] |= ((packed[..., 8:] >> np.uint8(2 * quarter)) & 3) << 4
    return low, _product(_half(b[..., 108:110]), six.astype(np.int8) - np.int8(32)), None


def _scales_and_mins(field: Bytes) -> tuple[Bytes, Bytes]:
    """[R, B, 12] bytes -> eight 6-bit scales and eight 6-bit mins (Q4_K and Q5_K)."""
    a, b, c = field[..., 0:4], field[..., 4:8], field[..., 8:12]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=-1)
    mins = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=-1)
    return scales, mins


def _q4_k(b: Bytes) -> Parts:
    codes = _nibbles(b[..., 16:].reshape(*b.shape[:2], 4, 32))
    scales, mins = _scales_and_mins(b[..., 4:16])
    return codes, _product(_half(b[..., :2]), scales), -_product(_half(b[..., 2:4]), mins)


def _q5_k(b: Bytes) -> Parts:
    codes = _nibbles(b[..., 48:].reshape(*b.shape[:2], 4, 32)).reshape(*b.shape[:2], 8, 32)
    high = _shifted(b[..., None, 16:48], tuple(range(8)), 1).reshape(*b.shape[:2], 8, 32)
    codes |= high << np.uint8(4)
    scales, mins = _scales_and_mins(b[..., 4:16])
    return codes, _product(_half(b[..., :2]), scales), -_product(_half(b[..., 2:4]), mins)


def _q6_k(b: Bytes) -> Parts:
    low = _nibbles(b[..., :128].reshape(*b.shape[:2], 2, 64)).reshape(*b.shape[:2], 2, 4, 32)
    high = _shifted(b[..., 128:192].reshape(*b.shape[:2], 2, 32), (0, 2, 4, 6), 3)
    low |= high << np.uint8(4)
    scales = np.ascontiguousarray(b[..., 192:208]).view(np.int8)
    return low, _product(_half(b[..., 208:210]), scales), None


TYPES: dict[int, GgufType] = {
    0: GgufType("F32", 1, 4),
    1: GgufType("F16", 1, 2),
    2: GgufType("Q4_0", 32, 18, 4, 32, 8, "f16", False, _q4_0),
    3: GgufType("Q4_1", 32, 20, 4, 32, 0, "f16", True, _q4_1),
    6: GgufType("Q5_0", 32, 22, 5, 32, 16, "f16", False, _q5_0),
    7: GgufType("Q5_1", 32, 24, 5, 32, 0, "f16", True, _q5_1),
    8: GgufType("Q8_0", 32, 34, 8, 32, 128, "f16", False, _q8_0),
    10: GgufType("Q2_K", 256, 84, 2, 16, 0, "f32", True, _q2_k),
    11: GgufType("Q3_K", 256, 110, 4, 16, 4, "f32", False, _q3_k),
    12: GgufType("Q4_K", 256, 144, 4, 32, 0, "f32", True, _q4_k),
    13: GgufType("Q5_K", 256, 176, 5, 32, 0, "f32", True, _q5_k),
    14: GgufType("Q6_K", 256, 210, 6, 16, 32, "f32", False, _q6_k),
    30: GgufType("BF16", 1, 2),
}
"""The types that can be read, by their number in the file."""

OTHER_NAMES: dict[int, str] = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64",
    28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
"""Types known by name only, to say what a file that is refused holds."""

REMOVED = frozenset({4, 5, 31, 32, 33, 36, 37, 38})
"""Types that the GGUF format itself has withdrawn."""
