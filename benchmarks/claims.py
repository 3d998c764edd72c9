"""What papers claim of methods besides quality and speed at one size; their pages have the tables.

- marlin: decoding at several batches beside bf16.
- smoothquant_plus: perplexity with an interval over pieces of the text, the loss around the strength that the
  search chose, the search on a quarter of its tokens, and its time beside a search layer by layer (awq).
- comet: a mix of 4- and 8-bit activations beside 8-bit ones, without VNNI (AVX2).
- svdquant: adding an adapter beside quantising anew.

Writes `results/claims.json` and the pages. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import methods
import numpy as np
import safetensors.numpy
from harness.pages import fill
from harness.remote import end_on_sigterm
from harness.revision import commit, named

from gristmill.bench.host import load_average, machine
from gristmill.bench.measure import Sequences
from gristmill.bench.subject import Subject
from gristmill.evaluate import run as evaluate
from gristmill.evaluate.tables import with_interval
from gristmill.io.checkpoint import Checkpoint
from gristmill.methods.compare import compressed
from gristmill.methods.recipe import Recipe

HERE = Path(__file__).parent
RECIPES = HERE.parent / "examples" / "recipes"
RESULTS = HERE / "results" / "claims.json"
PAGES = HERE.parent / "docs" / "methods"
MODEL = "smollm2"
Result = dict[str, Any]
BATCHES = (1, 4, 16)
CONTEXT, STEPS, TURNS = 512, 16, 7
QUALITY_TOKENS = 16384
RANK = 16


def main() -> int:
    """Runs the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=CLAIMS, help="a page's name; may be repeated")
    parser.add_argument("--work", type=Path, help="keep the checkpoints here (default: nowhere)")
    parser.add_argument("--tokens", type=int, default=QUALITY_TOKENS, help="of evaluations")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only write the pages anew")
    arguments = parser.parse_args()
    end_on_sigterm()
    results: dict[str, Result] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not arguments.table:
        with tempfile.TemporaryDirectory() as folder:
            for page in arguments.only or CLAIMS:
                print(page, file=sys.stderr)
                about = {**commit(HERE.parent), "machine": {**machine(), "load_average": load_average()}}
                found = CLAIMS[page][0](arguments.work or Path(folder), arguments)
                results[page] = {**about, "threads": arguments.threads, **found}
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for page, result in results.items():
        path = PAGES / f"{page}.md"
        about = f"{result['machine']['cpu']}, {result['threads']} threads; commit {named(result)}."
        lines = CLAIMS[page][1](result)
        path.write_text(fill(path.read_text(), "claims", ["", about, "", *lines, ""]))
    return 0


def recipe(name: str) -> Recipe:
    """One of the examples."""
    return Recipe.load(RECIPES / f"{name}.yaml")


def anew(chosen: Recipe, work: Path) -> tuple[Path, float]:
    """The checkpoint of a recipe, made by a process of its own whatever is there, and its seconds."""
    target = work / chosen.name
    shutil.rmtree(target, ignore_errors=True)
    return target, methods.apply(MODEL, chosen, target)["seconds"]


# ---- marlin ---------------------------------------------------------------------------------------------


