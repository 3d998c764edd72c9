"""What stands between the network and the routes: limits, keys, hosts, origins, ids, the access log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable
from email.utils import formatdate
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gristmill.engine.request import QueueFull
from gristmill.serve import logs
from gristmill.serve.errors import ApiError, translate
from gristmill.serve.limits import LIMITS
from gristmill.serve.metrics import Metrics
from gristmill.serve.settings import Settings

__all__ = ["OPEN_ROUTES", "Guard", "read_body"]

OPEN_ROUTES = frozenset({"/health", "/ready"})
"""Routes that need no key. The page's own files do not either: what it shows comes through keyed routes."""
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_COMPLETION = re.compile(rb"POST (/v1/(?:chat/)?completions) HTTP/1\.1\r\n")
_FIELD = re.compile(rb"([!#-'*+.0-9A-Z^-z|~-]+):[ \t]*([\x20-\x7e]*)")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_QUIET = frozenset({"/health", "/ready", "/metrics"})


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Callable[[], Metrics],
        routes: Callable[[], Iterable[str]],
        page: Callable[[str], bool],
    ) -> None:
        """routes: the paths there are, for metrics' labels. page: whether a path is a file of the page."""
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._routes = routes
        self._page = page
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_key]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        began = time.perf_counter()
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        path = re.sub(r"/{2,}", "/", scope["path"])
        if len(path) > 1:
            path = path.rstrip("/") or "/"
        scope = {**scope, "path": path, "raw_path": path.encode(), "request_id": request_id}
        status = 0
        origin = headers.get("origin")

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", request_id.encode()), *self._cors(origin)]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        try:
            self._check(scope, headers, path)
            if scope["method"] == "OPTIONS" and origin and self._settings.allowed_origins:
                await answer({"type": "http.response.start", "status": 204, "headers": []})
                await answer({"type": "http.response.body", "body": b""})
            else:
                await self._app(scope, receive, answer)
        except ApiError as error:
            if status == 0:
                await send_error(answer, error)
            status = error.status
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logs.logger.exception("%s %s failed: %s", scope["method"], path[:200], type(error).__name__)
            if status == 0:
                await send_error(answer, ApiError(500, "internal error", code="internal_error"))
        finally:
            self._account(scope, path, status, time.perf_counter() - began, request_id)

    def asks_for_completion(self, data: bytes) -> bool:
        """Whether what a connection has brought so far begins as a completion does."""
        return _COMPLETION.match(data) is not None

    def refusal(self, data: bytes, reason: QueueFull, client: tuple[str, int] | None) -> bytes | None:
        """The answer to a completion that finds no room, from all that its connection has brought so far.

        Under overload most of what comes ends here, before it costs what a request costs. None for whatever
        is not plainly a whole request that passes all checks, or comes by a proxy: that is answered the long
        way. The connection is to be closed after it.
        """
        asked = _COMPLETION.match(data)
        if asked is None:
            return None
        began = time.perf_counter()
        full = translate(reason)
        head, found, body = data.partition(b"\r\n\r\n")
        fields = [_FIELD.fullmatch(line) for line in head.split(b"\r\n")[1:]]
        if not found or None in fields:
            return None
        pairs = [(one[1].lower(), one[2].rstrip()) for one in fields if one is not None]
        headers = {name.decode(): value.decode() for name, value in pairs}
        rare = {
            *("expect", "transfer-encoding", "origin", "upgrade"),
            *("x-forwarded-for", "x-forwarded-proto"),  # uvicorn knows whom to believe
        } & headers.keys()
        if (
            rare
            or "host" not in headers
            or len(headers) < len(pairs)
            or headers.get("content-length") != str(len(body))
        ):
            return None
        path = asked[1].decode()
        try:
            self._check({"method": "POST", "headers": pairs}, headers, path)
        except ApiError:
            return None
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        text = json.dumps(full.body()).encode()
        lines = [
            "HTTP/1.1 429 Too Many Requests",
            f"date: {formatdate(usegmt=True)}",
            "content-type: application/json",
            f"content-length: {len(text)}",
            *(f"{name}: {value}" for name, value in full.headers.items()),
            f"x-request-id: {request_id}",
            "connection: close",
        ]
        self._account(
            {"method": "POST", "client": client}, path, full.status, time.perf_counter() - began, request_id
        )
        return "\r\n".join([*lines, "", ""]).encode() + text

    def _check(self, scope: Scope, headers: dict[str, str], path: str) -> None:
        """Raises ApiError for a request that goes no further."""
        close = {"connection": "close"}
        if len(scope["headers"]) > LIMITS["headers"]:
            raise ApiError(431, f"more than {LIMITS['headers']} headers", headers=close)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > LIMITS["header_bytes"]:
            raise ApiError(431, f"more than {LIMITS['header_bytes']} bytes of headers", headers=close)
        framed = "transfer-encoding" in headers
        if framed and "content-length" in headers:
            raise ApiError(400, "both Content-Length and Transfer-Encoding are given", headers=close)
        if scope["method"] in ("GET", "HEAD", "OPTIONS") and (
            framed or headers.get("content-length", "0").strip() not in ("", "0")
        ):
            raise ApiError(400, f"a {scope['method']} request must have no body", headers=close)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._settings.max_body_mb * 1e6:
            raise too_large(self._settings)
        self._check_origin(scope, headers)
        if self._settings.loopback:
            self._check_host(headers.get("host", ""))
        preflight = scope["method"] == "OPTIONS" and self._settings.allowed_origins
        if self._keys and path not in OPEN_ROUTES and not preflight and not self._page(path):
            self._check_key(headers)

    def _check_origin(self, scope: Scope, headers: dict[str, str]) -> None:
        """Keeps pages of other sites from making the server work, though they could not read the answer."""
        if scope["method"] != "POST":
            return
        origin, allowed = headers.get("origin"), self._settings.allowed_origins
        if "*" in allowed or (origin is not None and origin in allowed):
            return
        own = f"{scope.get('scheme', 'http')}://{headers.get('host', '')}"
        if (origin is not None and origin != own) or headers.get("sec-fetch-site") == "cross-site":
            raise ApiError(403, "this origin is not allowed (--allowed-origins)", code="origin_not_allowed")

    def _check_host(self, host: str) -> None:
        """Keeps pages of other sites, whose names point at this machine, out."""
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").lower()
        local = name in ("localhost", "::1", "") or re.fullmatch(r"127(\.\d{1,3}){3}", name)
        if not local and name not in {one.lower() for one in self._settings.allowed_hosts}:
            raise ApiError(403, "this server answers to local names only", code="host_not_allowed")

    def _check_key(self, headers: dict[str, str]) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        digest = hashlib.sha256(given.strip().encode()).digest()
        # All are compared, each in constant time.
        good = [hmac.compare_digest(digest, key) for key in self._keys]
        if not any(good):
            raise ApiError(
                401,
                "an API key is needed: Authorization: Bearer ..." if not given else "the API key is wrong",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _cors(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        allowed = self._settings.allowed_origins
        if origin is None or not allowed or ("*" not in allowed and origin not in allowed):
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1", "replace")),
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-allow-headers", b"authorization, content-type, x-api-key, x-request-id"),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
            (b"access-control-max-age", b"600"),
            (b"vary", b"origin"),
        ]

    def _account(self, scope: Scope, path: str, status: int, seconds: float, request_id: str) -> None:
        route = (
            path
            if path in self._routes()
            else "/v1/models/{id}"
            if path.startswith("/v1/models/")
            else "other"
        )
        shown = status or 499
        self._metrics().http.labels(
            route, scope["method"] if scope["method"] in _METHODS else "other", shown
        ).inc()
        if self._settings.access_log and path not in _QUIET:
            client = scope.get("client")
            logs.event(
                "request",
                method=scope["method"][:16],
                path=quote(path[:200], safe="/:"),
                status=shown,
                seconds=round(seconds, 4),
                client=client[0][:64] if client else "-",
                request_id=request_id,
            )


def too_large(settings: Settings) -> ApiError:
    """For a body over the limit; the connection is closed, as the rest of it is not read."""
    return ApiError(
        413,
        f"the body is larger than {settings.max_body_mb:g} MB",
        code="body_too_large",
        headers={"connection": "close"},
    )


async def read_body(receive: Receive, settings: Settings) -> bytes:
    """The body of a request. ApiError 413 as soon as it is too large, 408 if it takes too long."""
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.body_timeout):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(499, "the client has gone")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > settings.max_body_mb * 1e6:
                    raise too_large(settings)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(408, "the body did not come in time", headers={"connection": "close"}) from None


async def send_error(send: Send, error: ApiError) -> None:
    """Answers with an error."""
    await send_json(send, error.body(), error.status, error.headers)


async def send_json(send: Send, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
    """Answers with JSON."""
    body = json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    fields = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    fields += [(name.encode(), text.encode()) for name, text in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
