"""Loads exported models elsewhere, in Transformers with the compressed-tensors package, and compares logits.

Of the demo model in 4- and 8-bit group integers, and after recipes: gristmill with exact activations and a
float32 KV cache against float32 Transformers, on the first tokens of the built-in text. Tells the largest
difference relative to the largest logit, and how often both find the same token most probable; fails above
1e-4. Writes `results/export.json` and the table of docs/compress.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from harness.environments import ensure
from harness.pages import fill
from harness.revision import commit, named

from gristmill.backends.native import NativeExecutor
from gristmill.evaluate.text import builtin_text
from gristmill.io.convert import prepare
from gristmill.io.export import export_compressed_tensors
from gristmill.io.tokenizer import Tokenizer
from gristmill.methods.compress import compress
from gristmill.methods.recipe import Recipe
from gristmill.program.batch import PROMPT, Batch

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "export.json"
PAGE = HERE.parent / "docs" / "compress.md"
TOKENS = 256
LIMIT = 1e-4
MODES = ("int4", "int8")
RECIPES = {
    "gptq, symmetric": "[{method: gptq, symmetric: true}]",
    "smoothquant_plus, then gptq in 4 bits and rtn in 8": """
- {method: smoothquant_plus, quantise: false, symmetric: true}
- {method: gptq, symmetric: true, tensors: ["*.self_attn.*", "*.gate_proj.*", "*.up_proj.*"]}
- {method: rtn, bits: 8, tensors: "*.down_proj.*"}
""",
    "awq, symmetric": "[{method: awq, symmetric: true}]",
}
ASK = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
ELSEWHERE = """
import sys, numpy, torch, transformers
model, ids, out = sys.argv[1:]
options = {"dtype": torch.float32, "attn_implementation": "eager"}
loaded = transformers.AutoModelForCausalLM.from_pretrained(model, **options)
with torch.no_grad():
    logits = loaded(torch.from_numpy(numpy.load(ids))[None], use_cache=False).logits[0]
numpy.save(out, logits.numpy())
"""


def ours(checkpoint: Path, ids: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocabulary] by gristmill."""
    with closing(NativeExecutor.load(checkpoint, activations="exact", kv_dtype="f32")) as executor:
        view = executor.allocate(len(ids))
        rows = np.arange(len(ids), dtype=np.int32)
        phases = np.full(len(ids), PROMPT, np.uint8)
        return executor.step(Batch(ids, np.array([len(ids)], np.int32), (view,), rows, phases))


def checkpoints(work: Path) -> Iterator[tuple[str, Path]]:
    """Names of what is exported, and where it lies."""
    for mode in MODES:
        yield mode, prepare("smollm2", mode)
    for number, (name, entries) in enumerate(RECIPES.items()):
        target = work / f"recipe{number}"
        recipe = Recipe.from_yaml(f"calibration: {{tokens: 2048}}\nmethods: {entries}", name)
        compress("smollm2", recipe, target, evaluate=False)
        yield name, target


def main() -> int:
    """The exit code."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    # vLLM's environment is the one with compressed-tensors.
    python = ensure("vllm", lambda text: print(text, file=sys.stderr))
    asked = [python, "-c", ASK, "transformers", "compressed-tensors"]
    versions = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, checkpoint in checkpoints(Path(folder)):
            out = Path(folder, "exported")
            export_compressed_tensors(checkpoint, out)
            ids = Tokenizer.load(checkpoint).encode(builtin_text().content[:4096])[:TOKENS]
            np.save(out / "ids.npy", np.array(ids, np.int64))
            command = [python, "-c", ELSEWHERE, out, out / "ids.npy", out / "logits.npy"]
            subprocess.run(command, check=True, capture_output=True)
            theirs, found = np.load(out / "logits.npy"), ours(checkpoint, np.array(ids, np.int32))
            error = float(np.max(np.abs(found - theirs)) / np.max(np.abs(theirs)))
            same = float(np.mean(found.argmax(1) == theirs.argmax(1)))
            print(f"{name}: largest difference {error:.1e} of the largest logit, same token {same:.1%}")
            rows.append({"name": name, "error": error, "same": same})
            shutil.rmtree(out)
    result = {**commit(HERE.parent), "tokens": TOKENS, "versions": versions, "results": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    PAGE.write_text(fill(PAGE.read_text(), "export", table(result)))
    return int(not all(row["error"] <= LIMIT for row in rows))


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown."""
    transformers, compressed = result["versions"]
    return [
        "",
        f"By `python benchmarks/export_check.py`, Transformers {transformers} with compressed-tensors "
        f"{compressed}, {result['tokens']} tokens, commit {named(result)}:",
        "",
        "| smollm2 | largest difference, of the largest logit | same token most probable |",
        "|---|--:|--:|",
        *(f"| {row['name']} | {row['error']:.1e} | {100 * row['same']:.1f} % |" for row in result["results"]),
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
