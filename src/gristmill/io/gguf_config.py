"""GGUF metadata and tensor names translated into a Hugging Face config and Hugging Face names.

What llama.cpp's converter does to a model is undone here: q and k rows of the "llama" architecture are stored
for adjacent-pair rotation and are put back into half-split order; Gemma's norm weights are stored with 1
added, which is subtracted; the Llama-3 frequency factors in `rope_freqs.weight` become a rope_scaling entry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError
from gristmill.formats.dense import from_bf16
from gristmill.io.gguf import GgufModel, TensorInfo
from gristmill.io.mapped import short

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_GEMMA_LAYER = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK = re.compile(r"^blk\.(\d{1,4})\.([a-z_]+)\.(weight|bias)$")
# Tables some converters wrote that follow from the config (rope_freqs is read by `translate`).
_DERIVED = re.compile(r"^(rope_freqs\.weight|blk\.\d+\.(attn_rot_embd|rope_freqs)\.weight)$")

_GEMMA_PATTERN = 6
_GEMMA_27B_LAYERS = 62


@dataclass(frozen=True, slots=True)
class Source:
    """Where a Hugging Face tensor comes from: the GGUF tensor and what to do to it."""

    tensor: TensorInfo
    heads: int = 0
    """If not 0, each of so many heads has its rows in adjacent pairs, to be put in half-split order."""
    subtract: float = 0.0

    def row_order(self) -> NDArray[np.intp] | None:
        """The file's row for each row of the result; None for the order of the file."""
        return half_split_order(self.tensor.shape[0], self.heads) if self.heads else None


def half_split_order(rows: int, heads: int) -> NDArray[np.intp]:
    """For each row in half-split order its row in adjacent-pair order: undoes the converter's permutation.

    A head's rows (0, 1), (2, 3), … are the pairs that rotate together; half-split puts the first of each pair
    first.
    """
    half = rows // heads // 2
    return np.arange(rows, dtype=np.intp).reshape(heads, half, 2).transpose(0, 2, 1).reshape(rows)


