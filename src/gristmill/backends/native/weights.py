"""Packed weights as the native program sees them: addresses in a huge-page arena, or in the mapped file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gristmill.backends.native import _native
from gristmill.errors import ModelError
from gristmill.io.memory import available_memory

if TYPE_CHECKING:
    from gristmill.formats.packed import Packed
    from gristmill.io.checkpoint import Extent

_STORAGE = {
    "f32": _native.Storage.F32,
    "bf16": _native.Storage.BF16,
    "f16": _native.Storage.F16,
}
_ALIGN = 64


@dataclass(frozen=True)
class NativeWeight:
    """A weight registered with a native program."""

    index: int
    rows: int  # N, outputs
    columns: int  # K, inputs
    integer: bool
    storage: str  # f32, bf16, f16, int4, int8
    group: int  # columns that share a scale; 0 for float storage
    padded: int  # Kp
    nbytes: int


class WeightStore:
    """Holds the arrays of all weights for the life of a program.

    They are copied into one arena on huge pages when they fill less than a quarter of the free memory, which
    reads faster and is safe against a file that shrinks; otherwise the mapped arrays are used in place.
    """

    def __init__(
        self, packed: Iterable[Packed], extents: Callable[[str], Mapping[str, Extent]] | None = None
    ) -> None:
        total = sum((a.nbytes + _ALIGN - 1) // _ALIGN * _ALIGN for p in packed for a in _arrays(p))
        self.in_arena = total * 4 < available_memory()[0]
        self._arena = _native.WeightArena(total + _ALIGN) if self.in_arena else None
        self._extents = extents
        self._kept: list[NDArray[np.generic]] = []

    def address(self, name: str, part: str, array: NDArray[np.generic] | None) -> int:
        """Address at which the array's bytes lie from now on; 0 for None."""
        if array is None:
            return 0
        if self._arena is not None and self._extents is not None:
            extent = self._extents(name)[part]
            try:
                return int(self._arena.read(str(extent.path), extent.offset, extent.nbytes))
            except OSError as error:
                raise ModelError(f"cannot read {name}.{part} from {extent.path}: {error}") from None
        contiguous = np.ascontiguousarray(array)
        if self._arena is not None:
            return int(self._arena.put(contiguous.reshape(-1).view(np.uint8)))
        self._kept.append(contiguous)
        return int(contiguous.ctypes.data)

    def register(self, program: _native.Program, name: str, packed: Packed) -> NativeWeight:
        """Adds one packed weight to a program."""
        rows, columns = packed.shape
        if packed.format == "group_int":
            storage = _native.Storage.INT4 if packed.bits == 4 else _native.Storage.INT8
            values = packed.arrays["codes"]
            blocks, words = int(values.shape[0]), int(values.shape[1])
            padded = words * (8 if packed.bits == 4 else 4)
            scales = packed.arrays["scales"]
            groups = int(scales.shape[1])
            # A whole-row group spans the padding, too.
            group = max(packed.group, padded) if groups == 1 else packed.group
            if blocks * 16 < rows or padded < columns or groups * group < padded:
                raise ModelError(
                    f"packed weight {name!r} has arrays that do not fit its shape {rows} x {columns}"
                )
            index = program.add_weight(
                storage=storage,
                n=rows,
                k=columns,
                kp=padded,
                group=group,
                groups=groups,
                offset=packed.offset,
                wide_scales=scales.dtype == np.float32,
                values=self.address(name, "codes", values),
                scales=self.address(name, "scales", scales),
                mins=self.address(name, "mins", packed.arrays.get("mins")),
            )
            kind = "int4" if packed.bits == 4 else "int8"
            return NativeWeight(index, rows, columns, True, kind, group, padded, packed.nbytes)
        if packed.format not in _STORAGE:
            raise ModelError(f"the native backend cannot read weight {name!r}: format {packed.format!r}")
        values = packed.arrays["values"]
        padded = int(values.shape[1]) * (1 if packed.format == "f32" else 2)
        index = program.add_weight(
            storage=_STORAGE[packed.format],
            n=rows,
            k=columns,
            kp=padded,
            group=0,
            groups=0,
            offset=0,
            wide_scales=False,
            values=self.address(name, "values", values),
            scales=0,
            mins=0,
        )
        return NativeWeight(index, rows, columns, False, packed.format, 0, padded, packed.nbytes)


def _arrays(packed: Packed) -> Iterable[NDArray[np.generic]]:
    return packed.arrays.values()
