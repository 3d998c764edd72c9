"""compress: what is written, resumed, refused; the result runs like any model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gristmill import inspect
from gristmill.backends.native import NativeExecutor
from gristmill.backends.reference import ReferenceExecutor
from gristmill.errors import ModelError, UsageError
from gristmill.formats import group_int
from gristmill.io.checkpoint import Checkpoint
from gristmill.io.convert import prepare
from gristmill.methods import method
from gristmill.methods.base import Method, Options
from gristmill.methods.compress import compress, identity
from gristmill.methods.draft import Draft
from gristmill.methods.recipe import Entry, Recipe
from gristmill.program.edits import round_inputs
from gristmill.program.nodes import Program
from tests.kits import models

RTN = "methods: [{method: rtn, bits: 4, group: 32, tensors: '*mlp*'}]"


class Interrupting(Method[Options]):
    """Rounds layer by layer, slowly, and stops once where it is told to."""

    name = "interrupting"
    stop_at: int | None = None
    computed: int = 0

    def slots(self, options: Options) -> Sequence[str]:
        return ("rounding",)

    def apply(self, draft: Draft, options: Options, tensors: Sequence[str]) -> None:
        draft.edit(round_inputs(draft.program, ["layers.0.self_attn.o_proj"], group=32, bits=[6]))
        for i, name in enumerate(tensors):
            if self.stop_at == i:
                raise KeyboardInterrupt

            def packed(name: str = name) -> dict[str, group_int.Packed]:
                self.computed += 1
                values = draft.weight(name) * np.float32(1.01)
                return {name: group_int.round_group_int(values, bits=4, group=32, symmetric=False)}

            draft.pack_once(name, [name], packed)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_writes_a_model(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    report = compress(small, Recipe.from_yaml(RTN), out, evaluate=False)
    made = Checkpoint.open(out)
    down = made.specs["model.layers.0.mlp.down_proj.weight"]
    assert (down.bits, down.group) == (4, 32)
    assert made.specs["model.layers.0.self_attn.q_proj.weight"].format == "f32"  # as the source has it
    assert not made.edited
    assert report["bits_per_weight"] == made.bits_per_weight
    assert Recipe.from_yaml((out / "recipe.yaml").read_text()).entries[0].patterns == ("*mlp*",)
    assert made.verify() == len(report["sha256"])
    assert not list(out.parent.glob(".*"))
    ids = models.tokens(20, made.program().vocab_size)
    expected = models.logits(ReferenceExecutor.load(made), ids, [20])
    with closing(NativeExecutor.load(out, activations="exact", kv_dtype="f32")) as executor:
        assert models.relative_error(models.logits(executor, ids, [20]), expected) < 1e-4


def test_resumes_with_the_same_bytes(small: Path, tmp_path: Path) -> None:
    def recipe(stop_at: int | None) -> tuple[Recipe, Interrupting]:
        one = Interrupting()
        one.stop_at = stop_at
        return Recipe((Entry(one, Options(), (), 1),), "r"), one

    whole, first = recipe(None)
    compress(small, whole, tmp_path / "whole", evaluate=False)
    broken, second = recipe(5)
    with pytest.raises(KeyboardInterrupt):
        compress(small, broken, tmp_path / "resumed", evaluate=False)
    assert not (tmp_path / "resumed").exists()
    again, third = recipe(None)
    compress(small, again, tmp_path / "resumed", evaluate=False)
    assert second.computed == 5
    assert third.computed == first.computed - 5
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert Checkpoint.open(tmp_path / "resumed").edited


def test_other_work_is_not_mixed_in(small: Path, tmp_path: Path) -> None:
    one = Interrupting()
    one.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        compress(small, Recipe((Entry(one, Options(), (), 1),)), tmp_path / "out", evaluate=False)
    with pytest.raises(UsageError, match="unfinished work of another recipe"):
        compress(small, Recipe.from_yaml(RTN), tmp_path / "out", evaluate=False)
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        compress(small, Recipe.from_yaml(RTN), tmp_path / "taken", evaluate=False)


def test_tampering_is_found(small: Path, tmp_path: Path) -> None:
    one = Interrupting()
    out = tmp_path / "out"
    compress(small, Recipe((Entry(one, Options(), (), 1),)), out, evaluate=False)
    text = (out / "program.json").read_text()
    (out / "program.json").write_text(text.replace('"bits":[6]', '"bits":[5]'))
    with pytest.raises(ModelError, match=r"program\.json is not what was written"):
        Checkpoint.open(out).verify()
    with pytest.raises(ModelError, match=r"program\.json is not what was written"):
        inspect.run(out, verify=True)
    (out / "program.json").write_text(text)
    assert inspect.run(out, verify=True)["verified"] > 10
    with pytest.raises(UsageError, match="only checkpoint directories"):
        inspect.run(small, verify=True)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"the tensor .* is not what was written"):
        inspect.run(out, verify=True)
    for damaged in (
        "{}",
        "[",
        text.replace('"encode"', '"decode"'),
        text.replace('"group":32', '"group":-32'),
    ):
        (out / "program.json").write_text(damaged)
        with pytest.raises(ModelError, match=r"program\.json"):
            Checkpoint.open(out)
    grown = json.loads(text)
    grown["weights"]["model.norm.weight"] = [1 << 40]
    (out / "program.json").write_text(json.dumps(grown))
    with pytest.raises(ModelError):
        Checkpoint.open(out)


def test_values_must_be_finite(small: Path) -> None:
    draft = Draft(Checkpoint.open(prepare(small)))
    name = "model.layers.0.mlp.up_proj.weight"
    values = draft.weight(name).copy()
    values[0, 0] = np.nan
    with pytest.raises(ModelError, match="not finite"):
        draft.set(name, values)
    with pytest.raises(ModelError, match="not finite"):
        group_int.round_group_int(values, bits=4, group=32, symmetric=True)


def test_quality_is_reported(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"kl_mean": 0.5, "kl_p99": 1.0, "top1_agreement": 0.5, "perplexity": 3.0, "base_perplexity": 2.0}
    found |= {"tokens": 10, "text": "t", "modes": {}, "base_modes": {}}
    monkeypatch.setattr("gristmill.evaluate.run", lambda *a, **k: found)
    report = compress(small, Recipe.from_yaml(RTN), tmp_path / "out")
    assert report["quality"]["kl_mean"] == 0.5
    assert json.loads((tmp_path / "out" / "report.json").read_text())["quality"] == report["quality"]


def test_rtn_needs_no_torch() -> None:
    assert not method("rtn").calibrated


def test_program_json_is_the_program(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(small, Recipe((Entry(Interrupting(), Options(), (), 1),)), out, evaluate=False)
    assert Program.from_json((out / "program.json").read_text()) == Checkpoint.open(out).program()


def test_a_program_cannot_be_taken_away_or_put_in(small: Path, tmp_path: Path) -> None:
    edited, plain = tmp_path / "edited", tmp_path / "plain"
    compress(small, Recipe((Entry(Interrupting(), Options(), (), 1),)), edited, evaluate=False)
    compress(small, Recipe.from_yaml(RTN), plain, evaluate=False)
    text = (edited / "program.json").read_text()
    (edited / "program.json").unlink()
    with pytest.raises(ModelError, match=r"lacks its program\.json"):
        Checkpoint.open(edited)
    (plain / "program.json").write_text(text)
    with pytest.raises(ModelError, match="has a program that its config does not name"):
        Checkpoint.open(plain)


def test_groups_that_do_not_fit_are_refused(small: Path, tmp_path: Path) -> None:
    text = "methods: [{method: round_activations, group: 64}, {method: rtn, group: 32}]"
    with pytest.raises(UsageError, match="groups of 64 columns, its weights in groups of 32"):
        compress(small, Recipe.from_yaml(text), tmp_path / "out", evaluate=False)
    assert not list(tmp_path.iterdir())
    compress(small, Recipe.from_yaml(text.replace("32", "64")), tmp_path / "out", evaluate=False)


def test_the_identity_covers_the_calibration_text(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint.open(prepare(small))
    monkeypatch.setattr(type(method("rtn")), "calibrated", True)
    (tmp_path / "text").write_text("one")
    recipe = Recipe.from_yaml(f"calibration: {{text: {tmp_path / 'text'}}}\n{RTN}")
    first = identity(source, recipe)
    assert identity(source, recipe) == first
    (tmp_path / "text").write_text("two")
    assert identity(source, recipe) != first
