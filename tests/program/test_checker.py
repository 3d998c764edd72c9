"""The builder and the checker: unsound programs are refused, and the message says where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from gristmill.models import build_program
from gristmill.program.builder import Builder
from gristmill.program.checker import check
from gristmill.program.nodes import Buffer, Node, Program, ProgramError, State, Weight
from tests.kits import files

PROGRAM = build_program(files.config("gemma3_text"))
DOWN = "layers.0.mlp.down_proj"
ATTENTION = "layers.0.self_attn.attention"


def edit(name: str, **changes: object) -> Callable[[], Program]:
    def broken() -> Program:
        nodes = tuple(replace(n, **changes) if n.name == name else n for n in PROGRAM.nodes)
        return PROGRAM.with_nodes(nodes)

    return broken


def attribute(name: str, key: str, value: object) -> Callable[[], Program]:
    return edit(name, attributes={**PROGRAM.node(name).attributes, key: value})


def buffer(name: str, shape: tuple[str | int, ...], dtype: str = "f32") -> Callable[[], Program]:
    return lambda: replace(PROGRAM, buffers={**PROGRAM.buffers, name: Buffer(name, shape, dtype)})


def reordered() -> Program:
    return PROGRAM.with_nodes((*PROGRAM.nodes[1:], PROGRAM.nodes[0]))


def twice() -> Program:
    return PROGRAM.with_nodes((*PROGRAM.nodes, PROGRAM.nodes[-1]))


def idle_state() -> Program:
    return replace(PROGRAM, states={**PROGRAM.states, "s": State("s", "x", "constant", {"k": (2,)})})


def second_writer() -> Program:
    last = PROGRAM.nodes[-1]
    return PROGRAM.with_nodes((*PROGRAM.nodes, replace(last, name="again")))


def no_weight() -> Program:
    return replace(PROGRAM, weights={k: w for k, w in PROGRAM.weights.items() if "layers.0.mlp.up" not in k})


def odd_weight() -> Program:
    name = "model.norm.weight"
    return replace(PROGRAM, weights={**PROGRAM.weights, name: Weight(name, (255,))})


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (edit(DOWN, op="convolution"), [DOWN, "unknown op", "attention"]),
        (edit(DOWN, op="linears"), [DOWN, "lowered op"]),
        (edit(DOWN, inputs=("nowhere",)), [DOWN, "'nowhere'", "does not exist"]),
        (edit(DOWN, inputs=("layers.0.mlp.residual",)), [DOWN, "before it is written"]),
        (edit(DOWN, inputs=()), [DOWN, "0 inputs, not 1"]),
        (edit(DOWN, weights=()), [DOWN, "0 weights"]),
        (edit(DOWN, weights=("model.layers.0.mlp.up_proj.weight",)), [DOWN, "up_proj.weight", "[512, 256]"]),
        (edit(DOWN, weights=("missing",)), [DOWN, "'missing'", "not declared"]),
        (edit(DOWN, outputs=("elsewhere",)), [DOWN, "'elsewhere'", "not declared"]),
        (edit(DOWN, state=f"{ATTENTION}.kv"), [DOWN, "no state"]),
        (edit(ATTENTION, state=None), [ATTENTION, "needs a state"]),
        (edit(ATTENTION, state="layers.1.self_attn.attention.kv"), [ATTENTION, "belongs to node"]),
        (attribute(ATTENTION, "window", 23), [ATTENTION, "window 23"]),
        (attribute(ATTENTION, "kv_heads", 3), [ATTENTION, "share 3"]),
        (attribute(ATTENTION, "scale", 1), [ATTENTION, "scale"]),
        (attribute(ATTENTION, "scale", float("nan")), [ATTENTION, "nan"]),
        (attribute(ATTENTION, "heads", True), [ATTENTION, "heads"]),
        (attribute(ATTENTION, "rope", {"type": "spiral"}), [ATTENTION, "spiral"]),
        (attribute(ATTENTION, "sinks", 4), [ATTENTION, "sinks"]),
        (attribute("layers.0.mlp.gated", "activation", "relu"), ["layers.0.mlp.gated", "relu"]),
        (buffer(DOWN, ("tokens", 255)), [DOWN, "[tokens, 255]", "[tokens, 256]"]),
        (buffer(DOWN, ("tokens", 256), "f8"), [DOWN, "f8"]),
        (buffer("spare", ("tokens", 1)), ["'spare'", "no node writes"]),
        (reordered, ["embed_tokens", "before it is written"]),
        (twice, ["another node has this name"]),
        (second_writer, ["again", "lm_head", "has written"]),
        (idle_state, ["state 's'", "no node uses"]),
        (no_weight, ["layers.0.mlp.up_proj", "not declared"]),
        (odd_weight, ["norm", "[255]", "[256]"]),
        (lambda: replace(PROGRAM, output="embed_tokens"), ["embed_tokens", "[tokens, 256]"]),
        (lambda: replace(PROGRAM, output="nothing"), ["nothing"]),
        (lambda: replace(PROGRAM, dims={}), ["undeclared dimension 'tokens'"]),
        (lambda: replace(PROGRAM, level="middle"), ["middle"]),
    ],
)
def test_unsound_programs_are_refused(broken: Callable[[], Program], words: list[str]) -> None:
    with pytest.raises(ProgramError) as error:
        check(broken(), "surgery")
    for word in ["surgery", *words]:
        assert word in str(error.value)


def test_sound_programs_pass_and_survive_json() -> None:
    for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text"):
        program = build_program(files.config(kind))
        assert check(program) is program
        again = Program.from_json(program.to_json())
        assert check(again) == program
        assert again.digest() == program.digest()
    assert build_program(files.config("mistral", sliding_window=25)).digest() != program.digest()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "name": "x"}', "null"])
def test_other_text_is_no_program(text: str) -> None:
    with pytest.raises(ProgramError):
        Program.from_json(text)


def test_the_builder_infers_shapes_and_refuses_contradictions() -> None:
    b = Builder("tiny")
    x = b.embedding("model.embed_tokens.weight", 10, 4)
    y = b.linear(x, "model.layers.0.up", 6, bias=True)
    assert b.buffers[y].shape == ("tokens", 6)
    assert b.weights["model.layers.0.up.weight"].shape == (6, 4)
    with pytest.raises(ProgramError, match=r"layers.0.up.weight.*\[6, 4\].*\[7, 4\]"):
        b.linear(x, "model.layers.0.up", 7)
    with pytest.raises(ProgramError, match="must be of one shape"):
        b.add("sum", x, y)
    with pytest.raises(ProgramError, match="unknown op 'teleport'"):
        b.add_node("teleport", "t")
    with pytest.raises(ProgramError, match="heads cannot share"):
        b.attention("a", x, x, x, heads=2, kv_heads=0, head_dim=2, scale=1.0)
    with pytest.raises(ProgramError, match="not \\[logits, vocabulary\\]"):
        b.build(y)


def test_tied_heads_share_one_weight() -> None:
    tied = build_program(files.config("llama", tie_word_embeddings=True))
    assert tied.node("lm_head").weights == ("model.embed_tokens.weight",)
    assert "lm_head.weight" not in tied.weights
    assert tied.columns() == ("ids", "logit_rows", "position", "sequence")


def test_nodes_are_found_by_name() -> None:
    assert isinstance(PROGRAM.node(DOWN), Node)
    with pytest.raises(KeyError):
        PROGRAM.node("none")
