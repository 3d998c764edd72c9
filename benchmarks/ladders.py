"""What each part of a method does to the quality of the demo model: ladders as in the methods' papers.

The rows stand in `ladders.yaml`. Linear layers run in exact arithmetic, so that little is rounded but what a
row says: keys and values are bf16 where it says nothing, and so are matrices that were changed and that
nobody rounds. Speed is not measured. Writes `results/ladders.json` after every row, and the tables of
`docs/methods/`. A row that is there already, of the same recipe and commit, is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from harness.pages import fill
from harness.planted import planted
from harness.revision import commit, named

from gristmill.evaluate import run as evaluate
from gristmill.methods.compress import compress
from gristmill.methods.recipe import Recipe

HERE = Path(__file__).parent
LADDERS = HERE / "ladders.yaml"
RESULTS = HERE / "results" / "ladders.json"
PAGES = HERE.parent / "docs" / "methods"
MODEL = "smollm2"
CALIBRATION = {"tokens": 2048}
QUALITY = ("bits_per_weight", "kl_mean", "top1_agreement", "perplexity", "base_perplexity")


def main() -> int:
    """Runs the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", help="a page's name; may be repeated")
    parser.add_argument("--tokens", type=int, default=4096, help="of the evaluation")
    parser.add_argument("--table", action="store_true", help="only write the pages anew")
    arguments = parser.parse_args()
    ladders: dict[str, list[dict[str, Any]]] = yaml.safe_load(LADDERS.read_text())
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not arguments.table:
        revision = commit(HERE.parent)
        with tempfile.TemporaryDirectory() as folder:
            for page in arguments.only or ladders:
                rows = [{**row, "tokens": arguments.tokens, **revision} for row in ladders[page]]
                measure(page, rows, kept, Path(folder))
    for page, rows in kept.items():
        path = PAGES / f"{page}.md"
        path.write_text(fill(path.read_text(), "ladder", table(rows)))
    return 0


def measure(page: str, rows: Sequence[dict[str, Any]], kept: dict[str, Any], work: Path) -> None:
    """Puts the rows of a page into `kept`, and that into the results' file."""
    before = {row["name"]: row for row in kept.get(page, ())}
    done: dict[str, dict[str, Any]] = {}
    for row in rows:
        name, kv, tokens = row["name"], row.get("kv"), row["tokens"]
        document = {"calibration": CALIBRATION, "methods": row["methods"]}
        recipe = Recipe.from_yaml(yaml.safe_dump(document), name)
        about = {"recipe": recipe.to_yaml(), "kv": kv, **{k: row[k] for k in ("tokens", "commit", "changed")}}
        found = before.get(name, {})
        if row["changed"] or any(found.get(key) != value for key, value in about.items()):
            found = {"name": name, **about}
        for model in ("plain", "planted") if row.get("planted") else ("plain",):
            if model not in found:
                print(f"{page}: {name} ({model})", file=sys.stderr)
                source = MODEL if model == "plain" else planted(MODEL, work)
                found[model] = quality(source, recipe, kv, tokens, work / "result")
        done[name] = found
        kept[page] = list({**before, **done}.values())
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    kept[page] = list(done.values())
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


def quality(model: str | Path, recipe: Recipe, kv: str | None, tokens: int, target: Path) -> dict[str, float]:
    """Of the model after the recipe, against the model before it."""
    compress(model, recipe, target, evaluate=False)
    try:
        found = evaluate(target, model, activations="exact", kv_dtype=kv, tokens=tokens)
    finally:
        shutil.rmtree(target)
    return {key: found[key] for key in QUALITY}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    base = rows[0]["plain"]["base_perplexity"]
    commits = ", ".join(dict.fromkeys(named(row) for row in rows))
    two = any("planted" in row for row in rows)
    lines = [
        f"smollm2, {rows[0]['tokens']} tokens, base perplexity {base:.3f}, calibrated on "
        f"{CALIBRATION['tokens']}; exact arithmetic and bf16 KV but for what a row says. By "
        f"`python benchmarks/ladders.py`, commit {commits}."
        + (" Last: the model with planted outliers." if two else ""),
        "",
        "| | bits | KL | top-1 % | perplexity |" + (" planted KL | planted perplexity |" if two else ""),
        "|---|--:|--:|--:|--:|" + ("--:|--:|" if two else ""),
    ]
    for row in rows:
        plain, other = row["plain"], row.get("planted")
        cells = [
            row["name"],
            f"{plain['bits_per_weight']:.2f}",
            f"{plain['kl_mean']:.4f}",
            f"{100 * plain['top1_agreement']:.1f}",
            f"{plain['perplexity']:.3f}",
        ]
        if two:
            cells += [f"{other['kl_mean']:.4f}", f"{other['perplexity']:.3f}"] if other else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return ["", *lines, ""]


if __name__ == "__main__":
    sys.exit(main())
