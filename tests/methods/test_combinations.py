"""Two methods in one recipe: each distinct combination of slots is executed, and native runs as reference."""

from __future__ import annotations

from contextlib import closing
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

from gristmill.backends.native import NativeExecutor
from gristmill.backends.reference import ReferenceExecutor
from gristmill.errors import UsageError
from gristmill.io.checkpoint import Checkpoint
from gristmill.methods import names
from gristmill.methods.compress import compress
from gristmill.methods.recipe import Recipe
from gristmill.models import build_program
from tests.kits import models
from tests.kits.recipes import CALIBRATION, speaking

# Every method as it is, and with the slots left open that its options can leave open.
ENTRIES = (
    "{method: rtn}",
    "{method: gptq}",
    "{method: marlin, group: 64}",
    "{method: awq, grid: 3, tokens: 64}",
    "{method: awq, grid: 3, tokens: 64, quantise: false}",
    "{method: smoothquant_plus, step: 0.5, tokens: 64}",
    "{method: smoothquant_plus, step: 0.5, tokens: 64, quantise: false}",
    "{method: svdquant, rank: 4, grid: 2, iterations: 2}",
    "{method: svdquant, rank: 4, grid: 2, iterations: 2, quantise: none}",
    "{method: svdquant, rank: 4, grid: 2, iterations: 2, quantise: none, activation_bits: none}",
    "{method: flexq, sensitive: down}",
    "{method: flexq, sensitive: down, weight_bits: null}",
    "{method: comet}",
    "{method: comet, weight_bits: null}",
    "{method: fireq, top_k: 2, level: 1.0, strength: 0.5}",
    "{method: fireq, top_k: 2, level: 1.0, weights: false, activations: false, smooth: []}",
    "{method: round_activations, bits: 6}",
)


def slots(entry: str) -> frozenset[str]:
    one = Recipe.from_yaml(f"methods: [{entry}]").entries[0]
    return frozenset(one.method.slots(one.options))


def combinations() -> list[tuple[str, str]]:
    """The first pair of every combination of slots that can be planned."""
    program = build_program(models.configs()["llama-smollm2"])
    found: dict[tuple[frozenset[str], frozenset[str]], tuple[str, str]] = {}
    for first, second in permutations(ENTRIES, 2):
        key = (slots(first), slots(second))
        if key in found:
            continue
        try:
            Recipe.from_yaml(f"methods: [{first}, {second}]").plan(program)
        except UsageError:
            continue
        found[key] = (first, second)
    return list(found.values())


PAIRS = combinations()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking(tmp_path_factory.mktemp("combinations"))


def test_there_are_combinations() -> None:
    used = {entry.split(",")[0].strip("{} ").removeprefix("method: ") for entry in ENTRIES}
    assert used == set(names())
    assert len(PAIRS) > 10


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_combination(model: Path, first: str, second: str, tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(f"{CALIBRATION}methods: [{first}, {second}]")
    compress(model, recipe, tmp_path / "out", evaluate=False)
    made = Checkpoint.open(tmp_path / "out")
    ids = models.tokens(24, made.program().vocab_size)
    reference = ReferenceExecutor.load(made, dtype="float64", kv_dtype="f32")
    expected = models.logits(reference, ids, [24])
    rounded = any(node.op == "encode" for node in made.program().nodes)
    for activations, chunks in product(("exact", "fast"), ([24], [16, 8])):
        with closing(NativeExecutor.load(made, activations=activations, kv_dtype="f32")) as executor:
            error = np.abs(models.logits(executor, ids, chunks) - expected) / np.abs(expected).max()
        # Where inputs are rounded, a last bit becomes a whole step now and then.
        tight = activations == "exact" and not rounded
        assert np.median(error) < (1e-5 if tight else 0.1), activations
        assert error.max() < (1e-4 if tight else 0.6), activations
