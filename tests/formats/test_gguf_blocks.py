"""GGUF's tensor types by three witnesses: blocks worked out by hand, the gguf package, and a real file."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from gristmill.formats import group_int
from gristmill.formats.gguf_blocks import OTHER_NAMES, REMOVED, TYPES, GgufType
from gristmill.formats.packed import decode, decode_f32
from gristmill.io.gguf import GgufFile
from gristmill.io.hub import demo_model_path
from tests.kits.files import FLOATS, QUANTISED, dequantised, payload

BY_NAME = {kind.name: kind for kind in TYPES.values()}


def half(value: float) -> list[int]:
    return list(np.float16(value).tobytes())


def block(kind: str, fields: dict[int, list[int]]) -> NDArray[np.uint8]:
    """One block, zero but for the bytes given by where they begin."""
    data = np.zeros((1, BY_NAME[kind].nbytes), np.uint8)
    for at, values in fields.items():
        data[0, at : at + len(values)] = values
    return data


# Per type: bytes by their offset, what most values come to, and the values that differ by index.
BY_HAND: dict[str, tuple[dict[int, list[int]], float, dict[int, float]]] = {
    # d = 0.5; byte 0 holds value 0 (low) and value 16 (high); a code c stands for c - 8.
    "Q4_0": ({0: half(0.5), 2: [0xF3], 17: [0x80]}, -4.0, {0: -2.5, 16: 3.5, 31: 0.0}),
    # d = 2, m = -3; code c stands for 2 c - 3.
    "Q4_1": ({0: half(2), 2: half(-3), 4: [0x71], 19: [0x0F]}, -3.0, {0: -1.0, 16: 11.0, 15: 27.0}),
    # d = 0.25; the four bytes of fifth bits come first: bit 0 of value 0, bit 31 of value 31; c - 16.
    "Q5_0": ({0: half(0.25), 2: [1, 0, 0, 0x80], 6: [0x02], 21: [0xA0]}, -4.0, {0: 0.5, 31: 2.5}),
    # d = 1, m = 100; fifth bit of value 17 is bit 1 of the third byte.
    "Q5_1": ({0: half(1), 2: half(100), 4: [0, 0, 2, 0], 9: [0x39]}, 100.0, {1: 109.0, 17: 119.0}),
    # d = -0.5, signed bytes.
    "Q8_0": ({0: half(-0.5), 2: [127], 33: [0x80]}, 0.0, {0: -63.5, 31: 64.0}),
    # 16 scale bytes (scale low, min high), 64 bytes of 2-bit codes, d, dmin. Scale 1 is 3 with min 2, for the
    # values 16 to 31; byte 16 of the codes holds the values 16, 48, 80, 112 from its lowest bits up.
    "Q2_K": (
        {1: [0x23], 16 + 16: [0b01_00_00_11], 80: half(0.5), 82: half(0.25)},
        0.0,
        {16: 4.0} | dict.fromkeys(range(17, 32), -0.5),
    ),
    # 32 bytes of high bits, 64 of low ones, 12 of scales, d. Scale 0 = 32 + 5 - 32: low nibble 5, high bits
    # 2. Value 0 has low bits 2 and a high bit, hence 2; all others have neither, hence -4; the other scales
    # are -32.
    "Q3_K": (
        {0: [1], 32: [2], 96: [5], 104: [2], 108: half(0.5)},
        64.0,
        {0: 5.0} | dict.fromkeys(range(1, 16), -10.0),
    ),
    # d, dmin, 12 bytes of scales, nibbles. Scale 0 = 7, min 0 = 3 (byte 4): values 0 to 31. Scale 4 has its
    # low four bits in byte 8 and its high two in the top of byte 0.
    "Q4_K": (
        {0: half(0.5), 2: half(2), 4: [7 | 0b10 << 6], 8: [3], 12: [0x09], 16: [0x0C], 16 + 64: [0x02]},
        0.0,
        {0: 36.0, 128: 41.0} | dict.fromkeys(range(1, 32), -6.0),
    ),
    # As Q4_K, with 32 bytes of fifth bits between scales and nibbles: bit 1 of byte 3 belongs to value 32 +
    # 3.
    "Q5_K": (
        {0: half(1), 2: half(1), 4: [0, 5], 8: [0, 1], 16 + 3: [0b10], 48 + 3: [0xE0]},
        0.0,
        {35: 149.0} | {at: -1.0 for at in range(32, 64) if at != 35},
    ),
    # 128 bytes of low nibbles, 64 of high pairs, 16 signed scales, d. Byte 0: value 0 low, value 64 high.
    "Q6_K": (
        {0: [0x5A], 128: [0b00_11_00_10], 192: [0xFD], 192 + 4: [2], 208: half(0.5)},
        0.0,
        {0: -15.0, 64: 21.0} | dict.fromkeys(range(1, 16), 48.0) | dict.fromkeys(range(65, 80), -32.0),
    ),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_block_by_hand(kind: str) -> None:
    fields, rest, some = BY_HAND[kind]
    data = block(kind, fields)
    expected = np.full(BY_NAME[kind].block, rest)
    for at, value in some.items():
        expected[at] = value
    assert np.array_equal(decode(BY_NAME[kind].pack(data, BY_NAME[kind].block))[0], expected)
    assert np.array_equal(dequantised(kind, data)[0], expected)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("shape", [(1, 256), (16, 512), (33, 768), (192, 256)])
@pytest.mark.parametrize("kind", QUANTISED)
def test_same_bits_as_the_gguf_package(kind: str, shape: tuple[int, int], extreme: bool) -> None:
    """float32 for float32, zeros' signs included: our decoding is GGUF's dequantisation."""
    data = payload(kind, *shape, seed=1, extreme=extreme)
    expected = dequantised(kind, data)
    assert np.isfinite(expected).all()
    packed = BY_NAME[kind].pack(data, shape[1])
    assert packed.spec == BY_NAME[kind].spec(shape)
    got = decode_f32(packed)
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
    # The float64 reading is what was rounded to it.
    assert np.array_equal(decode(packed).astype(np.float32), got)


@pytest.mark.parametrize("kind", QUANTISED)
def test_every_code_occurs_and_is_kept(kind: str) -> None:
    """The random payloads above do exercise all codes; and none is merged with another."""
    ggml = BY_NAME[kind]
    codes, _, _ = group_int.unpack(ggml.pack(payload(kind, 64, 768, seed=2), 768))
    real_bits = int(kind[1])
    assert np.array_equal(np.unique(codes), np.arange(1 << real_bits))


@pytest.mark.parametrize("kind", QUANTISED)
def test_infinite_and_nan_scales_do_not_crash(kind: str) -> None:
    data = np.full((16, BY_NAME[kind].nbytes), 0xFF, np.uint8)
    decoded = decode_f32(BY_NAME[kind].pack(data, BY_NAME[kind].block))
    assert decoded.shape == (16, BY_NAME[kind].block)
    assert np.array_equal(np.isnan(decoded), np.isnan(dequantised(kind, data)))


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_types_stay_group_integers(kind: str) -> None:
    ggml = BY_NAME[kind]
    spec = ggml.spec((64, 1024))
    bits = int(kind[1])
    assert spec.format == "group_int"
    assert spec.bits == (4 if bits == 3 else bits)  # Q3_K's groups are too short for 3 bits
    # One float32 scale (and minimum) per 16 costs most.
    own = 8 * ggml.nbytes / ggml.block
    assert own <= spec.bits_per_weight <= own + 3.5


@pytest.mark.parametrize("kind", FLOATS)
def test_float_types_are_kept_as_they_are(kind: str) -> None:
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, (33, 96 * BY_NAME[kind].nbytes), dtype=np.uint8)
    packed = BY_NAME[kind].pack(raw, 96)
    assert packed.format == kind.lower()
    expected = dequantised(kind, raw)
    assert np.array_equal(decode_f32(packed), expected, equal_nan=True)


def test_type_table_agrees_with_the_gguf_package() -> None:
    for number, kind in TYPES.items():
        official = gguf.GGMLQuantizationType(number)
        assert (official.name, gguf.GGML_QUANT_SIZES[official]) == (kind.name, (kind.block, kind.nbytes))
    known = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    for number, name in known.items():
        assert number in TYPES or OTHER_NAMES[number] == name
    assert not set(OTHER_NAMES) & set(TYPES)
    assert set(OTHER_NAMES) - set(known) == REMOVED


@pytest.fixture(scope="module")
def demo() -> GgufFile:
    return GgufFile(demo_model_path())


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("token_embd.weight", 640),
        ("blk.0.attn_q.weight", 576),
        ("blk.14.ffn_down.weight", 576),
        ("blk.29.attn_v.weight", 192),
    ],
)
def test_the_real_file(demo: GgufFile, name: str, rows: int) -> None:
    tensor = demo.tensors[name]
    data = tensor.rows()[:rows]
    kind: GgufType = tensor.type
    got = decode_f32(kind.pack(data, tensor.shape[1]))
    expected = dequantised(kind.name, data)
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
    assert 0.001 < np.abs(got).mean() < 1


def test_the_real_file_is_read_as_the_gguf_package_reads_it(demo: GgufFile) -> None:
    reader = gguf.GGUFReader(demo.path)
    assert list(demo.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        ours = demo.tensors[tensor.name]
        assert ours.type.name == tensor.tensor_type.name
        assert ours.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert len(ours.data) == tensor.n_bytes
        assert np.array_equal(ours.data[:64], tensor.data.reshape(-1).view(np.uint8)[:64])
        assert np.array_equal(ours.data[-64:], tensor.data.reshape(-1).view(np.uint8)[-64:])
    keys = {key for key in reader.fields if not key.startswith("GGUF.")}
    assert set(demo.metadata) == keys
    for key in keys:
        assert demo.metadata[key] == reader.fields[key].contents()
