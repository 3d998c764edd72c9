"""Measures one model on this machine: prefill, decode, start-up, memory, and the roofline beside them.

The functions are imported on use: the process that `startup` times imports this package, too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gristmill.bench.host import machine
    from gristmill.bench.measure import run
    from gristmill.bench.phases import startup
    from gristmill.bench.tables import render, render_startup

__all__ = ["machine", "render", "render_startup", "run", "startup"]

_HOMES = {
    "machine": "gristmill.bench.host",
    "run": "gristmill.bench.measure",
    "startup": "gristmill.bench.phases",
    "render": "gristmill.bench.tables",
    "render_startup": "gristmill.bench.tables",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
