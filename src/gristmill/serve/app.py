"""The routes."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gristmill.engine.request import (
    Constraint,
    ContextLengthExceeded,
    Output,
    QueueFull,
    Request,
    RequestFailed,
    Status,
)
from gristmill.engine.sampling import SamplingParams
from gristmill.serve import logs
from gristmill.serve.answers import Chat, Completion
from gristmill.serve.errors import ApiError, translate
from gristmill.serve.guard import Guard, read_body, send_error, send_json
from gristmill.serve.limits import LIMITS
from gristmill.serve.metrics import Metrics
from gristmill.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    count_of,
    read,
    sampling_of,
)
from gristmill.serve.settings import Settings
from gristmill.serve.strict_json import parse_object
from gristmill.version import __version__

if TYPE_CHECKING:
    from gristmill.serve.constraints import ConstraintSpec, Watched
    from gristmill.serve.worker import Rendered

__all__ = ["ServedEngine", "Server", "make_app"]

BIG_BODY = 1 << 16
"""Bodies above this are parsed beside the event loop."""
BIG_LIST = 1 << 14
"""Lists of tokens above this are looked at beside the event loop."""


class ServedTokenizer(Protocol):
    """What the routes need of a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes: ...

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str: ...

    def role_token(self, role: str) -> str | None: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...


class ServedEngine(Protocol):
    """What the routes need of an engine."""

    @property
    def context(self) -> int: ...

    @property
    def alive(self) -> bool: ...

    def check_room(self, coming: int = 0) -> object: ...

    def stream(self, request: Request) -> AsyncIterator[Output]: ...

    def status(self) -> Status: ...


class Texts(Protocol):
    """Work on texts that happens in helper processes."""

    async def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
    ) -> Rendered: ...

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]: ...

    async def check_constraint(self, spec: ConstraintSpec) -> None: ...


@dataclass
class Server:
    """What a running server consists of; the engine comes when the model is loaded."""

    settings: Settings
    name: str
    """Of the model, in the API."""
    engine: ServedEngine | None = None
    tokenizer: ServedTokenizer | None = None
    texts: Texts | None = None
    defaults: SamplingParams = SamplingParams()  # noqa: RUF009 - frozen
    vocab_size: int = 0
    longest_token: int = 1 << 20
    """Bytes of the longest token."""
    chat: bool = False
    """Whether the model has a chat template."""
    reasoning: bool = False
    """Whether reasoning is told apart from the answer, see `shows_reasoning`."""
    constraint: Callable[[ConstraintSpec], Callable[[], Constraint]] | None = None
    draining: bool = False
    failed: str | None = None
    """Why loading failed."""

    def __post_init__(self) -> None:
        self.created = int(time.time())
        self.fingerprint = f"gristmill-{__version__}"
        self.metrics = Metrics(self.name, self.status)
        self.unknown_seen: set[str] = set()
        self.writing: dict[asyncio.Task[Any], float] = {}
        """The streams that wait for their clients to take a piece, and since when by `time.monotonic`."""

    def expire(self, now: float) -> None:
        """Ends streams whose clients take too little. To be called now and then: no piece needs a timer."""
        for task, since in list(self.writing.items()):
            # The connection itself is cut before, where nothing at all is read.
            if now - since > self.settings.write_timeout + 2:
                self.writing[task] = math.inf
                task.cancel()

    def full(self, coming: int) -> QueueFull | None:
        """Why the engine takes no more requests for now. coming: those that are as good as in its queue."""
        if self.engine is not None and not self.draining and self.engine.alive:
            try:
                self.engine.check_room(coming)
            except QueueFull as error:
                return error
        return None

    def status(self) -> Status | None:
        """The engine's, None while there is none."""
        return None if self.engine is None else self.engine.status()

    def ready_engine(self) -> ServedEngine:
        """The engine. ApiError 503 while there is none, or it takes no requests."""
        if self.engine is None or self.draining:
            what = "shutting down" if self.draining else self.failed or "loading the model"
            raise ApiError(503, f"the server is {what}", code="unavailable", headers={"retry-after": "5"})
        if not self.engine.alive:
            raise ApiError(503, "the engine has failed", code="unavailable", headers={"retry-after": "5"})
        return self.engine


