"""Constraints: hostile and unusual specs, beside what tests/serve/test_text.py shows of ordinary ones."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill.errors import GristmillError, UsageError
from gristmill.io.convert import prepare
from gristmill.io.tokenizer import Tokenizer
from gristmill.serve.constraints import Constraints, ConstraintSpec, Watched, check_schema
from gristmill.serve.tools import OutputParser, constraint_for

TOKENS = 49152
WIDTH = TOKENS + 64
"""The logits are wider than the vocabulary."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRISTMILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        directory: Path = prepare("smollm2", "stored", None)
        yield Tokenizer.load(directory)


@pytest.fixture(scope="module")
def constraints(tokenizer: Tokenizer) -> Constraints:
    return Constraints(tokenizer, WIDTH)


def allows(constraints: Constraints, tokenizer: Tokenizer, spec: ConstraintSpec, text: str) -> bool:
    """Whether the text can be generated, whole."""
    follower = constraints.factory(spec)()
    words = np.zeros(-(-WIDTH // 32), np.int32)
    for token in tokenizer.encode(text, add_special=False):
        assert follower.mask(words)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        assert not bits[TOKENS:].any(), "rows without a token"
        if not bits[token]:
            return False
        follower.accept(token)
    follower.mask(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return all(bits[end] for end in tokenizer.eos_token_ids)


def schema(value: Any) -> ConstraintSpec:
    return ConstraintSpec("json_schema", json.dumps(value))


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        (ConstraintSpec("regex", "(a+)+$"), "aaa", "aaa$"),
        (ConstraintSpec("regex", "(a|b)*a(a|b){9}"), "ab" * 20, "ba" * 20 + "c"),
        (schema({"type": "number", "minimum": 0, "maximum": 2e10}), "20000000000", "20000000001"),
        (
            schema({"type": "object", "patternProperties": {"^a": {"type": "null"}}}),
            '{"ab": null}',
            '{"ab": 1}',
        ),
        (schema({"type": "object", "minProperties": 2}), '{"a": 1, "b": 2}', '{"a": 1}'),
        (schema({"$defs": {"a": {"type": "string"}}, "$ref": "#/$defs/a", "maxLength": 1}), '"a"', '"ab"'),
        (
            schema({"type": "array", "items": [{"type": "null"}], "additionalItems": False}),
            "[null]",
            "[null, 1]",
        ),
        (ConstraintSpec("json_object", ""), '{"a": [1, {"b": "é😀"}]}', '{"a":  1}'),
        (ConstraintSpec("grammar", 'start: start start | "a"'), "aaaaaaa", "aab"),
    ],
)
def test_what_is_allowed(
    constraints: Constraints, tokenizer: Tokenizer, spec: ConstraintSpec, good: str, bad: str
) -> None:
    assert allows(constraints, tokenizer, spec, good)
    assert not allows(constraints, tokenizer, spec, bad)


@pytest.mark.parametrize(
    "text",
    [
        'a"b\\c',
        "line\nbreak",
        "tab\t",
        "\x01\x00",
        "é😀",
        "a/b",
        "<|im_end|>",
        "\x7f",
        "\\u007f",
        "\x85\u2028",
    ],
)
def test_any_text_can_be_a_choice(constraints: Constraints, tokenizer: Tokenizer, text: str) -> None:
    spec = ConstraintSpec("choice", json.dumps([text, "other"]))
    assert allows(constraints, tokenizer, spec, text)
    assert allows(constraints, tokenizer, spec, "other")
    assert not allows(constraints, tokenizer, spec, "otherwise")


@pytest.mark.parametrize("text", ['["", "a"]', "[1]", '{"a": 1}', '"a"', "[", "[" * 100_000])
def test_choices_that_are_not(constraints: Constraints, text: str) -> None:
    with pytest.raises(UsageError):
        constraints.check(ConstraintSpec("choice", text))


@pytest.mark.parametrize(
    "word",
    [
        "not",
        "uniqueItems",
        "contains",
        "if",
        "unevaluatedProperties",
        "dependencies",
        "$dynamicRef",
        "propertyNames",
        "nullable",
        "divisibleBy",
        "x-guidance",
        "lenght",
    ],
)
def test_no_word_is_ignored(constraints: Constraints, word: str) -> None:
    inner = {"type": "object", word: {}}
    for whole in (inner, {"anyOf": [{"type": "null"}, {"type": "array", "items": inner}]}):
        with pytest.raises(UsageError, match=word.replace("$", r"\$")):
            constraints.check(schema(whole))


def test_words_that_describe_are_free(constraints: Constraints, tokenizer: Tokenizer) -> None:
    value = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "T",
        "x-order": 3,
        "type": "object",
        "properties": {
            "nullable": {"type": "integer", "description": "d", "default": 1, "examples": [{"not": 1}]}
        },
        "required": ["nullable"],
        "additionalProperties": False,
    }
    check_schema(value)
    assert allows(constraints, tokenizer, schema(value), '{"nullable": 1}')
    check_schema({"enum": [{"not": 1}], "const": {"if": 2}})  # values are not schemas


