"""The scripts that fill the pages of the methods: valid recipes, whole tables, places for them."""

from __future__ import annotations

import subprocess

import claims
import export_check
import kv_formats
import ladders
import methods
import pytest
import yaml
from harness.revision import commit

from gristmill.methods.recipe import Recipe
from gristmill.models import build_program
from tests.kits import models

LADDERS = yaml.safe_load(ladders.LADDERS.read_text())


@pytest.mark.parametrize("page", LADDERS)
def test_every_row_of_a_ladder_is_a_recipe(page):
    program = build_program(models.configs()["llama-smollm2"])
    names = [row["name"] for row in LADDERS[page]]
    assert len(set(names)) == len(names)
    for row in LADDERS[page]:
        assert set(row) <= {"name", "methods", "planted", "kv"}, row["name"]
        recipe = Recipe.from_yaml(yaml.safe_dump({"methods": row["methods"]}), row["name"])
        assert all(recipe.plan(program)), row["name"]
    text = (ladders.PAGES / f"{page}.md").read_text()
    assert "<!-- ladder:begin" in text
    assert "<!-- ladder:end" in text


def test_the_table_of_a_ladder():
    figures = {"bits_per_weight": 5.0, "kl_mean": 0.5, "top1_agreement": 0.75, "perplexity": 9.0}
    figures |= {"base_perplexity": 8.0}
    about = {"tokens": 7, "commit": "abc", "changed": False}
    rows = [
        {"name": "one", **about, "plain": figures, "planted": {**figures, "kl_mean": 0.25}},
        {"name": "two", **about, "changed": True, "plain": figures},
    ]
    text = "\n".join(ladders.table(rows))
    assert "commit abc, abc with changes. Last: the model" in text
    assert "| one | 5.00 | 0.5000 | 75.0 | 9.000 | 0.2500 | 9.000 |" in text
    assert "| two | 5.00 | 0.5000 | 75.0 | 9.000 |  |  |" in text


def test_rows_of_the_same_commit_are_kept_and_others_measured(tmp_path, monkeypatch):
    measured = []

    def quality(model, recipe, kv, tokens, target):
        measured.append((recipe.where, kv))
        return {"kl_mean": 0.1}

    monkeypatch.setattr(ladders, "quality", quality)
    monkeypatch.setattr(ladders, "RESULTS", tmp_path / "r.json")
    row = {"name": "a", "methods": [{"method": "rtn"}], "tokens": 5, "commit": "1", "changed": False}
    kept: dict[str, list[dict[str, object]]] = {}
    other = {**row, "name": "b", "kv": "int4"}
    ladders.measure("page", [row, other], kept, tmp_path)
    ladders.measure("page", [row, other], kept, tmp_path)
    assert measured == [("a", None), ("b", "int4")]
    ladders.measure("page", [{**row, "commit": "2"}], kept, tmp_path)
    assert measured[2:] == [("a", None)]
    assert [one["name"] for one in kept["page"]] == ["a"]
    for _ in range(2):
        ladders.measure("page", [{**row, "changed": True}], kept, tmp_path)
    assert len(measured) == 5


def test_what_is_exported_is_a_recipe():
    program = build_program(models.configs()["llama-smollm2"])
    for name, entries in export_check.RECIPES.items():
        assert all(Recipe.from_yaml(f"methods: {entries}", name).plan(program))
    rows = [{"name": "x", "error": 2e-6, "same": 0.5}]
    result = {"versions": ["5", "0.17"], "tokens": 3, "commit": "abc", "changed": True, "results": rows}
    text = "\n".join(export_check.table(result))
    assert "commit abc with changes:" in text
    assert "| x | 2.0e-06 | 50.0 % |" in text
    assert "<!-- export:begin" in export_check.PAGE.read_text()


def test_the_table_of_kv_formats():
    rows = [
        {"context": c, "format": f, "step_ms": m, "attention_ms": m / 2, "bytes_per_token": b}
        for c, m in ((64, 2.0), (128, 4.0))
        for f, b in zip(kv_formats.FORMATS, (1024, 256, 512), strict=True)
    ]
    about = {"threads": 2, "machine": {"cpu": "x"}, "repeats": 1, "commit": "abc", "changed": False}
    lines = kv_formats.table({**about, "results": rows})
    assert "| int4 | 256 (0.25) | 2048 | 1.00 (1.00) | 2.00 (1.00) | 2.00 (1.00) | 4.00 (1.00) |" in lines
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "<!-- kv:begin" in kv_formats.PAGE.read_text()


def test_the_tables_of_claims():
    rates = {"bf16": {"1": 10.0, "4": 20.0, "16": 40.0}, "marlin": {"1": 30.0, "4": 50.0, "16": 60.0}}
    lines = claims.batches_table({"context": 512, "tokens_per_s": rates})
    assert "| marlin | 30 (3.00x) | 50 (2.50x) | 60 (1.50x) |" in lines
    figures = {"kl_mean": 0.5, "kl_mean_ci95": [0.4, 0.6]}
    figures |= {"perplexity_ratio": 1.5, "perplexity_ratio_ci95": [1.25, 1.75]}
    row = {"seconds": 9.6, **figures, "notes": ["smoothquant_plus: strength 0.5, loss 1"]}
    lines = claims.searches_table({"tokens": 7, "rows": {"one": row}})
    assert "| one | 0.5000 (0.4000 to 0.6000) | 1.5000 (1.2500 to 1.7500) | 10 |" in lines
    assert lines[-1] == "- one: strength 0.5, loss 1"
    levels = {"amx": {"w4a8": {"decode 1": 10.0}, "comet": {"decode 1": 5.0}}}
    assert "| amx | 5 (0.50x) |" in claims.mixed_table({"levels": levels})
    found = {"rank": 16, "quantise_s": 100.0, "load_s": 0.5, "load_adapted_s": 2.0}
    assert claims.adapters_table(found)[0].endswith("quantising anew 100 s, 50 times as long.")


@pytest.mark.parametrize("page", claims.CLAIMS)
def test_claims_have_a_place_and_their_recipes_are_valid(page):
    text = (claims.PAGES / f"{page}.md").read_text()
    assert "<!-- claims:begin" in text
    assert "<!-- claims:end" in text
    program = build_program(models.configs()["llama-smollm2"])
    for entries in claims.SEARCHES.values():
        assert all(Recipe.from_yaml(f"methods:\n{entries}", "x").plan(program))


def test_the_table_of_the_methods():
    """Of the stored results: as many cells in every line."""
    import json

    lines = methods.table(json.loads(methods.RESULTS.read_text())).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) > 20
    assert len({line.count("|") for line in table}) == 1


def test_changes_are_seen_from_any_folder(tmp_path):
    for folder in ("src", "native", "benchmarks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("before")
    who = ["-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    (tmp_path / "benchmarks" / "file").write_text("results")
    assert not commit(tmp_path)["changed"]
    (tmp_path / "src" / "file").write_text("after")
    for folder in (tmp_path, tmp_path / "benchmarks"):
        assert commit(folder)["changed"]
