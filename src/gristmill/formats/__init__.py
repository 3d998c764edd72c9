"""Tensor formats: how a weight matrix is laid out in memory and in a checkpoint's files."""

from gristmill.formats.packed import LAYOUT, LAYOUT_VERSION, ROWS, Packed, PackedSpec, decode, decode_f32

__all__ = ["LAYOUT", "LAYOUT_VERSION", "ROWS", "Packed", "PackedSpec", "decode", "decode_f32"]
