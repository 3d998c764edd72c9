"""The text that models are evaluated on, and its cutting into windows."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError, UsageError

if TYPE_CHECKING:
    from gristmill.io.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Text:
    """A text and what to call it in a report."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Of the UTF-8 bytes: tells two texts of the same name apart."""
        return hashlib.sha256(self.content.encode("utf-8")).hexdigest()


def builtin_text() -> Text:
    """English prose that is on every machine with Python: the language reference in `pydoc_data.topics`.

    It differs a little between Python versions, so the name says which. Evaluations read it from its start;
    calibration takes its second half (`gristmill.calibrate.text`).
    """
    from pydoc_data.topics import topics

    content = "\n\n".join(topics[name] for name in sorted(topics))
    return Text(f"pydoc_data.topics of CPython {platform.python_version()}", content)


def read_text(path: str | Path | None) -> Text:
    """The text of a file (UTF-8), or the built-in one for None. UsageError if it cannot be used."""
    if path is None:
        return builtin_text()
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the text {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"the text {path} is not UTF-8 (byte {error.start})") from None
    if not content.strip():
        raise UsageError(f"the text {path} is empty")
    return Text(path.name, content)


def begin_tokens(tokenizer: Tokenizer) -> list[int]:
    """The begin token, if the model asks for one in front of a text; else nothing."""
    start = tokenizer.encode("", add_special=True)
    return start[:1] if start and start[0] == tokenizer.bos_token_id else []


def windows(tokenizer: Tokenizer, text: Text, tokens: int, window: int) -> list[NDArray[np.int32]]:
    """The first `tokens` tokens of a text in independent windows of at most `window` tokens, int32 each.

    Every window starts with the begin token if the model asks for one, which counts as one of its tokens. A
    last window of a single token is left out: it predicts nothing.
    """
    if tokens < 2 or window < 2:
        raise UsageError("an evaluation needs windows of at least 2 tokens")
    begin = begin_tokens(tokenizer)
    ids: list[int] = []
    # Tokenising only as much of a long text as is needed; the last tokens of a cut text may be other ones.
    characters = 16 * tokens
    while True:
        ids = tokenizer.encode(text.content[:characters], add_special=False)
        if characters >= len(text.content) or len(ids) >= tokens + 64:
            break
        characters *= 2
    body = window - len(begin)
    result = []
    left = tokens
    for at in range(0, len(ids), body):
        piece = np.array([*begin, *ids[at : at + body]][:left], np.int32)
        if len(piece) < 2:
            break
        result.append(piece)
        left -= len(piece)
    if not result:
        raise ModelError(f"the text {text.name} has no more than one token")
    return result
