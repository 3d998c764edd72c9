"""Rotary position embeddings: which frequencies a model's config means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.program.nodes import ProgramError

ROPE_PARAMETERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Known rope types with the parameters of each, beside theta and dim."""


def check_rope(rope: Mapping[str, Any] | None, head_dim: int) -> None:
    """Raises ProgramError unless `rope` is None or completely describes a rotation of heads of `head_dim`."""
    if rope is None:
        return
    kind = rope.get("type")
    if kind not in ROPE_PARAMETERS:
        raise ProgramError(f"rope type {kind!r} is not one of {', '.join(ROPE_PARAMETERS)}")
    expected = {"type", "theta", "dim", *ROPE_PARAMETERS[kind]}
    if set(rope) != expected:
        raise ProgramError(f"a {kind} rope has the parameters {sorted(expected)}, not {sorted(rope)}")
    numbers = [rope[name] for name in expected if name != "type"]
    if any(
        not isinstance(n, (int, float)) or isinstance(n, bool) or not 0 < n < float("inf") for n in numbers
    ):
        raise ProgramError(f"the rope parameters {dict(rope)} must be positive numbers")
    if rope["dim"] % 2 or rope["dim"] > head_dim:
        raise ProgramError(f"rope rotates {rope['dim']} columns of heads of {head_dim}")


def rope_inverse_frequencies(rope: Mapping[str, Any], head_dim: int) -> tuple[NDArray[np.float64], float]:
    """Radians per position of each pair of columns: float64 [dim / 2], and the factor on cosine and sine.

    `rope` holds `type`, `theta`, `dim` (columns rotated) and the type's parameters (ROPE_PARAMETERS). The
    values are rounded to float32, because that is what the models were trained with; they agree with
    Transformers to one unit in the last place.

    default: f_c = theta^(-2c / dim). linear: f / factor. llama3: f for wavelengths (2 pi / f) shorter than
    original / high_freq_factor, f / factor for those longer than original / low_freq_factor, and a blend
    between.
    """
    check_rope(rope, head_dim)
    dim = int(rope["dim"])
    inverse = float(rope["theta"]) ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope["type"] == "linear":
        inverse = inverse / rope["factor"]
    elif rope["type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = (
            rope["original_max_position_embeddings"] * inverse / (2 * np.pi)
        )  # within the original context
        # clip: 0 is fully scaled, 1 is untouched.
        keep = (
            np.clip((turns - low) / (high - low), 0.0, 1.0)
            if high != low
            else (turns > low).astype(np.float64)
        )
        inverse = inverse * (keep + (1 - keep) / rope["factor"])
    return inverse.astype(np.float32).astype(np.float64), 1.0
