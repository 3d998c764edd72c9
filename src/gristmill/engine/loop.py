"""The decoding loop: sequences in, text out, one executor step at a time.

A step takes the next token of every sequence that is being decoded and, up to a fixed number of tokens, the
next parts of prompts that are not computed yet; sequences come and go between steps. What a sequence says
depends on none of that. Long prompts are computed in parts so that a cancellation is never far away.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gristmill.backends.native import _native
from gristmill.engine.detokenizer import TextStream, TokenBytes
from gristmill.engine.result import FinishReason, Result, Timings, TokenLogprob
from gristmill.engine.sampling import SamplingParams
from gristmill.errors import Cancelled, GristmillError, UsageError
from gristmill.program.batch import GENERATED, MAX_STEP_TOKENS, PROMPT, Batch, CancelFlag, Executor, KVView

if TYPE_CHECKING:
    from typing import Protocol

    class EngineTokenizer(TokenBytes, Protocol):
        """What the engine needs of a tokenizer."""

        @property
        def eos_token_ids(self) -> frozenset[int]: ...


__all__ = ["MAX_SEQUENCES", "Engine", "Generation", "check_prompt"]

MAX_SEQUENCES = 64
"""Most sequences in a step; further ones wait."""
PROMPT_CUT = 16
"""Prompts are cut at multiples of this position only."""


def check_prompt(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Token ids as a list. UsageError if there are none, or one is not an id of the model."""
    try:
        array = np.asarray(ids)
    except (TypeError, ValueError, OverflowError):
        array = np.zeros(0)
    if array.size == 0 and len(ids) == 0:
        raise UsageError("the prompt is empty")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError("a prompt must be text or a list of token ids")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        raise UsageError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}")
    result: list[int] = array.tolist()
    return result


class Generation:
    """One sequence between prompt and result. Made by `Engine.begin`, moved on by `Engine.steps`."""

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
        """Prompt tokens in the view."""
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
        self._ends = ends
        self._limit = limit
        self._text = text
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._owns_view = True
        self._cached = 0
        self._load_s = load_s
        self._started = started
        self.prefill_at = self._first_at = self._last_at = 0.0
        if limit == 0:
            self._finish("length")

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to do."""
        return self.finish_reason is not None

    @property
    def capacity(self) -> int:
        """Tokens that the view must hold."""
        return len(self.prompt) + self._limit

    def keep(self, view: KVView, cached: int) -> None:
        """Uses the caller's view, which holds the first `cached` prompt tokens and stays open."""
        self.view, self._owns_view = view, False
        self.computed = self._cached = cached

    def release(self) -> None:
        """Closes the view, unless it is the caller's. Idempotent."""
        view, self.view = self.view, None
        if view is not None and self._owns_view:
            view.close()

    def accept(self, token: int, now: float) -> bool:
        """Takes the token drawn at time `now`; whether the sequence goes on."""
        ids = self.token_ids
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

    def cancel(self) -> None:
        """Ends the sequence with what it has."""
        if self.finish_reason is None:
            self._finish("cancelled")

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
                prefill_tokens_per_s=(len(self.prompt) - self._cached) / prefill
                if tokens and prefill > 0
                else 0.0,
                decode_tokens_per_s=(tokens - 1) / decode if decode > 0 else 0.0,
            ),
            logprobs=self._logprobs,
            seed=self.seed,
            cached_tokens=self._cached,
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


class _Step:
    """The batch of one step and what to do with its logits.

    A step of decoding only is used again until a sequence leaves or comes: the sampler writes the tokens that
    it draws to where the next step reads them.
    """

    def __init__(self, decoding: list[Generation], prompts: list[tuple[Generation, int]]) -> None:
        """prompts: sequences and how many of their next prompt tokens are computed."""
        count = len(decoding)
        total = count + sum(n for _, n in prompts)
        tokens = np.empty(total, np.int32)
        phases = np.full(total, PROMPT, np.uint8)
        phases[:count] = GENERATED
        tokens[:count] = [one.token_ids[-1] for one in decoding]
        rows = list(range(count))
        self.drawing = list(decoding)
        """The sequences whose next token is drawn, in the order of the logits."""
        at = count
        for one, n in prompts:
            tokens[at : at + n] = one.prompt[one.computed : one.computed + n]
            at += n
            if one.computed + n == len(one.prompt):
                rows.append(at - 1)
                self.drawing.append(one)
        self.prompts = prompts
        self.states = [one.row for one in self.drawing]
        self.drawn = np.empty(len(rows), np.int32) if prompts else tokens
        sequences = [*decoding, *(one for one, _ in prompts)]
        self.batch = Batch(
            tokens=tokens,
            lengths=np.array([1] * count + [n for _, n in prompts], np.int32),
            views=tuple(_open(one) for one in sequences),
            logit_rows=np.array(rows, np.int32),
            phases=phases,
        )


def _open(one: Generation) -> KVView:
    assert one.view is not None
    return one.view


