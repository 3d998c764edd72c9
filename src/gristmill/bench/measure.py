"""Prefill and decode speed of one model in one mode, with the roofline measured in between."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gristmill.bench.host import load_average, machine, peak_rss_bytes
from gristmill.bench.roofline import bandwidth_probe, decode_cost, prefill_cost
from gristmill.bench.subject import Subject
from gristmill.errors import UsageError
from gristmill.program.batch import GENERATED, PROMPT, Batch, Executor, KVView

if TYPE_CHECKING:
    from gristmill.io.checkpoint import Progress

DECODE_STEPS = 64
FIRST_PROMPT = 32
_SEED = 20


def run(
    model: str | Path,
    *,
    weights: str = "stored",
    activations: str | None = None,
    kv_dtype: str | None = None,
    threads: int | None = None,
    prefill: Sequence[int] = (512,),
    decode: Sequence[tuple[int, int]] = ((1, 512), (16, 64), (16, 512)),
    repeats: int = 5,
    decode_steps: int = DECODE_STEPS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a model: the executor's steps, with the greedy choice of every next token.

    prefill: prompt lengths. decode: (batch, context) pairs; each sequence holds `context` tokens when the
    clock starts and generates `decode_steps` more. Every shape runs once unmeasured, then all shapes take
    turns `repeats` times, with a bandwidth probe of the same footprint before each decode; figures are
    medians over the turns.

    Returns plain JSON data: machine, model, modes, prefill, decode, load_s (checkpoint opened and weights
    ready; conversion is not counted), first_token_s (from handing over a first prompt of 32 tokens, all cold,
    to its next token), peak_rss_bytes (of this process, all shapes above held at once, before any probe),
    weight_bytes. roofline_fraction is the time that the step's bytes take at the probe's rate over the time
    they took. generate_tokens_per_s, at batch 1, is what `Model.generate` reaches on the same tokens: the
    loop, the sampler and the detokenizer included.

    Raises UsageError for shapes that the model's context or the options do not allow.
    """
    if repeats < 1 or decode_steps < 1:
        raise UsageError("bench needs at least one repeat and one decode step")
    if any(count < 1 for count in prefill) or any(b < 1 or c < 1 for b, c in decode):
        raise UsageError(
            "bench needs prompts of at least 1 token, batches of at least 1 and contexts of at least 1"
        )
    with Subject.load(
        model, weights=weights, activations=activations, kv_dtype=kv_dtype, threads=threads, progress=progress
    ) as subject:
        longest = max([*prefill, *(c + decode_steps for _, c in decode)], default=0)
        if longest > subject.context:
            raise UsageError(f"{longest} tokens are more than the model's context of {subject.context}")
        return _measure(
            subject,
            prefill,
            decode,
            kv_dtype=kv_dtype,
            repeats=repeats,
            decode_steps=decode_steps,
            progress=progress,
        )


def _measure(
    subject: Subject,
    prefill: Sequence[int],
    decode: Sequence[tuple[int, int]],
    *,
    kv_dtype: str | None,
    repeats: int,
    decode_steps: int,
    progress: Progress | None,
) -> dict[str, Any]:
    executor = subject.executor
    total = (len(prefill) + len(decode)) * (repeats + 1)
    done = 0

    def advance(label: str) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(label, done, total)

    first = Sequences(executor, 1, FIRST_PROMPT)
    first_s = first.prefill(FIRST_PROMPT)
    first.close()
    prompts = [Sequences(executor, 1, count) for count in prefill]
    batches = [Sequences(executor, batch, context + decode_steps) for batch, context in decode]
    for count, prompt in zip(prefill, prompts, strict=True):
        prompt.prefill(count)
        advance("warming up")
    for (_, context), sequences in zip(decode, batches, strict=True):
        sequences.decode(context, decode_steps)
        advance("warming up")
    peak = peak_rss_bytes()

    probe = bandwidth_probe(executor.level, executor.threads)
    costs = [
        decode_cost(
            executor.program,
            batch,
            context,
            decode_steps,
            weight_bytes=subject.stored_bytes,
            kv_dtype=kv_dtype,
        )
        for batch, context in decode
    ]
    prefill_s: list[list[float]] = [[] for _ in prefill]
    decode_s: list[list[float]] = [[] for _ in decode]
    rates: list[list[float]] = [[] for _ in decode]
    generate_rates: list[list[float]] = [[] for _ in decode]
    model = subject.model()
    for _ in range(repeats):
        for times, count, prompt in zip(prefill_s, prefill, prompts, strict=True):
            times.append(prompt.prefill(count))
            advance(f"prefill {count}")
        for i, ((batch, context), sequences) in enumerate(zip(decode, batches, strict=True)):
            rates[i].append(probe(int(costs[i].memory_bytes / decode_steps)))
            decode_s[i].append(sequences.decode(context, decode_steps))
            if batch == 1:
                generated = model.generate(
                    sequences.ids(context), max_tokens=decode_steps + 1, temperature=0.0, ignore_eos=True
                )
                generate_rates[i].append(generated.timings.decode_tokens_per_s)
            advance(f"decode {batch} x {context}")
    result = {
        "machine": {**machine(), "load_average": load_average()},
        "model": {"name": subject.name, "parameters": subject.parameters, "context": subject.context},
        "modes": subject.modes(),
        "prefill": [
            {
                "tokens": count,
                "tokens_per_s": count / median(times),
                "operations_per_s": prefill_cost(
                    executor.program, count, chunk_tokens(), weight_bytes=subject.stored_bytes
                ).operations
                / median(times),
                "runs_s": times,
            }
            for count, times in zip(prefill, prefill_s, strict=True)
        ],
        "decode": [
            {
                "batch": batch,
                "context": context,
                "new_tokens": decode_steps,
                "tokens_per_s": batch * decode_steps / median(times),
                **({"generate_tokens_per_s": median(generated)} if generated else {}),
                "bytes_per_step": cost.memory_bytes / decode_steps,
                "bandwidth_bytes_per_s": median(rate),
                "roofline_fraction": cost.memory_bytes / median(rate) / median(times),
                "runs_s": times,
            }
            for (batch, context), times, rate, generated, cost in zip(
                decode, decode_s, rates, generate_rates, costs, strict=True
            )
        ],
        "repeats": repeats,
        "load_s": subject.load_s,
        "first_token_s": first_s,
        "peak_rss_bytes": peak,
        "weight_bytes": subject.weight_bytes,
    }
    for sequences in (*prompts, *batches):
        sequences.close()
    return result


