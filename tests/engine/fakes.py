"""Executors and a tokenizer without a model, for tests of the loop."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import Cancelled, UsageError
from gristmill.program.batch import GENERATED, PROMPT, Batch, CancelFlag, KVView
from gristmill.program.nodes import Program


class FakeView:
    """Holds the tokens themselves where a real view holds keys and values."""

    def __init__(self, owner: FakeExecutor, capacity: int) -> None:
        self.owner = owner
        self.capacity = capacity
        self.tokens: list[int] = []
        self.open = True

    @property
    def length(self) -> int:
        return len(self.tokens)

    def truncate(self, length: int) -> None:
        if not self.owner.floor <= length <= len(self.tokens):
            raise UsageError("the sliding window has moved on")
        del self.tokens[length:]

    def close(self) -> None:
        self.open = False

    def nbytes(self) -> int:
        return len(self.tokens)


class FakeExecutor:
    """The logits of a row are a function of all the tokens before it, so that any mix-up changes the text.

    `script` (position -> token) makes a token certain at a position.
    """

    program: Program

    def __init__(self, vocab_size: int = 64, script: Mapping[int, int] | None = None) -> None:
        self.vocab_size = vocab_size
        self.script = dict(script or {})
        self.views: list[FakeView] = []
        self.steps: list[list[int]] = []
        """Tokens per sequence, of every step."""
        self.cuts: list[int] = []
        """Positions where a part of a prompt ended."""
        self.on_step: Callable[[FakeExecutor, CancelFlag | None], None] | None = None
        self.floor = 0
        """Shortest length that views can be truncated to."""
        self.closed = False

    @property
    def open_views(self) -> int:
        return sum(view.open for view in self.views)

    def allocate(self, capacity: int) -> KVView:
        view = FakeView(self, capacity)
        self.views.append(view)
        return view

    def step(self, batch: Batch, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        batch.check(self.vocab_size)
        self.steps.append(batch.lengths.tolist())
        if self.on_step is not None:
            self.on_step(self, cancel)
        if cancel is not None and cancel.is_set():
            raise Cancelled("cancelled")
        rows: list[tuple[int, ...]] = []
        at = 0
        for view, count in zip(batch.views, batch.lengths.tolist(), strict=True):
            assert isinstance(view, FakeView)
            assert view.open
            phases = batch.phases[at : at + count].tolist()
            # Either one generated token or a part of a prompt.
            assert phases == [GENERATED] or phases == [PROMPT] * count
            for token in batch.tokens[at : at + count].tolist():
                view.tokens.append(token)
                rows.append(tuple(view.tokens))
            if phases != [GENERATED]:
                self.cuts.append(view.length)
            at += count
        wanted = [self._logits(rows[i]) for i in batch.logit_rows.tolist()]
        return np.array(wanted, np.float32).reshape(len(wanted), self.vocab_size)

    def _logits(self, history: tuple[int, ...]) -> NDArray[np.float32]:
        if len(history) in self.script:
            logits = np.zeros(self.vocab_size, np.float32)
            logits[self.script[len(history)]] = 50.0
            return logits
        seed = zlib.crc32(repr(history).encode())
        return np.random.default_rng(seed).normal(0, 2, self.vocab_size).astype(np.float32)

    def close(self) -> None:
        self.closed = True


class FakeTokenizer:
    """Token i stands for `pieces[i]`, or for a letter."""

    strip_leading = 0

    def __init__(self, pieces: Mapping[int, bytes] | None = None, ends: tuple[int, ...] = ()) -> None:
        self._pieces = dict(pieces or {})
        self.eos_token_ids = frozenset(ends)
        self.special_ids = frozenset(ends)

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces.get(token_id, bytes([97 + token_id % 26]))
