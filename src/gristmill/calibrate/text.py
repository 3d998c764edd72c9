"""The tokens that a model is calibrated on: from CPython's topics, a file, or the model's own samples."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gristmill.errors import UsageError
from gristmill.evaluate.text import Text, begin_tokens, builtin_text, read_text

if TYPE_CHECKING:
    from gristmill.io.checkpoint import Progress
    from gristmill.io.tokenizer import Tokenizer

TOPICS, SELF = "topics", "self"
_AT_ONCE = 16
"""Samples drawn together."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Token sequences, and where they come from."""

    name: str
    """What a report calls the text."""
    ids: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.ids))

    def report(self) -> dict[str, Any]:
        """What every figure that rests on the sequences has to name; the SHA-256 is of their token ids."""
        digest = hashlib.sha256()
        for ids in self.ids:
            digest.update(np.array([len(ids), *ids], "<i4").tobytes())
        return {
            "text": self.name,
            "tokens": self.tokens,
            "sequences": len(self.ids),
            "ids_sha256": digest.hexdigest(),
        }


@dataclass(frozen=True)
class CalibrationText:
    """What to calibrate on. The same values give the same sequences; a wrong one raises UsageError.

    Evaluations read `pydoc_data.topics` from its start (`evaluate.text`). `topics` is the second half of that
    text, without paragraphs that the first half holds too, so that both are disjoint as long as an evaluation
    stays within the first half (230,000 characters). A file is taken as it is: evaluate on another one.
    """

    source: str | Path = TOPICS
    """`topics`, `self` for samples of the model itself, or a UTF-8 file."""
    tokens: int = 8192
    """At least that many are read, in whole sequences."""
    sequence: int = 512
    """Tokens of every sequence, begin tokens included; no more than `tokens`."""
    seed: int = 0
    """Chooses the windows of a text, and what is sampled."""

    def __post_init__(self) -> None:
        if not 2 <= self.tokens <= 1 << 26:
            raise UsageError(f"a calibration reads 2 to {1 << 26} tokens, not {self.tokens}")
        if not 2 <= self.sequence <= 1 << 20:
            raise UsageError(f"a calibration sequence has 2 to {1 << 20} tokens, not {self.sequence}")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"the seed of a calibration must be from 0 and below 2**63, not {self.seed}")

    @property
    def length(self) -> int:
        """Tokens of every sequence."""
        return min(self.sequence, self.tokens)

    @property
    def count(self) -> int:
        """Number of sequences."""
        return -(-self.tokens // self.length)

    def read(
        self, model: str | Path, *, threads: int | None = None, progress: Progress | None = None
    ) -> Sequences:
        """The sequences for a model, given as everywhere by its name or path.

        Samples are drawn by the native engine in the model's default mode at temperature 1, each from a
        random ordinary token on (behind the begin token if the model asks for one) and past end tokens; they
        do not depend on `threads`. Raises UsageError for a file that is missing, not UTF-8 or too short, and
        for sequences beyond the model's context; ModelError for a model that cannot be read.
        """
        from gristmill.io.convert import prepare
        from gristmill.io.json_file import read_object
        from gristmill.io.tokenizer import Tokenizer
        from gristmill.models import read_config

        text = None if self.source == SELF else _topics() if self.source == TOPICS else read_text(self.source)
        path = prepare(model, progress=progress)
        context = read_config(read_object(path / "config.json")).max_positions
        if self.length > context:
            raise UsageError(
                f"calibration sequences of {self.length} tokens are beyond the model's {context}"
            )
        if text is None:
            return self._sample(model, threads, progress)
        return self.cut(Tokenizer.load(path), text)

    def cut(self, tokenizer: Tokenizer, text: Text) -> Sequences:
        """Windows of a text that do not overlap, chosen by the seed; UsageError if there are too few.

        Of a long text only the beginning is looked at: 64 characters for every token that is wanted.
        """
        begin = begin_tokens(tokenizer)
        body = self.length - len(begin)
        cut = text.content[: 64 * self.tokens]
        ids = tokenizer.encode(cut, add_special=False)
        if len(ids) < self.count * body and len(cut) < len(text.content):
            ids = tokenizer.encode(text.content, add_special=False)
        if len(ids) < self.count * body:
            raise UsageError(
                f"the text {text.name} has only {len(ids)} tokens: {self.count} calibration sequences of "
                f"{self.length} need {self.count * body}"
            )
        places = np.random.default_rng(self.seed).permutation(len(ids) // body)[: self.count]
        starts = sorted(body * int(place) for place in places)
        return Sequences(text.name, tuple((*begin, *ids[at : at + body]) for at in starts))

    def _sample(self, model: str | Path, threads: int | None, progress: Progress | None) -> Sequences:
        from gristmill.bench.subject import Subject
        from gristmill.engine.loop import Runner
        from gristmill.engine.sampling import SamplingParams

        random = np.random.default_rng(self.seed)
        with Subject.load(model, threads=threads) as subject:
            tokenizer, executor = subject.tokenizer(), subject.executor
            engine = Runner(executor, tokenizer, context=self.length, pool=executor.pool)
            ordinary = [
                i
                for i in range(executor.vocab_size)
                if i not in tokenizer.special_ids and tokenizer.token_bytes(i)
            ]
            begin = begin_tokens(tokenizer)
            sequences = [
                engine.begin(
                    [*begin, start],
                    SamplingParams(temperature=1.0, seed=self.seed + i, ignore_eos=True),
                )
                for i, start in enumerate(random.choice(ordinary, self.count).tolist())
            ]
            with closing(engine.steps(sequences, at_once=_AT_ONCE)) as steps:
                for _ in steps:
                    if progress:
                        done = sum(len(one.prompt) + len(one.token_ids) for one in sequences)
                        progress("sampling", done, self.count * self.length)
            ids = tuple((*one.prompt.tolist(), *one.token_ids) for one in sequences)
            return Sequences(f"samples of {subject.name}, seed {self.seed}", ids)


def _topics() -> Text:
    """The second half of the built-in text, but for paragraphs that came before."""
    whole = builtin_text()
    middle = whole.content.index("\n\n", len(whole.content) // 2)
    first, second = (half.split("\n\n") for half in (whole.content[:middle], whole.content[middle + 2 :]))
    # Topics quote one another, indented differently.
    seen = {" ".join(p.split()) for p in first}
    fresh: dict[str, str] = {}
    for paragraph in second:
        words = " ".join(paragraph.split())
        if words not in seen:
            fresh.setdefault(words, paragraph)
    return Text(f"second half of {whole.name}, without what is in the first", "\n\n".join(fresh.values()))
