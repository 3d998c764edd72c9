"""What the quantised formats share: their tensors checked, words taken apart, and the packed matrix made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError
from gristmill.formats import dense, group_int
from gristmill.formats.packed import PLANES, Packed, unit
from gristmill.io.checkpoint import Matrix
from gristmill.io.expected import Shapes
from gristmill.io.mapped import short
from gristmill.io.safetensors import Entry, SafetensorsFile

Words = NDArray[np.uint32]
Codes = NDArray[np.uint8]
Rows = Callable[[int, int], Codes]
"""The rows start..stop of a table of codes or zeros; `start` is a multiple of 16."""

Order = NDArray[np.int64]
"""A permutation of columns."""

FLOATS = ("F16", "BF16", "F32")
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """A quantised matrix; its columns are those of the model in `order`, if that is not None."""

    matrix: Matrix
    order: Order | None


class Tensors:
    """The stored tensors of a directory by their names in the model; what is used is taken out."""

    def __init__(self, path: Path) -> None:
        """`path` is the directory, for messages."""
        self.path = path
        self._table: dict[str, tuple[SafetensorsFile, str]] = {}

    def add(self, name: str, file: SafetensorsFile, stored: str) -> None:
        """Adds a tensor that the file holds under the name `stored`; ModelError if it is there already."""
        if name in self._table:
            raise ModelError(f"{self.path}: the tensor {short(name)} occurs twice")
        self._table[name] = file, stored

    def __contains__(self, name: str) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._table))

    def entry(self, name: str) -> Entry:
        """dtype and shape of a tensor that is there."""
        file, stored = self._table[name]
        return file.entries[stored]

    def take(
        self, name: str, dtypes: tuple[str, ...] | None = None, *shapes: tuple[int, ...]
    ) -> NDArray[Any]:
        """Takes a tensor out, as a view of the mapped file.

        ModelError if it is absent, of no dtype among `dtypes`, or of no shape among `shapes`; None and no
        shapes accept any.
        """
        if name not in self._table:
            raise ModelError(f"{self.path} lacks the tensor {short(name)}")
        entry = self.entry(name)
        where = f"{self.path}: the tensor {short(name)}"
        if dtypes is not None and entry.dtype not in dtypes:
            raise ModelError(f"{where} is {entry.dtype}; its quantization_config calls for {dtypes[0]}")
        if shapes and entry.shape not in shapes:
            raise ModelError(
                f"{where} has the shape {list(entry.shape)}; "
                f"its quantization_config calls for {list(shapes[0])}"
            )
        file, stored = self._table.pop(name)
        return file.array(stored)


def modules(tensors: Tensors, expected: Shapes, part: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """(module, (N, K)) of the expected matrices that are stored as this part rather than as `weight`."""
    for name, shape in expected.items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and f"{module}.{part}" in tensors:
            yield module, (shape[0], shape[1])


def kept_bits(bits: int, group: int, columns: int) -> int:
    """The fewest bits per code that hold codes of `bits` bits, in groups within rows of `columns`."""
    wide = (b for b in sorted(PLANES) if b >= bits and (group >= columns or group % unit(b) == 0))
    return next(wide, 8)


def fields(words: Words, bits: int) -> Codes:
    """[R, C] words -> [R, C * (32 // bits)]: the fields of each word, the lowest bits first."""
    if 8 % bits == 0:
        octets = np.ascontiguousarray(words).view(np.uint8)
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return ((octets[..., None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(words), -1)
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    parts = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return parts.astype(np.uint8).reshape(len(words), -1)


def group_size(value: object) -> int:
    """Columns per group; -1, for the whole row, stays. ModelError for anything else but a positive number."""
    if type(value) is not int or not (value == -1 or 0 < value < 1 << 31):
        raise ModelError(f"quantization_config has an invalid group_size: {short(value)}")
    return value


def read_order(tensors: Tensors, name: str, columns: int, group: int, required: bool) -> Order | None:
    """The order of columns that brings those of each group together, from a tensor of group indices.

    int64 [K], stable within groups; None where they are in order, or the tensor is absent and not required.
    ModelError for groups out of range, or any but the last that does not have `group` columns.
    """
    if name not in tensors and not required:
        return None
    index = tensors.take(name, ("I32", "I64"), (columns,))
    if index.min() < 0 or index.max() >= -(-columns // group):
        raise ModelError(f"{tensors.path}: the tensor {short(name)} holds groups out of range")
    plain = np.arange(columns)
    order = np.argsort(index, kind="stable")
    if not np.array_equal(index[order], plain // group):
        raise ModelError(f"{tensors.path}: the groups of {short(name)} do not have {group} columns each")
    return None if np.array_equal(order, plain) else order


def matrix(
    where: str,
    shape: tuple[int, int],
    *,
    bits: int,
    group: int,
    codes: Rows,
    scales: NDArray[Any],
    zeros: Rows | int,
    order: Order | None = None,
) -> Stored:
    """The matrix with the values scale * (code - zero), in its codes.

    `codes` gives uint8 [rows, K], `zeros` uint8 [rows, G] or one zero for all; scales are [N, G] (bfloat16 as
    uint16), G = ceil(K / group). Where all zeros are equal, they are the offset and float16 scales stay. Else
    minimums of -scale * zero are stored with float32 scales: exact, except that float32 scales round them.
    `order` is that of the columns in which groups lie side by side.
    """
    kept = kept_bits(bits, group, shape[1])
    zero = zeros if isinstance(zeros, int) else _common(zeros, *scales.shape)
    offset = 0 if zero is None else zero
    half = zero is not None and scales.dtype == np.float16
    # A group longer than the row would only be padding.
    group = 0 if group >= shape[1] else group
    try:
        spec = group_int.spec(shape, kept, group, offset, scales="f16" if half else "f32", mins=zero is None)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None

    def take(start: int, stop: int) -> Packed:
        scale = scales[start:stop]
        if not half:
            scale = dense.from_bf16(scale) if scale.dtype == np.uint16 else scale.astype(np.float32)
        if not np.isfinite(scale).all():
            raise ModelError(f"{where} has scales that are not finite")
        mins = None if isinstance(zeros, int) or zero is not None else -scale * zeros(start, stop)
        piece = codes(start, stop) if order is None else codes(start, stop)[:, order]
        return group_int.pack(piece, scale, mins, bits=kept, group=group, offset=offset)

    return Stored(Matrix(spec, take), order)


def _common(zeros: Rows, n: int, groups: int) -> int | None:
    """The zero that all groups share; None if they differ."""
    first = int(zeros(0, min(n, 16))[0, 0])
    step = max(_PIECE // groups // 16, 1) * 16
    same = all((zeros(start, min(start + step, n)) == first).all() for start in range(0, n, step))
    return first if same else None
