"""Changes that methods make to a semantic program. Each returns a new, checked program.

Unlike the passes these change what is computed: inputs are rounded, products are added. New weights are only
declared here; whoever edits the program supplies them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from gristmill.program.checker import check
from gristmill.program.nodes import Node, Program, ProgramError, Weight
from gristmill.program.passes import rewrite


def linears_of(program: Program, weights: Collection[str] | None = None) -> dict[str, list[Node]]:
    """Input buffer -> the linears that read it, in program order: q/k/v together, gate/up together.

    weights: only the linears of these matrices.
    """
    result: dict[str, list[Node]] = {}
    for node in program.nodes:
        if node.op == "linear" and (weights is None or node.weights[0] in weights):
            result.setdefault(node.inputs[0], []).append(node)
    return result


def round_inputs(
    program: Program,
    linears: Sequence[str],
    *,
    group: int = 0,
    bits: Sequence[int] = (),
    fp8: bool = False,
    order: str | None = None,
) -> Program:
    """Puts one `encode` between linears (node names) and the one buffer that they read.

    group, bits: of kind int, as the op says; fp8: kind fp8; with neither, the columns are put in order.
    order: the name of a vector weight that is declared here. ProgramError if the linears read different
    buffers or a rounded one.
    """
    nodes = [program.node(name) for name in linears]
    sources = {node.inputs[0] for node in nodes}
    if len(sources) != 1:
        raise ProgramError(f"the linears {list(linears)} do not read one buffer")
    source = sources.pop()
    writer = program.writers()[source]
    if writer.op == "encode":
        raise ProgramError(f"the input {source!r} of {linears[0]!r} is rounded already")
    name = f"{linears[0]}.input"
    weights = dict(program.weights)
    if order is not None:
        width = program.buffers[source].shape[1]
        assert isinstance(width, int)
        weights[order] = Weight(order, (width,))
    encode = Node(
        name,
        "encode",
        (source,),
        (name,),
        () if order is None else (order,),
        None,
        {"kind": "int" if bits else "fp8" if fp8 else "none", "group": group, "bits": list(bits)},
    )
    chosen = set(linears)
    changed: list[Node] = []
    for node in program.nodes:
        changed.append(replace(node, inputs=(name,)) if node.name in chosen else node)
        # At once, so that a gate and its partner find both their inputs there, should they differ.
        if node is writer:
            changed.append(encode)
    return _checked(replace(program, weights=weights), changed, "round_inputs")


def add_branch(program: Program, linears: Sequence[str], rank: int, *, name: str) -> Program:
    """`add_branches` with one branch."""
    return add_branches(program, [(linears, rank)], name=name)


def add_branches(program: Program, branches: Sequence[tuple[Sequence[str], int]], *, name: str) -> Program:
    """Adds (x @ D.T) @ U_l.T to the result of every linear l of a branch (node names), all with one D.

    branches: linears, which read one buffer and occur in no other branch, and the rank. The weights are
    declared as `k.<name>_down.weight` [rank, K], `k` the module of the first linear, and for a linear with
    the weight `m.weight` [N, K] `m.<name>_up.weight` [N, rank]. Where the linears' input is rounded, x is the
    input before that. Further branches of a linear need another name.
    """
    writers = program.writers()
    nodes = {node.name: node for node in program.nodes}
    weights = dict(program.weights)
    readers = program.readers()
    downs: dict[str, list[Node]] = {}
    ups: dict[str, Node] = {}

    def declare(linear: str, role: str, *shape: int) -> tuple[str]:
        weight = f"{nodes[linear].weights[0].removesuffix('.weight')}.{name}_{role}.weight"
        if weight in weights:
            raise ProgramError(f"there is a weight {weight!r} already")
        weights[weight] = Weight(weight, shape)
        return (weight,)

    for linears, rank in branches:
        sources = set()
        for linear in linears:
            source = nodes[linear].inputs[0]
            while source in writers and writers[source].op == "encode":
                source = writers[source].inputs[0]
            sources.add(source)
        if len(sources) != 1:
            raise ProgramError(f"the linears {list(linears)} do not read one buffer")
        source = sources.pop()
        width = program.buffers[source].shape[1]
        assert isinstance(width, int)
        first = f"{linears[0]}.{name}_down"
        down = Node(first, "linear", (source,), (first,), declare(linears[0], "down", rank, width))
        # Before all that read x: the native backend takes linears of one input together.
        downs.setdefault(readers[source][0].name, []).append(down)
        for linear in linears:
            rows = program.weights[nodes[linear].weights[0]].shape[0]
            up = f"{linear}.{name}_up"
            ups[linear] = Node(up, "linear", (first,), (up,), declare(linear, "up", rows, rank))
    renamed: dict[str, str] = {}
    changed: list[Node] = []
    for original in program.nodes:
        node = replace(original, inputs=tuple(renamed.get(n, n) for n in original.inputs))
        for down in downs.get(node.name, ()):
            changed.append(replace(down, inputs=tuple(renamed.get(n, n) for n in down.inputs)))
        changed.append(node)
        if node.name in ups:
            total, result = f"{node.name}.{name}_sum", node.outputs[0]
            changed += [ups[node.name], Node(total, "add", (result, f"{node.name}.{name}_up"), (total,))]
            renamed[result] = total
    if program.output in renamed:
        program = replace(program, output=renamed[program.output])
    return _checked(replace(program, weights=weights), changed, "add_branches")


def keep_keys(
    program: Program, attention: Sequence[str], *, kv_format: str = "", scaled: bool = False
) -> Program:
    """Says how attention nodes (by name) keep keys and values: the op's `kv_format`; "" leaves it as it is.

    scaled: declares `<node>.key_scale` [kv_heads * head_dim], which multiplies keys after the rotation.
    ProgramError for an unknown format, or if the keys are scaled already.
    """
    weights = dict(program.weights)
    changed: list[Node] = []
    for node in program.nodes:
        if node.name not in attention:
            changed.append(node)
            continue
        a, names = node.attributes, node.weights
        if scaled:
            if names:
                raise ProgramError(f"the keys of {node.name!r} are scaled already")
            names = (f"{node.name}.key_scale",)
            weights[names[0]] = Weight(names[0], (a["kv_heads"] * a["head_dim"],))
        attributes = {**a, "kv_format": kv_format} if kv_format else a
        changed.append(replace(node, weights=names, attributes=attributes))
    return _checked(replace(program, weights=weights), changed, "keep_keys")


@dataclass(frozen=True, slots=True)
class Branch:
    """A low-rank branch of a matrix: the node that adds it, and its two weights."""

    node: str
    down: str
    up: str


@dataclass(frozen=True, slots=True)
class Foldable:
    """Edits that matrices can take in: by matrix, the encode node of its columns' order, and its branches."""

    orders: dict[str, Node]
    branches: dict[str, list[Branch]]


