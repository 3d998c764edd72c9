"""Runs a model and its base over the same text, window by window, and compares their logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError, UsageError
from gristmill.evaluate.metrics import Quality
from gristmill.evaluate.text import read_text, windows
from gristmill.program.batch import GENERATED, MAX_STEP_TOKENS, PROMPT, Batch, Executor, KVView

if TYPE_CHECKING:
    from gristmill.io.checkpoint import Progress
    from gristmill.io.lora import Adapters, Strengths
    from gristmill.io.tokenizer import Tokenizer

WINDOW = 512
PHASES = {"prompt": PROMPT, "generated": GENERATED}
_LOGIT_BYTES = 1 << 26
"""Most bytes of logits that one step of an executor returns."""


def run(
    model: str | Path,
    base: str | Path | None = None,
    *,
    text: str | Path | None = None,
    tokens: int = 4096,
    window: int = WINDOW,
    weights: str = "stored",
    activations: str | None = None,
    kv_dtype: str | None = None,
    phase: str = "generated",
    base_weights: str = "f32",
    base_activations: str = "exact",
    base_kv: str = "f32",
    threads: int | None = None,
    lora: Adapters = (),
    lora_strength: Strengths = 1.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compares a model in one mode with a base, in one process and without PyTorch.

    model, base: names as everywhere (base None: the same model). text: a UTF-8 file, or None for CPython's
    `pydoc_data.topics`. The first `tokens` tokens are read in independent windows of `window` tokens; every
    position of a window is compared over the whole vocabulary, and every token but a window's first counts
    for the perplexity. phase: whether the model takes the text as `prompt` or as `generated` tokens, whose
    arithmetic may differ (docs/arithmetic.md).

    lora: adapters of the model, not of the base.

    Returns the figures of `Quality.figures` and what they are of: text, text_sha256, window, windows, model,
    base, phase, modes, base_modes, weight_bytes, bits_per_weight.

    Raises UsageError for a value out of range and ModelError for models that cannot be compared.
    """
    from gristmill.bench.subject import Subject

    if not 2 <= window <= 1 << 20:
        raise UsageError(f"the window must be at least 2 tokens, not {window}")
    if not 2 <= tokens <= 1 << 31:
        raise UsageError(f"evaluate needs at least 2 tokens, not {tokens}")
    if phase not in PHASES:
        raise UsageError(f"phase must be one of {', '.join(PHASES)}, not {phase!r}")
    source = read_text(text)
    base = model if base is None else base
    with (
        Subject.load(
            model,
            weights=weights,
            activations=activations,
            kv_dtype=kv_dtype,
            threads=threads,
            lora=lora,
            lora_strength=lora_strength,
            progress=progress,
        ) as ours,
        Subject.load(
            base,
            weights=base_weights,
            activations=base_activations,
            kv_dtype=base_kv,
            threads=threads,
            progress=progress,
        ) as theirs,
    ):
        longest = min(window, *(s.context for s in (ours, theirs)))
        tokenizer = _shared_tokenizer(ours.tokenizer(), theirs.tokenizer(), source.content)
        pieces = windows(tokenizer, source, tokens, longest)
        figures = compare(ours.executor, theirs.executor, pieces, progress, phase=PHASES[phase])
        return {
            **figures,
            "text": source.name,
            "text_sha256": source.sha256,
            "window": longest,
            "windows": len(pieces),
            "model": ours.name,
            "base": theirs.name,
            "phase": phase,
            "modes": ours.modes(),
            "base_modes": theirs.modes(),
            "weight_bytes": ours.weight_bytes,
            "bits_per_weight": ours.bits_per_weight,
            "threads": ours.executor.threads,
        }


def compare(
    model: Executor,
    base: Executor,
    pieces: Sequence[NDArray[np.int32]],
    progress: Progress | None = None,
    *,
    phase: int = GENERATED,
) -> dict[str, Any]:
    """The figures of `Quality.figures` for two executors over token windows, each a sequence of its own.

    Memory is bounded: no more than 64 MB of logits of either model are held at a time (16 rows, if they are
    larger). ModelError if the vocabularies differ.
    """
    if model.vocab_size != base.vocab_size:
        raise ModelError(
            f"the model has {model.vocab_size} logits and the base {base.vocab_size}: they cannot be compared"
        )
    quality = Quality()
    # Prompts are cut at multiples of 16 tokens, as the decoding loop does.
    step = int(np.clip(_LOGIT_BYTES // (4 * model.vocab_size) // 16, 1, MAX_STEP_TOKENS // 16)) * 16
    total = sum(len(piece) for piece in pieces)
    done = 0
    for piece in pieces:
        ours, theirs = model.allocate(len(piece)), base.allocate(len(piece))
        try:
            for start in range(0, len(piece), step):
                ids = np.ascontiguousarray(piece[start : start + step])
                following = np.full(len(ids), -1, np.int64)
                known = piece[start + 1 : start + 1 + len(ids)]
                following[: len(known)] = known
                quality.add(_read(base, theirs, ids, phase), _read(model, ours, ids, phase), following)
                done += len(ids)
                if progress:
                    progress("evaluating", done, total)
            quality.end_piece()
        finally:
            ours.close()
            theirs.close()
    return quality.figures()


def _read(executor: Executor, view: KVView, ids: NDArray[np.int32], phase: int) -> NDArray[np.float32]:
    """Appends tokens of a phase to a sequence: their logits [T, vocab]."""
    count = len(ids)
    return executor.step(
        Batch(
            tokens=ids,
            lengths=np.array([count], np.int32),
            views=(view,),
            logit_rows=np.arange(count, dtype=np.int32),
            phases=np.full(count, phase, np.uint8),
        )
    )


def _shared_tokenizer(ours: Tokenizer, theirs: Tokenizer, text: str) -> Tokenizer:
    """The base's tokenizer, once it is seen to write the text as the model's does."""
    sample = text[:20_000]
    if ours.encode(sample) != theirs.encode(sample):
        raise ModelError("the model and the base have different tokenizers: their logits cannot be compared")
    return theirs
