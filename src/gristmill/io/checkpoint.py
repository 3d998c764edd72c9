"""Checkpoint directories: config.json, tokenizer files, model.safetensors, recipe.yaml, report.json.

Where a recipe has changed what the model computes, program.json holds the semantic program to run; where it
has scaled channels, smoothing.safetensors holds the scales, which only adapters need (`gristmill.io.lora`).

The config is a Hugging Face one; its `quantization_config` has `"quant_method": "gristmill"`, `"version": 1`
and under `tensors` the format of every matrix (see `gristmill.formats.packed`). A matrix `x` is stored as
`x.codes`, `x.scales`, `x.mins` or `x.values`; norms and biases are float32 vectors under their own names.
report.json, written last, holds the bytes, the bits per weight, where the model came from, and a SHA-256 per
stored array and per other file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError
from gristmill.formats.packed import DTYPES, ROWS, Packed, PackedSpec
from gristmill.io import safetensors
from gristmill.io.expected import Shapes, bits_per_weight, check_tensors, expected_tensors
from gristmill.io.hub import SIDE_FILES
from gristmill.io.json_file import parse_object, read_object
from gristmill.io.mapped import map_file, read_small, short
from gristmill.io.safetensors import SafetensorsFile, Writer, byte_view

if TYPE_CHECKING:
    from gristmill.program.nodes import Program

VERSION = 1
"""Version of the directory's format."""
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
RECIPE = "recipe.yaml"
REPORT = "report.json"
PROGRAM = "program.json"
SMOOTHING = "smoothing.safetensors"
_PROGRAM_LIMIT = 64 << 20
_AXES = ("rows", "columns")
_CHUNK = 1 << 20
"""Weights of one piece: bounds the memory of a conversion whatever the model's size."""
_WORKERS = 8
"""Most pieces made at once."""


class Progress(Protocol):
    """Called now and then during long work, from the calling thread."""

    def __call__(self, label: str, done: int, total: int) -> None:
        """`done` of `total` units (weights or bytes) of the work named `label` are finished."""
        ...


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix to be written: `rows(start, stop)` gives these rows packed as `spec` says.

    `start` is a multiple of 16. Pieces are asked for from several threads at once.
    """

    spec: PackedSpec
    rows: Callable[[int, int], Packed]


@dataclass(frozen=True, slots=True)
class Vector:
    """A float32 vector to be written."""

    length: int
    values: Callable[[], NDArray[np.float32]]


Item = Matrix | Vector
Factors = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""How matrices were scaled by moving scales between them: name -> factors of the rows and of the columns."""


def dump_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object for people to read."""
    # In ASCII: a hostile config may hold characters that UTF-8 cannot express.
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write(
    directory: Path,
    config: Mapping[str, Any],
    items: Mapping[str, Item],
    *,
    report: Mapping[str, Any],
    recipe: str,
    program: Program | None = None,
    factors: Factors | None = None,
    adapters: bool = True,
    activations: str | None = None,
    progress: Progress | None = None,
    label: str = "converting",
) -> None:
    """Writes config, weights, recipe and report into a directory that holds the tokenizer's files already.

    program: what to run, if it is not what the config alone says; it names the same tensors as `items`.
    factors: of matrices whose rows or columns a recipe has scaled. adapters: whether adapters of the
    source fit, which they do not where channels were put in another order.
    activations: the arithmetic that the recipe means the linear layers to have, unless a user asks otherwise.

    Matrices are made in pieces, a few at a time on all processors, so that memory stays small. Raises OSError
    when the disk is full; the caller removes the directory then.
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
    digests = {name: hashlib.sha256() for name in layout}
    offsets = dict.fromkeys(layout, 0)
    with Writer(directory / WEIGHTS, layout) as out:
        for weights, arrays in _pieces(items):
            for name, array in arrays.items():
                # Blocks are the outermost dimension of every array, so that pieces follow one another.
                out.write(name, offsets[name], array)
                digests[name].update(byte_view(array))
                offsets[name] += array.nbytes
            done += weights
            if progress:
                progress(label, done, total)
        out.sync()
    quantization = {"quant_method": "gristmill", "version": VERSION, "tensors": formats}
    if activations is not None:
        quantization["activations"] = activations
    if program is not None:
        quantization["program"] = PROGRAM
    if not adapters:
        quantization["adapters"] = False
    dump_json(directory / CONFIG, {**config, "quantization_config": quantization})
    (directory / RECIPE).write_text(recipe, encoding="utf-8")
    stored = {name: DTYPES[dtype].itemsize * prod(shape) for name, (dtype, shape) in layout.items()}
    figures = {
        "bits_per_weight": bits_per_weight(expected_tensors(config), stored),
        "weight_bytes": sum(stored.values()),
    }
    hashes = {name: digest.hexdigest() for name, digest in digests.items()}
    hashes |= {name: _file_hash(directory / name) for name in _small_files(directory)}
    if program is not None:
        text = program.to_json().encode()
        (directory / PROGRAM).write_bytes(text)
        hashes[PROGRAM] = hashlib.sha256(text).hexdigest()
    if factors:
        axes = [
            (f"{n}.{axis}", v) for n, pair in factors.items() for axis, v in zip(_AXES, pair, strict=True)
        ]
        safetensors.write(directory / SMOOTHING, dict(axes))
        hashes[SMOOTHING] = hashlib.sha256(byte_view(map_file(directory / SMOOTHING))).hexdigest()
    dump_json(directory / REPORT, {"version": VERSION, **report, **figures, "sha256": hashes})


