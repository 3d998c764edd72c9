"""Where two greedy texts part, and whether a near-tie excuses it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gristmill.evaluate import audit_greedy

LOGITS = np.array([[0.0, 1.0, 5.0, 4.9], [3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 7.0, 6.0]], np.float32)


def row(index: int) -> np.ndarray:
    return LOGITS[index]


def test_equal_texts_do_not_diverge():
    assert audit_greedy([2, 0, 2], [2, 0, 2], row, tolerance=0.0) is None


@pytest.mark.parametrize(("tolerance", "excused"), [(0.2, True), (0.05, False)])
def test_the_gap_decides(tolerance, excused):
    found = audit_greedy([3, 1, 1], [2, 0, 2], row, tolerance=tolerance)
    assert found is not None
    assert (found.index, found.ours, found.reference, found.rank) == (0, 3, 2, 1)
    assert found.gap == pytest.approx(0.1, rel=1e-5)
    assert found.near_tie is excused


def test_only_the_first_divergence_counts():
    found = audit_greedy([2, 2, 0], [2, 0, 2], row, tolerance=0.5)
    assert found is not None
    assert (found.index, found.gap, found.rank, found.near_tie) == (1, 2.0, 2, False)


@pytest.mark.parametrize(("ours", "reference"), [([2], [2, 0]), ([2, 0], [2])])
def test_an_earlier_end_is_not_a_tie(ours, reference):
    found = audit_greedy(ours, reference, row, tolerance=1e9)
    assert found is not None
    assert found.index == 1
    assert found.gap == math.inf
    assert not found.near_tie
