"""Figures of one model's logits against another's, in float64 from float32 logits, a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import GristmillError

_CHUNK_BYTES = 1 << 23
"""Float64 working set of one pass over the rows."""
LEAST_PIECES = 8
"""Of a text, for intervals."""


class Quality:
    """Collects rows of logits of a base and of a model and gives the figures over all of them.

    Per row, with p and q the softmax of the base's and the model's row: KL(p || q) = sum p (log p - log q) in
    nats over the whole vocabulary; whether both have the same best token (the lowest id of equal ones); and
    where the next token is known, its negative log-likelihood under both. Perplexity is exp of the mean of
    the latter.

    The intervals say how much of a figure is this text's own: of 100 such intervals, from 100 texts of this
    kind, about 95 hold the figure of an endless one. A piece of the text counts as one observation, as rows
    beside each other are alike (ratio estimator over clusters, Cochran, Sampling Techniques, 3rd ed., 9A.1,
    with Student's t).
    """

    def __init__(self) -> None:
        self._kl: list[NDArray[np.float64]] = []
        self._same = 0
        self._nll: list[NDArray[np.float64]] = []
        self._base_nll: list[NDArray[np.float64]] = []
        self._ends: list[int] = []

    def add(
        self, base: NDArray[np.float32], model: NDArray[np.float32], targets: NDArray[np.integer[Any]]
    ) -> None:
        """Takes rows of logits [R, vocab] and the ids of the tokens that follow them, [R]; -1: not known.

        GristmillError if the logits hold NaN or infinity: figures would hide it.
        """
        if base.shape != model.shape or base.ndim != 2:
            raise ValueError(f"logits of shapes {base.shape} and {model.shape} do not match")
        step = max(1, _CHUNK_BYTES // (8 * base.shape[1]))
        for start in range(0, len(base), step):
            rows = slice(start, start + step)
            self._add(base[rows], model[rows], targets[rows])

    def end_piece(self) -> None:
        """What was added since the last call is a piece of the text: a sequence of its own."""
        self._ends.append(sum(map(len, self._kl)))

    def _add(
        self, base: NDArray[np.float32], model: NDArray[np.float32], targets: NDArray[np.integer[Any]]
    ) -> None:
        log_p, log_q = log_softmax(base), log_softmax(model)
        if not (np.isfinite(log_p).all() and np.isfinite(log_q).all()):
            raise GristmillError("a model's logits hold NaN or infinity")
        self._kl.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
        self._same += int((base.argmax(-1) == model.argmax(-1)).sum())
        known, rows = targets >= 0, np.arange(len(targets))
        ids = np.where(known, targets, 0)
        self._base_nll.append(np.where(known, -log_p[rows, ids], np.nan))
        self._nll.append(np.where(known, -log_q[rows, ids], np.nan))

    def figures(self) -> dict[str, Any]:
        """tokens, kl_mean, kl_p50, kl_p99, kl_max (nats), top1_agreement (0 to 1), both perplexities.

        perplexity_ratio is the model's over the base's. kl_mean_ci95, perplexity_ratio_ci95: [low, high],
        or None for fewer than 8 pieces.
        """
        parts = (self._kl, self._nll, self._base_nll)
        kl, nll, base = (np.concatenate(x) if x else np.zeros(0) for x in parts)
        targets = int((~np.isnan(nll)).sum())
        if not targets:
            raise GristmillError("the text is too short to evaluate: it needs at least two tokens")
        # Rounding can leave a divergence of equal rows a few 1e-16 below zero.
        kl = np.maximum(kl, 0.0)
        change = interval(nll - base, self._ends)
        p50, p99 = (float(x) for x in np.quantile(kl, (0.5, 0.99)))
        return {
            "tokens": len(kl),
            "kl_mean": float(kl.mean()),
            "kl_mean_ci95": interval(kl, self._ends),
            "kl_p50": p50,
            "kl_p99": p99,
            "kl_max": float(kl.max()),
            "top1_agreement": self._same / len(kl),
            "perplexity": float(np.exp(np.nansum(nll) / targets)),
            "base_perplexity": float(np.exp(np.nansum(base) / targets)),
            "perplexity_ratio": float(np.exp(np.nansum(nll - base) / targets)),
            "perplexity_ratio_ci95": change and [float(np.exp(x)) for x in change],
        }


def interval(values: NDArray[np.float64], ends: Sequence[int]) -> list[float] | None:
    """[low, high]: the 95 % confidence interval of the mean of values [T], whose pieces end at `ends`.

    NaN stands for no value. None for fewer than `LEAST_PIECES` pieces.
    """
    if len(ends) < LEAST_PIECES:
        return None
    pieces = np.split(values[: ends[-1]], ends[:-1])
    sums = np.array([np.nansum(piece) for piece in pieces])
    sizes = np.array([(~np.isnan(piece)).sum() for piece in pieces])
    count, mean = len(pieces), sums.sum() / max(1, sizes.sum())
    error = np.sqrt(count / (count - 1) * ((sums - mean * sizes) ** 2).sum()) / max(1, sizes.sum())
    half = _student_975(count - 1) * error
    return [float(mean - half), float(mean + half)]


def _student_975(freedom: int) -> float:
    """Student's t below which 97.5 % lie (Abramowitz and Stegun 26.7.5; within 0.002 from 7 degrees on)."""
    x, n = 1.959963984540054, freedom
    return (
        x
        + (x**3 + x) / (4 * n)
        + (5 * x**5 + 16 * x**3 + 3 * x) / (96 * n**2)
        + (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / (384 * n**3)
    )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural log-probabilities over the last axis: [..., vocab] float64."""
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    values -= np.log(np.exp(values).sum(-1, keepdims=True))
    return values
