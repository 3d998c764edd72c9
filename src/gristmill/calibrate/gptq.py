"""GPTQ: rounds a matrix column by column, each column's error made up for by the columns that follow.

Frantar et al., arXiv 2210.17323. The errors of a row e leave 1/2 e H e^T in the output, H = 2/n sum x x^T.
With H = R R^T, R upper triangular, U = R^-1 is the Cholesky factor of H^-1 (H^-1 = U^T U) that GPTQ works
with, and |e R|^2 = e H e^T. Pruning two of every four columns on the way is SparseGPT's (arXiv 2301.00774).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gristmill.errors import ModelError, UsageError
from gristmill.formats import group_int, sparse24
from gristmill.formats.packed import Packed, PackedSpec

BLOCK = 128
"""Columns whose errors are gathered before they reach the columns behind the block."""
_MOST_DAMPING = 1.0

Fit = Callable[[NDArray[np.float32], Tensor], tuple[NDArray[np.float32], NDArray[np.float32] | float]]
"""Scales [N] and minimums [N] (or 0.0) of a group's columns x [g, N], given its part of R [g, g], float32."""


class Rounded(NamedTuple):
    """A matrix of codes uint8 [N, K] with scales, and mins if any, float16 [N, G]; see `pack`."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    mins: NDArray[np.float16] | None
    mask: NDArray[np.bool_] | None
    """[N, K]: what is kept of a 2:4 matrix; None for a dense one."""
    spec: PackedSpec
    damp: float
    """The damping that was needed; infinite if none sufficed, which leaves rounding to nearest."""

    def pack(self, rows: slice = slice(None)) -> Packed:
        """The matrix in its format, or the matrix of some of its rows."""
        codes, scales, s = self.codes[rows], self.scales[rows], self.spec
        if self.mask is not None:
            return sparse24.pack(codes, self.mask[rows], scales, group=s.group)
        mins = None if self.mins is None else self.mins[rows]
        return group_int.pack(codes, scales, mins, bits=s.bits, group=s.group, offset=s.offset)


def gptq(
    weight: NDArray[np.float32],
    hessian: Tensor,
    *,
    bits: int,
    group: int,
    symmetric: bool = True,
    clip: Literal["none", "mse"] = "none",
    fit: Fit | None = None,
    damp: float = 0.01,
    act_order: bool = False,
    sparse: bool = False,
) -> Rounded:
    """Codes for a matrix [N, K] that keep tr(E H E^T) small, E the error and H [K, K] the Hessian.

    bits, group (0: the whole row), symmetric, clip: as in `group_int.round_group_int`, but that all codes are
    used. A group's scale is fitted when its first column comes, to what the errors before have made of it;
    `fit` replaces the rule. damp: so many times the mean of H's diagonal is added to it; ten times as much as
    often as the factorisation fails, up to 1, then H counts as the identity. act_order: columns are taken by
    descending diagonal of H, under scales fitted beforehand; the layout stays, so that nothing has to be
    gathered at run time. sparse: of every four columns the two that matter least are pruned (4 bits,
    symmetric, groups of 32 n columns; without act_order).

    Every row by itself: several matrices may go in one above the other. A row that rounding to nearest by the
    same rules leaves with less error is rounded so (few bits without a clip search, few columns, a column
    that H says nothing about). ModelError if the weight or H is not finite; UsageError for options that
    exclude each other.
    """
    if sparse and (act_order or bits != 4 or not symmetric):
        raise UsageError("2:4 pruning takes symmetric 4-bit codes and no act_order")
    if fit is not None and act_order:
        raise UsageError("act_order fits scales beforehand, by the plain rules only")
    if not np.isfinite(weight).all() or not bool(hessian.isfinite().all()):
        raise ModelError("a matrix or its Hessian holds values that are not finite: GPTQ cannot round it")
    n, k = weight.shape
    offset = 1 << (bits - 1) if symmetric else 0
    spec = (
        sparse24.spec((n, k), group)
        if sparse
        else group_int.spec((n, k), bits, group, offset, mins=not symmetric)
    )
    fit = fit or partial(_fit_plainly, bits=bits, symmetric=symmetric, clip=clip)
    order = torch.arange(k)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    root, used = _root(hessian[order][:, order], damp)
    inverse = torch.linalg.solve_triangular(root, torch.eye(k, dtype=root.dtype), upper=True)
    sweep = _Sweep(spec, fit, root.float(), order.tolist(), sparse)
    # Transposed, so that a column of the matrix lies in one piece.
    columns = torch.from_numpy(np.ascontiguousarray(weight.T))
    plain = sweep.run(columns, inverse.diagonal().diag().float())
    found = sweep.run(columns, inverse.float())
    worse = _errors(found, columns, hessian) > _errors(plain, columns, hessian)
    codes, scales, mins, kept, _ = (
        torch.where(worse, a, b).T.contiguous().numpy() for a, b in zip(plain, found, strict=True)
    )
    return Rounded(
        codes,
        scales.astype(np.float16),
        None if symmetric else mins.astype(np.float16),
        kept if sparse else None,
        spec,
        used,
    )


class _Result(NamedTuple):
    codes: Tensor
    """uint8 [K, N]"""
    scales: Tensor
    """float32 [G, N], already of values that float16 holds; as the minimums."""
    mins: Tensor
    kept: Tensor
    """bool [K, N]"""
    values: Tensor
    """float32 [K, N]: what the codes stand for."""


def _errors(result: _Result, columns: Tensor, hessian: Tensor) -> Tensor:
    """e H e^T of every row of the matrix, [N] float64."""
    error = (result.values - columns).double()
    return (error * (hessian.double() @ error)).sum(0)


class _Sweep:
    """The columns of a matrix, one by one."""

    def __init__(self, spec: PackedSpec, fit: Fit, root: Tensor, order: list[int], sparse: bool) -> None:
        self.spec, self.fit, self.root, self.order, self.sparse = spec, fit, root, order, sparse

    def run(self, columns: Tensor, inverse: Tensor) -> _Result:
        """Rounds the columns [K, N], with `inverse` as U: a diagonal one lets every column end by itself."""
        spec, order = self.spec, self.order
        (n, k), low, high = spec.shape, -spec.offset, (1 << spec.bits) - 1 - spec.offset
        scales, mins, reciprocals = (torch.zeros(spec.groups, n) for _ in range(3))
        codes, values = torch.empty(k, n, dtype=torch.uint8), torch.empty(k, n)
        kept = torch.ones(k, n, dtype=torch.bool)
        diagonal = inverse.diagonal()
        work = columns.clone()

        def fit(number: int) -> None:
            place = slice(number * spec.group, min((number + 1) * spec.group, k))
            x = work[place]
            if self.sparse:
                x = torch.where(_kept(x, diagonal[place]), x, 0.0)
            scale, least = self.fit(x.numpy(), self.root[place, place])
            scales[number] = torch.as_tensor(group_int.to_stored(scale))
            mins[number] = torch.as_tensor(group_int.to_stored(least))
            reciprocals[number] = torch.where(scales[number] == 0, 0.0, 1 / scales[number])

        in_place = order == list(range(k))
        if not in_place:
            for number in range(spec.groups):
                fit(number)
            work = work[order]
        for start, stop in _blocks(k, spec.group):
            errors = torch.empty(stop - start, n)
            for i in range(start, stop):
                column = order[i]
                group = column // spec.group
                if in_place and i % spec.group == 0:
                    fit(group)
                if self.sparse and i % 4 == 0:
                    quad = slice(i, min(i + 4, stop))
                    kept[quad] = _kept(work[quad], diagonal[quad])
                steps = ((work[i] - mins[group]) * reciprocals[group]).round_().clamp_(low, high)
                steps *= kept[column]
                codes[column] = steps + spec.offset
                values[column] = steps * scales[group] + mins[group]
                errors[i - start] = (work[i] - values[column]) / diagonal[i]
                work[i + 1 : stop].addr_(inverse[i, i + 1 : stop], errors[i - start], alpha=-1)
            work[stop:].addmm_(inverse[start:stop, stop:].T, errors, alpha=-1)
        return _Result(codes, scales, mins, kept, values)


def _root(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """R, upper triangular, float64, with R R^T = H + damp * mean(diag H), and the damping that was used."""
    identity = torch.eye(len(hessian), dtype=torch.float64)
    wide = hessian.double()
    mean = float(wide.diagonal().mean())
    while mean > 0 and damp <= _MOST_DAMPING:
        # The factor of H with its order reversed is lower triangular, and reversed again upper.
        lower, failed = torch.linalg.cholesky_ex((wide + damp * mean * identity).flip(0, 1))
        if not bool(failed):
            return lower.flip(0, 1), damp
        damp *= 10
    # Inputs that were all 0 call for nothing but rounding to nearest.
    return identity, damp if mean == 0 else float("inf")


def _fit_plainly(
    x: NDArray[np.float32], root: Tensor, *, bits: int, symmetric: bool, clip: Literal["none", "mse"]
) -> tuple[NDArray[np.float32], NDArray[np.float32] | float]:
    return group_int.fit_columns(x, bits, symmetric=symmetric, clip=clip)


def _kept(x: Tensor, diagonal: Tensor) -> Tensor:
    """Which of the columns x [c, N] stay when of every four the two with the least (x / U_ii)^2 go."""
    columns, n = x.shape
    # Columns that a ragged last quad lacks go first.
    importance = torch.full((-(-columns // 4) * 4, n), -1.0)
    importance[:columns] = (x / diagonal[:, None]).square()
    quads = importance.reshape(-1, 4, n)
    best = quads.argsort(dim=1, descending=True, stable=True)[:, :2]
    kept = torch.zeros(quads.shape, dtype=torch.bool).scatter_(1, best, True)
    return kept.reshape(-1, n)[:columns]


def _blocks(columns: int, group: int) -> Iterator[tuple[int, int]]:
    """Blocks of whole groups or, where a group is longer than a block, parts of one."""
    step = max(1, BLOCK // group) * group
    for start in range(0, columns, step):
        end = min(start + step, columns)
        for first in range(start, end, BLOCK):
            yield first, min(first + BLOCK, end)
