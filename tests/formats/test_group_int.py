"""Group integers: layout and decoding against plain loops in float64, and what rounding to them costs."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from numpy.typing import NDArray

from gristmill.formats import group_int
from gristmill.formats.packed import Packed, decode, decode_f32

SHAPES = [(1, 1), (1, 576), (16, 32), (17, 40), (33, 100), (192, 576), (576, 192), (5, 20)]
FORMS = [(4, 16, 8), (4, 32, 0), (4, 32, 8), (8, 32, 128), (8, 64, 128), (8, 16, 32), (4, 0, 7), (8, 0, 255)]


def make(
    shape: tuple[int, int], bits: int, group: int, offset: int, *, half: bool, mins: bool, seed: int = 0
) -> tuple[Packed, NDArray[np.uint8], NDArray[np.floating], NDArray[np.floating] | None]:
    rng = np.random.default_rng([seed, *shape, bits, group, offset])
    n, k = shape
    group = group or -(-k // 8) * 8
    dtype = np.float16 if half else np.float32
    codes = rng.integers(0, 1 << bits, shape, dtype=np.uint8)
    scales = rng.standard_normal((n, -(-k // group))).astype(dtype)
    low = rng.standard_normal(scales.shape).astype(dtype) if mins else None
    packed = group_int.pack(codes, scales, low, bits=bits, group=group, offset=offset)
    return packed, codes, scales, low


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("mins", [True, False])
def test_decode_is_the_equation(
    shape: tuple[int, int], form: tuple[int, int, int], half: bool, mins: bool
) -> None:
    packed, codes, scales, low = make(shape, *form, half=half, mins=mins)
    n, k = shape
    which = np.arange(k) // packed.group
    expected = scales.astype(np.float64)[:, which] * (codes.astype(np.float64) - packed.offset)
    if low is not None:
        expected = expected + low.astype(np.float64)[:, which]
    assert decode(packed).dtype == np.float64
    assert np.array_equal(decode(packed), expected)
    assert decode_f32(packed).dtype == np.float32
    assert np.array_equal(decode_f32(packed), expected.astype(np.float32))
    back = group_int.unpack(packed)
    assert np.array_equal(back[0], codes)
    assert np.array_equal(back[1], scales)
    assert (back[2] is None) == (low is None)
    assert low is None or np.array_equal(back[2], low)
    assert packed.shape == (n, k)


@pytest.mark.parametrize("shape", [(1, 1), (17, 40), (33, 100), (5, 20)])
@pytest.mark.parametrize("form", FORMS)
def test_layout_byte_by_byte(shape: tuple[int, int], form: tuple[int, int, int]) -> None:
    """Every byte is where the layout's description says, and padding adds nothing."""
    packed, codes, scales, low = make(shape, *form, half=True, mins=True)
    n, k = shape
    array = packed.arrays["codes"]
    assert array.shape == (-(-n // 16), packed.columns * packed.bits // 32, 16, 4)
    for row in range(packed.blocks * 16):
        block, lane = divmod(row, 16)
        for column in range(packed.columns):
            if packed.bits == 8:
                code = array[block, column // 4, lane, column % 4]
            else:
                byte = array[block, column // 8, lane, column % 4]
                code = byte >> 4 if column % 8 >= 4 else byte & 15
            inside = row < n and column < k
            assert code == (codes[row, column] if inside else packed.offset)
        for group in range(packed.groups):
            assert packed.arrays["scales"][block, group, lane] == (scales[row, group] if row < n else 0)
            assert low is not None
            assert packed.arrays["mins"][block, group, lane] == (low[row, group] if row < n else 0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantise_stays_within_half_a_step(shape: tuple[int, int], bits: int) -> None:
    values = np.random.default_rng([bits, *shape]).standard_normal(shape).astype(np.float32)
    packed = group_int.quantise(values, bits)
    assert (packed.bits, packed.group, packed.offset) == ((4, 32, 8) if bits == 4 else (8, 64, 128))
    assert packed.spec.scales == "f16"
    assert not packed.spec.mins
    codes, scales, _ = group_int.unpack(packed)
    step = np.abs(scales.astype(np.float64))[:, np.arange(shape[1]) // packed.group]
    # Nearest code of the scale that was chosen, or the end of the codes' range.
    low, high = (0, 15) if bits == 4 else (1, 255)
    exact = values / np.where(step == 0, 1, scales.astype(np.float64)[:, np.arange(shape[1]) // packed.group])
    best = np.clip(np.rint(exact), low - packed.offset, high - packed.offset)
    error = np.abs(decode(packed) - values)
    assert (error <= np.abs(best * step - np.abs(values) * np.sign(exact)) + 1e-6 * (1 + step)).all()
    assert codes.min() >= low
    if bits == 8:
        assert (error <= 0.5 * step * (1 + 1e-3) + 1e-7).all()


def test_int4_beats_plain_absmax_rounding() -> None:
    rng = np.random.default_rng(3)
    shape = (64, 512)
    for sample in (rng.standard_normal(shape), rng.standard_t(4, shape), rng.uniform(-1, 1, shape)):
        values = sample.astype(np.float32)
        error = np.square(decode(group_int.quantise(values, 4)) - values).sum()
        groups = values.reshape(64, 16, 32).astype(np.float64)
        scale = np.abs(groups).max(axis=2, keepdims=True) / 7
        plain = np.square(np.clip(np.rint(groups / scale), -8, 7) * scale - groups).sum()
        assert error < 0.95 * plain


@pytest.mark.parametrize("bits", [4, 8])
def test_quantise_of_awkward_values(bits: int) -> None:
    values = np.zeros((17, 96), np.float32)
    values[1] = 1e-30  # below what a float16 scale can hold: becomes zero
    values[2] = 3e38  # above it: the largest scale
    values[3, ::2] = -1
    values[4] = -0.0
    values[5, 5] = 7.25
    values[6] = np.linspace(-1, 1, 96)
    decoded = decode(group_int.quantise(values, bits))
    assert np.isfinite(decoded).all()
    assert not decoded[0].any()
    assert not decoded[1].any()
    assert (decoded[2] > 4e5).all()
    assert np.allclose(decoded[3], values[3], atol=1e-3)
    assert np.allclose(decoded[5], values[5], rtol=1e-3)
    assert np.abs(decoded[6] - values[6]).max() < (0.08 if bits == 4 else 0.005)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantise_does_not_depend_on_the_other_rows(bits: int) -> None:
    values = np.random.default_rng(9).standard_normal((200, 300)).astype(np.float32)
    whole = group_int.quantise(values, bits)
    part = group_int.quantise(values[48:100], bits)
    assert np.array_equal(decode(whole)[48:100], decode(part))
    again = group_int.quantise(values, bits)
    assert all(np.array_equal(whole.arrays[name], again.arrays[name]) for name in whole.arrays)


def test_quantise_knows_4_and_8_bits_only() -> None:
    with pytest.raises(ValueError, match="4- or 8-bit"):
        group_int.quantise(np.ones((1, 1), np.float32), 5)


def test_bits_per_weight_counts_what_is_stored() -> None:
    packed = group_int.quantise(np.ones((576, 576), np.float32), 4)
    stored = sum(array.nbytes for array in packed.arrays.values())
    assert packed.bits_per_weight == 8 * stored / prod(packed.shape) == 4.5
    assert group_int.quantise(np.ones((576, 576), np.float32), 8).bits_per_weight == 8.25
