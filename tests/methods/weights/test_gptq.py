"""The method GPTQ: layer after layer, in the model's order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gristmill.calibrate import gptq as solver
from gristmill.calibrate.stream import Stream
from gristmill.formats.packed import decode_f32
from gristmill.methods.draft import Draft
from tests.kits import recipes


@pytest.mark.parametrize("name", recipes.ARCHITECTURES)
def test_closer_than_nearest(tmp_path: Path, name: str) -> None:
    path = recipes.speaking(tmp_path, name)
    base = recipes.hidden(recipes.draft_of(path))
    options = "bits: 3, group: 32, clip: mse"
    nearest = recipes.hidden(recipes.applied(recipes.draft_of(path), f"{{method: rtn, {options}}}"))
    found = recipes.hidden(recipes.applied(recipes.draft_of(path), f"{{method: gptq, {options}}}"))
    assert recipes.distance(found, base) < recipes.distance(nearest, base)


def test_layers_see_rounded_predecessors(tmp_path: Path) -> None:
    """Every matrix is what the solver makes of the inputs that the rounded layers in front give."""
    path = recipes.speaking(tmp_path)
    draft = recipes.draft_of(path)
    original = recipes.draft_of(path)
    recipes.applied(draft, "{method: gptq, bits: 4, group: 64, tensors: ['*q_proj*', '*v_proj*', '*down*']}")
    assert len(draft.packed) == 6
    stream = Stream(draft.executor, draft.sequences)
    checked = 0
    for node in stream:
        if node.op == "linear" and (name := node.weights[0]) in draft.packed:
            x = torch.cat(stream.inputs(node)).double()
            expected = solver.gptq(
                original.weight(name), 2 * x.T @ x / len(x), bits=4, group=64, clip="mse"
            ).pack()
            same = decode_f32(expected) == draft.weight(name)
            # q and v were solved in one piece, and the sums of H were made in other portions.
            assert np.mean(same) > 0.98, name
            checked += 1
        if checked == 6:
            break
    assert checked == 6


def test_resumes_and_runs(tmp_path: Path) -> None:
    made = recipes.check_compressed(
        recipes.speaking(tmp_path), "{method: gptq, bits: 3, group: 32, symmetric: false}", tmp_path
    )
    spec = made.specs["model.layers.1.mlp.down_proj.weight"]
    assert (spec.bits, spec.group, spec.mins) == (3, 32, True)


def test_says_where_it_rounded_to_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_factor(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
        return torch.eye(len(hessian), dtype=torch.float64), float("inf")

    monkeypatch.setattr(solver, "_root", no_factor)
    draft = recipes.applied(
        recipes.draft_of(recipes.speaking(tmp_path)), "{method: gptq, tensors: '*.0.*.[qk]_proj*'}"
    )
    assert draft.notes == [
        "gptq: no factor of the Hessian; rounded to nearest: model.layers.0.self_attn.q_proj.weight, "
        "model.layers.0.self_attn.k_proj.weight"
    ]


def test_notes_are_kept_with_the_work(tmp_path: Path) -> None:
    source = recipes.draft_of(recipes.speaking(tmp_path)).source
    (tmp_path / "kept").mkdir()
    computed = []
    for _ in range(2):
        draft = Draft(source, kept=tmp_path / "kept")
        draft.notes.append("first")

        def work(draft: Draft = draft) -> dict[str, np.ndarray]:
            computed.append(draft)
            draft.notes.append("second")
            return {"x": np.ones(2, np.float32)}

        assert draft.once("work", work)["x"].tolist() == [1, 1]
        assert draft.notes == ["first", "second"]
    assert len(computed) == 1
