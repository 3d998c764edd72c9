"""MARLIN's layout against its definition, read out as the kernel does."""

from __future__ import annotations

import numpy as np
import pytest

from gristmill.errors import ModelError
from gristmill.formats import group_int, marlin_layout
from gristmill.formats.packed import Packed


def matrix(n: int = 128, k: int = 256, group: int = 128) -> tuple[Packed, np.ndarray, np.ndarray]:
    """Packed, codes [K, N], scales [G, N]; all scales differ."""
    rng = np.random.default_rng([n, k, group])
    codes = rng.integers(0, 16, (n, k)).astype(np.uint8)
    groups = k // group
    scales = (1 + np.arange(n * groups)).reshape(n, groups).astype(np.float16)
    return group_int.pack(codes, scales, bits=4, group=group, offset=8), codes.T, scales.T


@pytest.mark.parametrize(("n", "k", "group"), [(128, 256, 128), (64, 16, 16), (192, 576, 64), (64, 96, 96)])
def test_masks_yield_the_fragments(n: int, k: int, group: int) -> None:
    """Every thread's pairs, taken out as the kernel does, are the codes that its product needs."""
    packed, codes, _ = matrix(n, k, group)
    words, _ = marlin_layout.pack(packed)
    assert words.shape == (k // 16, 2 * n)
    assert words.dtype == np.int32
    for row in range(k // 16):
        for run in range(n // 64):
            for thread in range(32):
                for tile in range(4):
                    word = int(words[row, run * 128 + thread * 4 + tile]) & 0xFFFFFFFF
                    r, c = 16 * row + 2 * (thread % 4), 64 * run + 16 * tile + thread // 4
                    pairs = []
                    for shifted in (word, word >> 8):
                        for mask, down in ((0x000F000F, 0), (0x00F000F0, 4)):
                            pair = (shifted & mask) >> down
                            pairs.append((pair & 0xFFFF, pair >> 16))
                    assert pairs == [
                        (codes[r, c], codes[r + 1, c]),
                        (codes[r + 8, c], codes[r + 9, c]),
                        (codes[r, c + 8], codes[r + 1, c + 8]),
                        (codes[r + 8, c + 8], codes[r + 9, c + 8]),
                    ]


@pytest.mark.parametrize(("n", "k", "group"), [(128, 256, 128), (192, 576, 64), (64, 96, 96), (64, 16, 16)])
def test_unpack_is_the_inverse(n: int, k: int, group: int) -> None:
    packed, _, _ = matrix(n, k, group)
    again = marlin_layout.unpack(*marlin_layout.pack(packed))
    assert again.spec == packed.spec
    for name, array in packed.arrays.items():
        assert np.array_equal(again.arrays[name], array), name


def test_order_of_scales() -> None:
    _, stored = marlin_layout.pack(matrix(128, 256, 128)[0])
    scales = matrix(128, 256, 128)[2]
    for place in range(128):
        column = place // 64 * 64 + place % 64 // 8 + place % 8 * 8
        assert np.array_equal(stored[:, place], scales[:, column])
    _, stored = marlin_layout.pack(matrix(64, 96, 96)[0])
    scales = matrix(64, 96, 96)[2]
    places = [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27, 4, 5, 12, 13, 20, 21, 28, 29]
    places += [6, 7, 14, 15, 22, 23, 30, 31]
    assert np.array_equal(stored[0, :32], scales[0, places])
    assert np.array_equal(stored[0, 32:], scales[0, 32 + np.array(places)])


def test_refuses() -> None:
    for n, k, group in [(72, 256, 128), (64, 24, 24), (64, 80, 64)]:
        rows = np.ones((n, k), np.float32)
        with pytest.raises(ModelError, match="no MARLIN layout"):
            marlin_layout.pack(group_int.round_group_int(rows, bits=4, group=group, symmetric=True))
    with pytest.raises(ModelError, match="symmetric 4-bit"):
        marlin_layout.pack(
            group_int.round_group_int(np.ones((64, 64), np.float32), bits=4, group=32, symmetric=False)
        )
    words, scales = marlin_layout.pack(matrix()[0])
    for bad in ((words[:, :100], scales), (words, scales[:, :64]), (words[:0], scales), (words, scales[:0])):
        with pytest.raises(ModelError, match="no MARLIN matrix"):
            marlin_layout.unpack(*bad)
    with pytest.raises(ModelError, match="int32"):
        marlin_layout.unpack(words.view(np.uint32), scales)  # type: ignore[arg-type]
