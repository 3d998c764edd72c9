"""JSON from files that may be damaged or hostile: every fault is a ModelError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gristmill.errors import ModelError
from gristmill.io.mapped import read_small, short

CONFIG_LIMIT = 32 << 20


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Parses one JSON object. ModelError, naming `what`, for bad text, keys given twice, deep nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            once: set[str] = set()
            for key, _ in pairs:
                if key in once:
                    raise ModelError(f"{what} holds the key {short(key)} twice")
                once.add(key)
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    # ValueError covers bad UTF-8, bad JSON and integers of thousands of digits.
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).split("\n")[0]
        raise ModelError(f"{what} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{what} is not a JSON object")
    return value


def read_object(path: Path, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    """Reads a file that holds one JSON object."""
    return parse_object(read_small(path, limit), str(path))
