"""Mistral 7B and models of its shape: Llama with a sliding window in every layer, if the config has one."""

from __future__ import annotations

from dataclasses import replace

from gristmill.models.config import ModelConfig, Reader
from gristmill.models.decoder import pre_norm_program
from gristmill.program.nodes import Program


def read(r: Reader) -> ModelConfig:
    """The config. An absent `sliding_window` means 4096, as in the first release; null means none."""
    c = r.decoder()
    return replace(
        c,
        ropes=(r.rope(c.head_dim, c.max_positions),) * c.layers,
        windows=(r.window(default=4096) or 0,) * c.layers,
    )


def build(c: ModelConfig) -> Program:
    """The program."""
    return pre_norm_program(c)
