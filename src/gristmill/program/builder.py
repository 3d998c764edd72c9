"""Builds programs node by node; shapes follow from the ops' rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gristmill.program.checker import check, infer
from gristmill.program.nodes import (
    LOGITS,
    PER_TOKEN,
    TOKENS,
    WINDOW,
    Buffer,
    Dim,
    Node,
    Program,
    ProgramError,
    State,
    Weight,
)
from gristmill.program.ops import OPS


class Builder:
    """Collects nodes. The methods named like ops add one node and return the name of the buffer it writes.

    A node is called like its weight without the common prefix and suffix (`layers.0.self_attn.q_proj`), and
    its buffer like the node.
    """

    def __init__(self, name: str, dims: Iterable[Dim] = (TOKENS, LOGITS)) -> None:
        self.name = name
        self.dims = {dim.name: dim for dim in dims}
        self.nodes: list[Node] = []
        self.buffers: dict[str, Buffer] = {}
        self.weights: dict[str, Weight] = {}
        self.states: dict[str, State] = {}

    def weight(self, name: str, *shape: int) -> str:
        """Declares a tensor; a second declaration (tied weights) must agree."""
        known = self.weights.setdefault(name, Weight(name, shape))
        if known.shape != shape:
            raise ProgramError(f"weight {name!r} is declared as {list(known.shape)} and as {list(shape)}")
        return name

    def add_node(
        self,
        op: str,
        name: str,
        inputs: Sequence[str] = (),
        weights: Sequence[str] = (),
        *,
        state: State | None = None,
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> tuple[str, ...]:
        """Adds a node of any op and declares its output buffers; their names."""
        if op not in OPS:
            raise ProgramError(f"node {name!r}: unknown op {op!r}; known: {', '.join(sorted(OPS))}")
        if outputs is None:
            outputs = (name,)
        node = Node(
            name,
            op,
            tuple(inputs),
            tuple(outputs),
            tuple(weights),
            None if state is None else state.name,
            attributes,
        )
        try:
            shapes = infer(
                node,
                tuple(self.buffers[n] for n in inputs),
                tuple(self.weights[n] for n in weights),
                state,
            )
        except (KeyError, ProgramError) as error:
            raise ProgramError(f"node {name!r} (op {op}, reads {list(inputs)}): {error}") from None
        if state is not None:
            self.states[state.name] = state
        for buffer, shape in zip(node.outputs, shapes, strict=True):
            self.buffers[buffer] = Buffer(buffer, shape)
        self.nodes.append(node)
        return node.outputs

    def width(self, buffer: str) -> int:
        """Columns of a buffer."""
        width = self.buffers[buffer].shape[-1]
        if not isinstance(width, int):
            raise ProgramError(f"buffer {buffer!r} has no fixed width")
        return width

    def embedding(self, weight: str, rows: int, columns: int, scale: float = 1.0) -> str:
        """Rows of a table [rows, columns], by token id."""
        return self.add_node(
            "embedding", node_name(weight), (), (self.weight(weight, rows, columns),), scale=scale
        )[0]

    def rmsnorm(self, x: str, weight: str, eps: float, weight_offset: float = 0.0) -> str:
        """The norm of every row."""
        w = self.weight(weight, self.width(x))
        return self.add_node("rmsnorm", node_name(weight), (x,), (w,), eps=eps, weight_offset=weight_offset)[
            0
        ]

    def head_rmsnorm(
        self, x: str, weight: str, eps: float, heads: int, head_dim: int, *, weight_offset: float = 0.0
    ) -> str:
        """The norm of every head of every row."""
        return self.add_node(
            "head_rmsnorm",
            node_name(weight),
            (x,),
            (self.weight(weight, head_dim),),
            eps=eps,
            weight_offset=weight_offset,
            heads=heads,
            head_dim=head_dim,
        )[0]

    def linear(self, x: str, module: str, outputs: int, bias: bool = False, name: str | None = None) -> str:
        """x @ W.T with W = `module`.weight [outputs, width of x], and `module`.bias."""
        weights = [self.weight(f"{module}.weight", outputs, self.width(x))]
        if bias:
            weights.append(self.weight(f"{module}.bias", outputs))
        return self.add_node("linear", name or node_name(module), (x,), weights)[0]

    def encode(
        self,
        name: str,
        x: str,
        *,
        group: int = 0,
        bits: Sequence[int] = (),
        fp8: bool = False,
        order: str | None = None,
    ) -> str:
        """x rounded to integers or E4M3, or (with neither) its columns in the order of a named vector."""
        weights = () if order is None else (self.weight(order, self.width(x)),)
        kind = "int" if bits else "fp8" if fp8 else "none"
        return self.add_node("encode", name, (x,), weights, kind=kind, group=group, bits=list(bits))[0]

    def attention(
        self,
        name: str,
        q: str,
        k: str,
        v: str,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int = 0,
        rope: Mapping[str, Any] | None = None,
        key_scale: str | None = None,
        kv_format: str = "",
    ) -> str:
        """Causal attention with a KV state of its own, named after the node.

        key_scale: name of a weight [kv_heads * head_dim] that scales keys after the rotation.
        """
        state = State(
            f"{name}.kv",
            name,
            WINDOW if window else PER_TOKEN,
            {"k": (kv_heads, head_dim), "v": (kv_heads, head_dim)},
            window,
        )
        return self.add_node(
            "attention",
            name,
            (q, k, v),
            () if key_scale is None else (self.weight(key_scale, kv_heads * head_dim),),
            state=state,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=scale,
            window=window,
            rope=None if rope is None else dict(rope),
            **({"kv_format": kv_format} if kv_format else {}),
        )[0]

    def gated(self, name: str, gate: str, up: str, activation: str) -> str:
        """activation(gate) * up."""
        return self.add_node("gated", name, (gate, up), activation=activation)[0]

    def add(self, name: str, a: str, b: str) -> str:
        """a + b."""
        return self.add_node("add", name, (a, b))[0]

    def select_rows(self, x: str, name: str = "select_rows") -> str:
        """The rows whose logits are wanted."""
        return self.add_node("select_rows", name, (x,))[0]

    def build(self, output: str) -> Program:
        """The checked program whose logits are in `output`."""
        return check(
            Program(
                name=self.name,
                nodes=tuple(self.nodes),
                output=output,
                buffers=dict(self.buffers),
                weights=dict(self.weights),
                states=dict(self.states),
                dims=dict(self.dims),
            )
        )


def node_name(weight: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `layers.0.mlp.up_proj`."""
    return weight.removeprefix("model.").removesuffix(".weight")
