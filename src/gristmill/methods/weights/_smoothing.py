"""What methods share that move scales between weights before they round them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gristmill.calibrate.sites import SMOOTHING, Site, find_sites, fold
from gristmill.errors import UsageError
from gristmill.methods.draft import Draft

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
