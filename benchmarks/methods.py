"""Compresses the demo model, and one with planted outliers, by every recipe, and measures all of them.

Writes `results/methods.json`, the plot `docs/pareto.png`, the tables of `docs/methods/` and the evidence that
`gristmill methods` prints: none of these is written by hand. Every recipe is applied by a process of its own,
whose time and peak memory are kept. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.pages import fill
from harness.planted import planted
from harness.remote import end_on_sigterm
from harness.revision import commit, named

from gristmill import methods
from gristmill.bench.host import machine
from gristmill.methods.compare import add_speeds, compare, compressed, plot
from gristmill.methods.recipe import Recipe

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "methods.json"
EVIDENCE = ROOT / "src" / "gristmill" / "methods" / "evidence.json"
PAGE = ROOT / "docs" / "methods" / "README.md"
RECIPES = ROOT / "examples" / "recipes"
CLAIMS = (
    *("rtn", "awq", "smoothquant_plus", "w4a4", "w4a8", "svdquant", "svdquant_smoothing"),
    *("comet", "fireq", "fireq_unscaled"),
)
"""Recipes for which the papers claim something on models with outliers."""
BASELINES = ("bf16", "stored", "rtn")
"""What every method's own table begins with."""
BESIDE = {
    "comet": ("w4a4", "w4a8"),
    "svdquant": ("w4a4",),
    "flexq": ("w6a6", "w6a8", "w8a8"),
    "marlin": ("gptq",),
}
"""Further rows of a method's table: what it is to be compared with."""


