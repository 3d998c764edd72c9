"""Formats of keys and values: who names them, what they take, and what programs may say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gristmill.errors import UsageError
from gristmill.models import build_program
from gristmill.program.builder import Builder
from gristmill.program.checker import check
from gristmill.program.kv import KV_FORMATS, kv_bytes, kv_formats
from gristmill.program.nodes import Program, ProgramError
from tests.kits import files

PROGRAM = build_program(files.config("llama"))
STATES = list(PROGRAM.states)


def with_format(name: str, kv_format: object) -> Program:
    return PROGRAM.with_nodes(
        tuple(
            replace(n, attributes={**n.attributes, "kv_format": kv_format}) if n.name == name else n
            for n in PROGRAM.nodes
        )
    )


def test_bytes_count_codes_and_scales() -> None:
    assert kv_bytes([(2, 64)], "f32", 10) == 10 * 2 * 64 * 4
    assert kv_bytes([(2, 64)], "bf16", 10) == 10 * 2 * 64 * 2
    # 4 bits and a 16-bit scale per 64: 4.25 bits per number.
    assert kv_bytes([(2, 64), (2, 64)], "int4", 10) == 10 * 4 * 64 * 4.25 / 8
    assert kv_bytes([(3, 208)], "int4") == 3 * (104 + 2 * 2)


def test_the_caller_overrides_the_program() -> None:
    assert set(kv_formats(PROGRAM).values()) == {"bf16"}
    own = check(with_format("layers.1.self_attn.attention", "int4"))
    assert list(kv_formats(own).items()) == [(STATES[0], "bf16"), (STATES[1], "int4")]
    for kv_format in KV_FORMATS:
        assert kv_formats(own, kv_format) == dict.fromkeys(STATES, kv_format)
    with pytest.raises(UsageError, match=r"kv_dtype must be one of f32, bf16, int4.*, not 'int3'"):
        kv_formats(PROGRAM, "int3")


def test_programs_without_the_attribute_stay_as_they_were() -> None:
    assert "kv_format" not in PROGRAM.to_json()
    own = check(with_format("layers.1.self_attn.attention", ""))
    assert Program.from_json(own.to_json()) == own
    for wrong in ("int3", 4, None):
        with pytest.raises(ProgramError, match="kv_format"):
            check(with_format("layers.1.self_attn.attention", wrong))


def test_scales_of_keys_are_a_weight_of_the_node() -> None:
    def attention(size: int) -> Builder:
        b = Builder("x")
        x = b.embedding("embed.weight", 10, 64)
        q, k, v = (b.linear(x, f"{n}_proj", 64) for n in "qkv")
        b.weight("scale", size)
        b.add_node(
            "attention",
            "attention",
            (q, k, v),
            ("scale",),
            state=PROGRAM.states[STATES[0]],
            heads=1,
            kv_heads=1,
            head_dim=64,
            scale=1.0,
            window=0,
            rope=None,
        )
        return b

    with pytest.raises(ProgramError, match=r"weight 'scale' of shape \[63\] must be \[64\]"):
        attention(63)
