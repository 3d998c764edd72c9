"""Metrics for Prometheus, under the names that the field's servers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from gristmill.engine.request import Status
from gristmill.engine.result import Result
from gristmill.program.batch import MAX_STEP_TOKENS

__all__ = ["Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.3, 0.6, 1.25, 2.5, 5, 10, 20, 40, 80, 160)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """One server's metrics, in a registry of their own."""

    def __init__(self, model_name: str, status: Callable[[], Status | None]) -> None:
        """status: of the engine, None while there is none."""
        self._registry = registry = CollectorRegistry()
        self._labels = {"model_name": model_name}

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            made = Histogram(f"gristmill:{name}", text, ["model_name"], registry=registry, buckets=buckets)
            return made.labels(model_name)

        self.first_token = histogram("time_to_first_token_seconds", "From a request to its first token.")
        self.between_tokens = histogram("inter_token_latency_seconds", "Between two tokens of an answer.")
        self.latency = histogram("e2e_request_latency_seconds", "From a request to its end.")
        self.queue = histogram("request_queue_time_seconds", "From a request to its first step.")
        self.prefill = histogram("request_prefill_time_seconds", "From the first step to the first token.")
        self.decode = histogram("request_decode_time_seconds", "From the first token to the last.")
        self.prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.generation = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.http = Counter(
            "http_requests",
            "Requests by route, method and status.",
            ["handler", "method", "status"],
            registry=registry,
        )
        self.unknown_fields = Counter(
            "gristmill:unknown_fields",
            "Fields of requests that nobody knows.",
            ["model_name"],
            registry=registry,
        ).labels(model_name)
        registry.register(_FromStatus(status, self._labels))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

    def ended(self, result: Result) -> None:
        """Observes how the time of an answer was spent."""
        times = result.timings
        if times.prefill_tokens_per_s:
            prefill = (result.prompt_tokens - result.cached_tokens) / times.prefill_tokens_per_s
            self.prefill.observe(prefill)
            self.queue.observe(max(0.0, times.first_token_s - prefill))
        if times.decode_tokens_per_s:
            self.decode.observe((result.completion_tokens - 1) / times.decode_tokens_per_s)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)


class _FromStatus(Collector):
    """What the engine counts itself."""

    def __init__(self, status: Callable[[], Status | None], labels: dict[str, str]) -> None:
        self._status = status
        self._names = list(labels)
        self._values = list(labels.values())

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        made = GaugeMetricFamily(f"gristmill:{name}", text, labels=self._names)
        made.add_metric(self._values, value)
        return made

    def _counter(self, name: str, text: str, value: float) -> Metric:
        made = CounterMetricFamily(f"gristmill:{name}", text, labels=self._names)
        made.add_metric(self._values, value)
        return made

    def _steps(self, counts: dict[str, int]) -> Metric:
        made = HistogramMetricFamily(
            "gristmill:iteration_tokens_total",
            "Tokens of a step, of prompts and answers.",
            labels=self._names,
        )
        buckets: list[tuple[str, float]] = []
        total, size = 0, 1
        while size <= MAX_STEP_TOKENS:
            total += counts.get(f"steps_of_{size}", 0)
            buckets.append((f"{size:.1f}", total))
            size *= 2
        made.add_metric(self._values, [*buckets, ("+Inf", total)], counts.get("step_tokens", 0))
        return made

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment."""
        status = self._status()
        if status is None:
            return
        yield self._gauge("num_requests_running", "Sequences that are computed.", status.running)
        yield self._gauge("num_requests_waiting", "Sequences that wait for a place.", status.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV memory in use, 0 to 1.", status.kv_used)
        for name, value in status.kv.items():
            yield self._gauge(
                f"kv_{name}{'' if 'mapping' in name else '_bytes'}", f"KV memory: {name}.", value
            )
        counts = status.counters
        for name, key, text in (
            ("prefix_cache_queries", "prefix_queries", "Prompt tokens looked for among cached prefixes."),
            ("prefix_cache_hits", "prefix_hits", "Prompt tokens found there."),
            ("num_preemptions", "preemptions", "Sequences that gave their memory to others."),
            ("prompt_tokens", "prompt_tokens", "Prompt tokens computed or found."),
            ("generation_tokens", "generation_tokens", "Tokens generated."),
            ("engine_steps", "steps", "Steps of the model."),
            ("engine_step_failures", "step_failures", "Steps that failed."),
        ):
            yield self._counter(name, text, counts.get(key, 0))
        yield self._steps(counts)
        ended = CounterMetricFamily(
            "gristmill:request_success",
            "Answers that ended, by reason.",
            labels=[*self._names, "finished_reason"],
        )
        for reason in ("stop", "length", "cancelled", "timeout", "error"):
            ended.add_metric([*self._values, reason], counts.get(f"requests_{reason}", 0))
        yield ended
        info = GaugeMetricFamily(
            "gristmill:cache_config_info", "Sizes.", labels=[*self._names, "max_sequences", "context"]
        )
        info.add_metric([*self._values, str(status.max_sequences), str(status.context)], 1)
        yield info
