"""compare: which directories it takes as they are, and which it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gristmill.errors import UsageError
from gristmill.io.json_file import read_object
from gristmill.methods.compare import compare
from gristmill.methods.compress import compress
from gristmill.methods.recipe import Recipe
from tests.kits import files, models

RECIPE = Recipe.from_yaml("name: mine\nmethods: [{method: rtn, bits: 4, group: 32}]")


@pytest.mark.parametrize("what", ["another model", "another recipe", "no report"])
def test_a_directory_that_is_not_its_own_is_refused(small: Path, tmp_path: Path, what: str) -> None:
    source, recipe = small, RECIPE
    if what == "another model":
        of = models.configs()["llama-smollm2"]
        tensors = files.weights(of)
        name = "model.layers.0.mlp.up_proj.weight"
        source = files.write_huggingface(tmp_path / "small", of, {**tensors, name: tensors[name] * 1.01})
    elif what == "another recipe":
        recipe = Recipe.from_yaml("name: mine\nmethods: [{method: rtn, bits: 6, group: 32}]")
    compress(source, recipe, tmp_path / "out" / "mine", evaluate=False)
    report = tmp_path / "out" / "mine" / "report.json"
    if what == "no report":
        report.unlink()
    else:
        assert read_object(report)["identity"]
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "out" / "mine").iterdir())
    with pytest.raises(UsageError, match="mine exists and was not made from this model by this recipe"):
        compare(small, [RECIPE], tmp_path / "out", tokens=64)
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "out" / "mine").iterdir()) == before


def test_recipes_need_names_of_their_own(small: Path, tmp_path: Path) -> None:
    for recipes, message in (
        ([RECIPE, RECIPE], "mine"),
        ([replace(RECIPE, name="bf16")], "bf16"),
        ([replace(RECIPE, name="")], "one has none"),
    ):
        with pytest.raises(UsageError, match=f"recipes need names of their own: {message}"):
            compare(small, recipes, tmp_path / "out")
