"""Finds methods by name: every module in the folders of this package that defines `METHOD`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

from gristmill.errors import UsageError
from gristmill.methods.base import Method

FOLDERS = ("weights", "activations", "attention", "kvcache", "decoding", "serving")


@cache
def _modules() -> dict[str, str]:
    """Method name -> module, from the file names: nothing is imported."""
    here = Path(__file__).parent
    return {
        module.name: f"gristmill.methods.{folder}.{module.name}"
        for folder in FOLDERS
        for module in pkgutil.iter_modules([str(here / folder)])
        if not module.name.startswith("_")
    }


def names() -> list[str]:
    """All methods, sorted."""
    return sorted(_modules())


def method(name: str) -> Method[Any]:
    """The method of that name. UsageError, listing the known ones, if there is none."""
    modules = _modules()
    if name not in modules:
        raise UsageError(f"there is no method {name[:60]!r}; known: {', '.join(names())}")
    found: Method[Any] = importlib.import_module(modules[name]).METHOD
    return found
