"""From any supported model to a checkpoint directory: once, into the cache.

GGUF files and Hugging Face directories are converted losslessly ("stored"); the other weight modes are made
from that and cached beside it. Everything streams: one piece of one tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError, UsageError
from gristmill.formats import dense, group_int
from gristmill.formats.packed import Packed, PackedSpec, decode_f32
from gristmill.io import cache, checkpoint, hub
from gristmill.io.checkpoint import Checkpoint, Item, Matrix, Progress, Vector
from gristmill.io.expected import check_tensors, expected_tensors, model_type, tied
from gristmill.io.hub import SIDE_FILES
from gristmill.io.json_file import read_object
from gristmill.io.mapped import read_small
from gristmill.io.safetensors import SafetensorsFile
from gristmill.version import __version__

if TYPE_CHECKING:
    from gristmill.io.gguf_config import Source
    from gristmill.program.nodes import Node, Program

WEIGHTS = ("stored", "f32", "bf16", "int8", "int4")
"""The weight modes: as stored in the source, or converted."""
CONVERTER_VERSION = 2
"""Raised whenever conversion gives another result, so that cached checkpoints are made anew."""
_SIDE_LIMIT = 64 << 20


def prepare(spec: str | Path, weights: str = "stored", progress: Progress | None = None) -> Path:
    """The checkpoint directory of a model in a weight mode, converted into the cache if it is not there yet.

    `spec` is what `hub.resolve` takes. A checkpoint directory in the mode "stored" is returned as it is. Safe
    with several processes at once. Raises ModelError for a model that cannot be read and GristmillError when
    the cache cannot be written; neither leaves anything half-made behind.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"unknown weights {weights!r}: choose from {', '.join(WEIGHTS)}")
    source = hub.resolve(spec)
    if source.kind == "checkpoint" and weights == "stored":
        return source.path
    key = cache.source_key(source.files)
    content = cache.recall(key)
    if content is not None:
        done = cache.checkpoint_path(_name(content, weights))
        if done.is_dir():
            return done
    if content is None:
        content = cache.content_hash(source.files, progress)
    if source.kind == "checkpoint":
        stored = source.path
    else:
        stored = cache.checkpoint_path(_name(content, "stored"))
        with cache.building(_name(content, "stored")) as directory:
            if directory is not None:
                _import(source, directory, progress)
                if cache.source_key(source.files) != key:
                    raise ModelError(f"{source.path} changed while it was being read")
    cache.remember(key, content, source.files)
    if weights == "stored":
        return stored
    name = _name(content, weights)
    with cache.building(name) as directory:
        if directory is not None:
            _requantise(stored, directory, weights, progress)
    return cache.checkpoint_path(name)


def _name(content: str, weights: str) -> str:
    return f"{content}-{CONVERTER_VERSION}.{group_int.REQUANTISE_VERSION}-{weights}"


def _import(source: hub.Source, directory: Path, progress: Progress | None) -> None:
    if source.kind == "gguf":
        import_gguf(list(source.files), directory, progress)
    else:
        import_huggingface(source.path, directory, progress)


# ---- GGUF --------------------------------------------------------------------------------------------------


def import_gguf(paths: list[Path], directory: Path, progress: Progress | None = None) -> None:
    """Converts a GGUF model of one or several files into an existing, empty directory, losslessly."""
    # Imported on use: a model that is in the cache already needs none of it.
    from gristmill.io.gguf import GgufModel
    from gristmill.io.gguf_config import translate
    from gristmill.models import read_config

    model = GgufModel(paths)
    config, sources = translate(model)
    read_config(config)
    expected = expected_tensors(config)
    zeros = _absent_biases(expected, sources)
    found = {name: item.tensor.shape for name, item in sources.items()}
    check_tensors(str(paths[0]), expected, found | {name: expected[name] for name in zeros})
    items: dict[str, Item] = {}
    for name, shape in expected.items():
        if name in zeros:
            items[name] = Vector(shape[0], partial(_zeros, shape[0]))
        elif len(shape) == 2:
            items[name] = _gguf_matrix(sources[name])
        else:
            items[name] = _gguf_vector(sources[name])
    generation = _write_tokenizer(model.metadata, directory)
    config |= {key: value for key, value in generation.items() if key.endswith("_token_id")}
    checkpoint.dump_json(directory / "generation_config.json", generation)
    general = model.metadata.get("general.name")
    types: dict[str, int] = {}
    for tensor in model.tensors.values():
        types[tensor.type.name] = types.get(tensor.type.name, 0) + 1
    report = {
        "model": general if isinstance(general, str) and general else paths[0].stem,
        "weights": "stored",
        "source": {"kind": "gguf", "files": [path.name for path in paths], "types": types},
        "gristmill": __version__,
    }
    checkpoint.write(directory, config, items, report=report, recipe=_recipe("stored"), progress=progress)


