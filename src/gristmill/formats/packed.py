"""The packed matrix: what a weight of N output rows and K input columns looks like to kernels and files.

Layout "rows16", version 1. Sixteen output rows are interleaved, so that one vector register holds the same
column of sixteen rows. With nb = ceil(N / 16) and Kp = the padded columns:

- group integer of b bits: codes uint8 [nb, Kp*b/32, 16, 4]. A run of `unit(b)` columns is one piece of b/32
  * unit(b) vectors of 64 bytes: its codes as planes, the low bits first (`PLANES`). In a plane of w bits byte
  j of lane r holds 8/w columns of row r, lowest bits first: 4*p + j, 4*p + 4 + j and so on, where p is 8/w
  times the number of the vector in the plane. So the 4 bytes of a lane, shifted and masked, are the codes of
  4 neighbouring columns, at every width.
- sparse24: see `gristmill.formats.sparse24`.
- their scales, and mins if any: float16 or float32 [nb, G, 16], G groups of `group` columns, the last one
  perhaps cut short: Kp is K rounded up to 64, or G * group if that is less.
  value = scale * (code - offset) + min.
  Or scales in E4M3 (`gristmill.formats.fp8`), uint8 [nb, G, 16]: value = R(scale * (code - offset)) / 2^i,
  where R rounds to E4M3 if the spec says `rounded`, and i is the spec's `exponent`.
- dense bf16 and f16: [nb, Kp/2, 16, 2] (column pairs), f32: [nb, Kp, 16]; Kp = K rounded up to 8.

Padding rows have scale 0 and min 0; padding columns have code == offset (or value 0), so that both add
nothing to a product with activations that are zero in the padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError

LAYOUT = "rows16"
LAYOUT_VERSION = 1
ROWS = 16
"""Output rows interleaved in one block."""

DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype(np.uint8),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
    "F32": np.dtype(np.float32),
}
"""Array kinds by their safetensors name; bfloat16 is carried as its 16 bits in uint16."""

DENSE = ("f32", "bf16", "f16")
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits per code -> widths of the planes that a code is cut into, its low bits first."""
MAX_EXPONENT = 14
"""Of the power of two that matrices with E4M3 scales are divided by."""
_SCALES = {"f16": "F16", "f32": "F32", "e4m3": "U8"}
_LIMIT = 2**31 - 1
_TILE = 64
_SPARSE_UNIT = 32


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def unit(bits: int) -> int:
    """Columns of one piece of a row's codes: the fewest that fill whole vectors in every plane."""
    return 32 // min(PLANES[bits])


def group_step(bits: int, *, sparse: bool = False) -> int:
    """What the columns of a group of codes (`sparse`: of sparse24's) are a multiple of."""
    return _SPARSE_UNIT if sparse else max(8, unit(bits))


