"""Greedy equality: two implementations choose the same tokens, but for near-ties of the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first place where two greedy texts differ, and how close the choice was for the reference."""

    index: int
    """Among the generated tokens."""
    ours: int
    reference: int
    gap: float
    """The reference's logit of its own choice minus its logit of ours: 0 or more."""
    rank: int
    """Of our token among the reference's logits: 1 is the runner-up."""
    near_tie: bool
    """Whether the gap is within the tolerance given, so that rounding alone explains the difference."""


def audit_greedy(
    ours: Sequence[int],
    reference: Sequence[int],
    logits: Callable[[int], NDArray[np.float32]],
    *,
    tolerance: float,
) -> Divergence | None:
    """None if the generated tokens are equal, else where and how they part.

    logits(i): the reference's logits [vocab] from which it chose its i-th generated token. tolerance: the
    gap, in logits, up to which the choice counts as a near-tie; after it both texts go their own way, so
    nothing later is compared. A text that merely ends earlier diverges there, with an infinite gap and rank
    0: ties do not excuse it.
    """
    for index, (a, b) in enumerate(zip(ours, reference, strict=False)):
        if a != b:
            row = np.asarray(logits(index), np.float64)
            gap = float(row[b] - row[a])
            rank = int((row > row[a]).sum())
            return Divergence(index, a, b, gap, rank, 0.0 <= gap <= tolerance)
    if len(ours) != len(reference):
        index = min(len(ours), len(reference))
        first, second = (seq[index] if index < len(seq) else -1 for seq in (ours, reference))
        return Divergence(index, first, second, float("inf"), 0, False)
    return None