def _small_files(directory: Path) -> list[str]:
    """The config, the recipe, the tokenizer's and other side files, as far as they are there."""
    return [name for name in (CONFIG, RECIPE, *SIDE_FILES) if (directory / name).is_file()]


def _file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shape(item: Item) -> tuple[int, ...]:
    return item.spec.shape if isinstance(item, Matrix) else (item.length,)


def _pieces(items: Mapping[str, Item]) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
    """Yields (weights in the piece, stored name -> array), in order; NumPy makes several pieces at once."""
    from concurrent.futures import Future, ThreadPoolExecutor

    def vector(name: str, item: Vector) -> tuple[int, dict[str, NDArray[Any]]]:
        return item.length, {name: np.ascontiguousarray(item.values(), np.float32)}

    def matrix(name: str, item: Matrix, start: int, stop: int) -> tuple[int, dict[str, NDArray[Any]]]:
        arrays = item.rows(start, stop).arrays
        return (stop - start) * item.spec.shape[1], {
            f"{name}.{part}": array for part, array in arrays.items()
        }

    def jobs() -> Iterator[Callable[[], tuple[int, dict[str, NDArray[Any]]]]]:
        for name, item in items.items():
            if isinstance(item, Vector):
                yield partial(vector, name, item)
                continue
            n, k = item.spec.shape
            step = max(_CHUNK // k // ROWS, 1) * ROWS
            for start in range(0, n, step):
                yield partial(matrix, name, item, start, min(start + step, n))

    workers = min(_processors(), _WORKERS)
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[tuple[int, dict[str, NDArray[Any]]]]] = deque()
    try:
        for job in jobs():
            pending.append(pool.submit(job))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one stored array lies: for readers that copy bytes themselves."""

    path: Path
    offset: int
    nbytes: int


class Checkpoint:
    """An open checkpoint directory. Arrays are read-only views of the mapped file: nothing is copied."""

    def __init__(self, directory: Path) -> None:
        """See `open`."""
        self.directory = directory
        self.config = read_object(directory / CONFIG)
        self.specs = read_specs(directory, self.config)
        self._file = SafetensorsFile(directory / WEIGHTS)
        self.activations = _activations(directory, self.config)
        """`exact`, `bf16` or `fast`, if the recipe that made the checkpoint means one of them."""
        self._program = _read_program(directory / PROGRAM)
        self.edited = self._program is not None
        if self.edited != (self.config["quantization_config"].get("program") == PROGRAM):
            where = "has a program that its config does not name" if self.edited else f"lacks its {PROGRAM}"
            raise ModelError(f"{directory} {where}")
        """Whether a recipe has changed the program."""
        if self._program is None:
            expected = expected_tensors(self.config)
        else:
            expected = {name: weight.shape for name, weight in self._program.weights.items()}
        self._names = tuple(expected)
        self._check(expected)

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Opens a directory and checks every format, shape, dtype and size against config and file length.

        ModelError, one line, for whatever does not agree. Costs no memory beyond the headers.
        """
        return cls(Path(directory))

    def _check(self, expected: Shapes) -> None:
        directory, specs, file = self.directory, self.specs, self._file
        found: dict[str, tuple[int, ...]] = {name: spec.shape for name, spec in specs.items()}
        stored = set(file.entries)
        for name, spec in specs.items():
            for part, (dtype, shape) in spec.arrays().items():
                entry = file.entries.get(f"{name}.{part}")
                if entry is None:
                    raise ModelError(f"{file.path} lacks the tensor {short(f'{name}.{part}')}")
                if (entry.dtype, entry.shape) != (dtype, shape):
                    raise ModelError(
                        f"{file.path}: {short(f'{name}.{part}')} is {entry.dtype} {list(entry.shape)}; "
                        f"its format calls for {dtype} {list(shape)}"
                    )
                stored.discard(f"{name}.{part}")
        for name in stored:
            entry = file.entries[name]
            if entry.dtype != "F32" or len(entry.shape) != 1:
                raise ModelError(
                    f"{file.path}: {short(name)} is neither a float32 vector nor part of a matrix"
                )
            found[name] = entry.shape
        check_tensors(str(directory), expected, found)
        for name, shape in found.items():
            if (len(shape) == 2) != (name in specs):
                raise ModelError(f"{directory}: the tensor {name} is stored as the wrong kind")

    def program(self) -> Program:
        """The semantic program to run: a recipe's, or the one that follows from the config."""
        if self._program is None:
            from gristmill.models import build_program

            self._program = build_program(self.config)
        return self._program

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
        """A norm's weight or a bias, as a view of the mapped file; ModelError if there is none."""
        if name in self.specs or name not in self._file.entries:
            raise ModelError(f"{self.directory} has no vector {name}")
        values: NDArray[np.float32] = self._file.array(name)
        return values

    @cached_property
    def factors(self) -> Factors:
        """How a recipe has scaled rows and columns of matrices; empty if none did.

        ModelError if what is stored of it does not fit the matrices.
        """
        path = self.directory / SMOOTHING
        if not path.is_file():
            return {}
        file = SafetensorsFile(path)
        result: Factors = {}
        for name in dict.fromkeys(entry.rpartition(".")[0] for entry in file.entries):
            pair = tuple(file.array(f"{name}.{axis}") for axis in _AXES)
            shape = self.specs[name].shape if name in self.specs else None
            if any(v.dtype != np.float32 or v.ndim != 1 for v in pair) or tuple(map(len, pair)) != shape:
                raise ModelError(f"{path}: the factors of {short(name)} do not fit the model")
            if not all(np.all((v > 0) & np.isfinite(v)) for v in pair):
                raise ModelError(f"{path}: the factors of {short(name)} are not all positive and finite")
            result[name] = (pair[0], pair[1])
        return result

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
        """Bits stored for the matrices per weight of the config's model, as `expected.bits_per_weight`."""
        stored = {
            name: self.specs[name].nbytes if name in self.specs else self._file.entries[name].nbytes
            for name in self.names()
        }
        return bits_per_weight(expected_tensors(self.config), stored)

    def verify(self) -> int:
        """Compares all files and stored arrays with their SHA-256 in report.json; returns how many arrays.

        ModelError names the first that differs, is missing or has no hash. Older checkpoints have no hashes
        of config, recipe and the tokenizer's files: they are verified by what they have.
        """
        report = read_object(self.directory / REPORT)
        hashes = report.get("sha256")
        if not isinstance(hashes, dict):
            raise ModelError(f"{self.directory / REPORT} holds no hashes to verify against")
        self._verify_files(hashes)
        if PROGRAM in hashes:
            text = read_small(self.directory / PROGRAM, _PROGRAM_LIMIT)
            if hashes.get(PROGRAM) != hashlib.sha256(text).hexdigest():
                raise ModelError(f"{self.directory / PROGRAM} is not what was written (SHA-256 differs)")
        smoothing = self.directory / SMOOTHING
        if smoothing.is_file() or SMOOTHING in hashes:
            found = hashlib.sha256(byte_view(map_file(smoothing))).hexdigest()
            if hashes.get(SMOOTHING) != found:
                raise ModelError(f"{smoothing} is not what was written (SHA-256 differs)")
        for name in self._file.entries:
            digest = hashlib.sha256(byte_view(self._file.array(name))).hexdigest()
            if hashes.get(name) != digest:
                raise ModelError(
                    f"{self._file.path}: the tensor {name} is not what was written (SHA-256 differs)"
                )
        return len(self._file.entries)

    def _verify_files(self, hashes: Mapping[str, Any]) -> None:
        if CONFIG not in hashes:
            return
        for name in (CONFIG, RECIPE, *SIDE_FILES):
            path = self.directory / name
            if not path.is_file():
                if name in hashes:
                    raise ModelError(f"{path} is missing")
            elif name not in hashes:
                raise ModelError(f"{path} was not there when the checkpoint was written")
            elif hashes[name] != _file_hash(path):
                raise ModelError(f"{path} is not what was written (SHA-256 differs)")


