"""Two methods in one recipe: each distinct combination of slots is executed, and native runs as reference."""

from __future__ import annotations

from contextlib import closing, nullcontext
from itertools import permutations
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
from tests.kits.fast import fast_linears
from tests.kits.recipes import CALIBRATION, speaking

# Every method as it is, and with the slots left open that its options can leave open.
ENTRIES = (
    "{method: rtn}",
    "{method: gptq}",
    "{method: marlin, group: 64, clip: false}",
    "{method: marlin, group: 64, clip: false, sparse: true}",
    "{method: awq, grid: 3, tokens: 64}",
    "{method: awq, grid: 3, tokens: 64, quantise: false}",
    "{method: smoothquant_plus, step: 0.5, tokens: 64}",
    "{method: smoothquant_plus, step: 0.5, tokens: 64, quantise: false}",
    "{method: svdquant, rank: 4, grid: 2, iterations: 2}",
    "{method: svdquant, rank: 4, grid: 2, iterations: 2, quantise: none}",
    "{method: svdquant, rank: 4, grid: 2, iterations: 2, activation_bits: none}",
    "{method: svdquant, rank: 4, grid: 2, iterations: 2, quantise: none, activation_bits: none}",
    "{method: svdquant, rank: 4, grid: 0, iterations: 2}",
    "{method: svdquant, rank: 4, grid: 0, iterations: 2, quantise: none, activation_bits: none}",
    "{method: svdquant, rank: 0, grid: 2}",
    "{method: svdquant, rank: 0, grid: 2, quantise: none}",
    "{method: flexq, sensitive: down}",
    "{method: flexq, sensitive: down, weight_bits: null}",
    "{method: comet}",
    "{method: comet, weight_bits: null}",
    "{method: comet, kv: true}",
    "{method: comet, weight_bits: null, kv: true}",
    "{method: comet, weight_bits: null, kv: true, permute: false}",
    "{method: fireq, top_k: 2, level: 1.0, strength: 0.5}",
    "{method: fireq, top_k: 2, level: 1.0, strength: 0.5, kv: false}",
    "{method: fireq, keys: none, strength: 0.5}",
    "{method: fireq, top_k: 2, level: 1.0, weights: false, activations: false, smooth: []}",
    "{method: round_activations, bits: 6}",
)

# Of other slots than these by themselves, but with arithmetic of their own: columns in the order that they
# have, no branch and no smoothing, one group per row.
MORE = (
    ("{method: comet, weight_bits: null, permute: false}", "{method: rtn}"),
    ("{method: svdquant, rank: 0, grid: 0, quantise: none}", "{method: gptq}"),
    ("{method: round_activations, bits: 8, group: 0}", "{method: rtn, group: 0}"),
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


PAIRS = [*combinations(), *MORE]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking(tmp_path_factory.mktemp("combinations"))


def test_there_are_combinations() -> None:
    used = {entry.split(",")[0].strip("{} ").removeprefix("method: ") for entry in ENTRIES}
    assert used == set(names())
    assert len(PAIRS) > 10


@pytest.mark.parametrize(
    ("slot", "first", "second"),
    [
        (
            "low_rank",
            "{method: svdquant, quantise: none, activation_bits: none}",
            "{method: svdquant, grid: 0}",
        ),
        ("key_scaling", "{method: fireq, weights: false, activations: false, kv: false}", "{method: fireq}"),
    ],
)
def test_a_second_branch_or_key_scale_is_refused_before_anything_is_computed(
    slot: str, first: str, second: str
) -> None:
    program = build_program(models.configs()["llama-smollm2"])
    with pytest.raises(UsageError, match=f"both fill the slot {slot}"):
        Recipe.from_yaml(f"methods: [{first}, {second}]").plan(program)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_combination(model: Path, first: str, second: str, tmp_path: Path) -> None:
    # Matrices that no method rounds stay f32, so that under `fast` too they are exact.
    recipe = Recipe.from_yaml(f"{CALIBRATION}floats: f32\nmethods: [{first}, {second}]")
    compress(model, recipe, tmp_path / "out", evaluate=False)
    made = Checkpoint.open(tmp_path / "out")
    program = made.program()
    kept = {node.attributes.get("kv_format") for node in program.nodes if node.op == "attention"} - {None, ""}
    widths = {bits for node in program.nodes if node.op == "encode" for bits in node.attributes["bits"]}
    rounded = any(node.op == "encode" and node.attributes["kind"] != "none" for node in program.nodes)
    # Groups of 64 tokens become codes when they are full.
    count = 80 if "int4-channel" in kept else 24
    ids = models.tokens(count, program.vocab_size)

    def check(activations: str, kv_dtype: str | None) -> None:
        found = []
        for chunks in ([count], [count - 8, 8]):
            with closing(NativeExecutor.load(made, activations=activations, kv_dtype=kv_dtype)) as executor:
                found.append(models.logits(executor, ids, chunks, prompt=0))
        assert np.array_equal(found[0], found[1])  # so that all rows are as good as the best
        with fast_linears(made) if activations == "fast" else nullcontext():
            reference = ReferenceExecutor.load(made, dtype="float64", kv_dtype=kv_dtype)
            expected = models.logits(reference, ids, [count])
        if activations == "exact" and not rounded and kv_dtype == "f32":
            assert models.relative_error(found[0], expected) < 1e-5  # 2e-6 at most, float32 against float64
        else:
            # After one code more or less of 4 bits the rest of a row is another one (0.28 at most was seen).
            models.check_rounded(found[0], expected, 0.4 if 4 in widths else 0.1)

    check("exact", "f32")
    check("fast", "f32")
    if kept:
        # `fast` would round queries and probabilities as well, which the oracle leaves as they are.
        check("exact", None)