def batches(work: Path, arguments: argparse.Namespace) -> Result:
    """Decoding of bf16 and of two checkpoints with bf16 rows; all take turns."""
    names = ("bf16", "marlin", "fireq")
    times: dict[str, dict[int, list[float]]] = {name: {b: [] for b in BATCHES} for name in names}
    with ExitStack() as stack:
        running: list[tuple[str, int, Sequences]] = []
        for name in names:
            place = MODEL if name == "bf16" else compressed(MODEL, recipe(name), work)
            weights = "bf16" if name == "bf16" else "stored"
            # The same cache for all: fireq's recipe has one in 4 bits.
            options = {"weights": weights, "kv_dtype": "bf16", "threads": arguments.threads}
            subject = stack.enter_context(Subject.load(place, **options))
            for batch in BATCHES:
                sequences = Sequences(subject.executor, batch, CONTEXT + STEPS)
                stack.callback(sequences.close)
                sequences.prefill(CONTEXT)
                sequences.decode(CONTEXT, STEPS)
                running.append((name, batch, sequences))
        for _ in range(TURNS):
            for name, batch, sequences in running:
                sequences.decode(CONTEXT, 1)  # the threads slept while others had their turn
                times[name][batch].append(sequences.decode(CONTEXT, STEPS))
    rates = {
        name: {str(b): b * STEPS / median(seconds) for b, seconds in found.items()}
        for name, found in times.items()
    }
    return {"context": CONTEXT, "tokens_per_s": rates}


