"""Bytes and operations against numbers worked out by hand, and the table that shows them."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from gristmill.errors import UsageError
from gristmill.models import build_program
from gristmill.program.costs import Work, parameters, state_bytes, step_costs, sum_costs, weight_total
from gristmill.program.nodes import State
from gristmill.program.render import render
from tests.kits import files

# hidden 256, ff 512, 2 layers, 4 heads of 64 on 2 kv heads, vocabulary 272, window 24.
LLAMA = build_program(files.config("llama"))
MISTRAL = build_program(files.config("mistral"))
MATRICES = 256 * 256 + 2 * 128 * 256 + 256 * 256 + 3 * 256 * 512


def test_decode_by_hand() -> None:
    costs = step_costs(LLAMA, Work.decode(3, 10), kv_dtype="bf16")
    q = costs["layers.0.self_attn.q_proj"]
    assert q.operations == 2 * 3 * 256 * 256
    assert q.weight_bytes == 4 * 256 * 256
    assert q.buffer_bytes == 4 * 3 * (256 + 256)
    attention = costs["layers.0.self_attn.attention"]
    # Each of 3 tokens sees 11 keys: a product with the query and one with the value.
    assert attention.operations == 3 * 4 * 64 * 11 * 2 * 2
    assert attention.state_bytes_read == 3 * 11 * 2 * 2 * 64 * 2
    assert attention.state_bytes_written == 3 * 2 * 2 * 64 * 2
    assert attention.weight_bytes == 0
    assert costs["embed_tokens"].weight_bytes == 4 * 3 * 256  # three rows of the table
    assert costs["lm_head"].weight_bytes == 4 * 272 * 256
    assert costs["lm_head"].operations == 2 * 3 * 272 * 256
    total = sum_costs(costs)
    norms = 5 * 256
    assert total.weight_bytes == 4 * (2 * MATRICES + norms + 3 * 256 + 272 * 256)
    assert total.memory_bytes == total.weight_bytes + 2 * (
        attention.state_bytes_read + attention.state_bytes_written
    )


def test_prefill_by_hand() -> None:
    costs = step_costs(LLAMA, Work.prefill(7, context=5), kv_dtype="f32")
    attention = costs["layers.1.self_attn.attention"]
    assert attention.operations == 4 * 4 * 64 * sum(range(6, 13))
    assert attention.state_bytes_read == 12 * 2 * 2 * 64 * 4
    assert attention.state_bytes_written == 7 * 2 * 2 * 64 * 4
    assert costs["layers.0.mlp.up_proj"].operations == 2 * 7 * 256 * 512
    assert costs["lm_head"].operations == 2 * 1 * 272 * 256  # one row


@pytest.mark.parametrize(
    ("length", "context"), [(1, 5), (1, 23), (1, 24), (1, 90), (60, 0), (30, 20), (30, 60)]
)
def test_windows_by_counting(length: int, context: int) -> None:
    work = Work((length,), (context,), 1)
    seen = [range(max(0, p - 24 + 1), p + 1) for p in range(context, context + length)]
    assert work.visible(24) == sum(len(keys) for keys in seen)
    state = State("s", "n", "window", {"k": (1,)}, 24)
    assert work.touched(state) == (len(set().union(*seen)), length)
    costs = step_costs(MISTRAL, work)
    assert costs["layers.0.self_attn.attention"].operations == 4 * 4 * 64 * sum(len(keys) for keys in seen)


def test_idle_sequences_cost_nothing() -> None:
    busy = step_costs(LLAMA, Work((2,), (9,), 2))
    assert sum_costs(step_costs(LLAMA, Work((0, 2, 0), (50, 9, 70), 2))) == sum_costs(busy)


def test_totals() -> None:
    assert parameters(LLAMA) == 2 * MATRICES + 5 * 256 + 2 * 272 * 256
    assert weight_total(LLAMA) == 4 * parameters(LLAMA)
    tied = build_program(files.config("llama", tie_word_embeddings=True))
    assert parameters(tied) == parameters(LLAMA) - 272 * 256
    assert weight_total(tied, lambda name: 1.0) == len(tied.weights)
    assert state_bytes(LLAMA, 100) == 100 * 2 * 2 * 2 * 64 * 2
    assert state_bytes(MISTRAL, 100) == 24 * 2 * 2 * 2 * 64 * 2


def test_codes_of_keys_count_with_their_scales() -> None:
    # Of a head of 64: 32 bytes of codes and one scale.
    assert state_bytes(LLAMA, 100, "int4") == 100 * 2 * 2 * 2 * (32 + 2)
    attention = step_costs(LLAMA, Work.decode(3, 10), kv_dtype="int4")["layers.0.self_attn.attention"]
    assert attention.state_bytes_read == 3 * 11 * 2 * 2 * (32 + 2)
    assert attention.state_bytes_written == 3 * 2 * 2 * (32 + 2)


def test_stored_bytes_replace_float32() -> None:
    stored = dict.fromkeys(LLAMA.weights, 100.0)
    costs = step_costs(LLAMA, Work.decode(1, 0), stored)
    assert costs["layers.0.mlp.up_proj"].weight_bytes == 100
    assert costs["embed_tokens"].weight_bytes == pytest.approx(100 / 272)


def test_rendering_sums_up_and_is_json() -> None:
    formats = {name: "int4" if "layers.0" in name else "bf16" for name in LLAMA.weights}
    table = render(LLAMA, Work.decode(2, 8), formats=formats, kv_dtype="f32")
    single = render(LLAMA, Work.decode(2, 8), formats=formats, kv_dtype="f32", collapse=False)
    assert table.total == single.total
    assert table.total.operations == sum(row.cost.operations for row in table.rows)
    assert len(single.rows) == len(LLAMA.nodes) == table.nodes == sum(row.count for row in table.rows)
    names = [row.name for row in table.rows]
    # The layers' formats differ, so only nodes without weights share a row.
    assert "layers.0.self_attn.q_proj" in names
    assert "layers.1.self_attn.q_proj" in names
    assert "layers.0-1.self_attn.attention" in names
    q = table.rows[names.index("layers.0.self_attn.q_proj")]
    assert (q.weights, q.outputs, q.formats) == ("[256, 256]", "[tokens, 256]", "int4")
    attention = table.rows[names.index("layers.0-1.self_attn.attention")]
    assert "per_token" in attention.details
    assert "theta 10000" in attention.details
    assert table.state_bytes_per_token == 2 * 2 * 2 * 64 * 4
    data = json.loads(json.dumps(asdict(table)))
    assert data["rows"][0]["name"] == "embed_tokens"
    assert data["digest"] == LLAMA.digest()


def test_rendering_of_the_lowered_level() -> None:
    semantic, lowered = render(LLAMA), render(LLAMA, level="lowered")
    assert (semantic.level, lowered.level) == ("semantic", "lowered")
    assert {"linears", "gated_linears", "add_rmsnorm", "rope"} <= {row.op for row in lowered.rows}
    assert lowered.total.weight_bytes == semantic.total.weight_bytes
    assert lowered.total.buffer_bytes < semantic.total.buffer_bytes
    with pytest.raises(UsageError, match="level"):
        render(LLAMA, level="native")
