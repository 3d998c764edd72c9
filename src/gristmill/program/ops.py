"""Every op, declared once.

A declaration is a function: its docstring states the equation, its body checks the shapes of one node and
returns the shapes of the outputs, and the decorator names what the op reads and writes. The builder, the
checker, the costs and the documentation come from here; the one reference implementation of each op lives in
`backends.reference.ops`.

Rows are tokens or wanted logit rows; x[i] is row i. Matrices of weights are [outputs, inputs].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from gristmill.program.kv import KV_FORMATS
from gristmill.program.nodes import (
    LOWERED,
    PER_TOKEN,
    SEMANTIC,
    WINDOW,
    Buffer,
    Node,
    ProgramError,
    Shape,
    State,
    Weight,
    terms,
)
from gristmill.program.rope import check_rope

if TYPE_CHECKING:
    from gristmill.program.costs import Work

ACTIVATIONS = ("silu", "gelu_tanh")
ENCODINGS = ("none", "int", "fp8")
DTYPES = ("f32",)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of batch metadata: one number per row of `dim`."""

    name: str
    dim: str
    dtype: str
    doc: str


COLUMNS: dict[str, Column] = {
    c.name: c
    for c in (
        Column("ids", "tokens", "i32", "token id"),
        Column("position", "tokens", "i32", "position in the token's own sequence, from 0"),
        Column("sequence", "tokens", "i32", "index of the token's sequence in the batch"),
        Column("phase", "tokens", "u8", "0 prompt, 1 generated"),
        Column("logit_rows", "logits", "i32", "row of the token whose logits are wanted, ascending"),
    )
}


@dataclass(frozen=True, slots=True)
class Site:
    """One node with what it refers to, as an op's rule sees it."""

    node: Node
    inputs: tuple[Buffer, ...]
    weights: tuple[Weight, ...]
    state: State | None

    def fail(self, message: str) -> NoReturn:
        """Raises ProgramError about this node."""
        raise ProgramError(message)

    def matrix(self, index: int) -> tuple[str | int, int]:
        """(rows, width) of an input, which must be a matrix of fixed width."""
        buffer = self.inputs[index]
        if len(buffer.shape) != 2 or not isinstance(buffer.shape[1], int):
            self.fail(f"buffer {buffer.name!r} of shape {shape_text(buffer.shape)} is not rows x fixed width")
        return buffer.shape[0], buffer.shape[1]

    def same(self, a: int, b: int) -> Shape:
        """The common shape of two inputs."""
        first, second = self.inputs[a], self.inputs[b]
        if first.shape != second.shape:
            self.fail(
                f"buffers {first.name!r} of shape {shape_text(first.shape)} and {second.name!r} of shape "
                f"{shape_text(second.shape)} must be of one shape"
            )
        return first.shape

    def width(self, index: int, expected: int) -> None:
        """Demands that an input has `expected` columns."""
        width = self.matrix(index)[1]
        if width != expected:
            self.fail(f"buffer {self.inputs[index].name!r} has {width} columns, not {expected}")

    def vector(self, index: int, expected: int) -> None:
        """Demands that a weight is a vector of `expected` numbers."""
        weight = self.weights[index]
        if weight.shape != (expected,):
            self.fail(f"weight {weight.name!r} of shape {shape_text(weight.shape)} must be [{expected}]")

    def outputs_of(self, index: int, columns: int) -> int:
        """Rows of a weight, which must be a matrix of `columns` columns."""
        weight = self.weights[index]
        if len(weight.shape) != 2 or weight.shape[1] != columns:
            self.fail(
                f"weight {weight.name!r} of shape {shape_text(weight.shape)} must be [outputs, {columns}]"
            )
        return weight.shape[0]

    def products(self) -> list[int]:
        """Output widths of the terms of a linear node, in order."""
        width = self.matrix(0)[1]
        shapes = {w.name: i for i, w in enumerate(self.weights)}
        result = []
        for term in terms(self.node):
            result.append(self.outputs_of(shapes[term.weight], width))
            if term.bias is not None:
                self.vector(shapes[term.bias], result[-1])
        return result


