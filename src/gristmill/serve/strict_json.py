"""JSON from strangers: nothing that readers could understand differently, nothing deep or endless."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from gristmill.serve.errors import ApiError

__all__ = ["MAX_DEPTH", "parse_object"]

MAX_DEPTH = 64


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. ApiError 400 for anything else.

    Also for keys given twice, NaN and infinities, numbers beyond a double, NUL and lone surrogates in texts,
    and more than 64 levels.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    try:
        value = json.loads(
            text, object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except RecursionError:
        raise ApiError(400, f"the body nests deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at byte {error.pos}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    _check(value)
    return value


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ApiError(400, f"the key {name[:40]!r} is given twice")
        result[name] = value
    return result


def _constant(text: str) -> NoReturn:
    raise ApiError(400, f"{text} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ApiError(400, f"the number {text[:40]} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > 40:
        raise ApiError(400, f"the number {text[:40]}... is too large")
    return int(text)


def _check(root: Any) -> None:
    level: list[Any] = [root]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                _check_text(value)
            elif isinstance(value, dict):
                for key in value:
                    _check_text(key)
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
        if not below:
            return
        level = below
    raise ApiError(400, f"the body nests deeper than {MAX_DEPTH} levels")


def _check_text(text: str) -> None:
    if "\0" in text:
        raise ApiError(400, "a text holds the character NUL")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ApiError(400, "a text holds half of a surrogate pair") from None
