"""Chat templates: from messages to the text a model was trained on, safely.

A template is a program written by whoever published the model, so it runs in a closed world. Only the
attributes, methods, filters and operations listed there exist; every value it builds has a bounded size; no
single step can take long, because its inputs are bounded, and nothing repeats without a look at the clock, so
a hostile template ends with an error.

Behaviour otherwise follows Hugging Face's templates: Jinja with trim_blocks and lstrip_blocks, loop controls,
the `generation` tag, `raise_exception`, `strftime_now`, and `tojson` without HTML escapes.

Text from messages must never turn into special tokens. Every place in it where such a token could begin gets
an invisible marker before rendering; a special token directly behind a marker is text. Marking these places,
rather than cutting the text into pieces, keeps the token ids of harmless messages exactly what the plain
rendering gives, leaves templates free to search and split their messages, and holds when a template deletes
or changes characters.

Jinja is imported on use.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gristmill.errors import TemplateError

if TYPE_CHECKING:
    from gristmill.io._template_sandbox import Sandbox

__all__ = ["ROLES", "ChatTemplate", "RenderedPrompt", "TemplateLimits", "check_messages"]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython", "model"})

# Rare symbols without case or meaning to templates, printable so that even repr() keeps them.
_MARKERS = range(0x1D800, 0x1DA00)
_MAX_DEPTH = 64
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


@dataclass(frozen=True)
class TemplateLimits:
    """What a chat template may use.

    source_chars: length of the template. seconds: time of one rendering. input_chars, input_values: size of
    the messages. extra_chars, input_factor: a rendering and each value in it may have extra_chars +
    input_factor x (characters and values in the messages) characters. total_factor: all text built on the
    way, as a multiple of that.
    """

    source_chars: int = 1 << 16
    seconds: float = 2.0
    input_chars: int = 1 << 26
    input_values: int = 1_000_000
    extra_chars: int = 1 << 18
    input_factor: int = 4
    total_factor: int = 64


@dataclass(frozen=True)
class RenderedPrompt:
    """A rendered template. marked is the text with the marker before every character that stems from a
    message and could start a special token; marker is "" if there are no special tokens."""

    marked: str
    marker: str

    @property
    def text(self) -> str:
        """The text without markers."""
        return self.marked.replace(self.marker, "") if self.marker else self.marked


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the form templates expect: dicts with a known role, and text as one string.

    A list of text parts is joined with line breaks. Raises TemplateError for an unknown role, missing text,
    and parts that are not text (images, audio).
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TemplateError("messages should be a list of objects with a role and content")
    if not messages:
        raise TemplateError("there are no messages")
    return [_check_message(message, number) for number, message in enumerate(messages, 1)]


def _check_message(message: object, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TemplateError(f"message {number} should be an object with a role and content")
    role = message.get("role")
    if role not in ROLES:
        raise TemplateError(
            f"message {number}: role {str(role)[:40]!r} is not one of {', '.join(sorted(ROLES))}"
        )
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise TemplateError(f"message {number} ({role}) has no content")
    if content is not None and not isinstance(content, str):
        content = _join_parts(content, number)
    checked = dict(message)
    # Templates read the content of every message, also of one that only calls tools.
    checked["content"] = content if content is not None else ""
    return checked


def _join_parts(parts: object, number: int) -> str:
    if not isinstance(parts, Sequence) or isinstance(parts, (bytes, bytearray)):
        raise TemplateError(f"message {number}: content should be a string or a list of text parts")
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            what = f"part of type {str(kind)[:40]!r}" if kind else "part without a type"
            raise TemplateError(f"message {number} holds a {what}; only text is supported")
        text = part.get("text")
        if not isinstance(text, str):
            raise TemplateError(f"message {number}: a text part should hold a string under 'text'")
        texts.append(text)
    return "\n".join(texts)


class _Input:
    """Copies what a template may see into plain JSON types, within limits, and then marks its texts."""

    def __init__(self, limits: TemplateLimits) -> None:
        self._limits = limits
        self._texts: list[str] = []
        self.chars = 0
        self.values = 0

    def copy(self, value: object, depth: int = 0) -> Any:
        self.values += 1
        if self.values > self._limits.input_values or depth > _MAX_DEPTH:
            raise TemplateError("the messages hold too many values, or values too deep inside each other")
        if isinstance(value, str):
            return self._copy_text(value)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            if value.bit_length() > 64:
                raise TemplateError("the messages hold a number that is too large")
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, Mapping):
            return {self._copy_key(key): self.copy(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.copy(item, depth + 1) for item in value]
        raise TemplateError(f"the messages hold a value of type {type(value).__name__}, which is not JSON")

    def _copy_key(self, key: object) -> str:
        if not isinstance(key, str):
            raise TemplateError(f"the messages hold a key of type {type(key).__name__}, not a string")
        return self._copy_text(key)

    def _copy_text(self, text: str) -> str:
        self.chars += len(text)
        if self.chars > self._limits.input_chars:
            raise TemplateError(f"the messages are longer than {self._limits.input_chars} characters")
        text = str.__str__(text)
        self._texts.append(text)
        return text

    def free_marker(self, source: str) -> str:
        """A marker character that occurs in no text seen so far."""
        for code in _MARKERS:
            if chr(code) not in source and not any(chr(code) in text for text in self._texts):
                return chr(code)
        raise TemplateError("the messages use every symbol that could mark special tokens")


def _mark(value: Any, pattern: re.Pattern[str], marker: str) -> Any:
    if isinstance(value, str):
        return pattern.sub(marker, value)
    if isinstance(value, dict):
        return {pattern.sub(marker, key): _mark(item, pattern, marker) for key, item in value.items()}
    if isinstance(value, list):
        return [_mark(item, pattern, marker) for item in value]
    return value


def _token_starts(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Matches, with no width, before everything that could start one of the texts.

    Before every symbol that starts one, so that deleting or changing characters behind it cannot make one;
    for texts that start like a word, before the word only, as marking every such letter would hide words from
    the template.
    """
    symbols = {text[0] for text in texts if text and not (text[0].isalnum() or text[0].isspace())}
    words = [text for text in texts if text and text[0] not in symbols]
    choices = [f"[{''.join(map(re.escape, sorted(symbols)))}]"] if symbols else []
    choices += [f"(?i:{re.escape(word)})" for word in sorted(words)]
    return re.compile(f"(?={'|'.join(choices)})") if choices else None