def make_app(server: Server, page: ASGIApp | None = None, page_paths: Sequence[str] = ()) -> Guard:
    """The application. page: serves `page_paths`."""
    handlers = _Handlers(server)
    routes: list[BaseRoute] = [
        _route("/health", handlers.health, "GET"),
        _route("/ready", handlers.ready, "GET"),
        _route("/metrics", handlers.metrics, "GET"),
        _route("/version", handlers.version, "GET"),
        _route("/openapi.json", handlers.openapi, "GET"),
        _route("/v1/models", handlers.models, "GET"),
        _route("/v1/models/{id:path}", handlers.model, "GET"),
        _route("/models", handlers.models, "GET"),
        _route("/tokenizer_info", handlers.tokenizer_info, "GET"),
        _route("/tokenize", handlers.tokenize, "POST"),
        _route("/detokenize", handlers.detokenize, "POST"),
        _route("/v1/chat/completions", handlers.chat, "POST"),
        _route("/v1/completions", handlers.completions, "POST"),
    ]
    for path, what in _REFUSED.items():
        routes.append(_route(path, handlers.refuse(what), "POST"))
    paths = frozenset(route.path for route in routes if isinstance(route, Route))
    if page is not None:
        # Each file by its path: a mount would hide that other paths exist, but with another method.
        routes += [Route(path, _Endpoint(page), methods=["GET"]) for path in page_paths]

    async def not_found(request: Any, error: Exception) -> Any:
        status = error.status_code if isinstance(error, HTTPException) else 500
        message = {404: "there is no such route", 405: "the route does not take this method"}.get(
            status, "error"
        )
        headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
        return _Json(ApiError(status, message, headers=headers))

    inner = Starlette(routes=routes, exception_handlers={HTTPException: not_found})
    page_files = frozenset(page_paths)
    return Guard(
        inner,
        server.settings,
        lambda: server.metrics,
        lambda: paths | page_files,
        lambda path: path in page_files,
    )


_REFUSED = {
    "/v1/embeddings": "embeddings are not computed here: the model writes text",
    "/v1/responses": "the Responses API is not served: use /v1/chat/completions",
    "/v1/messages": "the Messages API is not served: use /v1/chat/completions",
    "/v1/images/generations": "images are not made here",
    "/v1/audio/transcriptions": "audio is not served here",
    "/v1/audio/speech": "audio is not served here",
    "/v1/moderations": "moderation is not served here",
    "/v1/rerank": "ranking is not served here",
    "/v1/load_lora_adapter": "adapters are given when the server starts",
}

Handler = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]


class _Json:
    """An ASGI answer that is an error."""

    def __init__(self, error: ApiError) -> None:
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_error(send, self._error)


class _Endpoint:
    """An ASGI application: a handler, and its errors as answers."""

    def __init__(self, handler: Handler | ASGIApp) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._handler(scope, receive, send)
        except Exception as error:
            known = translate(error)
            if known.status == 500 and known.code == "internal_error":
                raise
            if known.status == 499:  # nobody is there to be told
                raise known from None
            await send_error(send, known)


def _route(path: str, handler: Handler, method: str) -> Route:
    return Route(path, _Endpoint(handler), methods=[method])


