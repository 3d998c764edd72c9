"""Models quantised as Hugging Face directories hold them: written here on their own, by way of Python's big
integers, so that reading them back is a check by an independent witness.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.kits import files

Stored = dict[str, tuple[str, NDArray[Any]]]
"""Tensors as a file holds them: name -> (dtype, array)."""
Encoder = Callable[["Layer"], Stored]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Layer:
    """A matrix [N, K] of values scale * (code - zero): codes [N, K], scales and zeros [N, G]."""

    bits: int
    group: int
    codes: NDArray[np.int64]
    scales: NDArray[np.float32]
    zeros: NDArray[np.int64]
    dtype: str = "F16"

    def values(self) -> NDArray[np.float64]:
        """The matrix in float64."""
        k = self.codes.shape[1]
        wide = [np.repeat(x, self.group, axis=1)[:, :k] for x in (self.scales, self.zeros)]
        return wide[0].astype(np.float64) * (self.codes - wide[1])


def layer(
    shape: tuple[int, int],
    bits: int,
    group: int,
    *,
    zero: int | None = None,
    dtype: str = "F16",
    seed: int = 0,
) -> Layer:
    """Random codes and scales, zeros likewise or all the same; scales fit their dtype."""
    n, k = shape
    rng = np.random.default_rng([seed, n, k, bits])
    groups = -(-k // group)
    scales = (rng.uniform(0.5, 1.5, (n, groups)) * 0.2 / (1 << bits)).astype(np.float32)
    if dtype == "F16":
        scales = scales.astype(np.float16).astype(np.float32)
    elif dtype == "BF16":
        scales = (scales.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    zeros = rng.integers(0, 1 << bits, (n, groups)) if zero is None else np.full((n, groups), zero)
    return Layer(bits, group, rng.integers(0, 1 << bits, (n, k)), scales, zeros, dtype)


def stream(values: Sequence[int], bits: int) -> list[int]:
    """The words of a stream of fields, lowest bits first."""
    whole = sum(int(value) << (bits * i) for i, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    return [whole >> (32 * i) & 0xFFFFFFFF for i in range(count)]


def chunks(values: Sequence[int], bits: int) -> list[int]:
    """Words of 32 // bits fields each, lowest bits first."""
    size = 32 // bits
    return [stream(values[i : i + size], bits)[0] for i in range(0, len(values), size)]


def words(columns: Sequence[list[int]]) -> NDArray[np.int32]:
    """Lists of words as rows of int32."""
    return np.array(columns, np.uint32).view(np.int32)


def floats(values: NDArray[np.float32], dtype: str) -> tuple[str, NDArray[Any]]:
    """Float values as a file stores them."""
    if dtype == "BF16":
        return dtype, (values.view(np.uint32) >> 16).astype(np.uint16)
    return dtype, values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def gptq(one: Layer, form: str = "gptq") -> Stored:
    """GPTQ's parts."""
    zeros = one.zeros
    if form == "gptq" and one.bits == 3:
        zeros = (zeros - 1) % 8
    qzeros = [stream(list(row), one.bits) for row in zeros.T]
    if form == "gptq" and one.bits != 3:
        ones = sum(1 << i for i in range(0, 32, one.bits))
        qzeros = [[(word - ones) % (1 << 32) for word in row] for row in qzeros]
    index = np.arange(one.codes.shape[1]) // one.group
    return {
        "qweight": ("I32", np.ascontiguousarray(words([stream(list(row), one.bits) for row in one.codes]).T)),
        "qzeros": ("I32", words(qzeros)),
        "scales": floats(np.ascontiguousarray(one.scales.T), one.dtype),
        "g_idx": ("I32", index.astype(np.int32)),
    }


def awq(one: Layer) -> Stored:
    """AWQ's parts."""

    def pack(table: NDArray[np.int64]) -> NDArray[np.int32]:
        return words(
            [chunks([row[i + j] for i in range(0, len(row), 8) for j in AWQ_ORDER], 4) for row in table]
        )

    return {
        "qweight": ("I32", pack(one.codes.T)),
        "qzeros": ("I32", pack(one.zeros.T)),
        "scales": floats(np.ascontiguousarray(one.scales.T), one.dtype),
    }


