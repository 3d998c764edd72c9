"""SmoothQuant+: the search, the scales, and a model whose planted outliers destroy plain rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gristmill.errors import UsageError
from gristmill.methods import method
from gristmill.methods.draft import Draft
from gristmill.methods.weights import smoothquant_plus as module
from gristmill.methods.weights._smoothing import first_tokens, move, sites_within
from tests.kits import models, recipes

ROUNDING = "bits: 4, group: 32, symmetric: false"


@pytest.mark.parametrize("name", recipes.ARCHITECTURES)
def test_recovers_planted_outliers(tmp_path: Path, name: str) -> None:
    plain = recipes.speaking(tmp_path, name)
    (tmp_path / "planted").mkdir()
    planted = recipes.speaking(tmp_path / "planted", name, planted=50)
    base = recipes.hidden(recipes.draft_of(plain))
    assert recipes.distance(recipes.hidden(recipes.draft_of(planted)), base) < 1e-6
    good = recipes.hidden(recipes.applied(recipes.draft_of(plain), f"{{method: rtn, {ROUNDING}}}"))
    bad = recipes.hidden(recipes.applied(recipes.draft_of(planted), f"{{method: rtn, {ROUNDING}}}"))
    saved = recipes.applied(recipes.draft_of(planted), f"{{method: smoothquant_plus, {ROUNDING}}}")
    after = recipes.distance(recipes.hidden(saved), base)
    assert after < recipes.distance(bad, base) / 2
    assert after < recipes.distance(good, base) * 1.25
    assert saved.notes[0].startswith("smoothquant_plus: strength 0.")


@pytest.mark.parametrize("where", ["final_hidden", "per_block_sum", "logits"])
def test_the_loss_is_of_the_whole_rounded_model(tmp_path: Path, where: str) -> None:
    path = recipes.speaking(tmp_path)
    options = method("smoothquant_plus").options(bits=4, group=32, where=where)
    draft = recipes.draft_of(path)
    tensors = method("smoothquant_plus").tensors(draft.program, options)
    search = module._Search(draft, options, sites_within(draft, tensors), tensors)
    found = float(search.loss(None)["loss"][0])
    base = recipes.hidden(recipes.draft_of(path)).astype(np.float64)
    rounded = recipes.applied(recipes.draft_of(path), f"{{method: rtn, {ROUNDING}}}")
    after = recipes.hidden(rounded).astype(np.float64)
    if where == "final_hidden":
        assert found == pytest.approx(np.square(after - base).sum(), rel=1e-4)
    elif where == "logits":
        head = draft.weight("model.embed_tokens.weight").astype(np.float64)
        assert found == pytest.approx(np.square((after - base) @ head.T).sum(), rel=1e-4)
    else:
        assert len(search.wanted) == 4  # two sums in each of two layers
        sums = sum(np.square(b - a).sum() for a, b in zip(residuals(draft), residuals(rounded), strict=True))
        assert found == pytest.approx(sums, rel=1e-4)


def residuals(draft: Draft) -> list[NDArray[np.float64]]:
    """Every sum of the residual stream, of all calibration tokens."""
    program = draft.program
    names = [node.outputs[0] for node in program.nodes if node.op == "add"]
    result = []
    for ids in draft.sequences:
        with draft.executor.tap(*names) as taps:
            models.logits(draft.executor, np.asarray(ids, np.int32), [len(ids)])
        result += [torch.cat(taps[name]).double().numpy() for name in names]
    return result


def test_the_search_finds_less_than_no_scaling(tmp_path: Path) -> None:
    draft = recipes.draft_of(recipes.speaking(tmp_path, planted=50))
    options = method("smoothquant_plus").options(bits=4, group=32)
    tensors = method("smoothquant_plus").tensors(draft.program, options)
    search = module._Search(draft, options, sites_within(draft, tensors), tensors)
    none, half = (float(search.loss(a)["loss"][0]) for a in (None, 0.5))
    assert half < none / 4


def test_factors(tmp_path: Path) -> None:
    draft = recipes.draft_of(recipes.speaking(tmp_path))
    options = method("smoothquant_plus").options(quantile=1.0)
    tensors = method("smoothquant_plus").tensors(draft.program, options)
    sites = sites_within(draft, tensors)
    search = module._Search(draft, options, sites, tensors)
    values = next(site for site in sites if site.kind == "values")
    search.inputs[values.buffer][:2] = 0, 3  # dead, and alive
    found = search.factors(0.5)[values.buffer]
    # 9 heads of 64 in three groups: a channel is a column of three heads.
    weight = np.abs(draft.weight(values.consumers[0])).max(axis=0).reshape(3, 3, 64).max(axis=1).reshape(-1)
    assert found[0] == 1e-5
    assert found[1] == pytest.approx(np.sqrt(3 / weight[1]), rel=1e-6)
    # 0^0 is 1.
    assert search.factors(0.0)[values.buffer] == pytest.approx(1 / weight, rel=1e-6)
    assert np.array_equal(search.factors(None)[values.buffer], np.ones(192))


def test_moving_alone_changes_no_function_and_rounds_nothing(tmp_path: Path) -> None:
    path = recipes.speaking(tmp_path, "gemma3", planted=20)
    base = recipes.hidden(recipes.draft_of(path))
    draft = recipes.applied(
        recipes.draft_of(path), "{method: smoothquant_plus, quantise: false, bits: 3, group: 32}"
    )
    assert not draft.packed
    assert "model.layers.0.mlp.down_proj.weight" in draft.changed
    assert recipes.distance(recipes.hidden(draft), base) < 1e-8
    both = "{method: smoothquant_plus, quantise: false}, {method: gptq, bits: 4}"
    assert len(recipes.applied(recipes.draft_of(path), both).packed) == 14


def test_only_places_within_the_tensors(tmp_path: Path) -> None:
    draft = recipes.draft_of(recipes.speaking(tmp_path))
    sites = sites_within(draft, [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")])
    assert [(site.kind, site.name) for site in sites] == [
        ("norm", "layers.1.post_attention_layernorm"),
        ("gated", "layers.1.mlp.up_proj"),
    ]
    with pytest.raises(UsageError, match="nowhere"):
        recipes.applied(draft, "{method: smoothquant_plus, tensors: '*q_proj*'}")
    none = {site.buffer: np.ones(site.width) for site in sites}
    before = draft.weight("model.layers.1.mlp.up_proj.weight").copy()
    move(draft, sites, none)
    assert np.array_equal(draft.weight("model.layers.1.mlp.up_proj.weight"), before)


def test_resumes_and_runs(tmp_path: Path) -> None:
    made = recipes.check_compressed(
        recipes.speaking(tmp_path), f"{{method: smoothquant_plus, {ROUNDING}, step: 0.25}}", tmp_path
    )
    assert made.specs["model.layers.1.mlp.down_proj.weight"].mins


def test_first_tokens() -> None:
    assert first_tokens([[1, 2, 3], [4, 5, 6], [7]], 4) == [[1, 2, 3], [4]]
    assert first_tokens([[1, 2, 3], [4]], 9) == [[1, 2, 3], [4]]
    assert first_tokens([[1, 2, 3], [4]], 3) == [[1, 2, 3]]
