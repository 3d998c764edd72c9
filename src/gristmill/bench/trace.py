"""Runs the command line with a clock on the steps of its start; `phases.startup` starts it in a fresh
process.

The clock is `time.monotonic`, which all processes of a machine share. Light on purpose: what it imports is
counted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

STEPS = (
    ("find the model", "gristmill.io.convert", "prepare"),
    ("open the checkpoint", "gristmill.io.checkpoint", "Checkpoint.open"),
    ("program", "gristmill.models", "build_program"),
    ("weights and kernels", "gristmill.backends.native.executor", "NativeExecutor.__init__"),
    ("tokenizer", "gristmill.io.tokenizer", "Tokenizer.load"),
    ("template", "gristmill.io.chat", "ChatTemplate.__init__"),
    ("prompt", "gristmill.io.tokenizer", "Tokenizer.encode_chat"),
    ("prefill", "gristmill.backends.native.executor", "NativeExecutor.step"),
)
"""Phases by name, and the function that each of them is."""

CODE = "import time; t = time.monotonic(); from gristmill.bench.trace import trace; trace(t)"
"""What the fresh interpreter is given, followed by the pipe to report to and the command line's arguments."""


def trace(started: float) -> None:
    """Runs the command line on the arguments after the first; writes a JSON report to the file descriptor in
    it.

    The report: `started` (first line of Python), `imported`, `spans` ([name, begin, end] of every step's
    first call) on the shared clock, and `peak_rss_bytes`.
    """
    import sys

    report = int(sys.argv[1])
    sys.argv = ["gristmill", *sys.argv[2:]]
    spans: dict[str, tuple[float, float]] = {}
    for name, module, function in STEPS:
        _time(name, module, function, spans)
    from gristmill.cli import main

    imported = time.monotonic()
    try:
        main()
    finally:
        sys.stdout.flush()
        from gristmill.bench.host import peak_rss_bytes

        content = {
            "started": started,
            "imported": imported,
            "spans": [[name, begin, end] for name, (begin, end) in spans.items()],
            "peak_rss_bytes": peak_rss_bytes(),
        }
        os.write(report, json.dumps(content).encode())


def _time(name: str, module: str, function: str, spans: dict[str, tuple[float, float]]) -> None:
    """Replaces a function, or a method or classmethod of a class, by one that records its first call."""
    owner: Any = import_module(module)
    *classes, attribute = function.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original = vars(owner)[attribute]

    def clocked(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.monotonic()
            try:
                return call(*args, **kwargs)
            finally:
                spans.setdefault(name, (begin, time.monotonic()))

        return timed

    if isinstance(original, classmethod):
        setattr(owner, attribute, classmethod(clocked(original.__func__)))
    else:
        setattr(owner, attribute, clocked(original))
