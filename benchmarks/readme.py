"""Fills the measured regions of README.md from the JSON files in `results/`; types nothing by itself.

`--demo` first runs `gristmill.demo` and the README's `gristmill generate`, and keeps what they print in
`results/demo.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import report
from harness.files import DEMO, LARGE
from harness.pages import fill
from harness.plan import TITLES

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
PLOT = "docs/peers.png"
GENERATE = ["generate", "smollm2", "What is a mill?", "--max-tokens", "40"]


def main() -> int:
    """Runs the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", action="store_true", help="run the demo first")
    arguments = parser.parse_args()
    if arguments.demo:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "demo.json").write_text(json.dumps(run_demo(), indent=1) + "\n")
    text = README.read_text()
    for name, lines in regions().items():
        text = fill(text, name, lines)
    README.write_text(text)
    return 0


def run_demo() -> dict[str, str]:
    """What the demo and one generation print, as plain text."""
    variables = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "110"}
    outputs = {}
    for name, command in (("demo", ["gristmill.demo"]), ("generate", ["gristmill", *GENERATE])):
        run = subprocess.run(
            [sys.executable, "-m", *command], env=variables, capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {run.stderr.strip().splitlines()[-1]}")
        outputs[name] = "\n".join(line.rstrip() for line in run.stdout.strip().splitlines())
    return outputs


def read(name: str) -> dict[str, Any] | None:
    """A result file; None if it was not made."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else None


def regions() -> dict[str, list[str]]:
    """The lines of every region that there are results for."""
    found: dict[str, list[str]] = {}
    demo, peers = read("demo"), read("peers")
    if demo:
        found["demo"] = ["```", *demo["demo"].splitlines(), "```"]
        found["generate"] = ["```", *demo["generate"].splitlines(), "```"]
    if peers:
        found["results"] = results(peers, read("quality"))
    return found


def results(peers: dict[str, Any], quality: dict[str, Any] | None) -> list[str]:
    """The comparison: machine, tables, plot, what is not comparable."""
    machine, settings = peers["machine"], peers["settings"]
    kernels = ", ".join(machine["features"])
    versions: dict[str, str] = {}
    for entry in peers["entries"]:
        if entry.get("versions"):
            # The engine's own package is the first one.
            package, version = next(iter(entry["versions"].items()))
            versions[TITLES[entry["engine"]]] = f"{package} {version}"
    threads, rounds, new = (settings[name] for name in ("threads", "rounds", "new_tokens"))
    note = (
        f"Decode is batch 1 with 512 tokens of context. Batch 16: prompts of 64 tokens and {new} new ones, "
        "prompts counted in; at 512 only the new tokens count. MB are the weights: in memory for gristmill, "
        "in the file for the others."
    )
    if quality:
        note += (
            " KL in nats and top-1 agreement are against the file dequantised to float32, over "
            f"{quality['tokens']} tokens."
        )
    lines = [
        f"SmolLM2-135M-Instruct (a Q4_1 GGUF file, whose codes `stored` keeps), {threads} threads of "
        f"{machine['cpu']} ({kernels}), {peers['date']}. Medians of {rounds} rounds in which all take turns; "
        "tokens/s over all sequences.",
        "",
        *report.speed_table(peers, quality),
        "",
        note,
    ]
    lines += ["", f"![tokens per second of every engine]({PLOT})"]
    large = [entry for entry in peers["entries"] if entry["model"] == LARGE]
    if large:
        lines += ["", *report.small_table(peers, large, "1 B random weights, tokens/s")]
    avx2 = [entry for entry in peers["entries"] if entry["isa"] == "avx2" and entry["model"] == DEMO]
    if avx2:
        lines += ["", *report.small_table(peers, avx2, "AVX2 forced, tokens/s")]
    lines += ["", "Versions: " + ", ".join(f"{name} ({package})" for name, package in versions.items()) + "."]
    lines += ["What the others cannot do, or do otherwise:", ""]
    lines += [f"- {TITLES[row['engine']]}: {row['what']}: {row['why']}." for row in peers["cannot"]]
    for entry in peers["entries"]:
        if entry["failure"]:
            lines.append(f"- {report.title(entry)} ({entry['model']}): {entry['failure']['reason']}.")
        lines += [
            f"- {report.title(entry)} ({entry['model']}), {name}: {row['reason']}."
            for name, row in entry["refused"].items()
        ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
