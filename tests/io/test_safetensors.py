"""Safetensors: both ways with the official package, and whatever is damaged is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from gristmill.errors import ModelError
from gristmill.io import safetensors as ours
from gristmill.io.safetensors import ALIGNMENT, SafetensorsFile, Writer
from tests.kits.files import safetensors_bytes, write_safetensors
from tests.kits.hostile import MEMORY_LIMIT, assert_refused, traced_peak

KINDS = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16,
    "F16": np.float16, "I32": np.int32, "U32": np.uint32, "F32": np.float32,
    "F64": np.float64, "I64": np.int64, "U64": np.uint64,
}  # fmt: skip


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    result = {name: rng.integers(0, 2, (3, 5)).astype(kind) for name, kind in KINDS.items()}
    result["scalar"] = np.array(3.5, np.float32)
    result["empty"] = np.zeros((0, 4), np.float32)
    result['name with a ☃ and "quotes"'] = np.arange(7, dtype=np.float16)
    return result


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)


def test_reads_what_the_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(arrays(), path, metadata={"format": "pt", "who": "them"})
    file = SafetensorsFile(path)
    assert file.metadata == {"format": "pt", "who": "them"}
    assert set(file.entries) == set(arrays())
    for name, array in arrays().items():
        assert same(file.array(name), array)
        assert not file.array(name).flags.writeable


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    ours.write(path, arrays(), who="us")
    back = safetensors.numpy.load_file(path)
    assert set(back) == set(arrays())
    assert all(same(back[name], array) for name, array in arrays().items())
    mine = SafetensorsFile(path)
    assert mine.metadata == {"who": "us"}
    assert all(same(mine.array(name), array) for name, array in arrays().items())


def test_bfloat16_is_bits(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)
    write_safetensors(tmp_path / "a", {"x": values}, "BF16")
    bits = SafetensorsFile(tmp_path / "a").array("x")
    assert same(bits, (values.view(np.uint32) >> 16).astype(np.uint16))
    ours.write(tmp_path / "b", {"x": bits}, {"x": "BF16"})
    assert SafetensorsFile(tmp_path / "b").entries["x"].dtype == "BF16"
    assert same(SafetensorsFile(tmp_path / "b").array("x"), bits)


def test_written_tensors_are_aligned(tmp_path: Path) -> None:
    sizes = [64, 3, 128, 32, 1, 4096, 96, 0, 2]
    ours.write(tmp_path / "x", {f"t{at}": np.zeros(size, np.uint8) for at, size in enumerate(sizes)})
    file = SafetensorsFile(tmp_path / "x")
    for at, size in enumerate(sizes):
        if size % ALIGNMENT == 0:
            assert file.entries[f"t{at}"].offset % ALIGNMENT == 0
        assert size == 0 or file.entries[f"t{at}"].offset % (size & -size if size < 64 else 1) == 0


def test_pieces_in_any_order(tmp_path: Path) -> None:
    values = np.arange(96, dtype=np.float32).reshape(12, 8)
    with Writer(tmp_path / "x", {"a": ("F32", (12, 8)), "b": ("U8", (3,))}) as out:
        out.write("b", 0, np.array([7, 8, 9], np.uint8))
        out.write("a", 8 * 4 * 6, values[6:])
        out.write("a", 0, values[:6].T.copy().T)  # not contiguous
        with pytest.raises(ValueError, match="do not fit"):
            out.write("b", 1, np.zeros(3, np.uint8))
        out.sync()
    file = SafetensorsFile(tmp_path / "x")
    assert same(file.array("a"), values)
    assert file.array("b").tolist() == [7, 8, 9]
    assert (tmp_path / "x").stat().st_size == out.nbytes


# ---- damaged files -----------------------------------------------------------------------------------------


def entry(dtype: Any = "F32", shape: Any = (4,), span: Any = (0, 16)) -> dict[str, Any]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": list(span) if isinstance(span, tuple) else span}


DATA = bytes(32)
BIG = 1 << 62
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "seven bytes": (b"\0" * 7, "not a safetensors file"),
    "header past the end": ((1000).to_bytes(8, "little") + b"{}", "header of 1000 bytes in 10"),
    "header of exabytes": (
        ((1 << 64) - 1).to_bytes(8, "little") + b"{}",
        "header of 18446744073709551615 bytes",
    ),
    "text": (b"not a model, but a text that is long enough to look like one", "truncated or not safetensors"),
    "no JSON": (safetensors_bytes(b"{'a': 1}", DATA), "not valid JSON"),
    "empty header": (safetensors_bytes(b"", DATA), "not valid JSON"),
    "JSON cut off": (safetensors_bytes(b'{"a": {"dtype": "F32"', DATA), "not valid JSON"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}', DATA), "not valid JSON"),
    "a list": (safetensors_bytes([1, 2], DATA), "not a JSON object"),
    "nested deeply": (safetensors_bytes(b'{"a":' * 100_000, DATA), "nested too deeply|not valid JSON"),
    "lists nested deeply": (safetensors_bytes(b"[" * 100_000, DATA), "nested too deeply|not valid JSON"),
    "a number of 10,000 digits": (
        safetensors_bytes(b'{"a": ' + b"9" * 10_000 + b"}", DATA),
        "not valid JSON",
    ),
    "tensor twice": (safetensors_bytes(b'{"a": {}, "b": {}, "a": {}}', DATA), "the key 'a' twice"),
    "entry is a number": (safetensors_bytes({"a": 5}, DATA), "entry of 'a' is not an object"),
    "entry is empty": (safetensors_bytes({"a": {}}, DATA), "unknown dtype None"),
    "unknown dtype": (safetensors_bytes({"a": entry("F128")}, DATA), "unknown dtype 'F128'"),
    "dtype is a list": (safetensors_bytes({"a": entry(["F32"] * 99)}, DATA), "unknown dtype a list of 99"),
    "shape missing": (safetensors_bytes({"a": entry(shape=None)}, DATA), "invalid shape"),
    "shape of text": (safetensors_bytes({"a": entry(shape="4")}, DATA), "invalid shape"),
    "shape of floats": (safetensors_bytes({"a": entry(shape=(4.0,))}, DATA), "invalid shape"),
    "shape of booleans": (safetensors_bytes({"a": entry(shape=(True, 4))}, DATA), "invalid shape"),
    "negative shape": (safetensors_bytes({"a": entry(shape=(-4, -1))}, DATA), "invalid shape"),
    "nine dimensions": (safetensors_bytes({"a": entry(shape=(1,) * 8 + (4,))}, DATA), "invalid shape"),
    "huge shape": (safetensors_bytes({"a": entry(shape=(BIG, BIG))}, DATA), "its shape disagrees"),
    "shape of 4,000 digits": (
        safetensors_bytes({"a": entry(shape=(10**4000,) * 8)}, DATA),
        "its shape disagrees",
    ),
    "offsets missing": (safetensors_bytes({"a": entry(span=None)}, DATA), "invalid data offsets"),
    "one offset": (safetensors_bytes({"a": entry(span=(0,))}, DATA), "invalid data offsets"),
    "three offsets": (safetensors_bytes({"a": entry(span=(0, 16, 32))}, DATA), "invalid data offsets"),
    "offsets reversed": (safetensors_bytes({"a": entry(span=(16, 0))}, DATA), "invalid data offsets"),
    "negative offset": (safetensors_bytes({"a": entry(span=(-16, 0))}, DATA), "invalid data offsets"),
    "offsets of text": (safetensors_bytes({"a": entry(span=("0", "16"))}, DATA), "invalid data offsets"),
    "past the end": (safetensors_bytes({"a": entry(span=(20, 36))}, DATA), "ends at byte"),
    "terabytes": (safetensors_bytes({"a": entry(shape=(1 << 38,), span=(0, 1 << 40))}, DATA), "ends at byte"),
    "offset of 4,000 digits": (
        safetensors_bytes({"a": entry(span=(0, 10**4000))}, DATA),
        "byte a huge number",
    ),
    "too few bytes": (safetensors_bytes({"a": entry(span=(0, 12))}, DATA), "its shape disagrees"),
    "overlap": (safetensors_bytes({"a": entry(), "b": entry(span=(12, 28))}, DATA), "overlaps another"),
    "same place": (safetensors_bytes({"a": entry(), "b": entry()}, DATA), "overlaps another"),
    "metadata of numbers": (safetensors_bytes({"__metadata__": {"a": 1}}, DATA), "not an object of strings"),
    "metadata is a list": (safetensors_bytes({"__metadata__": []}, DATA), "not an object of strings"),
    "long name": (safetensors_bytes({"n\n" * 50_000: entry("X")}, DATA), "unknown dtype 'X'"),
    "lone surrogate": (safetensors_bytes(b'{"\\ud800": {}}', DATA), "unknown dtype None"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    data, message = DAMAGED[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert str(path) in assert_refused(lambda: SafetensorsFile(path), message)
    assert traced_peak(lambda: SafetensorsFile(path)) < MEMORY_LIMIT


def test_header_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "HEADER_LIMIT", 1000)
    path = tmp_path / "x"
    path.write_bytes(safetensors_bytes(b"{" + b" " * 2000 + b"}", b""))
    assert_refused(lambda: SafetensorsFile(path), "header of 2002 bytes; at most 1000")


def test_truncation_anywhere_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    ours.write(path, {"a": np.arange(64, dtype=np.float32), "b": np.arange(5, dtype=np.uint8)})
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError):
            SafetensorsFile(path)


def test_arrays_that_cannot_be_had(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(safetensors_bytes({"a": entry("F8_E4M3", (16,))}, DATA))
    file = SafetensorsFile(path)
    assert_refused(lambda: file.array("a"), "F8_E4M3, which is not supported")
    assert_refused(lambda: file.array("b"), "has no tensor 'b'")


def test_files_that_are_none(tmp_path: Path) -> None:
    assert_refused(lambda: SafetensorsFile(tmp_path / "absent"), "No such file")
    assert_refused(lambda: SafetensorsFile(tmp_path), "Is a directory|not an ordinary file")


def test_header_is_padded_as_the_format_allows(tmp_path: Path) -> None:
    ours.write(tmp_path / "x", {"a": np.zeros(16, np.float32)})
    raw = (tmp_path / "x").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert (8 + length) % ALIGNMENT == 0
    assert json.loads(raw[8 : 8 + length])["a"] == {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