@pytest.mark.parametrize(
    "spec",
    [
        ConstraintSpec("regex", "(.{0,1000}){0,1000}x"),
        ConstraintSpec("regex", "a$b"),
        ConstraintSpec("grammar", "root ::= root"),
        ConstraintSpec("json_schema", "{"),
        ConstraintSpec("json_schema", "[]"),
        ConstraintSpec("json_schema", '{"items":' * 20_000),
        ConstraintSpec("json_schema", '{"type":"array","items":' * 900 + "{}" + "}" * 900),
        schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
        schema({"$ref": "http://example.com/schema"}),
        schema({"$ref": "#/$defs/absent"}),
        schema(
            {
                "$defs": {
                    "a": {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]}
                },
                "$ref": "#/$defs/a",
            }
        ),
        schema(
            {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(6)]} for i in range(8)]}
        ),
        schema({"enum": [f"{i:07}" for i in range(100_000)]}),
        schema({"type": "string", "format": "nonsense"}),
        schema({"type": "object", "properties": {f"p{i}": {"pattern": "^[a-z]{1,50}$"} for i in range(900)}}),
        schema({"const": "a", "type": "integer"}),
        schema({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}),
    ],
    ids=lambda spec: spec.text[:30],
)
def test_hostile_specs_are_the_users_errors(constraints: Constraints, spec: ConstraintSpec) -> None:
    began = time.process_time()
    with pytest.raises(UsageError) as caught:
        constraints.check(spec)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "spec",
    [
        schema({"enum": [f"{i:05}" for i in range(7000)]}),
        schema({"properties": {f"p{i}": {"type": "string", "pattern": "^[a-z]{1,50}$"} for i in range(200)}}),
        schema({"type": "object", "properties": {"a": {"const": "word " * 9000}}, "required": ["a"]}),
        schema({"type": "string", "minLength": 30_000, "maxLength": 60_000}),
        ConstraintSpec("regex", r"(\w{1,200}\s?){1,400}"),
        ConstraintSpec("grammar", 'start: "a"{1,100000000}'),
    ],
    ids=lambda spec: spec.text[:30],
)
def test_large_specs_compile_in_time(constraints: Constraints, spec: ConstraintSpec) -> None:
    began = time.process_time()
    constraints.check(spec)
    assert time.process_time() - began < 2


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def referring(kind: str) -> dict[str, Any]:
    """Parameters with definitions, as pydantic writes them."""
    return {
        "$defs": {"Place": {"type": kind}},
        "type": "object",
        "properties": {"place": {"$ref": "#/$defs/Place"}},
        "required": ["place"],
        "additionalProperties": False,
    }


def test_required_calls(constraints: Constraints, tokenizer: Tokenizer) -> None:
    tools = [tool("first", referring("string")), tool("second", referring("integer")), tool("third", None)]
    first, second, third = (
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in (
            ("first", '{"place": "a </tool_call> b"}'),
            ("second", '{"place": 3}'),
            ("third", '{"any": [1]}'),
        )
    )
    wrong = second.replace("3", '"3"')
    named = {"type": "function", "function": {"name": "second"}}

    def may(text: str, choice: Any, parallel: bool = True) -> bool:
        spec = constraint_for(tools, choice, parallel)
        assert spec is not None
        constraints.check(spec)
        return allows(constraints, tokenizer, spec, text)

    for text in (first, second, third, f"{first}\n{second}\n{third}"):
        assert may(text, "required")
        parser = OutputParser(tools=True)
        deltas = [one for one in parser.push(text) + parser.finish() if one.index is not None]
        assert len(deltas) == parser.calls == text.count("arguments")
        assert first not in text or json.loads(deltas[0].arguments or "") == {"place": "a </tool_call> b"}
    assert not may(wrong, "required")
    assert not may("Sure: " + first, "required")
    assert not may(f"{first}\n{second}", "required", False)
    assert may(second, named)
    assert not may(first, named)
    assert not may(f"{second}\n{second}", named)
    with pytest.raises(UsageError, match="uniqueItems"):
        constraint_for([tool("f", {"type": "object", "uniqueItems": True})], "required")
    with pytest.raises(UsageError, match="x-guidance"):
        constraint_for([tool("f", {"type": "object", "x-guidance": {"lenient": True}})], "required")


