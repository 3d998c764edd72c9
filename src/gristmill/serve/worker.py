"""Helper processes: chat templates, long texts and grammars, away from the event loop and the engine.

A helper is a child process that answers one question at a time, as JSON with a length before it, over its
standard streams. One that takes too long is killed and replaced; the question then has an error for an
answer, and nothing else is disturbed. A helper ends when its server does.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gristmill.engine.request import QueueFull
from gristmill.errors import GristmillError, TemplateError, UsageError
from gristmill.serve.constraints import Constraints, ConstraintSpec
from gristmill.serve.tools import begins_in_reasoning

__all__ = ["HelperPool", "Rendered"]

SHORT_TEXT = 4096
"""Characters that are tokenized on the spot."""
SECONDS = {"render": 3.0, "tokenize": 20.0, "constraint": 3.0}
"""Until a helper is given up. Templates and grammars have limits of their own below these."""
LONG = 1 << 15
"""Bytes of a question that is long: of text, 0.05 s."""
MAX_PENDING = 512
START_SECONDS = 30.0
_CLOSED = "the helper processes have been closed"
_MAX_MESSAGE = 1 << 28


@dataclass(frozen=True)
class Rendered:
    """Messages in the chat template."""

    ids: list[int]
    """Token ids."""
    in_reasoning: bool
    """The answer begins inside the reasoning, which the template has opened."""


class HelperPool:
    """Helpers for one model. Used in one event loop.

    Long questions leave one of them to the others, so that a prompt of 100,000 tokens (0.5 s) makes no short
    one wait. A single helper answers what is short before what is long.
    """

    def __init__(self, directory: Path, vocab_size: int, workers: int = 1) -> None:
        """directory: of the checkpoint, for its tokenizer."""
        from gristmill.io.tokenizer import Tokenizer

        self._directory = directory
        self._vocab_size = vocab_size
        self._tokenizer = Tokenizer.load(directory)
        self._free: asyncio.Queue[_Helper] = asyncio.Queue()
        self._helpers = [_Helper(directory, vocab_size) for _ in range(workers)]
        self._long = asyncio.Semaphore(max(1, workers - 1))
        self._pending = 0
        self._closed = False
        self.restarts = 0
        """Helpers that had to be replaced."""
        for helper in self._helpers:
            self._free.put_nowait(helper)

    async def start(self) -> None:
        """Starts the helpers, so that the first request does not wait for it."""
        await asyncio.gather(*(helper.start() for helper in self._helpers))

    async def close(self) -> None:
        """Ends the helpers. Questions without an answer, and later ones, fail."""
        self._closed = True
        for helper in self._helpers:
            await helper.close()

    async def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
    ) -> Rendered:
        """Messages in the chat template. TemplateError, UsageError."""
        given = {"messages": list(messages), "tools": tools, "variables": variables}
        return Rendered(**await self._ask("render", given))

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of a text. UsageError."""
        if len(text) <= SHORT_TEXT:
            return self._tokenizer.encode(text, add_special)
        result: list[int] = await self._ask("tokenize", {"text": text, "add_special": add_special})
        return result

    async def check_constraint(self, spec: ConstraintSpec) -> None:
        """UsageError for a constraint that is not valid, or takes too long to compile."""
        await self._ask("constraint", {"kind": spec.kind, "text": spec.text})

    async def _ask(self, what: str, given: dict[str, Any]) -> Any:
        if self._pending >= MAX_PENDING:
            raise QueueFull("too many texts wait to be prepared", retry_after=1.0)
        self._pending += 1
        try:
            data = json.dumps({"what": what, **given}).encode()
            if len(data) < LONG:
                return await self._ask_one(what, data)
            async with self._long:
                return await self._ask_one(what, data)
        finally:
            self._pending -= 1

    async def _ask_one(self, what: str, data: bytes) -> Any:
        helper = await self._free.get()
        try:
            if self._closed:
                raise GristmillError(_CLOSED)
            return await helper.ask(what, data)
        except _Lost as error:
            if self._closed:
                raise GristmillError(_CLOSED) from None
            self.restarts += 1
            if what == "render":
                raise TemplateError(f"the chat template {error}") from None
            raise UsageError(
                f"the {'constraint on the output' if what == 'constraint' else 'text'} {error}"
            ) from None
        finally:
            self._free.put_nowait(helper)


