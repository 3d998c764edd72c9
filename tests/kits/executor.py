"""What every executor owes: the protocol, and the arithmetic contract bit for bit.

`check_executor` runs all checks on one executor. They compare a token's logits between ways of computing it
that may differ in the batch around it, in where the prompt was cut, and in what was run and forgotten before.
Nothing is compared with a tolerance.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import pytest
from numpy.typing import NDArray

from gristmill.backends.native import NativeExecutor
from gristmill.errors import Cancelled, UsageError
from gristmill.program.batch import GENERATED, PROMPT, Batch, CancelFlag, Executor, KVView

Ids = NDArray[np.int32]
Logits = NDArray[np.float32]


def batch_of(parts: Sequence[tuple[KVView, Ids, int]], rows: Sequence[int] | None = None) -> Batch:
    """A batch of (view, new tokens, phase), with the logits of `rows`, or of all tokens."""
    ids = [np.asarray(p[1], np.int32) for p in parts]
    total = sum(len(i) for i in ids)
    return Batch(
        tokens=np.concatenate([*ids, np.zeros(0, np.int32)]).astype(np.int32),
        lengths=np.array([len(i) for i in ids], np.int32),
        views=tuple(p[0] for p in parts),
        logit_rows=np.arange(total, dtype=np.int32) if rows is None else np.array(rows, np.int32),
        phases=np.concatenate(
            [
                *(np.full(len(i), p[2], np.uint8) for i, p in zip(ids, parts, strict=True)),
                np.zeros(0, np.uint8),
            ]
        ).astype(np.uint8),
    )


def feed(executor: Executor, view: KVView, ids: Ids, chunks: Sequence[int], prompt: int) -> Logits:
    """Logits [tokens, vocab] of `ids` in chunks; those from the index `prompt` on are generated."""
    assert sum(chunks) == len(ids)
    parts, start = [], 0
    for size in chunks:
        piece = ids[start : start + size]
        kinds = [PROMPT if start + i < prompt else GENERATED for i in range(size)]
        batch = batch_of([(view, piece, PROMPT)])
        batch.phases[:] = kinds
        parts.append(executor.step(batch))
        start += size
    return np.concatenate(parts)


def plan(prompt: int, chunk: int, total: int) -> list[int]:
    """A prompt in chunks, then one token at a time."""
    whole = [chunk] * (prompt // chunk) + ([prompt % chunk] if prompt % chunk else [])
    return whole + [1] * (total - prompt)


class Subject:
    """An executor with a few sequences and the logits of each when it is alone, prompt in one piece."""

    def __init__(self, executor: Executor, length: int = 70, prompt: int = 53, seed: int = 0) -> None:
        assert prompt < length
        self.executor = executor
        self.prompt = prompt
        rng = np.random.default_rng([seed, 9])
        sizes = [length, length - 7, length // 2, prompt]
        self.ids = [rng.integers(0, executor.vocab_size, n).astype(np.int32) for n in sizes]
        self.prompts = [min(prompt, max(1, n - 5)) for n in sizes]
        self.alone = [
            self.run(i, plan(self.prompts[i], self.prompts[i], len(ids))) for i, ids in enumerate(self.ids)
        ]

    def run(self, index: int, chunks: Sequence[int]) -> Logits:
        view = self.executor.allocate(len(self.ids[index]))
        result = feed(self.executor, view, self.ids[index], chunks, self.prompts[index])
        assert view.length == len(self.ids[index])
        view.close()
        return result


def check_executor(executor: Executor, length: int = 70, prompt: int = 53) -> Subject:
    """All checks; returns the subject, whose `alone` logits may be compared between executors.

    For windows to matter, `length` should exceed twice the largest window.
    """
    s = Subject(executor, length, prompt)
    check_shapes(s)
    check_chunks(s)
    check_compositions(s)
    check_selected_rows(s)
    check_empty_sequences(s)
    check_truncation(s)
    check_cancellation(s)
    check_errors(s)
    return s


def check_threads(make: Callable[[int], NativeExecutor]) -> None:
    """All checks with three threads; one thread gives the same logits. `make` takes the number of threads."""
    with closing(make(3)) as executor:
        three = check_executor(executor)
    with closing(make(1)) as executor:
        for found, expected in zip(Subject(executor).alone, three.alone, strict=True):
            same(found, expected, "one thread")


def same(found: Logits, expected: Logits, what: str) -> None:
    """Demands equal bits, and says where they differ."""
    assert found.shape == expected.shape, what
    different = np.flatnonzero(np.any(found.view(np.uint32) != expected.view(np.uint32), axis=-1))
    if len(different):
        worst = float(np.max(np.abs(found - expected)))
        raise AssertionError(
            f"{what}: {len(different)} of {len(found)} rows differ, first {different[0]}, by up to {worst:g}"
        )


def check_shapes(s: Subject) -> None:
    """Logits are finite float32 [R, vocab], equal when computed again, and not all alike."""
    for ids, logits in zip(s.ids, s.alone, strict=True):
        assert logits.dtype == np.float32
        assert logits.shape == (len(ids), s.executor.vocab_size)
        assert np.isfinite(logits).all()
    assert s.executor.vocab_size == s.executor.program.vocab_size
    same(s.run(0, plan(s.prompt, s.prompt, len(s.ids[0]))), s.alone[0], "a second run")
    assert len(np.unique(s.alone[0][:, 0])) > 1, "the logits do not depend on the tokens"


def check_chunks(s: Subject) -> None:
    """Where a prompt is cut does not matter, nor whether generated tokens come in one step (verification)."""
    total = len(s.ids[0])
    for chunk in (1, 2, 7, 16, 17, 32):
        same(s.run(0, plan(s.prompt, chunk, total)), s.alone[0], f"prompt in chunks of {chunk}")
    for schedule in ([s.prompt, total - s.prompt], [5, s.prompt - 5, 3, total - s.prompt - 3]):
        same(s.run(0, schedule), s.alone[0], f"chunks {schedule}")


def check_compositions(s: Subject) -> None:
    """Other sequences in the batch, in other phases and orders, do not matter."""
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 0]):
        for chunk in (3, 20):
            views = {i: s.executor.allocate(len(s.ids[i])) for i in order}
            found: dict[int, list[Logits]] = {i: [] for i in order}
            at = dict.fromkeys(order, 0)
            step = 0
            while any(at[i] < len(s.ids[i]) for i in order):
                step += 1
                parts = []
                for place, i in enumerate(order):
                    if at[i] == len(s.ids[i]) or (step <= 2 * place and i != order[0]):
                        continue  # finished, or not yet admitted: batches of every size occur
                    left = s.prompts[i] - at[i]
                    size = min(chunk + place, left) if left > 0 else 1
                    phase = PROMPT if left > 0 else GENERATED
                    parts.append((i, (views[i], s.ids[i][at[i] : at[i] + size], phase)))
                logits = s.executor.step(batch_of([part for _, part in parts]))
                row = 0
                for i, (_, ids, _) in parts:
                    found[i].append(logits[row : row + len(ids)])
                    row += len(ids)
                    at[i] += len(ids)
            for i in order:
                same(
                    np.concatenate(found[i]), s.alone[i], f"sequence {i} in the batch {order}, chunk {chunk}"
                )
                views[i].close()
    wide = 19
    views_all = [s.executor.allocate(len(s.ids[0])) for _ in range(wide)]
    rows: list[Logits] = []
    for start, size in ((0, 1), (1, s.prompts[0] - 1), *((at, 1) for at in range(s.prompt, s.prompt + 4))):
        phase = PROMPT if start < s.prompt else GENERATED
        piece = s.ids[0][start : start + size]
        logits = s.executor.step(batch_of([(view, piece, phase) for view in views_all]))
        rows.append(logits.reshape(wide, size, -1))
    for index in range(wide):
        found_rows = np.concatenate([part[index] for part in rows])
        same(found_rows, s.alone[0][: len(found_rows)], f"copy {index} of {wide}")
    for view in views_all:
        view.close()


def check_selected_rows(s: Subject) -> None:
    """A subset of the rows has the bits that it has among all; none at all is allowed."""
    ids = s.ids[3][: s.prompts[3]]
    for rows in ([], [0], [len(ids) - 1], [1, 4, len(ids) - 2]):
        view = s.executor.allocate(len(ids))
        logits = s.executor.step(batch_of([(view, ids, PROMPT)], rows))
        same(logits, s.alone[3][rows], f"logit rows {rows}")
        assert view.length == len(ids)
        view.close()


def check_empty_sequences(s: Subject) -> None:
    """Sequences without new tokens, anywhere in the batch, and a batch without any, change nothing."""
    ids = s.ids[3][: s.prompts[3]]
    none = np.zeros(0, np.int32)
    views = [s.executor.allocate(len(ids)) for _ in range(3)]
    parts = [(views[0], none, PROMPT), (views[1], ids, PROMPT), (views[2], none, GENERATED)]
    same(s.executor.step(batch_of(parts)), s.alone[3][: len(ids)], "between empty sequences")
    assert [view.length for view in views] == [0, len(ids), 0]
    assert s.executor.step(batch_of([(view, none, PROMPT) for view in views])).shape == (
        0,
        s.executor.vocab_size,
    )
    assert s.executor.step(batch_of([])).shape == (0, s.executor.vocab_size)
    assert [view.length for view in views] == [0, len(ids), 0]
    for view in views:
        view.close()


def check_truncation(s: Subject) -> None:
    """What was forgotten leaves no trace; where a window has moved on, the view stays as it was."""
    ids, total = s.ids[0], len(s.ids[0])
    view = s.executor.allocate(total)
    feed(s.executor, view, ids, plan(s.prompt, s.prompt, total), s.prompt)
    for length in (total - 1, total - 4, s.prompt + 1):
        view.truncate(length)
        assert view.length == length
        other = ((ids[length:] + 1) % s.executor.vocab_size).astype(np.int32)
        s.executor.step(batch_of([(view, other, GENERATED)]))
        view.truncate(length)
        found = feed(s.executor, view, ids[length:], [1] * (total - length), 0)
        same(found, s.alone[0][length:], f"after truncation to {length}")
    for wrong in (-1, total + 1):
        with pytest.raises(UsageError):
            view.truncate(wrong)
        assert view.length == total
    view.truncate(total)
    try:
        view.truncate(0)
    except UsageError:
        assert any(state.window for state in s.executor.program.states.values())
        assert view.length == total
    else:
        assert view.length == 0
        found = feed(s.executor, view, ids, plan(s.prompt, s.prompt, total), s.prompt)
        same(found, s.alone[0], "after truncation to 0")
    view.close()


def check_cancellation(s: Subject) -> None:
    """A step that is stopped leaves the lengths, and later results, as they were."""
    ids, total = s.ids[0], len(s.ids[0])
    views = [s.executor.allocate(total) for _ in range(2)]
    flag = CancelFlag()
    half = s.prompt // 2
    s.executor.step(batch_of([(views[0], ids[:half], PROMPT)]), flag)
    flag.set()
    rest = ids[half : s.prompt]
    with pytest.raises(Cancelled):
        s.executor.step(batch_of([(views[0], rest, PROMPT), (views[1], ids[:3], PROMPT)]), flag)
    assert [view.length for view in views] == [half, 0]
    # From another thread, at any moment: either it was in time or it was not.
    for delay in (0.0, 0.0005, 0.002):
        flag = CancelFlag()
        timer = threading.Timer(delay, flag.set)
        timer.start()
        try:
            s.executor.step(batch_of([(views[0], rest, PROMPT)]), flag)
            assert views[0].length == s.prompt
            break
        except Cancelled:
            assert views[0].length == half
        finally:
            timer.cancel()
            timer.join()
    if views[0].length == half:
        s.executor.step(batch_of([(views[0], rest, PROMPT)]))
    found = feed(s.executor, views[0], ids[s.prompt :], [1] * (total - s.prompt), 0)
    same(found, s.alone[0][s.prompt :], "after a cancelled step")
    for view in views:
        view.close()


def check_errors(s: Subject) -> None:
    """Batches that contradict themselves are refused, and the views stay as they were."""
    executor = s.executor
    view, other = executor.allocate(8), executor.allocate(8)
    good = s.ids[0][:4]
    executor.step(batch_of([(view, good, PROMPT)]))

    def refused(batch: Batch) -> None:
        with pytest.raises(UsageError) as error:
            executor.step(batch)
        assert "\n" not in str(error.value)
        assert (view.length, other.length) == (4, 0)

    refused(batch_of([(view, s.ids[0][:5], PROMPT)]))  # 9 of 8
    refused(batch_of([(other, good, PROMPT), (view, s.ids[0][:5], PROMPT)]))
    refused(batch_of([(view, np.array([executor.vocab_size]), PROMPT)]))
    refused(batch_of([(view, np.array([-1]), PROMPT)]))
    refused(batch_of([(view, good[:2], PROMPT), (view, good[:2], PROMPT)]))  # one view twice
    for rows in ([4], [-1], [1, 0], [1, 1]):
        refused(batch_of([(view, good, PROMPT)], rows))
    b = batch_of([(view, good, PROMPT)])
    refused(Batch(b.tokens, np.array([3], np.int32), b.views, b.logit_rows, b.phases))
    refused(Batch(b.tokens, np.array([5, -1], np.int32), (view, other), b.logit_rows, b.phases))
    refused(Batch(b.tokens, b.lengths, (view, other), b.logit_rows, b.phases))
    refused(Batch(b.tokens, b.lengths, b.views, b.logit_rows, b.phases[:2]))
    with pytest.raises(UsageError):
        executor.allocate(0)
    view.close()
    view.close()
    other.close()
