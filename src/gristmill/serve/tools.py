"""Tool calls and reasoning in a model's text.

One incremental parser serves streams and whole answers, so that both say the same. Calls have the form that
Hermes and Qwen models were trained on: `<tool_call>` {"name": ..., "arguments": {...}} `</tool_call>`;
reasoning stands between `<think>` and `</think>`. What only looks like a call is content, whole.

Markers are text. Where a tokenizer has one as a special token, the detokenizer drops it, and the calls are
content; the models of these families have them as ordinary tokens.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gristmill.errors import UsageError
from gristmill.serve.settings import LIMITS

if TYPE_CHECKING:
    from gristmill.serve.constraints import ConstraintSpec

__all__ = ["Delta", "OutputParser", "check_tools", "constraint_for", "for_template"]

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_THINK, _THINK_END = "<think>", "</think>"
_MAX_CALL = 1 << 20
"""Characters of a call; a longer one is content."""


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
    turn out to be content. The pieces do not depend on how the text is cut.
    """

    def __init__(self, *, tools: bool = False, reasoning: bool = False) -> None:
        self._tools = tools
        self._reasoning = reasoning
        self._state = "content"
        self._held = ""
        self._call: list[str] = []
        self._call_size = 0
        self._trim = False
        """White space between the reasoning and the answer is dropped."""
        self.calls = 0

    def push(self, text: str) -> list[Delta]:
        """Takes more text; what is certain now."""
        out: list[Delta] = []
        text = self._held + text
        self._held = ""
        while text:
            if self._state == "content":
                text = self._content(text, out)
            elif self._state == "reasoning":
                text = self._until(_THINK_END, text, out)
            else:
                text = self._in_call(text, out)
        return _joined(out)

    def finish(self) -> list[Delta]:
        """The rest, now that no more text comes."""
        out: list[Delta] = []
        if self._state == "call":
            body = "".join(self._call) + self._held
            call = self._parse(body)
            self._emit(out, call if call is not None else Delta(content=_CALL + body))
        elif self._held:
            held = self._held
            self._emit(out, Delta(reasoning=held) if self._state == "reasoning" else Delta(content=held))
        self._held, self._call, self._state = "", [], "content"
        return _joined(out)

    def _content(self, text: str, out: list[Delta]) -> str:
        if self._trim:
            text = text.lstrip()
            if not text:
                return ""
            self._trim = False
        markers = [_CALL] * self._tools + [_THINK] * self._reasoning
        found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
        if not found:
            keep = max((_unfinished(text, marker) for marker in markers), default=0)
            self._emit(out, Delta(content=text[: len(text) - keep]))
            self._held = text[len(text) - keep :]
            return ""
        at, marker = min(found)
        self._emit(out, Delta(content=text[:at]))
        if marker == _CALL:
            self._state, self._call, self._call_size = "call", [], 0
        else:
            self._state = "reasoning"
        return text[at + len(marker) :]

    def _until(self, end: str, text: str, out: list[Delta]) -> str:
        at = text.find(end)
        if at < 0:
            keep = _unfinished(text, end)
            self._emit(out, Delta(reasoning=text[: len(text) - keep]))
            self._held = text[len(text) - keep :]
            return ""
        self._emit(out, Delta(reasoning=text[:at]))
        self._state, self._trim = "content", True
        self._reasoning = False  # an answer has one at most
        return text[at + len(end) :]

    def _in_call(self, text: str, out: list[Delta]) -> str:
        at = text.find(_CALL_END)
        if at < 0:
            keep = _unfinished(text, _CALL_END)
            self._call.append(text[: len(text) - keep])
            self._call_size += len(text) - keep
            self._held = text[len(text) - keep :]
            if self._call_size > _MAX_CALL:
                self._emit(out, Delta(content=_CALL + "".join(self._call)))
                self._call, self._state = [], "content"
            return ""
        body = "".join(self._call) + text[:at]
        call = self._parse(body)
        self._emit(out, call if call is not None else Delta(content=_CALL + body + _CALL_END))
        self._call, self._state = [], "content"
        return text[at + len(_CALL_END) :]

    def _parse(self, body: str) -> Delta | None:
        """The call, None if it is not one."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        index, self.calls = self.calls, self.calls + 1
        text = json.dumps(arguments, ensure_ascii=False)
        return Delta(index=index, id=f"call_{secrets.token_hex(12)}", name=value["name"], arguments=text)

    def _emit(self, out: list[Delta], delta: Delta) -> None:
        if delta.index is not None or delta.content or delta.reasoning:
            out.append(delta)


def _unfinished(text: str, marker: str) -> int:
    """Length of the longest end of the text with which the marker begins."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def _joined(deltas: list[Delta]) -> list[Delta]:
    """Neighbours of one kind as one."""
    out: list[Delta] = []
    for delta in deltas:
        last = out[-1] if out else None
        if last is not None and last.content and delta.content:
            out[-1] = Delta(content=last.content + delta.content)
        elif last is not None and last.reasoning and delta.reasoning:
            out[-1] = Delta(reasoning=last.reasoning + delta.reasoning)
        else:
            out.append(delta)
    return out


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
    """The form that the answer must have where a call is required; None where it is free."""
    from gristmill.serve.constraints import ConstraintSpec

    if tool_choice in (None, "none", "auto"):
        return None
    functions = _functions(tools)
    if not isinstance(tool_choice, str) and tool_choice is not None:
        name = _chosen(tool_choice)
        functions = {key: value for key, value in functions.items() if key == name}
        parallel = False
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, schema in functions.items()
    ]
    compact = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    schema = json.dumps({"x-guidance": compact, **(calls[0] if len(calls) == 1 else {"anyOf": calls})})
    many = '("\\n" call){0,7}' if parallel else ""
    grammar = f'start: call {many}\ncall: "{_CALL}\\n" body "\\n{_CALL_END}"\nbody: %json {schema}\n'
    return ConstraintSpec("grammar", grammar)
