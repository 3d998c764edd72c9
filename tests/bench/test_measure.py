"""The benchmark's dictionary, its shapes, and what its clock goes around. No times are asserted."""

from __future__ import annotations

import json
import platform
import re

import numpy as np
import pytest

from gristmill import bench
from gristmill.bench import host
from gristmill.bench.measure import Sequences
from gristmill.errors import UsageError
from gristmill.program.batch import GENERATED, PROMPT

SHAPES = {"prefill": (5, 9), "decode": ((1, 6), (3, 4)), "repeats": 2, "decode_steps": 3, "threads": 1}


@pytest.fixture(scope="module")
def result():
    seen = []
    found = bench.run("smollm2", **SHAPES, progress=lambda label, done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)
    return found


def test_it_holds_what_is_promised(result):
    assert {"machine", "model", "modes", "prefill", "decode"} <= result.keys()
    assert {"load_s", "first_token_s", "peak_rss_bytes", "weight_bytes"} <= result.keys()
    assert json.loads(json.dumps(result)) == result
    assert [row["tokens"] for row in result["prefill"]] == [5, 9]
    assert [(row["batch"], row["context"]) for row in result["decode"]] == [(1, 6), (3, 4)]
    for row in result["prefill"] + result["decode"]:
        assert row["tokens_per_s"] > 0
        assert len(row["runs_s"]) == 2
    assert result["decode"][0]["generate_tokens_per_s"] > 0
    assert "generate_tokens_per_s" not in result["decode"][1]
    assert result["weight_bytes"] == 96_576_768
    assert result["peak_rss_bytes"] > result["weight_bytes"]
    assert result["modes"]["weights_in"] in ("arena", "mapped file")
    assert result["modes"]["threads"] == 1
    assert result["model"] == {"name": "smollm2", "parameters": 134_515_008, "context": 8192}


def test_the_fraction_is_bytes_over_bandwidth_over_time(result):
    for row in result["decode"]:
        seconds = sorted(row["runs_s"])
        step = sum(seconds) / 2 / row["new_tokens"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / step)
        bound = row["bytes_per_step"] / row["bandwidth_bytes_per_s"]
        assert row["roofline_fraction"] == pytest.approx(bound / step)
    # Mean KV of three steps after four tokens, three sequences, bf16; a token is 23,040 bytes.
    weights = 96_576_768 + 3 * 576 * 8.5 / 8
    assert result["decode"][1]["bytes_per_step"] == pytest.approx(weights + 3 * (6 + 1) * 23_040)


def test_the_tables_show_the_figures(result):
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(bench.render(result))
    shown = console.export_text()
    for text in ("smollm2", "96.6 MB", "prefill 9", "decode 3 x 4", "activations fast", "KV bf16"):
        assert text in shown, text
    assert f"{100 * result['decode'][0]['roofline_fraction']:.0f} %" in shown


def test_the_machine_is_described_without_naming_it(result):
    machine = result["machine"]
    assert machine["memory_bytes"] > 1 << 28
    assert machine["usable_cpus"] >= 1
    assert machine["level"] in machine["levels"]
    text = json.dumps(machine)
    assert not re.search(rf"\b{re.escape(platform.node())}\b", text) or len(platform.node()) < 3
    # "Linux 6.1", "AMD EPYC 9B14": no value is a path.
    assert not re.search(r'"/', text)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prefill": (0,)}, "at least 1 token"),
        ({"decode": ((0, 5),)}, "at least 1"),
        ({"repeats": 0}, "at least one repeat"),
        ({"prefill": (8193,)}, "8193 tokens are more than the model's context of 8192"),
        ({"decode": ((1, 8190),)}, "8193 tokens are more"),
        ({"threads": 0}, "threads"),
    ],
)
def test_shapes_out_of_range_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        bench.run("smollm2", **{**SHAPES, **wrong})


class View:
    def __init__(self, capacity: int, keeps: int) -> None:
        self.capacity, self.length, self.keeps, self.closed = capacity, 0, keeps, False
        self.tokens: list[int] = []

    def truncate(self, length: int) -> None:
        if length and self.length - length > self.keeps:
            raise UsageError("the window has moved on")
        self.length = length
        del self.tokens[length:]

    def close(self) -> None:
        self.closed = True

    def nbytes(self) -> int:
        return 0


class Recorder:
    """An executor whose next token is the last one plus 1; it remembers the steps."""

    program = None
    vocab_size = 100

    def __init__(self, keeps: int = 1000) -> None:
        self.keeps = keeps
        self.steps: list[tuple[list[int], set[int], int]] = []

    def allocate(self, capacity: int) -> View:
        return View(capacity, self.keeps)

    def step(self, batch, cancel=None) -> np.ndarray:
        batch.check(self.vocab_size)
        self.steps.append((batch.lengths.tolist(), set(batch.phases.tolist()), len(batch.logit_rows)))
        starts = np.cumsum(batch.lengths) - batch.lengths
        for view, start, count in zip(batch.views, starts, batch.lengths, strict=True):
            view.tokens += batch.tokens[start : start + count].tolist()
            view.length += int(count)
        logits = np.zeros((len(batch.logit_rows), self.vocab_size), np.float32)
        logits[np.arange(len(logits)), (batch.tokens[batch.logit_rows] + 1) % self.vocab_size] = 1
        return logits

    def close(self) -> None:
        pass


@pytest.mark.parametrize("keeps", [1000, 2])
def test_every_turn_decodes_the_same_tokens_from_the_same_context(keeps):
    executor = Recorder(keeps)
    sequences = Sequences(executor, 2, 12)
    sequences.decode(7, 5)
    first = [list(view.tokens) for view in sequences._views]
    executor.steps.clear()
    sequences.decode(7, 5)
    assert [view.tokens for view in sequences._views] == first
    assert [len(tokens) for tokens in first] == [12, 12]
    assert all(tokens[i + 1] == (tokens[i] + 1) % 100 for tokens in first for i in range(6, 11))
    prompts = [step for step in executor.steps if PROMPT in step[1]]
    # Where the state cannot be shortened any more, the prompt is run again, outside the clock.
    assert prompts == ([] if keeps == 1000 else [([7], {PROMPT}, 1)] * 2)
    assert executor.steps[-5:] == [([1, 1], {GENERATED}, 2)] * 5
    sequences.close()
    assert all(view.closed for view in sequences._views)


def test_long_prompts_are_cut_and_only_the_last_row_is_asked_for(monkeypatch):
    monkeypatch.setattr("gristmill.bench.measure.chunk_tokens", lambda: 4)
    executor = Recorder()
    sequences = Sequences(executor, 1, 10)
    sequences.prefill(10)
    assert executor.steps == [([4], {PROMPT}, 0), ([4], {PROMPT}, 0), ([2], {PROMPT}, 1)]
    sequences.prefill(8)
    assert sequences._views[0].length == 8
    assert executor.steps[-1] == ([4], {PROMPT}, 1)


def test_peak_memory_only_grows():
    before = host.peak_rss_bytes()
    block = np.ones(1 << 23)
    assert host.peak_rss_bytes() >= before
    assert host.peak_rss_bytes() > block.nbytes
