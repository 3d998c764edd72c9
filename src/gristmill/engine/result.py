"""What a generation gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Chunk", "FinishReason", "Result", "Timings", "TokenLogprob"]

FinishReason = Literal["stop", "length", "cancelled", "timeout", "error"]
"""stop: an end token or a stop string. length: max_tokens or the context. cancelled: by a cancel flag or an
abort. timeout: by a deadline. error: by a failed step."""


@dataclass(frozen=True)
class Timings:
    """Where the time of one sequence went. A rate is 0 where there was nothing to measure."""

    load_s: float = 0.0
    """Seconds that loading the model took."""
    first_token_s: float = 0.0
    """Seconds from the call to the first token."""
    prefill_tokens_per_s: float = 0.0
    """Prompt tokens computed, not those found in the KV cache, per second until the first token."""
    decode_tokens_per_s: float = 0.0
    """Tokens after the first, per second from the first to the last."""


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log probabilities at one position, of the logits before penalties and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens, as (id, log probability), descending."""


@dataclass(frozen=True)
class Result:
    """One finished continuation."""

    text: str
    """Without special tokens and without the stop string."""
    token_ids: list[int]
    """Every generated token, an end token included."""
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    timings: Timings
    logprobs: list[TokenLogprob] | None = None
    """One per generated token, if asked for."""
    seed: int = 0
    """The seed that was used; meaningful if the temperature was not 0."""
    cached_tokens: int = 0
    """Prompt tokens that did not have to be computed, because their keys and values were kept."""
    dropped_turns: int = 0
    """Turns that a chat session has just forgotten to make room in the context."""


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed continuation."""

    text: str
    """New text; may be empty in the last chunk."""
    token_ids: list[int] = field(default_factory=list)
    """The tokens generated since the chunk before."""
    finish_reason: FinishReason | None = None
    """Set in the last chunk only."""
    result: Result | None = None
    """The whole, in the last chunk only."""
