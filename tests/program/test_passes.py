"""The lowering passes rearrange nodes as they say; the reference executor's tests compare the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gristmill.models import build_program
from gristmill.program.nodes import LOWERED, SEMANTIC, Program, ProgramError
from gristmill.program.passes import (
    fuse_add_rmsnorm,
    fuse_gated,
    group_linears,
    hoist_rope,
    lower,
    select_early,
    sort,
)
from tests.kits import files

PROGRAM = build_program(files.config("qwen2"))


def test_linears_of_one_input_become_one_node() -> None:
    lowered = lower(PROGRAM, [group_linears])
    node = lowered.node("layers.0.self_attn.q_proj+k_proj+v_proj")
    module = "model.layers.0.self_attn"
    assert node.weights == tuple(f"{module}.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias"))
    assert node.attributes == {"biases": [True, True, True]}
    assert lowered.level == LOWERED
    assert sum(n.op == "linear" for n in lowered.nodes) == 2 * 2 + 1  # o and down of each layer, the head
    assert PROGRAM.level == SEMANTIC


def test_the_gate_is_fused() -> None:
    lowered = lower(PROGRAM, [group_linears, fuse_gated])
    node = lowered.node("layers.1.mlp.gated")
    assert (node.op, node.attributes["activation"]) == ("gated_linears", "silu")
    assert not any(n.op == "gated" for n in lowered.nodes)


def test_a_gate_with_another_reader_is_left_alone() -> None:
    gate = PROGRAM.node("layers.0.mlp.gate_proj").outputs[0]
    down = PROGRAM.node("layers.0.mlp.down_proj")
    nodes = tuple(replace(n, inputs=(gate,)) if n is down else n for n in PROGRAM.nodes)
    odd = PROGRAM.with_nodes(nodes)
    lowered = fuse_gated(group_linears(odd))
    assert lowered.node("layers.0.mlp.gated").op == "gated"
    assert lowered.node("layers.1.mlp.gated").op == "gated_linears"


def test_additions_take_the_next_norm_along() -> None:
    lowered = lower(PROGRAM, [fuse_add_rmsnorm])
    assert sum(n.op == "add_rmsnorm" for n in lowered.nodes) == 3
    # The first norm has no addition before it, and the last reads selected rows.
    assert [n.name for n in lowered.nodes if n.op == "rmsnorm"] == ["layers.0.input_layernorm", "norm"]


def test_rotations_are_hoisted() -> None:
    lowered = lower(PROGRAM, [hoist_rope])
    attention = lowered.node("layers.0.self_attn.attention")
    assert attention.attributes["rope"] is None
    assert attention.inputs[0] == "layers.0.self_attn.q_proj.rotated"
    assert lowered.node("layers.0.self_attn.k_proj.rotated").attributes["heads"] == 2


def test_rows_are_selected_as_early_as_can_be() -> None:
    early = lower(PROGRAM, [select_early])
    assert early.level == SEMANTIC
    up = early.node("layers.1.mlp.up_proj")
    assert early.buffers[up.outputs[0]].shape == ("logits", 512)
    assert early.buffers[early.node("layers.0.mlp.up_proj").outputs[0]].shape == ("tokens", 512)
    assert early.buffers[early.node("layers.1.self_attn.k_proj").outputs[0]].shape == ("tokens", 128)


def test_a_pass_that_breaks_the_program_is_named() -> None:
    def forget_the_head(program: Program) -> Program:
        return program.with_nodes(program.nodes[:-1])

    with pytest.raises(ProgramError, match="after pass forget_the_head"):
        lower(PROGRAM, [forget_the_head])


def test_sorting_repairs_order_and_finds_circles() -> None:
    nodes = list(PROGRAM.nodes)
    assert sort(list(nodes)) == nodes
    ordered = sort(nodes[::-1])
    assert {n.name for n in ordered} == {n.name for n in nodes}
    written: set[str] = set()
    for node in ordered:
        assert written.issuperset(node.inputs)
        written.update(node.outputs)
    first = replace(nodes[1], inputs=(nodes[-1].outputs[0],))
    with pytest.raises(ProgramError, match="circle"):
        sort([nodes[0], first, *nodes[2:]])
