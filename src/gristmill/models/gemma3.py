"""Gemma 3, text: local and global layers with ropes of their own, norms on both sides of each block."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gristmill.models.config import FULL, MAX_LAYERS, SLIDING, ModelConfig, Reader
from gristmill.models.decoder import attention, feed_forward, head
from gristmill.program.builder import Builder
from gristmill.program.nodes import Program

NORM_OFFSET = 1.0
"""Norm weights are stored as their difference from 1."""


def read(r: Reader) -> ModelConfig:
    """The config. Logit soft-capping and bidirectional attention are refused."""
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
        r.refuse(key)
    c = r.decoder(default_head_dim=256, activation=("hidden_activation", "hidden_act"), tied=True)
    kinds = r.layer_types(c.layers)
    if kinds is None:
        pattern = r.integer("sliding_window_pattern", 1, MAX_LAYERS, 6)
        kinds = [SLIDING if (i + 1) % pattern else FULL for i in range(c.layers)]
    ropes = {kind: _rope(r, c, kind) for kind in set(kinds)}
    bias = r.flag("attention_bias", False)
    return replace(
        c,
        windows=r.windows(kinds, r.window(default=4096)),
        ropes=tuple(ropes[kind] for kind in kinds),
        attention_scale=1.0 / math.sqrt(r.number("query_pre_attn_scalar", 1e-3, 1e6, 256)),
        qkv_bias=bias,
        out_bias=bias,
        embedding_scale=_embedding_scale(r, c.hidden_size),
    )


def _rope(r: Reader, c: ModelConfig, kind: str) -> dict[str, Any]:
    """New configs have an object per layer type; old ones two bases, and scale the global layers alone."""
    theta = r.theta("rope_theta", 1_000_000.0) if kind == FULL else r.theta("rope_local_base_freq", 10_000.0)
    key = "rope_scaling"
    source: Mapping[str, Any] = {}
    parameters = _object(r, "rope_parameters")
    if parameters:
        if not {FULL, SLIDING} & set(parameters):
            raise r.fail("rope_parameters", f"must hold {FULL} and {SLIDING}")
        key, source = f"rope_parameters.{kind}", _object(r, kind, parameters)
    if kind == FULL:
        source = {**source, **_object(r, "rope_scaling")}
    return r.rope_of(source, key, c.head_dim, c.max_positions, theta=theta)


def _object(r: Reader, key: str, within: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    value = (r.config if within is None else within).get(key)
    if value is not None and not isinstance(value, Mapping):
        raise r.fail(key, "must be an object")
    return {} if value is None else value


def _embedding_scale(r: Reader, hidden: int) -> float:
    """sqrt(hidden) as the model's own dtype holds it: the models were trained with the rounded value."""
    scale = math.sqrt(hidden)
    dtype = r.config.get("dtype") or r.config.get("torch_dtype")
    if dtype == "bfloat16":
        bits = struct.unpack("<I", struct.pack("<f", scale))[0]
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return float(struct.unpack("<f", struct.pack("<I", rounded))[0])
    if dtype == "float16":
        return float(struct.unpack("<e", struct.pack("<e", scale))[0])
    return float(struct.unpack("<f", struct.pack("<f", scale))[0])


def build(c: ModelConfig) -> Program:
    """The program: x += norm(attention(norm(x))); x += norm(feed_forward(norm(x)))."""
    b = Builder(c.architecture)
    x = b.embedding("model.embed_tokens.weight", c.vocab_size, c.hidden_size, c.embedding_scale)

    def norm(x: str, layer: int, name: str) -> str:
        return b.rmsnorm(x, f"model.layers.{layer}.{name}.weight", c.norm_eps, NORM_OFFSET)

    for i in range(c.layers):
        y = attention(b, c, i, norm(x, i, "input_layernorm"), head_norms=True, norm_offset=NORM_OFFSET)
        x = b.add(f"layers.{i}.self_attn.residual", x, norm(y, i, "post_attention_layernorm"))
        y = feed_forward(b, c, i, norm(x, i, "pre_feedforward_layernorm"))
        x = b.add(f"layers.{i}.mlp.residual", x, norm(y, i, "post_feedforward_layernorm"))
    return head(b, c, x, NORM_OFFSET)
