"""Errors as the OpenAI API words them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from gristmill.engine.request import ContextLengthExceeded, EngineDead, QueueFull, RequestFailed
from gristmill.engine.sampling import SamplingParams
from gristmill.errors import GristmillError, TemplateError, UsageError

__all__ = ["ApiError", "translate"]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    499: "cancelled",
    500: "server_error",
    503: "service_unavailable",
}


_PARAMS = frozenset({*(one.name for one in fields(SamplingParams)), "n", "tools", "tool_choice"})
"""What messages about a request's values begin with."""


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON of it."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def translate(error: Exception) -> ApiError:
    """What a client is told of an error. Unexpected ones keep their text to themselves."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextLengthExceeded):
        return ApiError(
            400,
            f"This model's maximum context length is {error.context} tokens, but the prompt has "
            f"{error.prompt_tokens} tokens and at least one must be left for the answer.",
            param="messages",
            code="context_length_exceeded",
        )
    if isinstance(error, QueueFull):
        wait = str(max(1, round(error.retry_after)))
        return ApiError(
            429, f"The server is busy: {error}.", code="queue_full", headers={"retry-after": wait}
        )
    if isinstance(error, EngineDead):
        return ApiError(503, str(error), code="unavailable", headers={"retry-after": "5"})
    if isinstance(error, RequestFailed):
        return ApiError(500, str(error), code="request_failed")
    if isinstance(error, (UsageError, TemplateError)):
        text = str(error)
        first = text.split(" ", 1)[0].strip(":,.").split(".", 1)[0]
        return ApiError(400, text, param=first if first in _PARAMS else None)
    if isinstance(error, GristmillError):
        return ApiError(500, str(error))
    return ApiError(500, "internal error", code="internal_error")
