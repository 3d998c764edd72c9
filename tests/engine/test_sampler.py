"""The native sampler against plain float64 NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from gristmill.backends.native import _native
from gristmill.engine.sampling import SamplingParams

Floats = NDArray[np.float64]


def philox(key: int, low: int, high: int = 0) -> list[int]:
    """Philox4x32-10 as published."""
    c = [low & 0xFFFFFFFF, low >> 32, high & 0xFFFFFFFF, high >> 32]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def penalised(
    logits: Floats, params: SamplingParams, prompt: Sequence[int], completion: Sequence[int]
) -> Floats:
    x = logits.copy()
    for token in {*prompt, *completion}:
        x[token] = (
            x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        )
        count = list(completion).count(token)
        x[token] -= params.presence_penalty * (count > 0) + params.frequency_penalty * count
    return x


def distribution(x: Floats, params: SamplingParams) -> tuple[Floats, NDArray[np.int64]]:
    """Probabilities [V] after the filters, and the ids that are kept in the order of preference."""
    order = np.lexsort((np.arange(len(x)), -x))
    y = x / params.temperature
    if params.top_k:
        order = order[: params.top_k]
    p = np.exp(y[order] - y[order[0]])
    p /= p.sum()
    keep = np.concatenate([[0.0], np.cumsum(p)[:-1]]) < params.top_p if params.top_p < 1 else p >= 0
    order, p = order[keep], p[keep]
    keep = p >= params.min_p * p[0] * (1 - 1e-12)
    order, p = order[keep], p[keep]
    result = np.zeros(len(x))
    result[order] = p / p.sum()
    return result, order


def make_row(
    params: SamplingParams, prompt: Sequence[int] = (), completion: Sequence[int] = ()
) -> _native.SampleRow:
    row = _native.SampleRow(
        np.array(prompt, np.int32),
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        params.seed or 0,
        -1 if params.logprobs is None else params.logprobs,
    )
    for token in completion:
        row.push(token)
    return row


def draw(
    logits: NDArray[np.float32], rows: list[_native.SampleRow], pool: _native.Pool | None = None
) -> list[int]:
    tokens = np.full(len(rows), -1, np.int32)
    _native.sample(
        np.ascontiguousarray(np.broadcast_to(logits, (len(rows), logits.shape[-1]))), rows, tokens, pool
    )
    result: list[int] = tokens.tolist()
    return result


def random_logits(size: int, seed: int = 0, spread: float = 3.0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


@pytest.mark.parametrize(
    ("key", "low", "high", "words"),
    [
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, 2**64 - 1, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            0x85A308D3243F6A88,
            0x0370734413198A2E,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(key: int, low: int, high: int, words: tuple[int, ...]) -> None:
    assert _native.philox(key, low, high) == words
    assert tuple(philox(key, low, high)) == words


CASES = {
    "plain": SamplingParams(temperature=1.0),
    "hot": SamplingParams(temperature=3.0),
    "cool": SamplingParams(temperature=0.3),
    "top-k": SamplingParams(temperature=1.0, top_k=7),
    "top-k 1": SamplingParams(temperature=1.0, top_k=1),
    "top-k all": SamplingParams(temperature=1.0, top_k=10**6),
    "top-p": SamplingParams(temperature=1.0, top_p=0.8),
    "top-p hot": SamplingParams(temperature=2.5, top_p=0.95),
    "top-p small": SamplingParams(temperature=1.0, top_p=1e-6),
    "min-p": SamplingParams(temperature=1.0, min_p=0.05),
    "min-p 1": SamplingParams(temperature=1.0, min_p=1.0),
    "all": SamplingParams(temperature=1.3, top_k=40, top_p=0.9, min_p=0.02),
    "many": SamplingParams(temperature=1.3, top_k=1500, top_p=0.97, min_p=0.001),
}


@pytest.mark.parametrize("size", [1, 5, 64, 97, 1000, 5003])
@pytest.mark.parametrize("case", CASES)
def test_draws_what_the_oracle_draws(case: str, size: int) -> None:
    """The inverse of the distribution function at Philox's number, with the ids in the sampler's order."""
    params = CASES[case]
    logits = random_logits(size, seed=size)
    probabilities, order = distribution(logits.astype(np.float64), params)
    # Few candidates are kept in the order of preference, whole rows in the order of their ids.
    if not 0 < params.top_k <= 1024:
        order = np.sort(order)
    edges = np.cumsum(probabilities[order])
    seeds = range(100, 164)
    prompts = [list(range(seed % 7)) for seed in seeds]
    rows = [make_row(replace(params, seed=s), [0] * len(p)) for s, p in zip(seeds, prompts, strict=True)]
    for seed, prompt, token in zip(seeds, prompts, draw(logits, rows), strict=True):
        words = philox(seed, len(prompt))
        number = ((words[0] << 32 | words[1]) >> 11) / 2**53
        if np.min(np.abs(edges[:-1] - number), initial=1.0) < 1e-5:
            continue  # too near the border between two tokens to say
        assert token == order[min(int(np.searchsorted(edges, number, side="right")), len(order) - 1)]


@pytest.mark.parametrize("case", CASES)
def test_distribution(case: str) -> None:
    """Chi-square of 20,000 draws with fixed seeds, over tokens expected at least 8 times."""
    params = CASES[case]
    logits = random_logits(50, seed=3, spread=2.0)
    probabilities, order = distribution(logits.astype(np.float64), params)
    count = 20_000
    found = np.bincount(draw(logits, [make_row(replace(params, seed=s)) for s in range(count)]), minlength=50)
    assert set(np.flatnonzero(found)) <= set(order.tolist())
    expected = probabilities * count
    big = expected >= 8
    assert big.any()
    freedom = int(big.sum()) - 1
    statistic = float((((found - expected) ** 2)[big] / expected[big]).sum())
    # Five standard deviations of the chi-square distribution.
    assert statistic <= freedom + 5 * math.sqrt(2 * max(freedom, 1))


@pytest.mark.parametrize("k", [1, 3, 4, 5, 1030])
def test_top_k_of_equal_logits_keeps_exactly_k_of_lowest_id(k: int) -> None:
    logits = np.zeros(3000, np.float32)
    logits[10:14] = 1.0
    kept = {10, 11, 12, 13, *range(10), *range(14, 3000)} if k > 4 else {10, 11, 12, 13}
    rule = [*range(10, 14), *range(10), *range(14, 3000)][:k]
    rows = [
        make_row(SamplingParams(temperature=5.0, top_k=k, seed=s)) for s in range(4000 if k < 10 else 300)
    ]
    found = set(draw(logits, rows))
    assert found <= set(rule) <= kept
    if k < 10:
        assert found == set(rule)


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 130, 49152])
def test_greedy_takes_the_first_highest(size: int) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        logits = rng.integers(-3, 4, size).astype(np.float32)
        logits[logits == 0] = rng.choice(np.array([0.0, -0.0], np.float32), int((logits == 0).sum()))
        assert draw(logits, [make_row(SamplingParams())]) == [int(np.argmax(logits))]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-4])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = random_logits(3000, seed=1)
    for params in (SamplingParams(temperature=temperature), SamplingParams(temperature=temperature, top_k=9)):
        assert (
            draw(logits, [make_row(replace(params, seed=s)) for s in range(50)])
            == [int(logits.argmax())] * 50
        )


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1.0), CASES["all"], CASES["top-p"]]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 15, 63, 64, 129])
def test_refuses_what_is_not_a_number_and_leaves_the_rows_alone(
    params: SamplingParams, bad: float, at: int
) -> None:
    logits = random_logits(130)[None].repeat(3, 0)
    logits[1, at] = bad
    rows = [make_row(params, [1, 2]) for _ in range(3)]
    with pytest.raises(ValueError, match="row 1"):
        _native.sample(logits, rows, np.zeros(3, np.int32), None)
    assert [row.position for row in rows] == [2, 2, 2]


@pytest.mark.parametrize("case", CASES)
def test_minus_infinity_is_never_drawn(case: str) -> None:
    logits = random_logits(200, seed=2)
    logits[np.random.default_rng(0).permutation(200)[:190]] = -np.inf
    found = draw(logits, [make_row(replace(CASES[case], seed=s)) for s in range(300)])
    assert np.isfinite(logits[found]).all()
    with pytest.raises(ValueError, match="row 0"):
        draw(np.full(10, -np.inf, np.float32), [make_row(CASES[case])])


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(presence_penalty=1.1),
        SamplingParams(frequency_penalty=0.7),
        SamplingParams(repetition_penalty=0.6, presence_penalty=-2, frequency_penalty=-0.3),
        SamplingParams(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2),
    ],
)
def test_penalties(params: SamplingParams) -> None:
    """Greedy, step by step: every token drawn counts from then on."""
    logits = random_logits(40, seed=5, spread=1.0)
    prompt = [3, 3, 7, int(logits.argmax())]
    row = make_row(params, prompt)
    completion: list[int] = []
    for _ in range(60):
        expected = penalised(logits.astype(np.float64), params, prompt, completion)
        token = draw(logits, [row])[0]
        assert expected[token] == pytest.approx(expected.max(), abs=1e-4)
        completion.append(token)
    assert row.position == 64


@pytest.mark.parametrize("count", [0, 1, 20])
@pytest.mark.parametrize("size", [7, 1000])
def test_logprobs_are_those_of_the_raw_logits(count: int, size: int) -> None:
    logits = random_logits(size, seed=9)
    exact = logits.astype(np.float64)
    exact = exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())
    params = SamplingParams(temperature=2.0, top_k=5, repetition_penalty=1.5, logprobs=count, seed=4)
    row = make_row(params, [1, 2, 3])
    token = draw(logits, [row])[0]
    own, top = row.logprobs()
    assert own == pytest.approx(exact[token], abs=2e-6)
    order = np.lexsort((np.arange(size), -exact))[:count]
    assert [index for index, _ in top] == order.tolist()
    assert [value for _, value in top] == pytest.approx(exact[order].tolist(), abs=2e-6)


def test_a_row_does_not_depend_on_the_others_or_the_threads() -> None:
    rng = np.random.default_rng(0)
    params = [replace(p, seed=i, logprobs=3 if i % 2 else None) for i, p in enumerate([*CASES.values()] * 2)]
    params += [SamplingParams(), SamplingParams(repetition_penalty=1.4)]
    logits = rng.normal(0, 3, (len(params), 3001)).astype(np.float32)
    prompts = [rng.integers(0, 3001, 5).tolist() for _ in params]
    alone = [draw(logits[i], [make_row(p, prompts[i])])[0] for i, p in enumerate(params)]
    for pool in (None, _native.Pool(1), _native.Pool(2), _native.Pool(5)):
        order = rng.permutation(len(params))
        rows = [make_row(params[i], prompts[i]) for i in order]
        tokens = np.zeros(len(params), np.int32)
        _native.sample(logits[order], rows, tokens, pool)
        assert tokens.tolist() == [alone[i] for i in order]


def test_position_is_the_counter() -> None:
    logits = random_logits(1000, seed=8)
    params = SamplingParams(temperature=1.0, seed=11)
    row = make_row(params, [5])
    drawn = [draw(logits, [row])[0] for _ in range(20)]
    assert len(set(drawn)) > 5
    assert drawn == [draw(logits, [make_row(params, [0] * (1 + i))])[0] for i in range(20)]


def test_refuses_mismatched_arrays() -> None:
    row = make_row(SamplingParams())
    with pytest.raises(ValueError, match="logits must be"):
        _native.sample(np.zeros((2, 4), np.float32), [row], np.zeros(1, np.int32), None)
    with pytest.raises(TypeError):
        _native.sample(np.zeros((1, 4)), [row], np.zeros(1, np.int32), None)
    with pytest.raises(ValueError, match="no logits"):
        _native.sample(np.zeros((1, 0), np.float32), [row], np.zeros(1, np.int32), None)


@pytest.mark.parametrize("level", _native.available_levels())
def test_levels_agree(level: str) -> None:
    params = [replace(p, seed=i, logprobs=2) for i, p in enumerate([*CASES.values()] * 4)]
    for size in (1, 30, 1000, 5003):
        logits = np.random.default_rng(size).normal(0, 3, (len(params), size)).astype(np.float32)
        found = []
        for name in ("", level):
            rows = [make_row(p) for p in params]
            tokens = np.zeros(len(params), np.int32)
            _native.sample(logits, rows, tokens, None, name)
            found.append((tokens.tolist(), [row.logprobs() for row in rows]))
        assert found[0] == found[1]
