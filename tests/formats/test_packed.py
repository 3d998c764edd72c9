"""The packed layout: its sizes, its description in JSON, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from gristmill.errors import ModelError
from gristmill.formats import dense, group_int
from gristmill.formats.packed import DTYPES, Packed, PackedSpec, decode

SHAPES = [(1, 1), (1, 8), (15, 7), (16, 32), (17, 33), (192, 576), (576, 192), (100, 1536)]


def specs(shape: tuple[int, int]) -> list[PackedSpec]:
    whole = -(-shape[1] // 8) * 8
    return [
        *(PackedSpec(name, shape) for name in ("f32", "bf16", "f16")),
        PackedSpec("group_int", shape, 4, 32, 8, "f16"),
        PackedSpec("group_int", shape, 4, 16, 0, "f32", True),
        PackedSpec("group_int", shape, 8, 64, 128, "f16", True),
        PackedSpec("group_int", shape, 8, whole, 128, "f32"),
        PackedSpec("group_int", shape, 4, 128, 8, "f16"),
        PackedSpec("group_int", shape, 2, 16, 0, "f32", True),
        PackedSpec("group_int", shape, 3, 128, 4, "f16"),
        PackedSpec("group_int", shape, 5, 64, 0, "f16", True),
        PackedSpec("group_int", shape, 6, 16, 32, "f32"),
        PackedSpec("sparse24", shape, 4, 64, 8, "f16"),
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_follow_from_the_rules(shape: tuple[int, int]) -> None:
    n, k = shape
    for spec in specs(shape):
        blocks = -(-n // 16)
        assert spec.blocks == blocks
        if spec.format in ("group_int", "sparse24"):
            groups = -(-k // spec.group)
            # The last group is cut after its last 64 columns that hold any of the row.
            columns = min(-(-k // 64) * 64, groups * spec.group)
            bits = 3 if spec.format == "sparse24" else spec.bits
            scale_bytes = {"f16": 2, "f32": 4}[spec.scales] * (2 if spec.mins else 1)
            expected = blocks * 16 * (columns * bits // 8 + groups * scale_bytes)
        else:
            columns = -(-k // 8) * 8
            expected = blocks * 16 * columns * {"f32": 4, "bf16": 2, "f16": 2}[spec.format]
        assert spec.columns == columns
        assert spec.columns % 8 == 0
        assert spec.nbytes == expected
        # Everything that is stored counts: codes, scales, minimums, padding rows and columns.
        assert spec.bits_per_weight == pytest.approx(8 * expected / (n * k), rel=1e-12)
        arrays = {name: np.zeros(s, DTYPES[d]) for name, (d, s) in spec.arrays().items()}
        assert sum(array.nbytes for array in arrays.values()) == expected
        assert Packed(spec, arrays).nbytes == expected


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (PackedSpec("group_int", (64, 256), 4, 32, 8, "f16"), 4.5),
        (PackedSpec("group_int", (64, 256), 8, 64, 128, "f16"), 8.25),
        (PackedSpec("group_int", (64, 256), 4, 32, 0, "f16", True), 5.0),
        (PackedSpec("group_int", (64, 256), 4, 16, 0, "f32", True), 8.0),
        (PackedSpec("group_int", (64, 256), 6, 128, 32, "f16"), 6.125),
        (PackedSpec("group_int", (64, 576), 5, 128, 16, "f16"), 5 + 16 * 5 / 576),  # no column is padded
        (PackedSpec("group_int", (64, 256), 3, 32, 0, "f16", True), 4.0),
        (PackedSpec("group_int", (64, 256), 2, 64, 2, "f16"), 2.25),
        (PackedSpec("sparse24", (64, 256), 4, 64, 8, "f16"), 3.25),
        (PackedSpec("bf16", (64, 256)), 16.0),
        (PackedSpec("f32", (1, 8)), 32.0 * 16),  # one row of a block of sixteen
    ],
)
def test_bits_per_weight_worked_out_by_hand(spec: PackedSpec, bits: float) -> None:
    assert spec.bits_per_weight == bits


def test_json_round_trip() -> None:
    for shape in SHAPES:
        for spec in specs(shape):
            entry = json.loads(json.dumps(spec.to_json()))
            assert PackedSpec.from_json("x", entry) == spec


GOOD: dict[str, Any] = PackedSpec("group_int", (32, 64), 4, 32, 8, "f16").to_json()


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        "group_int",
        {},
        *(
            GOOD | change
            for change in (
                {"layout": "rows8"},
                {"layout": None},
                {"layout": ["x"] * 1000},
                {"format": "int4"},
                {"format": ["f32"]},
                {"shape": None},
                {"shape": [32]},
                {"shape": [32, 64, 1]},
                {"shape": [32, 64.0]},
                {"shape": [True, 64]},
                {"shape": [0, 64]},
                {"shape": [32, -64]},
                {"shape": [1 << 31, 64]},
                {"shape": [10**100, 64]},
                {"bits": 0},
                {"bits": 1},
                {"bits": 7},
                {"bits": 16},
                {"bits": "4"},
                {"bits": True},
                {"group": 0},
                {"group": 12},
                {"group": -32},
                {"group": 2048},
                {"group": 1 << 70},
                {"offset": 16},
                {"offset": -1},
                {"scales": "bf16"},
                {"scales": 16},
                {"mins": 1},
                {"mins": "yes"},
                {"format": "f32"},  # with the fields of codes
                {"bits": 2, "offset": 2, "group": 24},
                {"bits": 3, "offset": 4, "group": 16},
                {"bits": 5, "group": 48},
                {"bits": 6, "group": 8},
                {"bits": 6, "offset": 64},
                {"format": "sparse24", "bits": 2, "offset": 2},
                {"format": "sparse24", "offset": 0},
                {"format": "sparse24", "mins": True},
                {"format": "sparse24", "group": 16},
            )
        ),
    ],
)
def test_damaged_entries_are_refused(entry: object) -> None:
    with pytest.raises(ModelError) as raised:
        PackedSpec.from_json("model.x\n" * 500, entry)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_no_rows_or_columns_is_refused() -> None:
    for shape in ((0, 8), (8, 0), (0, 0)):
        with pytest.raises(ModelError, match="out of range"):
            PackedSpec("f32", shape)
        with pytest.raises(ModelError, match="out of range"):
            dense.pack(np.zeros(shape, np.float32), "f32")


def test_arrays_must_fit_the_spec() -> None:
    packed = group_int.quantise(np.ones((20, 40), np.float32), 4)
    for name, array in packed.arrays.items():
        for wrong in (array[:1], array.astype(np.int64), array.reshape(-1)):
            with pytest.raises(ModelError, match=name):
                Packed(packed.spec, packed.arrays | {name: wrong})
        rest = {key: value for key, value in packed.arrays.items() if key != name}
        with pytest.raises(ModelError, match=name):
            Packed(packed.spec, rest)


def test_rows_are_views_of_whole_blocks() -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((50, 96)).astype(np.float32)
    for packed in (group_int.quantise(values, 4), group_int.quantise(values, 8), dense.pack(values, "bf16")):
        whole = decode(packed)
        for start, stop in ((0, 16), (16, 50), (48, 50), (0, 50), (32, 33)):
            part = packed.rows(start, stop)
            assert np.array_equal(decode(part), whole[start:stop])
            assert all(np.shares_memory(part.arrays[name], packed.arrays[name]) for name in part.arrays)
        for start, stop in ((8, 16), (16, 16), (0, 51), (-16, 16)):
            with pytest.raises(ValueError, match="block of 16"):
                packed.rows(start, stop)
