"""Dense float formats: f32, bf16 and f16 values in the rows16 layout."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.formats.packed import ROWS, Packed, PackedSpec


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 -> bfloat16 bits, rounded to nearest even; a NaN stays a (quiet) NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # The bias overflows into NaN's sign only for NaNs, which are replaced below.
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():
        rounded[nan] = ((bits[nan] >> 16) | 0x40).astype(np.uint16)
    return rounded


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def spec(shape: tuple[int, int], format: str) -> PackedSpec:
    """The spec of a dense matrix; `format` is "f32", "bf16" or "f16"."""
    return PackedSpec(format, shape)


def pack(values: NDArray[Any], format: str) -> Packed:
    """Packs [N, K] values.

    `format` "f32" takes float32, "f16" float16, "bf16" either bfloat16 bits (uint16) or float32, which is
    rounded to nearest even.
    """
    n, k = values.shape
    result = spec((n, k), format)
    if format == "bf16" and values.dtype != np.uint16:
        values = to_bf16(values.astype(np.float32, copy=False))
    dtype = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[format]
    padded = values.astype(dtype, copy=False)
    if (n, k) != (result.blocks * ROWS, result.columns):
        padded = np.zeros((result.blocks * ROWS, result.columns), dtype)
        padded[:n, :k] = values
    padded = np.ascontiguousarray(padded)
    if format == "f32":
        lanes = padded.reshape(result.blocks, ROWS, result.columns).transpose(0, 2, 1)
        return Packed(result, {"values": np.ascontiguousarray(lanes)})
    pairs = padded.view(np.uint32).reshape(result.blocks, ROWS, result.columns // 2).transpose(0, 2, 1)
    out = np.ascontiguousarray(pairs).view(dtype).reshape(result.blocks, result.columns // 2, ROWS, 2)
    return Packed(result, {"values": out})


def unpack(packed: Packed) -> NDArray[Any]:
    """The stored values [N, K] in their own dtype (bf16 as uint16 bits)."""
    values, (n, k) = packed.arrays["values"], packed.shape
    rows = values.transpose(0, 2, 1) if packed.format == "f32" else values.transpose(0, 2, 1, 3)
    return np.ascontiguousarray(rows.reshape(packed.blocks * ROWS, packed.columns)[:n, :k])


def decode_f32(packed: Packed) -> NDArray[np.float32]:
    """The matrix [N, K] in float32, exact."""
    values = unpack(packed)
    return from_bf16(values) if packed.format == "bf16" else values.astype(np.float32, copy=False)


def decode(packed: Packed) -> NDArray[np.float64]:
    """The matrix [N, K] in float64, exact."""
    return decode_f32(packed).astype(np.float64)
