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

_ALIGN = 64


@dataclass(frozen=True)
class NativeWeight:
    """A weight registered with a native program."""

    index: int
    rows: int  # N, outputs
    columns: int  # K, inputs
    integer: bool  # has int8 arithmetic: codes with float scales
    storage: str  # f32, bf16, f16, int2, int3, int4, int5, int6, int8, sparse24
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
        kind = f"int{packed.bits}" if packed.format == "group_int" else packed.format
        arrays = packed.arrays
        values, scales = "values" if "values" in arrays else "codes", arrays.get("scales")
        if packed.spec.scales == "e4m3":
            assert scales is not None
            if (scales >= 127).any():
                raise ModelError(f"{name} has E4M3 scales that are negative or NaN")
        # One group may be longer than the row.
        group = min(packed.group, packed.columns)
        index = program.add_weight(
            storage=_native.Storage[kind.upper()],
            n=rows,
            k=columns,
            kp=packed.columns,
            group=group,
            groups=packed.groups,
            offset=packed.offset,
            wide_scales=packed.spec.scales == "f32",
            exponent=packed.spec.exponent if packed.spec.scales == "e4m3" else -1,
            rounded=packed.spec.rounded,
            values=self.address(name, values, arrays[values]),
            scales=self.address(name, "scales", scales),
            mins=self.address(name, "mins", arrays.get("mins")),
        )
        integer = packed.spec.scales in ("f16", "f32")
        return NativeWeight(index, rows, columns, integer, kind, group, packed.columns, packed.nbytes)


def _arrays(packed: Packed) -> Iterable[NDArray[np.generic]]:
    return packed.arrays.values()
