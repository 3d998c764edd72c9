"""GGUF files: what the gguf package writes is read, and whatever is damaged is refused in one line."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gristmill.errors import ModelError
from gristmill.io.gguf import GgufFile, GgufModel, split_paths
from tests.kits.files import (
    FLOATS,
    GGUF_NUMBERS,
    QUANTISED,
    config,
    dequantised,
    gguf_bytes,
    gguf_info,
    gguf_pair,
    gguf_string,
    weights,
    write_gguf,
)
from tests.kits.hostile import MEMORY_LIMIT, assert_refused, traced_peak

SMALL = config(
    hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, SMALL, weights(SMALL), "Q8_0")
    return path


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    return path


# ---- sound files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FLOATS, *QUANTISED])
def test_every_type_is_read_as_written(tmp_path: Path, kind: str) -> None:
    tensors = weights(config(num_hidden_layers=1))
    tensors = {name: tensors[name] for name in list(tensors)[:4]} | {
        "model.norm.weight": tensors["model.norm.weight"]
    }
    write_gguf(tmp_path / "x.gguf", config(), tensors, kind)
    ours, theirs = GgufFile(tmp_path / "x.gguf"), gguf.GGUFReader(tmp_path / "x.gguf")
    assert len(ours.tensors) == len(tensors)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.type.name == tensor.tensor_type.name
        assert mine.shape == tuple(int(size) for size in reversed(tensor.shape))
        data = np.ascontiguousarray(tensor.data)
        assert bytes(mine.data) == data.tobytes()
        assert not mine.data.flags.writeable
        if len(mine.shape) == 2 and kind in QUANTISED:
            assert dequantised(kind, mine.rows()).shape == mine.shape


def test_metadata_of_every_kind(tmp_path: Path) -> None:
    values: dict[str, tuple[str, Any]] = {
        "u8": ("<B", 200), "i8": ("<b", -100), "u16": ("<H", 60000), "i16": ("<h", -30000),
        "u32": ("<I", 1 << 31), "i32": ("<i", -(1 << 30)), "f32": ("<f", 0.5), "u64": ("<Q", 1 << 63),
        "i64": ("<q", -(1 << 62)), "f64": ("<d", 1e300), "bool": ("<B", 1),
    }  # fmt: skip
    pairs = []
    for name, (form, value) in values.items():
        pairs.append(gguf_pair(f"one.{name}", GGUF_NUMBERS[name], struct.pack(form, value)))
        head = GGUF_NUMBERS[name].to_bytes(4, "little") + (3).to_bytes(8, "little")
        pairs.append(gguf_pair(f"many.{name}", 9, head + struct.pack(form, value) * 3))
    pairs.append(gguf_pair("one.string", 8, gguf_string("Grüße\n☃")))
    strings = (8).to_bytes(4, "little") + (2).to_bytes(8, "little") + gguf_string("") + gguf_string("ö")
    pairs.append(gguf_pair("many.string", 9, strings))
    pairs.append(gguf_pair("none", 9, (4).to_bytes(4, "little") + bytes(8)))
    for version in (2, 3):
        read = GgufFile(write(tmp_path, gguf_bytes(pairs, [], version=version))).metadata
        for name, (_, value) in values.items():
            assert read[f"one.{name}"] == value
            assert read[f"many.{name}"] == [value] * 3
            assert type(read[f"one.{name}"]) is {"bool": bool, "f32": float, "f64": float}.get(name, int)
        assert read["one.string"] == "Grüße\n☃"
        assert read["many.string"] == ["", "ö"]
        assert read["none"] == []


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_alignment_is_respected(tmp_path: Path, alignment: int) -> None:
    pairs = [gguf_pair("general.alignment", 4, alignment.to_bytes(4, "little"))]
    place = -(-16 // alignment) * alignment
    infos = [gguf_info("a", (4,), 0, 0), gguf_info("b", (2, 2), 0, place)]
    first, second = np.arange(4, dtype=np.float32), np.arange(10, 14, dtype=np.float32)
    data = first.tobytes().ljust(place, b"\0") + second.tobytes()
    file = GgufFile(write(tmp_path, gguf_bytes(pairs, infos, data, alignment=alignment)))
    assert np.array_equal(file.tensors["a"].data.view(np.float32), first)
    assert np.array_equal(file.tensors["b"].rows().view(np.float32), second.reshape(2, 2))


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_split_files_are_one_model(tmp_path: Path, parts: int) -> None:
    tensors = weights(SMALL)
    whole = GgufModel(write_gguf(tmp_path / "w.gguf", SMALL, tensors, "Q8_0"))
    files = write_gguf(tmp_path / "s.gguf", SMALL, tensors, "Q8_0", parts=parts)
    assert len(files) == parts
    for file in files:
        assert split_paths(file) == files
    model = GgufModel(files)
    assert list(model.tensors) == list(whole.tensors)
    for name, tensor in model.tensors.items():
        assert bytes(tensor.data) == bytes(whole.tensors[name].data)
    assert model.metadata["llama.block_count"] == 2


def test_split_files_that_do_not_belong_together(tmp_path: Path) -> None:
    tensors = weights(SMALL)
    files = write_gguf(tmp_path / "s.gguf", SMALL, tensors, parts=3)
    missing = tmp_path / "missing"
    missing.mkdir()
    for file in files[:2]:
        shutil.copy(file, missing)
    assert_refused(
        lambda: split_paths(missing / files[0].name), "a part of the split model is missing.*00003-of-00003"
    )
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for at, file in enumerate((files[0], files[2], files[1])):
        shutil.copy(file, swapped / files[at].name)
    assert_refused(
        lambda: GgufModel(split_paths(swapped / files[0].name)), "says it is part 2, counted from 0, not 1"
    )
    # One part alone under another name, the same part twice, and a number that cannot be.
    alone = shutil.copy(files[1], tmp_path / "alone.gguf")
    assert_refused(lambda: GgufModel(split_paths(Path(alone))), "one of 3 parts; by name there are 1")
    assert_refused(lambda: GgufModel([files[0], files[0], files[2]]), "says it is part 0")
    assert_refused(lambda: split_paths(tmp_path / "s-00004-of-00003.gguf"), "part 4 of 3 cannot be")
    assert_refused(lambda: split_paths(tmp_path / "s-00000-of-00003.gguf"), "part 0 of 3 cannot be")


def test_split_count_of_tensors_must_agree(tmp_path: Path) -> None:
    def part(number: int, total: int, names: list[str]) -> bytes:
        pairs = [
            gguf_pair("split.no", 2, number.to_bytes(2, "little")),
            gguf_pair("split.count", 2, (2).to_bytes(2, "little")),
            gguf_pair("split.tensors.count", 5, total.to_bytes(4, "little")),
        ]
        infos = [gguf_info(name, (8,), 0, 32 * at) for at, name in enumerate(names)]
        return gguf_bytes(pairs, infos, bytes(32 * len(names)))

    files = [tmp_path / f"x-0000{number}-of-00002.gguf" for number in (1, 2)]
    for total, second, message in (
        (3, "c", None),
        (4, "c", "declares 4 tensors; the parts hold 3"),
        (3, "a", "two parts"),
    ):
        files[0].write_bytes(part(0, total, ["a", "b"]))
        files[1].write_bytes(part(1, total, [second]))
        if message is None:
            assert list(GgufModel(split_paths(files[1])).tensors) == ["a", "b", "c"]
        else:
            assert_refused(lambda: GgufModel(split_paths(files[1])), message)


# ---- damaged files -----------------------------------------------------------------------------------------

U64 = (1 << 64) - 1
TERABYTE = 1 << 40


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


F32_8 = gguf_info("a", (8,), 0, 0)
DATA = bytes(64)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "magic only": (b"GGUF", "not a GGUF file"),
    "another magic": (gguf_bytes([], [], magic=b"GGML"), "not a GGUF file"),
    "text": (b"This is not a model at all, only some text.\n" * 3, "not a GGUF file"),
    "version 1": (gguf_bytes([], [], version=1), "version 1 is not supported"),
    "version 4": (gguf_bytes([], [], version=4), "version 4 is not supported"),
    "big endian": (gguf_bytes([], [], version=3 << 24), "big-endian"),
    "terabytes of tensors": (gguf_bytes([], [F32_8], DATA, counts=(TERABYTE, 0)), "tensors cannot fit"),
    "all ones tensors": (gguf_bytes([], [F32_8], DATA, counts=(U64, 0)), "tensors cannot fit"),
    "terabytes of keys": (gguf_bytes([], [], DATA, counts=(0, TERABYTE)), "metadata keys cannot fit"),
    "all ones keys": (gguf_bytes([], [], DATA, counts=(0, U64)), "metadata keys cannot fit"),
    "more tensors than infos": (gguf_bytes([], [F32_8], DATA, counts=(3, 0)), "."),
    "huge key": (
        gguf_bytes([gguf_string("key", TERABYTE) + u32(4) + u32(1)], []),
        "a metadata key of 1099511627776 bytes",
    ),
    "key of all ones": (gguf_bytes([gguf_string("key", U64) + u32(4) + u32(1)], []), "a metadata key of"),
    "key not UTF-8": (gguf_bytes([gguf_pair(b"k\xff\xfe", 4, u32(1))], []), "a metadata key is not UTF-8"),
    "key twice": (gguf_bytes([gguf_pair("k", 4, u32(1))] * 2, []), "'k' occurs twice"),
    "huge string": (
        gguf_bytes([gguf_pair("k", 8, gguf_string("x", TERABYTE))], []),
        "value of 'k' of 1099511627776 bytes",
    ),
    "string not UTF-8": (
        gguf_bytes([gguf_pair("k", 8, gguf_string(b"\xc3("))], []),
        "value of 'k' is not UTF-8",
    ),
    "unknown value type": (gguf_bytes([gguf_pair("k", 13, u64(0))], []), "unknown value type 13"),
    "unknown element type": (
        gguf_bytes([gguf_pair("k", 9, u32(99) + u64(1) + u64(0))], []),
        "unknown value type 99",
    ),
    "nested arrays": (
        gguf_bytes([gguf_pair("k", 9, u32(9) + u64(1) + u32(4) + u64(0))], []),
        "nested arrays",
    ),
    "huge array": (gguf_bytes([gguf_pair("k", 9, u32(4) + u64(TERABYTE))], []), "elements of 'k' cannot fit"),
    "huge array of strings": (
        gguf_bytes([gguf_pair("k", 9, u32(8) + u64(U64))], []),
        "elements of 'k' cannot fit",
    ),
    "array element too long": (
        gguf_bytes([gguf_pair("k", 9, u32(8) + u64(2) + gguf_string("a") + gguf_string("b", U64))], [], DATA),
        "a string of 18446744073709551615 bytes in 'k'",
    ),
    "array element not UTF-8": (
        gguf_bytes([gguf_pair("k", 9, u32(8) + u64(1) + gguf_string(b"\xff"))], [], DATA),
        "a string in 'k' is not UTF-8",
    ),
    "truth value 2": (gguf_bytes([gguf_pair("k", 7, b"\x02")], [], DATA), "neither 0 nor 1"),
    "alignment 0": (gguf_bytes([gguf_pair("general.alignment", 4, u32(0))], [F32_8], DATA), "alignment 0"),
    "alignment 12": (gguf_bytes([gguf_pair("general.alignment", 4, u32(12))], [F32_8], DATA), "alignment 12"),
    "alignment huge": (
        gguf_bytes([gguf_pair("general.alignment", 4, u32(1 << 31))], [F32_8], DATA),
        "alignment",
    ),
    "alignment as text": (
        gguf_bytes([gguf_pair("general.alignment", 8, gguf_string("x" * 5000))], [F32_8], DATA),
        "alignment 'x",
    ),
    "alignment as list": (
        gguf_bytes([gguf_pair("general.alignment", 9, u32(4) + u64(1) + u32(32))], [F32_8], DATA),
        "alignment a list of 1",
    ),
    "tensor without name": (gguf_bytes([], [gguf_info("", (8,), 0, 0)], DATA), "name of 0 characters"),
    "tensor with a long name": (
        gguf_bytes([], [gguf_info("n" * 5000, (8,), 0, 0)], DATA),
        "name of 5000 characters",
    ),
    "tensor name not UTF-8": (
        gguf_bytes([], [gguf_info(b"\xff", (8,), 0, 0)], DATA),
        "a tensor name is not UTF-8",
    ),
    "tensor name with a line break": (
        gguf_bytes([], [gguf_info("a\nb\x1b[31m", (8,), 99, 0)], DATA),
        "number 99",
    ),
    "tensor twice": (gguf_bytes([], [F32_8, gguf_info("a", (8,), 0, 32)], DATA), "'a' occurs twice"),
    "no dimensions": (gguf_bytes([], [gguf_info("a", (), 0, 0)], DATA), "has 0 dimensions"),
    "five dimensions": (gguf_bytes([], [gguf_info("a", (1,) * 5, 0, 0)], DATA), "has 5 dimensions"),
    "4 billion dimensions": (
        gguf_bytes([], [gguf_info("a", (8,), 0, 0, rank=(1 << 32) - 1)], DATA),
        "dimensions",
    ),
    "empty dimension": (gguf_bytes([], [gguf_info("a", (8, 0), 0, 0)], DATA), "empty shape"),
    "terabyte tensor": (
        gguf_bytes([], [gguf_info("a", (TERABYTE,), 0, 0)], DATA),
        "truncated: the tensor 'a' needs",
    ),
    "dimensions that overflow": (
        gguf_bytes([], [gguf_info("a", (1 << 63, 1 << 63, 4), 0, 0)], DATA),
        "truncated",
    ),
    "product that wraps to 0": (
        gguf_bytes([], [gguf_info("a", (1 << 32, 1 << 32), 0, 0)], DATA),
        "truncated",
    ),
    "offset past the end": (gguf_bytes([], [gguf_info("a", (8,), 0, 1 << 20)], DATA), "truncated"),
    "offset that wraps": (gguf_bytes([], [gguf_info("a", (8,), 0, U64 - 31)], DATA), "truncated"),
    "offset not aligned": (gguf_bytes([], [gguf_info("a", (8,), 0, 4)], DATA), "not aligned to 32"),
    "tensors overlap": (
        gguf_bytes([], [gguf_info("a", (16,), 0, 0), gguf_info("b", (8,), 0, 32)], DATA),
        "overlaps",
    ),
    "tensor inside another": (
        gguf_bytes([], [gguf_info("a", (16,), 0, 0), gguf_info("b", (1,), 0, 32)], DATA),
        "overlaps",
    ),
    "unknown type": (gguf_bytes([], [gguf_info("a", (8,), 1000, 0)], DATA), "type number 1000"),
    "withdrawn type": (gguf_bytes([], [gguf_info("a", (32,), 4, 0)], DATA), "Q4_2 .4., which is withdrawn"),
    "type by name": (
        gguf_bytes([], [gguf_info("a", (256,), 16, 0)], bytes(256)),
        "IQ2_XXS .16., which is not supported",
    ),
    "half a block": (
        gguf_bytes([], [gguf_info("a", (48,), 8, 0)], DATA),
        "48 columns, no multiple of Q8_0's 32",
    ),
    "half a super block": (
        gguf_bytes([], [gguf_info("a", (128, 2), 12, 0)], bytes(512)),
        "multiple of Q4_K's 256",
    ),
    "one byte short": (gguf_bytes([], [gguf_info("a", (16,), 0, 0)], DATA[:-1]), "truncated"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    data, message = DAMAGED[name]
    path = write(tmp_path, data)
    text = assert_refused(lambda: GgufFile(path), message)
    assert str(path) in text
    assert traced_peak(lambda: GgufFile(path)) < 1 << 20


def test_counts_that_fit_the_file_are_still_bounded(tmp_path: Path) -> None:
    """A large file cannot make parsing take a multiple of its size in memory."""
    many = b"".join(gguf_pair(f"{at:05x}", 0, b"\0") for at in range(70_000))
    path = write(tmp_path, gguf_bytes([many], [], counts=(0, 70_000)))
    assert_refused(lambda: GgufFile(path), "70000 metadata keys; at most 65536")
    array = u32(0) + u64(5_000_000) + bytes(5_000_000)
    path = write(tmp_path, gguf_bytes([gguf_pair("k", 9, array)], []))
    assert_refused(lambda: GgufFile(path), "5000000 elements of 'k'; at most")
    half = u32(0) + u64(2_500_000) + bytes(2_500_000)
    path = write(tmp_path, gguf_bytes([gguf_pair("k", 9, half), gguf_pair("l", 9, half)], []))
    assert_refused(lambda: GgufFile(path), "2500000 elements of 'l'; at most")
    assert traced_peak(lambda: GgufFile(path)) < MEMORY_LIMIT


def test_truncation_anywhere_is_an_error(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    first = GgufFile(small).tensors["token_embd.weight"].data
    header = whole.index(bytes(first[:64]))
    path = tmp_path / "cut.gguf"
    rng = np.random.default_rng(0)
    cuts = {
        *range(0, 256),
        *rng.integers(256, header, 400).tolist(),
        *rng.integers(header, len(whole), 40).tolist(),
    }
    for cut in sorted(cuts | {header, len(whole) - 1}):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError):
            GgufFile(path)


def test_what_is_no_ordinary_file_is_refused(tmp_path: Path) -> None:
    import os

    assert_refused(lambda: GgufFile(tmp_path / "absent.gguf"), "No such file")
    assert_refused(lambda: GgufFile(tmp_path), "Is a directory|not an ordinary file")
    os.mkfifo(tmp_path / "pipe")
    assert_refused(lambda: GgufFile(tmp_path / "pipe"), "not an ordinary file")
    assert_refused(lambda: GgufFile(Path("/dev/zero")), "not an ordinary file")
