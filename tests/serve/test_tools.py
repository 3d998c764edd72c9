"""The parser of answers on unusual text; tests/serve/test_text.py has what it makes of ordinary ones."""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.errors import UsageError
from gristmill.serve import tools
from gristmill.serve.tools import Delta, OutputParser, check_tools


def parsed(text: str, cuts: list[int], **options: bool) -> list[tuple[Any, ...]]:
    """What a parser makes of a text that comes in pieces: kind and text, or an index, name and arguments."""
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
            continue
        kind, piece = ("reasoning", delta.reasoning) if delta.reasoning else ("content", delta.content)
        if out and out[-1][0] == kind:
            out[-1] = (kind, out[-1][1] + piece)
        else:
            out.append((kind, piece))
    return out


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=8)
    | st.just("</tool_call>")
    | st.just('\\"{'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.tuples(
    st.text("abc_", min_size=1, max_size=5), st.dictionaries(st.text(max_size=5), JSON, max_size=3)
)
CUTS = st.lists(st.integers(0, 400), max_size=30)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.text("xyz é\n", max_size=6), CALLS, st.booleans()), min_size=1, max_size=6),
    CUTS,
)
def test_every_call_comes_back(
    parts: list[tuple[str, tuple[str, dict[str, Any]], bool]], cuts: list[int]
) -> None:
    text, content, calls = "", "", []
    for before, (name, arguments), escaped in parts:
        call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=escaped)
        text += f"{before}<tool_call>\n{call}\n</tool_call>"
        content += before
        calls.append((name, arguments))
    for places in (cuts, [], list(range(len(text)))):
        found = parsed(text, places, tools=True)
        assert "".join(one[1] for one in found if one[0] == "content") == content
        assert [(one[2], json.loads(one[3])) for one in found if one[0] == "call"] == calls
        assert [one[1] for one in found if one[0] == "call"] == list(range(len(calls)))


SIGNS = st.text(st.sampled_from([*'"\\{}:<>/ \nxé\U0001f600']), max_size=12)
MARKERS = st.sampled_from(
    ["<tool_call>", "</tool_call>", '<tool_call>{"a": "', '"}</tool_call>', "</tool_", "<tool"]
)


@settings(deadline=None, max_examples=400)
@given(st.lists(SIGNS | MARKERS, max_size=14).map("".join), CUTS)
def test_what_is_no_call_is_content_whole(text: str, cuts: list[int]) -> None:
    for places in (cuts, [], list(range(len(text)))):
        assert parsed(text, places, tools=True) == ([("content", text)] if text else [])


@settings(deadline=None, max_examples=200)
@given(st.lists(SIGNS | MARKERS | st.sampled_from(["<think>", "</think>"]), max_size=12).map("".join), CUTS)
def test_the_limit_of_a_call_does_not_depend_on_cuts(text: str, cuts: list[int]) -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text += call + text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools, "_MAX_CALL", 32)
        whole = parsed(text, [], tools=True, reasoning=True)
        for places in (cuts, list(range(len(text)))):
            assert parsed(text, places, tools=True, reasoning=True) == whole
        patch.setattr(tools, "_MAX_CALL", 20)
        assert parsed(call, cuts, tools=True) == [("content", call)]


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "f", "arguments": {"x": -Infinity}}',
        '{"name": "f", "arguments": {"x": 1e400}}',
        '{"name": "f", "arguments": {"x": ' + "1" * 5000 + "}}",
        '{"name": "f", "arguments": "{\\"x\\": NaN}"}',
        '{"name": "f", "arguments": null}',
        '{"name": "\\ud800", "arguments": {}}',
        '{"name": "f", "arguments": ' + '{"a":' * 100_000,
    ],
    ids=lambda body: body[:45],
)
def test_calls_that_nobody_could_read(body: str) -> None:
    text = f"<tool_call>{body}</tool_call>"
    assert parsed(text, [20, 33], tools=True) == [("content", text)]


def test_arguments_can_always_be_sent() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"x": "\\ud800", "y": "\\ud83d\\ude00é"}}</tool_call>'
    ((_, _, _, arguments),) = parsed(text, [], tools=True)
    arguments.encode()
    assert json.loads(arguments) == {"x": "\ud800", "y": "😀é"}


def test_a_quote_too_many_costs_one_call() -> None:
    good = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    for bad in ('{"name": "f}', 'say "hi', '"', '{"a\\\n": 1}'):
        broken = f"<tool_call>\n{bad}\n</tool_call>"
        assert parsed(broken + good, [15, 30], tools=True) == [("content", broken), ("call", 0, "f", "{}")]


def test_reasoning_that_the_prompt_begins() -> None:
    text = "hm <tool_call> </thin </think>\n\nSo. </think>"
    expected = [("reasoning", "hm <tool_call> </thin "), ("content", "So. </think>")]
    for cuts in ([], [20], list(range(len(text)))):
        assert parsed(text, cuts, reasoning=True, tools=True, starts_in_reasoning=True) == expected
    assert parsed("a", [], starts_in_reasoning=True) == [("content", "a")]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name":"f","arguments":{}}</tool_call>' * 20_000,
        "<tool_call>x</tool_call>" * 40_000,
        '<tool_call>{"' + "</tool_call>" * 80_000,
        '<tool_call>{"' + "\\" * 1_000_000,
        "<think>" * 140_000,
        "<tool_cal" * 110_000,
    ],
    ids=lambda text: text[:25],
)
@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_a_megabyte_takes_linear_time(text: str, piece: int) -> None:
    def seconds(length: int) -> float:
        parser = OutputParser(tools=True, reasoning=True)
        began = time.process_time()
        for at in range(0, length, piece):
            parser.push(text[at : min(at + piece, length)])
        parser.finish()
        return time.process_time() - began

    # Quadratic time would be 64 times as long for 8 times the text.
    assert seconds(len(text)) < max(1.0, 30 * seconds(len(text) // 8))


def test_parameters_are_objects() -> None:
    for parameters in ({"type": "string"}, {"type": ["object", "null"]}, "object", [1]):
        with pytest.raises(UsageError, match="parameters"):
            check_tools([{"type": "function", "function": {"name": "f", "parameters": parameters}}], "auto")
    for good in (None, {}, {"type": "object"}, {"$ref": "#/$defs/x", "$defs": {"x": {"type": "object"}}}):
        check_tools([{"type": "function", "function": {"name": "f", "parameters": good}}], "auto")
