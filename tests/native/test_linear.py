"""Linears of every storage, arithmetic and level against float64, and bit for bit against each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from gristmill.backends.native import _native
from gristmill.formats import fp8, group_int, sparse24
from gristmill.formats.packed import Packed, PackedSpec, decode
from tests.kits import levels

LEVELS = _native.available_levels()
# With matrix tiles, which are emulated where there are none.
TILED = [
    *levels.emulated(),
    *(level for level in LEVELS if level == "amx"),
]
SHAPES = [(1, 1), (16, 32), (17, 40), (192, 576), (33, 100), (64, 1536)]
FORMATS = {
    "f32": PackedSpec("f32", (1, 1)),
    "bf16": PackedSpec("bf16", (1, 1)),
    "f16": PackedSpec("f16", (1, 1)),
    "q4": PackedSpec("group_int", (1, 1), 4, 32, 8, "f16", False),
    "q4_min": PackedSpec("group_int", (1, 1), 4, 32, 0, "f16", True),
    "q4_g64": PackedSpec("group_int", (1, 1), 4, 64, 8, "f16", False),
    "q4_wide": PackedSpec("group_int", (1, 1), 4, 16, 0, "f32", True),
    "q8": PackedSpec("group_int", (1, 1), 8, 64, 128, "f16", False),
    "q8_g32": PackedSpec("group_int", (1, 1), 8, 32, 128, "f16", False),
    "q8_min": PackedSpec("group_int", (1, 1), 8, 32, 0, "f16", True),
    "q8_wide": PackedSpec("group_int", (1, 1), 8, 16, 32, "f32", False),
    "q8_row": PackedSpec("group_int", (1, 1), 8, 8, 128, "f32", False),  # the group becomes the whole row
    "q4_g128": PackedSpec("group_int", (1, 1), 4, 128, 8, "f16", False),  # the last group is cut
    "q2": PackedSpec("group_int", (1, 1), 2, 16, 0, "f32", True),
    "q2_g64": PackedSpec("group_int", (1, 1), 2, 64, 2, "f16", False),
    "q3": PackedSpec("group_int", (1, 1), 3, 32, 4, "f16", False),
    "q3_g128": PackedSpec("group_int", (1, 1), 3, 128, 0, "f16", True),
    "q5": PackedSpec("group_int", (1, 1), 5, 32, 16, "f16", False),
    "q5_row": PackedSpec("group_int", (1, 1), 5, 32, 0, "f32", True),
    "q6": PackedSpec("group_int", (1, 1), 6, 128, 32, "f16", False),
    "q6_g16": PackedSpec("group_int", (1, 1), 6, 16, 32, "f32", False),
    "q6_min": PackedSpec("group_int", (1, 1), 6, 32, 0, "f16", True),
    "q4_e4m3": PackedSpec("group_int", (1, 1), 4, 64, 8, "e4m3", False, 3, True),
    "q4_e4m3_products": PackedSpec("group_int", (1, 1), 4, 128, 8, "e4m3", False, 14, False),
    "q4_e4m3_low": PackedSpec("group_int", (1, 1), 4, 32, 8, "e4m3", False, 9, True),  # no product above 448
    "q4_e4m3_offset": PackedSpec("group_int", (1, 1), 4, 32, 3, "e4m3", False, 9, True),
    "q4_e4m3_g64_low": PackedSpec("group_int", (1, 1), 4, 64, 8, "e4m3", False, 9, True),
    "q4_e4m3_7_low": PackedSpec("group_int", (1, 1), 4, 96, 7, "e4m3", False, 9, True),
    "q4_e4m3_3_low": PackedSpec("group_int", (1, 1), 4, 64, 3, "e4m3", False, 9, True),
    "q6_e4m3_g64": PackedSpec("group_int", (1, 1), 6, 64, 32, "e4m3", False, 2, True),
    "q6_e4m3": PackedSpec("group_int", (1, 1), 6, 16, 32, "e4m3", False, 0, True),
    "sparse24": PackedSpec("sparse24", (1, 1), 4, 64, 8, "f16", False),
    "sparse24_row": PackedSpec("sparse24", (1, 1), 4, 32, 8, "f32", False),
}
INTEGER = ("group_int", "sparse24")


def arithmetics(spec: PackedSpec) -> tuple[str, ...]:
    """Codes under float scales are multiplied as integers, too."""
    floats = ("f32", "bf16", "fp8")
    return (*floats, "int8") if spec.format in INTEGER and spec.scales != "e4m3" else floats


@dataclass
class Case:
    """A random packed weight with the arguments that the kernel bindings take."""

    packed: Packed
    args: tuple[object, ...]


def make(name: str, n: int, k: int, seed: int = 0) -> Case:
    rng = np.random.default_rng([seed, n, k, *name.encode()])
    base = FORMATS[name]
    group = -(-k // base.group) * base.group if name.endswith("_row") else base.group
    spec = replace(base, shape=(n, k), group=group)
    arrays: dict[str, NDArray[np.generic]] = {}
    for array, (_, shape) in spec.arrays().items():
        if array == "codes":
            arrays[array] = rng.integers(0, 256, shape).astype(np.uint8)
        elif array == "values":
            values = rng.standard_normal(shape).astype(np.float32)
            # Padding rows and columns are zero, as the formats promise.
            if base.format == "f32":
                arrays[array] = values
            elif base.format == "f16":
                arrays[array] = values.astype(np.float16)
            else:
                arrays[array] = (values.view(np.uint32) >> 16).astype(np.uint16)
        elif spec.scales == "e4m3":
            # Of sixteen rows one at least is likely to have a product above 448, unless scales are kept low.
            most = 103 if name.endswith("_low") else 127
            arrays[array] = rng.integers(0, most, shape).astype(np.uint8)
        else:
            values = rng.standard_normal(shape) * 0.1
            arrays[array] = values.astype(np.float16 if spec.scales == "f16" else np.float32)
    packed = Packed(spec, arrays)
    empty = np.zeros(0, np.uint8)

    def flat(a: str) -> NDArray[np.uint8]:
        return arrays[a].reshape(-1).view(np.uint8) if a in arrays else empty

    integer = spec.format in INTEGER
    storage = _native.Storage[f"INT{spec.bits}" if spec.format == "group_int" else spec.format.upper()]
    values = flat("codes" if integer else "values")
    args = (storage, n, k, spec.columns, spec.group, spec.groups, spec.offset, spec.scales == "f32")
    args += (spec.exponent if spec.scales == "e4m3" else -1, spec.rounded)
    return Case(packed, (*args, values, flat("scales"), flat("mins")))


def run(
    level: str,
    arithmetic: str,
    case: Case,
    x: NDArray[np.float32],
    *,
    bias: NDArray[np.float32] | None = None,
    into: NDArray[np.float32] | None = None,
    blocks: tuple[int, int] | None = None,
) -> NDArray[np.float32]:
    n = case.packed.shape[0]
    # Poisoned: an element that no kernel wrote fails the comparison; the guard columns must stay as they are.
    out = np.full((x.shape[0], n + 5), np.nan, np.float32)
    if into is not None:
        out[:, :n] = into
    none = np.zeros(0, np.float32)
    begin, end = blocks or (0, -(-n // 16))
    _native.linear(
        level,
        arithmetic,
        *case.args,
        x,
        none if bias is None else bias,
        into is not None,
        out,
        begin,
        end,
    )
    assert np.isnan(out[:, n:]).all(), "wrote past the end of a row"
    return out[:, :n]


def encoded(x: NDArray[np.float32], group: int) -> NDArray[np.float64]:
    """x after int8 encoding with groups of `group` columns, in float64: the definition, written plainly."""
    out = np.zeros(x.shape, np.float64)
    for r, g in itertools.product(range(x.shape[0]), range(0, x.shape[1], group)):
        part = x[r, g : g + group]
        top = np.float32(np.abs(part).max())
        if top > 1e-30:
            q = np.rint(part * (np.float32(127) / top))
            out[r, g : g + group] = q.astype(np.float64) * np.float64(top / np.float32(127))
    return out


def e4m3_rows(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """x after the encoding of a row to E4M3, in float64."""
    top = np.abs(x).max(axis=1, keepdims=True, initial=0)
    values = fp8.round_e4m3(x * (np.float32(448) / np.maximum(top, np.float32(1e-30))))
    return values.astype(np.float64) * (top / np.float32(448))


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32) << 16
    return rounded.view(np.float32)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", FORMATS)
def test_against_float64(level: str, name: str) -> None:
    for (n, k), rows in itertools.product(SHAPES, (0, 1, 5)):
        case = make(name, n, k)
        x = np.random.default_rng(rows).standard_normal((rows, k)).astype(np.float32)
        w = decode(case.packed)
        kinds = {"f32": (x.astype(np.float64), w, 2.0**-23 * k)}
        # Codes meet bf16 rows as they are, but at amx, where weights are rounded to bf16.
        integer = case.packed.format in INTEGER
        bf16_w = w if integer and level != "amx" else to_bf16(w.astype(np.float32)).astype(np.float64)
        kinds["bf16"] = (to_bf16(x).astype(np.float64), bf16_w, 2.0**-23 * k)
        kinds["fp8"] = (e4m3_rows(x), bf16_w, 2.0**-23 * k)
        if "int8" in arithmetics(case.packed.spec):
            kinds["int8"] = (encoded(x, case.packed.group), w, 2.0**-22 * (case.packed.groups + 4))
        for arithmetic, (xs, ws, epsilon) in kinds.items():
            expected = xs @ ws.T
            bound = (np.abs(xs) @ np.abs(ws).T) * epsilon + 1e-30
            # The f32 decode rounds scale * code + min once or twice before the product.
            slack = (np.abs(xs) @ np.ones_like(ws).T) * np.abs(ws).max(initial=0) * 2.0**-22
            if case.packed.spec.mins:
                bound = bound + slack * 8
            exact = case.packed.spec.scales == "e4m3" and case.packed.bits == 4
            if exact:
                assert np.array_equal(bf16_w, w)
            if arithmetic in ("bf16", "fp8") and integer and level == "amx" and not exact:
                bound = (
                    bound + (np.abs(xs) @ np.abs(ws).T) * 2.0**-8
                )  # a decoded value may round the other way
            got = run(level, arithmetic, case, x)
            assert got.shape == expected.shape
            np.testing.assert_array_less(
                np.abs(got - expected), bound + slack, err_msg=f"{arithmetic} {n}x{k}"
            )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("arithmetic", ["int8", "bf16", "f32", "fp8"])
def test_same_bits_on_every_level(name: str, arithmetic: str) -> None:
    case = make(name, 100, 224)
    if arithmetic not in arithmetics(case.packed.spec):
        return
    x = np.random.default_rng(1).standard_normal((7, 224)).astype(np.float32)
    # The matrix tiles have an order of their own for bf16: test_amx.py.
    levels = [level for level in LEVELS if level != "amx" or arithmetic not in ("bf16", "fp8")]
    results = {level: run(level, arithmetic, case, x) for level in levels}
    for level, got in results.items():
        np.testing.assert_array_equal(got, results["portable"], err_msg=level)


def numbers_of(packed: Packed) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """What bf16 rows are multiplied by [N, K], and what a group's sum is, [N, G]: scales and minimums."""
    spec, mins = packed.spec, None
    if spec.format == "sparse24":
        codes, _, scales = sparse24.unpack(packed)
    else:
        codes, scales, mins = group_int.unpack(packed)
    numbers = codes.astype(np.float32) - np.float32(spec.offset)
    if spec.scales == "e4m3":
        scales = fp8.decode(scales)
        if spec.rounded:
            power = np.where(scales > 0, np.exp2(np.floor(np.log2(np.maximum(scales, 2.0**-9)))), 0)
            base = np.maximum(scales, 2.0**-9)
            per_column = np.repeat(base, spec.group, axis=1)[:, : spec.shape[1]]
            powers = np.repeat(np.exp2(np.floor(np.log2(base))), spec.group, axis=1)[:, : spec.shape[1]]
            numbers = fp8.round_e4m3(per_column * numbers) / powers
            scales = power
        scales = scales * np.float32(2.0**-spec.exponent)
    scales = scales.astype(np.float32)
    mins = np.zeros_like(scales) if mins is None else mins.astype(np.float32)
    return numbers.astype(np.float32), scales, mins


