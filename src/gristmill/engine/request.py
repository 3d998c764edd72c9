"""What is asked of the engine, and what it answers, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gristmill.engine.result import FinishReason, Result, TokenLogprob
from gristmill.engine.sampling import SamplingParams
from gristmill.errors import GristmillError, UsageError

__all__ = [
    "Constraint",
    "ContextLengthExceeded",
    "EngineDead",
    "Output",
    "QueueFull",
    "Request",
    "RequestFailed",
    "Status",
]


class Constraint(Protocol):
    """What the text of one sequence may be. Used from the engine's thread alone."""

    def mask(self, words: NDArray[np.int32]) -> bool:
        """Fills [ceil(vocab / 32)] words with a bit per token, set where it may come next.

        Bit i % 32 of word i // 32 is token i. False: nothing is forbidden, and the words mean nothing.
        Raises GristmillError where the constraint cannot be followed any further.
        """

    def accept(self, token: int) -> None:
        """Takes the token that was drawn."""


class QueueFull(GristmillError):
    """As many requests wait as may; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ContextLengthExceeded(UsageError):
    """The prompt does not fit the context."""

    def __init__(self, prompt_tokens: int, context: int) -> None:
        super().__init__(f"the prompt has {prompt_tokens} tokens, but the context holds {context}")
        self.prompt_tokens = prompt_tokens
        self.context = context


class EngineDead(GristmillError):
    """The engine's thread has ended, or is closed."""


class RequestFailed(GristmillError):
    """The request could not be finished, through no fault of its own: a failed step, a lost engine."""


@dataclass(frozen=True)
class Request:
    """One prompt and how it is continued, `n` times."""

    prompt: Sequence[int]
    """Token ids."""
    params: SamplingParams
    id: str
    """Names it to `Engine.abort`; two requests at a time must not share one."""
    n: int = 1
    """Continuations. With a seed, number i uses seed + i; all share the prompt's keys and values."""
    continues: bool = False
    """The completion goes on from the prompt's text: a leading space is part of it (not in a chat)."""
    prompt_logprobs: int | None = None
    """Log probabilities of the prompt's own tokens and of this many of the most probable; None: none."""
    constraint: Callable[[], Constraint] | None = None
    """Makes a constraint for each continuation."""
    deadline: float | None = None
    """By `time.monotonic`; when it passes, what is unfinished ends with "timeout"."""


@dataclass(frozen=True)
class Output:
    """News of one continuation."""

    index: int
    """Which of the request's n."""
    text: str
    """New text: whole characters, without stop strings and special tokens; may be empty."""
    token_ids: list[int]
    """New tokens."""
    logprobs: list[TokenLogprob] | None = None
    """Of the new tokens, if asked for."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """In the first output of index 0, if asked for: one per prompt token, None for the first."""
    finish_reason: FinishReason | None = None
    """In the last output of each continuation."""
    result: Result | None = None
    """The whole continuation, in its last output."""


@dataclass(frozen=True)
class Status:
    """The engine at a moment."""

    alive: bool
    """The thread runs and makes progress (or has nothing to do)."""
    ready: bool
    """It takes requests: alive, and not draining."""
    draining: bool
    running: int
    """Sequences with keys and values."""
    waiting: int
    """Sequences that wait for a place."""
    waiting_tokens: int
    """Prompt tokens of those."""
    max_sequences: int
    context: int
    kv_used: float
    """Share of the KV memory that sequences in progress hold, 0 to 1. Cached prefixes give way to them."""
    kv: dict[str, int] = field(default_factory=dict)
    """Bytes: limit, reserved, committed, live (of sequences), cached (of prefixes only); and mappings."""
    counters: dict[str, int] = field(default_factory=dict)
    """Since the start: prompt_tokens, generation_tokens, cached_tokens, prefix_queries, prefix_hits (both in
    tokens), preemptions, steps, step_failures, requests_stop, requests_length, requests_cancelled,
    requests_timeout, requests_error."""
