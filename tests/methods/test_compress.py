"""compress: what is written, resumed, refused; the result runs like any model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from gristmill import inspect
from gristmill.backends.native import NativeExecutor
from gristmill.backends.reference import ReferenceExecutor
from gristmill.errors import Cancelled, GristmillError, ModelError, UsageError
from gristmill.formats import group_int
from gristmill.formats.packed import Packed
from gristmill.io.checkpoint import Checkpoint
from gristmill.io.convert import prepare
from gristmill.methods import method
from gristmill.methods.base import Method, Options
from gristmill.methods.compress import compress, identity
from gristmill.methods.draft import Draft
from gristmill.methods.recipe import Calibration, Entry, Recipe
from gristmill.program.edits import round_inputs
from gristmill.program.nodes import Program
from gristmill.terminal.tables import model_table
from tests.kits import models
from tests.kits import recipes as kit

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
    assert {"config.json", "recipe.yaml"} <= set(report["sha256"])
    assert made.verify() == len(report["sha256"]) - 2
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
    message = r"^r\.yaml, line 1: .* in groups of 64 columns, rtn \(line 1\) its weights in groups of 32"
    with pytest.raises(UsageError, match=message):
        compress(small, Recipe.from_yaml(text, "r.yaml"), tmp_path / "out", evaluate=False)
    assert not list(tmp_path.iterdir())
    compress(small, Recipe.from_yaml(text.replace("32", "64")), tmp_path / "out", evaluate=False)


def test_groups_that_no_method_told_of_are_refused(small: Path, tmp_path: Path) -> None:
    """As `Interrupting` rounds one input in groups of 32 and says nothing of it."""
    entries = (Entry(Interrupting(), Options(), ("*.1.*",), 1), *Recipe.load("rtn").entries)
    entries = (entries[0], Entry(entries[1].method, entries[1].options, ("*.0.*",), 2))
    with pytest.raises(UsageError, match="rounded in groups of 32 columns, its weights in groups of 64"):
        compress(small, Recipe(entries), tmp_path / "out", evaluate=False)
    assert not (tmp_path / "out").exists()


def test_inputs_in_other_groups_than_stored_codes(small: Path, tmp_path: Path) -> None:
    """Nobody chose the source's groups: the model runs, in bf16, near what exact arithmetic gives."""
    groups = "methods: [{method: rtn, bits: 6, group: 32, tensors: ['*']}]"
    compress(small, Recipe.from_yaml(groups), tmp_path / "codes", evaluate=False)
    recipe = Recipe.from_yaml("methods: [{method: round_activations, bits: 8, group: 64}]")
    report = compress(tmp_path / "codes", recipe, tmp_path / "out", evaluate=False)
    (note,) = report["notes"]
    assert note.endswith(
        "in groups of 64 columns, in which not all weights that read them are integers: "
        "the model runs with activations bf16"
    )
    made = Checkpoint.open(tmp_path / "out")
    assert made.activations == "bf16"
    ids = models.tokens(20, made.program().vocab_size)
    expected = models.logits(ReferenceExecutor.load(made), ids, [20])
    for activations, limit in (("exact", 0.02), (None, 0.1)):  # now and then a code flips
        with closing(
            NativeExecutor.load(tmp_path / "out", activations=activations, kv_dtype="f32")
        ) as executor:
            assert executor.activations == (activations or "bf16")
            assert models.relative_error(models.logits(executor, ids, [20]), expected) < limit