async def _while_there(receive: Receive, work: Coroutine[Any, Any, Any], seconds: float | None = None) -> Any:
    """What the work gives, which ends when the client goes (ApiError 499) or time is over (408)."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ApiError(499, "the client has gone")
        raise ApiError(408, "the request took longer than it may", code="timeout")
    finally:
        for one in (task, gone):
            one.cancel()
            with suppress(BaseException):
                await one


async def _gone(receive: Receive) -> None:
    """Waits until the client closes the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _merged(streams: Sequence[AsyncIterator[Output]]) -> AsyncIterator[tuple[int, Output]]:
    """The news of all streams as they come, each with its stream's number."""
    if len(streams) == 1:
        async for output in streams[0]:
            yield 0, output
            await asyncio.sleep(0)  # others' turn, and that of a cancellation, however much there is
        return
    queue: asyncio.Queue[tuple[int, Output] | Exception | None] = asyncio.Queue(len(streams))

    async def pump(number: int, stream: AsyncIterator[Output]) -> None:
        try:
            async for output in stream:
                await queue.put((number, output))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Handlers:
    def __init__(self, server: Server) -> None:
        self._server = server

    # ---- about the server ----------------------------------------------------------------------------------

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whether process and engine live. Loading and draining are healthy."""
        status = self._server.status()
        good = self._server.failed is None and (status is None or status.alive)
        text = "ok" if good else self._server.failed or "the engine has failed"
        await send_json(send, {"status": text}, 200 if good else 503)

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whether requests are taken."""
        status = self._server.status()
        good = status is not None and status.ready and not self._server.draining
        what = "ready" if good else "draining" if self._server.draining else "loading"
        if not good and status is not None and not status.alive:
            what = "the engine has failed"
        await send_json(send, {"status": what}, 200 if good else 503)

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """For Prometheus."""
        body = self._server.metrics.text()
        kind = b"text/plain; version=0.0.4; charset=utf-8"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": body})

    async def version(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of gristmill."""
        await send_json(send, {"version": __version__})

    async def openapi(self, scope: Scope, receive: Receive, send: Send) -> None:
        """This API's description."""
        await send_json(send, openapi())

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The one model."""
        await send_json(send, {"object": "list", "data": [self._model()]})

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The model of a name."""
        self._check_name(scope["path_params"]["id"])
        await send_json(send, self._model())

    def _model(self) -> dict[str, Any]:
        server = self._server
        return {
            "id": server.name,
            "object": "model",
            "created": server.created,
            "owned_by": "gristmill",
            "root": server.name,
            "parent": None,
            "max_model_len": None if server.engine is None else server.engine.context,
            "limits": {
                **LIMITS,
                "body_bytes": int(server.settings.max_body_mb * 1e6),
                "queue": server.settings.max_queue,
                "request_seconds": server.settings.request_timeout,
            },
        }

    def refuse(self, what: str) -> Handler:
        """Answers a route that others have and we do not."""

        async def handler(scope: Scope, receive: Receive, send: Send) -> None:
            raise ApiError(404, what, code="unsupported_route")

        return handler

    # ---- tokens --------------------------------------------------------------------------------------------

    async def tokenizer_info(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What clients that score texts want to know of the tokenizer."""
        self._server.ready_engine()
        tokenizer = self._server.tokenizer
        assert tokenizer is not None

        ends = sorted(tokenizer.eos_token_ids)
        end = tokenizer.role_token("eos_token")
        if end is None and ends:
            end = tokenizer.token_bytes(ends[0]).decode(errors="replace")
        await send_json(
            send,
            {
                "tokenizer_class": type(tokenizer).__name__,
                "vocab_size": self._server.vocab_size,
                "eos_token": end,
                "eos_token_ids": ends,
                "bos_token": tokenizer.role_token("bos_token"),
                "pad_token": tokenizer.role_token("pad_token") or end,
                "model_max_length": self._server.ready_engine().context,
            },
        )

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Text or messages to token ids."""
        engine = self._server.ready_engine()
        request = await self._read(TokenizeRequest, receive)
        texts = self._server.texts
        assert texts is not None
        prompt = request.prompt if request.prompt is not None else request.content
        if (prompt is None) == (request.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if request.messages is not None:
            from gristmill.serve.tools import check_tools, for_template

            check_tools(request.tools, None)
            rendering = texts.render(
                for_template(request.messages), tools=request.tools, variables=request.chat_template_kwargs
            )
            ids = (await _while_there(receive, rendering, self._server.settings.request_timeout)).ids
        elif request.tools or request.chat_template_kwargs:
            raise ApiError(400, "tools and chat_template_kwargs go with messages", param="tools")
        else:
            asked = request.add_special_tokens if request.add_special is None else request.add_special
            tokenizing = texts.tokenize(prompt, add_special=True if asked is None else asked)
            ids = await _while_there(receive, tokenizing, self._server.settings.request_timeout)
        value: dict[str, Any] = {"count": len(ids), "max_model_len": engine.context, "tokens": ids}
        if request.return_token_strs:
            assert self._server.tokenizer is not None
            value["token_strs"] = [
                self._server.tokenizer.token_bytes(one).decode(errors="replace") for one in ids
            ]
        await send_json(send, value)

    async def detokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Token ids to text."""
        self._server.ready_engine()
        request = await self._read(DetokenizeRequest, receive)
        assert self._server.tokenizer is not None

        def work() -> str:
            self._check_ids(request.tokens, "tokens")
            assert self._server.tokenizer is not None
            return self._server.tokenizer.decode(request.tokens, skip_special=False)

        text = work() if len(request.tokens) < BIG_LIST else await asyncio.to_thread(work)
        await send_json(send, {"prompt": text, "content": text})

    # ---- completions ---------------------------------------------------------------------------------------

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions."""
        from gristmill.serve.tools import check_tools, constraint_for, for_template

        server = self._server
        _refuse_early(server.ready_engine(), scope)
        request = await self._read(ChatRequest, receive)
        began = time.monotonic()
        if not server.chat:
            raise ApiError(
                400, f"{server.name} has no chat template: use /v1/completions", code="no_chat_template"
            )
        assert server.texts is not None
        assert server.tokenizer is not None
        params = sampling_of(request, server.defaults, server.vocab_size)
        if params.max_tokens == 0:
            raise ApiError(400, "max_tokens must be 1 at least", param="max_tokens")
        count = count_of(request)
        tools, choice = request.tools or None, request.tool_choice
        if tools and server.settings.tool_parser == "none" and choice != "none":
            raise ApiError(400, "this server reads no tool calls (--tool-parser none)", param="tools")
        check_tools(tools, choice)
        spec = self._spec(request)
        called = constraint_for(tools, choice, request.parallel_tool_calls is not False) if tools else None
        if called is not None and spec is not None:
            raise ApiError(
                400, "response_format and a required tool call exclude each other", param="tool_choice"
            )
        spec = called or spec
        shown = None if choice == "none" else tools
        if request.truncate_prompt_tokens is None:
            self._check_length(_text_bytes(request.messages), "messages")
        rendering = server.texts.render(
            for_template(request.messages), tools=shown, variables=request.chat_template_kwargs
        )
        rendered: Rendered = await _while_there(receive, rendering, self._left(request, began))
        ids = rendered.ids
        if request.truncate_prompt_tokens is not None:
            ids = ids[-request.truncate_prompt_tokens :]
        answer = Chat(
            server.name,
            count,
            server.tokenizer,
            server.fingerprint,
            logprobs=bool(request.logprobs),
            tools=shown is not None,
            reasoning=server.reasoning and spec is None,
            starts_in_reasoning=rendered.in_reasoning,
        )
        await self._answer(
            (scope, receive, send),
            request,
            answer,
            prompts=[ids],
            params=params,
            count=count,
            spec=spec,
            began=began,
        )

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/completions."""
        server = self._server
        _refuse_early(server.ready_engine(), scope)
        request = await self._read(CompletionRequest, receive)
        began = time.monotonic()
        assert server.texts is not None
        assert server.tokenizer is not None
        given = request.prompt
        prompts: list[Any] = (
            given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        )
        if len(prompts) > LIMITS["prompts"]:
            raise ApiError(400, f"prompt may hold at most {LIMITS['prompts']} prompts", param="prompt")
        params = sampling_of(request, server.defaults, server.vocab_size)
        count = count_of(request, len(prompts))
        echo = bool(request.echo)
        if params.max_tokens == 0 and not echo:
            raise ApiError(400, "max_tokens 0 needs echo: true", param="max_tokens")
        special = True if request.add_special_tokens is None else request.add_special_tokens
        ids: list[list[int]] = []
        texts: list[str | None] = []
        """Of prompts that are echoed as they came."""
        cut = request.truncate_prompt_tokens
        for prompt in prompts:
            if isinstance(prompt, str):
                if cut is None:
                    self._check_length(len(prompt.encode()), "prompt")
                tokenizing = server.texts.tokenize(prompt, add_special=special)
                ids.append(await _while_there(receive, tokenizing, self._left(request, began)))
            else:
                ids.append(prompt if cut is None else prompt[-cut:])
                if len(ids[-1]) > server.ready_engine().context:
                    known = translate(ContextLengthExceeded(len(ids[-1]), server.ready_engine().context))
                    known.param = "prompt"
                    raise known
                self._check_ids(ids[-1], "prompt")
            if not ids[-1]:
                raise ApiError(400, "a prompt is empty", param="prompt")
            whole = isinstance(prompt, str) and (cut is None or len(ids[-1]) <= cut)
            texts.append(prompt if whole else None)
            if cut is not None:
                ids[-1] = ids[-1][-cut:]
        echoes = None
        if echo:
            echoes = []
            for text, one in zip(texts, ids, strict=True):
                shown = server.tokenizer.decode(one, skip_special=False) if text is None else text
                echoes += [(shown, one)] * count
        answer = Completion(
            server.name,
            len(prompts) * count,
            server.tokenizer,
            server.fingerprint,
            logprobs=request.logprobs is not None,
            echoes=echoes,
        )
        scores = request.logprobs if echo else None
        if params.max_tokens == 0 and scores is None:
            scores = 0
        spec = self._spec(request)
        await self._answer(
            (scope, receive, send),
            request,
            answer,
            prompts=ids,
            params=params,
            count=count,
            spec=spec,
            began=began,
            scores=scores,
            continues=True,
        )

    async def _answer(
        self,
        call: tuple[Scope, Receive, Send],
        request: Any,
        answer: Any,
        *,
        prompts: list[list[int]],
        params: SamplingParams,
        count: int,
        spec: ConstraintSpec | None,
        began: float,
        scores: int | None = None,
        continues: bool = False,
    ) -> None:
        """Runs the prompts and sends what they say."""
        scope, receive, send = call
        server = self._server
        engine = server.ready_engine()
        constraint: Watched | None = None
        if spec is not None:
            from gristmill.serve.constraints import Watched

            assert server.texts is not None
            assert server.tokenizer is not None
            await _while_there(receive, server.texts.check_constraint(spec), self._left(request, began))
            if server.constraint is None:
                raise ApiError(400, "constraints on the output are not available", param="response_format")
            make = await asyncio.to_thread(server.constraint, spec)
            ends = frozenset() if params.ignore_eos else server.tokenizer.eos_token_ids
            constraint = Watched(make, ends.union(params.stop_token_ids), params.min_tokens)
        answer.usage.prompt = sum(len(one) for one in prompts)
        streams: list[AsyncIterator[Output]] = []
        try:
            for i, ids in enumerate(prompts):
                # Log probabilities of a prompt belong to each of its choices.
                asked = Request(
                    ids,
                    params,
                    f"{scope['request_id']}-{answer.id}-{i}",
                    count,
                    continues=continues,
                    prompt_logprobs=scores,
                    constraint=constraint,
                    deadline=time.monotonic() + self._left(request, began),
                )
                streams.append(engine.stream(asked))
            outputs = self._outputs(streams, count, began, constraint)
            if request.stream:
                cut = scope.get("abort", lambda: None)
                await _while_there(receive, self._stream(send, cut, request, answer, outputs))
            else:
                await _while_there(receive, self._whole(send, answer, outputs))
        except ContextLengthExceeded as error:
            known = translate(error)
            known.param = "messages" if isinstance(answer, Chat) else "prompt"
            raise known from None
        finally:
            for stream in streams:
                await stream.aclose()  # type: ignore[attr-defined]
            if len(streams) == len(prompts):  # not those that were refused
                server.metrics.prompt.observe(answer.usage.prompt)
                server.metrics.generation.observe(answer.usage.completion)
                server.metrics.latency.observe(time.monotonic() - began)

    async def _outputs(
        self, streams: list[AsyncIterator[Output]], count: int, began: float, constraint: Watched | None
    ) -> AsyncIterator[tuple[int, Output]]:
        """Choice number and news, as they come. ApiError where a choice did not end well."""
        metrics = self._server.metrics
        last: dict[int, float] = {}
        merged = _merged(streams)
        try:
            async for number, output in merged:
                index = number * count + output.index
                now = time.monotonic()
                if output.token_ids:
                    if index not in last:
                        metrics.first_token.observe(now - began)
                    else:
                        gap = (now - last[index]) / len(output.token_ids)
                        for _ in output.token_ids:
                            metrics.between_tokens.observe(gap)
                    last[index] = now
                if output.result is not None:
                    metrics.ended(output.result)
                if output.finish_reason == "timeout":
                    raise ApiError(408, "the request took longer than it may", code="timeout")
                if output.finish_reason == "cancelled":
                    raise ApiError(503, "the request was aborted by the server", code="aborted")
                yield index, output
        except RequestFailed:
            if constraint is not None and constraint.failure:
                raise ApiError(400, constraint.failure, code="constraint_failed") from None
            raise
        finally:
            await merged.aclose()  # type: ignore[attr-defined]

    async def _whole(self, send: Send, answer: Any, outputs: AsyncIterator[tuple[int, Output]]) -> None:
        try:
            async for index, output in outputs:
                answer.take(output, index)
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]
        await send_json(send, answer.whole())

    async def _stream(
        self,
        send: Send,
        cut: Callable[[], None],
        request: Any,
        answer: Any,
        outputs: AsyncIterator[tuple[int, Output]],
    ) -> None:
        """cut: ends the connection at once."""
        options = request.stream_options
        answer.continuous = bool(options and options.continuous_usage_stats)
        started = False
        writing, task = self._server.writing, asyncio.current_task()
        assert task is not None

        async def write(data: bytes, more: bool = True) -> None:
            nonlocal started
            writing[task] = time.monotonic()
            try:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
                await send({"type": "http.response.body", "body": data, "more_body": more})
            except asyncio.CancelledError:
                if writing[task] != math.inf:
                    raise
                task.uncancel()
                cut()
                await asyncio.sleep(0)  # the connection learns that it is lost
                raise ApiError(499, "the client does not read") from None
            finally:
                del writing[task]

        try:
            async for index, output in outputs:
                data = b"".join(answer.chunks(output, index))
                if data:
                    await write(data)
            if options and options.include_usage:
                await write(answer.event([], usage=True))
        except Exception as error:
            known = translate(error)
            if not started or known.status == 499:
                raise
            if known.code == "internal_error":
                logs.logger.exception("a stream failed")
            await write(b"data: " + json.dumps(known.body()).encode() + b"\n\n")
        finally:
            await outputs.aclose()  # type: ignore[attr-defined]
        await write(b"data: [DONE]\n\n", more=False)

    # ---- reading -------------------------------------------------------------------------------------------

    async def _read(self, kind: type[Any], receive: Receive) -> Any:
        body = await read_body(receive, self._server.settings)

        def work() -> tuple[Any, list[str]]:
            return read(kind, parse_object(body))

        request, unknown = work() if len(body) < BIG_BODY else await asyncio.to_thread(work)
        if getattr(request, "stream_options", None) is not None and not request.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options")
        self._server.metrics.unknown_fields.inc(len(unknown))
        for name in unknown[:20]:
            if name not in self._server.unknown_seen and len(self._server.unknown_seen) < 1000:
                self._server.unknown_seen.add(name)
                logs.event("an unknown field was ignored", field=name[:60])
        if request.model is not None:
            self._check_name(request.model)
        return request

    def _check_name(self, name: str) -> None:
        if name != self._server.name:
            raise ApiError(
                404,
                f"the model {name[:100]!r} does not exist: this server has {self._server.name!r}",
                param="model",
                code="model_not_found",
            )

    def _left(self, request: Any, began: float) -> float:
        """Seconds that a request may still take."""
        most = self._server.settings.request_timeout
        return max(0.0, began + min(most, request.timeout or most) - time.monotonic())

    def _check_length(self, size: int, param: str) -> None:
        """Refuses a text that cannot fit the context before it is tokenized."""
        context, longest = self._server.ready_engine().context, self._server.longest_token
        if size > context * longest:
            raise ApiError(
                400,
                f"This model's maximum context length is {context} tokens, but the text of {size} bytes has "
                f"more than {size // longest} tokens.",
                param=param,
                code="context_length_exceeded",
            )

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        size = self._server.vocab_size
        for one in ids:
            if isinstance(one, bool) or not 0 <= one < size:
                raise ApiError(400, f"{param}: {one!r} is not a token id below {size}"[:120], param=param)

    def _spec(self, request: Any) -> ConstraintSpec | None:
        """The constraint on the output that a request asks for, in any of the ways there are."""
        from gristmill.serve.constraints import ConstraintSpec

        found: list[ConstraintSpec] = []

        def schema(value: object, name: str) -> None:
            if isinstance(value, str):
                value = parse_object(value.encode())
            if not isinstance(value, dict):
                raise ApiError(400, f"{name} must be a JSON schema", param=name)
            found.append(ConstraintSpec("json_schema", json.dumps(value)))

        form = request.response_format
        if form is not None:
            kind = form.get("type")
            if kind == "json_object":
                found.append(ConstraintSpec("json_object", ""))
            elif kind == "json_schema":
                inner = form.get("json_schema")
                if not isinstance(inner, dict) or "schema" not in inner:
                    raise ApiError(
                        400, "response_format.json_schema.schema is missing", param="response_format"
                    )
                schema(inner["schema"], "response_format")
            elif kind != "text":
                raise ApiError(
                    400,
                    "response_format.type must be text, json_object or json_schema",
                    param="response_format",
                )
        options: list[tuple[str, Any]] = [
            ("json", request.guided_json),
            ("regex", request.guided_regex),
            ("regex", request.regex),
            ("choice", request.guided_choice),
            ("grammar", request.guided_grammar),
            ("grammar", request.grammar),
        ]
        for name, value in (request.structured_outputs or {}).items():
            if name == "json_object":
                if value:
                    found.append(ConstraintSpec("json_object", ""))
            elif name not in ("json", "regex", "choice", "grammar"):
                raise ApiError(
                    400, f"structured_outputs.{name[:40]} is not supported", param="structured_outputs"
                )
            else:
                options.append((name, value))
        for name, value in options:
            if value is None:
                continue
            if name == "json":
                schema(value, "guided_json")
            elif name == "choice":
                if (
                    not isinstance(value, list)
                    or not value
                    or not all(isinstance(c, str) and c for c in value)
                ):
                    raise ApiError(400, "a choice needs a list of texts", param="guided_choice")
                found.append(ConstraintSpec("choice", json.dumps(value)))
            elif not isinstance(value, str):
                raise ApiError(400, f"a {name} must be a text", param=f"guided_{name}")
            else:
                found.append(ConstraintSpec(name, value))  # type: ignore[arg-type]
        if len(found) > 1:
            raise ApiError(400, "only one constraint on the output can be given", param="response_format")
        return found[0] if found else None


_UNREAD_BYTES = 1 << 18
"""Of a body that is refused unread: the connection survives that it still comes."""


def _refuse_early(engine: ServedEngine, scope: Scope) -> None:
    """Refuses what finds no room before its body is read: under overload, that is most of what is done.

    Large bodies, those of unknown size and those that wait to be asked for are read first: the answer to
    them could be lost with the connection. Raises QueueFull.
    """
    headers = dict(scope["headers"])
    size = headers.get(b"content-length", b"")
    if b"expect" not in headers and size.isdigit() and len(size) < 10 and int(size) <= _UNREAD_BYTES:
        engine.check_room()


def _text_bytes(value: Any) -> int:
    """Bytes of the texts in a request's messages, at most: those of a character that is not ASCII count 1."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_text_bytes(value[key]) for key in ("content", "text") if key in value)
    return sum(map(_text_bytes, value)) if isinstance(value, list) else 0


_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def openapi() -> dict[str, Any]:
    """The description of the API, made from the models of its requests."""
    from pydantic.json_schema import models_json_schema

    kinds: dict[str, type[BaseModel]] = {
        "/v1/chat/completions": ChatRequest,
        "/v1/completions": CompletionRequest,
        "/tokenize": TokenizeRequest,
        "/detokenize": DetokenizeRequest,
    }
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in kinds.values()], ref_template="#/components/schemas/{model}"
    )
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }

    def answers(*statuses: int) -> dict[str, Any]:
        refused = {"description": "refused", "content": {"application/json": {"schema": error}}}
        return {"200": {"description": "done"}, **{str(status): refused for status in statuses}}

    paths: dict[str, Any] = {}
    for path, kind in kinds.items():
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        paths[path] = {
            "post": {
                "requestBody": {"required": True, "content": content},
                "responses": answers(400, 401, 403, 404, 408, 413, 429, 431, 503),
            }
        }
    for path in (
        "/health",
        "/ready",
        "/metrics",
        "/version",
        "/v1/models",
        "/tokenizer_info",
        "/openapi.json",
    ):
        paths[path] = {"get": {"responses": answers(400, 401, 403, 431, 503)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gristmill", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas.get("$defs", {})},
    }
