"""The server around an engine that does what a test says: no model, no waiting, every fault at will."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gristmill.engine.request import ContextLengthExceeded, EngineDead, Output, QueueFull, Request, Status
from gristmill.engine.result import Result, Timings, TokenLogprob
from gristmill.serve import server as real
from gristmill.serve.settings import Settings
from gristmill.serve.worker import Rendered

CONTEXT = 1000

Step = str | float | Exception
"""A piece of text, with a token for each of its first 64 characters; seconds to wait; an error to raise."""
HANG = float("inf")


class Stream:
    """The answer to one request: every continuation says the same."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self.request = request
        self.closed = False
        self._news = self._play()

    async def _play(self) -> Any:
        request = self.request
        said = [0] * request.n
        reason: Any = "stop"
        prompt = request.prompt_logprobs
        scores = None if prompt is None else [None, *(TokenLogprob(t, -2.0) for t in request.prompt[1:])]
        for step in self._engine.script:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                await self._wait(step)
                continue
            for index in range(request.n):
                ids = [ord(one) for one in step[:64]]
                said[index] += len(ids)
                logprobs = None
                if request.params.logprobs is not None:
                    logprobs = [TokenLogprob(token, -0.5, ((token, -0.5),)) for token in ids]
                yield Output(index, step, ids, logprobs, scores if index == 0 else None)
            scores = None
        for index in range(request.n):
            result = Result("", [], reason, len(request.prompt), said[index], Timings(), cached_tokens=2)
            rest = scores if index == 0 else None
            yield Output(index, "", [], prompt_logprobs=rest, finish_reason=reason, result=result)
        self._engine.streams.remove(self)

    async def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not self._engine.running:
                raise EngineDead("the engine is closed")
            await asyncio.sleep(min(left, 0.02))

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Output:
        output: Output = await anext(self._news)
        return output

    async def aclose(self) -> None:
        """Notes that the request was given up."""
        self.closed = True
        if self in self._engine.streams:
            self._engine.streams.remove(self)
        await self._news.aclose()


class Engine:
    """In place of `gristmill.engine.engine.Engine`."""

    def __init__(self, script: Sequence[Step] = ("hello",)) -> None:
        self.script = list(script)
        self.context = CONTEXT
        self.full = False
        self.room = 1000
        """For requests that come at one moment."""
        self.refusals: list[Exception | None] = []
        """What the next requests are refused with."""
        self.asked: list[Stream] = []
        self.streams: list[Stream] = []
        """Those that have not ended."""
        self.alive = True
        self.running = True
        self.draining = False
        self.counters: Counter[str] = Counter()

    def check_room(self, coming: int = 0) -> None:
        if self.full or coming >= self.room:
            raise QueueFull("requests are waiting", 3.4)

    def stream(self, request: Request) -> Stream:
        refusal = self.refusals.pop(0) if self.refusals else None
        if refusal is not None:
            raise refusal
        if len(request.prompt) > CONTEXT:
            raise ContextLengthExceeded(len(request.prompt), CONTEXT)
        made = Stream(self, request)
        self.asked.append(made)
        self.streams.append(made)
        return made

    def status(self) -> Status:
        return Status(
            alive=self.alive,
            ready=self.alive and not self.draining,
            draining=self.draining,
            running=len(self.streams),
            waiting=0,
            waiting_tokens=0,
            max_sequences=4,
            context=CONTEXT,
            kv_used=0.0,
            counters=dict(self.counters),
        )

    def drain(self) -> None:
        self.draining = True

    async def idle(self) -> None:
        while self.streams:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        self.running = False


class Texts:
    """In place of the helper processes: one token per character."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """That everything takes."""
        self.cancelled = 0
        self.in_reasoning = False
        """Whether the template opens the reasoning."""

    async def _work(self) -> None:
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def render(self, messages: Any, *, tools: Any = None, variables: Any = None) -> Rendered:
        await self._work()
        return Rendered([ord(one) for one in str(messages[-1]["content"])], self.in_reasoning)

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        await self._work()
        return [ord(one) for one in text]

    async def check_constraint(self, spec: Any) -> None:
        await self._work()

    async def close(self) -> None:
        pass


class Tokenizer:
    """One token per character."""

    special_ids: frozenset[int] = frozenset()
    eos_token_ids = frozenset({0})

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return "".join(map(chr, ids))

    def role_token(self, role: str) -> str | None:
        return None


class Run(real._Run):
    """A server whose model is there at once."""

    def __init__(self, engine: Engine, texts: Texts, settings: Settings) -> None:
        self.url = ""
        listener = real._listen(settings)
        super().__init__("scripted", settings, listener, self._told)
        self.listener = listener
        self.engine = engine
        self.server = self._server
        self._scripted_texts = texts

    def _told(self, address: str) -> None:
        self.url = address

    async def _load(self) -> None:
        self._engine = self.engine  # type: ignore[assignment]
        server = self._server
        server.engine, server.texts, server.tokenizer = self.engine, self._scripted_texts, Tokenizer()
        server.vocab_size, server.chat = 0x10000, True
        server.constraint = lambda spec: lambda: None  # type: ignore[assignment,return-value]


def serve(
    test: Callable[[Run], None], engine: Engine | None = None, texts: Texts | None = None, **settings: Any
) -> int:
    """Runs a test, in a thread, against a server that listens; then stops the server: its exit status."""
    run = Run(engine or Engine(), texts or Texts(), Settings(port=0, **settings))

    async def main() -> int:
        serving = asyncio.create_task(run.main())
        while run.server.engine is None and not serving.done():
            await asyncio.sleep(0.005)
        try:
            if not serving.done():
                await asyncio.to_thread(test, run)
        finally:
            if not serving.done() and not run._signals:
                run._signal(real.signal.SIGTERM)
        return await serving

    with run.listener:
        return asyncio.run(main())