Rule = Callable[[Site], tuple[Shape, ...]]


@dataclass(frozen=True)
class Op:
    """What is known about an op. `inputs` and `outputs` name their roles; None means any number."""

    name: str
    doc: str
    rule: Rule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] | None
    weights: tuple[str, ...] | None
    optional: int
    """How many of the last weights may be missing."""
    columns: tuple[str, ...]
    attributes: Mapping[str, Any]
    """A type, or a tuple of the strings allowed."""
    free: tuple[str, ...]
    """Attributes that may be missing."""
    state: bool
    """Appends to the state it owns, then reads it."""
    level: str
    rowwise: bool
    """Row i of the outputs depends on row i of the inputs alone."""
    gathers: bool
    """Reads one row of its weight per row of output, not all of it."""
    operations: Callable[[Site, Work], float]
    """Multiplications and additions of one step."""


OPS: dict[str, Op] = {}
"""All ops by name."""


def _none(site: Site, work: Work) -> float:
    return 0.0


def _per_element(count: float) -> Callable[[Site, Work], float]:
    def operations(site: Site, work: Work) -> float:
        rows, width = site.matrix(0)
        return count * work.rows(rows) * width

    return operations


def _products(site: Site, work: Work) -> float:
    rows, width = site.matrix(0)
    return 2.0 * work.rows(rows) * width * sum(site.products())


def _attention(site: Site, work: Work) -> float:
    a = site.node.attributes
    return 4.0 * int(a["heads"]) * int(a["head_dim"]) * work.visible(a["window"])


def op(
    name: str,
    *,
    inputs: tuple[str, ...] = ("x",),
    outputs: tuple[str, ...] | None = ("y",),
    weights: tuple[str, ...] | None = (),
    optional: int = 0,
    columns: tuple[str, ...] = (),
    attributes: Mapping[str, Any] | None = None,
    free: tuple[str, ...] = (),
    state: bool = False,
    level: str = SEMANTIC,
    rowwise: bool = True,
    gathers: bool = False,
    operations: Callable[[Site, Work], float] = _none,
) -> Callable[[Rule], Rule]:
    """Declares the decorated shape rule as the op `name`."""
    unknown = [c for c in columns if c not in COLUMNS]
    if name in OPS or unknown:
        raise ProgramError(f"op {name!r} is declared twice or reads unknown batch columns {unknown}")

    def declare(rule: Rule) -> Rule:
        OPS[name] = Op(
            name,
            rule.__doc__ or "",
            rule,
            inputs,
            outputs,
            weights,
            optional,
            columns,
            attributes or {},
            free,
            state,
            level,
            rowwise,
            gathers,
            operations,
        )
        return rule

    return declare


def shape_text(shape: Shape) -> str:
    """A shape as it is printed: [tokens, 576]."""
    return "[" + ", ".join(str(n) for n in shape) + "]"


# Semantic level


@op(
    "embedding",
    inputs=(),
    weights=("table",),
    columns=("ids",),
    attributes={"scale": float},
    gathers=True,
    rowwise=False,
)
def embedding(s: Site) -> tuple[Shape, ...]:
    """y[i] = scale * table[ids[i]]"""
    if len(s.weights[0].shape) != 2:
        s.fail(f"weight {s.weights[0].name!r} of shape {shape_text(s.weights[0].shape)} must be a matrix")
    return (("tokens", s.weights[0].shape[1]),)


@op(
    "rmsnorm",
    weights=("weight",),
    attributes={"eps": float, "weight_offset": float},
    operations=_per_element(4),
)
def rmsnorm(s: Site) -> tuple[Shape, ...]:
    """y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset), the mean over the row"""
    s.vector(0, s.matrix(0)[1])
    return (s.inputs[0].shape,)


