"""What methods share that move scales between weights before they round them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from gristmill.calibrate.sites import SMOOTHING, Site, find_sites, fold
from gristmill.errors import ModelError, UsageError
from gristmill.methods.draft import Draft

_Candidate = TypeVar("_Candidate")
Factors = Mapping[str, Any]
"""Factors [site.width] by the name of the site's buffer."""


def sites_within(draft: Draft, tensors: Sequence[str], kinds: Sequence[str] = SMOOTHING) -> list[Site]:
    """The sites whose matrices are all among `tensors`; UsageError if there are none."""
    chosen = set(tensors) | {name for name, w in draft.program.weights.items() if len(w.shape) == 1}
    sites = [
        site for site in find_sites(draft.program, kinds) if all(part.weight in chosen for part in site.parts)
    ]
    if not sites:
        raise UsageError("scales can be moved nowhere within the tensors chosen")
    return sites


def first_tokens(sequences: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """The first sequences, the last one cut so that there are no more than `tokens` tokens."""
    result = []
    for ids in sequences:
        if tokens <= 0:
            break
        result.append(ids[:tokens])
        tokens -= len(ids)
    return result


def best_of(what: str, candidates: Iterable[_Candidate], loss: Callable[[_Candidate], float]) -> _Candidate:
    """The candidate with the least loss: of equal ones the first, and never one whose loss is not finite.

    Takes the candidates one by one and calls `loss` once for each: a loss may build on the one before it, and
    be kept (`Draft.once`) if it takes long. what: is searched for; ModelError names it if no loss is finite.
    """
    tried = ((loss(candidate), candidate) for candidate in candidates)
    finite = (one for one in tried if math.isfinite(one[0]))
    best = min(finite, key=lambda one: one[0], default=None)
    if best is None:
        raise ModelError(f"{what}: no candidate has a finite loss")
    return best[1]


def folded(weights: Mapping[str, Any], sites: Sequence[Site], factors: Factors) -> dict[str, Any]:
    """The tensors that moving all factors changes."""
    changed: dict[str, Any] = {}
    for site in sites:
        now = {part.weight: changed.get(part.weight, weights[part.weight]) for part in site.parts}
        changed |= fold(now, site, factors[site.buffer])
    return changed


def move(draft: Draft, sites: Sequence[Site], factors: Factors) -> None:
    """Moves the factors in the draft."""
    for site in sites:
        draft.fold(site, factors[site.buffer])
