"""The AMX kernels on emulated tiles, and on real ones where there are any: int8 bit for bit as the vector
kernels, bf16 as an emulation written here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from gristmill.backends.native import _native
from gristmill.formats import fp8, group_int
from gristmill.formats.packed import decode_f32
from tests.kits import levels

BASE = "avx512bf16"
EMULATED = levels.emulated()
TILED = ["amx_emulated"] + (["amx"] if "amx" in _native.available_levels() else [])
NEEDS_AVX512 = pytest.mark.skipif(
    not EMULATED, reason="the emulated tiles need AVX-512 with VNNI, BF16 and VBMI"
)
Arrays = NDArray[np.uint8]


@dataclass(frozen=True)
class Format:
    """How a weight is stored; group 0 is the whole row, bits 0 is 2:4 sparse."""

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
    Format(8, 72, 128),  # large, but no whole steps of 32 columns
    Format(8, 64, 255, mins=True),
    Format(8, 128, 128, wide=True, mins=True),
    Format(8, 0, 128, wide=True),
    Format(8, 0, 0, mins=True),
    Format(2, 16, 0, wide=True, mins=True),
    Format(3, 128, 4),
    Format(5, 32, 0, mins=True),
    Format(6, 64, 32),
    Format(6, 0, 32),
    Format(0, 32, 8),
    Format(0, 128, 8, wide=True),
]
STORAGE = {0: _native.Storage.SPARSE24} | {bits: _native.Storage[f"INT{bits}"] for bits in (2, 3, 4, 5, 6, 8)}


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
        unit = {2: 16, 3: 32, 5: 32, 6: 16, 0: 32}.get(f.bits, 8)
        self.group = f.group or -(-self.k // unit) * unit
        self.groups = -(-self.k // self.group)
        self.kp = -(-self.k // unit) * unit if self.ragged else self.groups * self.group
        blocks = -(-self.n // 16)
        self.codes: Arrays = rng.integers(0, 256, blocks * self.kp * 2 * (f.bits or 3), dtype=np.uint8)
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
        *,
        blocks: tuple[int, int] | None = None,
        arithmetic: str = "int8",
    ) -> NDArray[np.float32]:
        f, none = self.format, np.zeros(0, np.float32)
        # Poisoned: an element that was not written, or a guard column that was, is seen.
        out = np.full((len(x), self.n + 3), np.nan, np.float32)
        if into is not None:
            out[:, : self.n] = into
        mins = self.mins.reshape(-1).view(np.uint8) if f.mins else np.zeros(0, np.uint8)
        storage = STORAGE[f.bits]
        shape = (self.n, self.k, self.kp, self.group, self.groups, f.offset, f.wide, -1, False)
        arrays = (self.codes, self.scales.reshape(-1).view(np.uint8), mins)
        begin, end = blocks or (0, -(-self.n // 16))
        rest = (self.bias if bias else none, into is not None, out, begin, end)
        _native.linear(level, arithmetic, storage, *shape, *arrays, x, *rest)
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
            # Few rows, where groups are whole steps: one tile high and two.
            for count in (37, 9, 16, 17, 24):
                x = rows(count, k)
                same(linear.run(level, x), linear.run(BASE, x), f"{count} rows, {n}x{k} ragged={ragged}")


@NEEDS_AVX512
@pytest.mark.parametrize("level", TILED)
def test_any_number_of_rows(level: str) -> None:
    for format in (Format(4, 32, 8), Format(8, 64, 32, mins=True), Format(4, 64, 8), Format(3, 128, 4)):
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
    for format in (*FORMATS[1:4], Format(4, 64, 8), Format(4, 192, 8, mins=True)):
        linear = Linear(35, 192, format)
        for count in (37, 20, 12):
            x = rows(count, 192)
            into = np.random.default_rng(5).standard_normal((count, 35)).astype(np.float32)
            for bias in (False, True):
                same(linear.run(level, x, bias, into), linear.run(BASE, x, bias, into), f"bias={bias}")
                same(linear.run(level, x, bias), linear.run(BASE, x, bias), f"bias={bias}")


@NEEDS_AVX512
@pytest.mark.parametrize("level", TILED)
def test_blocks_are_independent(level: str) -> None:
    for format, count in ((Format(4, 32, 8), 33), (Format(4, 64, 8), 12), (Format(8, 64, 32, mins=True), 20)):
        linear = Linear(100, 64, format)
        x = rows(count, 64)
        whole = linear.run(BASE, x)
        for begin, end in [(0, 1), (1, 4), (2, 7), (1, 3), (6, 7), (3, 3)]:
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
            x = np.full((32, 4096), -3.0, np.float32)
            same(linear.run(level, x), linear.run(BASE, x))


@NEEDS_AVX512
def test_against_float64() -> None:
    # Not only equal to each other: right. Eight-bit codes, whose layout is easily undone.
    f = Format(8, 64, 128)
    linear = Linear(40, 192, f)
    x = rows(40, 192)
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
@pytest.mark.parametrize("level", TILED)
@pytest.mark.parametrize("rounded", [True, False])
def test_e4m3_rows_and_scales(level: str, rounded: bool) -> None:
    """The E4M3 values of a row in the order of the tiles, times the row's scale, then bias and residual."""
    rng = np.random.default_rng(13)
    for n, k, group in [(33, 64, 32), (17, 200, 32), (48, 328, 16)]:
        packed = group_int.pack(
            rng.integers(0, 16, (n, k)).astype(np.uint8),
            rng.integers(0, 127, (n, -(-k // group))).astype(np.uint8),
            bits=4,
            group=group,
            offset=8,
            exponent=9,
            rounded=rounded,
        )
        x = rows(37, k)
        top = np.abs(x).max(axis=1, keepdims=True)
        scale = np.where(top > 0, top / np.float32(448), np.float32(1))
        with np.errstate(divide="ignore", invalid="ignore"):
            values = fp8.round_e4m3(np.where(top > 0, x * (np.float32(448) / top), np.float32(0)))
        expected = tiles_bf16(values, decode_f32(packed)) * scale
        spec = packed.spec
        bias = rng.standard_normal(n).astype(np.float32)
        into = rng.standard_normal((37, n)).astype(np.float32)
        args = (_native.Storage.INT4, n, k, spec.columns, group, spec.groups, 8, False, 9, rounded)
        arrays = [packed.arrays[a].reshape(-1).view(np.uint8) for a in ("codes", "scales")]
        for count in (1, 15, 16, 17, 37):
            out = into[:count].copy()
            rest = (np.ascontiguousarray(x[:count]), bias, True, out, 0, -(-n // 16))
            _native.linear(level, "fp8", *args, *arrays, np.zeros(0, np.uint8), *rest)
            same(out, into[:count] + (expected[:count] + bias), f"{n}x{k} {count} rows")


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


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    bits = x.view(np.uint32).astype(np.uint64)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32) << 16).view(np.float32)


def flush(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def fma(a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]) -> NDArray[np.float32]:
    # Products of bf16 are exact in float64; their sum with a float32 is rounded twice, which shows in no bit
    # that these tests meet.
    return flush((a.astype(np.float64) * b + c).astype(np.float32))


def tiles_bf16(x: NDArray[np.float32], w: NDArray[np.float32]) -> NDArray[np.float32]:
    """x [rows, k] times w [n, k], both bf16 values, in the order of TDPBF16PS."""
    rows, k, n = len(x), x.shape[1], len(w)
    steps = -(-k // 32)
    xs, ws = np.zeros((rows, 32 * steps), np.float32), np.zeros((n, 32 * steps), np.float32)
    xs[:, :k], ws[:, :k] = flush(x), flush(w)
    total = np.zeros((rows, n), np.float32)
    for s in range(steps):
        part = np.zeros((2, rows, n), np.float32)
        for c in range(32):
            column = 32 * s + c
            part[c % 2] = fma(xs[:, None, column], ws[None, :, column], part[c % 2])
        total = flush(total + flush(part[0] + part[1]))
    return total


@NEEDS_AVX512
@pytest.mark.parametrize("level", TILED)
@pytest.mark.parametrize("format", [f for f in FORMATS if f.offset <= 128], ids=str)
def test_bf16_in_the_order_of_the_tiles(level: str, format: Format) -> None:
    for n, k in [(33, 64), (17, 200), (16, 8), (48, 328)]:
        for ragged in {False, format.group > 0 and k % format.group != 0}:
            linear = Linear(n, k, format, ragged=ragged)
            if linear.group >= 64 and (linear.group % 32 == 0 or linear.groups == 1):
                continue  # its codes are multiplied: test_linear.py
            x = rows(37, k)
            w = np.empty((n, k), np.float32)
            mins = linear.mins.reshape(-1).view(np.uint8) if format.mins else np.zeros(0, np.uint8)
            storage = STORAGE[format.bits]
            shape = (n, k, linear.kp, linear.group, linear.groups, format.offset, format.wide, -1, False)
            for row in range(n):
                scales = linear.scales.reshape(-1).view(np.uint8)
                _native.decode_row(BASE, storage, *shape, linear.codes, scales, mins, row, w[row])
            expected = tiles_bf16(to_bf16(x), to_bf16(w))
            found = linear.run(level, x, arithmetic="bf16")
            same(found, expected, f"{n}x{k} ragged={ragged}")
            for count in (1, 2, 15, 16, 17, 31, 32, 33):
                few = linear.run(level, np.ascontiguousarray(x[:count]), arithmetic="bf16")
                same(few, expected[:count], f"{count} rows")
            into = np.random.default_rng(5).standard_normal((37, n)).astype(np.float32)
            same(linear.run(level, x, True, into, arithmetic="bf16"), into + (expected + linear.bias))


@NEEDS_AVX512
@pytest.mark.parametrize("level", TILED)
@pytest.mark.parametrize("storage", ["F32", "BF16", "F16"])
def test_bf16_of_float_weights(level: str, storage: str) -> None:
    rng = np.random.default_rng(7)
    for n, k in [(16, 32), (33, 100), (40, 576), (16, 2)]:
        x = rows(19, k)
        w = to_bf16(rng.standard_normal((n, k)).astype(np.float32))
        blocks = -(-n // 16)
        padded = np.zeros((blocks * 16, k), np.float32)
        padded[:n] = w
        lanes = padded.reshape(blocks, 16, k)
        if storage == "F32":
            values: NDArray[np.generic] = np.ascontiguousarray(lanes.transpose(0, 2, 1))
        else:
            pairs = np.ascontiguousarray(lanes.reshape(blocks, 16, k // 2, 2).transpose(0, 2, 1, 3))
            values = (pairs.view(np.uint32) >> 16).astype(np.uint16) if storage == "BF16" else pairs
            if storage == "F16":
                values = pairs.astype(np.float16)
                w = to_bf16(lanes.astype(np.float16).astype(np.float32)).reshape(blocks * 16, k)[:n]
        none = np.zeros(0, np.uint8)
        arrays = (values.reshape(-1).view(np.uint8), none, none)
        expected = tiles_bf16(to_bf16(x), w)
        for count in (1, 16, 19):
            out = np.full((count, n), np.nan, np.float32)
            _native.linear(
                level,
                "bf16",
                getattr(_native.Storage, storage),
                n,
                k,
                k,
                0,
                0,
                0,
                False,
                -1,
                False,
                *arrays,
                np.ascontiguousarray(x[:count]),
                np.zeros(0, np.float32),
                False,
                out,
                0,
                blocks,
            )
            same(out, expected[:count], f"{storage} {n}x{k}, {count} rows")


@NEEDS_AVX512
@pytest.mark.parametrize("level", TILED)
def test_hard_sums(level: str) -> None:
    # Cancellation, and what is denormal before, within and after a sum.
    rng = np.random.default_rng(11)
    k = 96
    w = to_bf16((rng.standard_normal((16, k)) * 2.0 ** rng.integers(-100, 100, (16, k))).astype(np.float32))
    x = to_bf16((rng.standard_normal((5, k)) * 2.0 ** rng.integers(-60, 26, (5, k))).astype(np.float32))
    x[0, ::2], x[0, 1::2] = 1.0, -1.0
    x[1] = 1e-39
    x[2] *= np.float32(2.0**-60)
    pairs = np.ascontiguousarray(w.reshape(1, 16, k // 2, 2).transpose(0, 2, 1, 3))
    values = (pairs.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
    none = np.zeros(0, np.uint8)
    out = np.full((5, 16), np.nan, np.float32)
    rest = (np.zeros(0, np.float32), False, out, 0, 1)
    _native.linear(
        level, "bf16", _native.Storage.BF16, 16, k, k, 0, 0, 0, False, -1, False, values, none, none, x, *rest
    )
    # Zeros may differ in sign: a bias of 0 is added.
    np.testing.assert_array_equal(out, tiles_bf16(x, w))
    assert (out[1] == 0).all()
    assert np.isfinite(out).all()
