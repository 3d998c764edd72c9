"""A running server: listens, loads the model, watches the engine, and ends as it should."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import resource
import select
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gristmill.engine.engine import Engine
from gristmill.engine.request import QueueFull
from gristmill.errors import GristmillError, UsageError
from gristmill.serve import logs
from gristmill.serve.app import Server, make_app
from gristmill.serve.guard import Guard
from gristmill.serve.limits import LIMITS
from gristmill.serve.settings import Settings
from gristmill.serve.tools import shows_reasoning
from gristmill.serve.worker import HelperPool

__all__ = ["run"]

_WATCH_SECONDS = 0.5
_STATS_SECONDS = 10.0
_SPARE_FILES = 512
"""Open files beside the connections: weights, KV memory, helpers."""
_SPARE_CONNECTIONS = 64
"""Beyond the limit, so that some can be told 503; others are closed unread."""
_FIRST_BYTES = 1 << 16
"""Of a connection, looked at before it is accepted."""
_GATHER_SECONDS = 0.1
"""While there is no room: how long requests gather that are turned away together."""
_REFUSED_AT_ONCE = 64
"""Before the event loop sees to other things."""
_IGNORED_BYTES = 1 << 20
"""Of a body that is read on after its answer was sent."""


def run(model: str, settings: Settings, announce: Callable[[str], None]) -> int:
    """Serves a model until a signal or a failure ends it: the exit status.

    announce: gets the address once the server listens. GristmillError if it cannot listen, or the model
    cannot be loaded.
    """
    logs.set_up(settings.log_format, settings.log_level)
    # The engine's thread must not wait long for an event loop that has much to say.
    sys.setswitchinterval(0.0005)
    _allow_files(settings.max_connections + _SPARE_FILES)
    listener = _listen(settings)
    with listener:
        return asyncio.run(_Run(model, settings, listener, announce).main())


class _Listener(socket.socket):
    """A listening socket that turns requests away itself while there is no room for them.

    Under overload that is most of what a server does: a connection of asyncio's alone costs several times
    what reading, refusing and closing costs here. Once one was turned away, the event loop hears of the next
    ones after a while, of all at once: every time it wakes, it takes a processor from a step and finds its
    caches cold.
    """

    guard: Guard | None = None
    """What answers; without one, nothing is turned away."""
    full: Callable[[int], QueueFull | None]
    """Why there is no room for one more than so many that were let in just now."""
    _news: select.epoll | None = None
    """What the event loop watches in this socket's place, where the system has it."""
    _let_in = 0
    """Connections that found room and may not be in the queue yet."""
    _let_in_since = 0.0
    _no_room = 0
    """Connections that found none since the event loop began to accept."""

    def turn_away(self, guard: Guard, full: Callable[[int], QueueFull | None]) -> None:
        """Begins to turn requests away. To be called before an event loop watches."""
        self.guard, self.full = guard, full
        if hasattr(select, "epoll"):
            self._news = select.epoll()
            self._watch()

    def fileno(self) -> int:
        """What becomes readable when there is a connection to accept."""
        return super().fileno() if self._news is None or self._news.closed else self._news.fileno()

    def close(self) -> None:
        """Listens no more."""
        if self._news is not None:
            self._news.close()
        super().close()

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection that is not turned away. BlockingIOError for none now."""
        while self._no_room < _REFUSED_AT_ONCE:
            try:
                connection, address = super().accept()
            except BlockingIOError:
                if self._no_room and self._news is not None:
                    self._news.unregister(super().fileno())
                    asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._watch)
                self._let_in = self._no_room = 0
                raise
            if not self._turns_away(connection, address):
                return connection, address
        # Under a flood there may be no end of them.
        if time.monotonic() - self._let_in_since > _GATHER_SECONDS:
            self._let_in = 0
        self._no_room = 0
        raise BlockingIOError(errno.EAGAIN, "others have their turn first")

    def _turns_away(self, connection: socket.socket, address: Any) -> bool:
        if self.guard is None:
            return False
        connection.setblocking(False)
        try:
            data = connection.recv(_FIRST_BYTES, socket.MSG_PEEK)
        except OSError:  # nothing has come yet, or the client has gone
            return False
        if not self.guard.asks_for_completion(data):
            return False
        reason = self.full(self._let_in)
        if reason is None:
            self._let_in += 1
            self._let_in_since = time.monotonic()
            return False
        self._no_room += 1
        answer = self.guard.refusal(data, reason, address) if len(data) < _FIRST_BYTES else None
        if answer is None:
            return False
        with connection, suppress(OSError):
            connection.recv(_FIRST_BYTES)  # closing with bytes unread would cut the answer off
            connection.send(answer)
        return True

    def _watch(self) -> None:
        if self._news is not None and not self._news.closed:
            self._news.register(super().fileno(), select.EPOLLIN)


def _listen(settings: Settings) -> _Listener:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol named, asyncio sends without waiting for more (TCP_NODELAY).
    listener = _Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_DEFER_ACCEPT"):
        # Connections are shown with their first bytes, or after a second without any.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise GristmillError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}"
        ) from None
    listener.setblocking(False)
    return listener


def _allow_files(wanted: int) -> None:
    """Raises this process's limit on open files as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Http(uvicorn.Server):
    """uvicorn, without its own idea of signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Connection(H11Protocol):
    """HTTP/1.1 whose clients must send headers, and read answers, in time.

    header_seconds, write_seconds, most: set by `_protocol`.
    """

    header_seconds: float
    write_seconds: float
    most: int
    _timer: asyncio.TimerHandle | None = None
    _ignored = 0
    """Bytes that came for a request that has its answer."""
    _unread = 0
    _unread_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._timer = self.loop.call_later(self.header_seconds, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None:
            self.cycle.scope.setdefault("abort", self.transport.abort)  # type: ignore[typeddict-item]
        if not self._unanswered:
            self._ignored += len(data)
            if self.conn.their_state is not h11.SEND_BODY:
                self._ignored = 0
            elif self._ignored > _IGNORED_BYTES:
                self.transport.abort()
        if self._unanswered:
            self._forget()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.header_seconds, self._too_slow)

    def expire(self, now: float) -> None:
        """Cuts off a client that reads nothing of what waits for it."""
        unread = self.transport.get_write_buffer_size()
        if unread and unread == self._unread:
            if now - self._unread_since > self.write_seconds:
                self.transport.abort()
        else:
            self._unread, self._unread_since = unread, now

    @property
    def _unanswered(self) -> bool:
        """Whether a request has come and waits for the rest of its answer."""
        return self.cycle is not None and not self.cycle.response_complete

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if not self._unanswered:
            self.transport.close()


def _protocol(settings: Settings) -> type[_Connection]:
    """The class of this server's connections."""

    class Connection(_Connection):
        header_seconds = settings.header_timeout
        write_seconds = settings.write_timeout
        most = settings.max_connections + _SPARE_CONNECTIONS

    return Connection


