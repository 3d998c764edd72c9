"""Measures linear layers alone on weights larger than the last-level cache; writes JSON, a page and a plot.

A model of nothing but square linears is read through once per step, so that no weight is in a cache when its
turn comes. All formats are in memory at once, a gigabyte each, and take turns. For every format: the time of
one layer at 1 to 128 rows, and the share of the read rate measured beside it that its bytes are read at.
"Byte-bound" is the time of a layer's bytes at that rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from harness.pages import fill
from harness.revision import commit, named

from gristmill.backends.native import NativeExecutor
from gristmill.bench.host import load_average, machine
from gristmill.bench.roofline import bandwidth_probe
from gristmill.formats import dense, group_int, sparse24
from gristmill.formats.packed import Packed
from gristmill.program.batch import GENERATED, Batch
from gristmill.program.builder import Builder
from gristmill.program.edits import add_branch
from gristmill.program.nodes import Program

HERE = Path(__file__).parent
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
VOCABULARY = 64


@dataclass(frozen=True)
class Case:
    """One way to store and multiply a square matrix."""

    name: str
    pack: Callable[[np.random.Generator, int], Packed]
    activations: str
    rank: int = 0
    """Of a bf16 branch beside every layer, or 0."""
    branch_bits: int = 16
    beside: str = ""
    """The case that this one is to be compared with, turn by turn."""


def integers(bits: int, group: int) -> Callable[[np.random.Generator, int], Packed]:
    """Random codes: the time does not depend on them."""

    def pack(random: np.random.Generator, n: int) -> Packed:
        codes = random.integers(0, 1 << bits, (n, n), dtype=np.uint8)
        scales = np.full((n, -(-n // group)), 1 / (n * 2**bits), np.float16)
        return group_int.pack(codes, scales, bits=bits, group=group, offset=1 << (bits - 1))

    return pack


def bf16(random: np.random.Generator, n: int) -> Packed:
    """Random bf16 values."""
    return dense.pack(random.normal(0, 1 / n, (n, n)).astype(np.float32), "bf16")


def sparse(random: np.random.Generator, n: int) -> Packed:
    """Two random codes of every four columns."""
    codes = random.integers(0, 16, (n, n), dtype=np.uint8)
    order = random.random((n, n // 4, 4)).argsort(-1)
    scales = np.full((n, -(-n // 128)), 1 / (n * 16), np.float16)
    return sparse24.pack(codes, (order < 2).reshape(n, n), scales, group=128)


CASES = (
    Case("bf16", bf16, "bf16"),
    Case("int8", integers(8, 64), "fast"),
    Case("int6", integers(6, 64), "fast"),
    Case("int5", integers(5, 64), "fast"),
    Case("int4", integers(4, 64), "fast"),
    Case("int4 g128, bf16 rows", integers(4, 128), "bf16"),
    Case("int4 g128", integers(4, 128), "fast"),
    Case("2:4 int4 g128, bf16 rows", sparse, "bf16", beside="int4 g128, bf16 rows"),
    Case("2:4 int4 g128", sparse, "fast", beside="int4 g128"),
    Case("int3", integers(3, 64), "fast"),
    Case("int2", integers(2, 64), "fast"),
    Case("int4 + rank 32 bf16", integers(4, 64), "fast", rank=32, beside="int4"),
    Case("int4 + rank 32 int8", integers(4, 64), "fast", rank=32, branch_bits=8, beside="int4"),
)


def main() -> int:
    """Runs the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=4096, help="rows and columns of a layer (default 4096)")
    parser.add_argument("--bytes", type=float, default=1e9, help="weights of each case (default 1e9)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    parser.add_argument("--only", action="append", help="a case's name; may be repeated")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "kernels.json")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "kernels.png")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    arguments = parser.parse_args()
    chosen = [case for case in CASES if not arguments.only or case.name in arguments.only]
    if not chosen:
        parser.error(f"no such case; there are: {', '.join(case.name for case in CASES)}")
    result = measure(
        chosen,
        width=arguments.width,
        nbytes=arguments.bytes,
        repeats=arguments.repeats,
        threads=arguments.threads,
    )
    print(table(result))
    if not arguments.only:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
        plot(result, arguments.plot)
        about = f"{result['machine']['cpu']}, {result['threads']} threads; commit {named(result)}."
        page = fill(arguments.page.read_text(), "kernels", ["", about, "", table(result), ""])
        arguments.page.write_text(page)
    return 0


def model(case: Case, width: int, layers: int) -> tuple[Program, dict[str, Packed]]:
    """A chain of linears between a small embedding and a small head; every weight has bytes of its own."""
    random = np.random.default_rng(1)
    b = Builder("layers")
    x = b.embedding("table.weight", VOCABULARY, width)
    names = [f"layers.{i}" for i in range(layers)]
    for name in names:
        x = b.linear(x, name, width)
    program = b.build(b.linear(b.select_rows(x), "head", VOCABULARY))
    small = dense.pack(random.normal(0, 1, (VOCABULARY, width)).astype(np.float32), "bf16")
    # The arena copies an array for every name, so that one matrix may stand for all.
    shared = case.pack(random, width)
    packed = {"table.weight": small, "head.weight": small, **{f"{n}.weight": shared for n in names}}
    if case.rank:
        for name in names:
            program = add_branch(program, [name], case.rank, name="branch")
        for name, weight in program.weights.items():
            if name not in packed:
                values = random.normal(0, 1 / width, weight.shape).astype(np.float32)
                packed[name] = (
                    dense.pack(values, "bf16")
                    if case.branch_bits == 16
                    else group_int.round_group_int(
                        values, bits=8, group=min(64, weight.shape[1]), symmetric=True
                    )
                )
    return program, packed


def measure(
    cases: Sequence[Case], *, width: int, nbytes: float, repeats: int, threads: int
) -> dict[str, Any]:
    """Plain JSON data: machine, and per case its bytes per layer and per number of rows the medians.

    All cases are held at once and take turns: what the first case's time is over another's is a median over
    the turns, too.
    """
    with ExitStack() as stack:
        subjects = [Subject(case, width, nbytes, threads, stack) for case in cases]
        for turn in range(repeats + 1):
            for subject in subjects:
                print(f"\r{subject.case.name}: turn {turn} of {repeats}  ", end="", file=sys.stderr)
                subject.turn(int(nbytes), keep=turn > 0)
        results = [subject.result(width, subjects) for subject in subjects]
    print(file=sys.stderr)
    return {
        **commit(HERE.parent),
        "machine": {**machine(), "load_average": load_average()},
        "width": width,
        "bytes": nbytes,
        "threads": threads,
        "repeats": repeats,
        "cases": results,
    }


class Subject:
    """A case's layers in memory, and what was measured of them."""

    def __init__(self, case: Case, width: int, nbytes: float, threads: int, stack: ExitStack) -> None:
        self.case = case
        per_layer = case.pack(np.random.default_rng(0), width).nbytes
        self.layers = max(2, round(nbytes / per_layer))
        program, packed = model(case, width, self.layers)
        self.executor = NativeExecutor(program, packed, {}, activations=case.activations, threads=threads)
        stack.callback(self.executor.close)
        self.total = sum(w.nbytes for name, w in self.executor.weights.items() if name.startswith("layers."))
        self.probe = bandwidth_probe(self.executor.level, threads)
        self.view = self.executor.allocate(max(ROWS))
        self.times: dict[int, list[float]] = {rows: [] for rows in ROWS}
        """Seconds of a layer."""
        self.rates: list[float] = []
        """Bytes per second that memory gave in each turn."""

    def turn(self, nbytes: int, *, keep: bool) -> None:
        """One step of every number of rows, between two looks at what memory gives."""
        before = self.probe(nbytes)
        step(self.executor, self.view, 1)  # the threads slept while others had their turn
        found = {rows: step(self.executor, self.view, rows) / self.layers for rows in ROWS}
        if keep:
            self.rates.append((before + self.probe(nbytes)) / 2)
            for rows, seconds in found.items():
                self.times[rows].append(seconds)

    def over(self, other: Subject) -> dict[str, float]:
        """Time over another case's by rows: medians over the turns."""
        return {
            str(rows): median(own / its for own, its in zip(found, other.times[rows], strict=True))
            for rows, found in self.times.items()
        }

    def result(self, width: int, all_: Sequence[Subject]) -> dict[str, Any]:
        """Plain JSON data."""
        each = self.total / self.layers
        # Turn by turn: on a shared machine, what memory gives can double within seconds.
        over_bound = {
            str(rows): median(one * rate / each for one, rate in zip(found, self.rates, strict=True))
            for rows, found in self.times.items()
        }
        beside = next((s for s in all_ if s.case.name == self.case.beside), None)
        return {
            "name": self.case.name,
            "bytes_per_layer": each,
            "bits_per_weight": 8 * self.total / self.layers / width**2,
            "layers": self.layers,
            "bandwidth_bytes_per_s": median(self.rates),
            "byte_bound_s": each / median(self.rates),
            "seconds_over_bound": over_bound,
            "seconds": {str(rows): median(found) for rows, found in self.times.items()},
            "roofline_fraction": 1 / over_bound["1"],
            "seconds_over_first": self.over(all_[0]),
            **({"beside": beside.case.name, "seconds_over_beside": self.over(beside)} if beside else {}),
        }


def step(executor: NativeExecutor, view: Any, rows: int) -> float:
    """Seconds of one step of `rows` generated tokens."""
    view.truncate(0)
    batch = Batch(
        np.zeros(rows, np.int32),
        np.array([rows], np.int32),
        (view,),
        np.array([rows - 1], np.int32),
        np.full(rows, GENERATED, np.uint8),
    )
    begin = perf_counter()
    executor.step(batch)
    return perf_counter() - begin


def table(result: dict[str, Any]) -> str:
    """Markdown: the time of a layer by rows, over its byte-bound time and over other cases' times.

    Both turn by turn, medians over the turns.
    """
    rows = "".join(f" {rows} |" for rows in ROWS)
    lines = [
        f"Time over byte-bound time of one layer, {result['width']} x {result['width']}, "
        f"{result['bytes'] / 1e9:.1f} GB of each, by rows:",
        "",
        f"| weights | bits | GB/s at 1 |{rows}",
        "|---|--:|--:|" + "--:|" * len(ROWS),
    ]
    for case in result["cases"]:
        shares = "".join(f" {ratio:.2f} |" for ratio in case["seconds_over_bound"].values())
        rate = case["bytes_per_layer"] / case["seconds"]["1"] / 1e9
        lines.append(f"| {case['name']} | {case['bits_per_weight']:.2f} | {rate:.1f} |{shares}")
    lines += ["", "Time over another's, turn by turn:", ""]
    lines += [f"| weights | over |{rows}", "|---|---|" + "--:|" * len(ROWS)]
    first = result["cases"][0]["name"]
    for case in result["cases"]:
        for other, key in ((first, "seconds_over_first"), (case.get("beside"), "seconds_over_beside")):
            if other not in (None, case["name"]):
                ratios = "".join(f" {ratio:.2f} |" for ratio in case[key].values())
                lines.append(f"| {case['name']} | {other} |{ratios}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Time per layer over the number of rows, with every case's byte-bound time dotted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for i, case in enumerate(result["cases"]):
        times, marker = [1e3 * s for s in case["seconds"].values()], "os^"[i // 10]
        line = axes.plot(ROWS, times, color=f"C{i}", marker=marker, label=case["name"])[0]
        axes.axhline(1e3 * case["byte_bound_s"], color=line.get_color(), linestyle=":", linewidth=0.8)
    width = result["width"]
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="rows",
        ylabel="time of one layer (ms)",
        title=f"{width} x {width}, {result['bytes'] / 1e9:.1f} GB of weights, {result['threads']} threads; "
        "dotted: its bytes at the read rate",
    )
    axes.set_xticks(ROWS, [str(rows) for rows in ROWS])
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
