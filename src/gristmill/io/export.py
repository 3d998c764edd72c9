"""From a checkpoint directory to Hugging Face directories that other programs load.

The weights as plain floats, or their integers in compressed-tensors' "pack-quantized" form, whose layout is
described in `gristmill.io.quantised.compressed_tensors`. Everything streams: a few rows are in memory at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import GristmillError, ModelError, UsageError
from gristmill.formats import dense, group_int
from gristmill.formats.packed import ROWS, Packed, decode, decode_f32
from gristmill.io.checkpoint import WEIGHTS, Checkpoint, Progress, dump_json
from gristmill.io.convert import copy_sides
from gristmill.io.directory import whole
from gristmill.io.expected import tied
from gristmill.io.quantised.compressed_tensors import METHOD, PACKED
from gristmill.io.safetensors import Writer
from gristmill.models import build_program
from gristmill.program.edits import Foldable, foldable_edits
from gristmill.program.nodes import ProgramError

DENSE = {"bf16": ("BF16", "bfloat16"), "f16": ("F16", "float16"), "f32": ("F32", "float32")}
"""Float dtypes: their names in safetensors files and in configs."""
FORMS = (METHOD, *DENSE)
"""What can be exported."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a matrix is quantised; `group` -1 is the whole row, `ordered` that groups hold any columns."""

    bits: int
    group: int
    symmetric: bool
    ordered: bool


Order = NDArray[np.int64]
"""The model's columns in the order in which a matrix stores them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a tensor becomes: dtypes and shapes of the stored ones by suffix, and how their bytes are made.

    `make(start, stop)` gives what these rows of the tensor add to each; `start` is a multiple of 16.
    """

    shape: tuple[int, ...]
    parts: dict[str, tuple[str, tuple[int, ...]]]
    make: Callable[[int, int], dict[str, NDArray[Any]]]


_BITS = (4, 8)
_INSTEAD = f"export it as {', '.join(DENSE)}"
_EMBEDDING = "model.embed_tokens.weight"
_PIECE = 1 << 20


def export(checkpoint: Path, out: Path, form: str, progress: Progress | None = None) -> None:
    """Exports in one of `FORMS`; see `export_compressed_tensors` and `export_dense`."""
    if form == METHOD:
        export_compressed_tensors(checkpoint, out, progress)
    else:
        export_dense(checkpoint, out, form, progress)


def export_dense(checkpoint: Path, out: Path, dtype: str, progress: Progress | None = None) -> None:
    """Writes the decoded weights as "bf16" (rounded to nearest even), "f16" or "f32" into a new directory.

    Columns are put back in the model's order, low-rank branches added to their matrices. UsageError if `out`
    exists; ModelError for a value that float16 cannot hold, or, naming the node, if a recipe has changed what
    the model computes in another way; GristmillError if the directory cannot be written, in which case
    nothing of it stays.
    """
    if dtype not in DENSE:
        raise UsageError(f"unknown dtype {dtype!r}: choose from {', '.join(DENSE)}")
    source = Checkpoint.open(checkpoint)
    stored, known = DENSE[dtype]
    names, edits = _edits(source)

    def plan(name: str) -> Plan:
        shape = _shape(source, name)
        order = _order(source, edits, name)
        branches = [
            (source.packed(branch.up), decode(source.packed(branch.down)))
            for branch in edits.branches.get(name, ())
        ]

        def make(start: int, stop: int) -> dict[str, NDArray[Any]]:
            values = _values(source, name, start, stop)
            if order is not None:
                values = _restored(values, order)
            for up, down in branches:
                values = (values + decode(up.rows(start, stop)) @ down).astype(np.float32)
            return {"": _cast(values, dtype, f"{checkpoint}, tensor {name}")}

        return Plan(shape, {"": (stored, shape)}, make)

    with _new(out) as directory:
        _write(directory, {name: plan(name) for name in names}, progress)
        config = {key: value for key, value in source.config.items() if key != "torch_dtype"}
        _finish(directory, source, {**config, "dtype": known}, None)