def test_inputs_of_integers_and_floats(small: Path, tmp_path: Path) -> None:
    """One input, rounded, of q and k in codes and v in floats: it cannot be codes for all of them."""
    rounded = "{method: rtn, group: 64, tensors: ['*.q_proj*', '*.k_proj*']}"
    text = f"methods: [{{method: round_activations}}, {rounded}]"
    report = compress(small, Recipe.from_yaml(text), tmp_path / "out", evaluate=False)
    assert len(report["notes"]) == 1
    with closing(NativeExecutor.load(tmp_path / "out")) as executor:
        assert executor.activations == "bf16"
        assert np.isfinite(models.logits(executor, models.tokens(20, executor.vocab_size), [20])).all()
    whole = "methods: [{method: round_activations, tensors: ['*.v_proj*']}]"
    assert compress(small, Recipe.from_yaml(whole), tmp_path / "floats", evaluate=False)["notes"] == []
    with closing(NativeExecutor.load(tmp_path / "floats")) as executor:
        assert executor.activations == "fast"


def test_edits_that_the_program_does_not_admit_name_the_line(tmp_path: Path) -> None:
    small = kit.speaking(tmp_path)
    text = kit.CALIBRATION + "methods:\n- {method: fireq, weights: false, activations: false, keys: s}\n"
    compress(small, Recipe.from_yaml(text), tmp_path / "once", evaluate=False)
    with pytest.raises(UsageError, match=r"^r\.yaml, line 3: fireq: the keys of .* are scaled already$"):
        compress(tmp_path / "once", Recipe.from_yaml(text, "r.yaml"), tmp_path / "twice", evaluate=False)


def test_inspect_tells_what_a_recipe_did(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(small, Recipe.from_yaml(RTN), out, evaluate=False)
    report = json.loads((out / "report.json").read_text())
    figures = {"kl_mean": 0.25, "top1_agreement": 0.5, "perplexity": 3.0, "base_perplexity": 2.0}
    report["quality"] = {"tokens": 10, "text": "some text", **figures}
    report["calibration"] = {"tokens": 2048, "text": "other text"}
    report["notes"] = ["a note", 5]
    report["methods"] = ["rtn", 7]
    (out / "report.json").write_text(json.dumps(report))
    found = inspect.run(out)
    assert found["methods"] == ["rtn", 7]
    assert found["recipe"] == (out / "recipe.yaml").read_text()
    told = {
        "recipe": "rtn (--json has its text)",
        "calibrated on": "2,048 tokens of other text",
        "note": "a note",
        "quality": "KL 0.25, top-1 50.0 %, perplexity 3.000 (base 2.000), over 10 tokens of some text",
    }
    lines = {label: value.strip() for label, _, value in map(partition, printed(found))}
    assert {label: lines.get(label) for label in told} == told
    report |= {"methods": 5, "quality": {"tokens": 10, "text": []}, "calibration": [], "notes": {}}
    (out / "report.json").write_text(json.dumps(report))
    lines = {label for label, _, _ in map(partition, printed(inspect.run(out)))}
    assert not lines & set(told)
    assert "weights" in lines
    assert "methods" not in inspect.run(small)


def printed(found: dict[str, Any]) -> list[str]:
    """The lines that `gristmill inspect` prints."""
    console = Console(width=200, file=StringIO(), color_system=None)
    console.print(model_table(found))
    return console.file.getvalue().splitlines()


def partition(line: str) -> tuple[str, str, str]:
    """Label and value of a fact, which two spaces or more part."""
    return line.partition("  ")


class SlowOptions(Options):
    """What `Slow` rounds to."""

    bits: int = 4


class Slow(Method[SlowOptions]):
    """Rounds tensor by tensor and counts those that it has not found done."""

    name = "slow"
    options = SlowOptions

    def __init__(self) -> None:
        self.computed = 0

    def slots(self, options: SlowOptions) -> Sequence[str]:
        return ("rounding",)

    def apply(self, draft: Draft, options: SlowOptions, tensors: Sequence[str]) -> None:
        for name in tensors:

            def packed(name: str = name) -> dict[str, Packed]:
                self.computed += 1
                values = draft.weight(name)
                return {name: group_int.round_group_int(values, bits=options.bits, group=32, symmetric=True)}

            draft.pack_once(name, [name], packed)


class PickyOptions(Options):
    """What `Picky` raises."""

    fails: bool = True


class Picky(Method[PickyOptions]):
    """Fails where it is told to, after its first step."""

    name = "picky"
    options = PickyOptions
    error: GristmillError = UsageError("scales can be moved nowhere")

    def slots(self, options: PickyOptions) -> Sequence[str]:
        return ("kv_format",)

    def apply(self, draft: Draft, options: PickyOptions, tensors: Sequence[str]) -> None:
        draft.once("picky", lambda: {"x": np.ones(1, np.float32)})
        if options.fails:
            raise self.error


def slow_and_picky(*, bits: int = 4, fails: bool = True, floats: str = "bf16") -> tuple[Recipe, Slow]:
    slow = Slow()
    entries = (
        Entry(slow, SlowOptions(bits=bits), ("*mlp*",), 3),
        Entry(Picky(), PickyOptions(fails=fails), (), 6),
    )
    return Recipe(entries, "r", floats=floats, where="mine.yaml"), slow


@pytest.mark.parametrize("kind", [UsageError, ModelError, Cancelled])
def test_errors_of_methods_name_the_line(
    kind: type[GristmillError], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Picky, "error", kind("no place"))
    with pytest.raises(kind, match=r"^mine\.yaml, line 6: picky: no place$") as caught:
        compress(small, slow_and_picky()[0], tmp_path / "out", evaluate=False)
    assert type(caught.value) is kind


def test_a_corrected_recipe_resumes(small: Path, tmp_path: Path) -> None:
    failing, first = slow_and_picky()
    with pytest.raises(UsageError, match="nowhere"):
        compress(small, failing, tmp_path / "out", evaluate=False)
    assert first.computed == 6
    again, second = slow_and_picky()
    with pytest.raises(UsageError, match="nowhere"):
        compress(small, again, tmp_path / "out", evaluate=False)
    corrected, third = slow_and_picky(fails=False, floats="f32")
    compress(small, corrected, tmp_path / "out", evaluate=False)
    assert (second.computed, third.computed) == (0, 0)
    fresh, fourth = slow_and_picky(fails=False, floats="f32")
    compress(small, fresh, tmp_path / "fresh", evaluate=False)
    assert fourth.computed == 6
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "fresh"}


