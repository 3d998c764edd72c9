"""Compares the quality of gristmill's recipes with llama.cpp's quants and llm-compressor's, at equal bits.

All start from the same weights, the demo model's in float32, and only the linear layers of its blocks are
quantised: embedding, head and norms stay what they are. Bits are everything that is stored for these layers,
scales, minimums, tables, orders and branches included, over their weights. Quality is KL(base || other) over
the same tokens, as `quality.py` takes it, twice:

- of the weights alone: decoded (llama.cpp's by the gguf package) or imported, and run by gristmill in float32
  arithmetic with a float32 KV cache, as the base;
- of the program that made them with its own arithmetic: llama.cpp (int8 activations, f16 KV), Transformers
  in float32, gristmill in the mode that the recipe means (bf16 KV).

Recipes are files or names in examples/recipes; each is also run at other groups (`--group`) and bits
(`--bits`). GPTQ and AWQ are calibrated on the tokens that gristmill's methods are calibrated on; llama.cpp
has no importance matrix. Groups of 120 and 192 are for the widths of this model, 576 and 1,536.

The demo model was 4-bit integers with a minimum per 32 columns (Q4_1) when it was published. Whoever rounds
to that very grid finds it again, almost without loss: rows with a minimum per 32 columns say nothing of a
method, and are marked.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import quality
from harness.environments import HERE, Say, SetupError
from harness.files import DEMO, ensure_file, path_of
from harness.pages import fill
from harness.plan import Entry
from harness.remote import Refused
from harness.revision import commit

from gristmill.errors import GristmillError, UsageError
from gristmill.io.checkpoint import Checkpoint
from gristmill.io.expected import bits_per_weight, expected_tensors
from gristmill.io.json_file import read_object
from gristmill.io.safetensors import SafetensorsFile
from gristmill.methods.compress import compress
from gristmill.methods.recipe import Recipe

OUT = HERE / "results" / "quants.json"
PAGE = HERE.parent / "docs" / "benchmarks.md"
RECIPES = HERE.parent / "examples" / "recipes"
OURS = (
    "gptq",
    "gptq_mixed",
    "awq",
    "smoothquant_plus",
    "smoothquant_plus_gptq",
    "awq_gptq",
    "marlin",
    "svdquant",
)
"""Recipes of 4-bit weights, as far as they are there."""
GROUPS = (32, 64, 120, 128, 192)
LLAMACPP = ("q4_0", "iq4_nl", "q4_1", "q4_k_s", "q4_k_m")
LLMCOMPRESSOR = tuple(
    f"{kind}-g{group}" for kind in ("gptq-sym", "gptq-asym", "awq-asym") for group in (32, 64, 128)
)
EXACT = {"weights": "stored", "activations": "exact", "kv_dtype": "f32"}
TOOLS = {"gristmill": "gristmill", "llamacpp": "llama.cpp", "llmcompressor": "llm-compressor"}


@dataclass(frozen=True)
class Quant:
    """One quantised model: its weights alone, and run by its own program."""

    name: str
    tool: str
    alone: Entry
    own: Entry
    bits: Callable[[], float]
    on_grid: bool
    """Whether its grid is the one that the base's weights lie on."""


def theirs() -> list[Quant]:
    """The peers' models."""
    result = []
    for kind in LLAMACPP:
        file = f"quants/{kind}.gguf"
        alone = _ours(f"{kind}-weights", f"quants/{kind}-floats", EXACT)
        own = Entry("llamacpp", kind, "llamacpp", DEMO, file, ())
        bits = lambda file=file: gguf_bits(path_of(f"{DEMO}/{file}"))  # noqa: E731
        result.append(Quant(kind.upper(), "llamacpp", alone, own, bits, kind == "q4_1"))
    for kind in LLMCOMPRESSOR:
        file = f"quants/{kind}"
        own = Entry("transformers", "f32", "llmcompressor", DEMO, file, ())
        bits = lambda file=file: directory_bits(path_of(f"{DEMO}/{file}"))  # noqa: E731
        on_grid = "-asym-g32" in kind
        result.append(Quant(kind, "llmcompressor", _ours(f"{kind}-weights", file, EXACT), own, bits, on_grid))
    return result


def _ours(mode: str, file: str, options: Mapping[str, Any]) -> Entry:
    return Entry("gristmill", mode, "", DEMO, file, (), options=dict(options))


