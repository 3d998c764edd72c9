"""The listening socket that turns requests away while there is no room for them."""

from __future__ import annotations

import asyncio
import select
import selectors
import socket
import time
from collections.abc import Iterator

import pytest

from gristmill.serve import server
from gristmill.serve.settings import Settings


class Door:
    """A listening socket under an event loop, as asyncio's servers use one."""

    def __init__(self) -> None:
        self.full = True
        self.wakes = 0
        self.accepted: list[socket.socket] = []
        self.listener = server._listen(Settings(port=0))
        self.listener.refusal = lambda data, client: b"full" if self.full else None
        self.listener.gather()

    def look(self) -> None:
        self.wakes += 1
        while True:
            try:
                self.accepted.append(self.listener.accept()[0])
            except BlockingIOError:
                return

    async def ask(self) -> bytes:
        reader, writer = await asyncio.open_connection(*self.listener.getsockname()[:2])
        writer.write(b"POST /v1/completions")
        try:
            return await asyncio.wait_for(reader.read(), 5)
        finally:
            writer.close()

    async def __aenter__(self) -> Door:
        asyncio.get_running_loop().add_reader(self.listener, self.look)
        return self

    async def __aexit__(self, *exc: object) -> None:
        asyncio.get_running_loop().remove_reader(self.listener)
        for one in self.accepted:
            one.close()
        self.listener.close()


@pytest.fixture
def door() -> Iterator[Door]:
    one = Door()
    yield one
    one.listener.close()


def test_what_is_turned_away_gathers(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(select, "epoll"):
        pytest.skip("the system has no epoll")
    monkeypatch.setattr(server, "_REFUSED_TOGETHER_SECONDS", 0.3)

    async def test() -> None:
        async with door:
            assert await door.ask() == b"full"
            begin, woken = time.monotonic(), door.wakes
            assert await asyncio.gather(*(door.ask() for _ in range(20))) == [b"full"] * 20
            assert time.monotonic() - begin > 0.2
            assert door.wakes == woken + 1
            # Once there is room it is as ever.
            door.full = False
            waiting = [asyncio.create_task(door.ask()) for _ in range(3)]
            await asyncio.sleep(0.6)
            assert len(door.accepted) == 3
            begin = time.monotonic()
            waiting.append(asyncio.create_task(door.ask()))
            while len(door.accepted) < 4:
                await asyncio.sleep(0.001)
                assert time.monotonic() - begin < 0.2
            for one in door.accepted:
                one.close()
            await asyncio.gather(*waiting, return_exceptions=True)  # closed unread

    asyncio.run(test())


def test_closing_while_requests_gather(door: Door) -> None:
    async def test() -> None:
        wrong: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, what: wrong.append(what))
        async with door:
            assert await door.ask() == b"full"
        assert door.listener.fileno() == -1
        await asyncio.sleep(2 * server._REFUSED_TOGETHER_SECONDS)
        assert not wrong

    asyncio.run(test())


def test_without_epoll_each_is_turned_away_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "epoll", raising=False)

    async def test() -> None:
        async with Door() as door:
            for _ in range(3):
                assert await door.ask() == b"full"

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(test())
