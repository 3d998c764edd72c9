"""Llama 2, 3, 3.1, 3.2 and models of their shape (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

from dataclasses import replace

from gristmill.models.config import ModelConfig, Reader
from gristmill.models.decoder import pre_norm_program
from gristmill.program.nodes import Program


def read(r: Reader) -> ModelConfig:
    """The config: `attention_bias` on q, k, v and o, `mlp_bias` on all three of the feed-forward network."""
    c = r.decoder()
    bias = r.flag("attention_bias", False)
    return replace(
        c,
        ropes=(r.rope(c.head_dim, c.max_positions),) * c.layers,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=r.flag("mlp_bias", False),
    )


def build(c: ModelConfig) -> Program:
    """The program."""
    return pre_norm_program(c)
