"""Checkpoint directories: config.json, tokenizer files, model.safetensors, recipe.yaml, report.json.

The config is a Hugging Face one; its `quantization_config` has `"quant_method": "gristmill"`, `"version": 1` and under
`tensors` the format of every matrix (see `gristmill.formats.packed`). A matrix `x` is stored as `x.codes`, `x.scales`,
`x.mins` or `x.values`; norms and biases are float32 vectors under their own names. report.json holds the bytes, the
bits per weight, where the model came from, and a SHA-256 per stored array.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError
from gristmill.formats.packed import DTYPES, ROWS, Packed, PackedSpec
from gristmill.io.expected import check_tensors, expected_tensors
from gristmill.io.json_file import read_object
from gristmill.io.safetensors import SafetensorsFile, Writer

VERSION = 1
"""Version of the directory's format."""
WEIGHTS = "model.safetensors"
_CHUNK = 1 << 22
"""Weights converted at a time: bounds the memory of a conversion whatever the model's size."""


class Progress(Protocol):
    """Called now and then during long work, from the calling thread."""

    def __call__(self, label: str, done: int, total: int) -> None:
        """`done` of `total` units (weights or bytes) of the work named `label` are finished."""
        ...


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix to be written: `rows(start, stop)` gives these rows packed as `spec` says (start is a multiple of 16)."""

    spec: PackedSpec
    rows: Callable[[int, int], Packed]


@dataclass(frozen=True, slots=True)
class Vector:
    """A float32 vector to be written."""

    length: int
    values: Callable[[], NDArray[np.float32]]


Item = Matrix | Vector


def dump_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object for people to read."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write(
    directory: Path,
    config: Mapping[str, Any],
    items: Mapping[str, Item],
    *,
    report: Mapping[str, Any],
    recipe: str,
    progress: Progress | None = None,
    label: str = "converting",
) -> None:
    """Writes config, weights, recipe and report into an existing directory, one piece of one tensor at a time.

    Raises OSError when the disk is full; the caller removes the directory then.
    """
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    formats: dict[str, Any] = {}
    for name, item in items.items():
        if isinstance(item, Vector):
            layout[name] = ("F32", (item.length,))
        else:
            formats[name] = item.spec.to_json()
            for part, kind in item.spec.arrays().items():
                layout[f"{name}.{part}"] = kind
    total = sum(prod(_shape(item)) for item in items.values())
    done = 0
    hashes: dict[str, str] = {}
    with Writer(directory / WEIGHTS, layout) as out:
        for name, item in items.items():
            if progress:
                progress(label, done, total)
            if isinstance(item, Vector):
                values = np.ascontiguousarray(item.values(), np.float32)
                out.write(name, 0, values)
                hashes[name] = hashlib.sha256(values.tobytes()).hexdigest()
            else:
                hashes |= _write_matrix(out, name, item, lambda rows: progress and progress(label, rows, total), done)
            done += prod(_shape(item))
        out.sync()
    if progress:
        progress(label, total, total)
    quantization = {"quant_method": "gristmill", "version": VERSION, "tensors": formats}
    dump_json(directory / "config.json", {**config, "quantization_config": quantization})
    matrices = [item.spec for item in items.values() if isinstance(item, Matrix)]
    figures = {
        "bits_per_weight": 8 * sum(s.nbytes for s in matrices) / sum(prod(s.shape) for s in matrices),
        "weight_bytes": sum(DTYPES[dtype].itemsize * prod(shape) for dtype, shape in layout.values()),
    }
    dump_json(directory / "report.json", {"version": VERSION, **report, **figures, "sha256": hashes})
    (directory / "recipe.yaml").write_text(recipe, encoding="utf-8")


def _shape(item: Item) -> tuple[int, ...]:
    return item.spec.shape if isinstance(item, Matrix) else (item.length,)


def _write_matrix(
    out: Writer, name: str, item: Matrix, advance: Callable[[int], object], done: int
) -> dict[str, str]:
    """Writes one matrix in pieces of whole row blocks; returns array name -> SHA-256."""
    n, k = item.spec.shape
    step = max(_CHUNK // k // ROWS, 1) * ROWS
    digests = {part: hashlib.sha256() for part in item.spec.arrays()}
    offsets = dict.fromkeys(digests, 0)
    for start in range(0, n, step):
        stop = min(start + step, n)
        packed = item.rows(start, stop)
        for part, array in packed.arrays.items():
            # Blocks are the outermost dimension of every array, so that pieces follow one another.
            out.write(f"{name}.{part}", offsets[part], array)
            digests[part].update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
            offsets[part] += array.nbytes
        advance(done + stop * k)
    return {f"{name}.{part}": digest.hexdigest() for part, digest in digests.items()}


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one stored array lies: for readers that copy bytes themselves."""

    path: Path
    offset: int
    nbytes: int


