"""E4M3 against its definition, over all codes and around every tie."""

from __future__ import annotations

import numpy as np
import pytest

from gristmill.errors import ModelError
from gristmill.formats import fp8

CODES = np.array([c for c in range(256) if c & 127 != 127], np.uint8)


def value(code: int) -> float:
    """The value of a code, written plainly."""
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def nearest(x: float) -> float:
    """The nearest value, among two equally near that with the even code; beyond the range the last one."""
    sizes = [value(code) for code in range(127)]
    code = min(range(127), key=lambda c: (abs(sizes[c] - min(abs(x), 1e4)), c % 2))
    return float(np.copysign(sizes[code], x))


def test_decode_all() -> None:
    assert fp8.decode(CODES).tolist() == [value(int(c)) for c in CODES]
    assert fp8.decode(np.array([0x7E], np.uint8))[0] == fp8.MAX == 448
    assert fp8.decode(np.array([0x01], np.uint8))[0] == fp8.SMALLEST == 2**-9


def test_encode_inverts_decode() -> None:
    assert np.array_equal(fp8.encode(fp8.decode(CODES)), CODES)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_at_and_beside_every_tie(dtype: type) -> None:
    sizes = np.array([value(code) for code in range(127)])
    middle = (sizes[1:] + sizes[:-1]) / 2
    tries = np.concatenate([sizes, middle, [447.9, 448, 460, 1e4, np.inf, 1e-30]]).astype(dtype)
    tries = np.concatenate([tries, np.nextafter(tries, dtype(np.inf)), np.nextafter(tries, dtype(-np.inf))])
    tries = np.concatenate([tries, -tries])
    got = fp8.round_e4m3(tries)
    assert got.dtype == dtype
    assert got.tolist() == [nearest(float(x)) for x in tries]
    assert np.array_equal(fp8.decode(fp8.encode(tries)), got)


def test_signed_zeros() -> None:
    assert fp8.encode(np.array([0.0, -0.0, -1e-9])).tolist() == [0, 128, 128]


def test_every_value_is_a_bfloat16() -> None:
    bits = fp8.decode(CODES).view(np.uint32)
    assert not (bits & 0xFFFF).any()


def test_nan_is_refused() -> None:
    with pytest.raises(ModelError, match="NaN"):
        fp8.encode(np.array([1.0, np.nan]))
    for code in (0x7F, 0xFF):
        with pytest.raises(ModelError, match="NaN"):
            fp8.decode(np.array([3, code], np.uint8))
