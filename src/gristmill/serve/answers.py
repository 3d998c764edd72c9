"""Answers in the forms of OpenAI's API, whole and as streams."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gristmill.engine.request import Output
from gristmill.engine.result import TokenLogprob
from gristmill.serve.tools import Delta, OutputParser

__all__ = ["Answer", "Chat", "Completion", "TokenTexts"]

_REASONS = {"stop": "stop", "length": "length"}


class TokenTexts(Protocol):
    """What answers need of a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes: ...

    @property
    def special_ids(self) -> frozenset[int]: ...


def _text(data: bytes) -> str:
    """A token's bytes as a text that tells them apart from all others."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _number(value: float) -> float:
    return value if math.isfinite(value) else -9999.0


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class _Choice:
    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str | None = None
    parser: OutputParser | None = None
    started: bool = False


class Answer:
    """One answer being put together; `chunks` gives what a stream sends for an Output."""

    object = ""
    prefix = ""

    def __init__(self, model: str, count: int, tokenizer: TokenTexts, fingerprint: str) -> None:
        """count: of choices."""
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = model
        self.usage = Usage()
        self.choices = [_Choice() for _ in range(count)]
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.continuous = False
        """Whether every chunk tells the usage so far."""

    def count(self, output: Output) -> None:
        """Takes note of tokens."""
        self.usage.completion += len(output.token_ids)
        if output.result is not None:
            self.usage.cached = max(self.usage.cached, output.result.cached_tokens)

    def event(self, choices: list[dict[str, Any]], usage: bool = False) -> bytes:
        """One chunk of a stream."""
        value: dict[str, Any] = {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }
        if usage or self.continuous:
            value["usage"] = self.usage.json()
        return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"

    def body(self, choices: list[dict[str, Any]], kind: str) -> dict[str, Any]:
        """The whole answer."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            "usage": self.usage.json(),
        }