def main() -> int:
    """Runs the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--work", type=Path, help="keep the checkpoints here (default: nowhere)")
    parser.add_argument("--calibration", type=int, default=2048, help="tokens that methods calibrate on")
    parser.add_argument("--prepare", action="store_true", help="with --work: compress, measure nothing yet")
    parser.add_argument("--only", action="append", help="a recipe's name; may be repeated; writes no files")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only write the page and the evidence anew")
    parser.add_argument(
        "--speeds", action="store_true", help="with --work: only measure the speeds of what is there anew"
    )
    arguments = parser.parse_args()
    end_on_sigterm()
    if arguments.table:
        write(json.loads(RESULTS.read_text()))
        return 0
    recipes = [with_tokens(Recipe.load(p), arguments.calibration) for p in sorted(RECIPES.glob("*.yaml"))]
    missing = set(methods.names()) - {e.method.name for r in recipes for e in r.entries}
    if missing:
        print(f"methods: no recipe in {RECIPES.name} uses {', '.join(sorted(missing))}", file=sys.stderr)
        return 1
    if arguments.speeds:
        result = json.loads(RESULTS.read_text())
        measure_speeds(arguments, recipes, result)
        save(result)
        return 0
    if arguments.only:
        recipes = [recipe for recipe in recipes if recipe.name in arguments.only]
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        result = run(arguments, recipes, work)
    if arguments.prepare:
        return 0
    if arguments.only:
        print(table(result))
    else:
        save(result)
    return 0


def save(result: Mapping[str, Any]) -> None:
    """Results, pages, evidence and plot; prints the table."""
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    write(result)
    plot(result["plain"], ROOT / "docs" / "pareto.png")
    print(table(result))


def measure_speeds(arguments: argparse.Namespace, recipes: Sequence[Recipe], result: dict[str, Any]) -> None:
    """Puts the speeds of now into results of before; SystemExit if those are of other recipes."""
    rows = result["plain"]["results"]
    before = [row["recipe"] for row in rows if row["recipe"]]
    if not arguments.work or before != [recipe.to_yaml() for recipe in recipes]:
        raise SystemExit("methods: --speeds needs --work and results of the same recipes")
    missing = [recipe.name for recipe in recipes if not (arguments.work / "plain" / recipe.name).exists()]
    if missing:
        raise SystemExit(f"methods: {arguments.work} lacks {', '.join(missing)}")
    revision = commit(ROOT)
    places = [compressed(arguments.model, recipe, arguments.work / "plain") for recipe in recipes]
    add_speeds(rows, arguments.model, places, repeats=arguments.repeats, threads=arguments.threads)
    result["speeds"] = {**revision, "machine": machine()}


def with_tokens(recipe: Recipe, tokens: int) -> Recipe:
    """The recipe, calibrated on so many tokens."""
    return replace(recipe, calibration=recipe.calibration.model_copy(update={"tokens": tokens}))


def run(arguments: argparse.Namespace, recipes: Sequence[Recipe], work: Path) -> dict[str, Any]:
    """Both comparisons, and the time and memory that every recipe took."""
    revision = commit(ROOT)  # now: others may commit while this runs
    changed = planted(arguments.model, work)
    claimed = [recipe for recipe in recipes if recipe.name in CLAIMS]
    took: dict[str, dict[str, float]] = {}
    for model, chosen, place in ((arguments.model, recipes, "plain"), (changed, claimed, "outliers")):
        for recipe in chosen:
            target, cost = work / place / recipe.name, work / place / f"{recipe.name}.cost.json"
            made = json.loads(cost.read_text()) if target.exists() and cost.exists() else {}
            if revision["changed"] or any(made.get(key) != value for key, value in revision.items()):
                print(f"{place}: {recipe.name}", file=sys.stderr)
                shutil.rmtree(target, ignore_errors=True)
                cost.parent.mkdir(parents=True, exist_ok=True)
                cost.write_text(json.dumps({**apply(model, recipe, target), **revision}))
            if place == "plain":
                took[recipe.name] = json.loads(cost.read_text())
    if arguments.prepare:
        return {}
    options = {"tokens": arguments.tokens, "repeats": arguments.repeats, "threads": arguments.threads}
    plain = compare(arguments.model, recipes, work / "plain", **options)
    outliers = compare(changed, claimed, work / "outliers", **{**options, "repeats": 1})
    return {
        **revision,
        "calibration": arguments.calibration,
        "compress_s": {name: cost["seconds"] for name, cost in took.items()},
        "compress_peak_bytes": {name: cost["peak_rss_bytes"] for name, cost in took.items()},
        "plain": plain,
        "planted": outliers,
    }


def apply(model: str | Path, recipe: Recipe, target: Path) -> dict[str, float]:
    """Makes `target` in a process of its own: `seconds` and `peak_rss_bytes`, PyTorch's import included."""
    file = target.with_name(f"{target.name}.yaml")
    file.write_text(recipe.to_yaml())
    command = ["compress", str(model), "-r", str(file), "-o", str(target), "--no-evaluate", "--json"]
    # A process begins with the peak of the one that executed it: the shell's is small, this one's is not.
    shell = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m", "gristmill"]
    done = subprocess.run([*shell, *command], stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(done.stdout)
    return {key: report[key] for key in ("seconds", "peak_rss_bytes")}


def write(result: Mapping[str, Any]) -> None:
    """The tables of the pages, and the evidence."""
    pages = {PAGE: table(result)}
    plain = result["plain"]
    for name in methods.names():
        used = {row["name"] for row in plain["results"] if name in row["methods"]}
        pages[PAGE.with_name(f"{name}.md")] = table(result, {*used, *BASELINES, *BESIDE.get(name, ())})
    for page, text in pages.items():
        page.write_text(fill(page.read_text(), "measured", ["", text]))
    evidence = {}
    for row in plain["results"]:
        for name in row["methods"]:
            # The recipe that is named after the method, else the first that uses it.
            if name in evidence and row["name"] != name:
                continue
            keys = ("bits_per_weight", "weight_bytes", "kl_mean", "top1_agreement", "perplexity")
            speeds = ("decode_ratio", "prefill_ratio", "decode_tokens_per_s", "prefill_tokens_per_s")
            evidence[name] = {
                "recipe": row["name"],
                "model": plain["model"],
                "machine": plain["machine"]["cpu"],
                "commit": result["commit"],
                "speeds_commit": result.get("speeds", result)["commit"],
                **{key: row[key] for key in (*keys, *speeds)},
            }
    EVIDENCE.write_text(json.dumps({"methods": evidence}, indent=1, sort_keys=True) + "\n")


def table(result: Mapping[str, Any], only: Collection[str] | None = None) -> str:
    """Markdown, of all recipes or of those named."""
    plain = result["plain"]
    peaks = result.get("compress_peak_bytes", {})  # results of before have none
    speeds = result.get("speeds")
    planted = {row["name"]: row for row in result["planted"]["results"]}
    lines = [
        f"{plain['model']}, {plain['tokens']} tokens of {plain['text']}, base perplexity "
        f"{plain['base_perplexity']:.3f}; {plain['machine']['cpu']}, "
        f"{plain['results'][0]['modes']['threads']} threads; commit {named(result)}. Speeds"
        + (f" ({speeds['machine']['cpu']}, commit {named(speeds)})" if speeds else "")
        + f" are medians at {plain['context']} tokens, with the ratio to bf16. `*`: no other has as few "
        f"bytes and as little KL. Methods calibrate on {result['calibration']} tokens. "
        "`runs in`: the arithmetic of the linear layers, and the KV format if it is not bf16. "
        "The last two columns are of the model with planted outliers, for the methods whose papers speak of "
        "outliers and what these are compared with.",
        "",
        "| recipe | runs in | bits | MB | KL | top-1 % | perplexity | decode tok/s | prefill tok/s "
        f"| compress s {'| peak MB ' if peaks else ''}| planted KL | planted perplexity |",
        f"|---|---{'|--:' * (11 if peaks else 10)}|",
    ]
    for row in plain["results"]:
        if only is not None and row["name"] not in only:
            continue
        other = planted.get(row["name"])
        outliers = f"{other['kl_mean']:.4g} | {other['perplexity']:.3f}" if other else "|"
        took = result["compress_s"].get(row["name"])
        lines.append(
            f"| {row['name']}{' *' if row['pareto'] else ''} | {arithmetic(row['modes'])} "
            f"| {row['bits_per_weight']:.2f} "
            f"| {row['weight_bytes'] / 1e6:.1f} | {row['kl_mean']:.4g} | {100 * row['top1_agreement']:.1f} "
            f"| {row['perplexity']:.3f} | {row['decode_tokens_per_s']:.0f} ({row['decode_ratio']:.2f}x) "
            f"| {row['prefill_tokens_per_s']:,.0f} ({row['prefill_ratio']:.2f}x) "
            f"| {'' if took is None else f'{took:.0f}'} "
            + (f"| {peaks[row['name']] / 1e6:.0f} " if row["name"] in peaks else "| " if peaks else "")
            + f"| {outliers} |"
        )
    return "\n".join(lines) + "\n"


def arithmetic(modes: Mapping[str, Any]) -> str:
    """In a few words, what a row ran in."""
    kv = "" if modes["kv_dtype"] == "bf16" else f", KV {modes['kv_dtype']}"
    return f"{modes['arithmetic']}{kv}"


if __name__ == "__main__":
    sys.exit(main())
