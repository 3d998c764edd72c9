"""Qwen 3, dense: Llama with a norm on every query and key head."""

from __future__ import annotations

from dataclasses import replace

from gristmill.models.config import ModelConfig, Reader
from gristmill.models.decoder import pre_norm_program
from gristmill.models.qwen2 import windows
from gristmill.program.nodes import Program


def read(r: Reader) -> ModelConfig:
    """The config: `attention_bias` on q, k, v and o."""
    c = r.decoder(default_head_dim=128)
    bias = r.flag("attention_bias", False)
    return replace(
        c,
        ropes=(r.rope(c.head_dim, c.max_positions),) * c.layers,
        windows=windows(r, c.layers),
        qkv_bias=bias,
        out_bias=bias,
    )


def build(c: ModelConfig) -> Program:
    """The program."""
    return pre_norm_program(c, head_norms=True)
