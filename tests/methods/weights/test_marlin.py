"""MARLIN's rounding rule, its clip search against the definition, and 2:4 pruning."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from gristmill.backends.native import NativeExecutor
from gristmill.calibrate.gptq import gptq
from gristmill.errors import UsageError
from gristmill.methods.recipe import Recipe
from gristmill.methods.weights.marlin import search_scale
from gristmill.models import build_program
from tests.kits import models, recipes


def test_the_rule() -> None:
    """2 max|x| / 15, codes -8 to 7: the largest positive value is cut to 7, the largest negative is not."""
    weight = np.zeros((3, 32), np.float32)
    weight[0, :3] = 7.5, -3.0, 2.5
    weight[1, :3] = -7.5, 3.0, 3.5
    found = gptq(
        weight,
        torch.eye(32, dtype=torch.float64),
        bits=4,
        group=32,
        fit=lambda x, root: (search_scale(x, root, 1), 0.0),
    )
    assert found.codes[0, :4].tolist() == [15, 5, 10, 8]  # 2.5 to even
    assert found.codes[1, :4].tolist() == [0, 11, 12, 8]
    assert found.scales[:2, 0].tolist() == [1.0, 1.0]
    # All zeros.
    assert found.scales[2, 0] == np.float16(2 / 15)
    assert np.all(found.codes[2] == 8)


def test_the_clip_search_is_its_definition() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_t(3, (32, 9)).astype(np.float32)
    x[:, 4] = 0
    inputs = rng.standard_normal((80, 32)) * np.exp(rng.standard_normal(32))
    hessian = inputs.T @ inputs
    # H^-1 = U^T U by NumPy's lower factor of H^-1; the search is given U^-1.
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    found = search_scale(x, torch.from_numpy(np.linalg.inv(upper)).float(), 76)
    plain = search_scale(x, torch.eye(32), 1)
    for row in range(9):
        full = 2 * (np.abs(x[:, row]).max() or 1) / 15
        losses = []
        for i in range(76):
            scale = full * (1 - i / 100)
            e = np.clip(np.rint(x[:, row] / scale), -8, 7) * scale - x[:, row]
            losses.append(float(np.square(np.linalg.solve(upper.T, e)).sum()))
        at = round((1 - found[row] / full) * 100)
        assert losses[at] <= min(losses) * (1 + 1e-4) + 1e-12
        assert plain[row] == pytest.approx(full)
    assert found[4] == pytest.approx(2 / 15)
    assert np.sum(found < plain * 0.99) > 4


@pytest.mark.parametrize("name", recipes.ARCHITECTURES)
def test_closer_than_nearest(tmp_path: Path, name: str) -> None:
    path = recipes.speaking(tmp_path, name)
    base = recipes.hidden(recipes.draft_of(path))
    nearest = recipes.hidden(recipes.applied(recipes.draft_of(path), "{method: rtn, group: 128}"))
    found = recipes.hidden(recipes.applied(recipes.draft_of(path), "{method: marlin}"))
    assert recipes.distance(found, base) < recipes.distance(nearest, base)


@pytest.mark.parametrize("sparse", ["false", "true"])
def test_resumes_and_runs(tmp_path: Path, sparse: str) -> None:
    made = recipes.check_compressed(
        recipes.speaking(tmp_path), f"{{method: marlin, group: 0, sparse: {sparse}}}", tmp_path
    )
    spec = made.specs["model.layers.0.self_attn.o_proj.weight"]
    assert spec.format == ("sparse24" if sparse == "true" else "group_int")
    assert (spec.group, spec.bits, spec.offset, spec.mins) == (576, 4, 8, False)
    assert made.activations == "bf16"
    with closing(NativeExecutor.load(made)) as executor:
        assert executor.activations == "bf16"


def test_sparse_groups_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="line 1: marlin: sparse: groups of 2:4 codes are multiples of 32"):
        Recipe.from_yaml("methods: [{method: marlin, group: 16, sparse: true}]")


def test_a_part_of_the_layers_only_notes_its_activations(tmp_path: Path) -> None:
    path = recipes.speaking(tmp_path)
    draft = recipes.applied(recipes.draft_of(path), "{method: marlin, group: 64, tensors: '*q_proj*'}")
    assert draft.activations is None
    assert len(draft.notes) == 1
    assert "only `--activations bf16` gives" in draft.notes[0]


@pytest.mark.parametrize(
    "other",
    [
        "round_activations",
        "flexq, weight_bits: null",
        "comet, weight_bits: null, permute: false",
        "fireq, weights: false, keys: none",
    ],
)
def test_nothing_else_may_round_its_inputs(other: str) -> None:
    program = build_program(models.configs()["llama"])
    for first, second in ((other, "marlin"), ("marlin", other)):
        recipe = Recipe.from_yaml(f"methods:\n- {{method: {first}}}\n- {{method: {second}}}")
        names = [entry.method.name for entry in recipe.entries]
        message = rf"line 3: {names[1]} and {names[0]} \(line 2\) both fill the slot activation_encoding"
        with pytest.raises(UsageError, match=message):
            recipe.plan(program)
    # Each on tensors of its own is fine.
    Recipe.from_yaml(
        f"methods: [{{method: {other}, tensors: '*.0.*'}}, {{method: marlin, tensors: '*.1.*'}}]"
    ).plan(program)
