"""The data of a step program: dimensions, buffers, weights, states, nodes.

Everything here is plain, immutable data. `ops` says what the nodes mean, `builder` makes programs, `checker`
verifies them, `passes` rewrites them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Shape = tuple[str | int, ...]
"""Sizes of a buffer: a number, or the name of a dimension."""

SEMANTIC, LOWERED = "semantic", "lowered"
PER_TOKEN, WINDOW, CONSTANT = "per_token", "window", "constant"
VERSION = 1


class ProgramError(Exception):
    """A program breaks a rule: a bug in a model file, a pass or a method, never the user's fault."""


@dataclass(frozen=True, slots=True)
class Dim:
    """A size known only at run time. With a `bound` it is a bounded count, with a static cap."""

    name: str
    bound: int | None = None


TOKENS, LOGITS, SEQUENCES = Dim("tokens"), Dim("logits"), Dim("sequences")
"""Tokens of the step; rows whose logits are wanted (at most one per token); sequences of the step."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """A named array that one node writes and others read."""

    name: str
    shape: Shape
    dtype: str = "f32"


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the model under its Hugging Face name: a matrix [N outputs, K inputs] or a vector."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class State:
    """What a node keeps of a sequence from step to step.

    growth: `per_token` keeps an entry for every token, `window` only the last `window` tokens' (a bounded
    amount), `constant` one entry per sequence. entry: the arrays of one entry by name, with their shapes.
    """

    name: str
    owner: str
    growth: str
    entry: Mapping[str, tuple[int, ...]]
    window: int = 0

    @property
    def elements(self) -> int:
        """Numbers in one entry."""
        total = 0
        for shape in self.entry.values():
            size = 1
            for n in shape:
                size *= n
            total += size
        return total

    def entries(self, tokens: int) -> int:
        """Entries that a sequence of `tokens` tokens keeps."""
        if self.growth == CONSTANT:
            return 1
        return min(tokens, self.window) if self.growth == WINDOW else tokens


@dataclass(frozen=True, slots=True)
class Node:
    """One operation: reads and writes buffers, reads weights, owns at most one state.

    `inputs`, `outputs` and `weights` are in the order that the op declares; an absent optional weight (a
    bias) is simply missing from the end. `attributes` holds plain data only: bool, int, float, str, None,
    lists, dicts.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    state: str | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Term:
    """One product of a `linear` or `linears` node: output = x @ weight.T + bias."""

    weight: str
    bias: str | None
    output: str


@dataclass(frozen=True)
class Program:
    """A model's step. Nodes are in execution order; `output` is the buffer of the logits."""

    name: str
    nodes: tuple[Node, ...]
    output: str
    buffers: Mapping[str, Buffer]
    weights: Mapping[str, Weight]
    states: Mapping[str, State]
    dims: Mapping[str, Dim]
    level: str = SEMANTIC

    def node(self, name: str) -> Node:
        """The node of that name; KeyError if there is none."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def readers(self) -> dict[str, list[Node]]:
        """For every buffer, the nodes that read it, in order (twice where a node reads it twice)."""
        result: dict[str, list[Node]] = {name: [] for name in self.buffers}
        for node in self.nodes:
            for name in node.inputs:
                result.setdefault(name, []).append(node)
        return result

    def writers(self) -> dict[str, Node]:
        """For every buffer, the node that writes it."""
        return {name: node for node in self.nodes for name in node.outputs}

    def columns(self) -> tuple[str, ...]:
        """Batch columns that the program reads, sorted."""
        from gristmill.program.ops import OPS

        return tuple(sorted({c for node in self.nodes for c in OPS[node.op].columns}))

    def with_nodes(self, nodes: tuple[Node, ...], **changes: Any) -> Program:
        """The same program over other nodes."""
        return replace(self, nodes=nodes, **changes)

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""
        width = self.buffers[self.output].shape[-1]
        if not isinstance(width, int):
            raise ProgramError(f"program {self.name!r}: the output {self.output!r} has no fixed width")
        return width

    def to_json(self) -> str:
        """Canonical text: equal programs give equal text, whatever the order in which they were built."""
        return json.dumps(_plain(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Program:
        """The program that `to_json` wrote, still to be checked. ProgramError for anything else."""
        try:
            data = json.loads(text)
            if data["version"] != VERSION:
                raise ProgramError(f"program version {data['version']!r} is not known (this is {VERSION})")
            return Program(
                name=data["name"],
                level=data["level"],
                output=data["output"],
                nodes=tuple(
                    Node(
                        n["name"],
                        n["op"],
                        tuple(n["inputs"]),
                        tuple(n["outputs"]),
                        tuple(n["weights"]),
                        n["state"],
                        dict(n["attributes"]),
                    )
                    for n in data["nodes"]
                ),
                buffers={k: Buffer(k, tuple(b["shape"]), b["dtype"]) for k, b in data["buffers"].items()},
                weights={k: Weight(k, tuple(shape)) for k, shape in data["weights"].items()},
                states={
                    k: State(
                        k, s["owner"], s["growth"], {a: tuple(e) for a, e in s["entry"].items()}, s["window"]
                    )
                    for k, s in data["states"].items()
                },
                dims={k: Dim(k, bound) for k, bound in data["dims"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProgramError(f"not the text of a program: {error!r}") from None

    def digest(self) -> str:
        """SHA-256 of `to_json`, in hex: identifies a program, and proves that a refactor changed nothing."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def terms(node: Node) -> tuple[Term, ...]:
    """The products of a node of op `linear`, `linears` or `gated_linears`, in order.

    The terms of `gated_linears` have no buffer of their own; their output is named "".
    """
    flags = node.attributes["biases"] if node.op != "linear" else [len(node.weights) == 2]
    outputs = [""] * len(flags) if node.op == "gated_linears" else node.outputs
    names = iter(node.weights)
    return tuple(
        Term(next(names), next(names) if biased else None, output)
        for biased, output in zip(flags, outputs, strict=True)
    )


def parents(program: Program, node: Node) -> Iterator[Node]:
    """The nodes that write the inputs of `node`, in input order."""
    writers = program.writers()
    for name in node.inputs:
        if name in writers:
            yield writers[name]


def _plain(program: Program) -> dict[str, Any]:
    return {
        "version": VERSION,
        "name": program.name,
        "level": program.level,
        "output": program.output,
        "nodes": [
            {
                "name": n.name,
                "op": n.op,
                "inputs": list(n.inputs),
                "outputs": list(n.outputs),
                "weights": list(n.weights),
                "state": n.state,
                "attributes": dict(n.attributes),
            }
            for n in program.nodes
        ],
        "buffers": {k: {"shape": list(b.shape), "dtype": b.dtype} for k, b in program.buffers.items()},
        "weights": {k: list(w.shape) for k, w in program.weights.items()},
        "states": {
            k: {
                "owner": s.owner,
                "growth": s.growth,
                "entry": {a: list(e) for a, e in s.entry.items()},
                "window": s.window,
            }
            for k, s in program.states.items()
        },
        "dims": {k: d.bound for k, d in program.dims.items()},
    }