class Chat(Answer):
    """An answer of /v1/chat/completions."""

    object = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(
        self,
        model: str,
        count: int,
        tokenizer: TokenTexts,
        fingerprint: str,
        *,
        logprobs: bool,
        tools: bool,
        reasoning: bool,
        starts_in_reasoning: bool = False,
    ) -> None:
        """reasoning, starts_in_reasoning: see `OutputParser`."""
        super().__init__(model, count, tokenizer, fingerprint)
        self._logprobs = logprobs
        for choice in self.choices:
            choice.parser = OutputParser(
                tools=tools, reasoning=reasoning, starts_in_reasoning=starts_in_reasoning
            )

    def chunks(self, output: Output, index: int) -> Iterable[bytes]:
        """What a stream sends for news of a choice."""
        self.count(output)
        choice = self.choices[index]
        logprobs = self._scores(output.logprobs)
        for delta in self._parse(choice, output):
            value = _delta_json(delta)
            if not choice.started:
                choice.started = True
                value = {"role": "assistant", **value}
            yield self.event([_chat_choice(index, value, None, logprobs)])
            logprobs = None
        if not choice.started and (output.token_ids or output.finish_reason):
            choice.started = True
            yield self.event([_chat_choice(index, {"role": "assistant", "content": ""}, None, logprobs)])
            logprobs = None
        if output.finish_reason is not None:
            yield self.event([_chat_choice(index, {}, self._reason(choice, output.finish_reason), logprobs)])
        elif logprobs is not None and logprobs["content"]:
            yield self.event([_chat_choice(index, {}, None, logprobs)])

    def take(self, output: Output, index: int) -> None:
        """Keeps news for the whole answer."""
        self.count(output)
        choice = self.choices[index]
        choice.logprobs += output.logprobs or []
        for delta in self._parse(choice, output):
            choice.text += delta.content or ""
            choice.reasoning += delta.reasoning or ""
            if delta.index is not None:
                while len(choice.calls) <= delta.index:
                    choice.calls.append(
                        {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
                    )
                call = choice.calls[delta.index]
                call["id"] = delta.id or call["id"]
                call["function"]["name"] = delta.name or call["function"]["name"]
                call["function"]["arguments"] += delta.arguments or ""
        if output.finish_reason is not None:
            choice.reason = self._reason(choice, output.finish_reason)

    def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choices = []
        for index, choice in enumerate(self.choices):
            message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.reasoning:
                message["reasoning_content"] = choice.reasoning
            if choice.calls:
                message["tool_calls"] = choice.calls
                message["content"] = choice.text or None
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": self._scores(choice.logprobs),
                    "finish_reason": choice.reason,
                }
            )
        return self.body(choices, "chat.completion")

    def _parse(self, choice: _Choice, output: Output) -> list[Delta]:
        assert choice.parser is not None
        deltas = choice.parser.push(output.text) if output.text else []
        return deltas + (choice.parser.finish() if output.finish_reason is not None else [])

    def _reason(self, choice: _Choice, reason: str) -> str:
        assert choice.parser is not None
        if choice.parser.calls and reason == "stop":
            return "tool_calls"
        return _REASONS.get(reason, "stop")

    def _scores(self, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": [self._score(one) for one in logprobs or []], "refusal": None}

    def _score(self, one: TokenLogprob) -> dict[str, Any]:
        return {
            **self._entry(one.token_id, one.logprob),
            "top_logprobs": [self._entry(token, logprob) for token, logprob in one.top],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token)
        return {"token": _text(data), "logprob": _number(logprob), "bytes": list(data)}


def _delta_json(delta: Delta) -> dict[str, Any]:
    if delta.index is not None:
        function: dict[str, Any] = {}
        call: dict[str, Any] = {"index": delta.index, "function": function}
        if delta.id:
            call |= {"id": delta.id, "type": "function"}
        if delta.name:
            function["name"] = delta.name
        function["arguments"] = delta.arguments or ""
        return {"tool_calls": [call]}
    if delta.reasoning is not None:
        return {"reasoning_content": delta.reasoning}
    return {"content": delta.content or ""}


def _chat_choice(
    index: int, delta: dict[str, Any], reason: str | None, logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


class Completion(Answer):
    """An answer of /v1/completions."""

    object = "text_completion"
    prefix = "cmpl"

    def __init__(
        self,
        model: str,
        count: int,
        tokenizer: TokenTexts,
        fingerprint: str,
        *,
        logprobs: bool,
        echoes: Sequence[tuple[str, Sequence[int]]] | None,
    ) -> None:
        """echoes: text and ids of each choice's prompt, where those are part of the answer; equal neighbours
        share their scores."""
        super().__init__(model, count, tokenizer, fingerprint)
        self._logprobs = logprobs
        self._echoes = echoes
        self._shared: dict[int, list[Any]] = {}
        """Scores of a prompt by id() of its ids."""
        self._offsets = [0] * count

    def chunks(self, output: Output, index: int) -> Iterable[bytes]:
        """What a stream sends for news of a choice."""
        self.count(output)
        text, scores = self._news(output, index)
        if text or scores or output.finish_reason is not None:
            reason = None if output.finish_reason is None else _REASONS.get(output.finish_reason, "stop")
            yield self.event(
                [
                    {
                        "index": index,
                        "text": text,
                        "logprobs": self._scores(scores, index),
                        "finish_reason": reason,
                    }
                ]
            )

    def take(self, output: Output, index: int) -> None:
        """Keeps news for the whole answer."""
        self.count(output)
        text, scores = self._news(output, index)
        choice = self.choices[index]
        choice.text += text
        choice.logprobs += scores
        if output.finish_reason is not None:
            choice.reason = _REASONS.get(output.finish_reason, "stop")

    def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choices = [
            {
                "index": index,
                "text": choice.text,
                "logprobs": self._scores(choice.logprobs, index),
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(self.choices)
        ]
        return self.body(choices, "text_completion")

    def _news(self, output: Output, index: int) -> tuple[str, list[Any]]:
        choice = self.choices[index]
        text, scores = output.text, list(output.logprobs or [])
        if self._echoes is not None and not choice.started:
            shown, ids = self._echoes[index]
            text = shown + text
            if self._logprobs:
                if output.prompt_logprobs is not None:
                    self._shared[id(ids)] = [int(ids[0]), *output.prompt_logprobs[1:]]
                scores = self._shared.get(id(ids), []) + scores
        choice.started = True
        return text, scores

    def _scores(self, scores: Sequence[Any], index: int) -> dict[str, Any] | None:
        """tokens, token_logprobs, top_logprobs and text_offset; the first token of a prompt has no score."""
        if not self._logprobs:
            return None
        tokens: list[str] = []
        own: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for one in scores:
            token = one if isinstance(one, int) else one.token_id
            text = _text(self.tokenizer.token_bytes(token))
            tokens.append(text)
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
            if isinstance(one, int):
                own.append(None)
                top.append(None)
                continue
            own.append(_number(one.logprob))
            best = {_text(self.tokenizer.token_bytes(other)): _number(value) for other, value in one.top}
            top.append(best)
        return {"tokens": tokens, "token_logprobs": own, "top_logprobs": top, "text_offset": offsets}
