"""Our own safetensors reader and writer: mapped, and with every size checked before it is used."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError
from gristmill.io.json_file import parse_object
from gristmill.io.mapped import map_file, short

HEADER_LIMIT = 100 << 20
ALIGNMENT = 64
"""Where data begins in files we write: a cache line, and the widest vector register."""

_DTYPES: dict[str, tuple[int, Any]] = {
    "BOOL": (1, np.bool_), "U8": (1, np.uint8), "I8": (1, np.int8),
    "F8_E4M3": (1, None), "F8_E5M2": (1, None), "F8_E8M0": (1, None),
    "I16": (2, np.int16), "U16": (2, np.uint16), "F16": (2, np.float16), "BF16": (2, np.uint16),
    "I32": (4, np.int32), "U32": (4, np.uint32), "F32": (4, np.float32),
    "F64": (8, np.float64), "I64": (8, np.int64), "U64": (8, np.uint64),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: dtype by its safetensors name, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """A mapped safetensors file; arrays are read-only views of it."""

    def __init__(self, path: Path) -> None:
        """Maps `path` and checks its header against the file's length; ModelError names what is wrong."""
        self.path = path
        self._data = map_file(path)
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        size = len(self._data)
        if size < 8:
            raise ModelError(f"{path} is not a safetensors file: {size} bytes")
        length = int.from_bytes(self._data[:8].tobytes(), "little")
        if length > size - 8:
            raise ModelError(f"{path} is truncated or not safetensors: a header of {length} bytes in {size}")
        if length > HEADER_LIMIT:
            raise ModelError(f"{path} has a header of {length} bytes; at most {HEADER_LIMIT} are accepted")
        header = parse_object(self._data[8 : 8 + length].tobytes(), f"the header of {path}")
        for name, value in header.items():
            if name == "__metadata__":
                self.metadata = self._read_metadata(value)
            else:
                self.entries[name] = self._read_entry(name, value, 8 + length, size)
        self._check_overlaps()

    def _read_metadata(self, value: object) -> dict[str, str]:
        if not isinstance(value, dict) or any(not isinstance(item, str) for item in value.values()):
            raise ModelError(f"the metadata of {self.path} is not an object of strings")
        return value

    def _read_entry(self, name: str, value: object, base: int, size: int) -> Entry:
        if not isinstance(value, dict):
            raise ModelError(f"{self.path}: the header entry of {short(name)} is not an object")
        where = f"{self.path}: the tensor {short(name)}"
        dtype, shape, span = (
            value.get("dtype"),
            _naturals(value.get("shape")),
            _naturals(value.get("data_offsets")),
        )
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ModelError(f"{where} has the unknown dtype {short(dtype)}")
        if shape is None or len(shape) > 8:
            raise ModelError(f"{where} has an invalid shape")
        if span is None or len(span) != 2 or span[0] > span[1]:
            raise ModelError(f"{where} has invalid data offsets")
        begin, end = base + span[0], base + span[1]
        if end > size:
            raise ModelError(f"{where} ends at byte {short(end)} of {size}: the file is truncated or damaged")
        if end - begin != prod(shape) * _DTYPES[dtype][0]:
            raise ModelError(f"{where} has {end - begin} bytes, which its shape disagrees with")
        return Entry(dtype, shape, begin, end - begin)

    def _check_overlaps(self) -> None:
        end = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if entry.offset < end:
                raise ModelError(f"{self.path}: the tensor {short(name)} overlaps another")
            end = entry.offset + entry.nbytes

    def array(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view (bf16 as uint16 bits).

        ModelError if there is none of this name or its dtype has no counterpart in NumPy.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise ModelError(f"{self.path} has no tensor {short(name)}")
        dtype = _DTYPES[entry.dtype][1]
        if dtype is None:
            raise ModelError(
                f"{self.path}: the tensor {short(name)} is {entry.dtype}, which is not supported"
            )
        data: NDArray[Any] = self._data[entry.offset : entry.offset + entry.nbytes]
        # The views NumPy makes of unaligned bytes are right but slow; files written here are aligned.
        result: NDArray[Any] = data.view(dtype).reshape(entry.shape)
        return result


def _naturals(value: object) -> tuple[int, ...] | None:
    """A JSON list of numbers from 0 on as a tuple; None for anything else."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return tuple(value)
    return None


class Writer:
    """Writes a safetensors file whose tensors are known beforehand, in any order and in pieces.

    Tensors whose size is a multiple of 64 bytes come first, and the header is padded, so that each of them
    begins at a multiple of 64. Use as a context manager; `sync` before the file counts as written.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[str, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """`tensors`: name -> (dtype name, shape). Raises OSError, at once if the disk has too little room."""
        header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        sizes = {name: prod(shape) * _DTYPES[dtype][0] for name, (dtype, shape) in tensors.items()}
        offset = 0
        begins: dict[str, int] = {}
        # sorted is stable: within a class, the given order stays. Later classes keep their natural alignment.
        for name in sorted(tensors, key=lambda item: -_alignment(sizes[item])):
            dtype, shape = tensors[name]
            begins[name] = offset
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [offset, offset + sizes[name]],
            }
            offset += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        self._begins = {name: 8 + len(text) + begin for name, begin in begins.items()}
        self._sizes = sizes
        self.nbytes = 8 + len(text) + offset
        self._file: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__
        try:
            self._reserve()
            self._write_all(0, memoryview(len(text).to_bytes(8, "little") + text))
        except BaseException:
            self._file.close()
            raise

    def _reserve(self) -> None:
        """Takes the room now, where the file system can, rather than fail half-way."""
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._file.fileno(), 0, self.nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise

    def _write_all(self, offset: int, view: memoryview) -> None:
        self._file.seek(offset)
        while len(view):
            view = view[self._file.write(view) :]

    def write(self, name: str, offset: int, data: NDArray[Any]) -> None:
        """Writes `data` into the tensor, `offset` bytes from its beginning. OSError if the disk is full."""
        view = byte_view(data)
        if offset + len(view) > self._sizes[name]:
            raise ValueError(f"{len(view)} bytes at {offset} do not fit tensor {name} of {self._sizes[name]}")
        self._write_all(self._begins[name] + offset, view)

    def sync(self) -> None:
        """Waits until the bytes are on the disk."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._file.close()


def byte_view(array: NDArray[Any]) -> memoryview:
    """An array's bytes in C order, copied only if they do not lie so already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _alignment(size: int) -> int:
    """The largest power of two, at most 64, that divides `size`."""
    return min(size & -size, ALIGNMENT) if size else ALIGNMENT


def write(
    path: Path, arrays: Mapping[str, NDArray[Any]], dtypes: Mapping[str, str] | None = None, **metadata: str
) -> None:
    """Writes whole arrays at once; `dtypes` overrides names, as for bfloat16 bits held in uint16."""
    names = {np.dtype(kind): name for name, (_, kind) in _DTYPES.items() if kind and name != "BF16"}
    chosen = {name: (dtypes or {}).get(name) or names[array.dtype] for name, array in arrays.items()}
    tensors = {name: (chosen[name], array.shape) for name, array in arrays.items()}
    with Writer(path, tensors, metadata or None) as out:
        for name, array in arrays.items():
            out.write(name, 0, array)
