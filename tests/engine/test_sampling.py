"""Sampling parameters: ranges, messages, defaults of a model."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gristmill.engine.sampling import SamplingParams
from gristmill.errors import ModelError, UsageError

GOOD: dict[str, list[Any]] = {
    "max_tokens": [None, 1, 10**6],
    "temperature": [0, 0.0, 1e-30, 1, 100],
    "top_k": [0, 1, 10**6],
    "top_p": [1e-9, 0.5, 1],
    "min_p": [0, 0.5, 1],
    "repetition_penalty": [0.01, 1, 100],
    "presence_penalty": [-2, 0, 2.0],
    "frequency_penalty": [-2, 0, 2.0],
    "stop": [(), None, "x", ["a", "b"], ["a"] * 20],
    "seed": [None, 0, 2**64 - 1],
    "logprobs": [None, 0, 20],
    "ignore_eos": [True, False],
}
BAD: dict[str, list[Any]] = {
    "max_tokens": [-1, 1.5, "7", True, 2**31],
    "temperature": [-1, 1e30, math.nan, math.inf, "hot", None, True, 10**400],
    "top_k": [-2, -1, 1.0, None],
    "top_p": [0, -0.1, 1.1, math.nan, "1"],
    "min_p": [-0.1, 2, math.nan],
    "repetition_penalty": [0, -1, 101, math.nan],
    "presence_penalty": [-2.1, 1e9, math.nan],
    "frequency_penalty": [2.1, -1e9, None],
    "stop": [7, [""], "", [1], ["a"] * 3 + [b"b"], [str(i) for i in range(17)], "x" * 257],
    "seed": [-1, 2**64, 0.5, "1"],
    "logprobs": [-1, 21, True],
    "ignore_eos": [1, None, "yes"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in GOOD.items() for v in values])
def test_accepts(name: str, value: Any) -> None:
    SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_refuses_in_one_line_that_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    assert len(message) < 160


def test_one_stop_string_is_not_taken_apart() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)  # type: ignore[arg-type]


def test_updated_checks_names_and_values() -> None:
    params = SamplingParams(temperature=0.5)
    assert params.updated({}) is params
    assert params.updated({"top_k": 3}) == SamplingParams(temperature=0.5, top_k=3)
    with pytest.raises(UsageError, match=r"unknown sampling parameter 'temp'.*temperature"):
        params.updated({"temp": 1})
    with pytest.raises(UsageError, match="top_k"):
        params.updated({"top_k": -5})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, SamplingParams()),
        ({"do_sample": True}, SamplingParams(temperature=1.0)),
        ({"do_sample": False, "temperature": 0.7, "top_k": 20}, SamplingParams(temperature=0.0, top_k=20)),
        ({"temperature": 0.7}, SamplingParams(temperature=0.7)),
        (
            {
                "do_sample": True,
                "temperature": 0.6,
                "top_k": 20,
                "top_p": 0.95,
                "min_p": None,
                "eos_token_id": 2,
            },
            SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
        ),
        ({"top_k": -1, "repetition_penalty": 1.05}, SamplingParams(repetition_penalty=1.05)),
        ({"max_length": 20, "max_new_tokens": 30}, SamplingParams(max_tokens=30)),
    ],
)
def test_defaults_of_a_model(config: dict[str, Any], expected: SamplingParams) -> None:
    assert SamplingParams.from_generation_config(config) == expected


def test_wrong_defaults_are_the_models_fault() -> None:
    with pytest.raises(ModelError, match=r"generation_config.json: top_p"):
        SamplingParams.from_generation_config({"top_p": 7})
