"""Runs the entries of a plan in turns and keeps every sample."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from .environments import HERE, Say, SetupError, ensure
from .files import DEMO, ensure_file, variables
from .plan import Entry, Shape
from .remote import Refused, Remote, choose_cpus

REPEATS = 3
ENOUGH_S = 1.0
"""A turn repeats a request until it has run this long, at most `REPEATS` times; its median is the sample."""
SLOW_S = 15.0
"""A request that takes longer than this has its turn in the first round only."""


class Record:
    """What is known of one entry: its worker while it lives, its samples, and why it has none."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.remote: Remote | None = None
        self.info: dict[str, Any] = {}
        self.samples: dict[str, list[dict[str, float]]] = {}
        self.refused: dict[str, dict[str, str]] = {}
        self.failure: dict[str, str] | None = None
        self.slow: set[str] = set()

    def fail(self, kind: str, reason: str) -> None:
        """No figures any more; those there are stay."""
        self.failure = {"kind": kind, "reason": reason}
        self.close()

    def close(self) -> None:
        """Ends the worker."""
        if self.remote is not None:
            self.remote.close()
            self.remote = None

    def result(self, shapes: Sequence[Shape]) -> dict[str, Any]:
        """As it goes into the JSON."""
        entry = self.entry
        figures = {
            shape.name: summary(self.samples[shape.name]) for shape in shapes if shape.name in self.samples
        }
        return {
            "name": entry.name,
            "engine": entry.engine,
            "mode": entry.mode,
            "model": entry.model,
            "isa": entry.isa or "best",
            **self.info,
            "figures": figures,
            "refused": self.refused,
            "failure": self.failure,
        }


