"""Work that threads take from each other: once, from where it should be, in pieces as large as asked for."""

from __future__ import annotations

import pytest

from gristmill.backends.native import _native


def taken_by(shares: _native.Shares, thread: int, units: int, least: int, piece: int = 0) -> list[range]:
    """All that is left, to one thread."""
    ranges = []
    while True:
        begin, end = shares.take(piece, units, least, thread)
        if begin == end:
            return ranges
        ranges.append(range(begin, end))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("units", [0, 1, 2, 7, 96, 1001])
@pytest.mark.parametrize("least", [1, 4])
def test_every_unit_is_taken_once(threads: int, units: int, least: int) -> None:
    shares = _native.Shares(1, threads)
    assert shares.share_out(_native.Pool(threads), units, least, rounds=200) == [200] * units


def test_one_thread_takes_all_at_once() -> None:
    shares = _native.Shares(1, 1)
    shares.renew()
    assert taken_by(shares, 0, 100, 4) == [range(100)]


def test_a_share_goes_from_its_front_to_its_owner_and_from_its_back_to_others() -> None:
    shares = _native.Shares(2, 2)
    shares.renew()
    own = [range(24), range(24, 36), range(36, 42), range(42, 48)]
    others = [range(72, 96), range(60, 72), range(54, 60), range(48, 54)]
    assert taken_by(shares, 0, 96, 4) == [*own, *others]
    assert taken_by(shares, 1, 96, 4) == []
    assert taken_by(shares, 1, 3, 1, piece=1) == [range(1, 2), range(2, 3), range(1)]


def test_two_threads_meet_within_a_share() -> None:
    shares = _native.Shares(1, 2)
    shares.renew()
    assert shares.take(0, 96, 4, 0) == (0, 24)
    assert [shares.take(0, 96, 4, 1) for _ in range(4)] == [(48, 72), (72, 84), (84, 90), (90, 96)]
    assert shares.take(0, 96, 4, 1) == (36, 48)
    assert shares.take(0, 96, 4, 0) == (24, 30)
    assert shares.take(0, 96, 4, 1) == (30, 36)
    assert shares.take(0, 96, 4, 0) == (0, 0)


@pytest.mark.parametrize("idle", [2**16 - 1, 2**16, 2**16 + 1])
def test_a_piece_left_alone_for_as_many_rounds_as_are_counted_is_whole(idle: int) -> None:
    shares = _native.Shares(1, 1)
    for _ in range(3):
        shares.renew()
        assert taken_by(shares, 0, 8, 1) == [range(8)]
        for _ in range(idle - 1):
            shares.renew()
