"""The program every peer's environment runs: load once, then answer requests, one JSON object a line.

A worker reads requests on stdin and writes one reply for each on what was stdout when it started; anything
a library prints goes to stderr instead, so replies cannot be broken up. Requests:

``{"op": "load", "model": ..., "mode": ..., "threads": n, "options": {...}}``
    -> ``{"ok": true, "versions": {...}, "notes": [...], "weights_bytes": n, "load_seconds": s}``
``{"op": "prefill", "prompt": [ids]}``
    -> ``{"ok": true, "seconds": s, "tokens": n}``
``{"op": "decode", "prompts": [[ids], ...], "new_tokens": n}``
    -> ``{"ok": true, "prefill_seconds": s, "seconds": s, "tokens": n}``: ``tokens`` counts, over all
    sequences, the tokens whose time is in ``seconds``
``{"op": "generate", "prompts": [[ids], ...], "new_tokens": n}``
    -> ``{"ok": true, "seconds": s, "tokens": n}``: all of it, through the public interface
``{"op": "roofline", "batch": n, "context": n, "new_tokens": n}``
    -> ``{"ok": true, "bytes_per_step": n, "bytes_per_second": n}``
``{"op": "logits", "tokens": [ids], "output": "file.npy"}``
    -> ``{"ok": true}``; the file holds float32 [tokens, vocab], logits or log-probabilities
``{"op": "continue", "prompts": [[ids], ...], "new_tokens": n}``
    -> ``{"ok": true, "ids": [[ids], ...], "texts": [...]}``: the greedy continuations, past end tokens
``{"op": "quit"}``
    -> the process ends.

A request that fails is answered with ``{"ok": false, "kind": "unsupported" | "error", "reason": "..."}`` and
the worker lives on. Between requests a worker blocks in a read, so that its peers have the machine for
themselves.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO


class UnsupportedError(Exception):
    """The peer has no way to do what was asked; the message says why."""


class Worker(ABC):
    """One peer in one mode. Subclasses keep the loaded model on ``self``."""

    notes: list[str]

    def __init__(self) -> None:
        self.notes = []
        self.load_seconds: float | None = None
        """Where a load may convert files first: the part that every load takes."""

    @abstractmethod
    def load(self, model: Path, mode: str, threads: int, options: dict[str, Any]) -> int:
        """Load the model, ready to run on ``threads`` threads; return the bytes its weights take."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of the packages that do the work."""

    @abstractmethod
    def prefill(self, prompt: Sequence[int]) -> float:
        """Seconds from handing over ``prompt`` to having the next token's logits (or that token)."""

    @abstractmethod
    def decode(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float, int]:
        """Run ``prompts`` as one batch and generate ``new_tokens`` greedily for each, ignoring end tokens.

        Returns (seconds until every sequence has its first token, seconds from there to the last token,
        tokens generated in the second span over all sequences).
        """

    @abstractmethod
    def logits(self, tokens: Sequence[int]) -> Any:
        """float32 array [tokens, vocab]: logits (or log-probabilities) of the next token at each position."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Seconds for the greedy continuation of all prompts by ``new_tokens``, text included."""
        raise UnsupportedError("only gristmill's public interface is measured beside its steps")

    def continuations(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[list[int], str]]:
        """The greedy continuation of every prompt by ``new_tokens``: its ids, and their text."""
        raise UnsupportedError("texts are compared between gristmill and Transformers only")

    def roofline(self, batch: int, context: int, new_tokens: int) -> tuple[float, float]:
        """(bytes that a decode step has to move, bytes a second this process reads of as many)."""
        raise UnsupportedError("the bytes that a step moves are counted for gristmill only")


def package_versions(*names: str) -> dict[str, str]:
    """Installed versions of the distributions called ``names``."""
    return {name: metadata.version(name) for name in names}


def tree_bytes(path: Path, *suffixes: str) -> int:
    """Bytes of the files below ``path`` (or of the file ``path``) that end in one of ``suffixes``."""
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file() and item.suffix in suffixes)


def _answer(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    operation = request["op"]
    if operation == "load":
        start = time.perf_counter()
        size = worker.load(Path(request["model"]), request["mode"], request["threads"], request["options"])
        return {
            "versions": worker.versions(),
            "notes": worker.notes,
            "weights_bytes": size,
            "load_seconds": worker.load_seconds or time.perf_counter() - start,
        }
    if operation == "prefill":
        return {"seconds": worker.prefill(request["prompt"]), "tokens": len(request["prompt"])}
    if operation == "decode":
        first, rest, tokens = worker.decode(request["prompts"], request["new_tokens"])
        return {"prefill_seconds": first, "seconds": rest, "tokens": tokens}
    if operation == "generate":
        seconds = worker.generate(request["prompts"], request["new_tokens"])
        return {"seconds": seconds, "tokens": len(request["prompts"]) * request["new_tokens"]}
    if operation == "roofline":
        size, rate = worker.roofline(request["batch"], request["context"], request["new_tokens"])
        return {"bytes_per_step": size, "bytes_per_second": rate}
    if operation == "continue":
        found = worker.continuations(request["prompts"], request["new_tokens"])
        return {"ids": [ids for ids, _ in found], "texts": [text for _, text in found]}
    if operation == "logits":
        import numpy as np

        values = np.ascontiguousarray(worker.logits(request["tokens"]), dtype=np.float32)
        if values.shape[0] != len(request["tokens"]):
            raise RuntimeError(f"{len(request['tokens'])} tokens gave logits of shape {values.shape}")
        np.save(request["output"], values)
        return {}
    raise ValueError(f"unknown operation {operation!r}")


def _claim_stdout() -> TextIO:
    """A private handle on stdout; file descriptor 1 then leads to stderr for everyone else."""
    private = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return private


def serve(make: Callable[[], Worker]) -> None:
    """Answer requests until ``quit`` or the end of stdin."""
    replies = _claim_stdout()
    worker = make()
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "quit":
            break
        try:
            reply = {"ok": True, **_answer(worker, request)}
        except UnsupportedError as error:
            reply = {"ok": False, "kind": "unsupported", "reason": str(error)}
        except Exception as error:
            traceback.print_exc()
            text = " ".join(str(error).split())
            reply = {"ok": False, "kind": "error", "reason": f"{type(error).__name__}: {text}"[:600]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    # Some runtimes hang or crash in their destructors; there is nothing left to save.
    os._exit(0)
