"""The chat screen: reads messages, shows answers as they come, keeps the conversation.

One line is one message; three double quotes begin and end one of several lines. A line that
begins with a slash is a command; two slashes begin a message with one. Where input is not a terminal, every
line of it is a turn, and the first error ends the conversation.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from gristmill.errors import GristmillError, UsageError
from gristmill.program.batch import CancelFlag
from gristmill.terminal import output
from gristmill.terminal.progress import PromptBar

if TYPE_CHECKING:
    from gristmill.api import Model
    from gristmill.engine.result import Result

HELP = """\
/help                 this list
/clear                forget the conversation, but not the system message
/system [TEXT]        show the system message, or put TEXT in its place; /system - removes it
/set [NAME VALUE]     show the sampling parameters, or change one, such as: /set temperature 0.8
/stats                tokens, speed and memory of this conversation
/save FILE            write the conversation to FILE as JSON
/exit                 leave; so do Ctrl-D, and Ctrl-C at the prompt

Ctrl-C stops an answer. \"\"\" begins and ends a message of several lines; // begins one with a slash.
When the conversation outgrows the context, its oldest turns are forgotten, never the system message; a line
says so when it happens."""

PROMPT, MORE = "> ", ". "
QUOTES = '"""'
_HISTORY_LINES = 1000
_WORDS = {"none": None, "true": True, "false": False}


class Leave(Exception):
    """The user wants to go."""