def packed(one: Layer, symmetric: bool) -> Stored:
    """The parts of compressed-tensors' "pack-quantized"."""
    parts: Stored = {
        "weight_packed": ("I32", words([chunks(list(row), one.bits) for row in one.codes])),
        "weight_scale": floats(one.scales, one.dtype),
        "weight_shape": ("I64", np.array(one.codes.shape, np.int64)),
    }
    if not symmetric:
        points = words([chunks(list(row), one.bits) for row in one.zeros.T])
        parts["weight_zero_point"] = "I32", np.ascontiguousarray(points.T)
    return parts


def plain(one: Layer, symmetric: bool) -> Stored:
    """The parts of compressed-tensors' "int-quantized"."""
    half = 1 << (one.bits - 1)
    parts: Stored = {
        "weight": ("I8", (one.codes - half).astype(np.int8)),
        "weight_scale": floats(one.scales, one.dtype),
    }
    if not symmetric:
        parts["weight_zero_point"] = "I8", (one.zeros - half).astype(np.int8)
    return parts


def scheme(**weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with one group for all linear layers."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"type": "int", "dynamic": False, **weights}}
        },
        "ignore": ["lm_head"],
    }


def small(**changes: Any) -> dict[str, Any]:
    """A config whose widths are multiples of 32, but not of 64 everywhere."""
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 1}
    return files.config(**{**sizes, "head_dim": 32, "vocab_size": 272, "num_hidden_layers": 1, **changes})


def linears(of: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The linear layers of a config's decoder, by the names of their weights."""
    expected = files.expected_tensors(of)
    return {n: (s[0], s[1]) for n, s in expected.items() if len(s) == 2 and ".layers." in n}


def write(directory: Path, of: Mapping[str, Any], quantization: Any, tensors: Stored) -> Path:
    """Writes config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**of, "quantization_config": quantization}))
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, values) in tensors.items():
        piece = np.ascontiguousarray(values).tobytes()
        span = [len(data), len(data) + len(piece)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": span}
        data += piece
    (directory / "model.safetensors").write_bytes(files.safetensors_bytes(header, data))
    return directory


def stored(of: Mapping[str, Any], layers: Mapping[str, Layer], encode: Encoder) -> Stored:
    """The tensors of a model: these matrices encoded, all others random and in float32."""
    result: Stored = {n: ("F32", v) for n, v in files.weights(of).items() if n not in layers}
    for name, one in layers.items():
        parts = encode(one).items()
        result |= {f"{name.removesuffix('.weight')}.{part}": item for part, item in parts}
    return result


def dequantised(of: Mapping[str, Any], layers: Mapping[str, Layer]) -> files.Tensors:
    """The same model in float32."""
    values = {name: one.values().astype(np.float32) for name, one in layers.items()}
    return {name: values.get(name, other) for name, other in files.weights(of).items()}


def table(rows: int, columns: int, limit: int) -> NDArray[np.int64]:
    """Numbers below a limit, by a rule: what the real libraries packed for the digests in the tests."""
    i, j = np.arange(rows)[:, None], np.arange(columns)
    return (7 * i + 3 * j + i * j // 2) % limit


def ruled(rows: int, columns: int, bits: int, group: int) -> Layer:
    """The layer of codes and zeros by that rule, with scales of 1/4."""
    groups = columns // group
    scales = np.full((rows, groups), 0.25, np.float32)
    return Layer(bits, group, table(rows, columns, 1 << bits), scales, table(rows, groups, 1 << bits), "F32")


def symmetric(one: Layer) -> Layer:
    """The layer with the middle zero everywhere."""
    return replace(one, zeros=np.full_like(one.zeros, 1 << (one.bits - 1)))


def digest(*arrays: NDArray[np.int32]) -> str:
    """The beginning of a SHA-256 over words."""
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]
