"""Load on servers that speak OpenAI's API: what users in number see of a stream.

Requests go out over plain asyncio sockets, one connection each, so that the generator takes little of the
processors that the server runs on; what it took is part of the figures. For the same reason it runs, where
the system can do that, as a process that waits for its turn rather than interrupt others' (SCHED_BATCH): a
server whose threads wait for one another loses a multiple of what each interruption takes. All times are of
the event loop's clock, in seconds; those of an open loop count from when a request was due, so that what the
generator is late by is in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PROMPT_TOKENS = (64, 512)
OUTPUT_TOKENS = (64, 128)
OPENING = 8
"""No two prompts of a list begin with the same tokens, so many of them."""


class HttpError(Exception):
    """The other side did not speak HTTP/1.1, or broke off."""


@dataclass(frozen=True)
class Address:
    """Where a server listens, the model's name there, and the key it wants."""

    host: str
    port: int
    model: str = ""
    key: str = ""


@dataclass(frozen=True)
class Ask:
    """One request: prompt as token ids, and how many tokens to generate."""

    prompt: tuple[int, ...]
    tokens: int


@dataclass
class Outcome:
    """What came of a request. Times are the loop's; `begin` is when it was due, not when it got its turn."""

    ask: Ask
    begin: float
    first: float = 0.0
    """When the first text came; 0 before."""
    end: float = 0.0
    """When the last text came."""
    arrivals: list[float] = field(default_factory=list)
    """When each piece of text came."""
    tokens: int = 0
    """Generated tokens: the server's own count, or the pieces of text where it gives none."""
    cached: int = 0
    """Prompt tokens that the server says it had in its cache."""
    text: str = ""
    finish: str = ""
    error: str = ""
    """Why it failed, in one line; empty if it did not."""
    status: int = 0
    retry_after: str = ""
    """What a refusal says of when to come again."""

    @property
    def ttft(self) -> float:
        """Seconds to the first text."""
        return self.first - self.begin

    @property
    def tpot(self) -> float:
        """Mean seconds of every token after the first."""
        return (self.end - self.first) / max(1, self.tokens - 1)


class Prompts:
    """Endless requests drawn from a text by seed: the same for all who take them in the same order."""

    def __init__(self, ids: Sequence[int], seed: int) -> None:
        """ids: the text's tokens."""
        if len(ids) < 4 * PROMPT_TOKENS[1]:
            raise ValueError(f"a text of {len(ids)} tokens is too short")
        self._ids = list(ids)
        self._random = random.Random(seed)
        self._openings: set[tuple[int, ...]] = set()

    def take(
        self,
        count: int,
        prompt: tuple[int, int] = PROMPT_TOKENS,
        output: tuple[int, int] = OUTPUT_TOKENS,
    ) -> list[Ask]:
        """The next requests, with lengths drawn from these ranges, ends included."""
        result = []
        for _ in range(100 * count):
            if len(result) == count:
                break
            size, new = self._random.randint(*prompt), self._random.randint(*output)
            start = self._random.randrange(len(self._ids) - size)
            ids = tuple(self._ids[start : start + size])
            if ids[:OPENING] in self._openings:  # a long load has used many of the text's beginnings
                ids = (self._random.choice(self._ids), *ids[1:])
            if ids[:OPENING] in self._openings:
                continue
            self._openings.add(ids[:OPENING])
            result.append(Ask(ids, new))
        if len(result) < count:
            raise ValueError("the text has no more different beginnings")
        return result


def demo_ids() -> list[int]:
    """The text that is on every machine, in the demo model's tokens."""
    from gristmill import load
    from gristmill.evaluate.text import builtin_text

    return list(load("smollm2").tokenizer.encode(builtin_text().content))


