"""MARLIN's way to round weights for 16-bit activations: GPTQ with a clip search by the Hessian; or 2:4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator

from gristmill.methods.base import Method, Options, check_group, linear_weights
from gristmill.methods.draft import Draft
from gristmill.methods.weights._sequential import round_in_sequence

if TYPE_CHECKING:
    from torch import Tensor

_BITS = 4
_CLIP_STEPS = 76
_LEVELS = 15.0
"""The scale is 2 max|x| / 15: the codes reach from -8 to 7 on either side of -1/2."""


class MarlinOptions(Options):
    """group: columns per scale, 0 for the whole row. clip: search the part of a group's range that is kept.

    damp: added to the Hessian's diagonal, in parts of its mean. sparse: two of every four inputs of an output
    are pruned (groups of 32 n columns).
    """

    group: Annotated[int, Field(ge=0, le=1024)] = 128
    clip: bool = True
    damp: Annotated[float, Field(gt=0, le=1)] = 0.1
    sparse: bool = False

    @field_validator("group")
    @classmethod
    def _whole_pieces(cls, group: int) -> int:
        check_group(group, _BITS)
        return group

    @field_validator("sparse")
    @classmethod
    def _whole_sparse_pieces(cls, sparse: bool, info: ValidationInfo) -> bool:
        if sparse and "group" in info.data:
            check_group(info.data["group"], _BITS, sparse=True)
        return sparse


class Marlin(Method[MarlinOptions]):
    """4-bit weights for activations that stay 16-bit: no other method may round them."""

    name = "marlin"
    title = "4-bit weights by GPTQ with a clip search by the Hessian; 2:4 sparse ones on demand"
    paper = "MARLIN, PPoPP 2025, arXiv 2408.11743"
    options = MarlinOptions
    calibrated = True

    def slots(self, options: MarlinOptions) -> Sequence[str]:
        """It decides codes, their format, and that inputs are bfloat16; it may prune."""
        taken = ("rounding", "weight_format", "activation_encoding")
        return ("pruning", *taken) if options.sparse else taken

    def weight_group(self, options: MarlinOptions) -> int | None:
        """Its own."""
        return options.group

    def apply(self, draft: Draft, options: MarlinOptions, tensors: Sequence[str]) -> None:
        """Packs every tensor, in the order in which the model runs, and means 16-bit activations."""
        from gristmill.calibrate.gptq import Rounded, gptq

        steps = _CLIP_STEPS if options.clip else 1

        def solve(weight: NDArray[np.float32], hessian: Tensor) -> Rounded:
            return gptq(
                weight,
                hessian,
                bits=_BITS,
                group=options.group,
                fit=lambda x, root: (search_scale(x, root, steps), 0.0),
                damp=options.damp,
                sparse=options.sparse,
            )

        round_in_sequence(draft, self.name, tensors, solve)
        if set(tensors) == set(linear_weights(draft.program)):
            draft.activations = "bf16"  # W4A16
        else:
            draft.notes.append(
                f"{self.name}: not all linear layers are its own: it means 16-bit activations, which only "
                "`--activations bf16` gives"
            )


def search_scale(x: NDArray[np.float32], root: Tensor, steps: int) -> NDArray[np.float32]:
    """Scales [N] of a group's columns x [g, N]: of p 2 max|x| / 15 with p = 1, 0.99, ... the best.

    The error e of a row's nearest codes counts as |e R|^2, R = `root` [g, g]: the part of the output's error
    that the columns behind the group cannot make up for. All zeros count as a largest value of 1.
    """
    import torch

    columns = torch.from_numpy(x)
    largest = columns.abs().amax(0)
    full = torch.where(largest == 0, 1.0, largest) * (2 / _LEVELS)
    best = torch.full_like(full, float("inf"))
    scale = full
    for i in range(steps):
        tried = full * (1 - i / 100)
        error = (columns / tried).round_().clamp_(-8, 7).mul_(tried).sub_(columns)
        loss = (root.T @ error).square_().sum(0)
        scale = torch.where(loss < best, tried, scale)
        best = torch.minimum(loss, best)
    return scale.numpy()


METHOD = Marlin()
