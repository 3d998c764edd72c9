"""Changes that methods make to a semantic program. Each returns a new, checked program.

Unlike the passes these change what is computed: inputs are rounded, products are added. New weights are only
declared here; whoever edits the program supplies them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from gristmill.program.checker import check
from gristmill.program.nodes import Node, Program, ProgramError, Weight
from gristmill.program.passes import rewrite


def linears_of(program: Program) -> dict[str, list[Node]]:
    """Input buffer -> the linears that read it, in program order: q/k/v together, gate/up together."""
    result: dict[str, list[Node]] = {}
    for node in program.nodes:
        if node.op == "linear":
            result.setdefault(node.inputs[0], []).append(node)
    return result


def round_inputs(
    program: Program,
    linears: Sequence[str],
    *,
    group: int = 0,
    bits: Sequence[int] = (),
    order: str | None = None,
) -> Program:
    """Puts one `encode` in front of linears (node names) that read the same buffer.

    group, bits: as the op says; without bits only the columns are put in order. order: the name of a vector
    weight that is declared here. ProgramError if the linears read different buffers or a rounded one.
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
        {"kind": "int" if bits else "none", "group": group, "bits": list(bits)},
    )
    chosen = set(linears)
    changed: list[Node] = []
    for node in program.nodes:
        if node.name == linears[0]:
            changed.append(encode)
        changed.append(replace(node, inputs=(name,)) if node.name in chosen else node)
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


def _checked(program: Program, nodes: Iterable[Node], stage: str) -> Program:
    return check(rewrite(program, nodes), stage)
