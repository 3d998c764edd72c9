"""The stream against whole steps of the executor: values, replaced weights, replays, what is held."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gristmill.backends.reference import ReferenceExecutor
from gristmill.calibrate.stream import Stream
from gristmill.errors import UsageError
from gristmill.models import build_program
from gristmill.program.edits import round_inputs
from gristmill.program.passes import lower
from gristmill.program.render import LOWERING
from tests.kits import files, models

NAMES = ["llama-smollm2", "qwen2", "qwen3", "gemma3-linear"]
LENGTHS = [40, 1, 33]  # beyond the sliding windows of 24


def make(name: str = "llama", dtype: str = "float64") -> ReferenceExecutor:
    of = models.configs()[name]
    return ReferenceExecutor(build_program(of), files.weights(of), dtype=dtype)


def sequences(executor: ReferenceExecutor) -> list[NDArray[np.int32]]:
    return [models.tokens(n, executor.vocab_size, seed=n) for n in LENGTHS]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lowered", [False, True])
def test_every_buffer_is_what_a_step_computes(name: str, lowered: bool) -> None:
    executor = make(name)
    ids = sequences(executor)
    if lowered:
        program = lower(executor.program, LOWERING)
        executor = ReferenceExecutor(program, executor.weights, dtype="float64")
    names = list(executor.program.buffers)
    with executor.tap(*names) as taps:
        expected = [models.logits(executor, one, [len(one)]) for one in ids]
    stream = Stream(executor, ids)
    assert stream.tokens == sum(LENGTHS)
    seen = 0
    for node in stream:
        for i, buffer in enumerate(node.inputs):
            assert same(stream.inputs(node, i), taps[buffer])
            seen += 1
    assert seen == sum(len(node.inputs) for node in executor.program.nodes)
    for logits, whole in zip(stream.output(), expected, strict=True):
        assert np.array_equal(logits.to(torch.float32).numpy(), whole)


@pytest.mark.parametrize("limit", [0, 30_000])
def test_what_memory_does_not_hold_lies_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    executor = make("llama-smollm2", "float32")
    ids = [*sequences(executor), *sequences(executor)]
    with executor.tap(*executor.program.buffers) as taps:
        expected = [models.logits(executor, one, [len(one)]) for one in ids]
    opened = []
    monkeypatch.setattr("gristmill.calibrate.stream.IN_MEMORY", limit)
    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **a: (opened.append(a["dir"]), real(**a))[1])
    stream = Stream(executor, ids, tmp_path)
    for i, node in enumerate(stream):
        assert sum(stream._resident.values()) <= limit
        assert not list(tmp_path.iterdir())  # no names, whatever happens to the process
        for j, buffer in enumerate(node.inputs):
            assert same(stream.inputs(node, j), taps[buffer])
        if i == 20:
            rest = stream.fork(executor)
    for found in (stream.output(), rest.run_to_end()):
        for logits, whole in zip(found, expected, strict=True):
            assert np.array_equal(logits.numpy(), whole)
    assert set(opened) == {tmp_path}
    with pytest.raises(FileNotFoundError):
        Stream(executor, ids, tmp_path / "gone").run_to_end()


def test_files_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One per buffer, however many sequences there are."""
    monkeypatch.setattr("gristmill.calibrate.stream.IN_MEMORY", 0)
    executor = make("llama-smollm2", "float32")
    stream = Stream(executor, [models.tokens(2, executor.vocab_size, seed=i) for i in range(40)], tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for node in stream:
        assert len(os.listdir("/proc/self/fd")) <= before + len(stream._held) + 3
        if node.op == "attention":
            found = stream.evaluate(node)
            assert len(found) == 40
    assert len(stream.output()) == 40


def test_a_buffer_is_held_from_its_writer_to_its_last_reader() -> None:
    executor = make("gemma3-linear")
    program = executor.program
    stream = Stream(executor, sequences(executor))
    done: set[str] = set()
    for at, node in enumerate(stream):
        wanted = {name for later in program.nodes[at:] for name in later.inputs}
        assert set(stream._held) == done & wanted
        done.update(node.outputs)
    assert set(stream._held) == {program.output}


def test_later_nodes_see_replaced_weights_and_earlier_ones_do_not() -> None:
    executor, other = make(), make()
    ids = sequences(executor)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    for node in (stream := Stream(executor, ids)):
        if set(node.weights) & set(names):
            executor.weights[node.weights[0]] = executor.weights[node.weights[0]] * 0.5
        if node.op == "linear":
            # Everything before the node is done: this changes nothing.
            executor.weights["model.embed_tokens.weight"] = torch.zeros_like(
                executor.weights["model.embed_tokens.weight"]
            )
    for name in names:
        other.weights[name] = other.weights[name] * 0.5
    assert same(stream.output(), Stream(other, ids).run_to_end())


def test_a_loop_left_early_goes_on_where_it_was() -> None:
    executor = make()
    stream = Stream(executor, sequences(executor))
    for node in stream:
        if node.name == "layers.1.mlp.gate_proj":
            break
    with pytest.raises(UsageError, match="lm_head"):
        stream.output()
    assert next(iter(stream)).name == "layers.1.mlp.gate_proj"
    assert same(stream.run_to_end(), Stream(executor, sequences(executor)).run_to_end())


def test_replays_commit_nothing() -> None:
    executor = make("qwen3")
    program, ids = executor.program, sequences(executor)
    plain = Stream(executor, ids)
    spans = {
        "layers.1.self_attn.q_proj": "layers.1.self_attn.o_proj",
        "layers.1.mlp.gate_proj": "layers.1.mlp.residual",
    }
    with executor.tap(*spans.values()) as taps:
        for one in ids:
            models.logits(executor, one, [len(one)])
    replayed = 0
    for node in plain:
        if node.name in spans:
            last = program.node(spans[node.name])
            assert same(plain.evaluate_span(node, last), taps[last.name])
            halved = {name: executor.weights[name] / 2 for name in node.weights}
            assert not same(plain.evaluate_span(node, last, halved), taps[last.name])
            doubled = plain.evaluate(node, {node.weights[0]: executor.weights[node.weights[0]] * 2})
            assert same([x / 2 for x in doubled], plain.evaluate(node))
            replayed += 1
    assert replayed == 2
    for i, logits in enumerate(plain.output()):
        assert np.array_equal(
            logits.to(torch.float32).numpy(), models.logits(executor, ids[i], [len(ids[i])])
        )


def test_spans_that_cannot_run_are_refused() -> None:
    executor = make()
    program = executor.program
    for node in (stream := Stream(executor, sequences(executor))):
        if node.name == "layers.0.self_attn.o_proj":
            with pytest.raises(UsageError, match=r"layers\.0\.input_layernorm"):
                stream.evaluate(program.node("layers.0.self_attn.q_proj"))
            with pytest.raises(UsageError, match=r"layers\.1\.mlp\.gated"):
                stream.inputs(program.node("layers.1.mlp.down_proj"))
            with pytest.raises(UsageError, match="does not come after"):
                stream.evaluate_span(node, program.node("layers.0.self_attn.attention"))
            break
    else:
        pytest.fail("o_proj was not reached")


def test_a_sequence_does_not_depend_on_the_others() -> None:
    executor = make("gemma3", "float32")
    ids = sequences(executor)
    together = Stream(executor, ids).run_to_end()
    assert same(together, [Stream(executor, [one]).run_to_end()[0] for one in ids])
    assert not any(logits.requires_grad for logits in together)


def test_bad_sequences_are_refused() -> None:
    executor = make()
    for ids, message in [([], "at least one sequence"), ([[]], "at least one token"), ([[272]], "272")]:
        with pytest.raises(UsageError, match=message):
            Stream(executor, ids)


def test_a_fork_goes_on_with_another_program() -> None:
    """From the node at hand on, bit for bit as from the start; the stream itself is not disturbed."""
    executor = make("llama-smollm2")
    ids = sequences(executor)
    program = round_inputs(executor.program, ["layers.1.self_attn.o_proj"], group=32, bits=[4])
    other = ReferenceExecutor(program, executor.weights, dtype="float64")
    expected, plain = Stream(other, ids).run_to_end(), Stream(executor, ids).run_to_end()
    assert not same(expected, plain)
    stream = Stream(executor, ids)
    for node in stream:
        if node.name == "layers.1.self_attn.o_proj":
            assert same(stream.fork(other).run_to_end(), expected)
            assert same(stream.fork(executor).run_to_end(), plain)
        elif node.name == "layers.1.mlp.gate_proj":
            with pytest.raises(UsageError, match="begins with the same nodes"):
                stream.fork(other)
    assert same(stream.output(), plain)