def foldable_edits(program: Program, plain: Program) -> Foldable:
    """The orders of columns and low-rank branches by which a program differs from a plain one.

    ProgramError, which is only the name and op of a node, for any other difference.
    """
    writers, readers = program.writers(), program.readers()
    known = {node.name: node for node in plain.nodes}
    uses = Counter(name for node in program.nodes for name in node.weights)
    found = Foldable({}, {})
    renamed: dict[str, str] = {}

    def plain_name(name: str) -> str:
        return renamed.get(name, name)

    def body(name: str) -> Node | None:
        """The linear whose result alone becomes this buffer, but for branches."""
        node = writers[name]
        if len(readers[name]) != 1 or name == program.output:
            return None
        if node.op == "add":
            return body(node.inputs[0])
        return node if node.op == "linear" and uses[node.weights[0]] == 1 else None

    def take_order(node: Node) -> bool:
        users = readers[node.outputs[0]]
        if any(user.op != "linear" or uses[user.weights[0]] > 1 for user in users):
            return False
        found.orders.update({user.weights[0]: node for user in users})
        renamed[node.outputs[0]] = plain_name(node.inputs[0])
        return True

    def take_branch(node: Node) -> bool:
        linear, up = body(node.inputs[0]), writers[node.inputs[1]]
        down = writers.get(up.inputs[0]) if up.op == "linear" else None
        if linear is None or down is None or down.op != "linear" or len(up.weights) + len(down.weights) > 2:
            return False
        if down.inputs[0] != plain_name(linear.inputs[0]):
            return False
        branch = Branch(node.name, down.weights[0], up.weights[0])
        found.branches.setdefault(linear.weights[0], []).append(branch)
        renamed[node.outputs[0]] = linear.outputs[0]
        return True

    kept = {}
    for node in program.nodes:
        if node.name in known:
            kept[node.name] = replace(node, inputs=tuple(plain_name(name) for name in node.inputs))
        elif not (
            (node.op == "encode" and node.attributes["kind"] == "none" and take_order(node))
            or (node.op == "add" and take_branch(node))
            # Half of a branch; whatever else reads it is a difference of its own.
            or node.op == "linear"
        ):
            raise ProgramError(f"{node.name!r} (op {node.op})")
    for name, node in known.items():
        if kept.get(name) != node:
            raise ProgramError(f"{name!r} (op {node.op})")
    if plain_name(program.output) != plain.output:
        raise ProgramError(f"{program.output!r} (the output)")
    return found


def _checked(program: Program, nodes: Iterable[Node], stage: str) -> Program:
    return check(rewrite(program, nodes), stage)
