"""Tool calls and reasoning in a model's text.

One incremental parser serves streams and whole answers, so that both say the same. Calls have the form that
Hermes and Qwen models were trained on: `<tool_call>` {"name": ..., "arguments": {...}} `</tool_call>`;
reasoning stands between `<think>` and `</think>`. What only looks like a call is content, whole.

Markers are text. Where a tokenizer has one as a special token, the detokenizer drops it, and calls and
reasoning are content; the models of these families have them as ordinary tokens.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from gristmill.errors import UsageError
from gristmill.serve.limits import LIMITS

if TYPE_CHECKING:
    from gristmill.io.chat import RenderedPrompt
    from gristmill.serve.constraints import ConstraintSpec

__all__ = [
    "Delta",
    "MarkerTokens",
    "OutputParser",
    "begins_in_reasoning",
    "check_tools",
    "constraint_for",
    "for_template",
    "shows_reasoning",
]

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_THINK, _THINK_END = "<think>", "</think>"
_MAX_CALL = 1 << 20
"""Characters of a call; a longer one is content."""


class MarkerTokens(Protocol):
    """What `shows_reasoning` needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    def token_id(self, text: str) -> int | None: ...


def shows_reasoning(template: str, tokenizer: MarkerTokens) -> bool:
    """Whether reasoning can be told apart: the chat template speaks of it, and its end is seen.

    A `</think>` that is a special token is not: everything would be reasoning, the answer included.
    """
    return _THINK in template and tokenizer.token_id(_THINK_END) not in tokenizer.special_ids


