"""GPTQ: the baseline of weight methods that calibrate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from gristmill.methods.base import CodeOptions, Method
from gristmill.methods.draft import Draft
from gristmill.methods.weights._sequential import round_in_sequence


class GptqOptions(CodeOptions):
    """bits 2 to 8; group: columns per scale, 0 for the whole row; clip "mse" searches the scale.

    damp: added to the Hessian's diagonal, in parts of its mean. act_order: columns with large inputs first,
    which costs nothing at run time, as the scales are then fitted beforehand and the columns stay in place.
    """

    symmetric: bool = True
    clip: Literal["none", "mse"] = "mse"
    damp: Annotated[float, Field(gt=0, le=1)] = 0.01
    act_order: bool = True


class Gptq(Method[GptqOptions]):
    """Column by column, each column's rounding error made up for by the columns that follow."""

    name = "gptq"
    title = "Round column by column, later columns making up for earlier errors"
    paper = "GPTQ, ICLR 2023, arXiv 2210.17323"
    options = GptqOptions
    calibrated = True

    def slots(self, options: GptqOptions) -> Sequence[str]:
        """It decides the codes and their format."""
        return ("rounding", "weight_format")

    def weight_group(self, options: GptqOptions) -> int | None:
        """Its own."""
        return options.group

    def apply(self, draft: Draft, options: GptqOptions, tensors: Sequence[str]) -> None:
        """Packs every tensor, in the order in which the model runs."""
        from gristmill.calibrate.gptq import gptq

        chosen = options.model_dump()
        round_in_sequence(draft, self.name, tensors, lambda w, h: gptq(w, h, **chosen))


METHOD = Gptq()
