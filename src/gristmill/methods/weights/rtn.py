"""Round to nearest: the baseline of every weight method. Needs no calibration and no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gristmill.formats import group_int
from gristmill.methods.base import CodeOptions, Method
from gristmill.methods.draft import Draft


class RtnOptions(CodeOptions):
    """bits 2 to 8; group: columns per scale, 0 for the whole row; clip "mse" searches the scale."""

    symmetric: bool = True
    clip: Literal["none", "mse"] = "none"


class Rtn(Method[RtnOptions]):
    """Each group by its own scale, each weight to the nearest code."""

    name = "rtn"
    title = "Round to nearest group integers"
    paper = "baseline"
    options = RtnOptions

    def slots(self, options: RtnOptions) -> Sequence[str]:
        """It decides the codes and their format."""
        return ("rounding", "weight_format")

    def weight_group(self, options: RtnOptions) -> int | None:
        """Its own."""
        return options.group

    def apply(self, draft: Draft, options: RtnOptions, tensors: Sequence[str]) -> None:
        """Packs every tensor."""
        for i, name in enumerate(tensors):
            values = draft.weight(name)
            draft.pack(
                name,
                group_int.round_group_int(
                    values,
                    bits=options.bits,
                    group=options.group,
                    symmetric=options.symmetric,
                    clip=options.clip,
                ),
            )
            draft.progress("rounding", i + 1, len(tensors))


METHOD = Rtn()
