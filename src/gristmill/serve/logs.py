"""The server's log: one line per event on stderr, as text or as JSON. Never prompts, answers or keys."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any

__all__ = ["event", "set_up"]

logger = logging.getLogger("gristmill")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        fields = " ".join(f"{name}={_quoted(value)}" for name, value in getattr(record, "fields", {}).items())
        text = f"{record.levelname} {at} {record.name} {record.getMessage()} {fields}".rstrip()
        text = "".join(c if c.isprintable() else " " for c in text)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def _quoted(value: object) -> str:
    """A field's value, so that it cannot be taken for several fields."""
    text = str(value)
    return text if re.fullmatch(r'[^\s="]+', text) else json.dumps(text, ensure_ascii=False)


def set_up(form: str, level: str) -> None:
    """Sends the log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    for name in ("gristmill", "uvicorn", "uvicorn.error"):
        one = logging.getLogger(name)
        one.handlers = [handler]
        one.propagate = False
        one.setLevel(level.upper() if name == "gristmill" else "WARNING")


def event(message: str, level: int = logging.INFO, **fields: Any) -> None:
    """Logs something that happened."""
    logger.log(level, message, extra={"fields": fields})
