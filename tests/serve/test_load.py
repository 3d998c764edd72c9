"""The load generator against a server whose delays are known, on a clock that does not wait."""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from harness import load

TTFT, TPOT = 0.25, 0.02


class NoWait(selectors.DefaultSelector):
    """Instead of waiting, moves the clock of the loop that it belongs to."""

    now = 0.0

    def select(self, timeout=None):
        # What is under way between two sockets of this machine may need a moment that is no delay.
        for _ in range(3):
            if ready := super().select(0):
                return ready
            os.sched_yield()
        if timeout is None:
            return super().select(0.001)
        self.now += timeout
        return []


class Clock(asyncio.SelectorEventLoop):
    def __init__(self):
        self._wait = NoWait()
        super().__init__(self._wait)

    def time(self):
        return self._wait.now


class Fake:
    """Answers /v1/completions after TTFT, then every TPOT; tells what it was asked."""

    def __init__(self, *, behave="well", per_event=1, usage=True, crlf=False):
        self.behave, self.per_event, self.usage, self.crlf = behave, per_event, usage, crlf
        self.asked = []
        self.busy = self.most = 0

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        return load.Address("127.0.0.1", self.server.sockets[0].getsockname()[1], "fake", "secret")

    async def __aexit__(self, *exc):
        self.server.close()

    async def answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert "Authorization: Bearer secret" in head
        size = int(head.lower().split("content-length:")[1].split()[0])
        body = json.loads(await reader.readexactly(size))
        self.asked.append(body)
        self.busy += 1
        self.most = max(self.most, self.busy)
        try:
            await self.stream(writer, body)
        finally:
            self.busy -= 1
            writer.close()

    async def stream(self, writer, body):
        if self.behave == "busy" and len(self.asked) % 2 == 0:
            writer.write(b"HTTP/1.1 429 Busy\r\nContent-Length: 4\r\n\r\nbusy")
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")

        def send(data):
            end = "\r\n\r\n" if self.crlf else "\n\n"
            piece = f"data: {data}{end}".encode()
            # Cut in the middle: an event need not come in one piece.
            for part in (piece[:7], piece[7:]):
                writer.write(b"%x\r\n%s\r\n" % (len(part), part))

        count = body["max_tokens"]
        await asyncio.sleep(TTFT)
        for index in range(0, count, self.per_event):
            if index:
                await asyncio.sleep(TPOT * self.per_event)
            if self.behave == "break" and index > count // 2:
                writer.transport.abort()
                return
            if self.behave == "error" and index > count // 2:
                send(json.dumps({"error": {"message": "no more"}}))
                break
            if self.behave == "hang" and index > count // 2:
                await asyncio.sleep(10_000)
            text = "x" * min(self.per_event, count - index)
            send(json.dumps({"choices": [{"text": text, "finish_reason": None}]}))
        send(json.dumps({"choices": [{"text": "", "finish_reason": "length"}]}))
        if self.usage:
            send(json.dumps({"choices": [], "usage": {"completion_tokens": count}}))
        send("[DONE]")
        writer.write(b"0\r\n\r\n")


@pytest.fixture
def run():
    with asyncio.Runner(loop_factory=Clock) as runner:
        yield runner.run


@pytest.fixture
def asks():
    return load.Prompts(range(100_000), seed=3).take(40)


def closed(asks, users, limit_s=600.0, **behaviour):
    async def main():
        fake = Fake(**behaviour)
        async with fake as address:
            return fake, await load.closed_loop(address, asks, users, limit_s=limit_s)

    return main()


@pytest.mark.parametrize("crlf", [False, True])
def test_delays_and_counts_come_out(run, asks, crlf):
    fake, done = run(closed(asks, 4, crlf=crlf))
    found = load.figures(done)
    assert found["ttft_ms_p50"] == pytest.approx(1000 * TTFT, rel=0.02)
    assert found["ttft_ms_p99"] == pytest.approx(1000 * TTFT, rel=0.02)
    for name in ("tpot_ms_p50", "tpot_ms_p99", "gap_ms_p99"):
        assert found[name] == pytest.approx(1000 * TPOT, rel=0.02)
    assert (found["requests"], found["failed"], found["short"], found["unsent"]) == (40, 0, 0, 0)
    assert fake.most == 4
    assert [one.tokens for one in done.outcomes] == [len(one.text) for one in done.outcomes]
    assert Counter(one.ask for one in done.outcomes) == Counter(asks)
    # Four users who wait TTFT and then get a token every TPOT.
    each = sum(ask.tokens for ask in asks) / sum(TTFT + (ask.tokens - 1) * TPOT for ask in asks)
    assert found["output_tokens_per_s"] == pytest.approx(4 * each, rel=0.05)


