"""Recipes: what they say, what is refused and where, conflicts between methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from gristmill.errors import ModelError, UsageError
from gristmill.formats import group_int
from gristmill.formats.packed import PLANES
from gristmill.methods import EXCLUSIVE, PRECEDES, method, names
from gristmill.methods.base import Method, Options
from gristmill.methods.catalogue import describe, listing
from gristmill.methods.recipe import Entry, Recipe
from gristmill.models import build_program
from gristmill.program.edits import round_inputs
from tests.kits import models

PROGRAM = build_program(models.configs()["llama"])


class Fills(Method[Options]):
    """A method for these tests: fills what it is told."""

    def __init__(self, name: str, *slots: str) -> None:
        self.name = name  # type: ignore[misc]
        self._slots = slots

    def slots(self, options: Options) -> Sequence[str]:
        return self._slots

    def apply(self, draft: object, options: Options, tensors: Sequence[str]) -> None:
        raise AssertionError("only planned")


def recipe(*methods: tuple[Method[Options], Sequence[str]]) -> Recipe:
    return Recipe(tuple(Entry(m, m.options(), tuple(t), i + 1) for i, (m, t) in enumerate(methods)))


def test_defaults_and_round_trip() -> None:
    plain = Recipe.load("rtn")
    assert plain.name == "rtn"
    assert plain.entries[0].options.model_dump()["bits"] == 4
    text = """
name: mixed
calibration: {tokens: 1024, sequence: 128}
floats: f16
methods:
- method: rtn
  bits: 8
  tensors: "*.down_proj.weight"
- method: rtn
  bits: 4
  group: 32
  tensors: ["*.q_proj.*", "*.k_proj.*"]
