"""Work that threads take from each other is done once."""

from __future__ import annotations

import pytest

from gristmill.backends.native import _native


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("units", [0, 1, 2, 7, 96, 1001])
@pytest.mark.parametrize("least", [1, 4])
def test_every_unit_is_taken_once(threads: int, units: int, least: int) -> None:
    assert _native.share_out(threads, units, least, rounds=50) == [50] * (2 * units)


def test_rounds_beyond_what_their_counter_holds() -> None:
    rounds = 2**16 + 100
    assert _native.share_out(2, 3, 1, rounds) == [rounds] * 6
