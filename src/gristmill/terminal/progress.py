"""A progress bar on stderr for work that takes more than two seconds, where stderr is a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LONG_S = 2.0
"""Work that is expected to take less is not shown."""
_LOOK_S = 0.3
"""How much of a piece of work is needed to say how long it will take."""


class Bar:
    """A context manager to be given as `progress` to functions that take long.

    A bar appears when one piece of work, by its pace so far, will have taken over two seconds in all, and
    stays for the pieces after it. Another total, or less done than before, begins another piece.
    """

    def __init__(self) -> None:
        try:
            self._on = sys.stderr.isatty()
        except (AttributeError, ValueError):
            self._on = False
        self._first = self._done = self._total = 0
        self._begin = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, label: str, done: int, total: int) -> None:
        """As `gristmill.io.checkpoint.Progress` says."""
        if not self._on:
            return
        now = time.perf_counter()
        if total != self._total or done < self._done:
            self.begin(done, total, now)
        self._done = done
        if self._bar is None:
            passed = now - self._begin
            made = done - self._first
            if passed < _LOOK_S or made <= 0 or passed * (total - self._first) / made < _LONG_S:
                return
            self._open(label, total)
        assert self._bar is not None
        assert self._task is not None
        self._bar.update(self._task, description=label, completed=done, total=total)

    def begin(self, done: int, total: int, at: float) -> None:
        """A piece of work began at this time by `time.perf_counter`, with so much of it done."""
        self._first = self._done = done
        self._total = total
        self._begin = at

    def close(self) -> None:
        """Takes the bar away. Idempotent."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, label: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(label, total=total)
        self._bar.start()


class PromptBar:
    """A bar for the computing of a long prompt: a context manager to be given as `on_prompt`."""

    def __init__(self) -> None:
        self._bar = Bar()
        self._started: float | None = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        """The bar goes when all is done, before the first text is written."""
        if self._started is not None:
            self._bar.begin(0, total, self._started)
            self._started = None
        if done < total:
            self._bar("reading the prompt", done, total)
        else:
            self._bar.close()

    def __enter__(self) -> PromptBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