def test_the_work_for_a_token_is_bounded(constraints: Constraints) -> None:
    """A grammar of ever more meanings ends its own sequence before it holds the engine up."""
    follower = constraints.factory(ConstraintSpec("grammar", 'start: s\ns: s s s | s s | "a" | "b"'))()
    rng = np.random.default_rng(0)
    words = np.zeros(-(-WIDTH // 32), np.int32)

    def follow(tokens: int) -> None:
        for _ in range(tokens):
            follower.mask(words)
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            follower.accept(int(rng.choice(allowed[allowed > 2])))

    with pytest.raises(GristmillError, match="Too many items"):
        follow(120)  # llguidance's own limits let it go on, at up to a second for a token


def test_compiled_grammars_are_kept_within_a_bound(constraints: Constraints) -> None:
    for number in range(200):
        constraints.factory(ConstraintSpec("regex", f"a{number}"))
    assert len(constraints._kept) == 64
    assert ConstraintSpec("regex", "a199") in constraints._kept
    assert ConstraintSpec("regex", "a0") not in constraints._kept


class Scripted:
    """A constraint that gives masks as they are told, and raises what is an exception."""

    def __init__(self, *masks: Any) -> None:
        self._masks = list(masks)

    def mask(self, words: Any) -> bool:
        mask = self._masks.pop(0)
        if isinstance(mask, Exception):
            raise mask
        words.fill(0)
        for token in mask or ():
            words[token // 32] |= np.int32(1 << token % 32)
        return mask is not None

    def accept(self, token: int) -> None:
        if token == 13:
            raise GristmillError("13 is not allowed")


def test_why_a_constraint_cannot_be_followed_is_remembered() -> None:
    words = np.zeros(2, np.int32)
    for masks, failures in (
        ([[1], [5], [1, 40], [40]], [None, None, None, None]),
        ([[40, 5]], ["before min_tokens"]),
        ([[1], [5, 40]], [None, None]),
        ([None, []], [None, "allows no further token"]),
        ([[1], GristmillError("too much work")], [None, "too much work"]),
    ):
        made = Scripted(*masks)
        watched = Watched(lambda made=made: made, frozenset({5, 40, 900}), 1)  # type: ignore[misc]
        one = watched()
        for mask, failure in zip(masks, failures, strict=True):
            assert watched.failure is None
            if failure is None:
                assert one.mask(words) is (mask is not None)
                one.accept(1)
                continue
            with pytest.raises(GristmillError, match=failure):
                one.mask(words)
            assert watched.failure is not None
            assert failure in watched.failure
    watched = Watched(lambda: Scripted([13]), frozenset(), 0)
    one, other = watched(), watched()
    with pytest.raises(GristmillError, match="13"):
        one.accept(13)
    assert watched.failure == "13 is not allowed"
    assert other.mask(words)


def test_a_fault_in_a_constraint_is_not_the_clients(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched(lambda: Scripted(IndexError("inside")), frozenset(), 0)
    with pytest.raises(GristmillError, match="IndexError"):
        watched().mask(np.zeros(2, np.int32))
    assert watched.failure is None


def test_a_failure_does_not_carry_over(constraints: Constraints, tokenizer: Tokenizer) -> None:
    """What one text makes of a grammar changes nothing for the next."""
    spec = ConstraintSpec("regex", "(.{0,900}a.{0,900}){4}b")
    words = np.zeros(-(-WIDTH // 32), np.int32)
    lengths = []
    for _ in range(2):
        follower = constraints.factory(spec)()
        taken: list[int] = []

        def go_on(follower: Any = follower, taken: list[int] = taken) -> None:
            for token in tokenizer.encode("the cat sat on a mat and had a nap. " * 50, add_special=False):
                follower.mask(words)
                follower.accept(token)
                taken.append(token)

        with pytest.raises(GristmillError, match="too many expressions"):
            go_on()
        lengths.append(len(taken))
    assert lengths[0] == lengths[1] > 0
