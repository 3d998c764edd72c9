"""Architectures and features that nobody has implemented are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from gristmill.errors import ModelError
from gristmill.models import ARCHITECTURES, build_program
from tests.kits import files


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MixtralForCausalLM"]},
        {"architectures": ["PhiForCausalLM", "Phi3ForCausalLM"]},
        {"architectures": None, "model_type": "falcon_mamba"},
        {"architectures": [], "model_type": "gpt2"},
    ],
)
def test_an_unknown_architecture_is_named_with_the_known_ones(changes: dict[str, Any]) -> None:
    config = files.config("llama") | changes
    name = (changes["architectures"] or [changes.get("model_type")])[0]
    with pytest.raises(ModelError) as error:
        build_program(config)
    assert name in str(error.value)
    assert all(known in str(error.value) for known in ARCHITECTURES)
    assert "\n" not in str(error.value)


def test_the_model_type_alone_is_enough() -> None:
    for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text"):
        config = files.config(kind)
        named = build_program(config).digest()
        del config["architectures"]
        assert build_program(config).digest() == named


@pytest.mark.parametrize(
    ("kind", "changes", "field"),
    [
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor"),
        ("llama", {"rope_scaling": 3}, "rope_scaling"),
        ("llama", {"hidden_act": "relu"}, "hidden_act"),
        ("llama", {"num_attention_heads": 5}, "num_attention_heads"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("llama", {"head_dim": 7}, "head_dim"),
        ("llama", {"hidden_size": -1}, "hidden_size"),
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"vocab_size": 10**30}, "vocab_size"),
        ("llama", {"vocab_size": True}, "vocab_size"),
        ("llama", {"vocab_size": 1e3}, "vocab_size"),
        ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_what_cannot_run_is_refused(kind: str, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelError) as error:
        build_program(files.config(kind) | changes)
    assert field in str(error.value)
    assert len(str(error.value)) < 300