@dataclass(frozen=True, slots=True)
class PackedSpec:
    """Everything about a packed matrix but its bytes.

    `format` is "group_int", "sparse24", "f32", "bf16" or "f16"; `shape` is (N, K), unpadded. The other fields
    concern the first two: `bits` per code (2, 3, 4, 5, 6 or 8; sparse24: 4), `group` columns per scale (a
    multiple of 8 and of `unit(bits)`, for sparse24 of 32; or the whole row, rounded up to that), `offset`
    subtracted from a code (sparse24: 8), `scales` ("f16" or "f32", the dtype of scales and mins; group_int
    without mins: "e4m3" as well), `mins` whether there are minimums (sparse24: none). `exponent` (0 to 14)
    and `rounded` go with E4M3 scales.
    """

    format: str
    shape: tuple[int, int]
    bits: int = 0
    group: int = 0
    offset: int = 0
    scales: str = ""
    mins: bool = False
    exponent: int = 0
    rounded: bool = False

    def __post_init__(self) -> None:
        n, k = self.shape
        if not (0 < n <= _LIMIT and 0 < k <= _LIMIT):
            raise ModelError(f"a packed matrix of shape {n} x {k} is out of range")
        if self.scales != "e4m3" and (self.exponent or self.rounded):
            raise ModelError("only E4M3 scales go with an exponent and rounded products")
        if not 0 <= self.exponent <= MAX_EXPONENT:
            raise ModelError(f"the exponent {self.exponent} is not one from 0 to {MAX_EXPONENT}")
        if self.format in DENSE:
            if self.bits or self.group or self.offset or self.scales or self.mins:
                raise ModelError(f"a matrix of {self.format} values has neither codes nor groups")
            return
        if self.format not in ("group_int", "sparse24"):
            raise ModelError(f"unknown tensor format {self.format[:40]!r}")
        if self.bits not in PLANES:
            raise ModelError(f"{self.format} codes have 2, 3, 4, 5, 6 or 8 bits, not {self.bits}")
        if self.format == "sparse24" and (self.bits != 4 or self.offset != 8 or self.mins):
            raise ModelError("sparse24 codes have 4 bits, the offset 8 and no minimums")
        step = group_step(self.bits, sparse=self.format == "sparse24")
        if not step <= self.group <= max(round_up(k, step), 1024) or self.group % step:
            raise ModelError(
                f"groups of these {self.format} codes are multiples of {step} columns within the row, "
                f"not {self.group}"
            )
        if not 0 <= self.offset < 1 << self.bits:
            raise ModelError(f"the offset {self.offset} does not fit {self.bits}-bit codes")
        plain = self.format == "group_int" and not self.mins
        if self.scales not in ("f16", "f32", "e4m3") or (self.scales == "e4m3" and not plain):
            raise ModelError(
                f"{self.format} scales are f16, f32 or, without minimums, e4m3, not {self.scales[:40]!r}"
            )

    @property
    def blocks(self) -> int:
        """nb, the number of blocks of 16 rows."""
        return -(-self.shape[0] // ROWS)

    @property
    def groups(self) -> int:
        """G, the groups of one row (0 for dense formats)."""
        return -(-self.shape[1] // self.group) if self.group else 0

    @property
    def columns(self) -> int:
        """Kp, the padded columns."""
        if not self.group:
            return round_up(self.shape[1], 8)
        return min(round_up(self.shape[1], _TILE), self.groups * self.group)

    def arrays(self, blocks: int | None = None) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype name as in DTYPES, shape) of the arrays; of `blocks` row blocks only, if given."""
        nb = self.blocks if blocks is None else blocks
        if self.format == "f32":
            return {"values": ("F32", (nb, self.columns, ROWS))}
        if self.format in DENSE:
            return {"values": (self.format.upper(), (nb, self.columns // 2, ROWS, 2))}
        bits = 3 if self.format == "sparse24" else self.bits
        result: dict[str, tuple[str, tuple[int, ...]]] = {
            "codes": ("U8", (nb, self.columns * bits // 32, ROWS, 4)),
            "scales": (_SCALES[self.scales], (nb, self.groups, ROWS)),
        }
        if self.mins:
            result["mins"] = (_SCALES[self.scales], (nb, self.groups, ROWS))
        return result

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, padding included."""
        return sum(DTYPES[dtype].itemsize * prod(shape) for dtype, shape in self.arrays().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits (codes, scales, mins and padding) per real weight."""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    def to_json(self) -> dict[str, Any]:
        """The entry of this tensor in `quantization_config.tensors`."""
        entry: dict[str, Any] = {"format": self.format, "layout": LAYOUT, "shape": list(self.shape)}
        if self.format not in DENSE:
            entry |= {"bits": self.bits, "group": self.group, "offset": self.offset}
            entry |= {"scales": self.scales, "mins": self.mins}
        if self.scales == "e4m3":
            entry |= {"exponent": self.exponent, "rounded": self.rounded}
        return entry

    @classmethod
    def from_json(cls, name: str, entry: object) -> PackedSpec:
        """Reads one entry of `quantization_config.tensors`; ModelError if it is not a valid one."""
        where = repr(name[:100])
        if not isinstance(entry, dict):
            raise ModelError(f"the format of tensor {where} is not an object")
        if entry.get("layout") != LAYOUT:
            raise ModelError(f"tensor {where} has the unknown layout {str(entry.get('layout'))[:40]!r}")
        shape = entry.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or any(type(d) is not int for d in shape):
            raise ModelError(f"tensor {where} has no valid shape in its format entry")
        numbers = {key: entry.get(key, 0) for key in ("bits", "group", "offset", "exponent")}
        flags = {key: entry.get(key, False) for key in ("mins", "rounded")}
        if any(type(value) is not int for value in numbers.values()) or any(
            type(value) is not bool for value in flags.values()
        ):
            raise ModelError(f"the format entry of tensor {where} is damaged")
        try:
            form, scales = str(entry.get("format")), str(entry.get("scales", ""))
            return cls(form, (shape[0], shape[1]), **numbers, **flags, scales=scales)
        except ModelError as error:
            raise ModelError(f"tensor {where}: {error}") from None


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed matrix: its spec and its arrays, which may be read-only views of a mapped file."""

    spec: PackedSpec
    arrays: dict[str, NDArray[Any]]

    def __post_init__(self) -> None:
        for name, (dtype, shape) in self.spec.arrays().items():
            array = self.arrays.get(name)
            if array is None or array.shape != shape or array.dtype != DTYPES[dtype]:
                raise ModelError(
                    f"a packed {self.spec.format} matrix lacks its array {name} of {dtype} {shape}"
                )

    @property
    def format(self) -> str:
        """One of "group_int", "sparse24", "f32", "bf16", "f16"."""
        return self.spec.format

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): output rows and input columns, unpadded."""
        return self.spec.shape

    @property
    def bits(self) -> int:
        """Bits per code; 0 for dense formats."""
        return self.spec.bits

    @property
    def group(self) -> int:
        """Columns per scale; 0 for dense formats."""
        return self.spec.group

    @property
    def offset(self) -> int:
        """What is subtracted from a code."""
        return self.spec.offset

    @property
    def columns(self) -> int:
        """Kp, the padded columns."""
        return self.spec.columns

    @property
    def groups(self) -> int:
        """Groups per row; 0 for dense formats."""
        return self.spec.groups

    @property
    def blocks(self) -> int:
        """Blocks of 16 rows."""
        return self.spec.blocks

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.spec.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per real weight, everything counted."""
        return self.spec.bits_per_weight

    def rows(self, start: int, stop: int) -> Packed:
        """The rows start..stop as a view; `start` must be a multiple of 16."""
        n, k = self.shape
        if start % ROWS or not 0 <= start < stop <= n:
            raise ValueError(f"rows {start}..{stop} of {n} do not begin at a block of {ROWS}")
        spec = replace(self.spec, shape=(stop - start, k))
        first, last = start // ROWS, -(-stop // ROWS)
        return Packed(spec, {name: array[first:last] for name, array in self.arrays.items()})


def decode(packed: Packed) -> NDArray[np.float64]:
    """The matrix [N, K] in float64, exact for every format."""
    from gristmill.formats import dense, group_int, sparse24

    decoders = {"group_int": group_int.decode, "sparse24": sparse24.decode}
    return decoders.get(packed.format, dense.decode)(packed)


def decode_f32(packed: Packed) -> NDArray[np.float32]:
    """The matrix [N, K] in float32: `decode`, rounded once, without the float64 copy where possible."""
    from gristmill.formats import dense, group_int, sparse24

    decoders = {"group_int": group_int.decode_f32, "sparse24": sparse24.decode_f32}
    return decoders.get(packed.format, dense.decode_f32)(packed)
