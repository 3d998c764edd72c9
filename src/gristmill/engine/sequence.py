"""One sequence: its prompt, what was generated, and the text of that."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gristmill.backends.native import _native
from gristmill.engine.detokenizer import TextStream
from gristmill.engine.request import Constraint
from gristmill.engine.result import FinishReason, Result, Timings, TokenLogprob
from gristmill.engine.sampling import SamplingParams
from gristmill.errors import GristmillError
from gristmill.program.batch import KVView

__all__ = ["Generation"]

_NO_MASK = np.zeros(0, np.int32)


class Generation:
    """One sequence between prompt and result. Made by `Runner.begin`, moved on by `Scheduler.step`."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        text: TextStream,
        ends: frozenset[int],
        *,
        limit: int,
        started: float,
        load_s: float,
        index: int = 0,
        constraint: Constraint | None = None,
        prompt_logprobs: int | None = None,
    ) -> None:
        self.prompt = np.array(prompt, np.int32)
        self.params = params
        self.token_ids: list[int] = []
        """Generated so far."""
        self.finish_reason: FinishReason | None = None
        self.on_text: Callable[[str], None] | None = None
        """Called with every new piece of text, in the thread that runs the steps."""
        self.on_prompt: Callable[[int, int], None] | None = None
        """Called as the prompt is computed, with the tokens done and all of them."""
        self.seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
        self.view: KVView | None = None
        self.computed = 0
        """Tokens in the view."""
        self.index = index
        """Which of the continuations of a request."""
        self.siblings: list[Generation] = []
        """Other continuations of the prompt, which begin with a copy of this one's view."""
        self.error: str | None = None
        """Why the finish_reason is "error"."""
        self.prompt_logprobs: list[TokenLogprob | None] | None = None if prompt_logprobs is None else [None]
        """Of the prompt tokens that are computed, if asked for."""
        self.prompt_top = prompt_logprobs or 0
        self.scores_sent = False
        """Whether the log probabilities of the prompt were handed on."""
        self._constraint = constraint
        self.row = _native.SampleRow(
            self.prompt,
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            self.seed,
            -1 if params.logprobs is None else params.logprobs,
        )
        self._ends = ends = ends.union(params.stop_token_ids)
        if params.logit_bias:
            self.row.bias(list(params.logit_bias), list(params.logit_bias.values()))
        self._masked = False
        self._sent_text = self._sent_tokens = 0
        self._limit = limit
        self._text = text
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._owns_view = True
        self.cached = 0
        """Prompt tokens that were found in the KV cache."""
        self._load_s = load_s
        self._started = started
        self.prefill_at = self._first_at = self._last_at = 0.0
        if limit == 0 and prompt_logprobs is None:
            self._finish("length")

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to do."""
        return self.finish_reason is not None

    @property
    def capacity(self) -> int:
        """Tokens that the view must hold."""
        return len(self.prompt) + self._limit

    @property
    def total(self) -> int:
        """Tokens so far, prompt and completion."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def remaining(self) -> int:
        """Tokens that must be computed before the next one can be drawn."""
        return self.total - self.computed

    def tokens(self, begin: int, end: int) -> NDArray[np.int32]:
        """Tokens [begin, end) of prompt and completion."""
        size = len(self.prompt)
        if end <= size:
            return self.prompt[begin:end]
        own = np.array(self.token_ids[max(begin - size, 0) : end - size], np.int32)
        return np.concatenate([self.prompt[begin:], own]) if begin < size else own

    def keep(self, view: KVView, cached: int) -> None:
        """Uses the caller's view, which holds the first `cached` prompt tokens and stays open."""
        self.view, self._owns_view = view, False
        self.computed = self.cached = cached

    def release(self) -> None:
        """Closes the view, unless it is the caller's. Idempotent."""
        view, self.view = self.view, None
        if view is not None and self._owns_view:
            view.close()

    def restrict(self, words: NDArray[np.int32], vocab_size: int) -> None:
        """Tells the sampler which tokens may come next; `words` is room for a bit per token.

        Raises GristmillError if none may.
        """
        early = len(self.token_ids) < self.params.min_tokens
        if self._constraint is None and not early and not self._masked:
            return
        masked = self._constraint is not None and self._constraint.mask(words)
        if early:
            if not masked:
                words.fill(-1)
            bits = words.view(np.uint32)
            for token in self._ends:
                if token < vocab_size:
                    bits[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
            masked = True
        if masked and not words.any():
            raise GristmillError("no token is allowed next by the constraint on the output")
        self._masked = masked
        self.row.mask(words if masked else _NO_MASK)

    def accept(self, token: int, now: float) -> bool:
        """Takes the token drawn at time `now`; whether the sequence goes on."""
        ids = self.token_ids
        if self._limit == 0:  # only the prompt was asked about
            self._first_at = self._last_at = now
            self._finish("length")
            return False
        if not ids:
            self._first_at = now
        self._last_at = now
        ids.append(token)
        if self._logprobs is not None:
            own, top = self.row.logprobs()
            self._logprobs.append(TokenLogprob(token, own, tuple(top)))
        if token in self._ends:
            self._finish("stop")
            return False
        if self._constraint is not None:
            self._constraint.accept(token)
        text = self._text.push(token)
        if text:
            self._emit(text)
        if self._text.stopped_by is not None:
            self._finish("stop")
            return False
        if len(ids) >= self._limit:
            self._finish("length")
            return False
        return True

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """Ends the sequence with what it has, if it has not ended."""
        if self.finish_reason is None:
            self.error = error
            self._finish(reason)

    def news(self) -> tuple[str, list[int], list[TokenLogprob] | None]:
        """Text, tokens and log probabilities since the last call."""
        text = "".join(self._pieces[self._sent_text :])
        ids = self.token_ids[self._sent_tokens :]
        logprobs = None if self._logprobs is None else self._logprobs[self._sent_tokens :]
        self._sent_text, self._sent_tokens = len(self._pieces), len(self.token_ids)
        return text, ids, logprobs

    def result(self, dropped_turns: int = 0) -> Result:
        """The finished sequence."""
        if self.finish_reason is None:
            raise GristmillError("the sequence is not finished")
        tokens = len(self.token_ids)
        prefill = self._first_at - self.prefill_at
        decode = self._last_at - self._first_at
        return Result(
            text="".join(self._pieces),
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.prompt),
            completion_tokens=tokens,
            timings=Timings(
                load_s=self._load_s,
                first_token_s=self._first_at - self._started if tokens else 0.0,
                prefill_tokens_per_s=(len(self.prompt) - self.cached) / prefill
                if tokens and prefill > 0
                else 0.0,
                decode_tokens_per_s=(tokens - 1) / decode if decode > 0 else 0.0,
            ),
            logprobs=self._logprobs,
            seed=self.seed,
            cached_tokens=self.cached,
            dropped_turns=dropped_turns,
        )

    def _emit(self, text: str) -> None:
        self._pieces.append(text)
        if self.on_text is not None:
            self.on_text(text)

    def _finish(self, reason: FinishReason) -> None:
        rest = self._text.finish()
        self.finish_reason = "stop" if self._text.stopped_by is not None else reason
        if rest:
            self._emit(rest)