class ChatTemplate:
    """A compiled chat template. Safe to use from several threads; its renderings wait for each other."""

    def __init__(
        self,
        source: str,
        *,
        variables: Mapping[str, str] | None = None,
        control_texts: Iterable[str] = (),
        limits: TemplateLimits | None = None,
    ) -> None:
        """Compile a template.

        variables are given to every rendering (bos_token, eos_token, ...). control_texts are the texts of
        special tokens, which messages must not be able to write. Raises TemplateError for a template that is
        too long, is not valid Jinja, or uses what does not exist here.
        """
        self.limits = limits or TemplateLimits()
        if len(source) > self.limits.source_chars:
            most = self.limits.source_chars
            raise TemplateError(f"the chat template has {len(source)} characters; the limit is {most}")
        self.source = source
        self._variables = dict(variables or {})
        controls = frozenset(control_texts)
        self._starts = _token_starts(controls)
        self._lock = threading.Lock()
        from gristmill.io._template_sandbox import Sandbox

        self._sandbox: Sandbox = Sandbox(source, controls)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Render messages.

        add_generation_prompt ends the text where the assistant's answer begins; tools and documents are
        passed on; variables are extra values for the template (such as enable_thinking). Raises
        TemplateError, with a message of one line, for messages that are not valid and for a template that
        fails, refuses the messages or exceeds the limits.
        """
        extra = dict(variables or {})
        for name in extra:
            if (
                not isinstance(name, str)
                or not name.isidentifier()
                or name.startswith("_")
                or name in _RESERVED
            ):
                raise TemplateError(f"{str(name)[:40]!r} cannot be set as a template variable")
        source = _Input(self.limits)
        given = source.copy(
            {"messages": check_messages(messages), "tools": tools, "documents": documents, "variables": extra}
        )
        marker = ""
        if self._starts is not None:
            marker = source.free_marker(self.source)
            given = _mark(given, self._starts, marker)
        values = {
            **self._variables,
            **given.pop("variables"),
            **given,
            "add_generation_prompt": bool(add_generation_prompt),
        }
        with self._lock:
            marked = self._sandbox.render(values, self.limits, source.chars + source.values, marker)
        return RenderedPrompt(marked, marker)
