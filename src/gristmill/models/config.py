"""Reads a Hugging Face config.json into validated sizes.

A config is untrusted: every number is checked against a limit before anything is computed or allocated from
it. Missing keys take the defaults that Transformers gives them; sizes have no default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gristmill.errors import ModelError
from gristmill.program.rope import ROPE_PARAMETERS

MAX_VOCAB = 1 << 22
MAX_HIDDEN = 1 << 17
MAX_INTERMEDIATE = 1 << 20
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 1024
MAX_POSITIONS = 1 << 27

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Names in configs -> names in programs."""

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder-only transformer is, after its config has been validated."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    """Longest sequence the model was made for."""
    norm_eps: float
    activation: str
    """`silu` or `gelu_tanh`."""
    tied: bool
    """The head is the embedding."""
    windows: tuple[int, ...]
    """Per layer: number of visible keys, 0 for all."""
    ropes: tuple[Mapping[str, Any] | None, ...]
    """Per layer: the rope attribute of its attention node; None for no rotation."""
    attention_scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    embedding_scale: float = 1.0


class Reader:
    """Typed access to a config.json; every error is a ModelError that names the field."""

    def __init__(self, config: Mapping[str, Any], architecture: str) -> None:
        self.config = config
        self.architecture = architecture

    def fail(self, key: str, message: str) -> ModelError:
        """The error about a field."""
        return ModelError(f"config of {self.architecture}: {key} {message}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]; missing or null takes the default, an error if there is none."""
        value = self.config.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing")
            value = default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"must be an integer, not {_short(value)}")
        if not low <= value <= high:
            raise self.fail(key, f"must be between {low} and {high}, not {_short(value)}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high], as `integer`."""
        value = self.config.get(key)
        if value is None:
            if default is None:
                raise self.fail(key, "is missing")
            value = default
        return self.check_number(key, value, low, high)

    def check_number(self, key: str, value: object, low: float, high: float) -> float:
        """`value` as a float, if it is a number in [low, high]."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(key, f"must be a number, not {_short(value)}")
        if not low <= value <= high:  # also refuses NaN
            raise self.fail(key, f"must be between {low:g} and {high:g}, not {_short(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; missing or null takes the default."""
        value = self.config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {_short(value)}")
        return value

    def refuse(self, key: str, allowed: Sequence[object] = (None, False)) -> None:
        """Demands that a feature nobody has implemented is not asked for."""
        value = self.config.get(key)
        if not any(value is a or (value == a and type(value) is type(a)) for a in allowed):
            raise self.fail(key, f"= {_short(value)} is not supported")

    def activation(self, *keys: str) -> str:
        """The gate's activation, from the first of `keys` that is present."""
        for key in keys:
            value = self.config.get(key)
            if value is not None:
                if not isinstance(value, str) or value not in ACTIVATIONS:
                    known = ", ".join(sorted(ACTIVATIONS))
                    raise self.fail(key, f"= {_short(value)} is not supported; known: {known}")
                return ACTIVATIONS[value]
        raise self.fail(keys[0], "is missing")

    def window(self, key: str = "sliding_window", default: int | None = None) -> int | None:
        """A number of visible keys, None where the field is null; `default` where it is absent."""
        value = self.config.get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_POSITIONS:
            raise self.fail(key, f"must be between 1 and {MAX_POSITIONS} or null, not {_short(value)}")
        return value

    def layer_types(self, layers: int) -> list[str] | None:
        """`layer_types`, one of full_attention and sliding_attention for every layer; None if absent."""
        value = self.config.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers:
            raise self.fail("layer_types", f"must be a list of {layers} names")
        for kind in value:
            if kind not in (FULL, SLIDING):
                raise self.fail("layer_types", f"has {_short(kind)}; known: {FULL}, {SLIDING}")
        return value

    def windows(self, kinds: Sequence[str], window: int | None) -> tuple[int, ...]:
        """The window of every layer from its type."""
        if SLIDING in kinds and window is None:
            raise self.fail("sliding_window", "is missing although layer_types has sliding_attention")
        return tuple((window or 0) if kind == SLIDING else 0 for kind in kinds)

    def head_dim(self, hidden: int, heads: int, default: int | None = None) -> int:
        """Columns of a head: explicit, or hidden / heads."""
        if self.config.get("head_dim") is None and default is None:
            if hidden % heads:
                raise self.fail("hidden_size", f"{hidden} is not a multiple of num_attention_heads {heads}")
            default = hidden // heads
        value = self.integer("head_dim", 2, MAX_HEAD_DIM, default)
        if value % 2:
            raise self.fail("head_dim", f"must be even, not {value}")
        return value

    def rope(self, head_dim: int, max_positions: int, theta: float = 10000.0) -> dict[str, Any]:
        """The rope attribute, from `rope_parameters` or the older `rope_theta` and `rope_scaling`.

        theta: the default base of the architecture.
        """
        key, source = "rope_scaling", self.config.get("rope_scaling")
        if source is None:
            key, source = "rope_parameters", self.config.get("rope_parameters")
        if source is not None and not isinstance(source, Mapping):
            raise self.fail(key, f"must be an object, not {_short(source)}")
        source = {} if source is None else source
        if FULL in source or SLIDING in source:
            raise self.fail(key, "differs by layer type, which this architecture does not support")
        return self.rope_of(source, key, head_dim, max_positions, theta=self.theta("rope_theta", theta))

    def theta(self, key: str, default: float) -> object:
        """A base outside the rope's own parameters, unchecked; null counts as missing."""
        value = self.config.get(key)
        return default if value is None else value

    def rope_of(
        self, source: Mapping[str, Any], key: str, head_dim: int, max_positions: int, *, theta: object
    ) -> dict[str, Any]:
        """The rope attribute from one object of parameters; a `rope_theta` in it wins over `theta`."""
        kind = source.get("rope_type", source.get("type", "default"))
        if not isinstance(kind, str) or kind not in ROPE_PARAMETERS:
            raise self.fail(key, f"type {_short(kind)} is not supported; known: {', '.join(ROPE_PARAMETERS)}")
        partial = source.get("partial_rotary_factor", self.config.get("partial_rotary_factor"))
        if partial is not None and partial != 1:
            raise self.fail("partial_rotary_factor", f"= {_short(partial)} is not supported")
        base = source.get("rope_theta")
        result: dict[str, Any] = {
            "type": kind,
            "theta": self.check_number("rope_theta", theta if base is None else base, 1.0, 1e12),
            "dim": head_dim,
        }
        for name in ROPE_PARAMETERS[kind]:
            value = source.get(name)
            if value is None and name == "original_max_position_embeddings":
                value = max_positions
            if value is None:
                raise self.fail(f"{key}.{name}", "is missing")
            result[name] = self.check_number(f"{key}.{name}", value, 1e-3, float(MAX_POSITIONS))
        if kind == "llama3" and result["high_freq_factor"] <= result["low_freq_factor"]:
            raise self.fail(f"{key}.high_freq_factor", "must be greater than low_freq_factor")
        return result

    def decoder(
        self,
        *,
        default_head_dim: int | None = None,
        activation: tuple[str, ...] = ("hidden_act",),
        tied: bool = False,
    ) -> ModelConfig:
        """The fields that all known architectures share, with global attention and one rope in all layers."""
        hidden = self.integer("hidden_size", 1, MAX_HIDDEN)
        layers = self.integer("num_hidden_layers", 1, MAX_LAYERS)
        heads = self.integer("num_attention_heads", 1, MAX_HEADS)
        kv_heads = self.integer("num_key_value_heads", 1, MAX_HEADS, heads)
        if heads % kv_heads:
            raise self.fail(
                "num_attention_heads", f"{heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        head_dim = self.head_dim(hidden, heads, default_head_dim)
        return ModelConfig(
            architecture=self.architecture,
            vocab_size=self.integer("vocab_size", 1, MAX_VOCAB),
            hidden_size=hidden,
            intermediate_size=self.integer("intermediate_size", 1, MAX_INTERMEDIATE),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=self.integer("max_position_embeddings", 1, MAX_POSITIONS),
            norm_eps=self.number("rms_norm_eps", 0.0, 1.0, 1e-6),
            activation=self.activation(*activation),
            tied=self.flag("tie_word_embeddings", tied),
            windows=(0,) * layers,
            ropes=(None,) * layers,
            attention_scale=1.0 / math.sqrt(head_dim),
        )


def _short(value: object) -> str:
    # A hostile config may hold a megabyte of text or an integer too long to print.
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return "a huge integer"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
