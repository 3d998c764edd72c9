"""What an executor is given in one step, and the protocols between engine and executors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import UsageError
from gristmill.program.nodes import Program

PROMPT, GENERATED = 0, 1
"""Phases of a token, fixed for its life."""

MAX_STEP_TOKENS = 256
"""Most tokens of a step: few enough that a layer's activations stay in the cache."""


class CancelFlag:
    """Stops a step from another thread or a signal handler.

    `word` is the int32 array of one element that the native step polls between nodes: 0 until set, then 1.
    """

    def __init__(self) -> None:
        self.word: NDArray[np.int32] = np.zeros(1, np.int32)

    def set(self) -> None:
        """Asks the step in progress, and every later one with this flag, to stop."""
        self.word[0] = 1

    def is_set(self) -> bool:
        """Whether `set` was called."""
        return bool(self.word[0])


@runtime_checkable
class KVView(Protocol):
    """One sequence's state in all layers. It belongs to the executor that allocated it until it is closed."""

    @property
    def capacity(self) -> int:
        """Most tokens it can hold."""

    @property
    def length(self) -> int:
        """Tokens committed by completed steps."""

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on.

        Raises UsageError if `length` is negative or beyond the view's, or where a sliding window no longer
        holds the keys that the shorter sequence would see.
        """

    def close(self) -> None:
        """Gives the memory back; the view may not be used any more. Idempotent."""

    def nbytes(self) -> int:
        """Bytes in use."""


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, of S sequences, flattened without padding.

    Token i of a sequence has the position `view.length + i`. A prompt chunk, a decode step and any mixture of
    both are the same thing with different lengths.
    """

    tokens: NDArray[np.int32]
    """[T] token ids, sequence by sequence."""
    lengths: NDArray[np.int32]
    """[S] new tokens of each sequence in this step; they sum to T, and may be 0."""
    views: tuple[KVView, ...]
    """[S] the sequences' states, all different."""
    logit_rows: NDArray[np.int32]
    """[R] ascending indices into T of the rows whose logits are wanted."""
    phases: NDArray[np.uint8]
    """[T] PROMPT or GENERATED."""

    def positions(self) -> NDArray[np.int32]:
        """[T] position of every token in its own sequence."""
        parts = [
            np.arange(v.length, v.length + n, dtype=np.int32)
            for v, n in zip(self.views, self.lengths, strict=True)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def sequences(self) -> NDArray[np.int32]:
        """[T] index of every token's sequence."""
        return np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)

    def check(self, vocab_size: int) -> None:
        """Raises UsageError for a batch that contradicts itself or does not fit its views."""
        count = len(self.tokens)
        if len(self.lengths) != len(self.views):
            raise UsageError(f"the batch has {len(self.lengths)} lengths for {len(self.views)} views")
        if len(self.lengths) and int(self.lengths.min()) < 0:
            raise UsageError("a length in the batch is negative")
        if int(self.lengths.sum()) != count:
            raise UsageError(
                f"the batch's lengths sum to {int(self.lengths.sum())}, but it has {count} tokens"
            )
        if len(self.phases) != count:
            raise UsageError(f"the batch has {len(self.phases)} phases for {count} tokens")
        if len({id(view) for view in self.views}) != len(self.views):
            raise UsageError("a view appears twice in the batch")
        if count and (int(self.tokens.min()) < 0 or int(self.tokens.max()) >= vocab_size):
            raise UsageError(f"a token id is outside the vocabulary of {vocab_size}")
        rows = self.logit_rows
        if len(rows) and (int(rows[0]) < 0 or int(rows[-1]) >= count or bool(np.any(np.diff(rows) <= 0))):
            raise UsageError("logit_rows must be ascending row indices of the batch")
        for view, length in zip(self.views, self.lengths, strict=True):
            if view.length + int(length) > view.capacity:
                raise UsageError(
                    f"{int(length)} tokens after {view.length} do not fit a KV view of {view.capacity} tokens"
                )


class Executor(Protocol):
    """Runs a program. Implementations: reference (PyTorch), native (C++), null (no arithmetic)."""

    @property
    def program(self) -> Program:
        """The semantic program it was made from."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""

    def allocate(self, capacity: int) -> KVView:
        """An empty view for a sequence of up to `capacity` tokens."""

    def step(self, batch: Batch, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        """Runs the batch and appends its tokens to the views: logits [R, vocab].

        Raises Cancelled, with the views' lengths as they were, and UsageError for a batch that does not fit.
        """

    def close(self) -> None:
        """Gives back what the executor holds. Idempotent."""
