"""What a model is: architecture, sizes, the format of every tensor, tokenizer, and the program that runs it.

Reads headers only, except where a converted form of the model is asked about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gristmill.errors import GristmillError, ModelError, UsageError

if TYPE_CHECKING:
    from gristmill.io.checkpoint import Progress
    from gristmill.io.hub import Source
    from gristmill.models import ModelConfig
    from gristmill.program.costs import Cost, Work

__all__ = ["Tensor", "program", "run"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor: shape outermost first, bytes as they lie in the file."""

    name: str
    format: str
    shape: tuple[int, ...]
    nbytes: int


def run(
    model: str | Path,
    *,
    weights: str | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A model as plain JSON data, without running it.

    weights: None reads the model as it is; a mode (`stored`, `int4`, ...) its converted form, which is made
    if it is not in the cache yet. verify: compare the tensors and files of a checkpoint with the hashes in
    its report; the result then has `verified`, how many tensors there were.

    Returns model, kind (gguf, hf, checkpoint), name, files, architecture, supported (and reason, if not),
    config (sizes; None if not supported), parameters, weight_bytes, bits_per_weight (of the matrices; what
    a recipe has added counts as bytes, not as weights), formats (totals per tensor format),
    kv_bytes_per_token (by KV format, of a token that all layers keep), tokenizer, tensors. Of a checkpoint
    also what made it, as far as its files tell: methods, recipe (the YAML text), calibration, notes, quality.
    A model of an unknown architecture is described as far as its headers go.

    Raises ModelError for what is not a model, or is damaged.
    """
    from gristmill.io import hub
    from gristmill.io.expected import bits_per_weight

    source = hub.resolve(_converted(model, weights, progress) if weights is not None else model)
    checked: dict[str, int] = {}
    if verify:
        if source.kind != "checkpoint":
            raise UsageError("only checkpoint directories hold hashes to verify against")
        from gristmill.io.checkpoint import Checkpoint

        checked["verified"] = Checkpoint.open(source.path).verify()
    found = {"gguf": _gguf, "hf": _huggingface, "checkpoint": _checkpoint}[source.kind](source)
    tensors: Sequence[Tensor] = found.pop("tensors")
    base = found.pop("base", {tensor.name: tensor.shape for tensor in tensors})
    stored = {tensor.name: tensor.nbytes for tensor in tensors}
    matrices = any(len(shape) == 2 and prod(shape) for shape in base.values())
    config, reason = _sizes(found.pop("config"), found.pop("reason", None))
    return {
        "model": str(model),
        "kind": source.kind,
        **checked,
        **found,
        "files": [{"path": str(path), "bytes": path.stat().st_size} for path in source.files],
        "supported": reason is None,
        **({"reason": reason} if reason is not None else {}),
        "config": _config(config) if config is not None else None,
        "parameters": sum(prod(tensor.shape) for tensor in tensors),
        "weight_bytes": sum(tensor.nbytes for tensor in tensors),
        "bits_per_weight": bits_per_weight(base, stored) if matrices else None,
        "formats": _formats(tensors),
        "kv_bytes_per_token": _kv_bytes(config) if config is not None else None,
        "tensors": [
            {"name": t.name, "format": t.format, "shape": list(t.shape), "bytes": t.nbytes} for t in tensors
        ],
    }


def program(
    model: str | Path,
    *,
    weights: str = "stored",
    kv_dtype: str | None = None,
    prefill: int | None = None,
    decode: tuple[int, int] = (1, 512),
    collapse: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The step program of a model, with the bytes and operations of every node in one step.

    The step is one token for each of a batch of sequences, decode = (batch, context), or, if `prefill` is
    given, a prompt of that many tokens. Weights count as stored in the mode `weights`, which is converted
    if it is not in the cache yet. With `collapse`, layers that differ in their number alone are one row.
    kv_dtype None: as the program says, else bf16.

    Returns model, weights, kv_dtype, step, digest (of the program's text), columns (of the batch, that it
    reads), nodes (in order), total, parameters, stored_bytes (of all weights, each once) and
    state_bytes_per_token; bytes are those of weights and KV.
    """
    from gristmill.io.checkpoint import Checkpoint
    from gristmill.program.costs import Work
    from gristmill.program.kv import kv_formats
    from gristmill.program.render import render

    batch, context = decode
    if batch < 1 or context < 0 or (prefill is not None and prefill < 1):
        raise UsageError("a step needs at least one sequence or one prompt token")
    work = Work.decode(batch, context) if prefill is None else Work.prefill(prefill)
    checkpoint = Checkpoint.open(_converted(model, weights, progress))
    step_program = checkpoint.program()
    rendered = render(
        step_program,
        work,
        weight_bytes=lambda name: sum(extent.nbytes for extent in checkpoint.extents(name).values()),
        formats={name: _format(spec.to_json()) for name, spec in checkpoint.specs.items()},
        kv_dtype=kv_dtype,
        collapse=collapse,
    )
    return {
        "model": str(model),
        "weights": weights,
        "kv_dtype": "+".join(sorted(set(kv_formats(step_program, kv_dtype).values()))),
        "step": _step(work, prefill),
        "digest": rendered.digest,
        "columns": list(rendered.columns),
        "nodes": [
            {
                "name": row.name,
                "op": row.op,
                "count": row.count,
                "outputs": row.outputs,
                "weights": row.weights,
                "formats": row.formats,
                "details": row.details,
                **_cost(row.cost),
            }
            for row in rendered.rows
        ],
        "total": _cost(rendered.total),
        "parameters": rendered.parameters,
        "stored_bytes": rendered.weight_bytes,
        "state_bytes_per_token": rendered.state_bytes_per_token,
    }


def _cost(cost: Cost) -> dict[str, float]:
    return {
        "operations": cost.operations,
        "weight_bytes": cost.weight_bytes,
        "state_bytes": cost.state_bytes_read + cost.state_bytes_written,
    }


def _converted(model: str | Path, weights: str, progress: Progress | None) -> Path:
    from gristmill.io.convert import prepare

    return prepare(model, weights, progress)


def _step(work: Work, prefill: int | None) -> str:
    if prefill is not None:
        return f"a prompt of {prefill} tokens"
    batch, context = len(work.lengths), work.contexts[0]
    if batch == 1:
        return f"the next token of a sequence of {context}"
    return f"the next token of each of {batch} sequences of {context}"


# ---- the kinds of sources ----------------------------------------------------------------------------------


def _gguf(source: Source) -> dict[str, Any]:
    from gristmill.io.gguf import GgufModel
    from gristmill.io.gguf_config import translate

    model = GgufModel(list(source.files))
    config, reason = None, None
    try:
        config = translate(model)[0]
    except ModelError as error:
        reason = str(error)
    metadata = model.metadata
    name, architecture = metadata.get("general.name"), metadata.get("general.architecture")
    return {
        "name": _text(name) or source.path.stem,
        "architecture": _text(architecture) or "unknown",
        "config": config,
        "reason": reason,
        "tokenizer": _gguf_tokenizer(metadata),
        "tensors": [
            Tensor(tensor.name, tensor.type.name, tensor.shape, tensor.data.nbytes)
            for tensor in model.tensors.values()
        ],
    }


def _gguf_tokenizer(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return None
    result: dict[str, Any] = {
        "kind": _text(metadata.get("tokenizer.ggml.model")) or "unknown",
        "vocabulary": len(tokens),
    }
    if pre := _text(metadata.get("tokenizer.ggml.pre")):
        result["pre_tokenizer"] = pre
    for name in ("bos", "eos"):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            result[name] = [{"id": index, "text": str(tokens[index])}]
    result["chat_template"] = isinstance(metadata.get("tokenizer.chat_template"), str)
    return result


def _huggingface(source: Source) -> dict[str, Any]:
    from gristmill.io.json_file import read_object
    from gristmill.io.quantised import reader
    from gristmill.io.safetensors import SafetensorsFile

    config = read_object(source.path / "config.json")
    reason, quantised = None, False
    try:
        quantised = reader(config) is not None
    except ModelError as error:
        reason = str(error)
    tensors = []
    for path in source.files:
        if path.suffix == ".safetensors":
            file = SafetensorsFile(path)
            tensors += [Tensor(n, e.dtype, e.shape, e.nbytes) for n, e in file.entries.items()]
    if quantised:
        tensors = _joined(config, tensors)
    return {
        "name": source.path.name,
        "architecture": _architecture(config),
        "config": config,
        "reason": reason,
        "tokenizer": _tokenizer(source.path),
        "tensors": tensors,
    }


def _joined(config: Mapping[str, Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with the parts of each quantised matrix as one, of the shape that the config calls for."""
    from gristmill.io.expected import expected_tensors
    from gristmill.io.quantised import PARTS

    try:
        expected = expected_tensors(config)
    except ModelError:
        return list(tensors)
    method = config["quantization_config"]["quant_method"]
    parts: dict[str, int] = {}
    for tensor in tensors:
        module, _, part = tensor.name.rpartition(".")
        if part in PARTS:
            parts[f"{module}.weight"] = parts.get(f"{module}.weight", 0) + tensor.nbytes
    rest = [t for t in tensors if t.name.rpartition(".")[2] not in PARTS and t.name not in parts]
    plain = {tensor.name: tensor.nbytes for tensor in tensors if tensor.name in parts}
    return [
        *(
            Tensor(name, method, expected.get(name, ()), nbytes + plain.get(name, 0))
            for name, nbytes in parts.items()
        ),
        *rest,
    ]


RECIPE_LIMIT = 32 << 20
_MADE = {"methods": list, "calibration": dict, "notes": list, "quality": dict}
"""What a report may say of the recipe, and of which type it must be to be shown."""


def _checkpoint(source: Source) -> dict[str, Any]:
    from gristmill.io.checkpoint import Checkpoint
    from gristmill.io.expected import expected_tensors
    from gristmill.io.json_file import read_object
    from gristmill.io.mapped import read_small

    checkpoint = Checkpoint.open(source.path)
    path, recipe = source.path / "report.json", source.path / "recipe.yaml"
    report = read_object(path) if path.is_file() else {}
    name = report.get("model")
    made = {key: report[key] for key, kind in _MADE.items() if isinstance(report.get(key), kind)}
    if recipe.is_file():
        made["recipe"] = read_small(recipe, RECIPE_LIMIT).decode(errors="replace")
    tensors = []
    for tensor in checkpoint.names():
        nbytes = sum(extent.nbytes for extent in checkpoint.extents(tensor).values())
        spec = checkpoint.specs.get(tensor)
        if spec is None:
            tensors.append(Tensor(tensor, "f32", checkpoint.vector(tensor).shape, nbytes))
        else:
            tensors.append(Tensor(tensor, _format(spec.to_json()), spec.shape, nbytes))
    return {
        "name": _text(name) or source.path.name,
        "architecture": _architecture(checkpoint.config),
        "config": checkpoint.config,
        "base": expected_tensors(checkpoint.config),
        **made,
        "tokenizer": _tokenizer(source.path),
        "tensors": tensors,
    }


def _format(spec: Mapping[str, Any]) -> str:
    """The format of a packed matrix in a few words: `int4, group 32, min`."""
    if "bits" not in spec:
        return str(spec["format"])
    kind = f"int{spec['bits']}" if spec["format"] == "group_int" else spec["format"]
    scales = ", e4m3 scales" if spec.get("scales") == "e4m3" else ", min" if spec.get("mins") else ""
    return f"{kind}, group {spec['group']}{scales}"


def _tokenizer(directory: Path) -> dict[str, Any] | None:
    """The tokenizer of a directory; None without one, its error where it cannot be read."""
    from gristmill.io.tokenizer import Tokenizer

    if not (directory / "tokenizer.json").is_file():
        return None
    try:
        tokenizer = Tokenizer.load(directory)
    except ModelError as error:
        return {"error": str(error)}

    def entry(index: int) -> dict[str, Any]:
        return {"id": index, "text": tokenizer.decode([index], skip_special=False)}

    result: dict[str, Any] = {"kind": "tokenizer.json", "vocabulary": tokenizer.vocab_size}
    if tokenizer.bos_token_id is not None:
        result["bos"] = [entry(tokenizer.bos_token_id)]
    result["eos"] = [entry(index) for index in sorted(tokenizer.eos_token_ids)]
    result["chat_template"] = tokenizer.template_source is not None
    return result


# ---- sizes -------------------------------------------------------------------------------------------------


def _sizes(config: Mapping[str, Any] | None, reason: str | None) -> tuple[ModelConfig | None, str | None]:
    """The validated config, and why the model cannot run, if so."""
    from gristmill.models import read_config

    if config is None:
        return None, reason
    try:
        return read_config(config), reason
    except GristmillError as error:
        return None, reason or str(error)


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return named[0]
    return _text(config.get("model_type")) or "unknown"


def _config(config: ModelConfig) -> dict[str, Any]:
    windows: dict[int, int] = {}
    for window in config.windows:
        windows[window] = windows.get(window, 0) + 1
    ropes: list[dict[str, Any]] = []
    for rope in config.ropes:
        value = dict(rope) if rope is not None else {"type": "none"}
        if value not in ropes:
            ropes.append(value)
    return {
        "layers": config.layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "context": config.max_positions,
        "activation": config.activation,
        "norm_eps": config.norm_eps,
        "tied": config.tied,
        "windows": [{"window": window, "layers": count} for window, count in windows.items()],
        "ropes": ropes,
    }


def _formats(tensors: Sequence[Tensor]) -> list[dict[str, Any]]:
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.format, []).append(tensor)
    result = []
    for name, members in groups.items():
        count, nbytes = sum(prod(t.shape) for t in members), sum(t.nbytes for t in members)
        result.append(
            {
                "format": name,
                "tensors": len(members),
                "parameters": count,
                "bytes": nbytes,
                "bits_per_weight": 8 * nbytes / count if count else None,
            }
        )
    return sorted(result, key=lambda row: -row["bytes"])


def _kv_bytes(config: ModelConfig) -> dict[str, int]:
    from gristmill.program.kv import KV_FORMATS, kv_bytes_per_token

    shape = (2, config.kv_heads, config.head_dim)
    return {name: int(config.layers * kv_bytes_per_token([shape], name)) for name in KV_FORMATS}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
