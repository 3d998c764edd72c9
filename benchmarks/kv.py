"""Measures the KV memory of the demo model: bytes reserved, committed and live, and what maps and forks cost.

Both placements take turns: `mapped` (a memory file, mapped into one run of addresses per sequence) and
`table` (anonymous memory that kernels look frames up in). Writes JSON; prints a table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from gristmill.backends.native import NativeExecutor
from gristmill.backends.native.executor import NativeKVView
from gristmill.bench.host import load_average, machine
from gristmill.io.convert import prepare
from gristmill.program.batch import GENERATED, Batch

OUT = Path(__file__).parent / "results" / "kv.json"
PLACEMENTS = ("mapped", "table")
CONTEXT = 8192


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="turns of each measurement (default 15)")
    parser.add_argument("--json", type=Path, default=OUT, help="the result")
    arguments = parser.parse_args()
    executor = NativeExecutor.load(prepare("smollm2", "int4", None))
    load = load_average()
    rows: dict[str, dict[str, Any]] = {}
    for placement in PLACEMENTS:
        executor.limit_kv(4 << 30, placement)
        rows[placement] = {"backing": executor.kv_pool.backing, **memory(executor)}
    samples: dict[str, dict[str, list[float]]] = {placement: {} for placement in PLACEMENTS}
    for _ in range(arguments.repeats):
        for placement in PLACEMENTS:
            executor.limit_kv(4 << 30, placement)
            for name, value in costs(executor).items():
                samples[placement].setdefault(name, []).append(value)
    for placement in PLACEMENTS:
        rows[placement] |= {name: median(values) for name, values in samples[placement].items()}
    pools = {}
    for placement in PLACEMENTS:
        executor.limit_kv(4 << 30, placement)
        pools[placement] = [filled(executor, 512, seed) for seed in range(16)]
    speeds: dict[str, list[float]] = {placement: [] for placement in PLACEMENTS}
    for _ in range(3 * arguments.repeats):
        for placement, views in pools.items():
            began = perf_counter()
            step(executor, views, 1)
            speeds[placement].append(perf_counter() - began)
    for placement in PLACEMENTS:
        rows[placement]["decode_16x512_ms"] = 1e3 * median(speeds[placement])
    result = {"machine": machine(), "load_average": load, "repeats": arguments.repeats, "placements": rows}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    names = [name for name in rows["mapped"] if name != "backing"]
    print("| | " + " | ".join(f"{p} ({rows[p]['backing']})" for p in PLACEMENTS) + " |")
    print("| --- |" + " ---: |" * len(PLACEMENTS))
    for name in names:
        print(f"| {name} | " + " | ".join(f"{rows[p][name]:,.3g}" for p in PLACEMENTS) + " |")


def step(executor: NativeExecutor, views: list[NativeKVView], tokens: int, seed: int = 0) -> None:
    """Computes that many tokens of every view."""
    count = len(views) * tokens
    ids = np.random.default_rng(seed).integers(0, 40_000, count)
    executor.step(
        Batch(
            tokens=ids.astype(np.int32),
            lengths=np.full(len(views), tokens, np.int32),
            views=tuple(views),
            logit_rows=np.zeros(0, np.int32),
            phases=np.full(count, GENERATED, np.uint8),
        )
    )


def filled(executor: NativeExecutor, length: int, seed: int = 0) -> NativeKVView:
    """A view of random tokens."""
    view = executor.allocate(CONTEXT)
    for begin in range(0, length, 250):
        step(executor, [view], min(250, length - begin), seed)
    return view


def memory(executor: NativeExecutor) -> dict[str, float]:
    """Bytes for 32 sequences of mixed lengths, in MiB, and what is left of them afterwards."""
    lengths = np.random.default_rng(1).integers(20, 700, 32)
    views = [filled(executor, int(length)) for length in lengths]
    stats = executor.kv_pool.stats()
    per_token = executor.kv_pool.span_bytes / 256
    live = float(lengths.sum()) * per_token
    result = {
        "live_mib": live / 2**20,
        "committed_mib": stats["committed"] / 2**20,
        "committed_over_live": stats["committed"] / live,
        "reserved_mib": stats["reserved"] / 2**20,
        "static_mib": len(views) * CONTEXT * per_token / 2**20,
        "mappings": float(stats["mappings"]),
        "mapping_limit": float(stats["mapping_limit"]),
    }
    for view in views:
        view.close()
    executor.kv_pool.trim()
    return {**result, "committed_after_mib": executor.kv_pool.stats()["committed"] / 2**20}


def costs(executor: NativeExecutor) -> dict[str, float]:
    """Microseconds of single operations."""

    def clock(run: Any) -> float:
        began = perf_counter()
        run()
        return 1e6 * (perf_counter() - began)

    view = filled(executor, 1000)
    made: list[NativeKVView] = []
    result = {
        "allocate_us": clock(lambda: made.append(executor.allocate(CONTEXT))),
        "reserve_256_us": clock(lambda: made[0].reserve(256)),
    }
    before = executor.kv_pool.stats()["committed"]
    result["fork_1000_us"] = clock(lambda: made.append(view.fork(1000, CONTEXT)))
    spans = [view.span(i) for i in range(4)]
    other = executor.allocate(CONTEXT)
    result["adopt_1000_us"] = clock(lambda: other.adopt(spans, 1000))
    result["fork_commits_bytes"] = float(executor.kv_pool.stats()["committed"] - before)
    view.reserve(1)
    result["copy_232_us"] = clock(lambda: made[1].reserve(1))
    result["close_us"] = clock(made[1].close)
    return result


if __name__ == "__main__":
    main()
