"""Architectures: one file each, from the model's config to its step program.

A file exports `build(config: ModelConfig) -> Program` and is imported on use.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from gristmill.errors import ModelError
from gristmill.models.config import ModelConfig, Reader
from gristmill.program.nodes import Program

__all__ = ["ARCHITECTURES", "MODEL_TYPES", "ModelConfig", "architecture", "build_program", "read_config"]

ARCHITECTURES: dict[str, str] = {
    "Gemma3ForCausalLM": "gemma3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Hugging Face architecture -> module of this package."""

MODEL_TYPES: dict[str, str] = {
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""`model_type` -> architecture, for configs that name no architecture."""


def architecture(config: Mapping[str, Any]) -> str:
    """The known architecture that a config.json names. ModelError, listing the known ones, for any other."""
    named = config.get("architectures")
    model_type = config.get("model_type")
    if named:
        if not isinstance(named, list) or not all(isinstance(n, str) for n in named):
            raise ModelError(f"config: architectures must be a list of names, not {named!r}")
        names: list[str] = named
        for name in names:
            if name in ARCHITECTURES:
                return name
        found = ", ".join(names)
    elif isinstance(model_type, str) and model_type:
        if model_type in MODEL_TYPES:
            return MODEL_TYPES[model_type]
        found = model_type
    else:
        raise ModelError("config: neither architectures nor model_type says what this model is")
    raise ModelError(f"architecture {found} is not supported; known: {', '.join(sorted(ARCHITECTURES))}")


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The validated sizes of a config.json. ModelError names the field that is wrong."""
    name = architecture(config)
    module = importlib.import_module(f"gristmill.models.{ARCHITECTURES[name]}")
    result: ModelConfig = module.read(Reader(config, name))
    return result


def build_program(config: Mapping[str, Any]) -> Program:
    """The checked semantic program of a Hugging Face config.json. ModelError if that is wrong or unknown."""
    name = architecture(config)
    module = importlib.import_module(f"gristmill.models.{ARCHITECTURES[name]}")
    program: Program = module.build(module.read(Reader(config, name)))
    return program