def test_steps_of_another_recipe_are_not_taken(small: Path, tmp_path: Path) -> None:
    """Not even where they have the same names: the bits, the text or the model were others."""
    with pytest.raises(UsageError, match="nowhere"):
        compress(small, slow_and_picky()[0], tmp_path / "out", evaluate=False)
    work = tmp_path / ".out.partial"
    before = {path.name for path in (work / "steps").iterdir()}
    assert len(before) == 2
    other, slow = slow_and_picky(bits=8)
    with pytest.raises(UsageError, match="nowhere"):
        compress(small, other, tmp_path / "out", evaluate=False)
    assert slow.computed == 6
    # What it cannot use is gone: the directory does not grow with every attempt.
    after = {path.name for path in (work / "steps").iterdir()}
    assert len(after) == 2
    assert not before & after
    last, slow = slow_and_picky(bits=8, fails=False)
    text = Recipe(last.entries, "r", Calibration(seed=1), where="mine.yaml")
    compress(small, text, tmp_path / "out", evaluate=False)
    assert slow.computed == 6
    assert Checkpoint.open(tmp_path / "out").specs["model.layers.0.mlp.up_proj.weight"].bits == 8
    assert not work.exists()


def test_a_failure_before_the_first_step_leaves_nothing(small: Path, tmp_path: Path) -> None:
    text = "methods:\n- {method: round_activations}\n- {method: rtn}"
    compress(small, Recipe.from_yaml(text), tmp_path / "out", evaluate=False)
    with pytest.raises(UsageError, match=r"^again\.yaml, line 2: round_activations: the input of .* already"):
        compress(tmp_path / "out", Recipe.from_yaml(text, "again.yaml"), tmp_path / "b", evaluate=False)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


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
