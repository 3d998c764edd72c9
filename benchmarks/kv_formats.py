"""Decoding with keys and values in every format, at long contexts: attention, whole steps, bytes.

One sequence of the demo model in int4; all formats take turns. Writes `results/kv_formats.json` and the table
of docs/methods/comet.md. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from harness.pages import fill
from harness.revision import commit, named

from gristmill import inspect
from gristmill.backends.native import NativeExecutor
from gristmill.bench.host import load_average, machine
from gristmill.bench.measure import Sequences
from gristmill.io.convert import prepare

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "kv_formats.json"
PAGE = HERE.parent / "docs" / "methods" / "comet.md"
FORMATS = ("bf16", "int4", "int4-channel")
CONTEXTS = (1024, 4096, 8064)  # the model's limit is 8,192
STEPS = 32
BUDGET, TOKENS = 1 << 30, 2048


def main() -> int:
    """Runs the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="turns (default 7)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only write the page anew")
    arguments = parser.parse_args()
    if not arguments.table:
        RESULTS.write_text(json.dumps(measure(arguments.repeats, arguments.threads), indent=1) + "\n")
    lines = table(json.loads(RESULTS.read_text()))
    PAGE.write_text(fill(PAGE.read_text(), "kv", lines))
    print("\n".join(lines))
    return 0


def measure(repeats: int, threads: int) -> dict[str, Any]:
    """Medians over the turns: milliseconds of a step, and of its attention nodes, by context and format."""
    about = {**commit(HERE.parent), "machine": machine(), "load_average": load_average()}
    found: dict[tuple[int, str], tuple[list[float], list[float]]] = {}
    with ExitStack() as stack:
        running = {}
        for name in FORMATS:
            executor = NativeExecutor.load(prepare("smollm2", "int4"), kv_dtype=name, threads=threads)
            stack.callback(executor.close)
            sequences = Sequences(executor, 1, max(CONTEXTS) + STEPS)
            stack.callback(sequences.close)
            running[name] = executor, sequences
        for context in CONTEXTS:
            for _, sequences in running.values():
                sequences.prefill(context)
                sequences.decode(context, STEPS)
            for turn in range(repeats):
                for name, (executor, sequences) in running.items():
                    print(f"{context} tokens, turn {turn + 1} of {repeats}: {name}", file=sys.stderr)
                    steps, attention = found.setdefault((context, name), ([], []))
                    steps.append(sequences.decode(context, STEPS))
                    executor.profile(True)
                    sequences.decode(context, STEPS)
                    attention.append(sum(s for n, s in executor.node_times() if n.endswith(".attention")))
                    executor.profile(False)
    per_token = inspect.run("smollm2")["kv_bytes_per_token"]
    rows = [
        {
            "context": context,
            "format": name,
            "step_ms": 1e3 * median(steps) / STEPS,
            "attention_ms": 1e3 * median(attention) / STEPS,
            "bytes_per_token": per_token[name],
        }
        for (context, name), (steps, attention) in found.items()
    ]
    return {**about, "threads": threads, "repeats": repeats, "results": rows}


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown."""
    rows = result["results"]
    base = {row["context"]: row for row in rows if row["format"] == FORMATS[0]}
    lines = [
        "",
        f"By `python benchmarks/kv_formats.py`: smollm2 in int4, one sequence, {result['threads']} threads "
        f"of {result['machine']['cpu']}, medians of {result['repeats']} turns, commit {named(result)}. "
        f"Ratios are to bf16.",
        "",
        f"| keys and values | bytes a token | sequences of {TOKENS:,} in 1 GiB "
        + "".join(f"| attention at {c:,}, ms | step, ms " for c in base)
        + "|",
        "|---|--:|--:" + "|--:|--:" * len(base) + "|",
    ]
    for name in FORMATS:
        mine = [row for row in rows if row["format"] == name]
        nbytes = mine[0]["bytes_per_token"]
        cells = [name, f"{nbytes:,} ({nbytes / rows[0]['bytes_per_token']:.2f})"]
        cells.append(f"{BUDGET // (nbytes * TOKENS)}")
        for row in mine:
            for key in ("attention_ms", "step_ms"):
                cells.append(f"{row[key]:.2f} ({row[key] / base[row['context']][key]:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
