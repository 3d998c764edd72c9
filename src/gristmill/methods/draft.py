"""A model while methods work on it: the program, float weights, finished matrices, calibration, progress.

What a method computes at length it wraps in `once`, which keeps the result on disk: an interrupted run takes
it from there and, since everything else is computed anew in the same order, ends with the same bytes.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError
from gristmill.formats.packed import Packed, PackedSpec, decode_f32
from gristmill.io.checkpoint import Checkpoint, Factors, Progress, dump_json
from gristmill.io.json_file import read_object
from gristmill.io.safetensors import SafetensorsFile, Writer
from gristmill.methods.recipe import Calibration

if TYPE_CHECKING:
    from gristmill.backends.reference import ReferenceExecutor
    from gristmill.calibrate.sites import Site
    from gristmill.calibrate.stream import Stream
    from gristmill.program.nodes import Program

_TEXT = "calibration.json"
Arrays = dict[str, NDArray[Any]]
_KINDS = {"f4": "F32", "f8": "F64", "f2": "F16", "u1": "U8", "u2": "U16", "i4": "I32", "i8": "I64"}


class Draft:
    """The model being compressed. Weights are float32, matrices [N outputs, K inputs], by their names."""

    def __init__(
        self,
        source: Checkpoint,
        *,
        calibration: Calibration | None = None,
        kept: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """source: the base model, "stored". kept: a directory for `once`, or None to keep nothing."""
        self.source = source
        self.program: Program = source.program()
        self.calibration = calibration or Calibration()
        self.packed: dict[str, Packed] = {}
        """Finished matrices; `weight` gives what they decode to."""
        self.changed: set[str] = set()
        """Tensors whose values are no longer the source's."""
        self.factors: Factors = dict(source.factors)
        """How rows and columns of matrices were scaled by `fold`, here and in the source."""
        self.notes: list[str] = []
        """What a method did otherwise than asked, one line each: goes into the report."""
        self.progress: Progress = progress or (lambda label, done, total: None)
        self.activations = source.activations
        """The arithmetic of the linear layers that the methods mean, if not the default."""
        self.adapters = source.config["quantization_config"].get("adapters") is not False
        """Whether adapters made for the source still fit: no channel was put in another order."""
        self.calibrated_on: dict[str, Any] | None = None
        """The calibration text's name, size and hash, once something has used it."""
        self._root = self._kept = kept
        self._step = 0
        self._weights: dict[str, NDArray[np.float32]] = {}
        self._executor: ReferenceExecutor | None = None

    # Weights --------------------------------------------------------------------------------------------

    def weight(self, name: str) -> NDArray[np.float32]:
        """A tensor as it stands now, float32. Read only: `set` and `pack` change it."""
        if name in self._weights:
            return self._weights[name]
        if name in self.packed:
            return decode_f32(self.packed[name])
        if name in self.source.specs:
            return decode_f32(self.source.packed(name))
        return self.source.vector(name)

    def set(self, name: str, values: NDArray[np.float32]) -> None:
        """Gives a tensor other float values. ModelError if they are not finite or the tensor is finished."""
        if name in self.packed:
            raise ModelError(f"{name} is finished: nothing may change it after its rounding")
        values = np.ascontiguousarray(values, np.float32)
        if not np.isfinite(values).all():
            raise ModelError(f"{name} would hold values that are not finite")
        self._weights[name] = values
        self.changed.add(name)
        self._update(name, values)

    def pack(self, name: str, packed: Packed) -> None:
        """Finishes a matrix: from now on it is what `packed` decodes to."""
        self.packed[name] = packed
        self.changed.add(name)
        self._weights.pop(name, None)
        if self._executor is not None:
            self._update(name, decode_f32(packed))

    def fold(self, site: Site, factors: NDArray[np.floating]) -> None:
        """Moves scales at a site (see `calibrate.sites.fold`) and keeps them for adapters."""
        from gristmill.calibrate.sites import fold

        changed = fold({part.weight: self.weight(part.weight) for part in site.parts}, site, factors)
        for name, values in changed.items():
            self.set(name, values)
        for part in site.parts:
            shape = self.program.weights[part.weight].shape
            if len(shape) == 2:
                axes = list(self.factors.get(part.weight) or (np.ones(n, np.float32) for n in shape))
                scale = np.asarray(factors, np.float64)[part.channels]
                axes[part.axis] = (axes[part.axis] * (scale if part.consumes else 1 / scale)).astype(
                    np.float32
                )
                self.factors[part.weight] = (axes[0], axes[1])

    def edit(self, program: Program) -> None:
        """Replaces the program (see `gristmill.program.edits`). New weights must be `set` before it runs."""
        self.program = program
        self._executor = None

    def _update(self, name: str, values: NDArray[np.float32]) -> None:
        if self._executor is not None and name in self._executor.weights:
            import torch

            self._executor.weights[name] = torch.from_numpy(values)

    # Running --------------------------------------------------------------------------------------------

    @property
    def executor(self) -> ReferenceExecutor:
        """The model as it stands, in PyTorch float32. It follows `set` and `pack`, until the next `edit`."""
        if self._executor is None:
            from gristmill.backends.reference import ReferenceExecutor

            self._executor = ReferenceExecutor(
                self.program, {name: self.weight(name) for name in self.program.weights}
            )
        return self._executor

    def stream(
        self, sequences: Sequence[Sequence[int]] | None = None, executor: ReferenceExecutor | None = None
    ) -> Stream:
        """A run of the model as it stands, or of another, over the calibration text or these sequences."""
        from gristmill.calibrate.stream import Stream

        used = self.sequences if sequences is None else sequences
        return Stream(executor or self.executor, used, self._root)

    @cached_property
    def sequences(self) -> Sequence[Sequence[int]]:
        """The calibration text as token sequences."""
        from gristmill.calibrate.text import CalibrationText

        wanted = self.calibration
        found = CalibrationText(wanted.text, wanted.tokens, wanted.sequence, wanted.seed).read(
            self.source.directory, progress=self.progress
        )
        self.calibrated_on = found.report()
        if self._kept is not None:
            # A resumed run may not need the text again, but must say what it was.
            dump_json(self._kept / _TEXT, self.calibrated_on)
        return found.ids

    # Results kept ---------------------------------------------------------------------------------------

    def begin(self, identity: str) -> None:
        """A method begins: what `once` keeps from now on is for runs that begin one with the same identity.

        identity: of all that the method's results follow from, a name for a directory.
        """
        if self._root is not None:
            self._kept = self._root / identity
            self._kept.mkdir(exist_ok=True)
            if (self._kept / _TEXT).is_file():
                self.calibrated_on = read_object(self._kept / _TEXT)

    def once(self, key: str, compute: Callable[[], Mapping[str, NDArray[Any]]]) -> Arrays:
        """The arrays that `compute` gives, or gave before the run was interrupted.

        key: names the piece of work; the same calls must come in the same order in every run. Notes that it
        adds are kept with them.
        """
        self._step += 1
        if self._kept is None:
            return dict(compute())
        known = len(self.notes)
        digest = hashlib.sha256(f"{self._step} {key}".encode()).hexdigest()[:16]
        path = self._kept / f"{self._step:05d}-{digest}.safetensors"
        if path.is_file():
            file = SafetensorsFile(path)
            self.notes += json.loads(file.metadata["notes"])
            return {name: np.array(file.array(name)) for name in file.entries}
        arrays = {name: np.ascontiguousarray(value) for name, value in compute().items()}
        layout = {name: (_KINDS[value.dtype.str[1:]], value.shape) for name, value in arrays.items()}
        partial = path.with_suffix(".partial")
        with Writer(partial, layout, {"notes": json.dumps(self.notes[known:])}) as out:
            for name, value in arrays.items():
                out.write(name, 0, value)
        os.replace(partial, path)
        return arrays

    def pack_once(self, key: str, names: Sequence[str], compute: Callable[[], Mapping[str, Packed]]) -> None:
        """`pack` of several matrices whose packing takes long."""

        def arrays() -> Arrays:
            result: Arrays = {}
            for name, packed in compute().items():
                result |= {f"{name}/{part}": array for part, array in packed.arrays.items()}
                spec = json.dumps(packed.spec.to_json()).encode()
                result[f"{name}/spec"] = np.frombuffer(spec, np.uint8)
            return result

        found = self.once(key, arrays)
        for name in names:
            spec = PackedSpec.from_json(name, json.loads(found[f"{name}/spec"].tobytes()))
            self.pack(name, Packed(spec, {part: found[f"{name}/{part}"] for part in spec.arrays()}))
        give_memory_back()


def give_memory_back() -> None:
    """Hands memory that was freed back to the system, where the C library can (glibc).

    Arrays of some megabytes come and go between smaller ones that stay, and by itself it keeps the gaps:
    0.8 GB after GPTQ of a model of 135 M weights.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
