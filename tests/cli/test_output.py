"""What the terminal helpers write: text, notes, errors, bars."""

from __future__ import annotations

import io
import sys

import pytest

from gristmill.errors import GristmillError, UsageError
from gristmill.terminal import output, progress
from gristmill.terminal.progress import Bar, PromptBar


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch, name: str) -> Screen:
    """Puts a terminal in the place of a standard stream. Not a fixture: pytest changes them after those."""
    found = Screen()
    monkeypatch.setattr(sys, name, found)
    monkeypatch.setenv("TERM", "xterm")
    return found


def test_a_terminal_is_shown_control_characters_and_does_not_obey_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = terminal(monkeypatch, "stdout")
    stream = output.Stream()
    for piece in ("red \x1b[31m", "bell\x07", " title \x9d", "two\nlines\tof Grüße, 水"):
        stream(piece)
    stream.end()
    assert screen.getvalue() == "red ␛[31mbell␇ title �two\nlines\tof Grüße, 水\n"


def test_a_pipe_gets_the_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    stream = output.Stream()
    stream("\x1b[31m")
    stream.end()
    stream.end()
    assert pipe.getvalue() == "\x1b[31m\n"


def test_json_holds_no_numbers_that_json_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch, "stdout")
    output.show_json({"a": [1.5, float("nan"), (float("-inf"), "水", None, True)]})
    assert screen.getvalue() == '{"a": [1.5, null, [null, "\\u6c34", null, true]]}\n'


def test_nothing_written_ends_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch, "stdout")
    output.Stream().end()
    assert screen.getvalue() == ""


def test_an_error_is_one_line_whatever_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = terminal(monkeypatch, "stderr")
    output.complain("one\ntwo\r\n\x1b[31mthree\udcff " + "x" * 2000)
    text = errors.getvalue()
    assert text.startswith("error: one two \\x1b[31mthree\\udcff xxx")
    assert text.endswith(" ...\n")
    assert text.count("\n") == 1
    assert len(text) < 720


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("no"), 2, "no"),
        (GristmillError("no"), 1, "no"),
        (MemoryError(), 1, "out of memory"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (OSError(2, "No such file or directory", "x"), 1, "No such file or directory (x)"),
        (KeyboardInterrupt(), 130, None),
        (BrokenPipeError(), 141, None),
        (ZeroDivisionError("x"), 1, "this is a bug in gristmill: ZeroDivisionError: x (GRISTMILL_DEBUG=1 "
         "shows where)"),
    ],
)  # fmt: skip
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str | None
) -> None:
    monkeypatch.delenv("GRISTMILL_DEBUG", raising=False)
    terminal(monkeypatch, "stdout")
    errors = terminal(monkeypatch, "stderr")

    def command() -> int:
        raise error

    assert output.run(command) == code
    assert errors.getvalue() == ("" if message is None else f"error: {message}\n")


def test_notes_are_grey_only_where_colours_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = terminal(monkeypatch, "stderr")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert errors.isatty()
    assert output.dim("x") == "\x1b[2mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.dim("x") == "x"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that bars see, in seconds."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_a_bar_comes_only_for_long_work(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    errors = terminal(monkeypatch, "stderr")
    with Bar() as bar:
        bar("converting", 0, 100)
        clock[0] += 1.0
        bar("converting", 60, 100)  # 1.7 s in all
        assert errors.getvalue() == ""
        clock[0] += 0.5
        bar("converting", 70, 100)  # 2.1 s
        assert "converting" in errors.getvalue()


def test_labels_may_change_within_one_piece_of_work(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = terminal(monkeypatch, "stderr")
    with Bar() as bar:
        for done, label in enumerate(("warming up", "prefill 512", "decode 1 x 512")):
            bar(label, done, 12)
            clock[0] += 0.4
        assert "prefill 512" in errors.getvalue()


def test_another_piece_of_work_is_timed_anew(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    errors = terminal(monkeypatch, "stderr")
    with Bar() as bar:
        for _ in range(4):
            for done in (0, 50, 100):
                bar("converting", done, 100)
                clock[0] += 0.5
        assert errors.getvalue() == ""


def test_no_bar_where_stderr_is_no_terminal(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Bar() as bar:
        bar("converting", 0, 100)
        clock[0] += 100.0
        bar("converting", 1, 100)
    assert capsys.readouterr().err == ""


def test_the_bar_of_a_prompt_goes_before_its_answer(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = terminal(monkeypatch, "stderr")
    with PromptBar() as bar:
        clock[0] += 1.0
        bar(512, 8000)
        assert "reading the prompt" in errors.getvalue()
        bar(8000, 8000)
        assert errors.getvalue().rstrip("\r").endswith("\x1b[2K")
        before = errors.getvalue()
    assert errors.getvalue() == before
