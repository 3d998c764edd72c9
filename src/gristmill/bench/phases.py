"""Times the way from process start to the first token, in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from gristmill.bench.trace import CODE, STEPS
from gristmill.errors import GristmillError, UsageError

if TYPE_CHECKING:
    from gristmill.io.checkpoint import Progress

PROMPT = "What is a mill?"


def startup(
    model: str | Path,
    *,
    weights: str = "stored",
    activations: str | None = None,
    kv_dtype: str | None = None,
    threads: int | None = None,
    prompt: str = PROMPT,
    repeats: int = 5,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs `gristmill generate MODEL PROMPT --max-tokens 1` in fresh processes and times its phases.

    Two kinds of process take turns: the plain command, timed from its start to its first byte of output, and
    the same command with a clock around its steps. The model is converted beforehand, and one run of each
    kind warms the file cache without being counted.

    Returns first_token_s (the plain command), traced_first_token_s, phases ([{"name", "begin_s", "seconds"}],
    medians, in the order of their begin; what lies between them is `other`), peak_rss_bytes, repeats,
    machine.

    Raises GristmillError with the command's last line of stderr if it fails.
    """
    from gristmill.bench.host import load_average, machine
    from gristmill.io.convert import prepare

    if repeats < 1:
        raise UsageError("the start-up measurement needs at least one repeat")
    prepare(model, weights, progress)
    command = [
        "generate",
        str(model),
        prompt,
        "--max-tokens",
        "1",
        "--weights",
        weights,
    ]
    if kv_dtype is not None:
        command += ["--kv-dtype", kv_dtype]
    if activations is not None:
        command += ["--activations", activations]
    if threads is not None:
        command += ["--threads", str(threads)]
    plain: list[float] = []
    traces: list[dict[str, Any]] = []
    for turn in range(repeats + 1):
        first = _first_byte([sys.executable, "-m", "gristmill", *command])
        traced = _traced(command)
        if turn:
            plain.append(first)
            traces.append(traced)
        if progress:
            progress("starting", turn + 1, repeats + 1)
    phases = []
    for name in traces[0]["phases"]:
        spans = [t["phases"][name] for t in traces if name in t["phases"]]
        phases.append(
            {"name": name, "begin_s": median(s[0] for s in spans), "seconds": median(s[1] for s in spans)}
        )
    phases.sort(key=lambda phase: phase["begin_s"])
    return {
        "machine": {**machine(), "load_average": load_average()},
        "first_token_s": median(plain),
        "traced_first_token_s": median(t["first_token_s"] for t in traces),
        "phases": phases,
        "peak_rss_bytes": int(median(t["peak_rss_bytes"] for t in traces)),
        "repeats": repeats,
        "runs_s": plain,
    }


def _first_byte(command: Sequence[str], keep: Sequence[int] = ()) -> float:
    """Starts a command and waits for its end; seconds from its start to its first byte on stdout."""
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=keep) as process:
        assert process.stdout is not None  # asked for above
        os.read(process.stdout.fileno(), 1)
        first = time.monotonic() - begin
        _, errors = process.communicate()
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines() or ["no message"]
        raise GristmillError(f"`gristmill generate` failed with status {process.returncode}: {lines[-1]}")
    return first


def _traced(command: Sequence[str]) -> dict[str, Any]:
    """One traced run: `phases` (name -> begin and length in seconds), first_token_s, peak_rss_bytes."""
    source, sink = os.pipe()
    try:
        begin = time.monotonic()
        first = _first_byte([sys.executable, "-c", CODE, str(sink), *command], keep=(sink,))
    finally:
        os.close(sink)
        with os.fdopen(source, "rb") as pipe:
            content = pipe.read()
    report = json.loads(content)
    return {
        "phases": phase_table(begin, begin + first, report),
        "first_token_s": first,
        "peak_rss_bytes": report["peak_rss_bytes"],
    }


def phase_table(begin: float, end: float, report: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Name -> (begin after process start, length) of every phase up to the first byte, in seconds.

    Steps that ran beside one another keep their own lengths; `other` is the time in which none ran.
    """
    spans = [("interpreter", begin, report["started"]), ("imports", report["started"], report["imported"])]
    spans += [(name, a, b) for name, a, b in report["spans"] if a < end]
    known = {name for name, _, _ in STEPS} | {"interpreter", "imports"}
    result = {name: (a - begin, min(b, end) - a) for name, a, b in spans if name in known}
    covered, reached = 0.0, begin
    for _, a, b in sorted(spans, key=lambda span: span[1]):
        covered += max(0.0, min(b, end) - max(a, reached))
        reached = max(reached, min(b, end))
    result["other"] = (end - begin, end - begin - covered)
    return result