def ours(
    sources: Sequence[str], groups: Sequence[int], bits: Sequence[int], there: Collection[str], say: Say
) -> list[Quant]:
    """gristmill's models, made anew but for those that are `there`.

    Every recipe as it is, and with its groups and bits changed.
    """
    result: list[Quant] = []
    for source in sources:
        path = RECIPES / f"{source}.yaml"
        recipe = Recipe.load(path if path.exists() else source)
        # A mix of groups is what the recipe is about.
        mixed = len({getattr(e.options, "group", None) for e in recipe.entries}) > 1
        tries = () if mixed else groups
        groups_of = [recipe, *(changed(recipe, f"g{group}", group=group) for group in tries)]
        variants = [*groups_of, *(changed(r, f"{b}bit", bits=b) for b in bits for r in groups_of)]
        known: set[str] = set()
        for variant in variants:
            text = variant.to_yaml().replace(f"name: {variant.name}\n", "")
            if text in known or variant.name in there:
                continue
            known.add(text)
            try:
                result.append(_compressed(variant, say))
            except GristmillError as error:
                say(f"{variant.name}: {error}")
    return result


def changed(recipe: Recipe, suffix: str, **options: int) -> Recipe:
    """The recipe with these options of every method that has them changed."""
    entries = tuple(
        replace(
            e,
            options=e.options.model_copy(
                update={k: v for k, v in options.items() if k in type(e.options).model_fields}
            ),
        )
        for e in recipe.entries
    )
    return Recipe(entries, f"{recipe.name}-{suffix}", recipe.calibration, recipe.floats)


def _compressed(recipe: Recipe, say: Say) -> Quant:
    file = f"quants/gristmill-{recipe.name}"
    target = path_of(f"{DEMO}/{file}")
    shutil.rmtree(target, ignore_errors=True)
    say(f"compressing by {recipe.name}")
    compress(ensure_file(f"{DEMO}/model.gguf", say), recipe, target, evaluate=False)
    layers = _linears(target)
    specs = Checkpoint.open(target).specs
    return Quant(
        recipe.name,
        "gristmill",
        _ours(f"{recipe.name}-weights", file, EXACT),
        _ours(recipe.name, file, {"weights": "stored"}),
        lambda: directory_bits(target),
        any(specs[name].mins and specs[name].group == 32 for name in layers),
    )


def _linears(directory: Path) -> dict[str, tuple[int, ...]]:
    """The matrices of the blocks, as the config has them."""
    shapes = expected_tensors(read_object(directory / "config.json"))
    return {n: shape for n, shape in shapes.items() if ".layers." in n and len(shape) == 2}


def directory_bits(directory: Path) -> float:
    """Bits per weight of the blocks' linears: all that is stored of blocks but for their norms."""
    shapes = expected_tensors(read_object(directory / "config.json"))
    file = SafetensorsFile(directory / "model.safetensors")
    return bits_per_weight(
        {name: shape for name, shape in shapes.items() if "layers." in name},
        {name: entry.nbytes for name, entry in file.entries.items() if "layers." in name},
    )


def gguf_bits(path: Path) -> float:
    """The same of a GGUF file."""
    tensors = [t for t in gguf.GGUFReader(path).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return float(8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors))


def run(quants: Sequence[Quant], *, tokens: int, threads: int, say: Say) -> dict[str, Any]:
    """Measures all of them: the JSON document."""
    revision = commit(HERE)
    base, entries = quality.entries()[0], [e for q in quants for e in (q.alone, q.own)]
    found = quality.run(base, entries, tokens=tokens, threads=threads, say=say)
    rows = []
    for at, quant in enumerate(quants):
        alone, own = found["entries"][2 * at : 2 * at + 2]
        done = alone["failure"] is None or own["failure"] is None
        rows.append(
            {
                "name": quant.name,
                "tool": quant.tool,
                "bits": quant.bits() if done else None,
                "on_grid": quant.on_grid,
                **revision,
                "weights": {key: alone[key] for key in ("figures", "failure")},
                "own": {key: own.get(key) for key in ("figures", "failure", "versions", "notes")},
            }
        )
    return {**{key: value for key, value in found.items() if key != "entries"}, "quants": rows}


