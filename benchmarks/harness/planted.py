"""A model with planted outliers: the same function, with a few channels of inputs and keys made large."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gristmill.calibrate.planted import plant
from gristmill.methods import Method, Options
from gristmill.methods.compare import compressed
from gristmill.methods.draft import Draft
from gristmill.methods.recipe import Entry, Recipe

KINDS = ("norm", "gated", "keys")


class _Plant(Method[Options]):
    """Outliers in the inputs of all linears and in the keys; the function stays."""

    name = "plant"
    title = "Planted outliers"
    paper = ""

    def slots(self, options: Options) -> Sequence[str]:
        """As a smoothing, in the other direction."""
        return ("smoothing",)

    def apply(self, draft: Draft, options: Options, tensors: Sequence[str]) -> None:
        """Plants them."""
        weights = {name: draft.weight(name) for name in draft.program.weights}
        for name, values in plant(draft.program, weights, KINDS).items():
            if values is not weights[name]:
                draft.set(name, values)


def planted(model: str | Path, work: Path) -> Path:
    """The checkpoint `work`/planted, made if it is not there; UsageError if it is of another model."""
    return compressed(model, Recipe((Entry(_Plant(), Options(), (), 1),), "planted", floats="f32"), work)
