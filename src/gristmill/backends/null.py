"""The null executor: batches, states and logits of the right shapes, without arithmetic.

What is left when the model costs nothing is the engine's own time; and tests of schedulers and servers need
no weights. It imports nothing beyond NumPy and reads nothing of the program but its vocabulary and states.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import Cancelled, GristmillError, UsageError
from gristmill.program.batch import Batch, CancelFlag, KVView
from gristmill.program.costs import state_bytes
from gristmill.program.nodes import Program

_STEP, _SPREAD = 40503, 2654435761


class NullKVView:
    """Counts a sequence's tokens."""

    def __init__(self, owner: NullExecutor, capacity: int) -> None:
        self.owner = owner
        self.capacity = capacity
        self._length = 0
        self._open = True

    @property
    def length(self) -> int:
        """Committed tokens; GristmillError once closed."""
        if not self._open:
            raise GristmillError("the sequence's KV view is closed")
        return self._length

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot truncate a KV view of {self.length} tokens to {length}")
        self._length = length

    def append(self, count: int) -> None:
        """Counts tokens of a completed step."""
        self._length += count

    def nbytes(self) -> int:
        """Bytes that the tokens would take in bfloat16."""
        return int(state_bytes(self.owner.program, self.length))

    def close(self) -> None:
        """Closes it. Idempotent."""
        self._open = False


class NullExecutor:
    """Logits that depend on a token and its position alone, the same every time: one favourite, the rest 0.

    The favourite of token t at position p is column (p * 40503 + t * 2654435761 + 1) mod vocab, of logit 10.
    With `stop` the favourite is this token at every position from `stop_at` on.
    """

    def __init__(self, program: Program, *, stop: int | None = None, stop_at: int = 0) -> None:
        self.program = program
        self.vocab_size = program.vocab_size
        if stop is not None and not 0 <= stop < self.vocab_size:
            raise UsageError(f"the token {stop} is outside the vocabulary of {self.vocab_size}")
        self.stop, self.stop_at = stop, stop_at

    def allocate(self, capacity: int) -> NullKVView:
        """An empty view for a sequence of up to `capacity` tokens."""
        if capacity < 1:
            raise UsageError(f"a KV view needs room for a token, not {capacity}")
        return NullKVView(self, capacity)

    def step(self, batch: Batch, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        """Counts the tokens of `batch`: logits [R, vocab] float32.

        Raises Cancelled (views unchanged) and UsageError (a batch that does not fit).
        """
        views = [self._own(view) for view in batch.views]
        batch.check(self.vocab_size)
        if cancel is not None and cancel.is_set():
            raise Cancelled("cancelled")
        rows = batch.logit_rows
        positions = batch.positions()[rows].astype(np.int64)
        favourite = (positions * _STEP + batch.tokens[rows].astype(np.int64) * _SPREAD + 1) % self.vocab_size
        if self.stop is not None:
            favourite[positions >= self.stop_at] = self.stop
        logits = np.zeros((len(rows), self.vocab_size), np.float32)
        logits[np.arange(len(rows)), favourite] = 10.0
        for view, count in zip(views, batch.lengths.tolist(), strict=True):
            view.append(count)
        return logits

    def _own(self, view: KVView) -> NullKVView:
        if not isinstance(view, NullKVView) or view.owner is not self:
            raise UsageError("the KV view belongs to another executor")
        return view

    def close(self) -> None:
        """Holds nothing."""