class Response:
    """The head of an answer, and its body as it comes."""

    def __init__(self, status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
        self.status = status
        self.headers = headers
        self._reader = reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, decoded from its transfer coding. HttpError if it breaks off."""
        reader = self._reader
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int((await reader.readline()).split(b";")[0], 16):
                    yield (await reader.readexactly(size + 2))[:-2]
                await reader.readline()
            elif "content-length" in self.headers:
                yield await reader.readexactly(int(self.headers["content-length"]))
            else:
                while piece := await reader.read(1 << 16):
                    yield piece
        except (asyncio.IncompleteReadError, ValueError, OSError) as error:
            raise HttpError(f"the answer broke off: {error!r}") from None

    async def body(self) -> bytes:
        """All of the body."""
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> AsyncIterator[bytes]:
        """The data of server-sent events, `[DONE]` included."""
        rest = b""
        async for piece in self.pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()


@contextlib.asynccontextmanager
async def request(
    address: Address,
    method: str,
    path: str,
    payload: Any = None,
    *,
    raw: bytes | None = None,
    limit: int = 1 << 20,
    receive_buffer: int | None = None,
) -> AsyncIterator[Response]:
    """Sends a request and gives the answer's head; leaving the block closes the connection.

    payload: sent as JSON; raw: sent as it is, instead. limit: bytes read ahead. receive_buffer: bytes
    that the system may hold for it. HttpError, OSError.
    """
    body = raw if raw is not None else b"" if payload is None else json.dumps(payload).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: {address.host}:{address.port}", "Connection: close"]
    if body or method == "POST":
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    if address.key:
        lines.append(f"Authorization: Bearer {address.key}")
    connection = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.setblocking(False)
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader(limit)
    transport: asyncio.BaseTransport | None = None
    try:
        await loop.sock_connect(connection, (address.host, address.port))
        await loop.sock_sendall(connection, "\r\n".join([*lines, "", ""]).encode() + body)
        first = await loop.sock_recv(connection, 1 << 16)
        reader.feed_data(first)
        if not first or _is_whole(first):
            reader.feed_eof()  # no more is wanted: a short answer does without asyncio's transport
        else:
            protocol = asyncio.StreamReaderProtocol(reader)
            transport, _ = await loop.create_connection(lambda: protocol, sock=connection)
        try:
            status = int((await reader.readline()).split()[1])
            headers = {}
            while line := (await reader.readline()).decode("latin-1").strip():
                name, _, value = line.partition(":")
                headers[name.strip().lower()] = value.strip()
        except (IndexError, ValueError, asyncio.IncompleteReadError) as error:
            raise HttpError(f"no answer: {error!r}") from None
        yield Response(status, headers, reader)
    finally:
        if isinstance(transport, asyncio.Transport):
            transport.abort()
        else:
            connection.close()


def _is_whole(answer: bytes) -> bool:
    """Whether an answer that tells its length is there to its end."""
    head, found, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *(\d+)\r\n", head + b"\r\n", re.IGNORECASE)
    return bool(found) and length is not None and len(body) >= int(length[1])


def payload_of(address: Address, ask: Ask, extra: dict[str, Any]) -> dict[str, Any]:
    """A request as JSON: greedy, streamed, as long as asked for whatever the model says."""
    return {
        "model": address.model,
        "prompt": list(ask.prompt),
        "max_tokens": ask.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }


async def complete(
    address: Address,
    ask: Ask,
    begin: float | None = None,
    extra: dict[str, Any] | None = None,
    watch: Callable[[Outcome], bool] | None = None,
    *,
    raw: bytes | None = None,
) -> Outcome:
    """One streamed completion. It does not raise: what went wrong is in the outcome.

    begin: when it was due, now if None. extra: more fields of the request. watch: called after each piece of
    text; the connection is closed when it says False. raw: the request's JSON, where it is there already.
    """
    loop = asyncio.get_running_loop()
    outcome = Outcome(ask, loop.time() if begin is None else begin)
    pieces: list[str] = []
    try:
        async with request(
            address,
            "POST",
            "/v1/completions",
            None if raw is not None else payload_of(address, ask, extra or {}),
            raw=raw,
        ) as response:
            outcome.status = response.status
            if response.status != 200:
                text = (await response.body()).decode("utf-8", "replace")
                outcome.retry_after = response.headers.get("retry-after", "")
                outcome.error = f"HTTP {response.status}: {text[:200]}"
                return outcome
            done = False
            async for data in response.events():
                if data == b"[DONE]":
                    done = True
                    break
                event = json.loads(data)
                if "error" in event:
                    outcome.error = f"in the stream: {str(event['error'])[:200]}"
                    return outcome
                for choice in event["choices"]:
                    if choice["text"]:
                        outcome.arrivals.append(loop.time())
                        pieces.append(choice["text"])
                    outcome.finish = choice.get("finish_reason") or outcome.finish
                if usage := event.get("usage"):
                    outcome.tokens = usage["completion_tokens"]
                    outcome.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                if watch is not None and not watch(outcome):
                    outcome.error = "left"
                    return outcome
            if not done:
                outcome.error = "the stream ended without [DONE]"
    except (HttpError, OSError, KeyError, TypeError, ValueError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    finally:
        outcome.text = "".join(pieces)
        if outcome.arrivals:
            outcome.first, outcome.end = outcome.arrivals[0], outcome.arrivals[-1]
            outcome.tokens = outcome.tokens or len(outcome.arrivals)
        elif not outcome.error:
            outcome.error = "no text came"
    return outcome


@dataclass
class Run:
    """All outcomes of a load, and the span in which it was steady."""

    outcomes: list[Outcome]
    start: float
    """The load's first moment that counts."""
    stop: float
    """Its last."""
    seconds: float
    """From the first request to the last answer."""
    cpu_seconds: float
    """Processor time of this process meanwhile."""
    unsent: int = 0
    """Requests that the time limit left unsent."""


async def closed_loop(
    address: Address,
    asks: Sequence[Ask],
    users: int,
    *,
    extra: dict[str, Any] | None = None,
    limit_s: float = 600.0,
) -> Run:
    """`users` users, each of whom sends the next request when the last was answered.

    What counts begins when `users` requests have ended, so that users are out of step, and ends when the
    last request was sent, up to when all users were busy. limit_s: no request is sent later than that;
    those under way are ended with an error at twice the time.
    """
    loop = asyncio.get_running_loop()
    queue: Iterator[Ask] = iter(asks)
    outcomes: list[Outcome] = []
    began, cpu = loop.time(), time.process_time()
    warm = stop = began
    sent = 0

    async def user() -> None:
        nonlocal warm, stop, sent
        while loop.time() - began < limit_s and (ask := next(queue, None)) is not None:
            sent += 1
            stop = loop.time()
            outcome = await _bounded(complete(address, ask, extra=extra), ask, began + 2 * limit_s)
            outcomes.append(outcome)
            if len(outcomes) == users:
                warm = loop.time()

    with patient():
        await asyncio.gather(*(user() for _ in range(users)))
    ended = loop.time()
    if sent < len(asks):
        stop = min(began + limit_s, ended)
    return Run(outcomes, warm, stop, ended - began, time.process_time() - cpu, len(asks) - sent)


async def open_loop(
    address: Address,
    asks: Sequence[Ask],
    rate: float,
    seed: int,
    *,
    warm_s: float = 0.0,
    extra: dict[str, Any] | None = None,
    limit_s: float = 600.0,
) -> Run:
    """Requests that come whether or not the server keeps up: a Poisson process of `rate` per second.

    What counts begins after a tenth of the arrivals, or warm_s seconds if that is later, and ends with the
    last arrival. A request's times are from when it was due.
    """
    loop = asyncio.get_running_loop()
    bodies = [json.dumps(payload_of(address, ask, extra or {})).encode() for ask in asks]
    draw = random.Random(seed)
    began, cpu = loop.time(), time.process_time()
    due = began
    tasks, times = [], []
    with patient():
        for ask, body in zip(asks, bodies, strict=True):
            due += draw.expovariate(rate)
            times.append(due)
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            work = _bounded(complete(address, ask, begin=due, raw=body), ask, due + limit_s)
            tasks.append(asyncio.create_task(work))
        outcomes = await asyncio.gather(*tasks)
    warm = max(times[len(times) // 10], began + warm_s)
    return Run(list(outcomes), warm, times[-1], loop.time() - began, time.process_time() - cpu)


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """This thread waits for its turn on a processor, where that is how the system does it otherwise."""
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


async def _bounded(work: Any, ask: Ask, end: float) -> Outcome:
    loop = asyncio.get_running_loop()
    begin = loop.time()
    try:
        async with asyncio.timeout_at(end):  # no task beside the one that runs
            return await work  # type: ignore[no-any-return]
    except TimeoutError:
        return Outcome(ask, begin, end=loop.time(), error="no end within the time limit")


def figures(run: Run) -> dict[str, Any]:
    """What a load shows: rates per second, times in milliseconds, over the span that counts.

    output_tokens_per_s counts the tokens that came in the span; a request's tokens are spread evenly over
    its pieces of text. ttft: of requests due in the span; tpot (a request's mean) and requests_per_s: of
    those that ended in it; gap: between two pieces of text that came in it. A figure that nothing was seen
    of is None. ValueError if the load was never steady.
    """
    span = run.stop - run.start
    if span <= 0:
        raise ValueError("the load was never steady: more requests for each user are wanted")
    good = [one for one in run.outcomes if not one.error]
    tokens = sum(
        one.tokens / len(one.arrivals) * sum(run.start <= at <= run.stop for at in one.arrivals)
        for one in good
    )
    ended = [one for one in good if run.start <= one.end <= run.stop]
    ttft = [one.ttft for one in good if run.start <= one.begin <= run.stop]
    gaps = [
        after - before
        for one in good
        for before, after in zip(one.arrivals, one.arrivals[1:], strict=False)
        if run.start <= after <= run.stop
    ]
    tpot = [one.tpot for one in ended if one.tokens > 1]
    errors: dict[str, int] = {}
    for one in run.outcomes:
        if one.error:
            errors[one.error[:120]] = errors.get(one.error[:120], 0) + 1
    return {
        "requests_per_s": len(ended) / span,
        "output_tokens_per_s": tokens / span,
        "ttft_ms_p50": _percentile(ttft, 50),
        "ttft_ms_p99": _percentile(ttft, 99),
        "tpot_ms_p50": _percentile(tpot, 50),
        "tpot_ms_p99": _percentile(tpot, 99),
        "gap_ms_p99": _percentile(gaps, 99),
        "requests": len(run.outcomes),
        "counted": len(ended),
        "short": sum(one.tokens < one.ask.tokens for one in good),
        "failed": len(run.outcomes) - len(good),
        "unsent": run.unsent,
        "errors": errors,
        "span_s": span,
        "seconds": run.seconds,
        "generator_cpu_share": run.cpu_seconds / run.seconds,
    }


def _percentile(values: Sequence[float], which: float) -> float | None:
    """In milliseconds, from seconds."""
    return float(np.percentile(values, which)) * 1000 if values else None
