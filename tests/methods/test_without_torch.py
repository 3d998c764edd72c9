"""What calibration made runs where PyTorch is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from gristmill import load
from gristmill.io.checkpoint import Checkpoint
from gristmill.methods.compress import compress
from gristmill.methods.recipe import Recipe
from tests.kits.recipes import CALIBRATION, speaking

# The first layer has a low-rank branch and integer rows, the second E4M3 rows, scaled keys and an int4 cache.
RECIPE = f"""{CALIBRATION}
methods:
- {{method: svdquant, rank: 4, grid: 0, iterations: 2, tensors: "*layers.0.*"}}
- {{method: fireq, top_k: 2, level: 1.0, smooth: [], tensors: "*layers.1.*"}}
"""
PROMPT = "Once upon a time"
CODE = """
import json, sys
for name in ("torch", "transformers"):
    sys.modules[name] = None  # an import of it fails
import gristmill
with gristmill.load(sys.argv[1], threads=1) as model:
    result = model.generate(sys.argv[2], raw=True, max_tokens=12, logprobs=3)
print(json.dumps([result.token_ids, [[one.logprob, one.top] for one in result.logprobs]]))
"""


def test_a_compressed_model_runs_without_torch(tmp_path: Path) -> None:
    compress(speaking(tmp_path), Recipe.from_yaml(RECIPE), tmp_path / "out", evaluate=False)
    program = Checkpoint.open(tmp_path / "out").program()
    assert {n.attributes["kind"] for n in program.nodes if n.op == "encode"} == {"int", "fp8"}
    for part in (".svd_down.weight", ".svd_up.weight", ".key_scale"):
        assert any(name.endswith(part) for name in program.weights), part
    assert "torch" in sys.modules  # here it calibrated
    with load(tmp_path / "out", threads=1) as model:
        result = model.generate(PROMPT, raw=True, max_tokens=12, logprobs=3)
    assert result.logprobs is not None
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "out"), PROMPT],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    ids, logprobs = json.loads(done.stdout)
    assert ids == result.token_ids
    assert logprobs == json.loads(json.dumps([[one.logprob, one.top] for one in result.logprobs]))
