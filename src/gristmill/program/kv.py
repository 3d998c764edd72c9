"""How keys and values are kept, and the bytes that takes.

`f32` and `bf16` keep the numbers. `int4` keeps, of every token and head, 4-bit codes with a bf16 scale per
group of 128 dimensions of the head (the KV cache of FireQ, arXiv 2505.20839): docs/arithmetic.md has the
equations.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from gristmill.errors import UsageError
from gristmill.program.nodes import Program

KV_FORMATS = ("f32", "bf16", "int4")
KV_DEFAULT = "bf16"
"""Where neither the program nor the caller names a format."""
GROUP = 128
"""Dimensions of a head that share a scale in `int4`."""


def kv_formats(program: Program, kv_dtype: str | None = None) -> dict[str, str]:
    """The format of every state of a token's keys and values, by the state's name.

    kv_dtype: one for all; None: what the attention node's `kv_format` says, else `bf16`. UsageError for an
    unknown one.
    """
    check_kv_dtype(kv_dtype)
    return {
        node.state: kv_dtype or node.attributes.get("kv_format") or KV_DEFAULT
        for node in program.nodes
        if node.state is not None
    }


def check_kv_dtype(kv_dtype: str | None) -> None:
    """UsageError unless it is a format or None."""
    if kv_dtype is not None and kv_dtype not in KV_FORMATS:
        raise UsageError(f"kv_dtype must be one of {', '.join(KV_FORMATS)}, not {kv_dtype!r}")


def kv_bytes(shapes: Iterable[tuple[int, ...]], kv_format: str, tokens: int = 1) -> float:
    """Bytes of the entries of `tokens` tokens, whose arrays have these shapes, [..., head_dim] each."""
    return tokens * sum(prod(shape[:-1]) * _vector_bytes(shape[-1], kv_format) for shape in shapes)


def _vector_bytes(dim: int, kv_format: str) -> float:
    if kv_format == "int4":
        return dim / 2 + 2 * -(-dim // GROUP)
    return dim * {"f32": 4, "bf16": 2}[kv_format]
