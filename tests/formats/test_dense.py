"""Dense formats: bfloat16 rounding, the layout, exact round trips."""

from __future__ import annotations

import numpy as np
import pytest

from gristmill.formats import dense
from gristmill.formats.packed import decode, decode_f32

SHAPES = [(1, 1), (1, 8), (15, 7), (16, 16), (17, 33), (192, 576), (576, 192)]


def bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).view(np.uint32)


def nearest_bf16(value: float) -> float:
    """Nearest bfloat16 by comparing the two neighbours in float64, ties to the even one."""
    word = int(np.float32(value).view(np.uint32))
    low, high = word & 0xFFFF0000, (word & 0xFFFF0000) + 0x10000
    below, above = (float(np.uint32(w & 0xFFFFFFFF).view(np.float32)) for w in (low, high))
    if np.isinf(above):  # what would come next if the exponent went on
        above = 2.0**128 if value > 0 else -(2.0**128)
    left, right = abs(float(value) - below), abs(above - float(value))
    if left == right:
        return below if (low >> 16) % 2 == 0 else above
    return below if left < right else above


def test_bf16_rounds_to_nearest_even() -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 32, 4000, dtype=np.uint32)
    # Exact ties, and their neighbours.
    words[:900] = (words[:900] & 0xFFFF0000) | 0x8000
    words[300:600] += 1
    words[600:900] -= 1
    values = words.view(np.float32)
    values = values[np.isfinite(values)]
    rounded = dense.from_bf16(dense.to_bf16(values))
    for value, got in zip(values, rounded, strict=True):
        expected = nearest_bf16(value)
        assert float(got) == expected or (abs(expected) == 2.0**128 and np.isinf(got)), value


def test_bf16_special_values() -> None:
    nans = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)
    assert np.isnan(dense.from_bf16(dense.to_bf16(nans))).all()
    special = np.array([0.0, -0.0, np.inf, -np.inf, 2.0**-133, -(2.0**-126)], np.float32)
    assert np.array_equal(bits(dense.from_bf16(dense.to_bf16(special))), bits(special))


def test_every_bf16_survives() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    back = dense.unpack(dense.pack(every, "bf16"))
    assert np.array_equal(back, every)
    finite = every[np.isfinite(dense.from_bf16(every))]
    assert np.array_equal(dense.to_bf16(dense.from_bf16(finite)), finite)


def test_every_f16_survives() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(512, 128)
    packed = dense.pack(every, "f16")
    assert np.array_equal(dense.unpack(packed).view(np.uint16), every.view(np.uint16))
    assert np.array_equal(decode_f32(packed), every.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["f32", "bf16", "f16"])
def test_round_trip_and_layout(shape: tuple[int, int], form: str) -> None:
    n, k = shape
    values = np.random.default_rng([n, k]).standard_normal(shape).astype(np.float32)
    packed = dense.pack(values, form)
    expected = {
        "f32": values,
        "bf16": dense.from_bf16(dense.to_bf16(values)),
        "f16": values.astype(np.float16).astype(np.float32),
    }[form]
    assert np.array_equal(decode(packed), expected.astype(np.float64))
    assert decode(packed).dtype == np.float64
    assert np.array_equal(decode_f32(packed), expected)

    array = packed.arrays["values"]
    seen = np.zeros(array.shape, bool)
    rows = sorted({0, n // 2, n - 1})
    for row in rows:
        for column in range(k):
            lane = row % 16
            at = (row // 16, column, lane) if form == "f32" else (row // 16, column // 2, lane, column % 2)
            stored = array[at]
            if form == "bf16":
                stored = dense.from_bf16(np.array([stored], np.uint16))[0]
            assert np.float32(stored) == expected[row, column]
            seen[at] = True
    if len(rows) == n:  # all rows were looked at: whatever is left is padding
        assert not array[~seen].any()


def test_bf16_takes_bits_as_they_are() -> None:
    raw = np.array([[0x7F81, 0x8001], [0x0001, 0xFFFF]], np.uint16)
    assert np.array_equal(dense.unpack(dense.pack(raw, "bf16")), raw)
