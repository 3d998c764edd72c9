"""The 2:4 format: layout and decoding against plain loops, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gristmill.errors import ModelError
from gristmill.formats import sparse24
from gristmill.formats.packed import Packed, decode, decode_f32

SHAPES = [(1, 1), (1, 576), (16, 32), (17, 40), (33, 100), (192, 576), (5, 22)]


def two_of_four(shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.bool_]:
    """A random mask with two of every four columns, as far as the row goes."""
    n, k = shape
    order = rng.random((n, -(-k // 4), 4)).argsort(axis=2)
    return (order < 2).reshape(n, -1)[:, :k]


def make(
    shape: tuple[int, int], group: int = 32, half: bool = True
) -> tuple[Packed, NDArray[np.uint8], NDArray[np.bool_], NDArray[np.floating]]:
    rng = np.random.default_rng([*shape, group])
    mask = two_of_four(shape, rng)
    codes = rng.integers(0, 16, shape, dtype=np.uint8)
    group = group or -(-shape[1] // 32) * 32
    scales = rng.standard_normal((shape[0], -(-shape[1] // group))).astype(np.float16 if half else np.float32)
    return sparse24.pack(codes, mask, scales, group=group), codes, mask, scales


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 128, 0])
@pytest.mark.parametrize("half", [True, False])
def test_decode_is_the_equation(shape: tuple[int, int], group: int, half: bool) -> None:
    packed, codes, mask, scales = make(shape, group, half)
    which = np.arange(shape[1]) // packed.group
    expected = np.where(mask, scales.astype(np.float64)[:, which] * (codes.astype(np.float64) - 8), 0)
    assert np.array_equal(decode(packed), expected)
    assert np.array_equal(decode_f32(packed), expected.astype(np.float32))
    back = sparse24.unpack(packed)
    assert np.array_equal(back[0], np.where(mask, codes, 8))
    assert (back[1] >= mask).all()
    assert (back[1].sum(axis=1) <= -(-shape[1] // 4) * 2).all()
    if shape[1] % 4 == 0:
        assert np.array_equal(back[1], mask)
    assert np.array_equal(back[2], scales)
    for start in range(0, shape[0], 16):
        assert np.array_equal(decode(packed.rows(start, shape[0])), expected[start:])


@pytest.mark.parametrize("shape", [(17, 40), (33, 100), (3, 576)])
def test_layout_byte_by_byte(shape: tuple[int, int]) -> None:
    packed, codes, mask, _ = make(shape)
    n, k = shape
    array = packed.arrays["codes"]
    assert array.shape == (packed.blocks, packed.columns * 3 // 32, 16, 4)
    for row in range(packed.blocks * 16):
        block, lane = divmod(row, 16)
        for quad in range(packed.columns // 4):
            piece, v = divmod(quad, 8)
            byte = array[block, piece * 3 + 2, lane, v // 2]
            pair = sparse24.PAIRS[byte >> 4 if v % 2 else byte & 15]
            found = {}
            for i, column in enumerate(pair):
                byte = array[block, piece * 3 + v // 4, lane, v % 2 * 2 + i]
                nibble = int(byte >> 4 if v % 4 >= 2 else byte & 15)
                found[quad * 4 + column] = nibble - 16 if nibble > 7 else nibble
            for column in range(quad * 4, quad * 4 + 4):
                real = row < n and column < k and mask[row, column]
                assert found.get(column, 0) == (int(codes[row, column]) - 8 if real else 0)


def test_layout_does_not_change() -> None:
    codes = (np.arange(32) * np.arange(32) // 3 % 16).astype(np.uint8)[None]
    mask = np.zeros((1, 32), bool)
    for quad in range(8):
        mask[0, [4 * quad + column for column in sparse24.PAIRS[quad % 6]]] = True
    packed = sparse24.pack(codes, mask, np.ones((1, 1), np.float16), group=32)
    assert packed.arrays["codes"][0, :, 0].tobytes().hex() == "d8080d948880d94810325410"


def test_fewer_than_two_are_kept() -> None:
    mask = np.array([[0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0]], bool)
    codes = np.full((1, 16), 15, np.uint8)
    packed = sparse24.pack(codes, mask, np.ones((1, 1), np.float16), group=32)
    assert np.array_equal(decode(packed), np.where(mask, 7.0, 0.0))


def test_three_of_four_are_refused() -> None:
    mask = np.zeros((20, 40), bool)
    mask[19, [36, 37, 39]] = True
    with pytest.raises(ModelError, match="more than two of four"):
        sparse24.pack(np.full((20, 40), 8, np.uint8), mask, np.ones((20, 2), np.float16), group=32)


def test_numbers_that_are_no_pair_keep_none() -> None:
    packed, *_ = make((16, 32))
    array = packed.arrays["codes"].copy()
    array[:, 2] = 0x67
    assert not decode(Packed(packed.spec, packed.arrays | {"codes": array})).any()
    array[:, 2] = 0x89  # the highest bit is not looked at
    twin = array.copy()
    twin[:, 2] = 0x01
    found, expected = (decode(Packed(packed.spec, packed.arrays | {"codes": a})) for a in (array, twin))
    assert np.array_equal(found, expected)
    assert found.any()
