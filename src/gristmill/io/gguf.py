"""GGUF files, single or split: metadata, and tensors as mapped bytes. Nothing in the file is trusted.

Versions 2 and 3, little-endian: "GGUF", u32 version, u64 tensors, u64 key-value pairs, the pairs, the tensor
infos, padding to general.alignment, data.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError
from gristmill.formats.gguf_blocks import OTHER_NAMES, REMOVED, TYPES, GgufType
from gristmill.io.mapped import map_file, short

MAGIC = b"GGUF"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_ELEMENT_LIMIT = 1 << 22
"""Array elements in all metadata together; the largest vocabularies have about 2^18 tokens and as many
merges."""
_KEY_LIMIT, _TENSOR_LIMIT = 1 << 16, 1 << 20
"""Far above what models have; they bound the memory of parsing, which a count that fits a huge file does
not."""
_SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` is outermost first (rows, columns); `data` its bytes, a read-only view."""

    name: str
    shape: tuple[int, ...]
    type: GgufType
    data: NDArray[np.uint8]

    def rows(self) -> NDArray[np.uint8]:
        """The bytes as [rows, bytes of a row]; a vector is one row."""
        return self.data.reshape(prod(self.shape[:-1]), -1)


class GgufFile:
    """One GGUF file: `metadata` by key (arrays are lists), `tensors` by name in file order."""

    def __init__(self, path: Path) -> None:
        """Maps and parses `path`; ModelError, one line, if anything in it is not as it must be."""
        self.path = path
        self._data = map_file(path)
        self._size = len(self._data)
        self._bytes = self._data.data
        self._at = 0
        self._elements = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._read_header()
        self._bytes.release()
        del self._bytes

    def _fail(self, text: str) -> ModelError:
        return ModelError(f"{self.path}: {text}")

    def _take(self, count: int) -> memoryview:
        if count > self._size - self._at:
            raise self._fail(f"truncated: {count} bytes wanted at byte {self._at} of {self._size}")
        self._at += count
        return self._bytes[self._at - count : self._at]

    def _u32(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def _u64(self) -> int:
        return int.from_bytes(self._take(8), "little")

    def _count(self, what: str, least: int, limit: int) -> int:
        """A count of items that take at least `least` bytes each, at most `limit`."""
        count = self._u64()
        if count > (self._size - self._at) // least:
            raise self._fail(f"damaged: {count} {what} cannot fit in the file's {self._size} bytes")
        if count > limit:
            raise self._fail(f"{count} {what}; at most {limit} are accepted")
        return count

    def _string(self, what: str) -> str:
        length = self._u64()
        if length > self._size - self._at:
            raise self._fail(f"damaged: {what} of {length} bytes in a file of {self._size}")
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError:
            raise self._fail(f"damaged: {what} is not UTF-8") from None

    def _read_header(self) -> None:
        if self._size < 24 or bytes(self._take(4)) != MAGIC:
            raise self._fail("not a GGUF file")
        version = self._u32()
        if version in (2 << 24, 3 << 24):
            raise self._fail("a big-endian GGUF file, which is not supported")
        if version not in (2, 3):
            raise self._fail(f"GGUF version {version} is not supported (2 and 3 are)")
        tensors = self._count("tensors", 24, _TENSOR_LIMIT)
        pairs = self._count("metadata keys", 13, _KEY_LIMIT)
        for _ in range(pairs):
            key = self._string("a metadata key")
            if key in self.metadata:
                raise self._fail(f"damaged: the metadata key {key[:80]!r} occurs twice")
            self.metadata[key] = self._value(key, self._u32())
        self._read_tensors(tensors)

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(f"the value of {key[:80]!r}")
        if kind == _ARRAY:
            return self._array(key)
        return self._numbers(key, kind, 1)[0]

    def _array(self, key: str) -> list[Any]:
        kind = self._u32()
        if kind == _ARRAY:
            raise self._fail(f"the metadata key {key[:80]!r} holds nested arrays, which are not supported")
        least = 8 if kind == _STRING else np.dtype(_SCALARS.get(kind, "<u1")).itemsize
        count = self._count(f"elements of {key[:80]!r}", least, _ELEMENT_LIMIT - self._elements)
        self._elements += count
        if kind != _STRING:
            return self._numbers(key, kind, count)
        result, data, at, size = [], self._bytes, self._at, self._size
        unpack = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                (length,) = unpack(data, at)
                at += 8 + length
                if at > size:
                    raise self._fail(f"damaged: a string of {length} bytes in {key[:80]!r}")
                result.append(str(data[at - length : at], "utf-8"))
        except struct.error:
            raise self._fail(f"truncated in the strings of {key[:80]!r}") from None
        except UnicodeDecodeError:
            raise self._fail(f"damaged: a string in {key[:80]!r} is not UTF-8") from None
        self._at = at
        return result

    def _numbers(self, key: str, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise self._fail(f"the metadata key {key[:80]!r} has the unknown value type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        values: NDArray[Any] = np.frombuffer(self._take(count * dtype.itemsize), dtype)
        if kind == _BOOL:
            if (values > 1).any():
                raise self._fail(f"damaged: a truth value of {key[:80]!r} is neither 0 nor 1")
            values = values != 0
        result: list[Any] = values.tolist()
        return result

    def _read_tensors(self, count: int) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment % 8:
            raise self._fail(f"the alignment {short(alignment)} is not a multiple of 8")
        infos: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(count):
            name = self._string("a tensor name")
            if not 0 < len(name) <= 256:
                raise self._fail(f"damaged: a tensor name of {len(name)} characters")
            rank = self._u32()
            if not 1 <= rank <= 4:
                raise self._fail(f"damaged: the tensor {name!r} has {rank} dimensions")
            shape = tuple(self._u64() for _ in range(rank))[::-1]
            kind, offset = self._u32(), self._u64()
            if offset % alignment:
                raise self._fail(f"damaged: the tensor {name!r} is not aligned to {alignment} bytes")
            infos.append((name, shape, kind, offset))
        base = self._at + -self._at % alignment
        spans: list[tuple[int, int, str]] = []
        for name, shape, kind, offset in infos:
            tensor = self._tensor(name, shape, kind, base + offset)
            if name in self.tensors:
                raise self._fail(f"damaged: the tensor {name!r} occurs twice")
            self.tensors[name] = tensor
            spans.append((offset, offset + len(tensor.data), name))
        end = 0
        for begin, stop, name in sorted(spans):
            if begin < end:
                raise self._fail(f"damaged: the tensor {name!r} overlaps another")
            end = stop

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> TensorInfo:
        if kind not in TYPES:
            known = f"{OTHER_NAMES[kind]} ({kind})" if kind in OTHER_NAMES else f"number {kind}"
            state = "withdrawn from the GGUF format" if kind in REMOVED else "not supported"
            raise self._fail(f"the tensor {name!r} has the type {known}, which is {state}")
        ggml = TYPES[kind]
        if 0 in shape:
            raise self._fail(f"damaged: the tensor {name!r} has an empty shape")
        if shape[-1] % ggml.block:
            raise self._fail(
                f"the rows of {name!r} have {shape[-1]} columns, no multiple of {ggml.name}'s {ggml.block}"
            )
        nbytes = prod(shape) // ggml.block * ggml.nbytes
        if begin + nbytes > self._size:
            raise self._fail(
                f"truncated: the tensor {name!r} needs {nbytes} bytes at {begin}; the file has {self._size}"
            )
        return TensorInfo(name, shape, ggml, self._data[begin : begin + nbytes])


def split_paths(path: Path) -> list[Path]:
    """All files of the model that `path` belongs to, in order: itself, or the parts of a split file.

    A split is recognised by its name, …-00001-of-0000N.gguf. ModelError if a part is missing.
    """
    match = _SPLIT.match(path.name)
    if not match:
        return [path]
    stem, count = match[1], int(match[3])
    if not 1 <= int(match[2]) <= count:
        raise ModelError(f"{path}: part {int(match[2])} of {count} cannot be")
    parts = [path.with_name(f"{stem}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise ModelError(f"a part of the split model is missing: {part}")
    return parts


class GgufModel:
    """A whole model of one or several GGUF files: the first part's metadata, every part's tensors."""

    def __init__(self, paths: list[Path]) -> None:
        """Opens all parts; ModelError if they do not belong together or tensors occur twice."""
        self.paths = paths
        files = [GgufFile(path) for path in paths]
        self.metadata = files[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        for index, file in enumerate(files):
            declared = file.metadata.get("split.count", 0) or 1
            if declared != len(paths):
                raise ModelError(
                    f"{file.path} says it is one of {short(declared)} parts; by name there are {len(paths)}"
                )
            number = file.metadata.get("split.no", 0)
            if number != index:
                raise ModelError(f"{file.path} says it is part {short(number)}, counted from 0, not {index}")
            for name, tensor in file.tensors.items():
                if name in self.tensors:
                    raise ModelError(f"{file.path}: the tensor {name!r} occurs in two parts")
                self.tensors[name] = tensor
        total = self.metadata.get("split.tensors.count", len(self.tensors))
        if total != len(self.tensors):
            raise ModelError(
                f"{paths[0]} declares {short(total)} tensors; the parts hold {len(self.tensors)}"
            )
