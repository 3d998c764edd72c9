"""Planted outliers: the function stays, chosen channels grow by the factor, rounding is ruined."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gristmill.backends.reference import ReferenceExecutor
from gristmill.calibrate.planted import plant
from gristmill.calibrate.sites import GATED, KEYS, NORM, VALUES, find_sites
from gristmill.calibrate.statistics import AbsMax
from gristmill.calibrate.stream import Stream
from gristmill.errors import UsageError
from gristmill.models import build_program
from tests.kits import files, models

OF = models.configs()["llama-smollm2"]
PROGRAM = build_program(OF)
IDS = [models.tokens(n, OF["vocab_size"], seed=n) for n in (40, 9)]


def largest(weights: files.Tensors) -> tuple[dict[str, np.ndarray], list[torch.Tensor]]:
    """Per buffer the largest magnitude of every column, and the logits."""
    stream = Stream(ReferenceExecutor(PROGRAM, weights, dtype="float64"), IDS)
    found = {}
    for node in stream:
        for i, name in enumerate(node.inputs):
            statistic = AbsMax(PROGRAM.buffers[name].shape[-1])
            for x in stream.inputs(node, i):
                statistic.update(x)
            found[name] = statistic.result().numpy()
    return found, stream.output()


@pytest.mark.parametrize("kind", [NORM, GATED, VALUES, KEYS])
def test_chosen_channels_grow_and_the_function_stays(kind: str) -> None:
    weights = {name: v.astype(np.float64) for name, v in files.weights(OF).items()}
    planted = plant(PROGRAM, weights, [kind], share=0.02)
    (before, expected), (after, found) = largest(weights), largest(planted)
    for a, b in zip(found, expected, strict=True):
        assert models.relative_error(a.numpy(), b.numpy()) < 1e-9
    sites = find_sites(PROGRAM, [kind])
    for site in sites:
        ratio = after[site.buffer] / before[site.buffer]
        grown = np.unique(site.channels[np.isclose(ratio, 50)])
        assert len(grown) == max(1, round(0.02 * site.width))
        assert np.allclose(ratio[~np.isin(site.channels, grown)], 1)
    changed = {name for name in weights if planted[name] is not weights[name]}
    assert changed == {name for site in sites for name in (*site.producers, *site.consumers)}


def test_the_seed_chooses() -> None:
    weights = files.weights(OF)
    name = "model.layers.1.input_layernorm.weight"
    one, again, other = (plant(PROGRAM, weights, seed=seed)[name] for seed in (3, 3, 4))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert one.dtype == np.float32
    # Not the same channels in every layer.
    zero = "model.layers.0.input_layernorm.weight"
    assert not np.array_equal(one != weights[name], plant(PROGRAM, weights, seed=3)[zero] != weights[zero])


def test_rounding_to_four_bits_loses_the_planted_columns() -> None:
    """What planting is for: plain rounding leaves nothing of the columns that matter most."""
    weights = files.weights(OF)
    planted = plant(PROGRAM, weights)
    for site in find_sites(PROGRAM, [NORM]):
        (norm,) = site.producers
        chosen = planted[norm] != weights[norm]
        assert chosen.sum() == 6
        for name in site.consumers:
            for given, lost in ((weights, False), (planted, True)):
                step = np.abs(given[name]).max(1, keepdims=True) / 7
                codes = np.round(given[name] / step)
                assert np.all(codes[:, chosen] == 0) == lost


def test_wrong_values_are_refused() -> None:
    for options in ({"share": 0.0}, {"share": 1.5}, {"factor": 0.0}, {"factor": float("inf")}):
        with pytest.raises(UsageError):
            plant(PROGRAM, files.weights(OF), **options)
