"""Test models with outliers: the same function, but a few channels so large that plain rounding destroys it.

Small models have mild outliers, and methods against outliers nothing to show there. Planting makes them: at a
site of equivalent scales (`gristmill.calibrate.sites`) a few channels are made `factor` times larger and what
consumes them as much smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gristmill.calibrate.sites import NORM, find_sites, fold
from gristmill.errors import UsageError
from gristmill.program.nodes import Program

FACTOR = 50.0
SHARE = 0.01


def plant(
    program: Program,
    weights: Mapping[str, Any],
    kinds: Sequence[str] = (NORM,),
    *,
    share: float = SHARE,
    factor: float = FACTOR,
    seed: int = 0,
) -> dict[str, Any]:
    """The weights with outliers in every site of these kinds; the model's function stays, but for rounding.

    kinds: `norm` (inputs of q, k, v, gate and up), `gated` (inputs of down), `values` (inputs of o), `keys`
    (rotary pairs of keys; queries shrink). share: of a site's channels, at least one each, chosen by `seed`.
    weights: float arrays or tensors by name; those that do not change are handed through. UsageError for a
    share outside (0, 1] or a factor that is not positive.
    """
    if not 0 < share <= 1:
        raise UsageError(f"the share of planted channels must be above 0 and at most 1, not {share}")
    if not 0 < factor < float("inf"):
        raise UsageError(f"the factor of planted outliers must be positive, not {factor}")
    planted = dict(weights)
    for i, site in enumerate(find_sites(program, kinds)):
        chosen = np.random.default_rng([seed, i]).permutation(site.width)
        scales = np.ones(site.width)
        scales[chosen[: max(1, round(share * site.width))]] = 1 / factor
        planted |= fold(planted, site, scales)
    return planted