def test_what_is_sent(run, asks):
    fake, _ = run(closed(asks, 4))
    sent = {tuple(body["prompt"]): body for body in fake.asked}
    for ask in asks:
        body = sent[ask.prompt]
        assert body["max_tokens"] == ask.tokens
        assert body["stream"]
        assert body["ignore_eos"]
        assert body["temperature"] == 0


def test_several_tokens_in_a_piece_are_counted_by_the_server(run, asks):
    _, done = run(closed(asks, 4, per_event=4))
    found = load.figures(done)
    assert found["short"] == 0
    assert found["gap_ms_p99"] == pytest.approx(4000 * TPOT, rel=0.02)
    assert found["tpot_ms_p50"] == pytest.approx(1000 * TPOT, rel=0.05)


def test_without_usage_pieces_are_counted(run, asks):
    _, done = run(closed(asks, 4, usage=False))
    assert [one.tokens for one in done.outcomes] == [one.ask.tokens for one in done.outcomes]


@pytest.mark.parametrize(
    ("behave", "message"),
    [("break", "HttpError"), ("error", "in the stream"), ("hang", "time limit")],
)
def test_failures_are_counted_not_raised(run, asks, behave, message):
    _, done = run(closed(asks, 4, behave=behave, limit_s=60))
    assert all(message in one.error for one in done.outcomes)
    assert len(done.outcomes) + done.unsent == 40


def test_refused_requests(run, asks):
    _, done = run(closed(asks, 4, behave="busy"))
    found = load.figures(done)
    assert (found["requests"], found["failed"]) == (40, 20)
    assert found["errors"] == {"HTTP 429: busy": 20}


def test_nobody_listens(run, asks):
    async def main():
        async with Fake() as address:
            pass
        return await load.complete(address, asks[0])

    assert "ConnectionRefusedError" in run(main()).error


def test_the_limit_leaves_requests_unsent(run, asks):
    _, done = run(closed(asks, 1, limit_s=10.0))
    assert 0 < done.unsent < 40
    assert load.figures(done)["unsent"] == done.unsent


def test_open_loop_does_not_wait_for_answers(run, asks):
    async def main(rate):
        fake = Fake()
        async with fake as address:
            return fake, await load.open_loop(address, asks, rate, seed=5)

    fake, done = run(main(50.0))
    assert fake.most > 30
    found = load.figures(done)
    assert found["ttft_ms_p99"] == pytest.approx(1000 * TTFT, rel=0.02)
    arrivals = sorted(one.begin for one in done.outcomes)
    assert 40 / (arrivals[-1] - arrivals[0]) == pytest.approx(50.0, rel=0.5)
    _, again = run(main(50.0))
    first = [one.begin - done.outcomes[0].begin for one in done.outcomes]
    assert first == pytest.approx([one.begin - again.outcomes[0].begin for one in again.outcomes])


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="no such policy here")
def test_the_generator_waits_for_its_turn(run, asks):
    seen = set()
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        pytest.skip("the tests run under another policy")

    class Watched(Fake):
        async def answer(self, reader, writer):
            seen.add(os.sched_getscheduler(0))
            await super().answer(reader, writer)

    async def main():
        async with Watched() as address:
            await load.closed_loop(address, asks[:2], 2)
            await load.open_loop(address, asks[:2], 1.0, seed=1)

    run(main())
    assert seen == {os.SCHED_BATCH}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_watcher_leaves(run, asks):
    async def main():
        async with Fake() as address:
            return await load.complete(address, asks[0], watch=lambda one: len(one.arrivals) < 5)

    outcome = run(main())
    assert outcome.error == "left"
    assert len(outcome.arrivals) == 5


def test_prompts_are_the_same_for_everybody_and_begin_differently():
    first, second = (load.Prompts(range(100_000), seed=3) for _ in range(2))
    taken = first.take(300)
    assert taken == second.take(100) + second.take(200)
    assert len({ask.prompt[: load.OPENING] for ask in taken}) == 300
    assert {len(ask.prompt) for ask in taken} <= set(range(64, 513))
    assert {ask.tokens for ask in taken} <= set(range(64, 129))
    assert taken != load.Prompts(range(100_000), seed=4).take(300)


def test_a_long_load_has_more_beginnings_than_the_text():
    taken = load.Prompts(range(2100), seed=1).take(5000)
    assert len({ask.prompt[: load.OPENING] for ask in taken}) == 5000


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="too short"):
        load.Prompts(range(100), seed=1)
    with pytest.raises(ValueError, match="beginnings"):
        load.Prompts([7] * 5000, seed=1).take(2)


def test_a_load_that_is_never_steady_has_no_figures(run, asks):
    _, done = run(closed(asks[:4], 4))
    with pytest.raises(ValueError, match="never steady"):
        load.figures(done)
