"""Loads exported models elsewhere, in Transformers with the compressed-tensors package, and compares logits.

Of the demo model in 4- and 8-bit group integers: gristmill with exact activations and a float32 KV cache
against float32 Transformers, on the first tokens of the built-in text. Prints the largest difference relative
to the largest logit, and how often both find the same token most probable; fails above 1e-4.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
from harness.environments import ensure

from gristmill.backends.native import NativeExecutor
from gristmill.evaluate.text import builtin_text
from gristmill.io.convert import prepare
from gristmill.io.export import export_compressed_tensors
from gristmill.io.tokenizer import Tokenizer
from gristmill.program.batch import PROMPT, Batch

TOKENS = 256
LIMIT = 1e-4
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


def main() -> int:
    """The exit code."""
    # vLLM's environment is the one with compressed-tensors.
    python = ensure("vllm", lambda text: print(text, file=sys.stderr))
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for weights in ("int4", "int8"):
            checkpoint, out = prepare("smollm2", weights), Path(folder, weights)
            export_compressed_tensors(checkpoint, out)
            ids = Tokenizer.load(checkpoint).encode(builtin_text().content[:4096])[:TOKENS]
            np.save(out / "ids.npy", np.array(ids, np.int64))
            command = [python, "-c", ELSEWHERE, out, out / "ids.npy", out / "logits.npy"]
            subprocess.run(command, check=True, capture_output=True)
            theirs, found = np.load(out / "logits.npy"), ours(checkpoint, np.array(ids, np.int32))
            error = float(np.max(np.abs(found - theirs)) / np.max(np.abs(theirs)))
            same = float(np.mean(found.argmax(1) == theirs.argmax(1)))
            print(f"{weights}: largest difference {error:.1e} of the largest logit, same token {same:.1%}")
            worst = max(worst, error)
    return int(not worst <= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
