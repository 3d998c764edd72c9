"""E4M3: 8-bit floats of sign, 4 exponent bits (bias 7) and 3 mantissa bits, without infinities.

Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433. The largest value is 448, the smallest
normal one 2^-6, the smallest at all 2^-9; the codes 0x7f and 0xff are NaN, which is refused here. Every value
is a bfloat16 as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError

MAX = 448.0
SMALLEST = 2.0**-9
_NAN = 0x7F


def _table() -> NDArray[np.float32]:
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.ldexp(mantissa + 8.0 * (exponent > 0), np.maximum(exponent, 1) - 10)
    values: NDArray[np.float32] = np.where(codes & 128, -size, size).astype(np.float32)
    return values


_VALUES = _table()


def _steps(values: NDArray[np.floating]) -> NDArray[np.int32]:
    """log2 of the distance of E4M3 values around values of at most 448."""
    steps: NDArray[np.int32] = np.where(values == 0, -9, np.maximum(np.frexp(values)[1] - 4, -9))
    return steps


def _within(values: NDArray[Any]) -> NDArray[Any]:
    if np.isnan(values).any():
        raise ModelError("NaN cannot be rounded to E4M3")
    return values.clip(-MAX, MAX)


def round_e4m3(values: NDArray[Any]) -> NDArray[Any]:
    """The nearest E4M3 values, ties to the even mantissa, in the dtype of the (float32 or float64) values.

    Beyond 448 in size it is 448. ModelError for NaN.
    """
    values = _within(values)
    steps = _steps(values)
    rounded: NDArray[Any] = np.ldexp(np.rint(np.ldexp(values, -steps)), steps)
    return rounded


def encode(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The codes of the nearest E4M3 values, as `round_e4m3` says; the sign of a zero is kept."""
    values = round_e4m3(values)
    steps = _steps(values)
    size = np.ldexp(np.abs(values), -steps).astype(np.int32) + (steps + 9) * 8
    codes: NDArray[np.uint8] = np.where(np.signbit(values), size | 128, size).astype(np.uint8)
    return codes


def decode(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The values of codes, exact. ModelError for a code of NaN."""
    if ((codes & _NAN) == _NAN).any():
        raise ModelError("an E4M3 code stands for NaN")
    values: NDArray[np.float32] = _VALUES[codes]
    return values