def chunk_tokens() -> int:
    """Most prompt tokens that go into one step."""
    from gristmill.program.batch import MAX_STEP_TOKENS

    return int(MAX_STEP_TOKENS)


class Sequences:
    """Equal sequences of random tokens under one executor, run again and again from chosen lengths."""

    def __init__(self, executor: Executor, batch: int, capacity: int) -> None:
        self._executor = executor
        self._views: list[KVView] = [executor.allocate(capacity) for _ in range(batch)]
        random = np.random.default_rng(_SEED)
        self._ids = random.integers(0, executor.vocab_size, (batch, capacity), dtype=np.int32)
        self._next = np.zeros(batch, np.int32)

    def ids(self, tokens: int) -> list[int]:
        """The first tokens of the first sequence."""
        return [int(token) for token in self._ids[0, :tokens]]

    def close(self) -> None:
        """Gives the sequences' memory back."""
        for view in self._views:
            view.close()

    def prefill(self, tokens: int) -> float:
        """Empties the sequences, runs `tokens` tokens of each; seconds until all have a next one."""
        for view in self._views:
            view.truncate(0)
        begin = time.perf_counter()
        for index, view in enumerate(self._views):
            self._prompt(index, view, tokens)
        return time.perf_counter() - begin

    def _prompt(self, index: int, view: KVView, tokens: int) -> None:
        chunk = chunk_tokens()
        for start in range(0, tokens, chunk):
            ids = self._ids[index, start : min(start + chunk, tokens)]
            count = len(ids)
            wanted = [count - 1] if start + count == tokens else []
            logits = self._executor.step(
                Batch(
                    tokens=ids,
                    lengths=np.array([count], np.int32),
                    views=(view,),
                    logit_rows=np.array(wanted, np.int32),
                    phases=np.full(count, PROMPT, np.uint8),
                )
            )
        self._next[index] = logits[-1].argmax()

    def decode(self, context: int, steps: int) -> float:
        """Seconds for `steps` steps of all sequences, each with `context` tokens when the clock starts."""
        self._rewind(context)
        count = len(self._views)
        tokens = self._next.copy()
        lengths = np.ones(count, np.int32)
        rows: NDArray[np.int32] = np.arange(count, dtype=np.int32)
        phases = np.full(count, GENERATED, np.uint8)
        views = tuple(self._views)
        begin = time.perf_counter()
        for _ in range(steps):
            logits = self._executor.step(Batch(tokens, lengths, views, rows, phases))
            tokens = logits.argmax(-1).astype(np.int32)
        return time.perf_counter() - begin

    def _rewind(self, context: int) -> None:
        """Brings every sequence to `context` tokens: shortened where its state allows it, else run anew."""
        for index, view in enumerate(self._views):
            if view.length >= context:
                try:
                    view.truncate(context)
                    continue
                except UsageError:
                    pass  # a sliding window has moved past these keys
            view.truncate(0)
            self._prompt(index, view, context)
