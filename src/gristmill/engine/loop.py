"""The decoding loop: sequences in, text out, one executor step at a time.

A step takes the next token of every sequence that is being decoded and, up to a fixed number of tokens, the
next parts of prompts that are not computed yet; sequences come and go between steps. What a sequence says
depends on none of that. Long prompts are computed in parts so that a cancellation is never far away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gristmill.backends.native import _native
from gristmill.engine.detokenizer import TextStream, TokenBytes
from gristmill.engine.request import Constraint, ContextLengthExceeded
from gristmill.engine.sampling import SamplingParams
from gristmill.engine.scheduler import MAX_SEQUENCES, PROMPT_CUT, Scheduler
from gristmill.engine.sequence import Generation
from gristmill.errors import Cancelled, GristmillError, UsageError
from gristmill.program.batch import MAX_STEP_TOKENS, Batch, CancelFlag, Executor

if TYPE_CHECKING:
    from typing import Protocol

    class EngineTokenizer(TokenBytes, Protocol):
        """What the engine needs of a tokenizer."""

        @property
        def eos_token_ids(self) -> frozenset[int]: ...


__all__ = ["MAX_SEQUENCES", "PROMPT_CUT", "Generation", "Runner", "check_prompt"]


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


class Runner:
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
        index: int = 0,
        constraint: Constraint | None = None,
        prompt_logprobs: int | None = None,
    ) -> Generation:
        """A sequence to run, checked; nothing is computed yet.

        started: when the call began, by `time.perf_counter`. continues: the completion goes on from the
        prompt's text, so that a leading space is part of it. The rest is as in `Request`. UsageError if the
        prompt is longer than the context.
        """
        if self.closed:
            raise UsageError("the model is closed")
        ids = check_prompt(prompt, self.executor.vocab_size)
        if params.max_tokens == 0 and prompt_logprobs is None:
            raise UsageError("max_tokens must be a whole number from 1, not 0")
        room = self.context - len(ids)
        if room < 0:
            raise ContextLengthExceeded(len(ids), self.context)
        return Generation(
            ids,
            params,
            TextStream(self._tokenizer, params.stop, continues=continues),
            frozenset() if params.ignore_eos else self._tokenizer.eos_token_ids,
            limit=room if params.max_tokens is None else min(room, params.max_tokens),
            started=time.perf_counter() if started is None else started,
            load_s=self._load_s,
            index=index,
            constraint=constraint,
            prompt_logprobs=prompt_logprobs,
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
        scheduler = Scheduler(
            self.executor,
            self.compute,
            pool=self._pool,
            max_step_tokens=self._max_step_tokens,
            max_sequences=min(self._max_sequences, at_once or self._max_sequences),
        )
        try:
            for one in sequences:
                scheduler.add(one)
            while scheduler.busy:
                for one in scheduler.step(flag):
                    if one.error is not None:
                        raise GristmillError(one.error)
                yield
        except Cancelled:
            for one in sequences:
                one.end("cancelled")
        finally:
            for one in sequences:
                one.release()

    def close(self) -> None:
        """Closes the executor, after the step in progress. Idempotent."""
        with self._lock:
            if not self.closed:
                self.closed = True
                self.executor.close()

    def compute(self, batch: Batch, flag: CancelFlag) -> NDArray[np.float32]:
        """The logits of a step, once other threads' steps are done. Raises Cancelled."""
        with self._lock:
            if self.closed:
                raise UsageError("the model is closed")
            if flag.word[0]:
                raise Cancelled("cancelled")
            watching = threading.get_ident() == self._main_thread and _native.watch_interrupt(flag.word)
            try:
                return self.executor.step(batch, flag)
            finally:
                if watching:
                    _native.unwatch_interrupt()
