"""Rewrites of a program. Each pass is a function Program -> Program whose result computes the same numbers.

The lowering passes give a program of level `lowered`; `lower` runs several and checks after each. New passes
are written with `rewrite`, which infers the buffers from the rules of the ops; a pass only arranges nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from gristmill.program.checker import check, infer
from gristmill.program.nodes import LOWERED, Buffer, Node, Program, ProgramError, State
from gristmill.program.ops import OPS

Pass = Callable[[Program], Program]


def lower(program: Program, passes: Iterable[Pass]) -> Program:
    """Runs the passes in order and checks the program after each; ProgramError names the pass at fault."""
    for step in passes:
        program = check(step(program), f"pass {step.__name__}")
    return program


def rewrite(program: Program, nodes: Iterable[Node], level: str | None = None) -> Program:
    """The program over `nodes`, with buffers inferred anew and idle weights and states dropped.

    The nodes may come in any order that `sort` can repair. States follow their owner by name: a pass that
    renames an attention node keeps its `state` and the owner is updated.
    """
    ordered = sort(list(nodes))
    buffers: dict[str, Buffer] = {}
    states: dict[str, State] = {}
    for node in ordered:
        state = None
        if node.state is not None:
            state = replace(program.states[node.state], owner=node.name)
            states[node.state] = state
        try:
            shapes = infer(
                node,
                tuple(buffers[n] for n in node.inputs),
                tuple(program.weights[n] for n in node.weights),
                state,
            )
        except ProgramError as error:
            place = f"node {node.name!r} (op {node.op}, reads {list(node.inputs)})"
            raise ProgramError(f"{place}: {error}") from None
        for name, shape in zip(node.outputs, shapes, strict=True):
            buffers[name] = Buffer(name, shape)
    used = {name for node in ordered for name in node.weights}
    return replace(
        program,
        nodes=tuple(ordered),
        buffers=buffers,
        weights={name: w for name, w in program.weights.items() if name in used},
        states=states,
        level=level or program.level,
    )


def sort(nodes: list[Node]) -> list[Node]:
    """The nodes so that buffers are written before they are read, otherwise in the given order."""
    written: set[str] = set()
    result: list[Node] = []
    waiting = nodes
    while waiting:
        later: list[Node] = []
        for node in waiting:
            # A node that waits holds back nobody but its own readers.
            if all(name in written for name in node.inputs):
                result.append(node)
                written.update(node.outputs)
            else:
                later.append(node)
        if len(later) == len(waiting):
            missing = sorted({n for node in later for n in node.inputs} - written)
            raise ProgramError(f"buffers {missing} are read but never written, or written in a circle")
        waiting = later
    return result


def group_linears(program: Program) -> Program:
    """Linears that read one buffer become one `linears` node, at the place of the first: q/k/v, gate/up.

    Nothing is concatenated: the node lists the weights in order, and each keeps its own output buffer.
    """
    groups: dict[str, list[Node]] = {}
    for node in program.nodes:
        if node.op == "linear":
            groups.setdefault(node.inputs[0], []).append(node)
    merged = {members[0].name: members for members in groups.values() if len(members) > 1}
    dropped = {m.name for members in merged.values() for m in members[1:]}
    nodes = []
    for node in program.nodes:
        if node.name in merged:
            members = merged[node.name]
            nodes.append(
                Node(
                    _joined([m.name for m in members]),
                    "linears",
                    node.inputs,
                    tuple(m.outputs[0] for m in members),
                    tuple(w for m in members for w in m.weights),
                    None,
                    {"biases": [len(m.weights) == 2 for m in members]},
                )
            )
        elif node.name not in dropped:
            nodes.append(node)
    return rewrite(program, nodes, LOWERED)


def fuse_gated(program: Program) -> Program:
    """A `linears` node of gate and up becomes one `gated_linears` with the `gated` node that alone reads it.

    Run after `group_linears`.
    """
    readers = program.readers()
    nodes = []
    fused: set[str] = set()
    for node in program.nodes:
        if node.op == "linears" and len(node.outputs) == 2:
            (gate, up), users = node.outputs, [r for name in node.outputs for r in readers[name]]
            first = users[0] if users else None
            alone = first is not None and users == [first] * 2
            if alone and first is not None and first.op == "gated" and first.inputs == (gate, up):
                fused.add(first.name)
                nodes.append(
                    Node(
                        first.name,
                        "gated_linears",
                        node.inputs,
                        first.outputs,
                        node.weights,
                        None,
                        {"biases": node.attributes["biases"], "activation": first.attributes["activation"]},
                    )
                )
                continue
        if node.name not in fused:
            nodes.append(node)
    return rewrite(program, nodes, LOWERED)


def fuse_add_rmsnorm(program: Program) -> Program:
    """An addition and a norm that reads its sum become one `add_rmsnorm` node that writes both."""
    readers = program.readers()
    nodes = []
    fused: set[str] = set()
    for original in program.nodes:
        node = original
        if node.op == "add":
            norm = next((r for r in readers[node.outputs[0]] if r.op == "rmsnorm"), None)
            if norm is not None:
                fused.add(norm.name)
                node = Node(
                    _joined([node.name, norm.name]),
                    "add_rmsnorm",
                    node.inputs,
                    (node.outputs[0], norm.outputs[0]),
                    norm.weights,
                    None,
                    dict(norm.attributes),
                )
        if node.name not in fused:
            nodes.append(node)
    return rewrite(program, nodes, LOWERED)


def hoist_rope(program: Program) -> Program:
    """Rotations become `rope` nodes on q and k in front of attention, whose `rope` attribute is then None.

    Right wherever all keys of a row have one shift, as they have in every state that is a plain prefix.
    """
    nodes = []
    for original in program.nodes:
        node = original
        if node.op == "attention" and node.attributes["rope"] is not None:
            a = node.attributes
            q, k, v = node.inputs
            for name, heads in ((q, a["heads"]), (k, a["kv_heads"])):
                attributes = {"heads": heads, "head_dim": a["head_dim"], "rope": a["rope"]}
                rotated = f"{name}.rotated"
                nodes.append(Node(rotated, "rope", (name,), (rotated,), attributes=attributes))
            node = replace(node, inputs=(f"{q}.rotated", f"{k}.rotated", v), attributes={**a, "rope": None})
        nodes.append(node)
    return rewrite(program, nodes, LOWERED)


def select_early(program: Program) -> Program:
    """Moves `select_rows` up through row-wise ops, so that the last layer computes wanted rows only.

    Stays at the program's level: the result is a semantic program if the input is one.
    """
    nodes = list(program.nodes)
    while True:
        readers: dict[str, int] = {}
        for node in nodes:
            for name in node.inputs:
                readers[name] = readers.get(name, 0) + 1
        writers = {name: i for i, node in enumerate(nodes) for name in node.outputs}
        for select in nodes:
            if select.op != "select_rows":
                continue
            source = select.inputs[0]
            above = nodes[writers[source]]
            if OPS[above.op].rowwise and len(above.outputs) == 1 and readers[source] == 1:
                break
        else:
            return rewrite(program, nodes)
        # The op above takes selected rows, and writes what the select wrote.
        taken = {n.inputs[0]: n.outputs[0] for n in nodes if n.op == "select_rows"}
        moved = replace(
            above,
            inputs=tuple(taken.get(name, f"{name}.selected") for name in above.inputs),
            outputs=select.outputs,
        )
        fresh = [
            Node(f"{name}.selected", "select_rows", (name,), (f"{name}.selected",))
            for name in dict.fromkeys(above.inputs)
            if name not in taken
        ]
        at = nodes.index(select)
        nodes[at : at + 1] = [*fresh, moved]
        nodes.remove(above)
        nodes = sort(nodes)


def _joined(names: list[str]) -> str:
    """layers.0.self_attn.q_proj and layers.0.self_attn.k_proj -> layers.0.self_attn.q_proj+k_proj."""
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return ".".join([*parts[0][:common], "+".join(".".join(p[common:]) for p in parts)])
