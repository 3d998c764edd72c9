"""Qwen 2 and 2.5: Llama with biases on q, k and v, and sliding windows in the upper layers if switched on."""

from __future__ import annotations

from dataclasses import replace

from gristmill.models.config import FULL, MAX_LAYERS, SLIDING, ModelConfig, Reader
from gristmill.models.decoder import pre_norm_program
from gristmill.program.nodes import Program


def read(r: Reader) -> ModelConfig:
    """The config."""
    c = r.decoder()
    return replace(
        c,
        ropes=(r.rope(c.head_dim, c.max_positions),) * c.layers,
        windows=windows(r, c.layers),
        qkv_bias=True,
    )


def windows(r: Reader, layers: int) -> tuple[int, ...]:
    """`layer_types` says which layers slide; without it, those from `max_window_layers` on."""
    window = r.window(default=4096) if r.flag("use_sliding_window", False) else None
    kinds = r.layer_types(layers)
    if kinds is None:
        first = r.integer("max_window_layers", 0, MAX_LAYERS, 28)
        kinds = [SLIDING if window is not None and i >= first else FULL for i in range(layers)]
    return r.windows(kinds, window)


def build(c: ModelConfig) -> Program:
    """The program."""
    return pre_norm_program(c)
