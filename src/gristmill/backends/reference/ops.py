"""The one reference implementation of every op, in PyTorch.

A function takes the step's context, the node, its inputs and its weights, and returns its outputs; `run`
finds it by the op's name. Equations and shapes are in `gristmill.program.ops`. Norms, rotations and softmax
are computed in float32 at least, whatever the dtype of the buffers, as the models were trained with; nothing
is done in place, so that gradients flow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gristmill.formats import fp8
from gristmill.program.kv import CHANNEL_GROUP, GROUP
from gristmill.program.nodes import Node, terms
from gristmill.program.rope import rope_inverse_frequencies

Entries = tuple[Tensor, Tensor]
"""A sequence's keys (rotated) and values in one state, oldest first: [tokens, kv_heads, head_dim]."""


@dataclass
class Context:
    """One step's batch columns and states."""

    ids: Tensor
    position: Tensor
    logit_rows: Tensor
    lengths: Sequence[int]
    """New tokens of each sequence."""
    past: Sequence[Mapping[str, Entries]]
    """Per sequence: entries by state. Never written."""
    kv_formats: Mapping[str, str]
    """By state, how keys and values are rounded (`program.kv`); not at all where it says `f32`."""
    appended: list[dict[str, Entries]] = field(default_factory=list)
    """Per sequence: the entries after this step, by state."""

    def __post_init__(self) -> None:
        self.appended = [{} for _ in self.lengths]


