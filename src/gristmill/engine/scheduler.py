"""Which tokens of which sequences are computed next.

Continuous batching: a step has one token of every sequence that is being decoded, and parts of prompts as far
as `max_step_tokens` allows (while others decode, `prompt_tokens`: that bounds how long a token of theirs can
take). Parts end at multiples of 16. The oldest prompt goes first, but one that is long leaves half of the
room to the shortest.

Where KV memory is limited, cached prefixes give way first; then the sequence that came last is preempted: its
memory goes, and it waits at the front. Later its tokens, generated ones included, are computed again, in the
phases that they had, so that it continues with the very same bits.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gristmill.backends.native import _native
from gristmill.engine.prefix import PrefixCache
from gristmill.engine.result import TokenLogprob
from gristmill.engine.sequence import Generation
from gristmill.errors import GristmillError, KVExhausted, UsageError
from gristmill.program.batch import GENERATED, MAX_STEP_TOKENS, PROMPT, Batch, CancelFlag, Executor, KVView

if TYPE_CHECKING:
    from gristmill.backends.native.executor import NativeKVPool, NativeKVView

__all__ = ["MAX_SEQUENCES", "PROMPT_CUT", "Scheduler"]

MAX_SEQUENCES = 64
"""Most sequences in a step; further ones wait."""
PROMPT_CUT = 16
"""Prompts are cut at multiples of this position only."""
SPAN = 256
SCORED_ROWS = 64
"""Most rows of a prompt in a step whose logits are wanted: they take vocab x 4 bytes each."""
_GENERATED_KEY = 1 << 30
"""Added to generated tokens in keys of cached prefixes where phases differ in arithmetic."""

Compute = Callable[[Batch, CancelFlag], NDArray[np.float32]]


class _Step:
    """The batch of one step and what to do with its logits.

    A step of decoding only is used again until a sequence leaves or comes: the sampler writes the tokens that
    it draws to where the next step reads them.
    """

    def __init__(self, parts: list[tuple[Generation, int]]) -> None:
        """parts: sequences and how many of their next tokens are computed."""
        total = sum(n for _, n in parts)
        tokens = np.empty(total, np.int32)
        phases = np.full(total, PROMPT, np.uint8)
        self.parts = parts
        self.drawing: list[Generation] = []
        """The sequences whose next token is drawn, in the order of their rows."""
        self.scored: list[tuple[Generation, int, int]] = []
        """Sequence, first row among the logits, rows: of prompts whose log probabilities are wanted."""
        self.repeats = True
        """Whether the next step may be the same with the tokens drawn."""
        rows: list[int] = []
        drawn: list[int] = []
        at = 0
        for one, n in parts:
            begin, size = one.computed, len(one.prompt)
            tokens[at : at + n] = one.tokens(begin, begin + n)
            if begin + n > size:
                phases[at + max(size - begin, 0) : at + n] = GENERATED
            if one.prompt_logprobs is not None:
                # The row of a token says how probable the next one was. After a preemption some are known.
                first = max(begin, len(one.prompt_logprobs) - 1)
                count = min(begin + n, size - 1) - first
                if count > 0:
                    self.scored.append((one, len(rows), count))
                    rows.extend(range(at + first - begin, at + first - begin + count))
            if begin + n == one.total:
                self.drawing.append(one)
                drawn.append(len(rows))
                rows.append(at + n - 1)
            self.repeats &= n == 1 and begin + n == one.total and begin >= size
            at += n
        self.states = [one.row for one in self.drawing]
        self.picked = None if not self.scored else np.array(drawn, np.intp)
        self.drawn = tokens if self.repeats else np.empty(len(drawn), np.int32)
        self.batch = Batch(
            tokens=tokens,
            lengths=np.array([n for _, n in parts], np.int32),
            views=tuple(_open(one) for one, _ in parts),
            logit_rows=np.array(rows, np.int32),
            phases=phases,
        )


def _open(one: Generation) -> KVView:
    assert one.view is not None
    return one.view


class Scheduler:
    """The sequences that run and wait. Used by one thread."""

    def __init__(
        self,
        executor: Executor,
        compute: Compute,
        *,
        pool: _native.Pool | None = None,
        max_step_tokens: int = MAX_STEP_TOKENS,
        max_sequences: int = MAX_SEQUENCES,
        prompt_tokens: int | None = None,
        prefix_cache: bool = False,
    ) -> None:
        """compute: runs a batch. pool: threads that share the sampling. prompt_tokens: most of a step beside
        sequences that decode, None for all that fit. prefix_cache: keep beginnings for later sequences."""
        self._executor = executor
        self._compute = compute
        self._pool = pool
        self._max_step_tokens = max_step_tokens
        self._max_sequences = max_sequences
        self._prompt_tokens = prompt_tokens
        self._kv: NativeKVPool | None = getattr(executor, "kv_pool", None)
        self._prefixes = PrefixCache(self._kv) if prefix_cache and self._kv is not None else None
        self._by_phase = getattr(executor, "prompt_activations", None) != getattr(
            executor, "activations", None
        )
        self._step: _Step | None = None
        self._failed: list[Generation] = []
        self._words = np.zeros(-(-executor.vocab_size // 32), np.int32)
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []
        """In the order they were let in."""
        self.counters: Counter[str] = Counter()
        """As in `Status`; and steps_of_N, the steps of N tokens at most and more than N / 2, with step_tokens
        for all of them."""

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self.waiting or self.running)

    def add(self, one: Generation) -> None:
        """Lets a sequence wait for its turn. One that is finished is left alone."""
        if not one.finished:
            self.waiting.append(one)

    def drop(self, one: Generation) -> None:
        """Takes a finished sequence out and gives its memory back."""
        for place in (self.running, self.waiting):
            if one in place:
                place.remove(one)
        one.release()
        self._step = None

    def fail(self) -> list[Generation]:
        """Takes all running sequences out after a step that failed; what is cached goes, too."""
        failed, self.running = self.running, []
        for one in failed:
            one.release()
        self._step = None
        if self._prefixes is not None:
            self._prefixes.clear()
        return failed

    def idle_bytes(self) -> int:
        """Bytes of KV memory that only cached prefixes hold."""
        return 0 if self._prefixes is None else self._prefixes.idle_bytes()

    def forget(self) -> None:
        """Gives all cached prefixes up."""
        if self._prefixes is not None:
            self._prefixes.clear()

    def step(self, flag: CancelFlag) -> list[Generation]:
        """Computes a step and draws its tokens: the sequences that have news. Raises Cancelled."""
        self._admit()
        step = self._step
        if step is None or not self._reserve(step.parts):
            step = self._next()
        if step is None:
            return self._take_failed()
        logits = self._compute(step.batch, flag)
        self.counters["steps"] += 1
        size = len(step.batch.tokens)
        self.counters["step_tokens"] += size
        self.counters[f"steps_of_{1 << (size - 1).bit_length()}"] += 1
        for one, n in step.parts:
            if one.computed < len(one.prompt):
                self._prompt_done(one, n)
            one.computed += n
        for one, first, count in step.scored:
            self._score(one, logits[first : first + count])
        if step.picked is not None:
            logits = logits[step.picked]
        failed = self._draw(step, logits)
        now = time.perf_counter()
        goes_on = step.repeats and not failed
        for one, token in zip(step.drawing, step.drawn.tolist(), strict=True):
            if one in failed:
                continue
            if one.computed == len(one.prompt):
                self._prompt_complete(one)
            self.counters["generation_tokens"] += 1
            try:
                alive = one.accept(token, now)
            except GristmillError as error:
                one.end("error", str(error))
                alive = False
            if not alive:
                self._keep(one)
                self.running.remove(one)
                one.release()
                goes_on = False
        self._step = step if goes_on else None
        return (
            step.drawing + [one for one, _, _ in step.scored if one not in step.drawing] + self._take_failed()
        )

    # ---- letting in ----------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Lets sequences in while there is room."""
        while self.waiting and len(self.running) < self._max_sequences:
            one = self.waiting[0]
            if one.view is None:
                if not self._fits(one):
                    break
                try:
                    self._begin(one)
                except GristmillError as error:
                    one.release()
                    one.computed = 0
                    if self.running:
                        break  # what the others hold may be what is missing
                    if self._prefixes is not None and len(self._prefixes):
                        self._prefixes.clear()
                        continue
                    self.waiting.popleft()
                    one.end("error", str(error))
                    self._failed.append(one)
                    continue
            self.waiting.popleft()
            self.running.append(one)
            self._step = None

    def _fits(self, one: Generation) -> bool:
        """Whether the prompt has room beside what the running ones still need for theirs."""
        if self._kv is None or not self.running:
            return True
        free = self._kv.limit - self._kv.used
        free -= sum(_paged(other).wanted(other.remaining + 1) for other in self.running)
        need = -(-(one.total + 1) // SPAN) * self._kv.span_bytes
        return need <= free or need <= free + self.idle_bytes()

    def _begin(self, one: Generation) -> None:
        """Gives a sequence a view, which may hold the beginning of its tokens already."""
        one.view = view = self._executor.allocate(max(one.capacity, one.total))
        if self._prefixes is None or one.prompt_logprobs is not None:
            return
        ids = self._key(one, one.total)
        spans, length = self._prefixes.match(ids, one.total - 1)
        self.counters["prefix_queries"] += one.total
        if not length:
            return
        try:
            _paged(one).adopt(spans, length)
        except (KVExhausted, UsageError):
            view.close()
            one.view = self._executor.allocate(max(one.capacity, one.total))
            return
        self.counters["prefix_hits"] += length
        one.computed = length
        if not one.token_ids:
            one.cached = length
            self.counters["cached_tokens"] += length
            self.counters["prompt_tokens"] += length

    def _key(self, one: Generation, length: int) -> NDArray[np.int32]:
        """The first tokens, told apart by phase where that changes their keys and values."""
        ids = one.tokens(0, length)
        if self._by_phase and length > len(one.prompt):
            ids = ids.copy()
            ids[len(one.prompt) :] += _GENERATED_KEY
        return ids

    # ---- choosing ------------------------------------------------------------------------------------------

    def _next(self) -> _Step | None:
        """One token of every sequence being decoded, and as much of the prompts as fits."""
        while self.running:
            parts = self._parts()
            if self._reserve(parts):
                return _Step(parts)
        return None

    def _parts(self) -> list[tuple[Generation, int]]:
        decoding = [one for one in self.running if one.remaining == 1]
        filling = [one for one in self.running if one.remaining > 1]
        parts = [(one, 1) for one in decoding]
        left = self._max_step_tokens - len(decoding)
        if decoding and self._prompt_tokens is not None:
            left = min(left, self._prompt_tokens)
        if len(filling) > 1 and filling[0].remaining > left:
            # A long prompt does not keep short ones waiting for all of it.
            shortest = min(filling[1:], key=lambda one: one.remaining)
            if shortest.remaining <= left // 2:
                filling.remove(shortest)
                filling.insert(0, shortest)
        for one in filling:
            count = one.remaining
            room = left if one.prompt_logprobs is None else min(left, SCORED_ROWS)
            if count > room:
                count = (one.computed + room) // PROMPT_CUT * PROMPT_CUT - one.computed
            if count <= 0:
                break
            if not one.prefill_at:
                one.prefill_at = time.perf_counter()
            parts.append((one, count))
            left -= count
        for one in decoding:
            if not one.prefill_at:
                one.prefill_at = time.perf_counter()
        return parts

    def _reserve(self, parts: list[tuple[Generation, int]]) -> bool:
        """Takes the memory of a step; false if sequences had to be preempted for it."""
        if self._kv is None:
            return True
        for one, count in parts:
            view = _paged(one)
            while True:
                try:
                    view.reserve(count)
                    break
                except KVExhausted as error:
                    wanted = view.wanted(count)
                    if self._prefixes is not None and self._prefixes.evict(wanted):
                        continue
                    self._step = None
                    if not self._preempt(one):
                        one.end("error", str(error))
                        self._failed.append(one)
                        self.running.remove(one)
                        one.release()
                    return False
        return True

    def _preempt(self, needy: Generation) -> bool:
        """Takes the memory of the sequence that came last; false if the needy one is alone."""
        for held in self.waiting:
            # A copy of a prompt that waits for its turn can be made again.
            if held.view is not None and held is not needy:
                held.release()
                held.computed = 0
                return True
        if len(self.running) < 2:
            return False
        victim = self.running.pop()
        self._keep(victim)
        victim.release()
        victim.computed = 0
        self.waiting.appendleft(victim)
        self.counters["preemptions"] += 1
        return True

    # ---- after a step --------------------------------------------------------------------------------------

    def _prompt_done(self, one: Generation, count: int) -> None:
        done = min(one.computed + count, len(one.prompt))
        if not one.token_ids:
            self.counters["prompt_tokens"] += done - one.computed
            if one.on_prompt is not None:
                one.on_prompt(done, len(one.prompt))

    def _prompt_complete(self, one: Generation) -> None:
        """The prompt's keys and values are there: others may begin with them."""
        if self._prefixes is not None and not one.token_ids:
            self._prefixes.insert(self._key(one, one.computed), _paged(one))
        siblings, one.siblings = one.siblings, []
        for sibling in reversed(siblings):
            if sibling.finished:
                continue
            unit = 1 if self._kv is None else self._kv.share_tokens
            length = (len(one.prompt) - 1) // unit * unit
            if self._kv is not None and length > 0 and sibling.prompt_logprobs is None:
                try:
                    sibling.view = _paged(one).fork(length, max(sibling.capacity, sibling.total))
                    sibling.computed = sibling.cached = length
                    self.counters["cached_tokens"] += length
                    self.counters["prompt_tokens"] += length
                except (KVExhausted, UsageError):
                    pass  # it computes the prompt itself
            self.waiting.appendleft(sibling)

    def _keep(self, one: Generation) -> None:
        """Keeps the keys and values of a sequence that leaves for those that go on from it."""
        if self._prefixes is not None and one.view is not None and one.computed and one.error is None:
            self._prefixes.insert(self._key(one, one.computed), _paged(one))

    def _score(self, one: Generation, logits: NDArray[np.float32]) -> None:
        """Log probabilities of prompt tokens, from the rows before them."""
        assert one.prompt_logprobs is not None
        at = len(one.prompt_logprobs)
        targets = one.prompt[at : at + len(logits)]
        scores = _native.score(
            np.ascontiguousarray(logits), np.ascontiguousarray(targets), one.prompt_top, self._pool
        )
        for token, (own, top) in zip(targets.tolist(), scores, strict=True):
            one.prompt_logprobs.append(TokenLogprob(token, own, tuple(top)))

    def _draw(self, step: _Step, logits: NDArray[np.float32]) -> list[Generation]:
        """Draws the tokens; the sequences for which that failed, which are finished then."""
        if not step.states:
            return []
        bad: list[Generation] = []
        for one in step.drawing:
            try:
                one.restrict(self._words, logits.shape[1])
            except GristmillError as error:
                one.row.mask(np.zeros(0, np.int32))
                one.end("error", str(error))
                bad.append(one)
        try:
            _native.sample(logits, step.states, step.drawn, self._pool)
        except ValueError:
            # One by one, to see whose it is.
            for i, one in enumerate(step.drawing):
                try:
                    _native.sample(logits[i : i + 1], [one.row], step.drawn[i : i + 1], None)
                except ValueError as error:
                    one.end("error", f"cannot choose a token: {error}")
                    if one not in bad:
                        bad.append(one)
        for one in bad:
            self._failed.append(one)
            self.running.remove(one)
            one.release()
        return bad

    def _take_failed(self) -> list[Generation]:
        failed, self._failed = self._failed, []
        return failed


def _paged(one: Generation) -> NativeKVView:
    """The view of an executor that has a pool."""
    return one.view  # type: ignore[return-value]
