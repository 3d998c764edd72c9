"""Standard streams: text in UTF-8, results, JSON, and exit codes that say how it went.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (Ctrl-C), 141 the reader of the output went away.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gristmill.errors import GristmillError, UsageError

if TYPE_CHECKING:
    from gristmill.api import Model
    from gristmill.engine.result import Result

FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
_SHOWN = 700
"""Most characters of an error's line."""
_UNBROKEN = 240
"""Columns of a table that does not go to a terminal."""
_SHOWN_CONTROLS = {
    code: chr(0x2400 + code) if code < 32 else "\ufffd"
    for code in (*range(32), *range(127, 160))
    if chr(code) not in "\n\t"
}


def run(command: Callable[[], int]) -> int:
    """Runs a command; its exit code. Whatever goes wrong is one line on stderr."""
    _prepare_streams()
    try:
        code = command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        _discard_output()
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except UsageError as error:
        complain(str(error))
        return USAGE
    except GristmillError as error:
        complain(str(error))
        return FAILED
    except MemoryError:
        complain("out of memory")
        return FAILED
    except OSError as error:
        _discard_output()
        where = f" ({error.filename})" if error.filename is not None else ""
        complain(f"{error.strerror or error}{where}")
        return FAILED
    except Exception as error:
        if os.environ.get("GRISTMILL_DEBUG"):
            raise
        complain(
            f"this is a bug in gristmill: {type(error).__name__}: {error} (GRISTMILL_DEBUG=1 shows where)"
        )
        return FAILED
    return code


def complain(message: str) -> None:
    """Prints an error as one line on stderr, whatever characters are in it."""
    line = " ".join(message.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
    if len(line) > _SHOWN:
        line = line[: _SHOWN - 4] + " ..."
    say(f"error: {line}")


def say(message: str) -> None:
    """Prints a message on stderr; silent if nobody reads it."""
    try:
        print(message, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        # There is nowhere left to say so.
        return


def show_json(value: Any) -> None:
    """Prints one JSON value on stdout, in ASCII, on one line; numbers that are not finite become null."""
    import json

    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value))
    print(text, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(*parts: Any) -> None:
    """Prints tables and other rich renderables on stdout."""
    from rich.console import Console

    # Where nobody knows the width, lines are not broken: the reader is a file, a pager or a program.
    wide = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else _UNBROKEN
    console = Console(highlight=False, width=wide)
    for part in parts:
        console.print(part)


class Stream:
    """Writes generated text as it comes.

    On a terminal, control characters are shown instead of obeyed: a model may write anything.
    """

    def __init__(self) -> None:
        self._last = "\n"
        self._terminal = sys.stdout.isatty()

    def __call__(self, text: str) -> None:
        """Writes a piece at once."""
        self._last = text or self._last
        if self._terminal and not text.isprintable():
            text = text.translate(_SHOWN_CONTROLS)
        sys.stdout.write(text)
        sys.stdout.flush()

    def end(self) -> None:
        """Ends the line, if the text has not."""
        if not self._last.endswith("\n"):
            self("\n")


def dim(text: str) -> str:
    """A note, in grey where stderr is a terminal with colours."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty():
        return text
    return f"\x1b[2m{text}\x1b[0m"


def result_json(model: Model, result: Result) -> dict[str, Any]:
    """What `--json` says of one generation."""
    times = result.timings
    value: dict[str, Any] = {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "usage": {
            "prompt_tokens": result.prompt_tokens,
            "completion_tokens": result.completion_tokens,
        },
        "timings": {
            "load_s": times.load_s,
            "first_token_s": times.first_token_s,
            "prefill_tokens_per_s": times.prefill_tokens_per_s,
            "decode_tokens_per_s": times.decode_tokens_per_s,
        },
    }
    if result.logprobs is not None:

        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            text = model.tokenizer.decode([token_id], skip_special=False)
            return {"token_id": token_id, "token": text, "logprob": logprob}

        value["logprobs"] = [
            {**entry(one.token_id, one.logprob), "top": [entry(*other) for other in one.top]}
            for one in result.logprobs
        ]
    return value


def checked_text(text: str, what: str) -> str:
    """The text; UsageError if the command line or environment gave it in another encoding than UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is not UTF-8 (character {error.start + 1})") from None
    return text


def read_stdin(what: str) -> str:
    """All of standard input. UsageError if it is not UTF-8."""
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} is not UTF-8 (byte {error.start + 1})") from None


def _prepare_streams() -> None:
    """What is written to a closed stream goes nowhere; a character that the encoding lacks is shown as `?`.

    The hub's library would draw bars wherever stderr goes, and log every attempt.
    """
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _discard_output() -> None:
    """What is still in the buffer of stdout goes nowhere, so that the interpreter can end without a word."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):
        # No stdout to silence.
        return