class _Keys:
    """Typed access to the metadata of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.metadata, self.architecture = metadata, architecture

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None, limit: int = 1 << 30) -> int:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"the GGUF metadata lacks {self.architecture}.{key}")
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, list):
            raise ModelError(f"{self.architecture}.{key} differs between layers, which is not supported")
        if type(value) is not int or not 0 < value <= limit:
            raise ModelError(f"the GGUF metadata has an invalid {self.architecture}.{key}: {short(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"the GGUF metadata lacks {self.architecture}.{key}")
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise ModelError(f"the GGUF metadata has an invalid {self.architecture}.{key}: {short(value)}")
        # float32 values print as what was meant (1e-05), and round to the same float32 again.
        return float(str(np.float32(value))) if type(value) is float else float(value)


def translate(model: GgufModel) -> tuple[dict[str, Any], dict[str, Source]]:
    """The config, and by Hugging Face name the sources of all tensors. ModelError if unsupported."""
    architecture = model.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise ModelError(f"{model.paths[0]}: the metadata lacks general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(f"the GGUF architecture {architecture[:60]!r} is not supported (supported: {known})")
    keys = _Keys(model.metadata, architecture)
    for key in ("expert_count", "attention.clamp_kqv", "logit_scale"):
        if keys.get(key):
            raise ModelError(f"{model.paths[0]} uses {architecture}.{key}, which is not supported")
    config = _config(model, keys)
    return config, _sources(model, config)


def _config(model: GgufModel, keys: _Keys) -> dict[str, Any]:
    architecture, tensors = keys.architecture, model.tensors
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count", limit=1 << 16)
    kind = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    rope_dim = keys.integer("rope.dimension_count", 0) if keys.get("rope.dimension_count") is not None else 0
    head = keys.integer("attention.key_length", rope_dim or hidden // heads, limit=1 << 16)
    if keys.integer("attention.value_length", head) != head:
        raise ModelError(
            f"{architecture}.attention.value_length differs from the keys' {head}, which is not supported"
        )
    if rope_dim not in (0, head):
        raise ModelError(f"{architecture} with {rope_dim} rotated of {head} head dimensions is not supported")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{model.paths[0]} lacks the tensor token_embd.weight")
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count", limit=4096),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads, limit=1 << 16),
        "head_dim": head,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 1e6 if architecture == "gemma3" else 1e4),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",
    }
    if architecture == "gemma3":
        _gemma_config(config, keys)
    elif keys.get("attention.sliding_window"):
        if architecture != "llama":
            raise ModelError(f"{architecture} with a sliding window is not supported from GGUF")
        config["model_type"] = "mistral"
        config["sliding_window"] = keys.integer("attention.sliding_window")
    if config["model_type"] in ("llama", "qwen3"):
        config["attention_bias"] = any(
            f"blk.0.attn_{part}.bias" in tensors for part in ("q", "k", "v", "output")
        )
    if config["model_type"] == "llama":
        config["mlp_bias"] = any(f"blk.0.ffn_{part}.bias" in tensors for part in ("gate", "up", "down"))
    scaling = _rope_scaling(model, config, keys)
    if scaling:
        config["rope_scaling"] = scaling
    config["architectures"] = [_CLASSES[config["model_type"]]]
    return config


def _gemma_config(config: dict[str, Any], keys: _Keys) -> None:
    layers, head = config["num_hidden_layers"], config["head_dim"]
    del config["hidden_act"]
    config["hidden_activation"] = "gelu_pytorch_tanh"
    config["rope_local_base_freq"] = keys.number("rope.freq_base_swa", 1e4)
    # The 27 B model, known by its layer count, scales by hidden / heads instead of the head's size.
    wide = layers == _GEMMA_27B_LAYERS
    config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"] if wide else head
    config["sliding_window"] = keys.integer("attention.sliding_window")
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) < layers:
            raise ModelError(
                f"gemma3.attention.sliding_window_pattern has {len(pattern)} entries for {layers} layers"
            )
        local = [bool(value) for value in pattern[:layers]]
    else:
        period = keys.integer("attention.sliding_window_pattern", _GEMMA_PATTERN)
        local = [(index + 1) % period != 0 for index in range(layers)]
    config["layer_types"] = ["sliding_attention" if value else "full_attention" for value in local]
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if keys.get(key):
            config[key] = keys.number(key)


def _rope_scaling(model: GgufModel, config: dict[str, Any], keys: _Keys) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type")
    factor = keys.number(
        "rope.scaling.factor" if keys.get("rope.scaling.factor") else "rope.scale_linear", 1.0
    )
    table = model.tensors.get("rope_freqs.weight")
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if name in model.tensors:
            raise ModelError(f"{model.paths[0]} has {name}: LongRoPE scaling is not supported")
    if kind not in (None, "none", "linear"):
        raise ModelError(f"the rope scaling {str(kind)[:60]!r} is not supported")
    scaling = {"rope_type": "linear", "factor": factor} if kind != "none" and factor != 1.0 else None
    if table is None:
        return scaling
    if table.type.name not in ("F32", "F16", "BF16") or table.shape != (config["head_dim"] // 2,):
        raise ModelError(f"{model.paths[0]}: rope_freqs.weight has the wrong shape or type")
    factors = float_values(table).astype(np.float64)
    if (factors == 1).all():
        return scaling
    if scaling:
        raise ModelError(f"{model.paths[0]} has both linear rope scaling and rope_freqs.weight")
    original = keys.integer("rope.scaling.original_context_length", 8192)
    return llama3_scaling(factors, config["rope_theta"], original)


def llama3_scaling(factors: NDArray[np.float64], theta: float, original: int) -> dict[str, Any]:
    """The Llama-3 rope_scaling entry whose frequency divisors are `factors` [head_dim / 2].

    The rule: with wavelengths w, s = clip((original / w - low) / (high - low), 0, 1) and divisor 1 / ((1 - s)
    / factor + s). `original` and (low, high) are only determined together, so `original` is given, and the
    published low = 1, high = 4 are tried before a line is fitted through s. ModelError if nothing reproduces
    the factors to 1e-5.
    """
    if not np.isfinite(factors).all() or factors.min() < 1 or factors.max() <= 1:
        raise ModelError("the factors in rope_freqs.weight do not follow the Llama-3 rule")
    count = len(factors)
    turns = original / (2 * math.pi * theta ** (np.arange(count) / count))
    factor = float(factors.max())

    def fits(low: float, high: float) -> bool:
        s = np.clip((turns - low) / (high - low), 0, 1)
        return bool(np.allclose(1 / ((1 - s) / factor + s), factors, rtol=1e-5, atol=0))

    candidates = [(1.0, 4.0)]
    inside = (factors > 1 + 1e-6) & (factors < factor * (1 - 1e-6))
    if inside.sum() >= 2:
        s = (1 / factors[inside] - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(turns[inside], s, 1)
        if slope > 0:
            candidates.append((-start / slope, (1 - start) / slope))
    for low, high in candidates:
        if 0 < low < high and fits(low, high):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ModelError("the factors in rope_freqs.weight do not follow the Llama-3 rule")


def float_values(tensor: TensorInfo) -> NDArray[np.float32]:
    """All values of a float tensor as float32, flat; ModelError for quantised types."""
    if tensor.type.name == "BF16":
        return from_bf16(tensor.data.view(np.uint16))
    if tensor.type.name not in ("F32", "F16"):
        raise ModelError(
            f"the vector {tensor.name!r} has the type {tensor.type.name}; a float type is needed"
        )
    return tensor.data.view(np.float32 if tensor.type.name == "F32" else np.float16).astype(np.float32)


def _sources(model: GgufModel, config: dict[str, Any]) -> dict[str, Source]:
    gemma, permuted = config["model_type"] == "gemma3_text", config["model_type"] in ("llama", "mistral")
    layer_names = _LAYER | _GEMMA_LAYER if gemma else _LAYER
    result: dict[str, Source] = {}
    for name, tensor in model.tensors.items():
        if _DERIVED.match(name):
            continue
        match = _BLOCK.match(name)
        if name in _TOP:
            target = _TOP[name]
        elif match and match[2] in layer_names:
            target = f"model.layers.{int(match[1])}.{layer_names[match[2]]}.{match[3]}"
        else:
            raise ModelError(
                f"{model.paths[0]} has the tensor {name[:100]!r}, which its architecture does not know"
            )
        heads = 0
        if permuted and match and match[2] in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"]
            if config["head_dim"] % 2 or tensor.shape[0] != heads * config["head_dim"]:
                raise ModelError(f"{model.paths[0]}: the tensor {name!r} does not have {heads} heads' rows")
        norm = gemma and name.endswith("norm.weight")
        if target in result:
            raise ModelError(f"{model.paths[0]}: two tensors stand for {target}")
        result[target] = Source(tensor, heads, 1.0 if norm else 0.0)
    return result
