"""Small models written to disk: GGUF files (single or split) and Hugging Face directories, with known
weights.

The GGUF side is written with the `gguf` package, its names come from that package's own map, and the
converter's changes to the weights (paired rotation order, Gemma's norms) are made here on their own, so that
reading such a file back is a check by an independent witness.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from gristmill.formats import group_int, sparse24
from gristmill.formats.packed import Packed, decode_f32
from gristmill.io import checkpoint
from gristmill.io.checkpoint import Checkpoint
from gristmill.io.expected import expected_tensors

Tensors = dict[str, NDArray[np.float32]]

QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
FLOATS = ("F32", "F16", "BF16")
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
"""Where a block of each type has its float16 fields; every other byte may hold anything."""

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """A Hugging Face config of a tiny model whose rows fit every block size; `changes` override keys."""
    result: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 272,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    if kind == "mistral":
        result["sliding_window"] = 24
    if kind == "gemma3_text":
        del result["hidden_act"]
        result |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_local_base_freq": 10000.0,
            "query_pre_attn_scalar": 64,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": True,
        }
    return result | changes


def weights(of: Mapping[str, Any], seed: int = 0) -> Tensors:
    """Random weights of moderate size for every tensor of a config, by Hugging Face name."""
    rng = np.random.default_rng([seed, 77])
    result: Tensors = {}
    for name, shape in expected_tensors(of).items():
        scale = 1.0 if name.endswith("norm.weight") else 0.05
        result[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
    return result


def rotation_pairs(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows from half-split order into adjacent pairs per head: what llama.cpp's converter does to q and k."""
    half = values.shape[0] // heads // 2
    halves = values.reshape(heads, 2, half, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def payload(kind: str, rows: int, columns: int, seed: int = 0, extreme: bool = False) -> NDArray[np.uint8]:
    """Random rows of a quantised type as bytes: every code and sub-scale occurs, float16 fields are finite.

    The halves are about the size of real scales; with `extreme` they are any finite value, zeros, subnormals
    and the largest included.
    """
    rng = np.random.default_rng([seed, rows, columns, *kind.encode()])
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = rng.integers(0, 256, (rows, columns // block, nbytes), dtype=np.uint8)
    for at in HALVES[kind]:
        shape = data.shape[:2]
        half = (rng.standard_normal(shape) * 0.01).astype(np.float16)
        if extreme:
            half = rng.integers(0, 1 << 16, shape, dtype=np.uint16).view(np.float16)
            half = np.where(np.isfinite(half), half, np.float16(0))
            half.reshape(-1)[:4] = np.array([0.0, -0.0, 65504.0, 6e-8], np.float16)[: half.size]
        data[..., at : at + 2] = half[..., None].view(np.uint8)
    return data.reshape(rows, columns // block * nbytes)


def dequantised(kind: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The gguf package's own reading of such bytes."""
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


def encode(kind: str, values: NDArray[np.float32], seed: int = 0) -> NDArray[Any]:
    """Values as GGUFWriter takes them for a type; K-quants, which the package cannot make, are random."""
    if kind == "F32":
        return values
    if kind == "F16":
        return values.astype(np.float16)
    if kind.endswith("_K"):
        return payload(kind, values.shape[0], values.shape[1], seed)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])


def byte_tokenizer() -> dict[str, Any]:
    """GGUF tokenizer metadata (gpt2 kind): 256 bytes, 14 merges, <|begin|> and <|end|>: 272 tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(printable)))
    merges = [
        "t h",
        "Ġ t",
        "Ġt h",
        "i n",
        "e r",
        "Ġ a",
        "o n",
        "r e",
        "a n",
        "Ġth e",
        "a t",
        "e n",
        "o r",
        "e s",
    ]
    tokens = [letters[byte] for byte in range(256)] + [merge.replace(" ", "") for merge in merges]
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": [*tokens, "<|begin|>", "<|end|>"],
        "types": [1] * len(tokens) + [3, 3],
        "merges": merges,
        "bos": len(tokens),
        "eos": len(tokens) + 1,
    }


def write_gguf(
    path: Path,
    of: Mapping[str, Any],
    tensors: Tensors,
    kind: str | Mapping[str, str] = "F32",
    *,
    parts: int = 1,
    tokenizer: bool = True,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, NDArray[Any]] | None = None,
) -> list[Path]:
    """Writes a model as GGUF and returns its files.

    `kind` is the type of all matrices, or of each by Hugging Face name (F32 where absent). With `parts` above
    1, `path` (x.gguf) becomes x-00001-of-0000N.gguf and so on. `metadata` adds architecture keys as integers,
    floats, strings or lists; `extra` adds float tensors under GGUF names.
    """
    model_type = of["model_type"]
    arch = {"gemma3_text": "gemma3", "mistral": "llama"}.get(model_type, model_type)
    layers, heads, kv_heads = of["num_hidden_layers"], of["num_attention_heads"], of["num_key_value_heads"]
    # The writer counts tensors per part.
    most = -(-len(tensors) // parts) if parts > 1 else 0
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=most)
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(of["max_position_embeddings"])
    writer.add_embedding_length(of["hidden_size"])
    writer.add_feed_forward_length(of["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(of["head_dim"])
    writer.add_value_length(of["head_dim"])
    writer.add_layer_norm_rms_eps(of["rms_norm_eps"])
    writer.add_rope_freq_base(of["rope_theta"])
    if model_type in ("mistral", "gemma3_text"):
        writer.add_sliding_window(of["sliding_window"])
    if "layer_types" in of and "attention.sliding_window_pattern" not in (metadata or {}):
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in of["layer_types"]])
    for key, value in (metadata or {}).items():
        _add(writer, key if "." in key and key.split(".")[0] == "general" else f"{arch}.{key}", value)
    if tokenizer:
        _add_tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers)
    for name, values in tensors.items():
        stem, _, suffix = name.rpartition(".")
        target = names.get_name(stem)
        assert target is not None, name
        written = values
        if model_type in ("llama", "mistral") and stem.endswith(("q_proj", "k_proj")):
            written = rotation_pairs(values, heads if stem.endswith("q_proj") else kv_heads)
        if model_type == "gemma3_text" and name.endswith("norm.weight"):
            written = values + np.float32(1)
        chosen = kind if isinstance(kind, str) else kind.get(name, "F32")
        if values.ndim == 1:
            chosen = "F32"
        data = encode(chosen, written)
        dtype = None if chosen in ("F32", "F16") else gguf.GGMLQuantizationType[chosen]
        writer.add_tensor(f"{target}.{suffix}", data, raw_dtype=dtype)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [path] if parts == 1 else sorted(path.parent.glob(f"{path.stem}-0*.gguf"))


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    table = byte_tokenizer()
    writer.add_tokenizer_model(table["model"])
    writer.add_tokenizer_pre(table["pre"])
    writer.add_token_list(table["tokens"])
    writer.add_token_types(table["types"])
    writer.add_token_merges(table["merges"])
    writer.add_bos_token_id(table["bos"])
    writer.add_eos_token_id(table["eos"])


def write_huggingface(
    directory: Path, of: Mapping[str, Any], tensors: Tensors, dtype: str = "F32", *, shards: int = 1
) -> Path:
    """Writes config.json and safetensors (with an index if there are several shards); returns the directory.

    `dtype`: F32, F16, F64, or BF16 (values cut to 16 bits).
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(of))
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, dtype)
        return directory
    table: dict[str, str] = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        write_safetensors(directory / file, part, dtype)
        table |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": table})
    (directory / "model.safetensors.index.json").write_text(text)
    return directory


def sparse24_of(values: NDArray[np.float32], group: int) -> Packed:
    """The two largest of every four columns, rounded to 2:4 codes."""
    n, k = values.shape
    padded = np.zeros((n, -(-k // 4) * 4), np.float32)
    padded[:, :k] = np.abs(values)
    order = padded.reshape(n, -1, 4).argsort(axis=2, kind="stable").argsort(axis=2)
    mask = (order >= 2).reshape(n, -1)[:, :k]
    kept = np.where(mask, values, 0).astype(np.float32)
    body = group_int.round_group_int(kept, bits=4, group=group, symmetric=True, clip="mse")
    codes, scales, _ = group_int.unpack(body)
    return sparse24.pack(codes, mask, scales, group=group)


def write_mixed(stored: Path, directory: Path) -> None:
    """A checkpoint with the weights of another, its matrices in all widths and 2:4 in turn."""
    rounded = partial(partial, group_int.round_group_int)
    formats: list[Callable[[NDArray[np.float32]], Packed]] = [
        rounded(bits=6, group=64, symmetric=True),
        rounded(bits=5, group=32, symmetric=False),
        rounded(bits=3, group=128, symmetric=True, clip="mse"),
        rounded(bits=2, group=16, symmetric=False, clip="mse", scales="f32"),
        partial(sparse24_of, group=64),
        rounded(bits=4, group=128, symmetric=True),
        rounded(bits=3, group=32, symmetric=False),
        rounded(bits=6, group=16, symmetric=True),
        rounded(bits=8, group=0, symmetric=True, scales="f32"),
    ]
    source = Checkpoint.open(stored)
    items: dict[str, checkpoint.Item] = {}
    for name in source.names():
        if name in source.specs:
            packed = formats[len(items) % len(formats)](decode_f32(source.packed(name)))
            items[name] = checkpoint.Matrix(packed.spec, packed.rows)
        else:
            vector = source.vector(name)
            items[name] = checkpoint.Vector(len(vector), partial(np.asarray, vector))
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    directory.mkdir()
    checkpoint.write(directory, config, items, report={"weights": "mixed"}, recipe="version: 1\n")


def write_safetensors(path: Path, tensors: Tensors, dtype: str) -> None:
    """Writes one file: with the safetensors package, but bfloat16, which NumPy lacks, by hand."""
    if dtype != "BF16":
        kind = {"F32": np.float32, "F16": np.float16, "F64": np.float64}[dtype]
        safetensors.numpy.save_file({name: values.astype(kind) for name, values in tensors.items()}, path)
        return
    header: dict[str, Any] = {}
    data = b""
    for name, values in tensors.items():
        piece = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
        span = [len(data), len(data) + len(piece)]
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": span}
        data += piece
    path.write_bytes(safetensors_bytes(header, data))


def safetensors_bytes(header: Any, data: bytes) -> bytes:
    """A safetensors file from a header (an object for JSON, or its bytes) and the data after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


GGUF_NUMBERS = {"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7,
                "string": 8, "array": 9, "u64": 10, "i64": 11, "f64": 12}  # fmt: skip


def gguf_string(text: str | bytes, length: int | None = None) -> bytes:
    """A GGUF string; `length` replaces the true one."""
    raw = text.encode() if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw


def gguf_pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    """A metadata pair from its parts."""
    return gguf_string(key) + kind.to_bytes(4, "little") + value


def gguf_info(
    name: str | bytes, shape: tuple[int, ...], kind: int, offset: int, rank: int | None = None
) -> bytes:
    """A tensor info; `shape` innermost first, as in the file."""
    result = gguf_string(name) + (len(shape) if rank is None else rank).to_bytes(4, "little")
    result += b"".join((size % (1 << 64)).to_bytes(8, "little") for size in shape)
    return result + kind.to_bytes(4, "little") + offset.to_bytes(8, "little")


def gguf_bytes(
    pairs: list[bytes],
    infos: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
    alignment: int = 32,
) -> bytes:
    """A GGUF file from its pieces, sound or not; `counts` replaces the counts of (tensors, pairs)."""
    tensors, keys = counts or (len(infos), len(pairs))
    head = magic + version.to_bytes(4, "little") + tensors.to_bytes(8, "little") + keys.to_bytes(8, "little")
    head += b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % alignment) + data
