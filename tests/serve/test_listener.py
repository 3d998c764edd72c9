"""The listening socket that turns requests away while there is no room for them."""

from __future__ import annotations

import asyncio
import select
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from gristmill.engine.request import QueueFull
from gristmill.serve import server
from gristmill.serve.settings import Settings

ASK = b"completion"


class Door:
    """A listening socket under an event loop, as asyncio's servers use one, and what it asks of a server."""

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self.wakes = 0
        self.accepted: list[socket.socket] = []
        self.wrong: list[object] = []
        self.listener = server._listen(Settings(port=0))

    def asks_for_completion(self, data: bytes) -> bool:
        return data.startswith(ASK)

    def full(self, coming: int) -> QueueFull | None:
        return QueueFull("full", 1) if coming >= self.room else None

    def refusal(self, data: bytes, reason: QueueFull, client: Any) -> bytes | None:
        return b"full" if data == ASK else None

    def look(self) -> None:
        self.wakes += 1
        while True:
            try:
                self.accepted.append(self.listener.accept()[0])
            except BlockingIOError:
                return

    async def ask(self, data: bytes = ASK) -> bytes:
        reader, writer = await asyncio.open_connection(*self.listener.getsockname()[:2])
        writer.write(data)
        try:
            return await asyncio.wait_for(reader.read(), 10)
        except ConnectionError:
            return b"closed unread"
        finally:
            writer.close()

    async def accepts(self, count: int) -> None:
        """Waits for so many connections, and closes them."""
        async with asyncio.timeout(10):
            while len(self.accepted) < count:
                await asyncio.sleep(0.005)
        assert len(self.accepted) == count
        while self.accepted:
            self.accepted.pop().close()

    async def __aenter__(self) -> Door:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, what: self.wrong.append(what))
        self.listener.turn_away(self, self.full)  # type: ignore[arg-type]
        loop.add_reader(self.listener, self.look)
        return self

    async def __aexit__(self, *exc: object) -> None:
        asyncio.get_running_loop().remove_reader(self.listener)
        self.listener.close()
        while self.accepted:
            self.accepted.pop().close()
        assert self.listener.fileno() == -1
        assert not self.wrong


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    if not hasattr(select, "epoll"):
        pytest.skip("the system has no epoll")
    return lambda seconds: monkeypatch.setattr(server, "_GATHER_SECONDS", seconds)


def test_what_is_turned_away_gathers(gathers: Callable[[float], None]) -> None:
    gathers(1.0)

    async def test() -> None:
        async with Door() as door:
            assert await door.ask() == b"full"
            woken = door.wakes
            assert await asyncio.gather(*(door.ask() for _ in range(20))) == [b"full"] * 20
            assert door.wakes == woken + 1
            assert not door.accepted

    asyncio.run(test())


def test_one_free_place_lets_one_of_many_in(gathers: Callable[[float], None]) -> None:
    gathers(0.5)

    async def test() -> None:
        async with Door() as door:
            assert await door.ask() == b"full"
            door.room = 1
            asked = [asyncio.create_task(door.ask()) for _ in range(10)]
            other = asyncio.create_task(door.ask(b"something else"))
            await door.accepts(2)  # what asks for no completion needs no place
            assert sorted(await asyncio.gather(*asked)) == [b"closed unread"] + [b"full"] * 9
            assert await other == b"closed unread"

    asyncio.run(test())


def test_others_have_their_turn(gathers: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gathers(0.5)
    monkeypatch.setattr(server, "_REFUSED_AT_ONCE", 4)

    async def test() -> None:
        async with Door() as door:
            assert await door.ask() == b"full"
            woken = door.wakes
            assert await asyncio.gather(*(door.ask() for _ in range(20))) == [b"full"] * 20
            assert door.wakes >= woken + 5
            door.room = 1  # still, for one only
            asked = [asyncio.create_task(door.ask()) for _ in range(20)]
            await door.accepts(1)
            assert sorted(await asyncio.gather(*asked)) == [b"closed unread"] + [b"full"] * 19
            # Where there is no end of them, room is found again after a while.
            door.listener._let_in, door.listener._let_in_since = 1, time.monotonic() - 1
            asked = [asyncio.create_task(door.ask()) for _ in range(8)]
            await door.accepts(1)
            assert sorted(await asyncio.gather(*asked)) == [b"closed unread"] + [b"full"] * 7

    asyncio.run(test())


def test_while_there_is_room_nothing_gathers(gathers: Callable[[float], None]) -> None:
    gathers(60.0)

    async def test() -> None:
        async with Door(room=1) as door:
            for _ in range(3):
                asked = asyncio.create_task(door.ask())
                await door.accepts(1)
                await asked
            door.room = 0
            asked = asyncio.create_task(door.ask(b"something else"))
            await door.accepts(1)
            await asked
            # There is no room for this one, but it is not the short way that can say so.
            asked = asyncio.create_task(door.ask(ASK + b" in pieces"))
            await door.accepts(1)
            await asked
            asked, woken = asyncio.create_task(door.ask()), door.wakes
            await asyncio.sleep(0.3)
            assert (door.wakes, asked.done()) == (woken, False)
            asked.cancel()

    asyncio.run(test())


def test_closing_while_requests_gather(gathers: Callable[[float], None]) -> None:
    gathers(0.05)

    async def test() -> None:
        async with Door() as door:
            assert await door.ask() == b"full"
        await asyncio.sleep(0.2)
        assert not door.wrong

    asyncio.run(test())


def test_without_epoll_each_is_turned_away_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll", raising=False)

    async def test() -> None:
        async with Door() as door:
            for _ in range(3):
                assert await door.ask() == b"full"

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(test())