def begins_in_reasoning(prompt: RenderedPrompt) -> bool:
    """Whether the chat template itself ends with `<think>`, so that the answer begins inside the reasoning.

    A message that ends so does not count.
    """
    end = prompt.marked.rstrip()
    return end.endswith(_THINK) and not (prompt.marker and end.endswith(prompt.marker + _THINK))


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: content, or reasoning, or (with an index) of a tool call."""

    content: str | None = None
    reasoning: str | None = None
    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str | None = None


class OutputParser:
    """Divides text, as it comes, into content, reasoning and tool calls.

    Attributes: calls, the number of tool calls so far. A call is given when it is complete: until then it may
    turn out to be content. The pieces do not depend on how the text is cut. Takes linear time.
    """

    def __init__(
        self, *, tools: bool = False, reasoning: bool = False, starts_in_reasoning: bool = False
    ) -> None:
        """starts_in_reasoning: the prompt ends with `<think>`; needs reasoning."""
        self._state = "reasoning" if reasoning and starts_in_reasoning else "content"
        self._tools = tools
        self._reasoning = reasoning
        self._held = ""
        self._call: list[str] = []
        self._call_start = ""
        self._call_size = 0
        self._call_state = ""
        self._trim = False
        """White space between the reasoning and the answer is dropped."""
        self.calls = 0

    def push(self, text: str) -> list[Delta]:
        """Takes more text; what is certain now."""
        out: list[Delta] = []
        text = self._held + text
        self._held = ""
        at = 0
        while at < len(text):
            if self._state == "content":
                at = self._content(text, at, out)
            elif self._state == "reasoning":
                at = self._until(_THINK_END, text, at, out)
            else:
                at = self._in_call(text, at, out)
        return _joined(out)

    def finish(self) -> list[Delta]:
        """The rest, now that no more text comes."""
        out: list[Delta] = []
        if self._state == "call":
            body = "".join(self._call) + self._held
            call = self._parse(body) if self._call_size + len(self._held) <= _MAX_CALL else None
            self._emit(out, call if call is not None else Delta(content=self._call_start + body))
        elif self._held:
            held = self._held
            self._emit(out, Delta(reasoning=held) if self._state == "reasoning" else Delta(content=held))
        self._held, self._call, self._state = "", [], "content"
        return _joined(out)

    # Each takes the text from `at`, and says how far it came.

    def _content(self, text: str, at: int, out: list[Delta]) -> int:
        if self._trim:
            at = len(text) - len(text[at:].lstrip())
            if at == len(text):
                return at
            self._trim = False
        markers = [_CALL] * self._tools + [_THINK] * self._reasoning
        found = re.compile("|".join(markers)).search(text, at) if markers else None
        if found is None:
            keep = max((_unfinished(text, at, marker) for marker in markers), default=0)
            self._emit(out, Delta(content=text[at : len(text) - keep]))
            self._held = text[len(text) - keep :]
            return len(text)
        self._emit(out, Delta(content=text[at : found.start()]))
        if found[0] == _CALL:
            self._state, self._call_state = "call", "new"
            self._call, self._call_start, self._call_size = [], _CALL, 0
        else:
            self._state = "reasoning"
        return found.end()

    def _until(self, end: str, text: str, at: int, out: list[Delta]) -> int:
        found = text.find(end, at)
        if found < 0:
            keep = _unfinished(text, at, end)
            self._emit(out, Delta(reasoning=text[at : len(text) - keep]))
            self._held = text[len(text) - keep :]
            return len(text)
        self._emit(out, Delta(reasoning=text[at:found]))
        self._state, self._trim = "content", True
        self._reasoning = False  # an answer has one at most
        return found + len(end)

    def _in_call(self, text: str, at: int, out: list[Delta]) -> int:
        end = self._call_end(text, at)
        if end is None:
            keep = len(self._held)
            self._call.append(text[at : len(text) - keep])
            self._call_size += len(text) - keep - at
            if self._call_size > _MAX_CALL:  # content up to its end, and need not wait for it
                self._emit(out, Delta(content=self._call_start + "".join(self._call)))
                self._call, self._call_start = [], ""
            return len(text)
        body = "".join(self._call) + text[at:end]
        call = self._parse(body) if self._call_size + end - at <= _MAX_CALL else None
        self._emit(out, call if call is not None else Delta(content=self._call_start + body + _CALL_END))
        self._call, self._state = [], "content"
        return end + len(_CALL_END)

    def _call_end(self, text: str, at: int) -> int | None:
        """Where the end marker is. A marker within a JSON string is none.

        Without one, `_held` gets what must be looked at again together with what follows.
        """
        while at < len(text):
            if self._call_state == "new":
                if text[at].isspace():
                    at += 1
                    continue
                self._call_state = "json" if text[at] == "{" else "other"
            found = _NEXT[self._call_state].search(text, at)
            if found is None:
                if self._call_state != "string":
                    self._held = text[len(text) - _unfinished(text, at, _CALL_END) :]
                return None
            sign, at = found[0], found.end()
            if sign == _CALL_END:
                return found.start()
            if sign == '"':
                self._call_state = "json" if self._call_state == "string" else "string"
            elif sign == "\\":
                if at == len(text):
                    self._held = sign
                elif text[at] in '"\\':
                    at += 1
            else:
                self._call_state = "other"  # JSON has no line breaks in strings: a quote was too many
        return None

    def _parse(self, body: str) -> Delta | None:
        """The call, None if it is not one."""
        value = _json(body)
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _json(arguments)
        if not isinstance(arguments, dict) or not _whole(value["name"]):
            return None
        text = json.dumps(arguments, ensure_ascii=False)
        if not _whole(text):
            text = json.dumps(arguments)
        index, self.calls = self.calls, self.calls + 1
        return Delta(index=index, id=f"call_{secrets.token_hex(12)}", name=value["name"], arguments=text)

    def _emit(self, out: list[Delta], delta: Delta) -> None:
        if delta.index is not None or delta.content or delta.reasoning:
            out.append(delta)


_NEXT = {
    "json": re.compile(f'"|{_CALL_END}'),
    "string": re.compile(r'["\\\x00-\x1f]'),
    "other": re.compile(_CALL_END),
}
"""What to look for in a call: between strings, in a string, and in what is not JSON."""


def _json(text: str) -> Any:
    """What JSON says; None for what is not JSON, or holds numbers that no one could send on."""
    try:
        return json.loads(text, parse_constant=_refused, parse_float=_finite)
    except (ValueError, RecursionError):
        return None


def _refused(name: str) -> None:
    raise ValueError(name)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(text)
    return value


def _whole(text: str) -> bool:
    """Whether there are no halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _unfinished(text: str, at: int, marker: str) -> int:
    """Length of the longest end of text[at:] with which the marker begins."""
    for length in range(min(len(marker) - 1, len(text) - at), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Neighbours of one kind as one."""
    out: list[Delta] = []
    for kind, group in itertools.groupby(deltas, _kind):
        if kind == "call":
            out += group
        elif kind == "content":
            out.append(Delta(content="".join(one.content or "" for one in group)))
        else:
            out.append(Delta(reasoning="".join(one.reasoning or "" for one in group)))
    return out


def _kind(delta: Delta) -> str:
    return "call" if delta.index is not None else "content" if delta.content else "reasoning"


def _functions(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> schema of the parameters."""
    result: dict[str, dict[str, Any]] = {}
    for number, tool in enumerate(tools):
        where = f"tools.{number}"
        if tool.get("type", "function") != "function" or not isinstance(tool.get("function"), dict):
            raise UsageError(f"{where} must be a function")
        function = tool["function"]
        name = function.get("name")
        good = isinstance(name, str) and 0 < len(name) <= 64
        if not good or not all(c.isascii() and (c.isalnum() or c in "_-.") for c in name):
            raise UsageError(f"{where}.function.name must be 1 to 64 letters, digits, '_', '-' or '.'")
        if name in result:
            raise UsageError(f"{where}: there are two functions {name!r}")
        schema = function.get("parameters")
        if schema is not None and not isinstance(schema, dict):
            raise UsageError(f"{where}.function.parameters must be a JSON schema")
        if schema and schema.get("type", "object") != "object":
            raise UsageError(f"{where}.function.parameters must be the schema of an object")
        if not isinstance(function.get("description", ""), str | None):
            raise UsageError(f"{where}.function.description must be a text")
        result[name] = schema or {"type": "object"}
    return result


def check_tools(
    tools: Sequence[Mapping[str, Any]] | None, tool_choice: str | Mapping[str, Any] | None
) -> None:
    """UsageError for tools that are not well-formed, and a choice that they do not allow."""
    if tools is not None and len(tools) > LIMITS["tools"]:
        raise UsageError(f"tools may hold at most {LIMITS['tools']} functions, not {len(tools)}")
    functions = _functions(tools or [])
    if isinstance(tool_choice, str) or tool_choice is None:
        if tool_choice not in (None, "none", "auto", "required"):
            raise UsageError(
                f"tool_choice must be none, auto, required or a function, not {tool_choice[:40]!r}"
            )
        if tool_choice == "required" and not functions:
            raise UsageError("tool_choice required needs tools")
        return
    name = _chosen(tool_choice)
    if name not in functions:
        raise UsageError(f"tool_choice names a function that is not among the tools: {str(name)[:64]!r}")


def _chosen(tool_choice: Mapping[str, Any]) -> object:
    function = tool_choice.get("function")
    if tool_choice.get("type") != "function" or not isinstance(function, Mapping):
        raise UsageError('tool_choice must be {"type": "function", "function": {"name": ...}}')
    return function.get("name")


def for_template(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates want them: the arguments of earlier calls as objects, which the API has as text.

    UsageError where such a text is not a JSON object.
    """
    out = []
    for number, message in enumerate(messages):
        shown = dict(message)
        if isinstance(calls := message.get("tool_calls"), list):
            shown["tool_calls"] = [
                _call(one, f"messages.{number}.tool_calls.{i}") for i, one in enumerate(calls)
            ]
        out.append(shown)
    return out


def _call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise UsageError(f"{where} must have a function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise UsageError(f"{where}.function.arguments must be a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


def constraint_for(
    tools: Sequence[Mapping[str, Any]], tool_choice: str | Mapping[str, Any] | None, parallel: bool = True
) -> ConstraintSpec | None:
    """The form that the answer must have where a call is required; None where it is free.

    UsageError for parameters that cannot be followed.
    """
    from gristmill.serve.constraints import ConstraintSpec, check_schema

    if tool_choice in (None, "none", "auto"):
        return None
    functions = _functions(tools)
    if not isinstance(tool_choice, str) and tool_choice is not None:
        name = _chosen(tool_choice)
        functions = {key: value for key, value in functions.items() if key == name}
        parallel = False
    compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    many = '("\\n" call){0,7}' if parallel else ""
    either = " | ".join(f"f{number}" for number in range(len(functions)))
    rules = [f"start: call {many}", f'call: "{_CALL}\\n" ({either}) "\\n{_CALL_END}"']
    for number, (name, schema) in enumerate(functions.items()):
        check_schema(schema)
        # A schema of its own for each: `#/$defs` and the like count from its root.
        whole = json.dumps({"x-guidance": compact, "type": "object", **schema})
        before = json.dumps(f'{{"name": "{name}", "arguments": ')
        rules += [f'f{number}: {before} a{number} "}}"', f"a{number}: %json {whole}"]
    return ConstraintSpec("grammar", "\n".join(rules).replace("\x7f", "\\u007f") + "\n")
