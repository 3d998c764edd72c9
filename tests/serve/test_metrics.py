"""What Prometheus is told."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gristmill.engine.request import Status
from gristmill.engine.result import Result, Timings
from gristmill.serve.metrics import Metrics


def status(**counters: int) -> Status:
    return Status(
        alive=True,
        ready=True,
        draining=False,
        running=1,
        waiting=2,
        waiting_tokens=3,
        max_sequences=4,
        context=5,
        kv_used=0.5,
        counters=counters,
    )


def told(metrics: Metrics, **labels: str) -> dict[str, float]:
    """Sample -> value, of those that have these labels and no others but the model's name."""
    labels["model_name"] = "m"
    families: Any = text_string_to_metric_families(metrics.text().decode())
    return {one.name: one.value for family in families for one in family.samples if one.labels == labels}


def test_steps_are_a_histogram_of_their_tokens() -> None:
    metrics = Metrics("m", lambda: status(steps_of_1=3, steps_of_64=2, steps_of_256=1, step_tokens=330))
    name = "gristmill:iteration_tokens_total"
    for bound, count in (("1.0", 3), ("32.0", 3), ("64.0", 5), ("128.0", 5), ("256.0", 6), ("+Inf", 6)):
        assert told(metrics, le=bound)[f"{name}_bucket"] == count
    assert told(metrics)[f"{name}_sum"] == 330
    assert told(metrics)[f"{name}_count"] == 6


def test_the_times_of_an_answer_add_up() -> None:
    metrics = Metrics("m", lambda: None)
    # Two seconds in the queue; 30 of 40 prompt tokens computed in one; ten more tokens in five.
    times = Timings(first_token_s=3.0, prefill_tokens_per_s=30.0, decode_tokens_per_s=2.0)
    metrics.ended(Result("", [], "stop", 40, 11, times, cached_tokens=10))
    metrics.ended(Result("", [], "timeout", 40, 0, Timings()))  # it never had its turn
    sums = told(metrics)
    for name, seconds in (("queue", 2.0), ("prefill", 1.0), ("decode", 5.0)):
        assert sums[f"gristmill:request_{name}_time_seconds_sum"] == pytest.approx(seconds)
        assert sums[f"gristmill:request_{name}_time_seconds_count"] == 1
