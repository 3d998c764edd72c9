"""Statistics of activations: rows go in as they come, in any portions, and the result is the same bits.

Every class is made for rows of one width, takes float tensors [rows, width] by `update` and gives its figures
by `result`, at any time and as often as wanted. Sums are float64: rows are gathered across portions into
chunks of exactly 256, each chunk is summed by itself, and the chunks' sums are added in order (the rows left
over last), so that only the order of the rows matters, not how they were cut. On one machine with one number
of PyTorch threads the bits are the same in every run; maxima and quantiles are everywhere.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gristmill.errors import ModelError, UsageError

CHUNK = 256


class _Statistic:
    def __init__(self, width: int) -> None:
        if width < 1:
            raise UsageError(f"a statistic needs at least one channel, not {width}")
        self.width = width
        self.rows = 0
        """Rows seen."""

    def update(self, x: Tensor) -> None:
        """Takes rows [rows, width]; any number, also none.

        UsageError for another width. ModelError if a value is not finite: the model's arithmetic has broken
        down, and no statistic of it means anything.
        """
        if x.ndim != 2 or x.shape[1] != self.width:
            raise UsageError(f"rows of {self.width} channels were expected, not a shape of {list(x.shape)}")
        if not bool(x.isfinite().all()):
            raise ModelError("the activations hold values that are not finite")
        self.rows += len(x)
        self._take(x.detach())

    @abstractmethod
    def _take(self, x: Tensor) -> None: ...


class AbsMax(_Statistic):
    """The largest magnitude of every channel."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self._largest = torch.zeros(width)

    def _take(self, x: Tensor) -> None:
        if len(x):
            self._largest = torch.maximum(self._largest.to(x.dtype), x.abs().amax(0))

    def result(self) -> Tensor:
        """[width], in the dtype of the rows; 0 before the first."""
        return self._largest


class Quantiles(_Statistic):
    """Exact quantiles of every channel, as `numpy.quantile` defines them (linear between neighbours).

    Memory: of n rows, a quantile q needs no more than the min(q, 1 - q) n values at its end of the order, and
    only those are kept, per channel, besides as many (at least 256) new rows: a 0.999 of 8,192 rows keeps 10
    of them, a median 4,097. For that the number of rows must be known from the start.
    """

    def __init__(self, width: int, at: Sequence[float], rows: int) -> None:
        """at: the quantiles, 0 to 1. rows: how many rows will come in all. UsageError if out of range."""
        super().__init__(width)
        if not at or not all(0 <= q <= 1 for q in at):
            raise UsageError(f"quantiles lie between 0 and 1, unlike {list(at)}")
        if rows < 1:
            raise UsageError(f"quantiles need at least one row, not {rows}")
        self.at = tuple(at)
        self.total = rows
        # Places in the ascending order, and how far from either end the farthest of them are.
        self._places = [q * (rows - 1) for q in at]
        self._low = max((int(p) + 2 for p in self._places if 2 * p < rows - 1), default=0)
        self._high = max((rows - int(p) for p in self._places if 2 * p >= rows - 1), default=0)
        self._lowest: list[Tensor] = []
        self._highest: list[Tensor] = []

    def _take(self, x: Tensor) -> None:
        if self.rows > self.total:
            raise UsageError(f"{self.rows} rows came, but {self.total} were announced")
        x = x.clone()  # what is kept must not change, nor hold on to something larger
        if self._low:
            self._lowest = _keep([*self._lowest, x], self._low, False)
        if self._high:
            self._highest = _keep([*self._highest, x], self._high, True)

    def result(self) -> Tensor:
        """[quantiles, width] float64. UsageError before all rows came."""
        if self.rows != self.total:
            raise UsageError(f"{self.rows} rows came, but {self.total} were announced")
        low = _ordered(self._lowest).double() if self._low else None
        high = _ordered(self._highest).double() if self._high else None
        results = []
        for place in self._places:
            below = int(place)
            if low is not None and 2 * place < self.total - 1:
                a, b = low[below], low[min(below + 1, self.total - 1)]
            else:
                assert high is not None
                first = self.total - len(high)  # the place of the first row of `high`
                a, b = high[below - first], high[min(below + 1, self.total - 1) - first]
            results.append(torch.lerp(a, b, place - below))
        return torch.stack(results)


def _ordered(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).sort(0).values


def _keep(parts: list[Tensor], count: int, largest: bool) -> list[Tensor]:
    """The parts, cut to the `count` extreme values of every channel once as many superfluous ones came."""
    rows = sum(map(len, parts))
    if rows < count + max(count, CHUNK):
        return parts
    return [torch.cat(parts).topk(count, 0, largest, sorted=False).values]


