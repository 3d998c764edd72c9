"""The figures of two sets of logits against an oracle in exact sums of Python floats."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gristmill.errors import GristmillError
from gristmill.evaluate import metrics
from gristmill.evaluate.metrics import Quality, log_softmax


def oracle_log_softmax(row: np.ndarray) -> list[float]:
    values = [float(x) for x in row]
    top = max(values)
    total = math.log(math.fsum(math.exp(x - top) for x in values))
    return [x - top - total for x in values]


def oracle(base: np.ndarray, model: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    kl, nll, base_nll, same = [], [], [], 0
    for p_row, q_row, target in zip(base, model, targets, strict=True):
        p, q = oracle_log_softmax(p_row), oracle_log_softmax(q_row)
        kl.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
        same += p_row.tolist().index(max(p_row)) == q_row.tolist().index(max(q_row))
        if target >= 0:
            base_nll.append(-p[target])
            nll.append(-q[target])
    ordered = sorted(kl)

    def quantile(share: float) -> float:
        at = share * (len(ordered) - 1)
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])

    return {
        "tokens": len(kl),
        "kl_mean": math.fsum(kl) / len(kl),
        "kl_mean_ci95": None,
        "kl_p50": quantile(0.5),
        "kl_p99": quantile(0.99),
        "kl_max": ordered[-1],
        "top1_agreement": same / len(kl),
        "perplexity": math.exp(math.fsum(nll) / len(nll)),
        "base_perplexity": math.exp(math.fsum(base_nll) / len(base_nll)),
        "perplexity_ratio": math.exp((math.fsum(nll) - math.fsum(base_nll)) / len(nll)),
        "perplexity_ratio_ci95": None,
    }


def rows(count: int, vocabulary: int, seed: int, spread: float = 6.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, vocabulary)) * spread).astype(np.float32)


@pytest.mark.parametrize(("count", "vocabulary"), [(1, 2), (7, 33), (64, 97), (200, 1000)])
@pytest.mark.parametrize("chunk", [1 << 23, 1000])
def test_figures_equal_the_oracle(monkeypatch, count, vocabulary, chunk):
    monkeypatch.setattr(metrics, "_CHUNK_BYTES", chunk)
    base = rows(count, vocabulary, 1)
    model = base + rows(count, vocabulary, 2, spread=0.5)
    targets = np.random.default_rng(3).integers(-1, vocabulary, count)
    targets[0] = 1
    quality = Quality()
    half = count // 2
    for part in (slice(0, half), slice(half, None)):
        quality.add(base[part], model[part], targets[part])
    found = quality.figures()
    expected = oracle(base, model, targets)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = (
            found[key] is None if value is None else found[key] == pytest.approx(value, rel=1e-10, abs=1e-13)
        )
        assert same, key


@pytest.mark.parametrize("count", [8, 16, 40])
def test_intervals_hold_the_mean_of_endless_texts_as_often_as_they_say(count):
    """All rows of a piece have one value: if rows were taken for independent, it would be held too rarely."""
    rng = np.random.default_rng(7)
    held, trials = 0, 2000
    for _ in range(trials):
        sizes = rng.integers(20, 30, count)
        values = np.repeat(rng.standard_normal(count), sizes) + 5
        low, high = metrics.interval(values, np.cumsum(sizes).tolist())
        held += low <= 5 <= high
    assert 0.93 <= held / trials <= 0.97


def test_an_interval_worked_out_by_hand():
    values = np.array([1.0, 3.0, np.nan, *[2.0] * 21, 9.0])
    ends = [3, 6, 9, 12, 15, 18, 21, 24]  # the last value is in no piece
    # Sums 4, 6, ..., 6 of 2, 3, ..., 3 values: the mean is 2 and no piece strays from it.
    assert metrics.interval(values, ends) == pytest.approx([2.0, 2.0])
    values[3:6] = 4.0
    # 52 / 23 = 2.2609; strays: 4 - 2 m, 12 - 3 m, six times 6 - 3 m.
    mean = 52 / 23
    strays = (4 - 2 * mean) ** 2 + (12 - 3 * mean) ** 2 + 6 * (6 - 3 * mean) ** 2
    half = 2.3646 * math.sqrt(8 / 7 * strays) / 23
    assert metrics.interval(values, ends) == pytest.approx([mean - half, mean + half], rel=1e-3)
    assert metrics.interval(values, ends[:7]) is None


@pytest.mark.parametrize(("freedom", "t"), [(7, 2.36462), (15, 2.13145), (31, 2.03951), (1000, 1.96234)])
def test_students_t(freedom, t):
    assert metrics._student_975(freedom) == pytest.approx(t, abs=0.002)


def test_figures_of_long_texts_have_intervals():
    quality, rng = Quality(), np.random.default_rng(10)
    for piece in range(metrics.LEAST_PIECES):
        base = rows(40, 11, piece)
        model = base + rows(40, 11, 100 + piece, spread=0.5)
        targets = rng.integers(0, 11, 40)
        targets[-1] = -1
        quality.add(base[:30], model[:30], targets[:30])
        quality.add(base[30:], model[30:], targets[30:])
        assert quality.figures()["kl_mean_ci95"] is None
        quality.end_piece()
    figures = quality.figures()
    low, high = figures["kl_mean_ci95"]
    assert low < figures["kl_mean"] < high
    low, high = figures["perplexity_ratio_ci95"]
    assert low < figures["perplexity_ratio"] < high
    ratio = figures["perplexity"] / figures["base_perplexity"]
    assert figures["perplexity_ratio"] == pytest.approx(ratio, rel=1e-12)


def test_a_divergence_worked_out_by_hand():
    base = np.log(np.array([[0.75, 0.25]], np.float64)).astype(np.float32)
    model = np.zeros((1, 2), np.float32)
    quality = Quality()
    quality.add(base, model, np.array([0]))
    figures = quality.figures()
    # 3/4 log(3/2) + 1/4 log(1/2): the base's distribution weighs the differences, not the model's.
    assert figures["kl_mean"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert figures["perplexity"] == pytest.approx(2.0)
    assert figures["base_perplexity"] == pytest.approx(4 / 3, rel=1e-6)
    assert figures["top1_agreement"] == 1.0


def test_equal_logits_do_not_diverge():
    logits = rows(20, 500, 4, spread=30.0)
    quality = Quality()
    quality.add(logits, logits.copy(), np.arange(20))
    figures = quality.figures()
    assert figures["kl_mean"] == figures["kl_max"] == 0.0
    assert figures["top1_agreement"] == 1.0
    assert figures["perplexity"] == figures["base_perplexity"]


def test_a_shift_of_all_logits_changes_nothing():
    logits = rows(5, 64, 5, spread=2.0)
    assert np.allclose(log_softmax(logits), log_softmax(logits + np.float32(64)), atol=1e-4)
    assert np.allclose(np.exp(log_softmax(rows(3, 100, 6, spread=1e4))).sum(-1), 1.0)


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    quality = Quality()
    quality.add(np.zeros((3, 257), np.float32), np.full((3, 257), 9.0, np.float32), np.array([5, -1, 256]))
    assert quality.figures()["perplexity"] == pytest.approx(257, rel=1e-12)


def test_ties_go_to_the_lowest_id():
    tie = np.array([[1.0, 2.0, 2.0]], np.float32)
    quality = Quality()
    quality.add(tie, np.array([[0.0, 1.0, 0.5]], np.float32), np.array([0]))
    quality.add(tie, np.array([[0.0, 0.5, 1.0]], np.float32), np.array([0]))
    assert quality.figures()["top1_agreement"] == 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_logits_are_refused(bad):
    logits = rows(4, 16, 7)
    broken = logits.copy()
    broken[2, 3] = bad
    with pytest.raises(GristmillError, match="NaN or infinity"), np.errstate(invalid="ignore"):
        Quality().add(logits, broken, np.zeros(4, int))


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="do not match"):
        Quality().add(rows(2, 8, 8), rows(2, 9, 8), np.zeros(2, int))


def test_nothing_to_predict_is_an_error():
    quality = Quality()
    with pytest.raises(GristmillError, match="too short"):
        quality.figures()
    quality.add(rows(1, 8, 9), rows(1, 8, 10), np.array([-1]))
    with pytest.raises(GristmillError, match="too short"):
        quality.figures()
