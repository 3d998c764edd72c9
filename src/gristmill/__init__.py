"""gristmill: an LLM inference engine.

    import gristmill

    with gristmill.load("smollm2") as model:
        print(model.generate("Why is the sky blue?", max_tokens=60).text)

Names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from gristmill.version import __version__

TYPE_CHECKING = False  # importing `typing` for it would delay the start
if TYPE_CHECKING:
    from typing import Any

    from gristmill.api import ChatSession, Model, load
    from gristmill.engine.engine import Engine
    from gristmill.engine.request import Output, Request
    from gristmill.engine.result import Chunk, Result, Timings, TokenLogprob
    from gristmill.engine.sampling import SamplingParams
    from gristmill.errors import (
        Cancelled,
        GristmillError,
        ModelError,
        TemplateError,
        TokenizerError,
        UsageError,
    )
    from gristmill.methods.compress import compress
    from gristmill.methods.recipe import Recipe
    from gristmill.program.batch import CancelFlag

_HOMES = {
    "CancelFlag": "gristmill.program.batch",
    "Cancelled": "gristmill.errors",
    "ChatSession": "gristmill.api",
    "Chunk": "gristmill.engine.result",
    "Engine": "gristmill.engine.engine",
    "GristmillError": "gristmill.errors",
    "Model": "gristmill.api",
    "ModelError": "gristmill.errors",
    "Output": "gristmill.engine.request",
    "Recipe": "gristmill.methods.recipe",
    "Request": "gristmill.engine.request",
    "Result": "gristmill.engine.result",
    "SamplingParams": "gristmill.engine.sampling",
    "TemplateError": "gristmill.errors",
    "Timings": "gristmill.engine.result",
    "TokenLogprob": "gristmill.engine.result",
    "TokenizerError": "gristmill.errors",
    "UsageError": "gristmill.errors",
    "compress": "gristmill.methods.compress",
    "load": "gristmill.api",
}
"""Public name -> the module it is defined in."""

__all__ = [
    "CancelFlag",
    "Cancelled",
    "ChatSession",
    "Chunk",
    "Engine",
    "GristmillError",
    "Model",
    "ModelError",
    "Output",
    "Recipe",
    "Request",
    "Result",
    "SamplingParams",
    "TemplateError",
    "Timings",
    "TokenLogprob",
    "TokenizerError",
    "UsageError",
    "__version__",
    "compress",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gristmill' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