def _read_program(path: Path) -> Program | None:
    """The program in a file that may be damaged or hostile; None if there is no such file."""
    if not path.is_file():
        return None
    from gristmill.program.checker import check
    from gristmill.program.nodes import SEMANTIC, Program, ProgramError

    text = json.dumps(parse_object(read_small(path, _PROGRAM_LIMIT), str(path)))
    try:
        program = check(Program.from_json(text))
        if program.level != SEMANTIC:
            raise ProgramError("it is not a semantic program")
    except (ProgramError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ModelError(f"{path} is no valid program: {str(error)[:300]}") from None
    return program


def _activations(directory: Path, config: Mapping[str, Any]) -> str | None:
    value = config["quantization_config"].get("activations")
    if value is not None and value not in ("exact", "bf16", "fast"):
        raise ModelError(f"{directory / 'config.json'} names unknown activations: {short(value, 40)}")
    return None if value is None else str(value)


def is_checkpoint(config: Mapping[str, Any]) -> bool:
    """Whether a config.json belongs to a gristmill checkpoint directory."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "gristmill"


def read_specs(directory: Path, config: Mapping[str, Any]) -> dict[str, PackedSpec]:
    """The formats of all matrices by name; ModelError for another kind or version of config."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "gristmill":
        raise ModelError(f"{directory} is not a gristmill checkpoint directory")
    if quantization.get("version") != VERSION:
        raise ModelError(
            f"{directory} has version {short(quantization.get('version'), 20)} of the checkpoint format; "
            f"this gristmill reads version {VERSION}"
        )
    tensors = quantization.get("tensors")
    if not isinstance(tensors, dict) or not tensors:
        raise ModelError(f"{directory / 'config.json'} lists no tensor formats")
    return {name: PackedSpec.from_json(name, entry) for name, entry in tensors.items()}
