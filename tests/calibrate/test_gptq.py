"""GPTQ against the textbook in float64: no Cholesky factor, no blocks, H^-1 updated column by column."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gristmill.calibrate.gptq import Rounded, gptq
from gristmill.errors import ModelError, UsageError
from gristmill.formats import group_int, sparse24
from gristmill.formats.packed import decode

SHAPES = [(33, 192), (1, 100), (48, 576), (5, 37), (20, 328)]


def inputs(columns: int, rows: int = 400, seed: int = 0) -> NDArray[np.float64]:
    """Inputs whose channels are correlated and of different sizes."""
    rng = np.random.default_rng([columns, seed])
    mixing = rng.standard_normal((columns, columns)) / np.sqrt(columns) + np.eye(columns)
    return rng.standard_normal((rows, columns)) @ (mixing * np.exp(rng.standard_normal(columns)))


def hessian_of(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 2 * x.T @ x / len(x)


def weight_of(rows: int, columns: int) -> NDArray[np.float32]:
    return (np.random.default_rng([rows, columns, 1]).standard_normal((rows, columns)) * 0.05).astype(
        np.float32
    )


def error(
    weight: NDArray[np.float32], rounded: Rounded | group_int.Packed, hessian: NDArray[np.float64]
) -> float:
    packed = rounded.pack() if isinstance(rounded, Rounded) else rounded
    e = decode(packed) - weight
    return float(np.sum((e @ hessian) * e))


def textbook(
    weight: NDArray[np.float32], hessian: NDArray[np.float64], bits: int, group: int, symmetric: bool
) -> NDArray[np.float64]:
    """The values that GPTQ rounds to, scales by the largest value of a group as it then stands."""
    w = weight.astype(np.float64)
    n, k = w.shape
    inverse = np.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * np.eye(k))
    result = np.empty_like(w)
    offset = 2 ** (bits - 1) if symmetric else 0
    for i in range(k):
        if i % group == 0:
            part = w[:, i : i + group]
            if symmetric:
                scale = np.abs(part).max(axis=1) / (offset - 1)
                low = np.zeros(n)
            else:
                low = np.minimum(part.min(axis=1), 0)
                scale = (np.maximum(part.max(axis=1), 0) - low) / (2**bits - 1)
            scale, low = scale.astype(np.float16).astype(float), low.astype(np.float16).astype(float)
        code = np.clip(np.rint((w[:, i] - low) / scale), -offset, 2**bits - 1 - offset)
        result[:, i] = code * scale + low
        e = (w[:, i] - result[:, i]) / inverse[i, i]
        w[:, i:] -= np.outer(e, inverse[i, i:])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [32, 64, 0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_is_the_textbook(shape: tuple[int, int], group: int, symmetric: bool) -> None:
    weight, hessian = weight_of(*shape), hessian_of(inputs(shape[1]))
    group = group if group < shape[1] else 0
    found = gptq(weight, torch.from_numpy(hessian), bits=4, group=group, symmetric=symmetric)
    expected = textbook(weight, hessian, 4, group or shape[1], symmetric)
    values = decode(found.pack())
    e = expected - weight
    wanted = np.sum((e @ hessian) * e, axis=1)
    e = values - weight
    got = np.sum((e @ hessian) * e, axis=1)
    # A tie in float32 may fall to the other side, and everything behind it follows.
    same = np.all(np.abs(values - expected) < 1e-4 * np.abs(weight).max(), axis=1)
    nearest = group_int.round_group_int(weight, bits=4, group=group, symmetric=symmetric)
    e = decode(nearest) - weight
    to_nearest = np.sum((e @ hessian) * e, axis=1)
    assert np.mean(same | (to_nearest < wanted)) > 0.9
    assert got.sum() <= np.minimum(wanted, to_nearest).sum() * 1.02
    assert found.damp == 0.01


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
def test_is_no_worse_than_nearest(
    shape: tuple[int, int], bits: int, symmetric: bool, act_order: bool
) -> None:
    weight, hessian = weight_of(*shape), hessian_of(inputs(shape[1]))
    for group in (32, 0):
        nearest = group_int.round_group_int(weight, bits=bits, group=group, symmetric=symmetric)
        found = gptq(
            weight,
            torch.from_numpy(hessian),
            bits=bits,
            group=group,
            symmetric=symmetric,
            act_order=act_order,
        )
        assert error(weight, found, hessian) <= error(weight, nearest, hessian) * (1 + 1e-5)
        assert found.codes.max() < 1 << bits


def test_the_order_stays_in_the_matrix() -> None:
    """With the scales fitted beforehand, the order changes what is made up for, not where a code lies."""
    weight = weight_of(16, 192)
    hessian = np.diag(np.random.default_rng(3).uniform(1, 9, 192))
    plain = gptq(weight, torch.from_numpy(hessian), bits=4, group=64)
    ordered = gptq(weight, torch.from_numpy(hessian), bits=4, group=64, act_order=True)
    assert np.array_equal(plain.codes, ordered.codes)
    correlated = hessian_of(inputs(192))
    ordered = gptq(weight, torch.from_numpy(correlated), bits=4, group=64, act_order=True)
    plain = gptq(weight, torch.from_numpy(correlated), bits=4, group=64)
    assert error(weight, ordered, correlated) < error(weight, plain, correlated)


def test_inputs_that_say_nothing() -> None:
    """Dead channels are rounded to nearest and change nothing else; without any input all are."""
    weight, x = weight_of(24, 192), inputs(192)
    x[:, [0, 70, 191]] = 0
    hessian = hessian_of(x)
    found = gptq(weight, torch.from_numpy(hessian), bits=4, group=192)
    scales = found.scales.astype(np.float64)
    dead = decode(found.pack())[:, [70, 191]]
    assert np.all(np.abs(dead - weight[:, [70, 191]]) <= 0.5001 * scales)
    none = gptq(weight, torch.zeros(192, 192, dtype=torch.float64), bits=4, group=64)
    nearest = group_int.round_group_int(weight, bits=4, group=64, symmetric=True)
    assert np.array_equal(decode(none.pack()), decode(nearest))
    assert none.damp == 0.01


def test_a_hessian_without_a_factor() -> None:
    weight = weight_of(8, 64)
    # Singular, and by rounding a little indefinite: needs more damping than asked for.
    x = inputs(64, rows=3)
    hessian = hessian_of(x)
    slightly = hessian - 0.003 * hessian.diagonal().mean() * np.eye(64)
    assert gptq(weight, torch.from_numpy(hessian), bits=4, group=32, damp=1e-6).damp == 1e-6
    assert gptq(weight, torch.from_numpy(slightly), bits=4, group=32, damp=0.001).damp == pytest.approx(0.01)
    broken = hessian - 5 * hessian.diagonal().mean() * np.eye(64)
    broken += np.diag(broken.diagonal() * -1.5)
    found = gptq(weight, torch.from_numpy(broken), bits=4, group=32)
    assert found.damp == float("inf")
    nearest = group_int.round_group_int(weight, bits=4, group=32, symmetric=True)
    assert np.array_equal(decode(found.pack()), decode(nearest))


def test_every_row_by_itself() -> None:
    weight, hessian = weight_of(40, 192), torch.from_numpy(hessian_of(inputs(192)))
    both = gptq(weight, hessian, bits=4, group=64, clip="mse")
    one = gptq(weight[16:], hessian, bits=4, group=64, clip="mse")
    part = decode(both.pack(slice(16, 40)))
    assert np.array_equal(part, decode(both.pack())[16:])
    assert np.mean(part == decode(one.pack())) > 0.99


@pytest.mark.parametrize("shape", [(33, 192), (7, 100), (5, 37)])
def test_prunes_two_of_four(shape: tuple[int, int]) -> None:
    weight, hessian = weight_of(*shape), hessian_of(inputs(shape[1]))
    found = gptq(weight, torch.from_numpy(hessian), bits=4, group=32, sparse=True)
    assert found.mask is not None
    n, k = shape
    whole = k // 4 * 4
    assert np.all(found.mask[:, :whole].reshape(n, -1, 4).sum(axis=2) == 2)
    assert np.all(found.mask[:, whole:].sum(axis=1) == min(2, k - whole))
    packed = found.pack()
    assert packed.format == "sparse24"
    values = decode(packed)
    assert np.all(values[~found.mask] == 0)
    # Against pruning by magnitude and rounding what is left.
    size = np.pad(np.abs(weight), ((0, 0), (0, -k % 4)), constant_values=-1).reshape(n, -1, 4)
    keep = np.zeros(size.shape, bool)
    np.put_along_axis(keep, np.argsort(-size, axis=2)[:, :, :2], True, axis=2)
    keep = keep.reshape(n, -1)[:, :k]
    left = group_int.unpack(group_int.round_group_int(weight * keep, bits=4, group=32, symmetric=True))
    assert error(weight, found, hessian) < error(
        weight, sparse24.pack(left[0], keep, left[1], group=32), hessian
    )


def test_refuses() -> None:
    weight, hessian = weight_of(4, 32), torch.eye(32, dtype=torch.float64)
    for options in ({"act_order": True}, {"symmetric": False}, {"bits": 8}):
        with pytest.raises(UsageError, match="2:4"):
            gptq(weight, hessian, **({"bits": 4, "group": 32, "sparse": True} | options))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="not finite"):
        gptq(np.full((4, 32), np.nan, np.float32), hessian, bits=4, group=32)
    with pytest.raises(ModelError, match="not finite"):
        gptq(weight, hessian * float("nan"), bits=4, group=32)