def summary(samples: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds, and the samples."""
    names = samples[0].keys()
    return {**{name: median(s[name] for s in samples) for name in names}, "samples": list(samples)}


def prompts(ids: Sequence[int], shape: Shape) -> list[list[int]]:
    """Different pieces of the text for the sequences of a batch."""
    need = shape.batch * shape.context
    if len(ids) < need:
        raise SetupError(f"the text has {len(ids)} tokens, {need} are wanted")
    return [list(ids[i * shape.context : (i + 1) * shape.context]) for i in range(shape.batch)]


def ask(remote: Remote, shape: Shape, ids: Sequence[int], new_tokens: int) -> tuple[float, dict[str, float]]:
    """One request: (seconds it measured, figures)."""
    texts = prompts(ids, shape)
    if shape.kind == "prefill":
        seconds = remote.ask({"op": "prefill", "prompt": texts[0]})["seconds"]
        return seconds, {"tokens_per_s": shape.context / seconds}
    reply = remote.ask({"op": shape.kind, "prompts": texts, "new_tokens": new_tokens})
    if shape.kind == "generate":
        return reply["seconds"], {"total_tokens_per_s": reply["tokens"] / reply["seconds"]}
    whole = reply["prefill_seconds"] + reply["seconds"]
    return whole, {
        "tokens_per_s": reply["tokens"] / reply["seconds"],
        "total_tokens_per_s": shape.batch * new_tokens / whole,
    }


def turn(record: Record, shape: Shape, ids: Sequence[int], new_tokens: int) -> None:
    """One sample of one figure, kept in the record. Raises Refused."""
    remote = record.remote
    assert remote is not None  # callers hold live records
    figures: list[dict[str, float]] = []
    extra: dict[str, float] = {}
    if shape.kind == "decode" and record.entry.engine == "gristmill":
        request = {"batch": shape.batch, "context": shape.context, "new_tokens": new_tokens}
        extra = remote.ask({"op": "roofline", **request})
    spent = 0.0
    begin = time.monotonic()
    while len(figures) < REPEATS and (not figures or spent < ENOUGH_S):
        seconds, found = ask(remote, shape, ids, new_tokens)
        spent += seconds
        figures.append(found)
    sample = {name: median(f[name] for f in figures) for name in figures[0]}
    if extra:
        # Bytes of a step at the probe's rate, over the time of a step.
        step_s = shape.batch / sample["tokens_per_s"]
        sample |= {
            "bandwidth_bytes_per_s": extra["bytes_per_second"],
            "bytes_per_step": extra["bytes_per_step"],
            "roofline_fraction": extra["bytes_per_step"] / extra["bytes_per_second"] / step_s,
        }
    record.samples.setdefault(shape.name, []).append(sample)
    if time.monotonic() - begin > SLOW_S:
        record.slow.add(shape.name)


def open_record(record: Record, threads: int, cpus: Sequence[int], say: Say) -> None:
    """Makes what the entry needs, starts its worker and loads the model."""
    entry = record.entry
    try:
        python = ensure(entry.environment, say)
        path = ensure_file(f"{entry.model}/{entry.file}", say)
        environment = variables(threads)
        if entry.isa and entry.engine == "gristmill":
            environment["GRISTMILL_ISA"] = entry.isa
        record.remote = Remote(entry.name, python, HERE / "workers" / entry.script, environment, cpus)
        record.info = record.remote.ask(
            {
                "op": "load",
                "model": str(path),
                "mode": entry.mode,
                "threads": threads,
                "options": entry.options,
            }
        )
        say(f"{entry.name}: loaded in {record.info['load_seconds']:.1f} s")
    except SetupError as error:
        record.fail("setup", str(error))
    except Refused as error:
        record.fail(error.kind, str(error))
    if record.failure:
        say(f"{entry.name}: {record.failure['kind']}: {record.failure['reason']}")


def run_group(
    records: Sequence[Record],
    *,
    rounds: int,
    threads: int,
    new_tokens: int,
    only: Sequence[str],
    say: Say,
) -> None:
    """Loads all entries of a group, then gives every one its turn, `rounds` times, and ends them."""
    cpus = choose_cpus(threads)
    ids = json.loads(ensure_file(f"{DEMO}/tokens.json", say).read_text())["ids"]
    try:
        for record in records:
            open_record(record, threads, cpus, say)
        for number in range(rounds):
            # Nobody always runs after the same neighbour's heat or behind the same pages.
            shift = number * len(records) // rounds
            for record in [*records[shift:], *records[:shift]]:
                _round(
                    record,
                    ids,
                    number=number,
                    new_tokens=new_tokens,
                    only=only,
                    label=f"round {number + 1}/{rounds}",
                    say=say,
                )
    finally:
        for record in records:
            record.close()


def _round(
    record: Record,
    ids: Sequence[int],
    *,
    number: int,
    new_tokens: int,
    only: Sequence[str],
    label: str,
    say: Say,
) -> None:
    shown = []
    for shape in record.entry.shapes:
        name = shape.name
        if (
            record.remote is None
            or name in record.slow
            or name in record.refused
            or (only and name not in only)
        ):
            continue
        try:
            if number == 0 or shape is record.entry.shapes[0]:
                # Cold buffers, compilation and clocks are no part of any figure.
                warm = shape if shape.batch == 1 else Shape("", shape.kind, shape.batch, 16)
                ask(record.remote, warm, ids, min(new_tokens, 8))
            turn(record, shape, ids, new_tokens)
        except Refused as error:
            if error.kind in ("died", "timeout"):
                record.fail(error.kind, f"{shape.title}: {error}")
            else:
                record.refused[name] = {"kind": error.kind, "reason": str(error)}
            say(f"{record.entry.name}: {shape.title}: {error.kind}: {error}")
            continue
        sample = record.samples[name][-1]
        rate = sample.get("tokens_per_s", sample.get("total_tokens_per_s", 0.0))
        shown.append(f"{name} {rate:.0f}")
    if shown:
        say(f"{label}  {record.entry.name}: {', '.join(shown)} tokens/s")
