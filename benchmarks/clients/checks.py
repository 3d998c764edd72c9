"""Runs a client's checks in its own environment and prints what came of each as JSON."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from importlib import metadata


def run(package: str, checks: dict[str, Callable[[str, str], str | None]]) -> None:
    """Calls every check with the base address and the key; one that raises has failed.

    A check may return a word on what it saw.
    """
    address, key = sys.argv[1:3]
    rows = []
    for name, check in checks.items():
        try:
            rows.append({"what": name, "passed": True, "detail": check(address, key) or ""})
        except Exception as error:
            traceback.print_exc()
            text = str(error).splitlines()
            detail = f"{type(error).__name__}: {text[0] if text else ''}"
            rows.append({"what": name, "passed": False, "detail": detail[:300]})
    json.dump({"version": metadata.version(package), "checks": rows}, sys.stdout)


def expect(condition: object, what: str) -> None:
    """AssertionError that says what was expected."""
    if not condition:
        raise AssertionError(what)
