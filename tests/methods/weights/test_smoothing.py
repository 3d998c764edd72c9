"""The search that smoothing methods share."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest

from gristmill.errors import ModelError
from gristmill.methods.weights import smoothquant_plus
from gristmill.methods.weights._smoothing import best_of
from tests.kits import recipes


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([3.0, 1.0, 2.0], 1),
        ([2.0, 1.0, 1.0], 1),
        ([0.0, 0.0, 0.0], 0),
        ([nan, 5.0, nan, 4.0], 3),
        ([4.0, nan, 5.0], 0),
        ([inf, 7.0], 1),
        ([-inf, 7.0], 1),
        ([1e308], 0),
    ],
)
def test_the_first_of_the_least_finite_losses(losses: list[float], best: int) -> None:
    assert best_of("", range(len(losses)), losses.__getitem__) == best


def test_candidates_are_never_compared() -> None:
    """Arrays have no order, and None is a candidate like any other."""
    tried = [np.ones(2), np.zeros(2), None]
    losses = iter([1.0, 0.5, 0.5])
    assert best_of("", tried, lambda _: next(losses)) is tried[1]
    assert best_of("", [None], lambda _: 1.0) is None


@pytest.mark.parametrize("losses", [[], [nan], [inf, nan, -inf]])
def test_without_a_finite_loss(losses: list[float]) -> None:
    with pytest.raises(ModelError, match=r"^scales of x: no candidate has a finite loss$"):
        best_of("scales of x", range(len(losses)), losses.__getitem__)


def test_one_candidate_after_the_other() -> None:
    """A loss may build on the one before: none is skipped, repeated or made ahead of its turn."""
    seen: list[str] = []

    def candidates() -> Iterator[int]:
        for i in range(3):
            seen.append(f"made {i}")
            yield i

    def loss(i: int) -> float:
        seen.append(f"loss {i}")
        return (nan, 1.0, 2.0)[i]

    assert best_of("", candidates(), loss) == 1
    assert seen == [f"{what} {i}" for i in range(3) for what in ("made", "loss")]


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("{method: awq, group: 32, grid: 2}", "awq: scales of layers.0.input_layernorm"),
        ("{method: svdquant, rank: 8, grid: 2}", "svdquant: scales of layers.0.input_layernorm"),
        ("{method: fireq, keys: none, smooth: [qkv]}", "fireq: scales of layers.0.input_layernorm"),
        ("{method: fireq, smooth: []}", "fireq: scales of the keys of layers.0.self_attn"),
    ],
)
def test_a_model_that_breaks_down_is_named(entry: str, what: str, tmp_path: Path) -> None:
    """Attention's logits overflow: no strength is better than another, and none may be taken silently."""
    draft = recipes.draft_of(recipes.speaking(tmp_path))
    norm = "model.layers.0.input_layernorm.weight"
    draft.set(norm, draft.weight(norm) * np.float32(1e25))
    with pytest.raises(ModelError, match=rf"^{what}\S*: no candidate has a finite loss$"):
        recipes.applied(draft, entry)


@pytest.mark.parametrize(
    ("losses", "note"),
    [
        ([5.0, np.inf, 2.0], "strength 1.00, loss 2, without smoothing 5, at 0.00 inf"),
        ([np.inf, 3.0, 3.0], "strength 0.00, loss 3, without smoothing inf, at 1.00 3"),
        ([1.0, 1.0, 1.0], "strength none, loss 1, without smoothing 1"),
        ([np.inf, np.inf, np.inf], None),
    ],
)
def test_strengths_whose_rounded_model_breaks_down(
    losses: list[float], note: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(losses)
    monkeypatch.setattr(
        smoothquant_plus._Search, "loss", lambda self, strength: {"loss": np.array([next(left)])}
    )
    draft = recipes.draft_of(recipes.speaking(tmp_path))
    steps: list[tuple[int, int]] = []
    draft.progress = lambda label, done, total: steps.append((done, total))
    entry = "{method: smoothquant_plus, quantise: false, step: 1}"
    if note is None:
        with pytest.raises(ModelError, match=r"^smoothquant_plus: strength: no candidate has a finite loss$"):
            recipes.applied(draft, entry)
        assert not draft.changed
    else:
        recipes.applied(draft, entry)
        assert draft.notes == [f"smoothquant_plus: {note}"]
    assert steps == [(1, 3), (2, 3), (3, 3)]
