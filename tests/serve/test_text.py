"""Tool calls and reasoning in text, constraints on the output, and the helper processes."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.errors import TemplateError, UsageError
from gristmill.io.convert import prepare
from gristmill.io.tokenizer import Tokenizer
from gristmill.serve.constraints import Constraints, ConstraintSpec
from gristmill.serve.tools import (
    Delta,
    OutputParser,
    check_tools,
    constraint_for,
    for_template,
    shows_reasoning,
)
from gristmill.serve.worker import HelperPool


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRISTMILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield prepare("smollm2", "stored", None)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def constraints(tokenizer: Tokenizer) -> Constraints:
    return Constraints(tokenizer, 49152)


# ---- tool calls --------------------------------------------------------------------------------------------


def parsed(text: str, cuts: list[int], **options: bool) -> list[tuple[Any, ...]]:
    """What a parser makes of a text that comes in pieces; neighbours of a kind are joined, ids left out."""
    parser = OutputParser(**options)
    deltas: list[Delta] = []
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for begin, end in itertools.pairwise(places):
        deltas += parser.push(text[begin:end])
    deltas += parser.finish()
    out: list[tuple[Any, ...]] = []
    for delta in deltas:
        if delta.index is not None:
            out.append(("call", delta.index, delta.name, delta.arguments))
            assert delta.id
            continue
        kind, piece = ("reasoning", delta.reasoning) if delta.reasoning else ("content", delta.content)
        if out and out[-1][0] == kind:
            out[-1] = (kind, out[-1][1] + piece)
        else:
            out.append((kind, piece))
    return out


PIECES = st.sampled_from(
    [
        "text",
        "<",
        "</",
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        '{"name": "f", "arguments": {"x": [1, {"y": "}"}]}}',
        '<tool_call>{"name": "g", "arguments": {"s": "a</b>\\u00e9"}}</tool_call>',
        '{"name": 3}',
        '"',
        "\n",
        "<tool_",
        "call>",
        "é",
        "",
    ]
)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(PIECES, max_size=12), st.lists(st.integers(0, 200), max_size=20), st.booleans(), st.booleans()
)
def test_any_cuts_give_the_same(pieces: list[str], cuts: list[int], tools: bool, reasoning: bool) -> None:
    text = "".join(pieces)
    whole = parsed(text, [], tools=tools, reasoning=reasoning)
    assert parsed(text, cuts, tools=tools, reasoning=reasoning) == whole
    assert parsed(text, list(range(len(text))), tools=tools, reasoning=reasoning) == whole
    if not tools and not reasoning:
        assert whole == ([("content", text)] if text else [])
    if not reasoning:
        shown = "".join(one[1] for one in whole if one[0] == "content")
        rest = text
        for piece in shown:  # content is what remains, in order
            assert piece in rest
            rest = rest[rest.index(piece) + 1 :]


def test_calls() -> None:
    one = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool"}}\n</tool_call>'
    assert parsed(f"Hm. {one}{one}!", [5, 9], tools=True) == [
        ("content", "Hm. "),
        ("call", 0, "f", '{"a": "</tool"}'),
        ("call", 1, "f", '{"a": "</tool"}'),
        ("content", "!"),
    ]
    for broken in (
        "<tool_call>{}</tool_call>",
        "<tool_call>nonsense</tool_call>",
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": 3}</tool_call>',
        '<tool_call>{"name": "f", "argum',
        "<tool_call>" + "[" * 100_000,
    ):
        assert parsed(broken, [3, 20], tools=True) == [("content", broken)]
    unended = '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}'
    assert parsed(unended, [], tools=True) == [("call", 0, "f", '{"a": 1}')]


def test_reasoning() -> None:
    text = "<think>because <tool_call></think>\n\nSo."
    assert parsed(text, [4, 30], reasoning=True, tools=True) == [
        ("reasoning", "because <tool_call>"),
        ("content", "So."),
    ]
    assert parsed("<think>on and on", [9], reasoning=True) == [("reasoning", "on and on")]


@dataclass
class Markers:
    """A tokenizer that has `</think>` as a token or not, and special or not."""

    number: int | None
    special_ids: frozenset[int]

    def token_id(self, text: str) -> int | None:
        return self.number if text == "</think>" else None


def test_reasoning_whose_end_is_not_seen_is_not_told_apart() -> None:
    for number, special, expected in ((None, {1}, True), (7, {1}, True), (7, {1, 7}, False)):
        markers = Markers(number, frozenset(special))
        assert shows_reasoning("{{ x }}<think>\n", markers) is expected
        assert not shows_reasoning("{{ x }}", markers)


def test_long_texts_take_linear_time() -> None:
    began = time.monotonic()
    parser = OutputParser(tools=True, reasoning=True)
    for _ in range(100_000):
        parser.push("<tool_cal <thin ")
    parser.push("<tool_call>")
    for _ in range(100_000):
        parser.push("x</tool_cal")
    parser.finish()
    assert time.monotonic() - began < 20


def test_tools_that_are_not() -> None:
    good = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    check_tools([good], "auto")
    check_tools([good], {"type": "function", "function": {"name": "f"}})
    for tools, choice in (
        ([good, good], None),
        ([good] * 129, None),
        ([{"type": "function"}], None),
        ([{"type": "function", "function": {"name": "f" * 65}}], None),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], None),
        ([good], "sometimes"),
        ([good], {"type": "function", "function": {"name": "g"}}),
        ([good], {"type": "x"}),
        (None, "required"),
    ):
        with pytest.raises(UsageError):
            check_tools(tools, choice)
    assert constraint_for([good], "auto") is None


def test_earlier_calls_are_objects_for_templates() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    (message,) = for_template([{"role": "assistant", "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
    for bad in ("{", "[1]", 3, None):
        wrong = {"function": {"name": "f", "arguments": bad}}
        with pytest.raises(UsageError, match="JSON object"):
            for_template([{"role": "assistant", "tool_calls": [wrong]}])
    with pytest.raises(UsageError, match="must have a function"):
        for_template([{"role": "assistant", "tool_calls": ["x"]}])


# ---- constraints -------------------------------------------------------------------------------------------

SCHEMAS: list[Any] = [
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["x", "y", 3, None]}, "maxItems": 4},
    {"type": "string", "pattern": "^[a-c]{2,5}$"},
    {"type": "string", "minLength": 2, "maxLength": 6},
    {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    {"type": "number", "minimum": 0, "maximum": 2e10},
    {"type": "integer", "minimum": -5, "maximum": 123},
    {"const": "grüße"},
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "v": {"type": "boolean"},
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
                },
                "required": ["v", "kids"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    {"type": "string", "format": "date"},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 3},
]


def walk(constraints: Constraints, tokenizer: Tokenizer, spec: ConstraintSpec, seed: int) -> str | None:
    """Text of tokens drawn from those allowed, ending as soon as it may; None if that takes too long."""
    rng = np.random.default_rng(seed)
    follower = constraints.factory(spec)()
    words = np.zeros(49152 // 32, np.int32)
    ids: list[int] = []
    for _ in range(400):
        assert follower.mask(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        assert len(allowed)
        ends = [int(token) for token in allowed if token in tokenizer.eos_token_ids]
        if ends:
            return tokenizer.decode(ids)
        assert not set(allowed.tolist()) & (tokenizer.special_ids - tokenizer.eos_token_ids)
        # Short tokens, and those that close things, so that walks end.
        texts = [tokenizer.token_bytes(int(token)) for token in allowed[:: max(1, len(allowed) // 2000)]]
        some = allowed[:: max(1, len(allowed) // 2000)]
        weights = np.array([10.0 if set(text) & set(b'"]}') else 1.0 / (1 + len(text)) for text in texts])
        token = int(rng.choice(some, p=weights / weights.sum()))
        follower.accept(token)
        ids.append(token)
    return None


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_what_is_allowed_satisfies_the_schema(
    constraints: Constraints, tokenizer: Tokenizer, number: int
) -> None:
    spec = ConstraintSpec("json_schema", json.dumps(SCHEMAS[number]))
    texts = [walk(constraints, tokenizer, spec, seed) for seed in range(6)]
    ended = [text for text in texts if text is not None]
    assert ended
    for text in ended:
        jsonschema.validate(json.loads(text), SCHEMAS[number])
        assert "\n" not in text, "no free white space"


def test_other_constraints(constraints: Constraints, tokenizer: Tokenizer) -> None:
    assert walk(constraints, tokenizer, ConstraintSpec("choice", '["only this"]'), 0) == "only this"
    text = walk(constraints, tokenizer, ConstraintSpec("regex", "[0-9]{4}"), 0)
    assert text is not None
    assert text.isdecimal()
    grammar = 'root ::= "a" item\nitem ::= "b" | "c"'
    assert walk(constraints, tokenizer, ConstraintSpec("grammar", grammar), 0) in ("ab", "ac")
    assert isinstance(
        json.loads(walk(constraints, tokenizer, ConstraintSpec("json_object", ""), 1) or "{}"), dict
    )


@pytest.mark.parametrize(
    "spec",
    [
        ConstraintSpec("json_schema", '{"type": "nothing"}'),
        ConstraintSpec("json_schema", '{"type": "string", "pattern": "("}'),
        ConstraintSpec("json_schema", '{"type": "integer", "minimum": 2, "maximum": 1}'),
        ConstraintSpec(
            "json_schema", '{"type": "object", "propertyNames": {"pattern": "x"}, "dependentSchemas": {}}'
        ),
        ConstraintSpec("json_schema", json.dumps({"enum": ["x" * 70_000]})),
        ConstraintSpec("regex", "("),
        ConstraintSpec("regex", "(?=a)b"),
        ConstraintSpec("grammar", "start: undefined"),
        ConstraintSpec("grammar", "root ::= ("),
        ConstraintSpec("choice", "[]"),
        ConstraintSpec("choice", '[""]'),
    ],
)
def test_constraints_that_are_refused(constraints: Constraints, spec: ConstraintSpec) -> None:
    with pytest.raises(UsageError) as caught:
        constraints.check(spec)
    assert "\n" not in str(caught.value)


# ---- helpers -----------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "Hello, helper."}]


def with_pool(directory: Path, use: Any, workers: int = 1) -> None:
    async def main() -> None:
        pool = HelperPool(directory, 49152, workers)
        await pool.start()
        try:
            await use(pool)
        finally:
            await pool.close()

    asyncio.run(main())


def test_helpers_say_what_the_tokenizer_says(directory: Path, tokenizer: Tokenizer) -> None:
    async def use(pool: HelperPool) -> None:
        assert (await pool.render(MESSAGES)).ids == tokenizer.encode_chat(MESSAGES)
        long = "rye and wheat. " * 2000
        assert await pool.tokenize(long) == tokenizer.encode(long)
        assert await pool.tokenize("short") == tokenizer.encode("short")
        results = await asyncio.gather(*(pool.render(MESSAGES) for _ in range(50)))
        assert all(result == results[0] for result in results)
        with pytest.raises(TemplateError):
            await pool.render([{"role": "nobody", "content": "x"}])
        with pytest.raises(UsageError):
            await pool.check_constraint(ConstraintSpec("regex", "("))
        await pool.check_constraint(ConstraintSpec("regex", "a+"))

    with_pool(directory, use)


def test_a_helper_that_is_killed_or_cancelled_is_replaced(directory: Path, tokenizer: Tokenizer) -> None:
    async def use(pool: HelperPool) -> None:
        process = pool._helpers[0]._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        assert (await pool.render(MESSAGES)).ids == tokenizer.encode_chat(MESSAGES)
        task = asyncio.create_task(pool.tokenize("x " * 3_000_000))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await pool.render(MESSAGES)).ids == tokenizer.encode_chat(MESSAGES)
        process = pool._helpers[0]._process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)  # it hangs
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(__import__("gristmill.serve.worker").serve.worker.SECONDS, "render", 0.3)
            with pytest.raises(TemplateError, match="too long"):
                await pool.render(MESSAGES)
        assert pool.restarts >= 1
        assert (await pool.render(MESSAGES)).ids == tokenizer.encode_chat(MESSAGES)

    with_pool(directory, use)