class _Lost(Exception):
    """A helper that gave no answer."""


class _Helper:
    def __init__(self, directory: Path, vocab_size: int) -> None:
        self._command = [sys.executable, "-m", "gristmill.serve.worker", str(directory), str(vocab_size)]
        self._process: asyncio.subprocess.Process | None = None
        self._closed = False

    async def start(self) -> None:
        """Starts the process and waits until it has the tokenizer."""
        if self._process is not None and self._process.returncode is None:
            return
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the server's to handle
        )
        if self._closed:  # meanwhile
            await self.stop()
            raise GristmillError(_CLOSED)
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._read()
        except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            await self.stop()
            raise GristmillError(f"a helper process does not start: {type(error).__name__}") from None

    async def stop(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    async def close(self) -> None:
        """Ends the process, also one that is just being started."""
        self._closed = True
        await self.stop()

    async def ask(self, what: str, data: bytes) -> Any:
        """One question. Raises _Lost if the helper had to be ended, and what the helper raised."""
        try:
            await self.start()
            assert self._process is not None
            assert self._process.stdin is not None
            async with asyncio.timeout(SECONDS[what]):
                self._process.stdin.write(struct.pack("<I", len(data)) + data)
                await self._process.stdin.drain()
                answer = await self._read()
        except TimeoutError:
            await self.stop()
            raise _Lost("takes too long") from None
        except (asyncio.IncompleteReadError, OSError):
            await self.stop()
            raise _Lost("made its helper process end") from None
        except BaseException:  # cancelled: the answer that comes is nobody's
            await asyncio.shield(self.stop())
            raise
        if "error" in answer:
            kind = {"TemplateError": TemplateError, "UsageError": UsageError}.get(
                answer["kind"], GristmillError
            )
            raise kind(answer["error"])
        return answer["value"]

    async def _read(self) -> Any:
        assert self._process is not None
        answers = self._process.stdout  # the process may be stopped while this waits
        assert answers is not None
        (size,) = struct.unpack("<I", await answers.readexactly(4))
        if size > _MAX_MESSAGE:
            raise OSError("an answer of a helper is too long")
        return json.loads(await answers.readexactly(size))


def _serve(directory: Path, vocab_size: int) -> None:
    """The helper's own loop."""
    from gristmill.io.tokenizer import Tokenizer

    _die_with_parent()
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing may write between the answers
    tokenizer = Tokenizer.load(directory)
    constraints = Constraints(tokenizer, vocab_size)

    def send(value: Any) -> None:
        data = json.dumps(value).encode()
        answers.write(struct.pack("<I", len(data)) + data)
        answers.flush()

    send({"value": "ready"})
    while len(head := questions.read(4)) == 4:
        question = json.loads(questions.read(struct.unpack("<I", head)[0]))
        try:
            send({"value": _answer(question, tokenizer, constraints)})
        except GristmillError as error:
            send({"error": str(error), "kind": type(error).__name__})
        except Exception as error:
            send({"error": f"{type(error).__name__}: {error}"[:300], "kind": "UsageError"})


def _answer(question: dict[str, Any], tokenizer: Any, constraints: Constraints) -> Any:
    if question["what"] == "render":
        options = {name: question[name] for name in ("tools", "variables") if question.get(name)}
        if tokenizer.chat_template is None:
            raise TemplateError("the model has no chat template")
        prompt = tokenizer.chat_template.render(question["messages"], **options)
        return asdict(Rendered(tokenizer.encode_template(prompt), begins_in_reasoning(prompt)))
    if question["what"] == "tokenize":
        return tokenizer.encode(question["text"], question["add_special"])
    constraints.check(ConstraintSpec(question["kind"], question["text"]))
    return None


def _die_with_parent() -> None:
    """Ends this process when the server's ends, however that happens; and bounds its memory."""
    import resource

    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    if sys.platform == "linux":
        import ctypes
        import signal

        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
