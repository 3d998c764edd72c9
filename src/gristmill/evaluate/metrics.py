"""Figures of one model's logits against another's, in float64 from float32 logits, a few rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import GristmillError

_CHUNK_BYTES = 1 << 23
"""Float64 working set of one pass over the rows."""


class Quality:
    """Collects rows of logits of a base and of a model and gives the figures over all of them.

    Per row, with p and q the softmax of the base's and the model's row: KL(p || q) = sum p (log p - log q) in
    nats over the whole vocabulary; whether both have the same best token (the lowest id of equal ones); and
    where the next token is known, its negative log-likelihood under both. Perplexity is exp of the mean of
    the latter.
    """

    def __init__(self) -> None:
        self._kl: list[NDArray[np.float64]] = []
        self._same = 0
        self._nll = 0.0
        self._base_nll = 0.0
        self._targets = 0

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

    def _add(
        self, base: NDArray[np.float32], model: NDArray[np.float32], targets: NDArray[np.integer[Any]]
    ) -> None:
        log_p, log_q = log_softmax(base), log_softmax(model)
        if not (np.isfinite(log_p).all() and np.isfinite(log_q).all()):
            raise GristmillError("a model's logits hold NaN or infinity")
        self._kl.append((np.exp(log_p) * (log_p - log_q)).sum(-1))
        self._same += int((base.argmax(-1) == model.argmax(-1)).sum())
        known = np.flatnonzero(targets >= 0)
        ids = targets[known]
        self._base_nll -= float(log_p[known, ids].sum())
        self._nll -= float(log_q[known, ids].sum())
        self._targets += len(known)

    def figures(self) -> dict[str, Any]:
        """tokens, kl_mean, kl_p50, kl_p99, kl_max (nats), top1_agreement (0 to 1), both perplexities."""
        kl = np.concatenate(self._kl) if self._kl else np.zeros(0)
        if not len(kl) or not self._targets:
            raise GristmillError("the text is too short to evaluate: it needs at least two tokens")
        # Rounding can leave a divergence of equal rows a few 1e-16 below zero.
        kl = np.maximum(kl, 0.0)
        p50, p99 = (float(x) for x in np.quantile(kl, (0.5, 0.99)))
        return {
            "tokens": len(kl),
            "kl_mean": float(kl.mean()),
            "kl_p50": p50,
            "kl_p99": p99,
            "kl_max": float(kl.max()),
            "top1_agreement": self._same / len(kl),
            "perplexity": float(np.exp(self._nll / self._targets)),
            "base_perplexity": float(np.exp(self._base_nll / self._targets)),
        }


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural log-probabilities over the last axis: [..., vocab] float64."""
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    values -= np.log(np.exp(values).sum(-1, keepdims=True))
    return values
