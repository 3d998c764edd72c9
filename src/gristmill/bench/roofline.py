"""The least time a step can take: its bytes over the bandwidth at which this process reads memory."""

from __future__ import annotations

from collections.abc import Callable

from gristmill.program.costs import Cost, WeightBytes, Work, step_costs, sum_costs
from gristmill.program.nodes import Program

Probe = Callable[[int], float]
"""Bytes to read -> bytes per second."""

PROBE_ROUNDS = 8


def decode_cost(
    program: Program,
    batch: int,
    context: int,
    steps: int,
    *,
    weight_bytes: WeightBytes,
    kv_dtype: str | None,
) -> Cost:
    """What `steps` decode steps of `batch` sequences do in all, the first of them after `context` tokens.

    Every step reads each weight once (of the embedding only the rows it takes) and the keys and values in
    reach of every sequence, which grow by a token a step. kv_dtype as in `step_costs`.
    """
    total = Cost()
    for step in range(steps):
        work = Work.decode(batch, context + step)
        total += sum_costs(step_costs(program, work, weight_bytes, kv_dtype))
    return total


def prefill_cost(program: Program, tokens: int, chunk: int, *, weight_bytes: WeightBytes) -> Cost:
    """What a prompt of `tokens` tokens does, cut into steps of `chunk`; the last row's logits are wanted."""
    total = Cost()
    for start in range(0, tokens, chunk):
        count = min(chunk, tokens - start)
        work = Work((count,), (start,), 1 if start + count == tokens else 0)
        total += sum_costs(step_costs(program, work, weight_bytes))
    return total


def bandwidth_probe(level: str, threads: int) -> Probe:
    """A probe that reads memory on huge pages with the kernels of `level` and `threads` threads of its own.

    Its rate is that of the fastest of a few passes: a bound, not a mean.
    """
    from gristmill.backends.native import _native

    pool = _native.Pool(threads)
    return lambda count: float(_native.read_bandwidth(level, pool, count, PROBE_ROUNDS))
