"""Compares saved logits with the base's; run by the helper environment's Python: ``BASE.npy OTHER.npy``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS_AT_ONCE = 64


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Natural log-probabilities over the last axis, in float64."""
    values = np.asarray(logits, np.float64)
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergences(base: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """KL(base || other) in nats at each position of two [tokens, vocab] arrays of logits."""
    expected, found = log_softmax(base), log_softmax(other)
    return (np.exp(expected) * (expected - found)).sum(-1)


def compare(base: NDArray[Any], other: NDArray[Any]) -> dict[str, float | int]:
    """KL mean and 99th percentile in nats and the share of positions with the same best token.

    ``other`` may have padding columns past ``base``'s vocabulary; they are left out.
    """
    vocabulary = base.shape[1]
    if other.shape[0] != base.shape[0] or other.shape[1] < vocabulary:
        raise ValueError(f"logits of shape {other.shape} do not go with the base's {base.shape}")
    kl, same = [], 0
    for start in range(0, base.shape[0], ROWS_AT_ONCE):
        expected = base[start : start + ROWS_AT_ONCE]
        found = other[start : start + ROWS_AT_ONCE, :vocabulary]
        kl.append(divergences(expected, found))
        same += int((expected.argmax(-1) == found.argmax(-1)).sum())
    values = np.concatenate(kl)
    return {
        "tokens": int(base.shape[0]),
        "kl_mean": float(values.mean()),
        "kl_p99": float(np.quantile(values, 0.99)),
        "top1_agreement": same / base.shape[0],
    }


if __name__ == "__main__":
    loaded = [np.load(Path(name), mmap_mode="r") for name in sys.argv[1:3]]
    print(json.dumps(compare(*loaded)))
