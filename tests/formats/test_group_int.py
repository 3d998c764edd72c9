"""Group integers: layout and decoding against plain loops in float64, and what rounding to them costs."""

from __future__ import annotations

from math import prod
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from gristmill.errors import ModelError
from gristmill.formats import group_int
from gristmill.formats.packed import Packed, decode, decode_f32

SHAPES = [(1, 1), (1, 576), (16, 32), (17, 40), (33, 100), (192, 576), (576, 192), (5, 20)]
FORMS = [
    *((4, 16, 8), (4, 32, 0), (4, 32, 8), (8, 32, 128), (8, 64, 128), (8, 16, 32), (4, 0, 7), (8, 0, 255)),
    *((2, 16, 0), (2, 64, 2), (2, 0, 1), (3, 32, 4), (3, 128, 4), (3, 0, 7), (5, 32, 16), (5, 64, 0)),
    *((5, 0, 31), (6, 16, 32), (6, 128, 32), (6, 0, 0), (4, 128, 8)),
]
PIECE = {2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 8: 4}
PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [8]}


def make(
    shape: tuple[int, int], bits: int, group: int, offset: int, *, half: bool, mins: bool, seed: int = 0
) -> tuple[Packed, NDArray[np.uint8], NDArray[np.floating], NDArray[np.floating] | None]:
    rng = np.random.default_rng([seed, *shape, bits, group, offset])
    n, k = shape
    group = group or -(-k // max(8, PIECE[bits])) * max(8, PIECE[bits])
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


def stored_code(array: NDArray[np.generic], bits: int, block: int, lane: int, column: int) -> int:
    """One code, read as the layout is described: plane by plane."""
    piece, c = divmod(column, PIECE[bits])
    vector = piece * (PIECE[bits] * bits // 32)
    code, at = 0, 0
    for width in PLANES[bits]:
        columns = 32 // width  # of one vector
        byte = int(array[block, vector + c // columns, lane, c % 4])
        code |= ((byte >> (c % columns // 4 * width)) & ((1 << width) - 1)) << at
        at += width
        vector += PIECE[bits] // columns
    return code


@pytest.mark.parametrize("shape", [(1, 1), (17, 40), (33, 100), (5, 20), (3, 576)])
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
            code = stored_code(array, packed.bits, block, lane, column)
            inside = row < n and column < k
            assert code == (codes[row, column] if inside else packed.offset)
        for group in range(packed.groups):
            assert packed.arrays["scales"][block, group, lane] == (scales[row, group] if row < n else 0)
            assert low is not None
            assert packed.arrays["mins"][block, group, lane] == (low[row, group] if row < n else 0)


GOLDEN = {
    2: "143051c3450c1430",
    3: "143051c3450c1430b6009200",
    4: "5080c103058b11b855301c085080c103",
    5: "5080c103058b11b855301c085080c1031cec0072",
    6: "5080c103058b11b8d0d0202455301c085080c1030156aa3f",
    8: "0000010305080c10151b21283038414b55606c788593a1b0c0d0e1f305182c40",
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_layout_does_not_change(bits: int) -> None:
    """The bytes of a row of 32 columns: files hold them."""
    codes = (np.arange(32) * np.arange(32) // 3 % (1 << bits)).astype(np.uint8)[None]
    packed = group_int.pack(codes, np.ones((1, 1), np.float16), bits=bits, group=32, offset=0)
    assert packed.arrays["codes"][0, :, 0].tobytes().hex() == GOLDEN[bits]


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


ROUNDED = [
    (bits, group, symmetric, clip, scales)
    for bits in (2, 3, 4, 5, 6, 8)
    for group, symmetric, clip, scales in (
        (32, True, "none", "f16"),
        (64, True, "mse", "f16"),
        (0, True, "mse", "f32"),
        (32, False, "none", "f16"),
        (128, False, "mse", "f32"),
    )
]


@pytest.mark.parametrize(("bits", "group", "symmetric", "clip", "scales"), ROUNDED)
def test_rounding_takes_the_nearest_codes(
    bits: int, group: int, symmetric: bool, clip: Literal["none", "mse"], scales: Literal["f16", "f32"]
) -> None:
    for shape in [(1, 1), (17, 40), (5, 576), (20, 200)]:
        values = np.random.default_rng([bits, *shape]).standard_normal(shape).astype(np.float32)
        packed = group_int.round_group_int(
            values, bits=bits, group=group, symmetric=symmetric, clip=clip, scales=scales
        )
        assert (packed.spec.scales, packed.spec.mins) == (scales, not symmetric)
        assert packed.offset == ((1 << (bits - 1)) if symmetric else 0)
        _, scale, low = group_int.unpack(packed)
        # Every code there is, decoded; the nearest is as near as what was chosen.
        which = np.arange(shape[1]) // packed.group
        step = scale.astype(np.float64)[:, which]
        base = 0 if low is None else low.astype(np.float64)[:, which]
        first = 1 if symmetric and clip == "none" else 0
        every = [base + step * (code - packed.offset) for code in range(first, 1 << bits)]
        nearest = np.abs(np.stack(every) - values).min(axis=0)
        error = np.abs(decode(packed) - values)
        np.testing.assert_allclose(error, nearest, rtol=1e-4, atol=1e-6)
        if clip == "none":
            top = np.abs(values).max() if symmetric else np.ptp(values) + np.abs(values).max()
            assert step.max() <= top / (((1 << (bits - 1)) - 1) if symmetric else (1 << bits) - 1) * 1.001


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_beats_the_whole_range(bits: int, group: int, symmetric: bool) -> None:
    rng = np.random.default_rng(3)
    for sample in (rng.standard_normal((64, 512)), rng.standard_t(4, (64, 512))):
        values = sample.astype(np.float32)

        def error(clip: Literal["none", "mse"], values: NDArray[np.float32] = values) -> float:
            packed = group_int.round_group_int(values, bits=bits, group=group, symmetric=symmetric, clip=clip)
            return float(np.square(decode(packed) - values).sum())

        assert error("mse") < (0.85 if bits < 4 else 0.99) * error("none")


def test_a_minimum_reaches_the_ends_of_the_range() -> None:
    values = np.zeros((3, 32), np.float32)
    values[0] = np.linspace(0, 15, 32)
    values[1] = np.linspace(-15, -7.5, 32)  # the range is extended to 0
    packed = group_int.round_group_int(values, bits=4, group=32, symmetric=False)
    codes, scales, mins = group_int.unpack(packed)
    assert mins is not None
    assert (scales[0, 0], mins[0, 0]) == (1, 0)
    assert (scales[1, 0], mins[1, 0]) == (1, -15)
    assert codes[0].max() == 15
    assert codes[1].max() == 8  # 7.5 to the even code
    assert not decode(packed)[2].any()


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_of_awkward_values(symmetric: bool, clip: Literal["none", "mse"]) -> None:
    values = np.zeros((6, 96), np.float32)
    values[1] = 1e-30
    values[2] = 3e38
    values[3, ::2] = -3e38
    values[4] = 5
    values[5, 5] = 7.25
    for scales in ("f16", "f32"):
        packed = group_int.round_group_int(
            values, bits=5, group=32, symmetric=symmetric, clip=clip, scales=scales
        )
        decoded = decode(packed)
        assert np.isfinite(decoded).all()
        assert not decoded[0].any()
        assert np.allclose(decoded[4], 5, rtol=1e-3)
        assert np.allclose(decoded[5], values[5], rtol=1e-3, atol=1e-2)
        if scales == "f32":
            assert np.allclose(decoded[2], values[2], atol=3e33)
            assert np.allclose(decoded[3], values[3], atol=3e33)
    for bad in (np.nan, np.inf, -np.inf):
        values[0, 3] = bad
        with pytest.raises(ModelError, match="not finite"):
            group_int.round_group_int(values, bits=5, group=32, symmetric=symmetric, clip=clip)


def test_encode_with_given_scales() -> None:
    values = np.array([[0, 1, 2.4, 2.6, -1, -9, 90, 0.5]], np.float32)
    one = np.ones((1, 1), np.float16)
    codes = group_int.encode_with(values, one, bits=3, group=32, offset=4)
    assert codes.tolist() == [[4, 5, 6, 7, 3, 0, 7, 4]]
    codes = group_int.encode_with(values, one, -one, bits=3, group=32, offset=0)
    assert codes.tolist() == [[1, 2, 3, 4, 0, 0, 7, 2]]
    assert (group_int.encode_with(values, 0 * one, bits=3, group=32, offset=4) == 4).all()
    values[0, 2] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        group_int.encode_with(values, one, bits=3, group=32, offset=4)
