"""The bytes of the roofline, against the demo model worked out by hand."""

from __future__ import annotations

import pytest

from gristmill.bench.roofline import bandwidth_probe, decode_cost, prefill_cost
from gristmill.bench.subject import Subject

# SmolLM2-135M: 30 layers of 576, 9 heads and 3 KV heads of 64, feed-forward 1536, 49152 tied embeddings.
BODY = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)
HEAD = 49152 * 576
NORMS = 4 * 61 * 576
KV_PER_TOKEN = 30 * 2 * 3 * 64


@pytest.fixture(scope="module")
def stored():
    with Subject.load("smollm2", threads=1) as subject:
        yield subject


def test_stored_weights_are_what_the_file_holds(stored):
    # Q4_1: 4-bit codes, an f16 scale and minimum per 32; Q8_0 head: 8-bit codes and an f16 scale per 32.
    body, head = BODY * (4 + 32 / 32) / 8, HEAD * (8 + 16 / 32) / 8
    assert stored.weight_bytes == body + head + NORMS == 96_576_768
    assert stored.parameters == BODY + HEAD + NORMS / 4 == 134_515_008
    assert stored.bits_per_weight == pytest.approx(8 * (body + head) / (BODY + HEAD))
    assert stored.head() == "int8"
    tiles = stored.executor.level.startswith("amx")
    assert stored.modes()["arithmetic"] == ("int8 (prompts bf16)" if tiles else "int8")


@pytest.mark.parametrize(("batch", "context", "steps"), [(1, 512, 1), (1, 0, 3), (16, 64, 64)])
def test_decode_reads_weights_once_and_the_keys_in_reach(stored, batch, context, steps):
    cost = decode_cost(
        stored.executor.program,
        batch,
        context,
        steps,
        weight_bytes=stored.stored_bytes,
        kv_dtype="bf16",
    )
    row = 576 * 8.5 / 8  # of the embedding, which is read as a whole for the head
    assert cost.weight_bytes == pytest.approx(steps * (96_576_768 + batch * row))
    held = sum(context + step + 1 for step in range(steps))
    assert cost.state_bytes_read == batch * held * KV_PER_TOKEN * 2
    assert cost.state_bytes_written == batch * steps * KV_PER_TOKEN * 2
    assert cost.memory_bytes == cost.weight_bytes + cost.state_bytes_read + cost.state_bytes_written


def test_prefill_counts_two_operations_per_weight_and_token(stored):
    one = prefill_cost(stored.executor.program, 512, 512, weight_bytes=stored.stored_bytes).operations
    # Only the last row goes through the head; attention: 2 products of 64 per key in reach, 9 heads.
    linear = 2 * 512 * BODY + 2 * HEAD
    attention = 2 * 2 * 64 * 9 * 30 * (512 * 513 / 2)
    assert one == pytest.approx(linear + attention, rel=0.02)
    assert one >= linear + attention
    cut = prefill_cost(stored.executor.program, 512, 100, weight_bytes=stored.stored_bytes).operations
    assert cut == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize(("weights", "bits", "head"), [("int4", 4.5, "int4"), ("int8", 8.25, "int8")])
def test_requantised_weights_have_the_bits_of_their_format(weights, bits, head):
    with Subject.load("smollm2", weights=weights, threads=1) as subject:
        assert subject.bits_per_weight == pytest.approx(bits)
        assert subject.head() == head
        assert subject.weight_bytes == (BODY + HEAD) * bits / 8 + NORMS


def test_the_probe_answers_with_a_rate():
    rate = bandwidth_probe("portable", 1)(1 << 22)
    assert 0 < rate < 1e15
