"""A program at a pseudo-terminal, as a person would use it."""

from __future__ import annotations

import os
import pty
import re
import select
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """Starts a command with a terminal as its standard streams; a context manager."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.seen = ""
        """Everything shown so far, without colours, since the last `wait`."""
        self._pid, self._file = pty.fork()
        if self._pid == 0:
            try:
                os.execve(command[0], list(command), dict(environment) | {"TERM": "xterm"})
            finally:
                os._exit(127)

    def type(self, text: str | bytes) -> None:
        """Presses keys; `\\n` is the return key."""
        os.write(self._file, text.encode() if isinstance(text, str) else text)

    def wait(self, pattern: str, seconds: float = 60) -> str:
        """Reads until the pattern has been shown; what was shown up to its end."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"{pattern!r} did not come: {self.seen!r}"
            if not self._read():
                raise AssertionError(f"{pattern!r} did not come before the end: {self.seen!r}")
        shown, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return shown

    def end(self, seconds: float = 60, keys: str = "") -> tuple[int, str]:
        """Waits for the program's end: its exit code, and what it still showed.

        `keys` are pressed every second until then: Python overlooks a signal that comes just before it waits
        for a line, until the next key.
        """
        begin = time.monotonic()
        pressed = 0
        while self._read():
            past = time.monotonic() - begin
            assert past < seconds, f"it did not end: {self.seen!r}"
            if keys and past >= pressed:
                self.type(keys)
                pressed += 1
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return os.waitstatus_to_exitcode(status), self.seen

    def _read(self) -> bool:
        if not select.select([self._file], [], [], 0.2)[0]:
            return True
        try:
            data = os.read(self._file, 65536)
        except OSError:
            return False  # Linux: the other side is closed
        self.seen = _ESCAPES.sub("", self.seen + data.decode(errors="replace").replace("\r\n", "\n"))
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pid:
            os.kill(self._pid, 9)
            os.waitpid(self._pid, 0)
        os.close(self._file)
