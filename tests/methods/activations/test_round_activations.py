"""Rounded inputs as a method, with any weight method of the same group; the example recipes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from gristmill.backends.native import NativeExecutor
from gristmill.backends.reference import ReferenceExecutor
from gristmill.errors import UsageError
from gristmill.io.checkpoint import Checkpoint
from gristmill.io.convert import prepare
from gristmill.methods.compress import compress
from gristmill.methods.recipe import Recipe
from gristmill.models import build_program
from tests.kits import models

RECIPES = sorted((Path(__file__).parents[3] / "examples" / "recipes").glob("*.yaml"))
ROUND = "{method: round_activations, bits: %d, group: %d}"


def recipe(*methods: str) -> Recipe:
    return Recipe.from_yaml(f"methods: [{', '.join(methods)}]")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_example_recipes_plan(path: Path) -> None:
    one = Recipe.load(path)
    assert one.name == path.stem
    for of in models.configs().values():
        one.plan(build_program(of))


def test_there_are_examples() -> None:
    assert {"w8a8", "w6a8", "w4a8", "w4a4", "flexq", "comet"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("group", [64, 0])
def test_inputs_are_rounded_once_each(small: Path, tmp_path: Path, group: int) -> None:
    weights = f"{{method: rtn, bits: 8, group: {group}}}"
    compress(small, recipe(ROUND % (4, group), weights), tmp_path / "out", evaluate=False)
    program = Checkpoint.open(tmp_path / "out").program()
    encodes = [node for node in program.nodes if node.op == "encode"]
    assert [node.attributes["bits"] for node in encodes] == [[4]] * 8  # four in each of two layers
    down = program.node("layers.0.mlp.down_proj.input").attributes
    assert down["group"] == group or (group == 0 and down["group"] == 264)
    ids = models.tokens(30, program.vocab_size)
    expected = models.logits(ReferenceExecutor.load(tmp_path / "out", dtype="float64"), ids, [30])
    plain = models.logits(ReferenceExecutor.load(prepare(small), dtype="float64"), ids, [30])
    assert models.relative_error(plain, expected) > 0.01
    for activations in ("exact", "fast"):
        with closing(
            NativeExecutor.load(tmp_path / "out", activations=activations, kv_dtype="f32")
        ) as executor:
            models.check_rounded(models.logits(executor, ids, [30]), expected)


def test_only_the_chosen_linears(small: Path, tmp_path: Path) -> None:
    """One of three readers of an input: the others still read what is not rounded."""
    entry = "{method: round_activations, bits: 2, tensors: '*layers.0*q_proj*'}"
    compress(small, recipe(entry), tmp_path / "out", evaluate=False)
    program = Checkpoint.open(tmp_path / "out").program()
    q, k = (program.node(f"layers.0.self_attn.{name}") for name in ("q_proj", "k_proj"))
    assert program.writers()[q.inputs[0]].op == "encode"
    assert program.writers()[q.inputs[0]].inputs == k.inputs


def test_refused(small: Path, tmp_path: Path) -> None:
    program = build_program(models.configs()["llama"])
    with pytest.raises(UsageError, match="both fill the slot activation_encoding"):
        recipe(ROUND % (8, 64), ROUND % (4, 64)).plan(program)
    with pytest.raises(UsageError, match="group"):
        recipe(ROUND % (8, 12))
    compress(small, recipe(ROUND % (8, 64)), tmp_path / "out", evaluate=False)
    with pytest.raises(UsageError, match="is rounded or put in order already"):
        compress(tmp_path / "out", recipe(ROUND % (8, 64)), tmp_path / "again", evaluate=False)
    assert not (tmp_path / "again").exists()
