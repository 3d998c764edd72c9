"""The page at `/`: its files, with headers that let it do what it needs and nothing else."""

from __future__ import annotations

import hashlib
from importlib import resources

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["page"]

_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page() -> tuple[ASGIApp, list[str]]:
    """An application that serves the page, and the paths it has."""
    files: dict[str, tuple[bytes, str, str]] = {}
    for entry in resources.files("gristmill.serve").joinpath("page").iterdir():
        kind = _KINDS.get(f".{entry.name.rsplit('.', 1)[-1]}")
        if kind is None:
            continue
        data = entry.read_bytes()
        path = "/" if entry.name == "index.html" else f"/page/{entry.name}"
        files[path] = (data, kind, f'"{hashlib.sha256(data).hexdigest()[:16]}"')

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        found = files.get(scope["path"])
        if found is None or scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(405, headers={"allow": "GET, HEAD"}) if found else HTTPException(404)
        data, kind, tag = found
        given = dict(scope["headers"]).get(b"if-none-match", b"").decode("latin-1")
        status, body = (304, b"") if given == tag else (200, data)
        headers = {
            "content-type": f"{kind}; charset=utf-8",
            "content-length": str(len(data)),
            "content-security-policy": _POLICY,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "cache-control": "no-cache",
            "etag": tag,
        }
        fields = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    return serve, sorted(files)