def merged(old: Mapping[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new result behind the rows of the old one that it has nothing for.

    UsageError if they are not over the same tokens of the same base.
    """
    for key in ("text", "text_sha256", "tokens", "window", "base"):
        if old.get(key) != new.get(key):
            raise UsageError(f"cannot add to a file whose {key} is {old.get(key)}, not {new.get(key)}")
    names = {row["name"] for row in new["quants"]}
    return {**new, "quants": [*(row for row in old["quants"] if row["name"] not in names), *new["quants"]]}


def against(result: Mapping[str, Any], by: str = "weights") -> list[dict[str, Any]]:
    """For every peer's model off the grid: the best of ours with no more bits.

    by: the KL of the "weights", or of each program's "own" arithmetic.
    """
    rows = [row for row in result["quants"] if row[by]["figures"] and not row["on_grid"]]

    def kl(row: Mapping[str, Any]) -> float:
        return float(row[by]["figures"]["kl_mean"])

    verdicts = []
    for peer in rows:
        # A hundredth of a bit: what shapes and padding take.
        rivals = [r for r in rows if r["tool"] == "gristmill" and r["bits"] <= peer["bits"] + 0.01]
        if peer["tool"] == "gristmill":
            continue
        best = min(rivals, key=kl, default=None)
        verdicts.append(
            {
                "peer": f"{TOOLS[peer['tool']]} {peer['name']}",
                "bits": peer["bits"],
                "kl": kl(peer),
                "ours": best and best["name"],
                "our_bits": best and best["bits"],
                "our_kl": best and kl(best),
                "lower": best is not None and kl(best) < kl(peer),
            }
        )
    return verdicts


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        f"{result['tokens']} tokens of {result['text']} in windows of {result['window']}. `=`: on the grid "
        "that the base's weights lie on, where rounding loses next to nothing whoever does it.",
        "",
        "| bits | made by | quant | KL of the weights | top-1 % | perplexity | KL as it runs |",
        "|--:|---|---|--:|--:|--:|--:|",
    ]
    failed = []
    for row in sorted(result["quants"], key=lambda r: (r["bits"] or 99, r["tool"], r["name"])):
        title = f"{TOOLS[row['tool']]} {row['name']}"
        figures, own = row["weights"]["figures"], row["own"]["figures"]
        failed += [
            f"{title}{what}: {row[key]['failure']['kind']}: {row[key]['failure']['reason']}"
            for key, what in (("weights", ""), ("own", ", as it runs"))
            if row[key]["failure"]
        ]
        if not figures:
            continue
        runs = f"{own['kl_mean']:.4f}" if own else "failed"
        lines.append(
            f"| {row['bits']:.2f} | {TOOLS[row['tool']]} | {row['name']}{' =' if row['on_grid'] else ''} "
            f"| {figures['kl_mean']:.4f} | {100 * figures['top1_agreement']:.1f} "
            f"| {figures['perplexity']:.3f} | {runs} |"
        )
    for by, what in (("weights", "by the weights' KL"), ("own", "as each program runs them")):
        lines += ["", f"Each peer's against the best of ours that has no more bits, {what}:", ""]
        lines += ["| peer | bits | KL | gristmill | bits | KL | lower |", "|---|--:|--:|---|--:|--:|---|"]
        for row in against(result, by):
            mine = (
                f"{row['ours']} | {row['our_bits']:.2f} | {row['our_kl']:.4f}" if row["ours"] else "none | | "
            )
            lower = "yes" if row["lower"] else "no"
            lines.append(f"| {row['peer']} | {row['bits']:.2f} | {row['kl']:.4f} | {mine} | {lower} |")
    if failed:
        lines += ["", "Without figures:", "", *(f"- {text}" for text in dict.fromkeys(failed))]
    return lines


def main() -> int:
    """Runs the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", help=f"names or files (default: of {', '.join(OURS)})")
    parser.add_argument("--group", type=int, action="append", help=f"groups to try (default {GROUPS})")
    parser.add_argument("--bits", type=int, action="append", default=[], help="bits to try, too")
    parser.add_argument("--only", action="append", default=[], help="peers' models whose name holds this")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write here, and no page")
    parser.add_argument("--no-peers", action="store_true", help="none of the peers' models")
    parser.add_argument(
        "--add", action="store_true", help="only what the file has no figures of, added to it"
    )
    parser.add_argument("--table", action="store_true", help="only write the page anew")
    arguments = parser.parse_args()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.0f} s] {text}", file=sys.stderr, flush=True)

    try:
        if arguments.table:
            result = read_object(OUT)
        else:
            sources = arguments.recipes or [n for n in OURS if (RECIPES / f"{n}.yaml").exists()]
            peers = [q for q in theirs() if not arguments.only or any(t in q.name for t in arguments.only)]
            file = arguments.json or OUT
            old = read_object(file) if arguments.add else None
            there = {row["name"] for row in old["quants"] if row["weights"]["figures"]} if old else set()
            quants = ours(sources, arguments.group or GROUPS, arguments.bits, there, say)
            quants += [peer for peer in peers if peer.name not in there and not arguments.no_peers]
            result = run(quants, tokens=arguments.tokens, threads=arguments.threads, say=say)
            if old:
                result = merged(old, result)
            file.write_text(json.dumps(result, indent=1) + "\n")
    except (SetupError, Refused, GristmillError) as error:
        print(f"quants: {error}", file=sys.stderr)
        return 1
    lines = table(result)
    if not arguments.json:
        PAGE.write_text(fill(PAGE.read_text(), "quants", lines))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
