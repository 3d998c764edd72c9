"""Verifies a program: run after building it and after every pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from gristmill.program.nodes import (
    CONSTANT,
    LOWERED,
    PER_TOKEN,
    SEMANTIC,
    WINDOW,
    Buffer,
    Node,
    Program,
    ProgramError,
    Shape,
    State,
    Weight,
)
from gristmill.program.ops import COLUMNS, DTYPES, OPS, Op, Site, shape_text


def check(program: Program, stage: str = "build") -> Program:
    """Returns the program if it is sound; raises ProgramError naming stage, node, op and buffers if not.

    Checked: ops, attributes and arity; every buffer written exactly once and before it is read; shapes and
    dtypes against the ops' rules; weights and dimensions declared; states appended once, by their owner, and
    all used.
    """

    def fail(message: str) -> None:
        raise ProgramError(f"after {stage}: program {program.name!r}: {message}")

    if program.level not in (SEMANTIC, LOWERED):
        fail(f"unknown level {program.level!r}")
    for kind, table in (("buffer", program.buffers), ("weight", program.weights), ("state", program.states)):
        for key, value in table.items():
            if key != value.name:
                fail(f"{kind} {value.name!r} is filed under {key!r}")
    for dim in program.dims.values():
        if dim.bound is not None and dim.bound < 1:
            fail(f"dimension {dim.name!r} is bounded by {dim.bound}")
    for weight in program.weights.values():
        if not weight.shape or any(not isinstance(n, int) or n < 1 for n in weight.shape):
            fail(f"weight {weight.name!r} has the shape {shape_text(weight.shape)}")
    for state in program.states.values():
        _check_state(state, fail)

    names: set[str] = set()
    written: dict[str, Node] = {}
    appended: dict[str, Node] = {}
    for node in program.nodes:
        try:
            if node.name in names:
                raise ProgramError("another node has this name")
            names.add(node.name)
            _check_node(program, node, written, appended)
        except ProgramError as error:
            raise ProgramError(
                f"after {stage}: node {node.name!r} (op {node.op}, reads {list(node.inputs)}, "
                f"writes {list(node.outputs)}): {error}"
            ) from None
    for what, declared, used in (
        ("buffer", program.buffers, set(written)),
        ("state", program.states, set(appended)),
        ("weight", program.weights, {w for n in program.nodes for w in n.weights}),
    ):
        idle = sorted(set(declared) - used)
        if idle:
            fail(f"{what} {idle[0]!r} is declared but no node {'writes' if what == 'buffer' else 'uses'} it")
    if program.output not in program.buffers:
        fail(f"the output {program.output!r} is not a buffer")
    shape = program.buffers[program.output].shape
    if len(shape) != 2 or shape[0] != "logits" or not isinstance(shape[1], int):
        fail(f"the output {program.output!r} has the shape {shape_text(shape)}, not [logits, vocabulary]")
    return program


def _check_state(state: State, fail: Callable[[str], None]) -> None:
    if state.growth not in (PER_TOKEN, WINDOW, CONSTANT):
        fail(f"state {state.name!r} has unknown growth {state.growth!r}")
    if (state.window > 0) != (state.growth == WINDOW) or state.window < 0:
        fail(f"state {state.name!r} grows {state.growth} but has window {state.window}")
    if not state.entry or state.elements < 1:
        fail(f"state {state.name!r} keeps nothing")


def _check_node(program: Program, node: Node, written: dict[str, Node], appended: dict[str, Node]) -> None:
    op = OPS.get(node.op)
    if op is None:
        raise ProgramError(f"unknown op; known: {', '.join(sorted(OPS))}")
    if op.level == LOWERED and program.level == SEMANTIC:
        raise ProgramError("a lowered op in a semantic program")
    for name in node.inputs:
        if name not in written:
            known = "before it is written" if name in program.buffers else "which does not exist"
            raise ProgramError(f"reads buffer {name!r} {known}")
    for name in node.outputs:
        if name in written:
            raise ProgramError(f"writes buffer {name!r}, which node {written[name].name!r} has written")
        if name not in program.buffers:
            raise ProgramError(f"writes buffer {name!r}, which is not declared")
        written[name] = node
    for name in node.weights:
        if name not in program.weights:
            raise ProgramError(f"reads weight {name!r}, which is not declared")
    state = None
    if op.state != (node.state is not None):
        raise ProgramError("this op has no state" if node.state else "this op needs a state")
    if node.state is not None:
        state = program.states.get(node.state)
        if state is None:
            raise ProgramError(f"uses state {node.state!r}, which is not declared")
        if state.owner != node.name:
            raise ProgramError(f"uses state {node.state!r}, which belongs to node {state.owner!r}")
        if node.state in appended:
            raise ProgramError(f"appends to state {node.state!r} a second time in one step")
        appended[node.state] = node
    shapes = infer(
        node,
        tuple(program.buffers[n] for n in node.inputs),
        tuple(program.weights[n] for n in node.weights),
        state,
    )
    for name, shape in zip(node.outputs, shapes, strict=True):
        declared = program.buffers[name]
        if declared.shape != shape or declared.dtype not in DTYPES:
            raise ProgramError(
                f"buffer {name!r} is declared {declared.dtype} {shape_text(declared.shape)}, "
                f"but the op writes f32 {shape_text(shape)}"
            )
        unknown = [n for n in shape if isinstance(n, str) and n not in program.dims]
        if unknown:
            raise ProgramError(f"buffer {name!r} has the undeclared dimension {unknown[0]!r}")
    for column in op.columns:
        if COLUMNS[column].dim not in program.dims:
            raise ProgramError(
                f"reads column {column!r} over the undeclared dimension {COLUMNS[column].dim!r}"
            )


def infer(
    node: Node, inputs: tuple[Buffer, ...], weights: tuple[Weight, ...], state: State | None
) -> tuple[Shape, ...]:
    """Shapes of the outputs of a node, from its op's rule. ProgramError if the node does not suit the op."""
    op = OPS[node.op]
    _check_attributes(op, node.attributes)
    if len(inputs) != len(op.inputs):
        raise ProgramError(f"has {len(inputs)} inputs, not {len(op.inputs)} ({', '.join(op.inputs)})")
    if op.outputs is not None and len(node.outputs) != len(op.outputs):
        raise ProgramError(
            f"has {len(node.outputs)} outputs, not {len(op.outputs)} ({', '.join(op.outputs)})"
        )
    if op.weights is None:
        biases = node.attributes["biases"]
        expected = len(biases) + sum(biases)
        if not biases or len(weights) != expected:
            raise ProgramError(f"has {len(weights)} weights for the biases {biases}")
        if op.outputs is None and len(node.outputs) != len(biases):
            raise ProgramError(f"has {len(node.outputs)} outputs for {len(biases)} terms")
    elif not len(op.weights) - op.optional <= len(weights) <= len(op.weights):
        raise ProgramError(f"has {len(weights)} weights, not {len(op.weights)} ({', '.join(op.weights)})")
    return op.rule(Site(node, inputs, weights, state))


def _check_attributes(op: Op, attributes: Mapping[str, Any]) -> None:
    if set(attributes) | set(op.free) != set(op.attributes):
        raise ProgramError(f"has the attributes {sorted(attributes)}, not {sorted(op.attributes)}")
    for name, value in attributes.items():
        kind = op.attributes[name]
        choices = kind if isinstance(kind, tuple) else (kind,)
        # The exact type, so that True is no int and equal programs have equal text.
        good = (value if isinstance(choices[0], str) else type(value)) in choices
        wild = (isinstance(value, float) and not math.isfinite(value)) or (
            type(value) is int and abs(value) >= 1 << 31
        )
        if not good or wild:
            raise ProgramError(f"attribute {name} = {value!r} is not of {choices}")
    if op.weights is None and any(type(flag) is not bool for flag in attributes["biases"]):
        raise ProgramError(f"attribute biases = {attributes['biases']!r} must be a list of booleans")
