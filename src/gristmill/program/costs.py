"""Bytes and operations of a step, derived from the program that runs.

Counted per node: every weight read once per step (of a gathered table only the rows taken), every key and
value in reach read once per step and sequence, new ones written once, buffers read and written once in
float32. Caches may save some of it, and tiles may read some of it twice; the roofline is this number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from gristmill.program.kv import kv_bytes, kv_formats
from gristmill.program.nodes import Node, Program, State
from gristmill.program.ops import COLUMNS, OPS, Site, shape_text

WeightBytes = Mapping[str, float] | Callable[[str], float]
"""Stored bytes of a tensor by its name."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one step does: per sequence its new tokens and those it held before; and the wanted logit rows."""

    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    logits: int

    @staticmethod
    def prefill(tokens: int, context: int = 0) -> Work:
        """One prompt chunk of which the last row's logits are wanted."""
        return Work((tokens,), (context,), 1)

    @staticmethod
    def decode(batch: int, context: int) -> Work:
        """One new token for each of `batch` sequences that hold `context` tokens."""
        return Work((1,) * batch, (context,) * batch, batch)

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return sum(self.lengths)

    def rows(self, dim: str | int) -> int:
        """Size of a dimension in this step."""
        if isinstance(dim, int):
            return dim
        return {"tokens": self.tokens, "logits": self.logits, "sequences": len(self.lengths)}[dim]

    def visible(self, window: int) -> int:
        """Keys that all new tokens together see, each its own causal range."""
        total = 0
        for length, context in zip(self.lengths, self.contexts, strict=True):
            first, last = (
                context + 1,
                context + length,
            )  # keys seen by the first and the last token, without window
            if window and last > window:
                growing = max(0, min(window, last) - first + 1)
                total += growing * (first + min(window, last)) // 2 + (length - growing) * window
            else:
                total += length * (first + last) // 2
        return total

    def touched(self, state: State) -> tuple[int, int]:
        """(entries read, entries written) of a state, over all sequences."""
        read = written = 0
        for length, context in zip(self.lengths, self.contexts, strict=True):
            if length:
                read += min(context + length, state.window + length - 1) if state.window else context + length
                written += length
        return read, written


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one node in one step, or of several (`sum_costs`)."""

    operations: float = 0.0
    weight_bytes: float = 0.0
    state_bytes_read: float = 0.0
    state_bytes_written: float = 0.0
    buffer_bytes: float = 0.0

    @property
    def memory_bytes(self) -> float:
        """Weights and state: what comes from memory when the buffers stay in the caches."""
        return self.weight_bytes + self.state_bytes_read + self.state_bytes_written

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.operations + other.operations,
            self.weight_bytes + other.weight_bytes,
            self.state_bytes_read + other.state_bytes_read,
            self.state_bytes_written + other.state_bytes_written,
            self.buffer_bytes + other.buffer_bytes,
        )


def step_costs(
    program: Program, work: Work, weight_bytes: WeightBytes | None = None, kv_dtype: str | None = None
) -> dict[str, Cost]:
    """The cost of every node, by its name, in program order.

    weight_bytes: stored bytes of each tensor (a mapping or a function); without it, float32.
    kv_dtype: format of all keys and values; None: the program's, else bf16.
    """
    result = {}
    formats = kv_formats(program, kv_dtype)
    for node in program.nodes:
        site = _site(program, node)
        op = OPS[node.op]
        weights = 0.0
        for weight in site.weights:
            stored = _stored(weight_bytes, weight.name, weight.shape)
            if op.gathers:
                rows = work.rows(program.buffers[node.outputs[0]].shape[0])
                stored *= min(1.0, rows / weight.shape[0])
            weights += stored
        read = written = 0.0
        if site.state is not None:
            read, written = (
                kv_bytes(site.state.entry.values(), formats[site.state.name], entries)
                for entries in work.touched(site.state)
            )
        buffers = sum(
            4 * _elements(work, program.buffers[name].shape) for name in (*node.inputs, *node.outputs)
        )
        result[node.name] = Cost(
            op.operations(site, work),
            weights,
            read,
            written,
            buffers,
        )
    return result


def sum_costs(costs: Mapping[str, Cost]) -> Cost:
    """The whole step."""
    total = Cost()
    for cost in costs.values():
        total = total + cost
    return total


def weight_total(program: Program, weight_bytes: WeightBytes | None = None) -> float:
    """Bytes of all weights, each counted once however many nodes read it."""
    return sum(_stored(weight_bytes, w.name, w.shape) for w in program.weights.values())


def parameters(program: Program) -> int:
    """Numbers in all weights."""
    total = 0
    for weight in program.weights.values():
        size = 1
        for n in weight.shape:
            size *= n
        total += size
    return total


def state_bytes(program: Program, tokens: int, kv_dtype: str | None = None) -> float:
    """Bytes that one sequence of `tokens` tokens keeps in all states; kv_dtype as in `step_costs`."""
    formats = kv_formats(program, kv_dtype)
    return sum(
        kv_bytes(s.entry.values(), formats[name], s.entries(tokens)) for name, s in program.states.items()
    )


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a described program: a node, or the same node of several layers with the costs summed."""

    name: str
    """With the layers' numbers as a range: `layers.0-29.mlp.up_proj`."""
    op: str
    count: int
    outputs: str
    """Shapes of the outputs."""
    weights: str
    """Shapes of the weights."""
    formats: str
    """Formats of the weights, as far as they are known."""
    details: str
    """Attributes, state and batch columns."""
    cost: Cost