"""
    one = Recipe.from_yaml(text)
    assert one.calibration.tokens == 1024
    assert one.entries[0].patterns == ("*.down_proj.weight",)
    again = Recipe.from_yaml(one.to_yaml())
    assert again.to_yaml() == one.to_yaml()
    assert [len(tensors) for tensors in one.plan(PROGRAM)] == [2, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: a recipe is a mapping"),
        ("[]", "line 1: a recipe is a mapping"),
        ("methods: []", "line 1: methods: "),
        ("methods:\n- rtn", "line 2: methods.0: "),
        ("methods:\n- method: rtn\n  bits: 7", "line 3: rtn: bits: "),
        ("methods:\n- method: rtn\n  bit: 4", "line 3: rtn: bit: unknown option; known: bits, group"),
        ("methods:\n- method: rtn\n  tensors: 3", "line 3: tensors is a list of patterns"),
        ("methods:\n- bits: 4", "line 2: an entry needs the name of a method"),
        ("methods:\n- method: nothing", "line 2: there is no method 'nothing'; known: "),
        ("methods:\n- method: rtn\nmethod: x", "line 3: method: unknown option"),
        ("calibration:\n  tokens: 1\nmethods:\n- method: rtn", "line 2: calibration.tokens: "),
        ("methods: {", "line 1: "),
        ("methods:\n- method: rtn\n  tensors: []", "line 3: tensors is a list of patterns"),
        ("name: ../x\nmethods:\n- method: rtn", "line 1: name: "),
        ("a: !!python/object/apply:os.system ['true']", "line 1: could not determine a constructor"),
        ("methods:\n- method: rtn\n  group: 1e400", "line 3: rtn: group: "),
        (
            "floats: f16\nmethods:\n- method: rtn\nfloats: f32",
            "line 4: floats is given twice, at first in line 1",
        ),
        (
            "methods:\n- method: rtn\n  bits: 4\n  'bits': 8",
            "line 4: bits is given twice, at first in line 3",
        ),
        ("calibration:\n  {seed: 1,\n   seed: 1}\nmethods:\n- method: rtn", "line 3: seed is given twice"),
    ],
)
def test_refused_with_the_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_yaml(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "rtn\n  bits: 3\n  group: 16",
            "line 4: rtn: group: groups of 3-bit codes are multiples of 32 columns",
        ),
        (
            "rtn\n  group: 8\n  bits: 2",
            "line 3: rtn: group: groups of 2-bit codes are multiples of 16 columns",
        ),
        ("gptq\n  bits: 5\n  group: 48", "line 4: gptq: group: groups of 5-bit codes are multiples of 32"),
        ("gptq\n  group: 20", "line 3: gptq: group: groups of 4-bit codes are multiples of 8"),
        ("awq\n  bits: 6\n  group: 8", "line 4: awq: group: groups of 6-bit codes are multiples of 16"),
        ("smoothquant_plus\n  bits: 3\n  group: 8", "line 4: smoothquant_plus: group: groups of 3-bit"),
        ("svdquant\n  bits: 3\n  group: 16", "line 4: svdquant: group: groups of 3-bit codes"),
        ("marlin\n  group: 20", "line 3: marlin: group: groups of 4-bit codes are multiples of 8"),
        (
            "marlin\n  group: 16\n  sparse: true",
            "line 4: marlin: sparse: groups of 2:4 codes are multiples of 32",
        ),
        ("rtn\n  bits: 7\n  group: 7", "line 3: rtn: bits: "),
    ],
)
def test_groups_must_suit_the_bits(entry: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_yaml(f"methods:\n- method: {entry}")
    assert message in str(caught.value)


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_groups_are_refused_exactly_where_the_format_refuses_them(bits: int) -> None:
    for group in range(0, 129, 4):
        text = f"methods: [{{method: rtn, bits: {bits}, group: {group}}}]"
        try:
            group_int.spec((16, 4096), bits, group, 0)
        except ModelError:
            with pytest.raises(UsageError, match=f"columns, or 0 for the whole row, not {group}"):
                Recipe.from_yaml(text)
        else:
            Recipe.from_yaml(text)


def test_values_merged_in_may_be_overridden() -> None:
    one = Recipe.from_yaml(
        "methods:\n- &a {method: rtn, bits: 8, tensors: '*q_proj*'}\n- {<<: *a, bits: 6, tensors: '*k_proj*'}"
    )
    assert [entry.options.model_dump()["bits"] for entry in one.entries] == [8, 6]


def test_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a recipe file nor a method"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="cannot read"):
        Recipe.load(tmp_path)
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot read"):
        Recipe.load(tmp_path / "bad.yaml")
    (tmp_path / "mine.yaml").write_text("methods: [{method: rtn}]")
    mine = Recipe.load(tmp_path / "mine.yaml")
    assert mine.name == "mine"
    assert mine.where == str(tmp_path / "mine.yaml")


def test_a_pattern_must_match() -> None:
    with pytest.raises(UsageError, match=r"^recipe, line 1: rtn: no tensor .* is named \*nothing\*"):
        recipe((method("rtn"), ["*nothing*"])).plan(PROGRAM)
    with pytest.raises(UsageError, match=r"^a/b\.yaml, line 2: rtn: no tensor"):
        Recipe.from_yaml("methods:\n- {method: rtn, tensors: x}", "a/b.yaml").plan(PROGRAM)


def test_exclusive_slots_have_one_owner() -> None:
    a, b = Fills("first", "rounding"), Fills("second", "rounding")
    with pytest.raises(UsageError, match=r"line 2: second and first \(line 1\) both fill the slot rounding"):
        recipe((a, []), (b, [])).plan(PROGRAM)
    recipe((a, ["*q_proj*"]), (b, ["*k_proj*"])).plan(PROGRAM)


def test_stackable_slots_keep_their_order() -> None:
    smooth, again = Fills("smooth", "smoothing"), Fills("again", "smoothing")
    rounds = Fills("rounds", "rounding")
    recipe((smooth, []), (again, []), (rounds, [])).plan(PROGRAM)
    with pytest.raises(UsageError, match=r"again \(smoothing\) must come before rounds \(rounding, line 1\)"):
        recipe((rounds, []), (again, [])).plan(PROGRAM)
    # Once an input is rounded, what produces it can no longer be scaled.
    with pytest.raises(UsageError, match=r"smooth \(smoothing\) must come before round_activations"):
        recipe((method("round_activations"), []), (smooth, [])).plan(PROGRAM)


@pytest.mark.parametrize(
    ("inputs", "weights"),
    [
        ("round_activations, group: 64", "rtn, group: 32"),
        ("round_activations, group: 0", "gptq, group: 32"),
        ("round_activations, group: 64", "awq, group: 0"),
        ("round_activations, group: 32", "smoothquant_plus, values: false"),
        ("svdquant, quantise: none", "rtn, group: 128"),
        ("flexq, weight_bits: null, group: 32", "gptq, group: 64"),
        ("comet, weight_bits: null, block: 32, permute: false", "rtn"),
        ("round_activations, group: 32", "svdquant, grid: 0, activation_bits: none"),
        ("round_activations, group: 32", "fireq, smooth: [], activations: false, keys: none"),
    ],
)
def test_groups_of_inputs_and_weights_must_agree(inputs: str, weights: str) -> None:
    one, two = inputs.partition(",")[0], weights.partition(",")[0]
    entries = f"{{method: {inputs}}}", f"{{method: {weights}}}"
    # Smoothing goes before the rounding of inputs, what another one rounds after it.
    turned = two in ("smoothquant_plus", "awq")
    first, second = entries[::-1] if turned else entries
    with pytest.raises(UsageError) as caught:
        Recipe.from_yaml(f"methods:\n- {first}\n- {second}", "mine.yaml").plan(PROGRAM)
    said = str(caught.value)
    lines = (3, 2) if turned else (2, 3)
    assert said.startswith(f"mine.yaml, line {lines[0]}: {one} rounds the inputs of model.layers.0.")
    assert f", {two} (line {lines[1]}) its weights in " in said
    assert said.endswith(": give both methods the same group")


def test_groups_that_agree() -> None:
    width = PROGRAM.weights["model.layers.0.self_attn.q_proj.weight"].shape[1]
    for text in (
        "{method: round_activations, group: 32}, {method: rtn, group: 32}",
        "{method: round_activations, group: 0}, {method: rtn, group: 0}",
        f"{{method: round_activations, group: {width}, tensors: '*.q_proj.*'}}, {{method: rtn, group: 0}}",
        "{method: round_activations, tensors: '*.q_proj.*'}, {method: rtn, group: 32, tensors: '*.k_proj.*'}",
        "{method: fireq, weights: false}, {method: rtn, group: 32}",  # rows of E4M3: no groups
        "{method: svdquant, quantise: none, activation_bits: none}, {method: rtn, group: 32}",
    ):
        Recipe.from_yaml(f"methods: [{text}]").plan(PROGRAM)


def test_groups_must_agree_with_inputs_that_the_model_rounds() -> None:
    program = round_inputs(PROGRAM, ["layers.1.self_attn.o_proj"], group=32, bits=[8])
    Recipe.from_yaml("methods: [{method: rtn, group: 32}]").plan(program)
    message = (
        r"line 1: rtn rounds model.layers.1.self_attn.o_proj.weight in groups of 64 columns, but the model"
    )
    with pytest.raises(UsageError, match=message):
        Recipe.from_yaml("methods: [{method: rtn}]").plan(program)


def test_every_method_is_whole() -> None:
    known = {*EXCLUSIVE, *PRECEDES}
    assert set().union(*PRECEDES.values()) <= known
    for entry in listing():
        found = method(entry["name"])
        assert found.name == entry["name"]
        assert set(entry["slots"]) <= known
        assert entry["slots"]
        assert found.options.__doc__
        assert describe(found.name)["options"]


@pytest.mark.parametrize("second", names())
@pytest.mark.parametrize("first", names())
def test_every_pair_plans_or_conflicts(first: str, second: str) -> None:
    """Two methods with their defaults: planned exactly if their slots allow it, else the error names both."""
    a, b = method(first), method(second)
    one, two = set(a.slots(a.options())), set(b.slots(b.options()))
    pair = recipe((a, []), (b, []))
    shared = set(pair.entries[0].tensors(PROGRAM)) & set(pair.entries[1].tensors(PROGRAM))
    conflict = shared and (
        one & two & set(EXCLUSIVE) or any(PRECEDES.get(slot, frozenset()) & one for slot in two)
    )
    if not conflict:
        pair.plan(PROGRAM)
        return
    with pytest.raises(UsageError) as caught:
        pair.plan(PROGRAM)
    assert first in str(caught.value)
    assert second in str(caught.value)
