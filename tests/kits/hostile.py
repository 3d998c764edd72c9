"""Checks that bad input is refused as it should be: one short line, and no memory taken on a file's word."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from contextlib import suppress

import pytest

from gristmill.errors import GristmillError, ModelError

MEMORY_LIMIT = 64 << 20
"""Most bytes that Python may allocate over a small bad file."""


def traced_peak(call: Callable[[], object]) -> int:
    """Peak bytes that Python allocated during a call; a GristmillError of the call is expected."""
    tracemalloc.start()
    try:
        with suppress(GristmillError):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def assert_one_line(message: str) -> None:
    """A message that fits a terminal: not empty, without line breaks, of bounded length."""
    assert message
    assert len(message) < 800, len(message)
    assert message.isprintable(), message


def assert_refused(call: Callable[[], object], match: str | None = None) -> str:
    """The call raises ModelError with a one-line message (that matches `match`); returns the message."""
    with pytest.raises(ModelError, match=match) as raised:
        call()
    assert_one_line(str(raised.value))
    return str(raised.value)
