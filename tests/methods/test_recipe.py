"""Recipes: what they say, what is refused and where, conflicts between methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from gristmill.errors import UsageError
from gristmill.methods import EXCLUSIVE, STACKABLE, method, names
from gristmill.methods.base import Method, Options
from gristmill.methods.catalogue import describe, listing
from gristmill.methods.recipe import Entry, Recipe
from gristmill.models import build_program
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
    ],
)
def test_refused_with_the_line(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.from_yaml(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a recipe file nor a method"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="cannot read"):
        Recipe.load(tmp_path)
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot read"):
        Recipe.load(tmp_path / "bad.yaml")
    (tmp_path / "mine.yaml").write_text("methods: [{method: rtn}]")
    assert Recipe.load(tmp_path / "mine.yaml").name == "mine"


def test_a_pattern_must_match() -> None:
    with pytest.raises(UsageError, match=r"line 1: rtn: no tensor .* is named \*nothing\*"):
        recipe((method("rtn"), ["*nothing*"])).plan(PROGRAM)


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


def test_every_method_is_whole() -> None:
    known = {*EXCLUSIVE, *STACKABLE}
    assert set().union(*STACKABLE.values()) <= known
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
        one & two & set(EXCLUSIVE) or any(STACKABLE.get(slot, frozenset()) & one for slot in two)
    )
    if not conflict:
        pair.plan(PROGRAM)
        return
    with pytest.raises(UsageError) as caught:
        pair.plan(PROGRAM)
    assert first in str(caught.value)
    assert second in str(caught.value)
