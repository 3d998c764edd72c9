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
_NOWHERE = -1
"""In place of a buffer of floats that exists in encodings alone."""
_Term = tuple[list[tuple[int, int, int]], int, int, bool]
"""Products (weight, input, input of prompts or -1), output, bias or -1, accumulate."""

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
    encoded: str = ""
    """The encoding that it exists in alone: int8 or fp8."""


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
        self.passed: list[int] = []  # nodes that the linear at hand has taken along
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
        assert source.encoded in ("", kind)
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
        if self.buffers[name].encoded:
            return self.encode(name, self.buffers[name].encoded, w), -1
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

    def op_encode(self, i: int, node: Node) -> None:
        """Codes for the linears under `fast`, else the rounded values."""
        name, output = node.inputs[0], node.outputs[0]
        source = self.buffers[name]
        a = node.attributes
        order = self.order(node.weights[0], source.width) if node.weights else []
        groups = -(-source.width // a["group"]) if a["group"] else 0
        limits = [2.0 ** (b - 1) - 1 for b in (a["bits"] if len(a["bits"]) != 1 else a["bits"] * groups)]
        readers = [self.nodes[j] for j in self.readers[output]]
        weights = [self.weight(r.weights[0]) for r in readers if r.op == "linear"]
        # Float weights alone take the rounded values in their own arithmetic; fp8's rows are for them.
        floats = a["kind"] == "int" and not any(w.integer for w in weights)
        if a["kind"] != "none" and self.activations == "fast" and not floats:
            kind = "int8" if a["kind"] == "int" else "fp8"
            self.buffers[output] = _Buffer(_NOWHERE, source.width, source.logits, kind)
            for reader in readers:
                w = self.weight(reader.weights[0]) if reader.op == "linear" else None
                same = w is not None and (w.group == a["group"] or (groups == 1 and w.group >= source.width))
                if w is None or (kind == "int8" and not (w.integer and same)):
                    raise ModelError(
                        f"the native backend cannot run node {reader.name!r}: its input is rounded in groups "
                        f"of {a['group']} columns, and its weight is not"
                        if kind == "int8"
                        else f"the native backend cannot run node {reader.name!r} on E4M3 rows"
                    )
                group = w.group if kind == "int8" else 0
                key = (output, kind, group, w.padded, ALL)
                if key not in self.encoded:
                    index = self.acquire(
                        _native.Encoding[kind.upper()],
                        source.logits,
                        source.width,
                        padded=w.padded,
                        group=group,
                        private=True,
                    )
                    self.native.add_encode(
                        f"{node.name}.{kind}", source.index, index, ALL, limits=limits, order=order
                    )
                    self.encoded[key] = index
                    self.owned[output].append(index)
            return
        out = self.define(output, source.width, source.logits, private=True)
        self.native.add_encode(
            node.name,
            source.index,
            out.index,
            ALL,
            group=a["group"],
            limits=limits,
            order=order,
            fp8=a["kind"] == "fp8",
        )

    def order(self, name: str, width: int) -> list[int]:
        """A permutation of the columns, kept as a vector of floats."""
        values = self.vector(name)
        if not np.array_equal(np.sort(values), np.arange(width, dtype=np.float32)):
            raise ModelError(f"the vector {name!r} is no order of {width} columns")
        return [int(v) for v in values]

    def op_linear(self, i: int, node: Node) -> None:
        source = node.inputs[0]
        # The first half of a low-rank branch goes before the linears that its second half is added to.
        first = self.feeds_linears(i)
        group = [
            j
            for j in self.readers[source]
            if j not in self.done and self.nodes[j].op == "linear" and self.feeds_linears(j) == first
        ]
        if group == [i]:
            group += self.other_half(i)
        # Later linears of the same input go along only while their outputs stay unread until then.
        terms: list[_Term] = []
        finished: dict[int, str] = {}  # member -> the buffer that holds its result in the end
        for j in group:
            source = self.nodes[j].inputs[0]
            products = [self.product(source, j)]
            sources = {source}
            bias = self.nodes[j].weights[1:]
            total = self.nodes[j].outputs[0]
            accumulate = False
            self.done.add(j)
            while (addition := self.addition_to(total)) is not None:
                position, other = addition
                branch = self.branch(other)
                if branch is not None and not (bias and self.nodes[branch].weights[1:]):
                    # Another product of the same output rows: a low-rank branch or an adapter.
                    sources.add(self.nodes[branch].inputs[0])
                    products.append(self.product(self.nodes[branch].inputs[0], branch))
                    bias = bias or self.nodes[branch].weights[1:]
                    self.done |= {branch, position}
                    self.passed.append(branch)
                elif (
                    not accumulate
                    and other in self.buffers
                    and other not in sources
                    and self.last_use(other, position)
                ):
                    self.alias(self.nodes[position].outputs[0], other)
                    self.done.add(position)
                    accumulate = True
                else:
                    break
                self.passed.append(position)
                total = self.nodes[position].outputs[0]
            w = self.weight(self.nodes[j].weights[0])
            if not accumulate:
                self.define(total, w.rows, self.buffers[source].logits)
            vector = self.add_vector(bias[0]) if bias else -1
            terms.append((products, self.buffers[total].index, vector, accumulate))
            finished[j] = total
        gated = self.gated_pair(list(finished.values()), terms)
        gate = -1
        if gated is not None:
            act = self.nodes[gated]
            gate = _GATES[str(act.attributes["activation"])]
            if list(finished.values()) != list(act.inputs):
                terms.reverse()
            self.alias(act.outputs[0], act.inputs[0])
            self.done.add(gated)
            self.passed.append(gated)
        self.native.add_linears(node.name, terms, gate)
        for j in [*group, *self.passed]:
            self.release(j)
        self.passed.clear()

    def other_half(self, i: int) -> list[int]:
        """The linear whose result is gated by that of linear i, or gates it, from an input of its own."""
        own = self.nodes[i].outputs[0]
        readers = [self.nodes[r] for r in self.readers[own]]
        if len(readers) != 1 or readers[0].op != "gated":
            return []
        found = self.branch(next(name for name in readers[0].inputs if name != own))
        return [] if found is None else [found]

    def feeds_linears(self, j: int) -> bool:
        readers = self.readers[self.nodes[j].outputs[0]]
        return bool(readers) and all(self.nodes[r].op == "linear" for r in readers)

    def product(self, source: str, j: int) -> tuple[int, int, int]:
        """(weight, input, input of prompts) of linear node j, which reads `source`."""
        name = self.nodes[j].weights[0]
        w = self.weight(name)
        if w.columns != self.buffers[source].width:
            raise ModelError(
                f"weight {name!r} has {w.columns} columns, but its input has {self.buffers[source].width}"
            )
        return (w.index, *self.inputs(source, w))

    def gated_pair(self, outputs: list[str], terms: list[_Term]) -> int | None:
        """The gated node that reads exactly these two results, if there is one."""
        if len(outputs) != 2 or any(accumulate for *_, accumulate in terms):
            return None
        first = self.readers[outputs[0]]
        if len(first) != 1 or self.readers[outputs[1]] != first:
            return None
        node = self.nodes[first[0]]
        same = self.buffers[outputs[0]].width == self.buffers[outputs[1]].width
        return first[0] if node.op == "gated" and same and sorted(node.inputs) == sorted(outputs) else None

    def addition_to(self, name: str) -> tuple[int, str] | None:
        """(position, other input) of the addition that alone reads `name`."""
        readers = self.readers[name]
        if len(readers) != 1 or self.nodes[readers[0]].op != "add":
            return None
        others = [other for other in self.nodes[readers[0]].inputs if other != name]
        return (readers[0], others[0]) if len(others) == 1 else None

    def branch(self, name: str) -> int | None:
        """The linear still to be done that writes `name` for one reader, from an input that is there."""
        j = self.writer.get(name, -1)
        if j < 0 or j in self.done or self.nodes[j].op != "linear" or len(self.readers[name]) != 1:
            return None
        return j if self.nodes[j].inputs[0] in self.buffers else None

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

    So at levels with matrix tiles, whose int8 products wait for the scales of groups as small as these. They
    meet its values rounded to bf16, which needs no scales, but must be made first: sooner done with codes of
    few bits.
    """
    most = 64 if w.storage in ("int2", "int3", "int4") else 32
    return bool(native.prompts_in_bf16) and w.integer and w.group <= most


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
