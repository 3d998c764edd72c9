"""gristmill's own worker, as the benchmark runs it, on the demo model."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest
from harness import files, remote
from harness.environments import HERE
from harness.remote import Remote, choose_cpus

from gristmill.io.hub import demo_model_path

IDS = [504, 476, 3391, 18, 4814, 198, 16540, 5398, 828, 198, 46923, 7868, 359, 253, 11541, 970]


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    saved, remote.LOGS = remote.LOGS, tmp_path_factory.mktemp("logs")
    script = HERE / "workers" / "gristmill_worker.py"
    variables = {**files.variables(1), "GRISTMILL_ISA": "portable"}
    if "GRISTMILL_CACHE" in os.environ:
        variables["GRISTMILL_CACHE"] = os.environ["GRISTMILL_CACHE"]
    started = Remote("gristmill", sys.executable, script, variables, choose_cpus(1))
    loaded = started.ask(
        {
            "op": "load",
            "model": str(demo_model_path()),
            "mode": "stored",
            "threads": 1,
            "options": {"activations": "exact", "kv_dtype": "f32"},
        }
    )
    yield started, loaded
    started.close()
    remote.LOGS = saved


def test_it_says_how_it_runs(worker):
    _, loaded = worker
    note = loaded["notes"][0]
    for part in ("activations exact", "kv_dtype f32", "threads 1", "level portable"):
        assert part in note
    assert loaded["weights_bytes"] == 96_576_768


def test_every_operation_answers(worker):
    started, _ = worker
    assert started.ask({"op": "prefill", "prompt": IDS})["seconds"] > 0
    prompts = [IDS[:8], IDS[8:]]
    reply = started.ask({"op": "decode", "prompts": prompts, "new_tokens": 4})
    assert reply["tokens"] == 2 * 3
    assert started.ask({"op": "generate", "prompts": prompts, "new_tokens": 2})["tokens"] == 4
    found = started.ask({"op": "roofline", "batch": 1, "context": 8, "new_tokens": 3})
    # All weights but the embedding's unread rows, and some keys and values.
    assert 90e6 < found["bytes_per_step"] < 110e6
    assert found["bytes_per_second"] > 1e8


def test_continuations_follow_the_logits(worker, tmp_path):
    started, _ = worker
    reply = started.ask({"op": "continue", "prompts": [IDS], "new_tokens": 3})
    ids = reply["ids"][0]
    assert len(ids) == 3
    assert isinstance(reply["texts"][0], str)
    output = tmp_path / "x.npy"
    started.ask({"op": "logits", "tokens": [*IDS, *ids], "output": str(output)})
    logits = np.load(output)
    assert logits.shape == (len(IDS) + 3, 49152)
    assert logits[len(IDS) - 1 : -1].argmax(-1).tolist() == ids