class Checkpoint:
    """An open checkpoint directory. Arrays are read-only views of the mapped file: nothing is copied."""

    def __init__(self, directory: Path, config: dict[str, Any], specs: dict[str, PackedSpec], file: SafetensorsFile):
        self.directory = directory
        self.config = config
        self.specs = specs
        self._file = file
        self._names = tuple(expected_tensors(config))

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Opens and checks a directory: every format, shape, dtype and size against the config and the file's length.

        ModelError, one line, for whatever does not agree. Costs no memory beyond the headers.
        """
        directory = Path(directory)
        config = read_object(directory / "config.json")
        specs = read_specs(directory, config)
        file = SafetensorsFile(directory / WEIGHTS)
        found: dict[str, tuple[int, ...]] = {name: spec.shape for name, spec in specs.items()}
        stored = set(file.entries)
        for name, spec in specs.items():
            for part, (dtype, shape) in spec.arrays().items():
                entry = file.entries.get(f"{name}.{part}")
                if entry is None:
                    raise ModelError(f"{file.path} lacks the tensor {name}.{part}")
                if (entry.dtype, entry.shape) != (dtype, shape):
                    raise ModelError(
                        f"{file.path}: {name}.{part} is {entry.dtype} {list(entry.shape)}; "
                        f"its format calls for {dtype} {list(shape)}"
                    )
                stored.discard(f"{name}.{part}")
        for name in stored:
            entry = file.entries[name]
            if entry.dtype != "F32" or len(entry.shape) != 1:
                raise ModelError(f"{file.path}: {name[:100]!r} is neither a float32 vector nor part of a matrix")
            found[name] = entry.shape
        check_tensors(str(directory), expected_tensors(config), found)
        for name, shape in found.items():
            if (len(shape) == 2) != (name in specs):
                raise ModelError(f"{directory}: the tensor {name} is stored as the wrong kind")
        return cls(directory, config, specs, file)

    def names(self) -> tuple[str, ...]:
        """The names of all tensors, matrices and vectors, in the order of the model's layers."""
        return self._names

    def packed(self, name: str) -> Packed:
        """A matrix as views of the mapped file; ModelError if there is none of this name."""
        spec = self.specs.get(name)
        if spec is None:
            raise ModelError(f"{self.directory} has no matrix {name}")
        return Packed(spec, {part: self._file.array(f"{name}.{part}") for part in spec.arrays()})

    def vector(self, name: str) -> NDArray[np.float32]:
        """A norm's weight or a bias, as a view of the mapped file; ModelError if there is none of this name."""
        if name in self.specs or name not in self._file.entries:
            raise ModelError(f"{self.directory} has no vector {name}")
        return self._file.array(name)

    def extents(self, name: str) -> dict[str, Extent]:
        """Where the stored arrays of a matrix (by part) or of a vector (under "values") lie in the file."""
        spec = self.specs.get(name)
        stored = {part: f"{name}.{part}" for part in spec.arrays()} if spec else {"values": name}
        result = {}
        for part, full in stored.items():
            entry = self._file.entries.get(full)
            if entry is None:
                raise ModelError(f"{self.directory} has no tensor {name}")
            result[part] = Extent(self._file.path, entry.offset, entry.nbytes)
        return result

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(entry.nbytes for entry in self._file.entries.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight over all matrices: codes, scales, minimums and padding."""
        specs = self.specs.values()
        return 8 * sum(spec.nbytes for spec in specs) / sum(prod(spec.shape) for spec in specs)

    def verify(self) -> int:
        """Compares every stored array with its SHA-256 in report.json; returns how many there were.

        ModelError names the first that differs or has no hash.
        """
        report = read_object(self.directory / "report.json")
        hashes = report.get("sha256")
        if not isinstance(hashes, dict):
            raise ModelError(f"{self.directory / 'report.json'} holds no hashes to verify against")
        for name in self._file.entries:
            digest = hashlib.sha256(self._file.array(name).view(np.uint8).reshape(-1).data).hexdigest()
            if hashes.get(name) != digest:
                raise ModelError(f"{self._file.path}: the tensor {name} is not what was written (SHA-256 differs)")
        return len(self._file.entries)


def is_checkpoint(config: Mapping[str, Any]) -> bool:
    """Whether a config.json belongs to a gristmill checkpoint directory."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "gristmill"


def read_specs(directory: Path, config: Mapping[str, Any]) -> dict[str, PackedSpec]:
    """The formats of all matrices in a checkpoint's config; ModelError if it is not one or another version."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "gristmill":
        raise ModelError(f"{directory} is not a gristmill checkpoint directory")
    if quantization.get("version") != VERSION:
        raise ModelError(
            f"{directory} has version {str(quantization.get('version'))[:20]} of the checkpoint format; "
            f"this gristmill reads version {VERSION}"
        )
    tensors = quantization.get("tensors")
    if not isinstance(tensors, dict) or not tensors:
        raise ModelError(f"{directory / 'config.json'} lists no tensor formats")
    return {name: PackedSpec.from_json(name, entry) for name, entry in tensors.items()}