class _Sum(_Statistic):
    """Sums in float64 over chunks of exactly CHUNK rows."""

    def __init__(self, width: int, *shapes: tuple[int, ...]) -> None:
        """shapes: of the sums."""
        super().__init__(width)
        self._sums = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        self._rest: list[Tensor] = []
        self._waiting = 0

    @abstractmethod
    def _add(self, sums: list[Tensor], x: Tensor) -> None:
        """Adds a chunk [rows, width], float64, to the sums, in place."""

    def _take(self, x: Tensor) -> None:
        start = 0
        while self._waiting + len(x) - start >= CHUNK:
            stop = start + CHUNK - self._waiting
            self._add(self._sums, torch.cat([*self._rest, x[start:stop]]).double())
            self._rest, self._waiting, start = [], 0, stop
        if start < len(x):
            # A copy: x may change, or be a view of something large.
            self._rest.append(x[start:].clone())
            self._waiting += len(x) - start

    def _total(self) -> list[Tensor]:
        if not self.rows:
            raise UsageError("a statistic of no rows was asked for")
        sums = [each.clone() for each in self._sums]
        if self._rest:
            self._add(sums, torch.cat(self._rest).double())
        return sums


class MeanAbs(_Sum):
    """The mean magnitude of every channel."""

    def __init__(self, width: int) -> None:
        super().__init__(width, (width,))

    def _add(self, sums: list[Tensor], x: Tensor) -> None:
        sums[0] += x.abs().sum(0)

    def result(self) -> Tensor:
        """[width] float64. UsageError without rows."""
        return self._total()[0] / self.rows


class GroupSums(_Sum):
    """The sum over all rows of every group of neighbouring channels; the last group may be short."""

    def __init__(self, width: int, group: int) -> None:
        """group: channels of a group. UsageError below 1."""
        if group < 1:
            raise UsageError(f"a group needs at least one channel, not {group}")
        super().__init__(width, (-(-width // group),))
        self.group = group

    def _add(self, sums: list[Tensor], x: Tensor) -> None:
        sums[0] += torch.stack([part.sum() for part in torch.split(x.sum(0), self.group)])

    def result(self) -> Tensor:
        """[ceil(width / group)] float64. UsageError without rows."""
        return self._total()[0]


class Hessian(_Sum):
    """H = 2/n sum_i x_i x_i^T: the Hessian of ||W x - V x||^2, mean over the rows, in any row of V.

    As GPTQ (arXiv 2210.17323, section 3) uses it. Memory: a float64 matrix
    [width, width], and three more while the result is made.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, (width, width))

    def _add(self, sums: list[Tensor], x: Tensor) -> None:
        sums[0].addmm_(x.T, x)

    def result(self) -> Tensor:
        """[width, width] float64, symmetric. UsageError without rows."""
        product = self._total()[0]
        return (product + product.T) / self.rows


class _Deviations(_Sum):
    """Sums of deviations from the first row, which lose nothing where a channel's mean is far from 0."""

    def __init__(self, width: int, *shapes: tuple[int, ...]) -> None:
        super().__init__(width, *shapes)
        self._origin = torch.zeros(width, dtype=torch.float64)

    def _take(self, x: Tensor) -> None:
        if len(x) == self.rows > 0:
            self._origin = x[0].to(torch.float64, copy=True)
        super()._take(x)


class MeanVariance(NamedTuple):
    """Per channel, float64 [width]; the variance divides by the number of rows."""

    mean: Tensor
    variance: Tensor


class Moments(_Deviations):
    """Mean and variance of every channel."""

    def __init__(self, width: int) -> None:
        super().__init__(width, (width,), (width,))

    def _add(self, sums: list[Tensor], x: Tensor) -> None:
        deviation = x - self._origin
        sums[0] += deviation.sum(0)
        sums[1] += deviation.square().sum(0)

    def result(self) -> MeanVariance:
        """UsageError without rows."""
        first, second = (total / self.rows for total in self._total())
        return MeanVariance(self._origin + first, (second - first.square()).clamp(min=0))


class MeanCovariance(NamedTuple):
    """The mean [width] and the covariance [width, width], float64; divides by the number of rows."""

    mean: Tensor
    covariance: Tensor


class Covariance(_Deviations):
    """Mean and covariance of the channels. Memory: as `Hessian`."""

    def __init__(self, width: int) -> None:
        super().__init__(width, (width,), (width, width))

    def _add(self, sums: list[Tensor], x: Tensor) -> None:
        deviation = x - self._origin
        sums[0] += deviation.sum(0)
        sums[1].addmm_(deviation.T, deviation)

    def result(self) -> MeanCovariance:
        """UsageError without rows."""
        first, second = (total / self.rows for total in self._total())
        second = (second + second.T) / 2 - torch.outer(first, first)
        return MeanCovariance(self._origin + first, second)