def export_compressed_tensors(checkpoint: Path, out: Path, progress: Progress | None = None) -> None:
    """Writes the linear layers' integers, code for code, as compressed-tensors into a new directory.

    Codes of 4 and 8 bits in groups that divide the row, or one group, with the zero in the middle, or with
    minimums that are -scale * zero for integer zeros. Float layers stay what they are; the embedding, which
    others do not read as integers, becomes float32 if it is not float. The config's dtype, in which others
    compute unless told otherwise, stays. Columns in an order of their own are put back, and which group each
    is in is written (`actorder`).

    ModelError, naming the tensor or node, for what cannot be expressed so; otherwise raises as
    `export_dense`.
    """
    source = Checkpoint.open(checkpoint)
    names, edits = _edits(source)
    for branches in edits.branches.values():
        raise ModelError(f"{checkpoint} has a low-rank branch at the node {branches[0].node!r}: {_INSTEAD}")
    schemes: dict[str, Scheme] = {}
    for name, spec in source.specs.items():
        if spec.format not in DENSE and name != _EMBEDDING:
            ordered = name in edits.orders
            schemes[name] = _scheme(source.packed(name), ordered, f"{checkpoint}, tensor {name}")
    if not schemes:
        raise ModelError(f"{checkpoint} has no linear layer of integers: {_INSTEAD}")

    def plan(name: str) -> Plan:
        shape, spec = _shape(source, name), source.specs.get(name)
        order = _order(source, edits, name)
        if name in schemes:
            return _packed_plan(source.packed(name), schemes[name].symmetric, order)
        if spec is None or spec.format not in DENSE:
            return Plan(shape, {"": ("F32", shape)}, lambda a, b: {"": _values(source, name, a, b)})
        packed = source.packed(name)

        def make(start: int, stop: int) -> dict[str, NDArray[Any]]:
            values = dense.unpack(packed.rows(start, stop))
            return {"": values if order is None else _restored(values, order)}

        return Plan(shape, {"": (DENSE[spec.format][0], shape)}, make)

    with _new(out) as directory:
        _write(directory, {name: plan(name) for name in names}, progress)
        _finish(directory, source, source.config, _quantization(source, schemes))


def _edits(source: Checkpoint) -> tuple[list[str], Foldable]:
    """The tensors of the model as its config has it, and what a recipe's program does to them."""
    if not source.edited:
        return list(source.names()), Foldable({}, {})
    plain = build_program(source.config)
    try:
        return list(plain.weights), foldable_edits(source.program(), plain)
    except ProgramError as error:
        raise ModelError(
            f"{source.directory}: a recipe has changed what the model computes at the node {error}, "
            "which no other program would know"
        ) from None


def _order(source: Checkpoint, edits: Foldable, name: str) -> Order | None:
    if name not in edits.orders:
        return None
    vector = edits.orders[name].weights[0]
    order = source.vector(vector)
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise ModelError(f"{source.directory}: {vector} is no order of columns")
    return order.astype(np.int64)


def _restored(values: NDArray[Any], order: Order) -> NDArray[Any]:
    """The columns [R, K] where the model has them."""
    result = np.empty_like(values)
    result[:, order] = values
    return result


def _scheme(packed: Packed, ordered: bool, where: str) -> Scheme:
    spec = packed.spec
    if spec.format != "group_int" or spec.scales not in ("f16", "f32"):
        raise ModelError(
            f"{where} is {spec.format} with {spec.scales} scales, which compressed-tensors cannot express: "
            f"{_INSTEAD}"
        )
    if spec.bits not in _BITS:
        raise ModelError(f"{where} has codes of {spec.bits} bits; compressed-tensors takes 4 and 8 here")
    if spec.groups > 1 and spec.shape[1] % spec.group:
        raise ModelError(
            f"{where} has rows of {spec.shape[1]}, which its groups of {spec.group} do not divide, "
            "as compressed-tensors demands"
        )
    if _zeros(packed) is None:
        raise ModelError(
            f"{where} has minimums that are no whole multiples of its scales, "
            "which compressed-tensors cannot express"
        )
    symmetric = not spec.mins and spec.offset == 1 << (spec.bits - 1)
    group = spec.group if spec.groups > 1 else -1
    return Scheme(spec.bits, group, symmetric, ordered and group != -1)


def _zeros(packed: Packed) -> NDArray[np.uint8] | None:
    """The zeros with scale * (code - zero) = scale * (code - offset) + min, laid out as the scales are.

    None if a minimum is not, to float32, the product of its scale and such an integer.
    """
    scales = packed.arrays["scales"].astype(np.float32)
    offset, most = np.float32(packed.offset), (1 << packed.bits) - 1
    if not packed.spec.mins:
        return np.full(scales.shape, packed.offset, np.uint8)
    mins = packed.arrays["mins"].astype(np.float32)
    with np.errstate(all="ignore"):
        zeros = np.where(scales == 0, offset, np.rint(offset - mins / scales))
        sound = (zeros >= 0) & (zeros <= most) & (scales * (offset - zeros) == mins)
    return zeros.astype(np.uint8) if sound.all() else None


