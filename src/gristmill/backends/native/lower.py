"""Semantic program -> native program.

The pass walks the semantic nodes once. Linears that read the same buffer become one native node with an
ordered list of terms; a gate/up pair takes its gated activation with it; a residual addition of a linear's
result is done by the linear itself. Activation encodings are made once per (buffer, encoding) that some term
needs. Buffers are reused after their last reader. A node this backend cannot run is an error that names it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.backends.native import _native
from gristmill.backends.native.weights import NativeWeight
from gristmill.errors import ModelError
from gristmill.program.batch import GENERATED, PROMPT
from gristmill.program.nodes import Node, Program

ALL = -1
"""Rows of every phase."""

_GATES = {"silu": 0, "gelu_tanh": 1}


@dataclass
class Lowered:
    """What the executor must know about the program it runs."""

    ropes: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # (native table, rope attributes)
    vocab_size: int = 0


@dataclass(frozen=True)
class _Buffer:
    index: int
    width: int
    logits: bool


class _Lowering:
    def __init__(
        self,
        program: Program,
        native: _native.Program,
        weight: Callable[[str], NativeWeight],
        vector: Callable[[str], NDArray[np.float32]],
        *,
        activations: str,
        kv_layers: Mapping[str, int],
    ) -> None:
        self.program = program
        self.native = native
        self.weight = weight
        self.vector = vector
        self.activations = activations
        self.kv_layers = kv_layers
        self.result = Lowered()
        self.nodes = list(program.nodes)
        self.readers: dict[str, list[int]] = defaultdict(list)
        self.writer: dict[str, int] = {}
        for i, node in enumerate(self.nodes):
            for name in node.inputs:
                self.readers[name].append(i)
            for name in node.outputs:
                self.writer[name] = i
        self.buffers: dict[str, _Buffer] = {}
        self.encoded: dict[tuple[str, str, int, int, int], int] = {}
        self.free: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        self.specs: dict[int, tuple[Any, ...]] = {}
        self.owned: dict[str, list[int]] = defaultdict(list)
        self.done: set[int] = set()
        self.vectors: dict[tuple[str, float], int] = {}
        self.ropes: dict[str, int] = {}

    # Buffers --------------------------------------------------------------------------------------------

    def acquire(
        self, encoding: _native.Encoding, logits: bool, width: int, *, padded: int, group: int, private: bool
    ) -> int:
        spec = (encoding, logits, width, padded, group, private)
        if self.free[spec]:
            return self.free[spec].pop()
        index = int(self.native.add_buffer(encoding, logits, width, padded, group, private))
        self.specs[index] = spec
        return index

    def define(self, name: str, width: int, logits: bool, private: bool = False) -> _Buffer:
        index = self.acquire(_native.Encoding.F32, logits, width, padded=width, group=0, private=private)
        self.buffers[name] = _Buffer(index, width, logits)
        self.owned[name].append(index)
        return self.buffers[name]

    def alias(self, name: str, source: str) -> None:
        """`name` takes over the buffer of `source`, which nobody reads any more."""
        self.buffers[name] = self.buffers[source]
        # Encodings of the old content are stale.
        index = self.buffers[source].index
        self.owned[name].append(index)
        self.owned[source].remove(index)

    def release(self, position: int) -> None:
        """Returns the buffers whose last reader was the node at `position`."""
        for name in set(self.nodes[position].inputs):
            if all(r in self.done for r in self.readers[name]):
                for index in self.owned.pop(name, []):
                    self.free[self.specs[index]].append(index)
                for key in [k for k in self.encoded if k[0] == name]:
                    del self.encoded[key]

    def last_use(self, name: str, position: int) -> bool:
        return all(r == position or r in self.done for r in self.readers[name])

    def encode(self, name: str, kind: str, w: NativeWeight, phase: int = ALL) -> int:
        """The buffer that a term of weight `w` reads: `name` as f32, or an encoding of a phase's rows."""
        source = self.buffers[name]
        if kind == "f32":
            return source.index
        group = w.group if kind == "int8" else 0
        padded = w.padded
        key = (name, kind, group, padded, phase)
        if key not in self.encoded:
            encoding = _native.Encoding.INT8 if kind == "int8" else _native.Encoding.BF16
            index = self.acquire(
                encoding, source.logits, source.width, padded=padded, group=group, private=True
            )
            self.native.add_encode(f"{name}.{kind}", source.index, index, phase)
            self.encoded[key] = index
            self.owned[name].append(index)
        return self.encoded[key]

    def inputs(self, name: str, w: NativeWeight) -> tuple[int, int]:
        """The buffers that a term of weight `w` reads: in general, and for rows of prompts or -1."""
        kind = self.arithmetic(w)
        if kind == "int8" and prompt_in_bf16(self.native, w):
            return self.encode(name, "int8", w, GENERATED), self.encode(name, "bf16", w, PROMPT)
        return self.encode(name, kind, w), -1

    def arithmetic(self, w: NativeWeight) -> str:
        """Arithmetic of one term: int8 rows for integer weights in `fast`, else bf16 or f32 rows."""
        if self.activations == "exact":
            return "f32"
        if self.activations == "bf16":
            return "bf16"
        if w.integer:
            return "int8"
        return "f32" if w.storage == "f32" else "bf16"

    def add_vector(self, name: str, offset: float = 0.0) -> int:
        key = (name, offset)
        if key not in self.vectors:
            values = np.ascontiguousarray(self.vector(name), dtype=np.float32)
            self.vectors[key] = int(self.native.add_vector(values + np.float32(offset) if offset else values))
        return self.vectors[key]

    # Nodes ----------------------------------------------------------------------------------------------

    def run(self) -> Lowered:
        for i, node in enumerate(self.nodes):
            if i in self.done:
                continue
            handler = getattr(self, f"op_{node.op}", None)
            if handler is None:
                raise ModelError(
                    f"the native backend cannot run node {node.name!r}: op {node.op!r} is not supported"
                )
            handler(i, node)
            self.done.add(i)
            self.release(i)
        final = self.program.output
        self.native.set_logits(self.buffers[final].index)
        self.result.vocab_size = self.buffers[final].width
        return self.result

    def op_embedding(self, i: int, node: Node) -> None:
        w = self.weight(node.weights[0])
        out = self.define(node.outputs[0], w.columns, False)
        self.native.add_embedding(node.name, w.index, out.index, float(node.attributes.get("scale", 1.0)))

    def op_rmsnorm(self, i: int, node: Node) -> None:
        source = self.buffers[node.inputs[0]]
        out = self.define(node.outputs[0], source.width, source.logits, private=True)
        offset = float(node.attributes.get("weight_offset", 0.0))
        v = self.add_vector(node.weights[0], offset)
        self.native.add_rmsnorm(node.name, source.index, out.index, v, float(node.attributes["eps"]), 1)

    def op_head_rmsnorm(self, i: int, node: Node) -> None:
        name = node.inputs[0]
        if not self.last_use(name, i):
            raise ModelError(f"the native backend cannot run node {node.name!r}: its input has other readers")
        source = self.buffers[name]
        v = self.add_vector(node.weights[0], float(node.attributes.get("weight_offset", 0.0)))
        heads = int(node.attributes["heads"])
        self.native.add_rmsnorm(
            node.name, source.index, source.index, v, float(node.attributes["eps"]), heads
        )
        self.alias(node.outputs[0], name)

    def op_linear(self, i: int, node: Node) -> None:
        source = node.inputs[0]
        group = [j for j in self.readers[source] if j not in self.done and self.nodes[j].op == "linear"]
        # Later linears of the same input go along only while their outputs stay unread until then.
        weights = {j: self.weight(self.nodes[j].weights[0]) for j in group}
        gated = self.gated_pair(group, weights)
        terms: list[tuple[int, int, int, int, bool, int]] = []
        for j in group:
            member = self.nodes[j]
            w = weights[j]
            bias = self.add_vector(member.weights[1]) if len(member.weights) > 1 else -1
            source_buffer = self.buffers[source]
            if w.columns != source_buffer.width:
                raise ModelError(
                    f"weight {member.weights[0]!r} has {w.columns} columns, "
                    f"but its input has {source_buffer.width}"
                )
            residual = self.residual_of(j) if len(group) == 1 else None
            encoded, prompt = self.inputs(source, w)
            if residual is not None:
                position, old = residual
                terms.append((w.index, encoded, self.buffers[old].index, bias, True, prompt))
                self.alias(self.nodes[position].outputs[0], old)
                self.done.add(position)
            else:
                out = self.define(member.outputs[0], w.rows, source_buffer.logits)
                terms.append((w.index, encoded, out.index, bias, False, prompt))
            self.done.add(j)
        gate = -1
        if gated is not None:
            act = self.nodes[gated]
            gate = _GATES[str(act.attributes["activation"])]
            names = [self.nodes[j].outputs[0] for j in group]
            if names != list(act.inputs):
                terms.reverse()
            self.alias(act.outputs[0], act.inputs[0])
            self.done.add(gated)
        self.native.add_linears(node.name, terms, gate)
        for j in group:
            self.release(j)
        if gated is not None:
            self.release(gated)

    def gated_pair(self, group: list[int], weights: Mapping[int, NativeWeight]) -> int | None:
        """The gated node that reads exactly the two linears of `group`, if there is one."""
        if len(group) != 2:
            return None
        outputs = [self.nodes[j].outputs[0] for j in group]
        first = self.readers[outputs[0]]
        if len(first) != 1 or self.readers[outputs[1]] != first:
            return None
        node = self.nodes[first[0]]
        same = weights[group[0]].rows == weights[group[1]].rows
        return first[0] if node.op == "gated" and same and sorted(node.inputs) == sorted(outputs) else None

    def residual_of(self, j: int) -> tuple[int, str] | None:
        """(position, other input) of the addition that alone reads linear j and may be done in place."""
        output = self.nodes[j].outputs[0]
        readers = self.readers[output]
        if len(readers) != 1 or self.nodes[readers[0]].op != "add":
            return None
        position = readers[0]
        others = [name for name in self.nodes[position].inputs if name != output]
        if len(others) != 1 or others[0] not in self.buffers or not self.last_use(others[0], position):
            return None
        return position, others[0]

    def op_add(self, i: int, node: Node) -> None:
        a, b = node.inputs
        for target, other in ((a, b), (b, a)):
            if a != b and self.last_use(target, i):
                self.native.add_add(node.name, self.buffers[other].index, self.buffers[target].index)
                self.alias(node.outputs[0], target)
                return
        raise ModelError(
            f"the native backend cannot run node {node.name!r}: both inputs are read again later"
        )

    def op_attention(self, i: int, node: Node) -> None:
        q, k, v = (self.buffers[name] for name in node.inputs)
        a = node.attributes
        rope = -1
        if a.get("rope") is not None:
            key = repr(sorted(a["rope"].items())) + f"/{a['head_dim']}"
            if key not in self.ropes:
                self.ropes[key] = int(self.native.add_rope())
                self.result.ropes.append((self.ropes[key], {"rope": a["rope"], "head_dim": a["head_dim"]}))
            rope = self.ropes[key]
        out = self.define(node.outputs[0], int(a["heads"]) * int(a["head_dim"]), False, private=True)
        self.native.add_attention(
            node.name,
            self.kv_layers[str(node.state)],
            q.index,
            k.index,
            v.index,
            out.index,
            int(a["heads"]),
            int(a["kv_heads"]),
            int(a["head_dim"]),
            float(a["scale"]),
            int(a.get("window", 0)),
            rope,
            self.add_vector(node.weights[0]) if node.weights else -1,
            self.activations != "exact",
        )

    def op_select_rows(self, i: int, node: Node) -> None:
        source = self.buffers[node.inputs[0]]
        out = self.define(node.outputs[0], source.width, True, private=True)
        self.native.add_select_rows(node.name, source.index, out.index)


def prompt_in_bf16(native: _native.Program, w: NativeWeight) -> bool:
    """Whether rows of prompts meet an integer weight as bf16 under `fast`.

    So at levels with matrix tiles, whose int8 products wait for the scales of groups as small as these.
    """
    return bool(native.prompts_in_bf16) and w.integer and w.group <= 32


def lower(
    program: Program,
    native: _native.Program,
    weight: Callable[[str], NativeWeight],
    vector: Callable[[str], NDArray[np.float32]],
    *,
    activations: str,
    kv_layers: Mapping[str, int],
) -> Lowered:
    """Builds `native` from the semantic `program`.

    `weight(name)` registers a packed weight on first use, `vector(name)` gives norm weights and biases,
    `kv_layers` maps state names to layers of the native KV geometry. Raises ModelError for a node that the
    native backend cannot run.
    """
    return _Lowering(
        program,
        native,
        weight,
        vector,
        activations=activations,
        kv_layers=kv_layers,
    ).run()