def _absent_biases(expected: Mapping[str, tuple[int, ...]], sources: Mapping[str, Source]) -> set[str]:
    """Biases that the config calls for but no layer has: a GGUF file leaves out those that are all zero.

    Only where a Hugging Face config has one switch for several biases; Qwen2's three must all be there.
    """
    switched = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    present = {name.split(".")[-2] for name in sources if name.endswith(".bias")}
    biases = [name for name in expected if name.endswith(".bias")]
    if not any(name.endswith("o_proj.bias") or ".mlp." in name for name in biases):
        return set()
    return {name for name in biases if name.split(".")[-2] in switched and name.split(".")[-2] not in present}


def _zeros(length: int) -> NDArray[np.float32]:
    return np.zeros(length, np.float32)


def _gguf_matrix(source: Source) -> Matrix:
    tensor, order = source.tensor, source.row_order()
    n, k = tensor.shape
    rows = tensor.rows()

    def take(start: int, stop: int) -> Packed:
        piece = rows[start:stop] if order is None else rows[order[start:stop]]
        return tensor.type.pack(np.ascontiguousarray(piece), k)

    return Matrix(tensor.type.spec((n, k)), take)


def _gguf_vector(source: Source) -> Vector:
    from gristmill.io.gguf_config import float_values

    def take() -> NDArray[np.float32]:
        values = float_values(source.tensor)
        order = source.row_order()
        return (values if order is None else values[order]) - np.float32(source.subtract)

    return Vector(source.tensor.shape[0], take)


_SAMPLING: dict[str, tuple[str, float, float]] = {
    "general.sampling.temp": ("temperature", 0.0, 100.0),
    "general.sampling.top_k": ("top_k", 0, 1 << 24),
    "general.sampling.top_p": ("top_p", 0.0, 1.0),
    "general.sampling.min_p": ("min_p", 0.0, 1.0),
    "general.sampling.penalty_repeat": ("repetition_penalty", 0.01, 100.0),
}
"""Sampling defaults in GGUF metadata: the name in generation_config.json, least and largest value."""