class _Helpers:
    """Helpers for texts, and one for constraints, which may be slow."""

    def __init__(self, texts: HelperPool, constraints: HelperPool) -> None:
        self._texts = texts
        self._constraints = constraints
        self.render = texts.render
        self.tokenize = texts.tokenize
        self.check_constraint = constraints.check_constraint

    async def start(self) -> None:
        await asyncio.gather(self._texts.start(), self._constraints.start())

    async def close(self) -> None:
        await asyncio.gather(self._texts.close(), self._constraints.close())


class _Run:
    def __init__(
        self, model: str, settings: Settings, listener: _Listener, announce: Callable[[str], None]
    ) -> None:
        self._model_name = model
        self._settings = settings
        self._listener = listener
        self._announce = announce
        self._server = Server(settings, settings.served_model_name or _name_of(model))
        self._code = 0
        self._signals = 0
        self._stopping = asyncio.Event()
        self._engine: Engine | None = None
        self._model: Any = None
        self._warming: asyncio.Task[None] | None = None
        self._http: _Http | None = None

    async def main(self) -> int:
        from gristmill.serve.page_files import page

        settings = self._settings
        files, paths = page()
        guard = make_app(self._server, files, paths)
        config = uvicorn.Config(
            cast(Any, guard),
            http=_protocol(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=True,
            timeout_keep_alive=int(max(1, settings.keep_alive_timeout)),
            limit_concurrency=settings.max_connections,
            h11_max_incomplete_event_size=LIMITS["header_bytes"],
            timeout_graceful_shutdown=int(max(5, settings.write_timeout)),
            ssl_keyfile=settings.ssl_keyfile,
            ssl_certfile=settings.ssl_certfile,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise GristmillError(f"cannot use the TLS certificate or key: {error}") from None
        self._http = http = _Http(config)
        if settings.ssl_certfile is None:
            self._listener.turn_away(guard, self._server.full)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal, number)
        serving = asyncio.create_task(http.serve(sockets=[self._listener]))
        host, port = self._listener.getsockname()[:2]
        scheme = "https" if settings.ssl_certfile else "http"
        self._announce(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")
        watching = asyncio.create_task(self._watch())
        try:
            try:
                await self._load()
            except GristmillError as error:
                self._server.failed = str(error)
                raise
            stopping = asyncio.create_task(self._stopping.wait())
            await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            if not self._stopping.is_set():  # nobody asked for it
                logs.event("the HTTP server has ended", logging.ERROR)
                self._code = 1
            await self._drain()
            return self._code
        finally:
            watching.cancel()
            http.should_exit = True
            with suppress(Exception):
                await serving
            gc.unfreeze()
            await asyncio.to_thread(self._close)
            if self._server.texts is not None:
                await self._server.texts.close()  # type: ignore[attr-defined]

    async def _load(self) -> None:
        """Loads the model beside the event loop."""
        from gristmill.api import load
        from gristmill.serve.constraints import Constraints

        settings, server = self._settings, self._server
        began = time.perf_counter()

        def work() -> tuple[Any, Engine]:
            model = load(
                self._model_name,
                weights=settings.weights,
                activations=settings.activations,
                kv_dtype=settings.kv_dtype,
                threads=settings.threads,
                context=settings.context,
            )
            engine = Engine(
                model,
                max_sequences=min(settings.max_num_seqs, settings.max_num_batched_tokens - 16),
                max_step_tokens=settings.max_num_batched_tokens,
                prompt_tokens=settings.max_prompt_tokens,
                max_waiting=settings.max_queue,
                kv_bytes=None if settings.kv_memory is None else settings.kv_memory << 20,
                kv_placement=settings.kv_placement,
                prefix_cache=settings.prefix_caching,
            )
            return model, engine

        self._model, self._engine = model, engine = await asyncio.to_thread(work)
        server.texts = helpers = _Helpers(
            # One more: long texts leave one free.
            HelperPool(model.path, model.executor.vocab_size, settings.helpers + 1),
            HelperPool(model.path, model.executor.vocab_size, 1),
        )
        await helpers.start()
        server.tokenizer = model.tokenizer
        server.defaults = model.defaults
        server.vocab_size = model.executor.vocab_size
        server.longest_token = max(
            len(model.tokenizer.token_bytes(i)) for i in range(model.tokenizer.vocab_size)
        )
        template = model.chat_template
        server.chat = template is not None
        server.reasoning = (
            settings.reasoning_parser == "think"
            and template is not None
            and shows_reasoning(template.source, model.tokenizer)
        )
        constraints = Constraints(model.tokenizer, model.executor.vocab_size)
        server.constraint = constraints.factory
        self._warming = asyncio.create_task(asyncio.to_thread(constraints.warm))
        server.engine = engine
        # What is there now stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        kv = engine.status().kv
        logs.event(
            "ready",
            model=server.name,
            seconds=round(time.perf_counter() - began, 3),
            weights=model.weights,
            activations=model.activations,
            kv=model.kv_dtype,
            kv_mib=kv["limit"] >> 20,
            kv_memory=model.executor.kv_pool.backing,
            context=engine.context,
            threads=model.executor.threads,
        )

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()
        if self._model is not None:
            self._model.close()

    def _signal(self, number: int) -> None:
        self._signals += 1
        if self._signals > 1:
            os._exit(128 + number)
        self._code = 0 if number == signal.SIGTERM else 130
        logs.event("stopping", signal=signal.Signals(number).name)
        self._server.draining = True
        if self._engine is not None:
            self._engine.drain()
        self._stopping.set()
        if self._server.engine is None:
            os._exit(self._code)  # still loading: nobody waits for anything

    async def _drain(self) -> None:
        """Lets what runs finish, for a while."""
        if self._engine is None or self._code == 1:
            return
        try:
            async with asyncio.timeout(self._settings.drain_timeout):
                await self._engine.idle()
        except TimeoutError:
            left = self._engine.status()
            logs.event("requests are cut off", logging.WARNING, running=left.running, waiting=left.waiting)
            await asyncio.to_thread(self._engine.close)  # their clients are told

    async def _watch(self) -> None:
        """Ends the server if the engine stays dead; tells now and then what it does."""
        dead_since: float | None = None
        told, last = time.monotonic(), {"prompt_tokens": 0, "generation_tokens": 0}
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            now = time.monotonic()
            self._server.expire(now)
            if self._http is not None:
                for connection in list(self._http.server_state.connections):
                    cast(_Connection, connection).expire(now)
            if self._engine is None:
                continue
            try:
                status = self._engine.status()
            except Exception:
                logs.logger.exception("the engine's status cannot be told")
                continue
            if status.alive:
                dead_since = None
            elif dead_since is None:
                dead_since = now
                logs.event("the engine gives no sign of life", logging.ERROR)
            ended = not self._engine.running
            if dead_since is not None and (ended or now - dead_since > self._settings.engine_timeout):
                logs.event("the engine has failed: the server ends", logging.ERROR)
                if not ended:
                    os._exit(1)  # its thread will not come back
                await asyncio.sleep(1)  # clients get their errors
                self._code = 1
                self._stopping.set()
                return
            if now - told >= _STATS_SECONDS:
                counts = {name: status.counters.get(name, 0) for name in last}
                if status.running or counts != last:
                    logs.event(
                        "busy",
                        running=status.running,
                        waiting=status.waiting,
                        prompt_tok_s=round(
                            (counts["prompt_tokens"] - last["prompt_tokens"]) / (now - told), 1
                        ),
                        tok_s=round(
                            (counts["generation_tokens"] - last["generation_tokens"]) / (now - told), 1
                        ),
                        kv=f"{status.kv_used:.0%}",
                        prefix_hits=status.counters.get("prefix_hits", 0),
                    )
                told, last = now, counts


def _name_of(model: str) -> str:
    """A model's name in the API: of one that is on this machine, without where it is."""
    path = Path(model)
    return path.stem if path.is_file() else path.resolve().name if path.is_dir() else model


def check_model(model: object) -> str:
    """The model to serve. UsageError without one."""
    if not isinstance(model, str) or not model:
        raise UsageError("name a model to serve, as an argument or under `model` in the configuration file")
    return str(Path(model)) if Path(model).exists() else model
