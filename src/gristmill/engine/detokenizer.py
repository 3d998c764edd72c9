"""From generated token ids to text, piece by piece: whole characters only, and cut at stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

from gristmill.errors import UsageError

__all__ = ["Detokenizer", "StopMatcher", "TextStream", "TokenBytes"]


class TokenBytes(Protocol):
    """What streaming needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def strip_leading(self) -> int: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class Detokenizer:
    """Incremental `Tokenizer.decode`: the pieces of a sequence add up to the text of the whole.

    A piece holds whole characters only; the first bytes of a character wait for the rest. Bytes that cannot
    belong to any character become U+FFFD as soon as that is known.
    """

    def __init__(self, tokenizer: TokenBytes, *, skip_special: bool = True, continues: bool = False) -> None:
        """continues: the ids go on from earlier text, so that a leading space is part of the text."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._strip = 0 if continues else tokenizer.strip_leading
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take the next id, return the text that it completes."""
        if token_id in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._strip and data:
            spaces = len(data) - len(data.lstrip(b" "))
            dropped = min(spaces, self._strip)
            # Stripping ends with the first byte that is not a space.
            self._strip = self._strip - dropped if spaces == len(data) else 0
            data = data[dropped:]
        return self._decoder.decode(data)

    def finish(self) -> str:
        """The rest: U+FFFD for a character that was begun but not completed, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Cuts a stream of text before the first stop string in it.

    The first is the one that ends earliest; of several that end together, the longest. That makes the result
    independent of how the text is divided into pieces. Text is held back only while it may still be the
    beginning of a stop string.

    Attributes: matched, the stop string that was found, or None.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        """Raises UsageError for a stop string that is empty or not a string."""
        self._stops = tuple(dict.fromkeys(stops))
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise UsageError("a stop string must be a string with at least one character")
        self._held = ""
        self._longest = max(map(len, self._stops), default=0)
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take more text, return what can be shown of it. After a match everything is dropped."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, _, self.matched = min(found)
            self._held = ""
            return text[: end - len(self.matched)]
        keep = self._unfinished(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _unfinished(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class TextStream:
    """Token ids in, text out, up to a stop string."""

    def __init__(
        self,
        tokenizer: TokenBytes,
        stops: Sequence[str] = (),
        *,
        skip_special: bool = True,
        continues: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special=skip_special, continues=continues)
        self._matcher = StopMatcher(stops)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text, None while there is none."""
        return self._matcher.matched

    def push(self, token_id: int) -> str:
        """Take the next id, return new text; check `stopped_by` after it."""
        return self._matcher.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The text still held back. Call once, after the last id."""
        rest = self._matcher.push(self._detokenizer.finish())
        return rest if self._matcher.matched is not None else rest + self._matcher.finish()