@op(
    "head_rmsnorm",
    weights=("weight",),
    attributes={"eps": float, "weight_offset": float, "heads": int, "head_dim": int},
    operations=_per_element(4),
)
def head_rmsnorm(s: Site) -> tuple[Shape, ...]:
    """rmsnorm of each of the `heads` parts of the row alone, all with one weight of head_dim"""
    a = s.node.attributes
    s.width(0, a["heads"] * a["head_dim"])
    s.vector(0, a["head_dim"])
    return (s.inputs[0].shape,)


@op("linear", weights=("weight", "bias"), optional=1, operations=_products)
def linear(s: Site) -> tuple[Shape, ...]:
    """y = x @ weight.T + bias"""
    return ((s.matrix(0)[0], s.products()[0]),)


@op(
    "encode",
    weights=("order",),
    optional=1,
    attributes={"kind": ENCODINGS, "group": int, "bits": list},
    operations=_per_element(3),
)
def encode(s: Site) -> tuple[Shape, ...]:
    """y = Q(x[:, order]): the row as a quantised linear is given it; without order, its own columns

    kind int: per row and group of `group` columns (the last may be ragged), with L = 2^(b - 1) - 1 and b the
    group's entry of `bits`, or its only one: scale = max|x| / L, y = scale * round(x / scale), to even.
    kind fp8: per row, with a = max|x| / 448 (1 for a row of zeros): y = a * E4M3(x / a).
    kind none: the columns alone.
    """
    a, width = s.node.attributes, s.matrix(0)[1]
    if s.weights:
        s.vector(0, width)
    if a["kind"] != "int":
        if a["group"] or a["bits"] or not (s.weights or a["kind"] == "fp8"):
            s.fail(f"encode of kind {a['kind']} takes neither group nor bits; kind none takes an order")
        return (s.inputs[0].shape,)
    if a["group"] < 8 or a["group"] % 8:
        s.fail(f"groups are multiples of 8 columns, not {a['group']}")
    groups = -(-width // a["group"])
    if len(a["bits"]) not in (1, groups) or any(type(b) is not int or not 2 <= b <= 8 for b in a["bits"]):
        s.fail(f"bits {a['bits']!r} are neither one number from 2 to 8 nor {groups} of them")
    return (s.inputs[0].shape,)


@op(
    "attention",
    inputs=("q", "k", "v"),
    weights=("key_scale",),
    optional=1,
    columns=("position", "sequence"),
    attributes={
        "heads": int,
        "kv_heads": int,
        "head_dim": int,
        "scale": float,
        "window": int,
        "rope": (dict, type(None)),
        "kv_format": ("", *KV_FORMATS),
    },
    free=("kv_format",),
    state=True,
    rowwise=False,
    operations=_attention,
)
def attention(s: Site) -> tuple[Shape, ...]:
    """y[i, h] = sum_j softmax_j(scale * <R(p_i) q[i, h], R(p_j) k[j, g]>) v[j, g], g = h * kv_heads // heads

    j runs over the tokens of i's sequence, those of earlier steps included, with p_i - window < p_j <= p_i
    (window 0: no lower bound). R(p) rotates as `rope` does, nothing if the attribute is None; with the weight
    key_scale [kv_heads * head_dim] the rotated k[j, g] is then multiplied by the scales of head g and the
    rotated q[i, h] divided by them. The k so made and v are appended to the state first, in the format
    `kv_format` (missing or "": as the executor is told), and seen as they are kept.
    """
    a = s.node.attributes
    heads, kv_heads, head_dim, window = a["heads"], a["kv_heads"], a["head_dim"], a["window"]
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        s.fail(f"{heads} heads cannot share {kv_heads} key-value heads")
    if window < 0:
        s.fail(f"window {window} is negative")
    check_rope(a["rope"], head_dim)
    s.width(0, heads * head_dim)
    s.width(1, kv_heads * head_dim)
    s.same(1, 2)
    if s.weights:
        s.vector(0, kv_heads * head_dim)
    if any(s.matrix(i)[0] != "tokens" for i in range(3)):
        s.fail("attention runs over the tokens dimension only")
    entry = {"k": (kv_heads, head_dim), "v": (kv_heads, head_dim)}
    growth = WINDOW if window else PER_TOKEN
    if (
        s.state is None
        or dict(s.state.entry) != entry
        or (s.state.growth, s.state.window) != (growth, window)
    ):
        s.fail(f"state {s.node.state!r} is not {growth} k and v [{kv_heads}, {head_dim}], window {window}")
    return (s.inputs[0].shape,)


@op(
    "gated",
    inputs=("gate", "up"),
    attributes={"activation": ACTIVATIONS},
    operations=_per_element(5),
)
def gated(s: Site) -> tuple[Shape, ...]:
    """y = act(gate) * up

    silu(x) = x / (1 + exp(-x)); gelu_tanh(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))
    """
    return (s.same(0, 1),)


@op("add", inputs=("a", "b"), operations=_per_element(1))
def add(s: Site) -> tuple[Shape, ...]:
    """y = a + b"""
    return (s.same(0, 1),)


@op("select_rows", columns=("logit_rows",), rowwise=False)
def select_rows(s: Site) -> tuple[Shape, ...]:
    """y[r] = x[logit_rows[r]]"""
    rows, width = s.matrix(0)
    if rows != "tokens":
        s.fail(f"buffer {s.inputs[0].name!r} has rows of dimension {rows!r}, not tokens")
    return (("logits", width),)


# Lowered level


@op(
    "add_rmsnorm",
    inputs=("a", "b"),
    outputs=("sum", "y"),
    weights=("weight",),
    attributes={"eps": float, "weight_offset": float},
    level=LOWERED,
    operations=_per_element(5),
)
def add_rmsnorm(s: Site) -> tuple[Shape, ...]:
    """sum = a + b; y = rmsnorm(sum)"""
    shape = s.same(0, 1)
    s.vector(0, s.matrix(0)[1])
    return shape, shape


@op(
    "linears",
    outputs=None,
    weights=None,
    attributes={"biases": list},
    level=LOWERED,
    operations=_products,
)
def linears(s: Site) -> tuple[Shape, ...]:
    """y_t = x @ weight_t.T + bias_t for each term t, in order

    `biases` says per term whether it has one; the weights are weight_0, bias_0 if any, weight_1, ...
    """
    rows = s.matrix(0)[0]
    return tuple((rows, width) for width in s.products())


@op(
    "gated_linears",
    weights=None,
    attributes={"biases": list, "activation": ACTIVATIONS},
    level=LOWERED,
    operations=_products,
)
def gated_linears(s: Site) -> tuple[Shape, ...]:
    """y = act(x @ weight_0.T + bias_0) * (x @ weight_1.T + bias_1); weights as in `linears`"""
    widths = s.products()
    if len(widths) != 2 or widths[0] != widths[1]:
        s.fail(f"gated_linears needs two terms of one width, not {widths}")
    return ((s.matrix(0)[0], widths[0]),)


@op(
    "rope",
    columns=("position",),
    attributes={"heads": int, "head_dim": int, "rope": dict},
    level=LOWERED,
    operations=_per_element(3),
)
def rope(s: Site) -> tuple[Shape, ...]:
    """Rotates the pairs (x[c], x[c + dim/2]), c < dim/2, of every head by position * f_c; times the factor

    f and the factor are those of `rope.rope_inverse_frequencies`; columns beyond `dim` stay as they are.
    """
    a = s.node.attributes
    s.width(0, a["heads"] * a["head_dim"])
    check_rope(a["rope"], a["head_dim"])
    if s.matrix(0)[0] != "tokens":
        s.fail("rope runs over the tokens dimension only")
    return (s.inputs[0].shape,)