def describe(
    program: Program,
    costs: Mapping[str, Cost] | None = None,
    *,
    formats: Mapping[str, str] | None = None,
    collapse: bool = True,
) -> list[Row]:
    """The program as readable rows in order. Layers that differ in their number alone become one row each.

    costs: from `step_costs`; zeros without it. formats: of weights by name. With `collapse` off, one row per
    node.
    """
    rows: dict[tuple[str, ...], Row] = {}
    numbers: dict[tuple[str, ...], list[int]] = {}
    for node in program.nodes:
        layer = re.search(r"(?<=layers\.)\d+", node.name)
        name = node.name
        if layer is not None:
            # A fused node may reach into the next layer: `layers.3.mlp.residual+4.input_layernorm`.
            rest = name[layer.end() :].replace(f"+{int(layer.group()) + 1}.", "+next.")
            name = name[: layer.start()] + "#" + rest
        row = Row(
            name if collapse else node.name,
            node.op,
            1,
            " ".join(shape_text(program.buffers[o].shape) for o in node.outputs),
            " ".join(shape_text(program.weights[w].shape) for w in node.weights),
            " ".join(dict.fromkeys(formats[w] for w in node.weights if w in formats)) if formats else "",
            _details(program, node),
            (costs or {}).get(node.name, Cost()),
        )
        key = (row.name, row.op, row.outputs, row.weights, row.formats, row.details)
        if key in rows:
            row = replace(row, count=rows[key].count + 1, cost=rows[key].cost + row.cost)
        rows[key] = row
        if layer is not None:
            numbers.setdefault(key, []).append(int(layer.group()))
    return [
        replace(row, name=row.name.replace("#", _ranges(numbers.get(key, [])))) for key, row in rows.items()
    ]


def _site(program: Program, node: Node) -> Site:
    return Site(
        node,
        tuple(program.buffers[n] for n in node.inputs),
        tuple(program.weights[n] for n in node.weights),
        None if node.state is None else program.states[node.state],
    )


def _stored(source: WeightBytes | None, name: str, shape: tuple[int, ...]) -> float:
    if source is None:
        size = 4
        for n in shape:
            size *= n
        return size
    return source[name] if isinstance(source, Mapping) else source(name)


def _elements(work: Work, shape: tuple[str | int, ...]) -> int:
    size = 1
    for n in shape:
        size *= work.rows(n)
    return size


def _details(program: Program, node: Node) -> str:
    parts = []
    for key, value in node.attributes.items():
        if isinstance(value, dict):
            inner = ", ".join(f"{k} {_number(v)}" for k, v in value.items() if k != "type")
            parts.append(f"{key} {value.get('type', '')}({inner})")
        elif key != "biases":
            parts.append(f"{key} {_number(value)}")
    if node.state is not None:
        state = program.states[node.state]
        parts.append(f"state {state.growth} x {state.elements}")
    columns = [c for c in OPS[node.op].columns if c in COLUMNS]
    if columns:
        parts.append(f"reads {', '.join(columns)}")
    return "; ".join(parts)


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> 0-2,5."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    return ",".join("-".join(str(n) for n in part) for part in parts)
