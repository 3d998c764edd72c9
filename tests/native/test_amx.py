"""The AMX kernel, bit for bit against the others: on emulated tiles, and on real ones where there are any."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from gristmill.backends.native import _native

BASE = "avx512bf16"
TILED = ["amx_emulated"] + (["amx"] if "amx" in _native.available_levels() else [])
NEEDS_AVX512 = pytest.mark.skipif(
    BASE not in _native.available_levels(), reason="the emulated tiles need AVX-512 with VNNI and BF16"
)
Arrays = NDArray[np.uint8]


@dataclass(frozen=True)
class Format:
    """How a weight is stored; group 0 is the whole row."""

    bits: int
    group: int
    offset: int
    wide: bool = False
    mins: bool = False


FORMATS = [
    Format(4, 16, 0, wide=True, mins=True),
    Format(4, 32, 8),
    Format(4, 32, 0, mins=True),
    Format(4, 64, 200),  # does not fit a signed byte
    Format(4, 128, 8),
    Format(4, 96, 8, mins=True),  # two steps of 48 columns
    Format(4, 0, 8),
    Format(8, 8, 128),
    Format(8, 16, 32, wide=True),
    Format(8, 32, 0, mins=True),
    Format(8, 32, 128),
    Format(8, 64, 128),
    Format(8, 64, 255, mins=True),
    Format(8, 128, 128, wide=True, mins=True),
    Format(8, 0, 128, wide=True),
    Format(8, 0, 0, mins=True),
]


@dataclass
class Linear:
    """A random weight and rows, as the bindings take them."""

    n: int
    k: int
    format: Format
    seed: int = 0
    ragged: bool = False  # the stored columns end inside the last group

    def __post_init__(self) -> None:
        f, rng = self.format, np.random.default_rng([self.seed, self.n, self.k, self.format.group])
        self.group = f.group or -(-self.k // 8) * 8
        self.groups = -(-self.k // self.group)
        self.kp = -(-self.k // 8) * 8 if self.ragged else self.groups * self.group
        blocks = -(-self.n // 16)
        self.codes: Arrays = rng.integers(0, 256, blocks * self.kp * 2 * f.bits, dtype=np.uint8)
        shape = (blocks, self.groups, 16)
        kind = np.float32 if f.wide else np.float16
        self.scales = rng.uniform(-0.1, 0.1, shape).astype(kind)
        self.mins = rng.uniform(-1, 1, shape).astype(kind)
        self.bias = rng.standard_normal(self.n).astype(np.float32)

    def run(
        self,
        level: str,
        x: NDArray[np.float32],
        bias: bool = False,
        into: NDArray[np.float32] | None = None,
        blocks: tuple[int, int] | None = None,
    ) -> NDArray[np.float32]:
        f, none = self.format, np.zeros(0, np.float32)
        # Poisoned: an element that was not written, or a guard column that was, is seen.
        out = np.full((len(x), self.n + 3), np.nan, np.float32)
        if into is not None:
            out[:, : self.n] = into
        mins = self.mins.reshape(-1).view(np.uint8) if f.mins else np.zeros(0, np.uint8)
        storage = _native.Storage.INT4 if f.bits == 4 else _native.Storage.INT8
        shape = (self.n, self.k, self.kp, self.group, self.groups, f.offset, f.wide)
        arrays = (self.codes, self.scales.reshape(-1).view(np.uint8), mins)
        begin, end = blocks or (0, -(-self.n // 16))
        rest = (self.bias if bias else none, into is not None, out, begin, end)
        _native.linear(level, "int8", storage, *shape, *arrays, x, *rest)
        assert np.isnan(out[:, self.n :]).all(), "wrote past the end of a row"
        return out[:, : self.n]


def rows(count: int, k: int, seed: int = 0) -> NDArray[np.float32]:
    x = np.random.default_rng([seed, count, k]).standard_normal((count, k)).astype(np.float32)
    x[count // 2] = 0  # a row of zero scales
    return x


def same(got: NDArray[np.float32], expected: NDArray[np.float32], note: str = "") -> None:
    # As integers: -0 is not 0 here, and NaN equals itself.
    np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32), err_msg=note)


@NEEDS_AVX512
@pytest.mark.parametrize("level", TILED)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_same_bits_as_the_vector_kernels(level: str, format: Format) -> None:
    for n, k in [(576, 64), (192, 576), (17, 200), (48, 1536), (16, 8), (33, 328)]:
        for ragged in {False, format.group > 0 and k % format.group != 0}:
            linear = Linear(n, k, format, ragged=ragged)
            x = rows(37, k)
            same(linear.run(level, x), linear.run(BASE, x), f"{n}x{k} ragged={ragged}")


@NEEDS_AVX512
@pytest.mark.parametrize("level", TILED)
def test_any_number_of_rows(level: str) -> None:
    for format in (Format(4, 32, 8), Format(8, 64, 32, mins=True)):
        linear = Linear(50, 72, format)
        x = rows(80, 72)
        whole = linear.run(BASE, x)
        for count in [*range(1, 41), 47, 48, 49, 63, 64, 65, 80]:
            same(linear.run(level, np.ascontiguousarray(x[:count])), whole[:count], f"{count} rows")


@NEEDS_AVX512
@pytest.mark.parametrize("level", TILED)
def test_more_rows_than_a_panel(level: str) -> None:
    # 20,000 columns: a panel of about a megabyte holds 32 rows.
    linear = Linear(17, 20_000, Format(8, 0, 128, wide=True))
    x = rows(70, 20_000)
    same(linear.run(level, x), linear.run(BASE, x))


@NEEDS_AVX512
@pytest.mark.parametrize("level", TILED)
def test_bias_and_accumulation(level: str) -> None:
    for format in FORMATS[1:4]:
        linear = Linear(35, 192, format)
        x = rows(21, 192)
        into = np.random.default_rng(5).standard_normal((21, 35)).astype(np.float32)
        for bias in (False, True):
            same(linear.run(level, x, bias, into), linear.run(BASE, x, bias, into), f"bias={bias}")
            same(linear.run(level, x, bias), linear.run(BASE, x, bias), f"bias={bias}")


@NEEDS_AVX512
@pytest.mark.parametrize("level", TILED)
def test_blocks_are_independent(level: str) -> None:
    linear = Linear(100, 64, Format(4, 32, 8))
    x = rows(33, 64)
    whole = linear.run(BASE, x)
    for begin, end in [(0, 1), (1, 4), (2, 7), (6, 7), (3, 3)]:
        part = linear.run(level, x, blocks=(begin, end))
        same(part[:, begin * 16 : end * 16], whole[:, begin * 16 : end * 16])
        assert np.isnan(part[:, : begin * 16]).all()
        assert np.isnan(part[:, end * 16 :]).all()


@NEEDS_AVX512
@pytest.mark.parametrize("level", TILED)
def test_largest_codes(level: str) -> None:
    # The largest sums that a group can reach: every code and every activation at its end.
    for format in (
        Format(8, 0, 128, wide=True),
        Format(8, 0, 255),
        Format(4, 0, 0),
        Format(8, 0, 0, mins=True),
    ):
        for code in (0, 255):
            linear = Linear(16, 4096, format)
            linear.codes[:] = code
            x = np.full((16, 4096), -3.0, np.float32)
            same(linear.run(level, x), linear.run(BASE, x))


@NEEDS_AVX512
def test_against_float64() -> None:
    # Not only equal to each other: right. Eight-bit codes, whose layout is easily undone.
    f = Format(8, 64, 128)
    linear = Linear(40, 192, f)
    x = rows(24, 192)
    codes = linear.codes.reshape(3, 48, 16, 4).transpose(0, 2, 1, 3).reshape(48, 192).astype(np.float64)
    scale = linear.scales.astype(np.float64).transpose(0, 2, 1).reshape(48, 3)
    w = ((codes - 128).reshape(48, 3, 64) * scale[:, :, None]).reshape(48, 192)[:40]
    expected = x.astype(np.float64) @ w.T
    # Activations have 127 steps to their largest value in the group.
    bound = np.abs(x).max() / 127 * 0.5 * np.abs(w).sum(axis=1) * 1.01 + 1e-4
    assert (np.abs(linear.run("amx_emulated", x) - expected) <= bound).all()


def test_the_emulation_is_hidden() -> None:
    assert "amx_emulated" not in _native.available_levels()
    assert "amx_emulated" not in _native.compiled_levels()
    assert _native.default_level() != "amx_emulated" or os.environ.get("GRISTMILL_ISA") == "amx_emulated"


@NEEDS_AVX512
def test_the_emulation_can_be_named() -> None:
    code = "from gristmill.backends.native import _native; print(_native.default_level())"
    env = {**os.environ, "GRISTMILL_ISA": "amx_emulated"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "amx_emulated"


@pytest.mark.skipif("amx" in _native.available_levels(), reason="this processor has AMX")
@pytest.mark.skipif("amx" not in _native.compiled_levels(), reason="not an x86 build")
def test_without_tiles_the_level_is_refused() -> None:
    with pytest.raises(ValueError, match="'amx' is not available on this machine"):
        Linear(16, 64, Format(4, 32, 8)).run("amx", rows(16, 64))
