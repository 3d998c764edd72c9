"""Which tensors a config calls for, with their shapes: what a model's files are checked against.

One place for every reader: a GGUF import, a Hugging Face directory and a checkpoint directory must all hold
exactly these (Hugging Face names; matrices as (rows, columns) = (outputs, inputs)).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from gristmill.errors import ModelError
from gristmill.io.mapped import short

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")

Shapes = dict[str, tuple[int, ...]]


def integer(config: Mapping[str, Any], key: str, default: int | None = None, limit: int = 1 << 30) -> int:
    """A positive integer of the config; ModelError if it is absent (without default) or not one."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelError(f"the model's config has no {key}")
    if type(value) is not int or not 0 < value <= limit:
        raise ModelError(f"the model's config has an invalid {key}: {short(value)}")
    return value


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """A truth value of the config; ModelError if it is something else."""
    value = config.get(key)
    if value is None:
        return default
    if type(value) is not bool:
        raise ModelError(f"the model's config has an invalid {key}: {short(value)}")
    return value


def model_type(config: Mapping[str, Any]) -> str:
    """The config's model_type; ModelError if it is not one that gristmill runs."""
    value = config.get("model_type")
    if not isinstance(value, str):
        raise ModelError("the model's config has no model_type")
    if value not in MODEL_TYPES:
        raise ModelError(
            f"the architecture {value[:60]!r} is not supported (supported: {', '.join(MODEL_TYPES)})"
        )
    return value


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the head uses the embedding's weights."""
    return flag(config, "tie_word_embeddings", model_type(config) == "gemma3_text")


def expected_tensors(config: Mapping[str, Any]) -> Shapes:
    """Name -> shape of every tensor of the model, in layer order. ModelError if the config is damaged."""
    kind = model_type(config)
    hidden, inner = integer(config, "hidden_size"), integer(config, "intermediate_size")
    layers, vocab = integer(config, "num_hidden_layers", limit=4096), integer(config, "vocab_size")
    heads = integer(config, "num_attention_heads", limit=1 << 16)
    kv_heads = integer(config, "num_key_value_heads", heads, limit=1 << 16)
    head = integer(config, "head_dim", 256 if kind == "gemma3_text" else hidden // heads, limit=1 << 16)
    if heads % kv_heads:
        raise ModelError(
            f"the config's {heads} attention heads are no multiple of its {kv_heads} key-value heads"
        )
    bias = kind == "qwen2" or (kind != "mistral" and flag(config, "attention_bias"))
    mlp_bias = kind == "llama" and flag(config, "mlp_bias")

    result: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        linears = {
            "self_attn.q_proj": (heads * head, hidden, bias),
            "self_attn.k_proj": (kv_heads * head, hidden, bias),
            "self_attn.v_proj": (kv_heads * head, hidden, bias),
            "self_attn.o_proj": (hidden, heads * head, bias and kind != "qwen2"),
            "mlp.gate_proj": (inner, hidden, mlp_bias),
            "mlp.up_proj": (inner, hidden, mlp_bias),
            "mlp.down_proj": (hidden, inner, mlp_bias),
        }
        for name, (rows, columns, has_bias) in linears.items():
            result[f"{prefix}{name}.weight"] = (rows, columns)
            if has_bias:
                result[f"{prefix}{name}.bias"] = (rows,)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if kind == "gemma3_text":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in norms:
            result[f"{prefix}{name}.weight"] = (hidden,)
        if kind in ("qwen3", "gemma3_text"):
            result[f"{prefix}self_attn.q_norm.weight"] = (head,)
            result[f"{prefix}self_attn.k_norm.weight"] = (head,)
    result["model.norm.weight"] = (hidden,)
    if not tied(config):
        result["lm_head.weight"] = (vocab, hidden)
    return result


def bits_per_weight(base: Mapping[str, tuple[int, ...]], stored: Mapping[str, float]) -> float:
    """Bits stored for a model's matrices, per weight of the matrices of its base.

    base: shapes of the model that no recipe has changed (`expected_tensors`). stored: bytes by name, of whole
    tensors or of their arrays. All of it counts but the vectors of the base, norms and biases: codes, scales,
    minimums and padding, and what a recipe has added, low-rank factors, orders of columns and key scales,
    which are bytes but no weights.
    """
    weights = sum(prod(shape) for shape in base.values() if len(shape) == 2)
    nbytes = sum(size for name, size in stored.items() if name not in base or len(base[name]) == 2)
    return 8 * nbytes / weights


def check_tensors(where: str, expected: Shapes, found: Mapping[str, tuple[int, ...]]) -> None:
    """Compares a model's tensors with what its config calls for; ModelError names the first difference."""
    missing = [name for name in expected if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{where} lacks the tensor {missing[0]}{more}")
    for name, shape in found.items():
        wanted = expected.get(name)
        if wanted is None:
            raise ModelError(f"{where} has the tensor {name[:100]!r}, which its architecture does not know")
        if shape != wanted:
            raise ModelError(
                f"{where}: the tensor {name} has the shape {list(shape)}; its config calls for {list(wanted)}"
            )