def batches_table(result: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown."""
    rates = result["tokens_per_s"]
    lines = [
        f"Decoding at {result['context']} tokens of context over a bf16 cache, tokens/s of all sequences "
        "(over bf16's):",
        "",
        "| | " + " | ".join(f"{b} {'sequence' if b == 1 else 'sequences'}" for b in BATCHES) + " |",
        "|---" + "|--:" * len(BATCHES) + "|",
    ]
    for name, found in rates.items():
        cells = [f"{rate:,.0f} ({rate / rates['bf16'][b]:.2f}x)" for b, rate in found.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


# ---- smoothquant_plus -----------------------------------------------------------------------------------

SEARCHES = {
    "rtn": "- method: rtn\n  bits: 4\n  group: 64\n  symmetric: false\n",
    "smoothquant_plus": "- method: smoothquant_plus\n  group: 64\n",
    "smoothquant_plus, a quarter of the tokens": "- method: smoothquant_plus\n  group: 64\n  tokens: 256\n",
    "awq": "- method: awq\n  bits: 4\n  group: 64\n",
}


def searches(work: Path, arguments: argparse.Namespace) -> Result:
    """Quality with intervals, time, and what the search says of itself."""
    rows = {}
    for i, (name, text) in enumerate(SEARCHES.items()):
        chosen = Recipe.from_yaml(f"name: search{i}\nmethods:\n{text}", name)
        place, seconds = anew(chosen, work)
        options = {"tokens": arguments.tokens, "threads": arguments.threads}
        found = evaluate(place, MODEL, activations="exact", **options)
        keys = ("kl_mean", "kl_mean_ci95", "perplexity_ratio", "perplexity_ratio_ci95")
        notes = json.loads((place / "report.json").read_text())["notes"]
        rows[name] = {
            "seconds": seconds,
            **{key: found[key] for key in keys},
            "notes": [note for note in notes if note.startswith("smoothquant_plus:")],
        }
    return {"tokens": arguments.tokens, "rows": rows}


def searches_table(result: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        f"4-bit weights in groups of 64 with minimums, {result['tokens']} tokens, exact arithmetic; in "
        "brackets 95 % intervals, windows of the text being the observations:",
        "",
        "| | KL | perplexity over the base's | compress s |",
        "|---|--:|--:|--:|",
    ]
    for name, row in result["rows"].items():
        kl, ratio = (with_interval(row, key, ".4f") for key in ("kl_mean", "perplexity_ratio"))
        lines.append(f"| {name} | {kl} | {ratio} | {row['seconds']:.0f} |")
    lines += ["", "What the searches say:", ""]
    for name, row in result["rows"].items():
        lines += [f"- {name}: {note.partition(': ')[2]}" for note in row["notes"]]
    return lines


# ---- comet ----------------------------------------------------------------------------------------------


def mixed(work: Path, arguments: argparse.Namespace) -> Result:
    """Speeds of `comet` and `w4a8` at levels with and without dot products of bytes, in turns."""
    levels = {}
    for level in ("avx2", None):
        rates: dict[str, dict[str, list[float]]] = {}
        for _ in range(3):
            for name in ("w4a8", "comet"):
                place = compressed(MODEL, recipe(name), work)
                command = [sys.executable, "-m", "gristmill", "bench", str(place), "--json", "--repeats", "3"]
                command += ["--prefill", "512", "--decode", "1x512,16x512"]
                command += ["--threads", str(arguments.threads)]
                environment = {**os.environ, **({"GRISTMILL_ISA": level} if level else {})}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                for kind, rate in bench_rates(json.loads(done.stdout)).items():
                    rates.setdefault(name, {}).setdefault(kind, []).append(rate)
        levels[level or str(machine()["level"])] = {
            name: {kind: median(found) for kind, found in kinds.items()} for name, kinds in rates.items()
        }
    return {"levels": levels}


def bench_rates(result: Mapping[str, Any]) -> dict[str, float]:
    """Tokens/s of a `bench` by what was run."""
    rates = {f"prefill {row['tokens']}": row["tokens_per_s"] for row in result["prefill"]}
    return rates | {f"decode {row['batch']}": row["tokens_per_s"] for row in result["decode"]}


def mixed_table(result: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown."""
    kinds = list(next(iter(result["levels"].values()))["w4a8"])
    lines = ["tokens/s of `comet` (and over those of `w4a8`, in the same run):", ""]
    lines += ["| level | " + " | ".join(kinds) + " |", "|---" + "|--:" * len(kinds) + "|"]
    for level, rates in result["levels"].items():
        cells = [
            f"{rates['comet'][kind]:,.0f} ({rates['comet'][kind] / rates['w4a8'][kind]:.2f}x)"
            for kind in kinds
        ]
        lines.append(f"| {level} | {' | '.join(cells)} |")
    return lines


# ---- svdquant -------------------------------------------------------------------------------------------


def adapters(work: Path, arguments: argparse.Namespace) -> Result:
    """Seconds to quantise, to load the result, and to load it with a LoRA adapter of all linears."""
    place, quantise = anew(recipe("svdquant"), work)
    adapter = random_adapter(place, work / "adapter")
    seconds: dict[str, list[float]] = {"plain": [], "adapted": []}
    for _ in range(TURNS):
        for name, lora in (("plain", ()), ("adapted", (adapter,))):
            with Subject.load(place, threads=arguments.threads, lora=lora) as subject:
                seconds[name].append(subject.load_s)
    return {
        "rank": RANK,
        "quantise_s": quantise,
        "load_s": median(seconds["plain"]),
        "load_adapted_s": median(seconds["adapted"]),
    }


def random_adapter(place: Path, to: Path) -> Path:
    """An adapter in PEFT's format of all linears of the decoder's layers."""
    random = np.random.default_rng(1)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, spec in Checkpoint.open(place).specs.items():
        if "_proj.weight" not in name:
            continue
        n, k = spec.shape
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = random.normal(0, 0.02, (RANK, k)).astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = random.normal(0, 0.02, (n, RANK)).astype(np.float32)
    to.mkdir(parents=True, exist_ok=True)
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (to / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, to / "adapter_model.safetensors")
    return to


def adapters_table(result: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown."""
    switch, quantise = result["load_adapted_s"], result["quantise_s"]
    return [
        f"Loading the checkpoint with another adapter (rank {result['rank']}, all linears of the layers): "
        f"{switch:.2f} s, without one {result['load_s']:.2f} s; quantising anew {quantise:.0f} s, "
        f"{quantise / switch:,.0f} times as long.",
    ]


Measure = Callable[[Path, argparse.Namespace], Result]
CLAIMS: dict[str, tuple[Measure, Callable[[Mapping[str, Any]], Sequence[str]]]] = {
    "marlin": (batches, batches_table),
    "smoothquant_plus": (searches, searches_table),
    "comet": (mixed, mixed_table),
    "svdquant": (adapters, adapters_table),
}


if __name__ == "__main__":
    sys.exit(main())