def _packed_plan(packed: Packed, symmetric: bool, order: Order | None) -> Plan:
    (n, k), groups, bits = packed.shape, packed.groups, packed.bits
    count = 32 // bits
    parts: dict[str, tuple[str, tuple[int, ...]]] = {
        "_packed": ("I32", (n, -(-k // count))),
        "_scale": (packed.spec.scales.upper(), (n, groups)),
        "_shape": ("I64", (2,)),
    }
    if not symmetric:
        parts["_zero_point"] = "I32", (-(-n // count), groups)
    if order is not None and groups > 1:
        parts["_g_idx"] = "I32", (k,)

    def make(start: int, stop: int) -> dict[str, NDArray[Any]]:
        piece = packed.rows(start, stop)
        codes, scales, _ = group_int.unpack(piece)
        if order is not None:
            codes = _restored(codes, order)
        made = {"_packed": _words(codes, bits), "_scale": scales}
        if start == 0:
            made["_shape"] = np.array([n, k], np.int64)
            if "_g_idx" in parts:
                assert order is not None
                made["_g_idx"] = np.argsort(order).astype(np.int32) // packed.group
        zeros = None if symmetric else _zeros(piece)
        if zeros is not None:
            rows = zeros.transpose(0, 2, 1).reshape(-1, groups)[: stop - start]
            made["_zero_point"] = _words(rows.T, bits).T
        return made

    return Plan(packed.shape, parts, make)


def _words(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """[R, C] -> [R, ceil(C / (32 // bits))]: the words of these fields, the lowest bits first."""
    count = 32 // bits
    padded = np.zeros((len(codes), -(-codes.shape[1] // count) * count), np.uint32)
    padded[:, : codes.shape[1]] = codes
    shifts = np.arange(count, dtype=np.uint32) * np.uint32(bits)
    words: NDArray[np.uint32] = np.bitwise_or.reduce(
        padded.reshape(len(codes), -1, count) << shifts, axis=-1, dtype=np.uint32
    )
    return words


def _quantization(source: Checkpoint, schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """The quantization_config of a model whose matrices have these schemes."""
    members: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        members.setdefault(scheme, []).append(name.removesuffix(".weight"))
    groups = {}
    for index, (scheme, modules) in enumerate(members.items()):
        weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric}
        weights["dynamic"] = False
        group = scheme.group
        weights |= {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
        if scheme.ordered:
            weights["actorder"] = "group"
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(members) == 1 else modules,
            "weights": weights,
        }
    floats = [name.removesuffix(".weight") for name in source.specs if name not in {*schemes, _EMBEDDING}]
    return {
        "quant_method": METHOD,
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*floats, *(["lm_head"] if tied(source.config) else [])],
    }


def _shape(source: Checkpoint, name: str) -> tuple[int, ...]:
    spec = source.specs.get(name)
    return spec.shape if spec else source.vector(name).shape


def _values(source: Checkpoint, name: str, start: int, stop: int) -> NDArray[np.float32]:
    if name not in source.specs:
        return source.vector(name)[start:stop]
    return decode_f32(source.packed(name).rows(start, stop))


def _cast(values: NDArray[np.float32], dtype: str, where: str) -> NDArray[Any]:
    if dtype == "bf16":
        return dense.to_bf16(values)
    if dtype == "f32":
        return values
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if (np.isinf(half) & np.isfinite(values)).any():
        raise ModelError(f"{where} has values beyond float16: export it as bf16 or f32")
    return half


def check_new(out: Path) -> None:
    """UsageError if there is anything at `out`."""
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists already")


@contextmanager
def _new(out: Path) -> Iterator[Path]:
    """A new directory, whole or not there; see `export_dense` for what is raised."""
    check_new(out)
    try:
        with whole(out) as directory:
            yield directory
    except OSError as error:
        raise GristmillError(f"writing {out} failed: {error.strerror or error}") from None


def _write(directory: Path, plans: Mapping[str, Plan], progress: Progress | None) -> None:
    layout = {name + part: kind for name, plan in plans.items() for part, kind in plan.parts.items()}
    offsets = dict.fromkeys(layout, 0)
    total, done = sum(prod(plan.shape) for plan in plans.values()), 0
    with Writer(directory / WEIGHTS, layout) as out:
        for name, plan in plans.items():
            rows, columns = plan.shape[0], prod(plan.shape[1:])
            step = max(_PIECE // columns // ROWS, 1) * ROWS
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                for part, array in plan.make(start, stop).items():
                    out.write(name + part, offsets[name + part], array)
                    offsets[name + part] += array.nbytes
                done += (stop - start) * columns
                if progress:
                    progress("exporting", done, total)
        out.sync()


def _finish(
    directory: Path, source: Checkpoint, config: Mapping[str, Any], quantization: dict[str, Any] | None
) -> None:
    """Writes the config and copies the tokenizer's files."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    if quantization:
        kept["quantization_config"] = quantization
    dump_json(directory / "config.json", kept)
    copy_sides(source.directory, directory)
