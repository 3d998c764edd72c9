"""gristmill: its native executor stepped with the greedy choice, and the public interface beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from worker import Worker, package_versions, serve

from gristmill.bench.measure import chunk_tokens
from gristmill.bench.roofline import bandwidth_probe, decode_cost
from gristmill.bench.subject import Subject
from gristmill.program.batch import GENERATED, PROMPT, Batch, KVView

ROOM = 64
"""Tokens that views are rounded up to."""


class GristmillWorker(Worker):
    """A model in one mode. The views of every shape of request are kept, as llama.cpp keeps its contexts."""

    def load(self, model: Path, mode: str, threads: int, options: dict[str, Any]) -> int:
        kept = ("activations", "kv_dtype")
        chosen = {name: options[name] for name in kept if name in options}
        self.kv_dtype = options.get("kv_dtype")
        weights = options.get("weights", mode)
        self.subject = Subject.load(str(model), weights=weights, threads=threads, **chosen)
        self.load_seconds = self.subject.load_s
        self.executor = self.subject.executor
        self.kept: dict[tuple[int, int], list[KVView]] = {}
        modes = self.subject.modes()
        self.notes = [", ".join(f"{name} {value}" for name, value in modes.items() if name != "weights")]
        self.probe = bandwidth_probe(self.executor.level, self.executor.threads)
        return self.subject.weight_bytes

    def versions(self) -> dict[str, str]:
        return package_versions("gristmill", "numpy")

    def _views(self, count: int, tokens: int) -> list[KVView]:
        shape = (count, (tokens + ROOM - 1) // ROOM * ROOM)
        if shape not in self.kept:
            self.kept[shape] = [self.executor.allocate(shape[1]) for _ in range(count)]
        for view in self.kept[shape]:
            view.truncate(0)
        return self.kept[shape]

    def _prompts(self, views: Sequence[KVView], prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Runs whole prompts, as many in a step as fit; the next token of each."""
        length, chunk = len(prompts[0]), chunk_tokens()
        together = max(1, chunk // length)
        best = []
        for base in range(0, len(prompts), together):
            group = prompts[base : base + together]
            for start in range(0, length, chunk):
                part = np.asarray([prompt[start : start + chunk] for prompt in group], np.int32)
                count, width = part.shape
                last = start + width == length
                rows = np.arange(count) * width + width - 1 if last else np.zeros(0)
                logits = self.executor.step(
                    Batch(
                        tokens=part.reshape(-1),
                        lengths=np.full(count, width, np.int32),
                        views=tuple(views[base : base + count]),
                        logit_rows=rows.astype(np.int32),
                        phases=np.full(part.size, PROMPT, np.uint8),
                    )
                )
            best.append(logits.argmax(-1))
        return np.concatenate(best).astype(np.int32)

    def prefill(self, prompt: Sequence[int]) -> float:
        views = self._views(1, len(prompt))
        start = time.perf_counter()
        self._prompts(views, [prompt])
        return time.perf_counter() - start

    def decode(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float, int]:
        count = len(prompts)
        views = self._views(count, len(prompts[0]) + new_tokens)
        start = time.perf_counter()
        tokens = self._prompts(views, prompts)
        middle = time.perf_counter()
        ones, rows = np.ones(count, np.int32), np.arange(count, dtype=np.int32)
        phases = np.full(count, GENERATED, np.uint8)
        group = tuple(views)
        for _ in range(new_tokens - 1):
            logits = self.executor.step(Batch(tokens, ones, group, rows, phases))
            tokens = logits.argmax(-1).astype(np.int32)
        end = time.perf_counter()
        return middle - start, end - middle, (new_tokens - 1) * count

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        model = self.subject.model()
        start = time.perf_counter()
        model.generate_batch(prompts, raw=True, max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        return time.perf_counter() - start

    def continuations(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[list[int], str]]:
        model = self.subject.model()
        kind = {"raw": True, "max_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True}
        found = [model.generate(prompt, **kind) for prompt in prompts]
        return [(result.token_ids, result.text) for result in found]

    def roofline(self, batch: int, context: int, new_tokens: int) -> tuple[float, float]:
        # The first new token is the prompt's; the steps after it begin with the context full.
        steps = new_tokens - 1
        cost = decode_cost(
            self.executor.program,
            batch,
            context,
            steps,
            weight_bytes=self.subject.stored_bytes,
            kv_dtype=self.kv_dtype,
        )
        size = cost.memory_bytes / steps
        return size, self.probe(int(size))

    def logits(self, tokens: Sequence[int]) -> Any:
        views = self._views(1, len(tokens))
        parts = []
        for start in range(0, len(tokens), chunk_tokens()):
            ids = np.asarray(tokens[start : start + chunk_tokens()], np.int32)
            count = len(ids)
            batch = Batch(
                tokens=ids,
                lengths=np.array([count], np.int32),
                views=tuple(views),
                logit_rows=np.arange(count, dtype=np.int32),
                # As `gristmill evaluate` reads a text.
                phases=np.full(count, GENERATED, np.uint8),
            )
            parts.append(self.executor.step(batch))
        return np.concatenate(parts)


if __name__ == "__main__":
    serve(GristmillWorker)