Function = Callable[[Context, Node, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]


def run(
    context: Context, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The outputs of a node."""
    return FUNCTIONS[node.op](context, node, inputs, weights)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _embedding(c: Context, n: Node, x: Sequence[Tensor], w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (torch.nn.functional.embedding(c.ids, w[0]) * n.attributes["scale"],)


def _norm(x: Tensor, weight: Tensor, attributes: Mapping[str, Any]) -> Tensor:
    wide = _wide(x)
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + attributes["eps"])
    offset: float = attributes["weight_offset"]
    return (scaled * (_wide(weight) + offset)).to(x.dtype)


def _rmsnorm(c: Context, n: Node, x: Sequence[Tensor], w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (_norm(x[0], w[0], n.attributes),)


def _head_rmsnorm(c: Context, n: Node, x: Sequence[Tensor], w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    heads = _norm(_heads(x[0], n.attributes["heads"]), w[0], n.attributes)
    return (heads.reshape(x[0].shape),)


def _linears(c: Context, n: Node, x: Sequence[Tensor], w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    tensors = dict(zip(n.weights, w, strict=True))
    return tuple(
        torch.nn.functional.linear(
            x[0], tensors[term.weight], None if term.bias is None else tensors[term.bias]
        )
        for term in terms(n)
    )


def _encode(c: Context, n: Node, x: Sequence[Tensor], w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    rows = x[0][:, w[0].long()] if w else x[0]
    if n.attributes["kind"] == "none":
        return (rows,)
    if n.attributes["kind"] == "fp8":
        return (round_rows_fp8(rows),)
    group, width = n.attributes["group"], rows.shape[1]
    groups = -(-width // group)
    bits = torch.tensor(n.attributes["bits"]).expand(groups)
    return (round_rows(rows, group, 2.0 ** (bits - 1) - 1),)


def round_rows(x: Tensor, group: int, limit: Tensor) -> Tensor:
    """x [T, K] rounded per row and group: `limit` [groups] is the largest code of each (see op `encode`)."""
    width = x.shape[1]
    groups = len(limit)
    wide = torch.nn.functional.pad(_wide(x), (0, groups * group - width)).reshape(len(x), groups, group)
    top = wide.abs().amax(-1, keepdim=True)
    limit = limit.to(wide.dtype)[:, None]
    # As in the kernels: a reciprocal first, and a group next to zero is zero.
    codes = torch.where(top > 1e-30, (wide * (limit / top)).round(), 0.0)
    return (codes * (top / limit)).reshape(len(x), -1)[:, :width].to(x.dtype)


def round_e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 values in the dtype of x, as `formats.fp8.round_e4m3`; NaN stays."""
    x = x.clamp(-fp8.MAX, fp8.MAX)
    step = torch.ldexp(torch.ones_like(x), (torch.frexp(x)[1] - 4).clamp(min=-9))
    return (x / step).round() * step


def round_rows_fp8(x: Tensor) -> Tensor:
    """x [T, K] rounded per row to E4M3 under the scale max|x| / 448 (see op `encode`)."""
    wide = _wide(x)
    top = wide.abs().amax(-1, keepdim=True)
    # As in the kernels: a reciprocal first, and a row next to zero is zero.
    values = torch.where(top > 1e-30, round_e4m3(wide * (fp8.MAX / top)), 0.0)
    return (values * (top / fp8.MAX)).to(x.dtype)


def _activate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    curved: Tensor = torch.nn.functional.gelu(gate, approximate="tanh")
    return curved * up


def _gated(c: Context, n: Node, x: Sequence[Tensor], w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (_activate(x[0], x[1], n.attributes["activation"]),)


def _gated_linears(c: Context, n: Node, x: Sequence[Tensor], w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    gate, up = _linears(c, n, x, w)
    return (_activate(gate, up, n.attributes["activation"]),)


def _add(c: Context, n: Node, x: Sequence[Tensor], w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (x[0] + x[1],)


def _add_rmsnorm(c: Context, n: Node, x: Sequence[Tensor], w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    total = x[0] + x[1]
    return total, _norm(total, w[0], n.attributes)


def _select_rows(c: Context, n: Node, x: Sequence[Tensor], w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (x[0].index_select(0, c.logit_rows),)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(x.shape[0], heads, x.shape[1] // heads)


def _rotate(x: Tensor, position: Tensor, rope: Mapping[str, Any] | None) -> Tensor:
    """x [tokens, heads, head_dim] rotated to its positions."""
    if rope is None:
        return x
    inverse, factor = rope_inverse_frequencies(rope, x.shape[-1])
    half = int(rope["dim"]) // 2
    # The angles are rounded to float32 in every dtype: they belong to the model.
    angles = position.to(torch.float32)[:, None] * torch.from_numpy(inverse).to(torch.float32)
    wide = _wide(x)
    angles = angles.to(wide.dtype)[:, None, :]
    cosine, sine = angles.cos() * factor, angles.sin() * factor
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine, rest], -1).to(x.dtype)


def _rope(c: Context, n: Node, x: Sequence[Tensor], w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    heads = _heads(x[0], n.attributes["heads"])
    return (_rotate(heads, c.position, n.attributes["rope"]).reshape(x[0].shape),)


def _attention(c: Context, n: Node, x: Sequence[Tensor], w: Sequence[Tensor]) -> tuple[Tensor, ...]:
    a = n.attributes
    assert n.state is not None
    queries = _rotate(_heads(x[0], a["heads"]), c.position, a["rope"])
    new_keys = _rotate(_heads(x[1], a["kv_heads"]), c.position, a["rope"])
    if w:
        scale = _wide(w[0]).reshape(a["kv_heads"], -1)
        new_keys = (_wide(new_keys) * scale).to(x[1].dtype)
        by_head = scale.repeat_interleave(a["heads"] // a["kv_heads"], 0)
        queries = (_wide(queries) / by_head).to(x[0].dtype)
    new_keys = _kept(new_keys, c.kv_formats[n.state])
    new_values = _kept(_heads(x[2], a["kv_heads"]), c.kv_formats[n.state])
    outputs = []
    start = 0
    for i, length in enumerate(c.lengths):
        rows = slice(start, start + length)
        start += length
        keys, values = new_keys[rows], new_values[rows]
        if n.state in c.past[i]:
            old_keys, old_values = c.past[i][n.state]
            keys, values = torch.cat([old_keys, keys]), torch.cat([old_values, values])
        c.appended[i][n.state] = keys, values
        if length:
            visible = _visible(len(keys) - length, length, a["window"])
            kept = [(keys, values, visible)]
            if c.kv_formats[n.state] == "int4-channel":
                kept = _by_channel(keys, values, visible)
            outputs.append(_attend(queries[rows], kept, a["scale"]))
    return (torch.cat(outputs) if outputs else x[0],)


def _kept(x: Tensor, kv_format: str) -> Tensor:
    """What is left of vectors [..., head_dim] in a KV format. Gradients pass as if nothing were rounded."""
    if kv_format == "f32":
        return x
    if kv_format in ("bf16", "int4-channel"):  # the latter's codes come later, `_by_channel`
        rounded = x.to(torch.bfloat16)
    elif kv_format == "int4":
        rounded = torch.cat([_int4(part) for part in torch.split(_wide(x), GROUP, -1)], -1)
    else:
        raise ValueError(f"no KV format is called {kv_format!r}")
    # Exact: either the two numbers are within a factor of two, or the rounded one is 0.
    return x + (rounded.to(x.dtype) - x).detach()


def _int4(x: Tensor) -> Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / 7).to(torch.bfloat16).to(x.dtype)
    scale = torch.where(scale == 0, 1.0, scale)
    return (x / scale).round().clamp(-8, 7) * scale


def _visible(past: int, length: int, window: int) -> Tensor:
    """[length, past + length]: which keys each new token sees."""
    own = torch.arange(past, past + length)[:, None]
    key = torch.arange(past + length)[None, :]
    seen = key <= own
    return seen & (key > own - window) if window else seen


Kept = tuple[Tensor, Tensor, Tensor]
"""Keys, values and which of them each query row sees so."""


def _by_channel(keys: Tensor, values: Tensor, visible: Tensor) -> list[Kept]:
    """A row sees groups of 64 tokens that end at or before its position as codes, its own one as it is."""
    full = len(keys) // CHANNEL_GROUP * CHANNEL_GROUP
    group = torch.arange(len(keys)) // CHANNEL_GROUP
    own = group[None, :] == group[len(keys) - len(visible) :, None]
    codes = [torch.cat([_int4_channel(x[:full]), x[full:]]) for x in (keys, values)]
    return [(keys, values, visible & own), (codes[0], codes[1], visible & ~own)]


def _int4_channel(x: Tensor) -> Tensor:
    groups = x.detach().to(torch.float32).reshape(-1, CHANNEL_GROUP, *x.shape[1:])
    low = _outward(groups.amin(1, keepdim=True), down=True)
    scale = _outward((groups.amax(1, keepdim=True) - low) / 15, down=False)
    scale = torch.where(scale == 0, 1.0, scale)
    codes = ((groups - low) / scale).round().clamp(0, 15)
    return x + ((codes * scale + low).reshape(x.shape).to(x.dtype) - x).detach()


def _outward(x: Tensor, down: bool) -> Tensor:
    """float32 rounded to bf16, down or up."""
    bits = x.contiguous().view(torch.int32)
    away = (x < 0) == down
    rounded: Tensor = torch.where(away, bits + 0xFFFF, bits).bitwise_and(-0x10000).view(torch.float32)
    return rounded


def _attend(q: Tensor, kept: list[Kept], scale: float) -> Tensor:
    kv_heads = kept[0][0].shape[1]
    grouped = q.reshape(len(q), kv_heads, q.shape[1] // kv_heads, q.shape[2])
    scores = [
        (_wide(torch.einsum("tghd,jgd->ghtj", grouped, k)) * scale).masked_fill(~visible, float("-inf"))
        for k, _, visible in kept
    ]
    weights = torch.split(torch.cat(scores, -1).softmax(-1).to(q.dtype), len(kept[0][0]), -1)
    mixed = [torch.einsum("ghtj,jgd->tghd", p, v) for p, (_, v, _) in zip(weights, kept, strict=True)]
    return torch.stack(mixed).sum(0).reshape(len(q), -1)


FUNCTIONS: dict[str, Function] = {
    "embedding": _embedding,
    "rmsnorm": _rmsnorm,
    "head_rmsnorm": _head_rmsnorm,
    "encode": _encode,
    "linear": _linears,
    "linears": _linears,
    "gated": _gated,
    "gated_linears": _gated_linears,
    "add": _add,
    "add_rmsnorm": _add_rmsnorm,
    "select_rows": _select_rows,
    "rope": _rope,
    "attention": _attention,
}
"""By op."""