class Chat:
    """A conversation with a model at a terminal, or over pipes."""

    def __init__(
        self, model: Model, *, system: str | None, sampling: Mapping[str, Any], as_json: bool, history: bool
    ) -> None:
        """sampling: fields of SamplingParams. as_json: an object per answer. history: keep typed lines."""
        self.model = model
        self.session = model.session(system)
        self.system = system
        self.sampling = dict(sampling)
        self.as_json = as_json
        self.results: list[Result] = []
        """Figures of all turns so far; the texts of the older ones may have been forgotten."""
        self._typed = _is_terminal(sys.stdin)
        self._lines = _Lines(history and self._typed)

    def run(self) -> None:
        """Until the input ends."""
        if self._typed:
            output.say(self._about() + "; /help lists the commands")
        with self._lines, suppress(Leave):
            while (text := self._lines.message()) is not None:
                try:
                    self._take(text)
                except GristmillError as error:
                    if not self._typed:
                        raise
                    output.complain(str(error))

    def close(self) -> None:
        """Gives the keys and values back."""
        self.session.close()

    def _take(self, text: str) -> None:
        if text.startswith("//"):
            self._answer(text[1:])
        elif text.startswith("/"):
            name, _, rest = text[1:].partition(" ")
            command = self._commands().get(name.strip())
            if command is None:
                raise UsageError(f"there is no command /{name.strip()}: /help lists them")
            command(rest.strip())
        elif text.strip():
            self._answer(text)

    def _commands(self) -> Mapping[str, Callable[[str], None]]:
        return {
            "help": lambda _: output.say(HELP),
            "?": lambda _: output.say(HELP),
            "clear": self._clear,
            "system": self._system,
            "set": self._set,
            "stats": self._stats,
            "save": self._save,
            "exit": _leave,
            "quit": _leave,
            "bye": _leave,
        }

    # ---- answers -------------------------------------------------------------------------------------------

    def _answer(self, text: str) -> None:
        flag = CancelFlag()
        stream = None if self.as_json else output.Stream()
        with PromptBar() as progress, _interrupt_sets(flag):
            try:
                result = self.session.send(
                    text, on_text=stream, on_prompt=progress, cancel=flag, **self.sampling
                )
            finally:
                if stream is not None:
                    stream.end()
        if result.finish_reason == "cancelled" and not result.token_ids:
            # Stopped before the answer began: as if it had not been asked for.
            del self.session.messages[-2:]
        self.results.append(result)
        if self.as_json:
            output.show_json(
                {
                    "role": "assistant",
                    **output.result_json(self.model, result),
                    "cached_tokens": result.cached_tokens,
                    "dropped_turns": result.dropped_turns,
                }
            )
        if notes := "; ".join(self._notes(result)):
            output.say(output.dim(f"[{notes}]"))

    def _notes(self, result: Result) -> Iterator[str]:
        if result.dropped_turns:
            turns = "turn was" if result.dropped_turns == 1 else f"{result.dropped_turns} turns were"
            yield f"the context of {self.model.context} tokens is full: the oldest {turns} forgotten"
        if not self._typed:
            return
        if result.finish_reason == "cancelled":
            yield "stopped"
        elif result.finish_reason == "length":
            full = result.prompt_tokens + result.completion_tokens >= self.model.context
            yield "cut off: the context is full" if full else "cut off at --max-tokens"
        times = result.timings
        yield (
            f"{result.completion_tokens} tokens, {times.decode_tokens_per_s:.0f} tokens/s; "
            f"first token after {1000 * times.first_token_s:.0f} ms"
        )

    # ---- commands ------------------------------------------------------------------------------------------

    def _clear(self, _: str) -> None:
        self.session.clear()
        output.say("[the conversation is forgotten]")

    def _system(self, text: str) -> None:
        if not text:
            output.say(self.system if self.system is not None else "[no system message]")
            return
        rest = [message for message in self.session.messages if message["role"] != "system"]
        self.system = None if text == "-" else text
        self.session.close()
        self.session = self.model.session(self.system)
        self.session.messages += rest
        output.say(
            "[the system message is removed]" if self.system is None else "[the system message is set]"
        )

    def _set(self, text: str) -> None:
        params = self.model.defaults.updated(self.sampling)
        if not text:
            for name, value in vars(params).items():
                output.say(f"{name} = {json.dumps(value)}")
            return
        name, _, given = text.partition(" ")
        name = name.replace("-", "_")
        params.updated({name: (value := parse_value(name, given.strip()))})
        self.sampling[name] = value
        output.say(f"[{name} = {json.dumps(value)}]")

    def _stats(self, _: str) -> None:
        for label, value in self.figures():
            output.say(f"{label:<14}{value}")

    def figures(self) -> Iterator[tuple[str, str]]:
        """Label and value of every line of /stats."""
        from gristmill.bench.host import peak_rss_bytes
        from gristmill.terminal.tables import size

        held = len(self.session.tokens)
        yield "model", self._about()
        yield "turns", f"{len(self.results)}, {len(self.session.messages)} messages remembered"
        yield "context", f"{held} of {self.model.context} tokens hold keys and values"
        if self.results:
            last = self.results[-1]
            times = last.timings
            yield "generated", f"{sum(result.completion_tokens for result in self.results)} tokens in all"
            yield (
                "last prompt",
                f"{last.prompt_tokens} tokens, {last.cached_tokens} of them kept from before; "
                f"{times.prefill_tokens_per_s:.0f} tokens/s, first token after "
                f"{1000 * times.first_token_s:.0f} ms",
            )
            yield (
                "last answer",
                f"{last.completion_tokens} tokens, {times.decode_tokens_per_s:.1f} tokens/s",
            )
        yield "memory", f"{size(peak_rss_bytes())} at most"

    def _save(self, name: str) -> None:
        if not name:
            raise UsageError("/save needs the name of a file")
        path = Path(name).expanduser()
        try:
            path.write_text(
                json.dumps(self.session.messages, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        except OSError as error:
            raise GristmillError(f"cannot write {name}: {error.strerror or error}") from None
        output.say(f"[{len(self.session.messages)} messages written to {name}]")

    def _about(self) -> str:
        model = self.model
        return (
            f"{model.name}, weights {model.weights}, activations {model.activations}, KV {model.kv_dtype}, "
            f"{model.executor.threads} threads, context {model.context}"
        )


def _leave(_: str) -> None:
    raise Leave


def parse_value(name: str, text: str) -> Any:
    """The value of a sampling parameter as typed; SamplingParams judges it. A stop text may be quoted."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if name == "stop" and not text.startswith('"'):
        return (text,) if text else ()
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return (value,) if name == "stop" else value


@contextmanager
def _interrupt_sets(flag: CancelFlag) -> Iterator[None]:
    """Within, Ctrl-C sets the flag and does nothing else."""

    def interrupted(number: int, frame: FrameType | None) -> None:
        flag.set()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


class _Lines:
    """Messages from standard input; at a terminal with line editing, and the lines typed in earlier chats."""

    def __init__(self, history: bool) -> None:
        self._typed = _is_terminal(sys.stdin)
        self._editing = self._typed and _is_terminal(sys.stdout)
        self._readline: ModuleType | None = None
        self._keep = history
        if self._editing:
            with suppress(ImportError):
                # Importing it is what gives `input` line editing.
                import readline

                self._readline = readline

    def __enter__(self) -> _Lines:
        if self._readline is not None and self._keep:
            with suppress(OSError):
                self._readline.read_history_file(_history_file())
        return self

    def __exit__(self, *exc: object) -> None:
        if self._readline is None or not self._keep:
            return
        path = _history_file()
        # A conversation must not fail because its history cannot be kept.
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            # For nobody else to read: it holds what was typed.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            self._readline.set_history_length(_HISTORY_LINES)
            self._readline.write_history_file(path)

    def message(self) -> str | None:
        """The next message; None at the end of the input. UsageError for what is not UTF-8, over a pipe."""
        while True:
            try:
                line = self._line(PROMPT)
                if line is None or not line.startswith(QUOTES):
                    return line
                return self._block(line)
            except UnicodeError:
                error = UsageError("the input is not UTF-8")
                if not self._typed:
                    raise error from None
                output.complain(str(error))

    def _block(self, line: str) -> str:
        lines = [line[len(QUOTES) :]]
        while not lines[-1].rstrip().endswith(QUOTES):
            more = self._line(MORE)
            if more is None:
                return "\n".join(lines).strip("\n")
            lines.append(more)
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        if self._editing:
            try:
                line = input(prompt)
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print()
                raise
            line.encode("utf-8")
            return line
        if self._typed:
            print(prompt, end="", file=sys.stderr, flush=True)
        data = sys.stdin.buffer.readline() if sys.stdin is not None else b""
        return data.decode("utf-8").rstrip("\r\n") if data else None


def _history_file() -> Path:
    from gristmill.io import cache

    return cache.root() / "chat_history"
