"""Statistics against NumPy in float64, and the same bits however the rows are cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gristmill.calibrate.statistics import (
    AbsMax,
    Covariance,
    GroupSums,
    Hessian,
    MeanAbs,
    Moments,
    Quantiles,
)
from gristmill.errors import ModelError, UsageError

AT = (0.0, 0.001, 0.37, 0.5, 0.75, 0.999, 1.0)
Make = Callable[[int, int], Any]
MAKERS: dict[str, Make] = {
    "AbsMax": lambda width, rows: AbsMax(width),
    "MeanAbs": lambda width, rows: MeanAbs(width),
    "Moments": lambda width, rows: Moments(width),
    "Covariance": lambda width, rows: Covariance(width),
    "Hessian": lambda width, rows: Hessian(width),
    "GroupSums": lambda width, rows: GroupSums(width, 5),
    "Quantiles": lambda width, rows: Quantiles(width, AT, rows),
    "Tail": lambda width, rows: Quantiles(width, (0.01, 0.99), rows),
}


def data(rows: int, width: int = 13) -> NDArray[np.float32]:
    """Rows with outlier channels, a channel far from 0 and a dead one."""
    random = np.random.default_rng(rows)
    x = random.standard_normal((rows, width)).astype(np.float32)
    x[:, 0] *= 50
    if width > 2:
        x[:, 1] += 1e4
        x[:, 2] = 0
    return x


def expected(name: str, x: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    x = x.astype(np.float64)
    n, width = x.shape
    if name == "AbsMax":
        return [np.abs(x).max(0)]
    if name == "MeanAbs":
        return [np.abs(x).mean(0)]
    if name == "Moments":
        return [x.mean(0), x.var(0)]
    if name == "Covariance":
        return [x.mean(0), np.cov(x.T, bias=True).reshape(width, width)]
    if name == "Hessian":
        return [2 / n * x.T @ x]
    if name == "GroupSums":
        return [np.array([x[:, i : i + 5].sum() for i in range(0, width, 5)])]
    return [np.quantile(x, AT if name == "Quantiles" else (0.01, 0.99), axis=0)]


def parts(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("rows", "width"), [(1, 13), (2, 1), (255, 13), (256, 13), (1500, 13), (3000, 2)])
def test_values(name: str, rows: int, width: int) -> None:
    x = data(rows, width)
    statistic = MAKERS[name](width, rows)
    statistic.update(torch.from_numpy(x))
    assert statistic.rows == rows
    for found, wanted in zip(parts(statistic.result()), expected(name, x), strict=True):
        assert found.shape == wanted.shape
        scale = np.abs(wanted).max() if name in ("Covariance", "GroupSums") else np.abs(wanted)
        assert np.all(np.abs(found.double().numpy() - wanted) <= 1e-11 * scale + 1e-9)


@pytest.mark.parametrize("name", MAKERS)
def test_bits_do_not_depend_on_the_portions(name: str) -> None:
    x = torch.from_numpy(data(1500))
    whole = MAKERS[name](13, 1500)
    whole.update(x)
    for sizes in ([0, 1, 255, 0, 256, 300, 688], [1] * 1500, [1499, 1]):
        other = MAKERS[name](13, 1500)
        for part in x.split(sizes):
            other.update(part)
            if other.rows in (256, 812) and name not in ("Quantiles", "Tail"):
                other.result()  # asking early changes nothing
        for a, b in zip(parts(whole.result()), parts(other.result()), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", MAKERS)
def test_what_was_given_may_change_afterwards(name: str) -> None:
    statistic, other = MAKERS[name](13, 300), MAKERS[name](13, 300)
    given = torch.from_numpy(data(300))
    other.update(given.clone())
    statistic.update(given)
    given.zero_()
    for a, b in zip(parts(statistic.result()), parts(other.result()), strict=True):
        assert torch.equal(a, b)


def test_extreme_quantiles_keep_few_rows() -> None:
    tail = Quantiles(3, (0.001, 0.999), 20_000)
    for part in torch.from_numpy(data(20_000, 3)).split(100):
        tail.update(part)
        assert sum(map(len, tail._lowest)) < 21 + 2 * 256
        assert sum(map(len, tail._highest)) < 21 + 2 * 256


def test_a_variance_far_from_zero_is_exact() -> None:
    x = torch.tensor([[1e8], [1e8 + 1], [1e8 + 2]], dtype=torch.float64)
    moments = Moments(1)
    moments.update(x)
    assert moments.result().variance.item() == pytest.approx(2 / 3, rel=1e-12)


def test_float64_rows_keep_their_precision() -> None:
    largest = AbsMax(1)
    largest.update(torch.tensor([[1 + 1e-12]], dtype=torch.float64))
    assert largest.result().item() == 1 + 1e-12


def test_wrong_use_is_refused() -> None:
    with pytest.raises(UsageError, match=r"13 channels.*\[2, 12\]"):
        AbsMax(13).update(torch.zeros(2, 12))
    with pytest.raises(ModelError, match="not finite"):
        Moments(1).update(torch.tensor([[float("nan")]]))
    for make in (MeanAbs, Moments, Covariance, Hessian):
        with pytest.raises(UsageError, match="no rows"):
            make(4).result()
    quantiles = Quantiles(1, (0.5,), 3)
    quantiles.update(torch.zeros(2, 1))
    with pytest.raises(UsageError, match="2 rows came, but 3"):
        quantiles.result()
    with pytest.raises(UsageError, match="4 rows came, but 3"):
        quantiles.update(torch.zeros(2, 1))
    for arguments in [((), 3), ((1.5,), 3), ((0.5,), 0)]:
        with pytest.raises(UsageError):
            Quantiles(1, *arguments)
    with pytest.raises(UsageError, match="group"):
        GroupSums(4, 0)
    with pytest.raises(UsageError, match="channel"):
        AbsMax(0)
