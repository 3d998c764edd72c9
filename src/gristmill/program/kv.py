"""How keys and values are kept, and the bytes that takes.

`f32` and `bf16` keep the numbers. `int4` keeps, of every token and head, 4-bit codes with a bf16 scale per
group of 128 dimensions of the head (the KV cache of FireQ, arXiv 2505.20839). `int4-channel` keeps 4-bit
codes with a bf16 scale and minimum per dimension and group of 64 tokens (as COMET does, arXiv 2410.12168);
the last tokens, until they fill a group, stay in bf16. docs/arithmetic.md has the equations.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from gristmill.errors import UsageError
from gristmill.program.nodes import Program

KV_FORMATS = ("f32", "bf16", "int4", "int4-channel")
KV_DEFAULT = "bf16"
"""Where neither the program nor the caller names a format."""
GROUP = 128
"""Dimensions of a head that share a scale in `int4`."""
CHANNEL_GROUP = 64
"""Tokens of a sequence whose numbers of one dimension share a scale in `int4-channel`."""


def kv_formats(program: Program, kv_dtype: str | None = None, default: str = KV_DEFAULT) -> dict[str, str]:
    """The format of every state of a token's keys and values, by the state's name.

    kv_dtype: one for all; None: what the attention node's `kv_format` says, else `default`. UsageError for an
    unknown one, and for `int4-channel` where a node has a sliding window.
    """
    check_kv_dtype(kv_dtype)
    result = {}
    for node in program.nodes:
        if node.state is not None:
            chosen = kv_dtype or node.attributes.get("kv_format") or default
            if chosen == "int4-channel" and node.attributes["window"]:
                raise UsageError(f"node {node.name!r}: the KV format {chosen} keeps no sliding window")
            result[node.state] = chosen
    return result


def check_kv_dtype(kv_dtype: str | None) -> None:
    """UsageError unless it is a format or None."""
    if kv_dtype is not None and kv_dtype not in KV_FORMATS:
        raise UsageError(f"kv_dtype must be one of {', '.join(KV_FORMATS)}, not {kv_dtype!r}")


def kv_bytes(shapes: Iterable[tuple[int, ...]], kv_format: str, tokens: int) -> float:
    """Bytes of the first `tokens` tokens' entries, whose arrays have these shapes, [..., head_dim] each."""
    rest = tokens % CHANNEL_GROUP if kv_format == "int4-channel" else 0
    return sum(
        prod(shape[:-1]) * ((tokens - rest) * _vector_bytes(shape[-1], kv_format) + rest * 2 * shape[-1])
        for shape in shapes
    )


def kv_bytes_per_token(shapes: Iterable[tuple[int, ...]], kv_format: str) -> float:
    """Bytes of an entry in a long sequence."""
    return kv_bytes(shapes, kv_format, CHANNEL_GROUP) / CHANNEL_GROUP


def kv_room(shapes: Iterable[tuple[int, ...]], kv_format: str, tokens: int) -> float:
    """Bytes of memory for entries of `tokens` tokens: two tails of a group, and room for all as codes."""
    tails = 2 * CHANNEL_GROUP * 2 if kv_format == "int4-channel" else 0
    return sum(
        prod(shape[:-1]) * (tokens * _vector_bytes(shape[-1], kv_format) + tails * shape[-1])
        for shape in shapes
    )


def _vector_bytes(dim: int, kv_format: str) -> float:
    if kv_format == "int4":
        return dim / 2 + 2 * -(-dim // GROUP)
    if kv_format == "int4-channel":
        return dim / 2 + dim * 4 / CHANNEL_GROUP
    return dim * {"f32": 4, "bf16": 2}[kv_format]