def _write_tokenizer(metadata: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Writes the tokenizer's files, if the GGUF file has a tokenizer, and returns the generation defaults."""
    result: dict[str, Any] = {}
    for key, (name, low, high) in _SAMPLING.items():
        value = metadata.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
            # The metadata is float32; its shortest decimal form is what was meant.
            result[name] = int(value) if name == "top_k" else float(str(np.float32(value)))
    if "tokenizer.ggml.model" not in metadata:
        return result
    from gristmill.io.gguf_tokenizer import convert_tokenizer

    files = convert_tokenizer(metadata)
    files.write(directory)
    for name in ("bos", "pad"):
        key = "padding" if name == "pad" else name
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(value) is int:
            result[f"{name}_token_id"] = value
    if files.eos_token_ids:
        ends = list(files.eos_token_ids)
        result["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return result


# ---- Hugging Face directories ------------------------------------------------------------------------------

_DTYPES = {"F32": "f32", "BF16": "bf16", "F16": "f16"}
_VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def import_huggingface(path: Path, directory: Path, progress: Progress | None = None) -> None:
    """Converts a Hugging Face directory (config.json and safetensors) into an existing, empty directory.

    Matrices stay in the dtype they are stored in, those of a quantised model in their codes; norms and biases
    become float32. Matrices whose columns are stored in an order of their own have it in program.json.
    """
    from gristmill.io.quantised import reader
    from gristmill.io.quantised.layers import Tensors
    from gristmill.models import build_program, read_config

    config = read_object(path / "config.json")
    prefixes = {"": ""}
    try:
        quantised = reader(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    if config.get("model_type") == "gemma3":
        config, prefixes = _gemma_text(config), {"language_model.": "", "model.language_model.": "model."}
    kind = model_type(config)
    files = [SafetensorsFile(file) for file in hub.weight_files(path) if file.suffix == ".safetensors"]
    tensors = Tensors(path)
    for file in files:
        for stored in file.entries:
            name = _plain_name(stored, prefixes, skip_vision=len(prefixes) > 1)
            if name is not None and not (name == "lm_head.weight" and tied(config)):
                tensors.add(name, file, stored)
    read_config(config)
    expected = expected_tensors(config)
    matrices = quantised.matrices(tensors, expected) if quantised else {}
    if quantised and not matrices:
        raise ModelError(f"{path} has a quantization_config, but none of its tensors is quantised")
    found = {name: item.matrix.spec.shape for name, item in matrices.items()}
    check_tensors(str(path), expected, found | {name: tensors.entry(name).shape for name in tensors})
    items: dict[str, Item] = {}
    for name, shape in expected.items():
        if name in matrices:
            items[name] = matrices[name].matrix
            continue
        dtype = tensors.entry(name).dtype
        if dtype not in _DTYPES:
            raise ModelError(f"{path}: the tensor {name} is {dtype}; F32, BF16 and F16 can be read")
        array = tensors.take(name)
        if len(shape) == 2:
            items[name] = _dense_matrix(array, _DTYPES[dtype])
        else:
            items[name] = Vector(shape[0], partial(_float32, array, dtype))
    orders = {name: item.order for name, item in matrices.items() if item.order is not None}
    program = _ordered(build_program(config), orders, items, str(path)) if orders else None
    copy_sides(path, directory)
    report = {
        "model": path.name,
        "weights": "stored",
        "source": {"kind": "huggingface", "files": [file.path.name for file in files], "architecture": kind},
        "gristmill": __version__,
    }
    checkpoint.write(
        directory,
        config,
        items,
        report=report,
        recipe=_recipe("stored"),
        program=program,
        progress=progress,
    )


def _ordered(
    program: Program, orders: Mapping[str, NDArray[np.int64]], items: dict[str, Item], where: str
) -> Program:
    """The program that gives these weights their inputs in these orders, which join the items as vectors."""
    from gristmill.program.edits import linears_of, round_inputs

    others = {name for node in program.nodes if node.op != "linear" for name in node.weights}
    for name in orders:
        if name in others:
            raise ModelError(
                f"{where}: {name} is not read by linear layers alone: its columns can have no order"
            )
    for linears in linears_of(program).values():
        # Linears of one input may share an order or not.
        alike: dict[bytes, list[Node]] = {}
        for node in linears:
            if node.weights[0] in orders:
                alike.setdefault(orders[node.weights[0]].tobytes(), []).append(node)
        for nodes in alike.values():
            first = nodes[0].weights[0]
            name = f"{first.removesuffix('.weight')}.order"
            program = round_inputs(program, [node.name for node in nodes], order=name)
            items[name] = Vector(len(orders[first]), partial(orders[first].astype, np.float32))
    return program


def copy_sides(source: Path, directory: Path) -> None:
    """Copies the tokenizer's and the other small files of a model, as far as they are there."""
    for name in SIDE_FILES:
        if (source / name).is_file():
            (directory / name).write_bytes(read_small(source / name, _SIDE_LIMIT))


def _gemma_text(config: dict[str, Any]) -> dict[str, Any]:
    """The text part of a Gemma 3 config that also describes a vision tower."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ModelError("the config of a gemma3 model has no text_config")
    result = {**text, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    shared = ["eos_token_id", "bos_token_id", "pad_token_id"]
    for key in (*shared, "tie_word_embeddings", "dtype", "torch_dtype"):
        if key in config:
            result.setdefault(key, config[key])
    return result


def _plain_name(stored: str, prefixes: Mapping[str, str], skip_vision: bool) -> str | None:
    """The text model's name of a stored tensor; None for tensors that are not needed."""
    if stored.endswith(".rotary_emb.inv_freq") or (skip_vision and stored.startswith(_VISION)):
        return None
    for prefix, replacement in prefixes.items():
        if prefix and stored.startswith(prefix):
            return replacement + stored[len(prefix) :]
    return stored


def _float32(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    return dense.from_bf16(values) if dtype == "BF16" else values.astype(np.float32)


def _dense_matrix(values: NDArray[Any], form: str) -> Matrix:
    n, k = values.shape
    return Matrix(dense.spec((n, k), form), lambda start, stop: dense.pack(values[start:stop], form))


# ---- weight modes ------------------------------------------------------------------------------------------


def target_spec(spec: PackedSpec, weights: str) -> PackedSpec:
    """What a matrix becomes in a weight mode ("f32", "bf16", "int8", "int4")."""
    if weights in ("f32", "bf16"):
        return dense.spec(spec.shape, weights)
    bits = {"int8": 8, "int4": 4}[weights]
    group, offset = (
        (group_int.INT4_GROUP, group_int.INT4_OFFSET)
        if bits == 4
        else (group_int.INT8_GROUP, group_int.INT8_OFFSET)
    )
    return group_int.spec(spec.shape, bits, group, offset)


def convert_packed(packed: Packed, weights: str) -> Packed:
    """A matrix in a weight mode; unchanged if it is in that format already."""
    target = target_spec(packed.spec, weights)
    if packed.spec == target:
        return packed
    values = decode_f32(packed)
    if weights in ("f32", "bf16"):
        return dense.pack(values, weights)
    if not np.isfinite(values).all():
        raise ModelError("a matrix holds values that are not finite: it cannot be rounded to integers")
    return group_int.quantise(values, target.bits)


def _requantise(stored: Path, directory: Path, weights: str, progress: Progress | None) -> None:
    source = Checkpoint.open(stored)
    items: dict[str, Item] = {}
    for name in source.names():
        spec = source.specs.get(name)
        if spec is None:
            vector = source.vector(name)
            items[name] = Vector(len(vector), partial(np.asarray, vector))
        else:
            items[name] = Matrix(target_spec(spec, weights), _converter(source, name, weights))
    copy_sides(stored, directory)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    report = read_object(stored / "report.json") if (stored / "report.json").is_file() else {}
    kept: dict[str, Any] = {key: report[key] for key in ("model", "source") if key in report}
    kept.setdefault("model", stored.name)
    kept |= {"weights": weights, "gristmill": __version__}
    checkpoint.write(
        directory,
        config,
        items,
        report=kept,
        recipe=_recipe(weights),
        program=source.program() if source.edited else None,
        factors=source.factors,
        activations=source.activations,
        adapters=source.config["quantization_config"].get("adapters") is not False,
        progress=progress,
        label=f"converting to {weights}",
    )


def _converter(source: Checkpoint, name: str, weights: str) -> Callable[[int, int], Packed]:
    packed = source.packed(name)

    def take(start: int, stop: int) -> Packed:
        try:
            return convert_packed(packed.rows(start, stop), weights)
        except ModelError as error:
            raise ModelError(f"{source.directory}, tensor {name}: {error}") from None

    return take


def _recipe(weights: str) -> str:
    """recipe.yaml: the methods that made the weights, in order."""
    if weights == "stored":
        return "# Weights kept as the source stores them.\nversion: 1\nmethods: []\n"
    options = {
        "f32": "{format: f32}",
        "bf16": "{format: bf16}",
        "int8": "{format: group_int, bits: 8, group: 64, scale: absmax}",
        "int4": "{format: group_int, bits: 4, group: 32, scale: least_squares}",
    }[weights]
    text = "version: 1\nmethods:\n- method: round_to_nearest\n"
    return f"{text}  options: {options}\n  tensors: all matrices, embedding and head included\n"