def fma(a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]) -> NDArray[np.float32]:
    # The product is exact in float64 (24 bits by 24 at most); its sum with a float32 is rounded twice, which
    # shows in no bit that these tests meet.
    return (a.astype(np.float64) * b + c).astype(np.float32)


def one_chain(x: NDArray[np.float32], numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """x [rows, K] times numbers [N, K] of one group: of every four columns 2, 0, 3, 1."""
    dot = np.zeros((len(x), len(numbers)), np.float32)
    for c in range(0, x.shape[1], 4):
        for column in (c + 2, c, c + 3, c + 1):
            if column < x.shape[1]:
                dot = fma(x[:, None, column], numbers[None, :, column], dot)
    return dot


def steps_of_tiles(x: NDArray[np.float32], numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same as TDPBF16PS sums: two chains in 32 columns, of every four columns 0 and 1, and 2 and 3."""
    dot = np.zeros((len(x), len(numbers)), np.float32)
    for step in range(0, x.shape[1], 32):
        chains = np.zeros((2, *dot.shape), np.float32)
        for column in range(step, min(step + 32, x.shape[1])):
            chain = column % 4 // 2
            chains[chain] = fma(x[:, None, column], numbers[None, :, column], chains[chain])
        dot += chains[0] + chains[1]
    return dot


def in_order(
    x: NDArray[np.float32],
    packed: Packed,
    dot_of: Callable[[NDArray[np.float32], NDArray[np.float32]], NDArray[np.float32]] = one_chain,
) -> NDArray[np.float32]:
    """x [rows, K], bf16 values, times integer weights: docs/arithmetic.md, written plainly."""
    numbers, scales, mins = numbers_of(packed)
    (n, k), group = packed.shape, packed.group
    y = np.zeros((len(x), n), np.float32)
    for g in range(packed.groups):
        columns = slice(g * group, min((g + 1) * group, k))
        y = fma(scales[None, :, g], dot_of(x[:, columns], numbers[:, columns]), y)
        if packed.spec.mins:
            chains = np.zeros((len(x), 16), np.float32)
            for c in range(columns.start, columns.stop):
                chains[:, (c - columns.start) % 16] += x[:, c]
            for half in (8, 4, 2, 1):
                chains = chains[:, :half] + chains[:, half:]
            y = fma(mins[None, :, g], chains, y)
    return y


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "amx"])
@pytest.mark.parametrize("name", [name for name, spec in FORMATS.items() if spec.format in INTEGER])
def test_codes_meet_bf16_rows_in_this_order(level: str, name: str) -> None:
    for n, k in [(100, 224), (33, 75), (16, 600)]:
        case = make(name, n, k)
        x = np.random.default_rng(9).standard_normal((37, k)).astype(np.float32)
        expected = in_order(to_bf16(x), case.packed)
        for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 24, 37):
            got = run(level, "bf16", case, np.ascontiguousarray(x[:rows]))
            np.testing.assert_array_equal(got, expected[:rows], err_msg=f"{n}x{k} {rows} rows")


def meets_tiles_as_codes(spec: PackedSpec) -> bool:
    """Whether tiles multiply a weight's codes, with scales per group, or its values rounded to bf16."""
    return spec.group >= 64 and (spec.group % 32 == 0 or spec.groups == 1)


@pytest.mark.parametrize("level", TILED)
@pytest.mark.parametrize("name", [name for name, spec in FORMATS.items() if spec.format in INTEGER])
def test_codes_of_large_groups_meet_tiles_in_this_order(level: str, name: str) -> None:
    for n, k in [(100, 224), (33, 75), (16, 600), (65, 1056), (70, 64)]:
        case = make(name, n, k)
        if not meets_tiles_as_codes(case.packed.spec):
            continue
        x = np.random.default_rng(9).standard_normal((37, k)).astype(np.float32)
        expected = in_order(to_bf16(x), case.packed, steps_of_tiles)
        into = np.random.default_rng(5).standard_normal((37, n)).astype(np.float32)
        bias = np.random.default_rng(6).standard_normal(n).astype(np.float32)
        for rows in (1, 2, 15, 16, 17, 32, 37):
            part = np.ascontiguousarray(x[:rows])
            got = run(level, "bf16", case, part)
            np.testing.assert_array_equal(got, expected[:rows], err_msg=f"{n}x{k} {rows} rows")
            got = run(level, "bf16", case, part, bias=bias, into=into[:rows])
            np.testing.assert_array_equal(got, into[:rows] + (expected[:rows] + bias))
        top = np.abs(x).max(axis=1, keepdims=True)
        values, scale = fp8.round_e4m3(x * (np.float32(448) / top)), top / np.float32(448)
        got = run(level, "fp8", case, x, bias=bias, into=into)
        np.testing.assert_array_equal(
            got, into + (in_order(values, case.packed, steps_of_tiles) * scale + bias)
        )
        if n <= 16:
            continue
        some = run(level, "bf16", case, x, blocks=(1, 2))
        np.testing.assert_array_equal(some[:, 16:32], expected[:, 16:32])
        assert np.isnan(some[:, :16]).all()
        assert np.isnan(some[:, 32:]).all()


@pytest.mark.parametrize("level", TILED)
@pytest.mark.parametrize("name", [name for name, spec in FORMATS.items() if spec.format in INTEGER])
def test_numbers_of_all_sizes_alone_and_in_company(level: str, name: str) -> None:
    """Tiles take denormal numbers for zero: one row, which needs no tiles, must have the same bits.

    And overflow where those do.
    """
    case = make(name, 48, 192)
    rng = np.random.default_rng(12)
    for exponent in (-20, -90, -97, -110, -118, -126, -131, 90, 96, 110, 118, 124):
        x = (rng.standard_normal((20, 192)) * 2.0**exponent).astype(np.float32)
        x[5, ::3] = 0
        x[6, 7:] *= np.float32(2.0 ** min(-exponent, 100))  # few of them are small, or large
        whole = run(level, "bf16", case, x)
        for row in range(20):
            np.testing.assert_array_equal(run(level, "bf16", case, x[row : row + 1])[0], whole[row])


@pytest.mark.parametrize("level", LEVELS + TILED[:1])
@pytest.mark.parametrize(("bits", "group", "k"), [(4, 24, 32), (8, 40, 32), (4, 24, 160), (4, 64, 96)])
def test_a_row_of_no_numbers_stays_alone(level: str, bits: int, group: int, k: int) -> None:
    """Also where what is stored of a row ends behind its last column."""
    rng = np.random.default_rng(4)
    packed = group_int.pack(
        rng.integers(0, 1 << bits, (20, k)).astype(np.uint8),
        np.full((20, -(-k // group)), 0.1, np.float16),
        bits=bits,
        group=group,
        offset=1 << (bits - 1),
    )
    spec = packed.spec
    shape = (20, k, spec.columns, group, spec.groups, spec.offset, False, -1, False)
    arrays = [packed.arrays[a].reshape(-1).view(np.uint8) for a in ("codes", "scales")]
    case = Case(packed, (_native.Storage[f"INT{bits}"], *shape, *arrays, np.zeros(0, np.uint8)))
    x = rng.standard_normal((33, k)).astype(np.float32)
    whole = run(level, "bf16", case, x)
    x[5], x[17] = np.nan, np.inf
    got = run(level, "bf16", case, x)
    others = [row for row in range(33) if row not in (5, 17)]
    np.testing.assert_array_equal(got[others], whole[others])
    assert not np.isfinite(got[[5, 17]]).any()


@pytest.mark.parametrize("level", TILED)
def test_more_bf16_rows_than_a_panel_of_tiles(level: str) -> None:
    case = make("q4_g128", 17, 1536)  # of which half a megabyte holds 160 rows
    x = np.random.default_rng(10).standard_normal((333, 1536)).astype(np.float32)
    expected = in_order(to_bf16(x), case.packed, steps_of_tiles)
    np.testing.assert_array_equal(run(level, "bf16", case, x), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_more_bf16_rows_than_a_panel(level: str) -> None:
    case = make("q4_min", 40, 64)
    x = np.random.default_rng(10).standard_normal((401, 64)).astype(np.float32)
    bias = np.random.default_rng(11).standard_normal(40).astype(np.float32)
    for arithmetic in ("bf16", "fp8"):
        whole = run(level, arithmetic, case, x, bias=bias)
        for begin, end in [(0, 1), (190, 194), (191, 392), (393, 401)]:
            part = run(level, arithmetic, case, np.ascontiguousarray(x[begin:end]), bias=bias)
            np.testing.assert_array_equal(part, whole[begin:end], err_msg=f"{arithmetic} rows {begin}:{end}")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_its_company(level: str, name: str) -> None:
    case = make(name, 50, 288)
    x = np.random.default_rng(2).standard_normal((37, 288)).astype(np.float32)
    for arithmetic in arithmetics(case.packed.spec):
        whole = run(level, arithmetic, case, x)
        for begin, end in [(0, 1), (36, 37), (0, 2), (1, 4), (3, 9), (5, 17), (0, 16), (10, 22)]:
            part = run(level, arithmetic, case, np.ascontiguousarray(x[begin:end]))
            np.testing.assert_array_equal(part, whole[begin:end], err_msg=f"{arithmetic} rows {begin}:{end}")


def test_bias_and_accumulation() -> None:
    level = LEVELS[-1]
    rng = np.random.default_rng(3)
    for name, arithmetic in [("q4", "int8"), ("bf16", "bf16"), ("f32", "f32"), ("q4_e4m3", "fp8")]:
        case = make(name, 35, 64)
        # Of 7 and 23 rows some are computed twice by int8's tiles; they must be added once.
        for rows in (3, 7, 23):
            x = rng.standard_normal((rows, 64)).astype(np.float32)
            bias = rng.standard_normal(35).astype(np.float32)
            start = rng.standard_normal((rows, 35)).astype(np.float32)
            plain = run(level, arithmetic, case, x)
            np.testing.assert_array_equal(run(level, arithmetic, case, x, bias=bias), plain + bias)
            np.testing.assert_array_equal(run(level, arithmetic, case, x, into=start), start + plain)


@pytest.mark.parametrize("level", list(dict.fromkeys(LEVELS + TILED)))
@pytest.mark.parametrize("name", FORMATS)
def test_any_cut_of_the_blocks_gives_the_same(level: str, name: str) -> None:
    """Threads take ranges of blocks, as they come: of fours, twos or single ones."""
    case = make(name, 16 * 11 + 3, 160)
    x = np.random.default_rng(4).standard_normal((37, 160)).astype(np.float32)
    for arithmetic in arithmetics(case.packed.spec):
        for rows in (1, 3, 5, 12, 20, 25, 37):
            part = np.ascontiguousarray(x[:rows])
            whole = run(level, arithmetic, case, part)
            for begin, end in [(0, 4), (4, 12), (8, 12), (2, 7)]:
                got = run(level, arithmetic, case, part, blocks=(begin, end))
                columns = slice(16 * begin, 16 * end)
                np.testing.assert_array_equal(
                    got[:, columns], whole[:, columns], err_msg=f"{arithmetic} {rows} rows {begin}:{end}"
                )
                assert np.isnan(got[:, : 16 * begin]).all()
                assert np.isnan(got[:, 16 * end :]).all()


def test_extreme_activations() -> None:
    case = make("q4", 16, 64)
    x = np.zeros((3, 64), np.float32)
    x[1, 0] = 1e-40  # a denormal group encodes to zero
    x[2, :32] = 3e38
    for level in LEVELS:
        got = run(level, "int8", case, x)
        assert np.array_equal(got[:2], np.zeros((2, 16)))
        assert np.isfinite(got[2]).all() or np.isinf(got[2]).any()
        assert not np.isnan(got[2]).all()


@pytest.mark.parametrize("name", [name for name, spec in FORMATS.items() if "int8" in arithmetics(spec)])
def test_largest_sums(name: str) -> None:
    """Every code and every activation at its end: nothing saturates, at no level."""
    case = make(name, 16, 256)
    x = np.full((3, 256), -2.0, np.float32)
    x[1] = 2.0
    x[2, ::2] = 2.0
    for byte in (0x00, 0xFF, 0x5A):
        case.packed.arrays["codes"][:] = byte
        case.packed.arrays["codes"][:, 2::3] = 0x15 if case.packed.format == "sparse24" else byte
        w = decode(case.packed)
        for level in LEVELS:
            got = run(level, "int8", case, x)
            np.testing.assert_allclose(got, x.astype(np.float64) @ w.T, rtol=1e-4, atol=1e-2, err_msg=level)


@pytest.mark.parametrize("name", ["sparse24", "sparse24_row"])
@pytest.mark.parametrize("arithmetic", ["int8", "bf16", "f32"])
def test_what_is_not_kept_adds_exactly_nothing(name: str, arithmetic: str) -> None:
    case = make(name, 32, 192)
    case.packed.arrays["codes"][:, 2::3] = 0  # columns 0 and 1 of every four
    x = np.random.default_rng(8).standard_normal((3, 192)).astype(np.float32)
    kept = np.arange(192) % 4 < 2
    # The codes of activations depend on the largest in a group: it stays, and the others become zero.
    x[:, ::32] = 9
    alone = np.where(kept, x, 0).astype(np.float32)
    for level in LEVELS:
        np.testing.assert_array_equal(
            run(level, arithmetic, case, x), run(level, arithmetic, case, alone), err_msg=level
        )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rounded", [True, False])
def test_every_scale_and_code(level: str, rounded: bool) -> None:
    """All E4M3 scales with all codes of four bits decode exactly, whatever the power of two."""
    codes = np.tile(np.arange(16, dtype=np.uint8), (127, 1))
    scales = np.arange(127, dtype=np.uint8)[:, None]
    for exponent in (0, 5, 14):
        packed = group_int.pack(codes, scales, bits=4, group=16, offset=8, exponent=exponent, rounded=rounded)
        expected = decode(packed)
        products = np.arange(-8, 8) * fp8.decode(scales).astype(np.float64)
        if rounded:
            products = fp8.round_e4m3(products)
        assert np.array_equal(expected, products / 2**exponent)
        arrays = [packed.arrays[a].reshape(-1).view(np.uint8) for a in ("codes", "scales")]
        args = (_native.Storage.INT4, 127, 16, 16, 16, 1, 8, False, exponent, rounded, *arrays)
        none = np.zeros(0, np.uint8)
        for row in range(127):
            out = np.full(16, np.nan, np.float32)
            _native.decode_row(level, *args, none, row, out)
            assert np.array_equal(out, expected[row])
        # A unit matrix brings every weight out through the products.
        for arithmetic in ("f32", "bf16"):
            out = np.full((16, 127), np.nan, np.float32)
            rest = (np.eye(16, dtype=np.float32), np.zeros(0, np.float32), False, out, 0, 8)
            _native.linear(level, arithmetic, *args, none, *rest)
            assert np.array_equal(out.T, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_decode_row(name: str) -> None:
    case = make(name, 37, 72)
    expected = decode(case.packed)
    for level, row in itertools.product(LEVELS, (0, 15, 16, 36)):
        out = np.full(72, np.nan, np.float32)
        _native.decode_row(level, *case.args, row, out)
        np.testing.assert_allclose(out, expected[row], rtol=3e-7, atol=3e-7)