class Engine:
    """Runs sequences on an executor. Safe to use from several threads: their steps take turns."""

    def __init__(
        self,
        executor: Executor,
        tokenizer: EngineTokenizer,
        *,
        context: int,
        pool: _native.Pool | None = None,
        max_step_tokens: int = MAX_STEP_TOKENS,
        max_sequences: int = MAX_SEQUENCES,
        load_s: float = 0.0,
    ) -> None:
        """context: most tokens of a sequence. pool: threads that share the sampling of a batch."""
        if not 1 <= max_sequences <= max_step_tokens - PROMPT_CUT:
            raise UsageError(
                f"max_sequences must be between 1 and {max_step_tokens - PROMPT_CUT}, not {max_sequences}"
            )
        self.executor = executor
        self.context = context
        self.closed = False
        self._tokenizer = tokenizer
        self._pool = pool
        self._max_step_tokens = max_step_tokens
        self._max_sequences = max_sequences
        self._load_s = load_s
        self._lock = threading.Lock()
        self._main_thread = threading.main_thread().ident

    def begin(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        started: float | None = None,
        continues: bool = False,
    ) -> Generation:
        """A sequence to run, checked; nothing is computed yet.

        started: when the call began, by `time.perf_counter`. continues: the completion goes on from the
        prompt's text, so that a leading space is part of it. UsageError if the prompt is longer than the
        context.
        """
        if self.closed:
            raise UsageError("the model is closed")
        ids = check_prompt(prompt, self.executor.vocab_size)
        room = self.context - len(ids)
        if room < 0:
            raise UsageError(f"the prompt has {len(ids)} tokens, but the context holds {self.context}")
        return Generation(
            ids,
            params,
            TextStream(self._tokenizer, params.stop, continues=continues),
            frozenset() if params.ignore_eos else self._tokenizer.eos_token_ids,
            limit=room if params.max_tokens is None else min(room, params.max_tokens),
            started=time.perf_counter() if started is None else started,
            load_s=self._load_s,
        )

    def run(
        self,
        sequences: Sequence[Generation],
        cancel: CancelFlag | None = None,
        *,
        at_once: int | None = None,
    ) -> None:
        """Runs sequences to their ends, at most `at_once` together. Their memory is given back anyway."""
        steps = self.steps(sequences, cancel, at_once=at_once)
        try:
            for _ in steps:
                pass
        finally:
            steps.close()

    def steps(
        self,
        sequences: Sequence[Generation],
        cancel: CancelFlag | None = None,
        *,
        at_once: int | None = None,
    ) -> Generator[None, None, None]:
        """`run`, one step at a time. Close the generator if you leave it early.

        When `cancel` is set the sequences end as "cancelled". In the main thread, SIGINT sets it during a
        step, and then has its usual effect: KeyboardInterrupt, unless the program handles it otherwise.
        """
        flag = CancelFlag() if cancel is None else cancel
        most = min(self._max_sequences, at_once or self._max_sequences)
        waiting = deque(one for one in sequences if not one.finished)
        filling: list[Generation] = []
        decoding: list[Generation] = []
        step: _Step | None = None
        clock = time.perf_counter
        try:
            while True:
                while waiting and len(filling) + len(decoding) < most:
                    one = waiting.popleft()
                    if one.view is None:
                        one.view = self.executor.allocate(one.capacity)
                    filling.append(one)
                if step is None:
                    if not filling and not decoding:
                        return
                    step = self._next(decoding, filling)
                self._run(step, flag)
                now = clock()
                for one, n in step.prompts:
                    one.computed += n
                    if one.on_prompt is not None:
                        one.on_prompt(one.computed, len(one.prompt))
                changed = False
                for one, token in zip(step.drawing, step.drawn.tolist(), strict=True):
                    if not one.accept(token, now):
                        one.release()
                        changed = True
                if changed or step.prompts:
                    decoding = [one for one in step.drawing if not one.finished]
                    filling = [one for one in filling if one.computed < len(one.prompt)]
                    step = None
                yield
        except Cancelled:
            for one in sequences:
                one.cancel()
        finally:
            for one in sequences:
                one.release()

    def close(self) -> None:
        """Closes the executor, after the step in progress. Idempotent."""
        with self._lock:
            if not self.closed:
                self.closed = True
                self.executor.close()

    def _next(self, decoding: list[Generation], filling: list[Generation]) -> _Step:
        """One token of every sequence being decoded, and as much of the prompts as fits."""
        left = self._max_step_tokens - len(decoding)
        prompts: list[tuple[Generation, int]] = []
        for one in filling:
            count = len(one.prompt) - one.computed
            if count > left:
                count = (one.computed + left) // PROMPT_CUT * PROMPT_CUT - one.computed
            if count <= 0:
                break
            if not one.prefill_at:
                one.prefill_at = time.perf_counter()
            prompts.append((one, count))
            left -= count
        return _Step(decoding, prompts)

    def _run(self, step: _Step, flag: CancelFlag) -> None:
        """Computes a step and draws its tokens. Raises Cancelled."""
        with self._lock:
            if self.closed:
                raise UsageError("the model is closed")
            if flag.word[0]:
                raise Cancelled("cancelled")
            watching = threading.get_ident() == self._main_thread and _native.watch_interrupt(flag.word)
            try:
                logits: NDArray[np.float32] = self.executor.step(step.batch, flag)
            finally:
                if watching:
                    _native.unwatch_interrupt()
            if step.states:
                try:
                    _native.sample(logits, step.states, step.drawn, self._pool)
                except ValueError as error:
                    raise GristmillError(f"cannot choose a token: {error}") from None
