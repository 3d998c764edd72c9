"""AWQ: the search per site, the clipping, and that nothing but rounding changes the function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gristmill.backends.reference import ReferenceExecutor
from gristmill.calibrate.stream import Stream
from gristmill.formats import group_int
from gristmill.formats.packed import decode_f32
from gristmill.methods import method
from gristmill.methods.draft import Draft
from gristmill.methods.weights import awq as module
from gristmill.methods.weights._smoothing import sites_within
from gristmill.program.edits import linears_of
from tests.kits import models, recipes

ROUNDING = "bits: 4, group: 32, symmetric: false"


@pytest.mark.parametrize("name", recipes.ARCHITECTURES)
def test_recovers_planted_outliers(tmp_path: Path, name: str) -> None:
    path = recipes.speaking(tmp_path, name, planted=50)
    base = recipes.hidden(recipes.draft_of(path))
    bad = recipes.hidden(recipes.applied(recipes.draft_of(path), f"{{method: rtn, {ROUNDING}}}"))
    found = recipes.hidden(recipes.applied(recipes.draft_of(path), f"{{method: awq, {ROUNDING}}}"))
    assert recipes.distance(found, base) < recipes.distance(bad, base) / 2


def test_the_search_takes_the_best_of_its_grid(tmp_path: Path) -> None:
    """Against the search written out: every strength tried on the whole block from its inputs on."""
    draft = recipes.draft_of(recipes.speaking(tmp_path, planted=8))
    options = method("awq").options(bits=3, group=32, grid=5)
    tensors = method("awq").tensors(draft.program, options)
    sites = {site.buffer: site for site in sites_within(draft, tensors)}
    readers = linears_of(draft.program)
    stream = Stream(draft.executor, draft.sequences)
    seen = 0
    for node in stream:
        if node.op != "linear" or node.inputs[0] not in sites or node != readers[node.inputs[0]][0]:
            continue
        site = sites[node.inputs[0]]
        found = module._search(stream, site, readers[node.inputs[0]], options)
        x = torch.cat(stream.inputs(node)).double()
        mean = np.full(site.width, -1.0)
        for column, channel in enumerate(site.channels):
            mean[channel] = max(mean[channel], float(x[:, column].abs().mean()))
        losses = []
        tried = []
        for strength in (0, 0.2, 0.4, 0.6, 0.8):
            s = mean**strength
            s /= np.sqrt(s.max() * s.min())
            tried.append(s)
            along = s[site.channels]
            rounded = {}
            for name in site.consumers:
                scaled = (draft.weight(name).astype(np.float64) * along).astype(np.float32)
                packed = group_int.round_group_int(scaled, bits=3, group=32, symmetric=False)
                rounded[name] = decode_f32(packed) / along
            if len(site.consumers) == 1:
                e = rounded[site.consumers[0]] - draft.weight(site.consumers[0])
                losses.append(float((x @ torch.from_numpy(e).T).square().sum()))
            else:
                end = module._end_of_block(stream, readers[node.inputs[0]])
                assert end.name.endswith(END[len(site.consumers)])
                losses.append(block_error(draft, rounded, END[len(site.consumers)]))
        at = int(np.argmin([np.abs(found - s).max() for s in tried]))
        assert np.allclose(found, tried[at])
        assert losses[at] <= min(losses) * (1 + 1e-4)
        seen += 1
    assert seen == len(sites) == 8


END = {3: "self_attn.o_proj", 2: "mlp.down_proj"}
"""What is behind q, k and v, and behind gate and up."""


def block_error(draft: Draft, weights: Mapping[str, NDArray[np.float64]], end: str) -> float:
    """The squared error of the end of a block's half whose matrices are these, in whole runs."""
    layer = next(iter(weights)).split(".")[2]
    output = draft.program.node(f"layers.{layer}.{end}").outputs[0]
    exact = {name: torch.from_numpy(np.array(draft.weight(name))) for name in draft.program.weights}
    changed = exact | {name: torch.from_numpy(w.astype(np.float32)) for name, w in weights.items()}
    total = 0.0
    for ids in draft.sequences:
        found = []
        for used in (exact, changed):
            executor = ReferenceExecutor(draft.program, used)
            with executor.tap(output) as taps:
                models.logits(executor, np.asarray(ids, np.int32), [len(ids)])
            found.append(torch.cat(taps[output]).double())
        total += float((found[0] - found[1]).square().sum())
    return total


@pytest.mark.parametrize("columns", [64, 72])
def test_clipping_takes_the_least_output_error(columns: int) -> None:
    rng = np.random.default_rng(columns)
    values = rng.standard_t(3, (6, columns)).astype(np.float32)
    x = rng.standard_normal((50, columns)) * np.exp(rng.standard_normal(columns))
    options = method("awq").options(bits=2, group=16)
    gram = module._grams([torch.from_numpy(x[:20]).float(), torch.from_numpy(x[20:]).float()], 16)
    found = module._clipped(values, gram, options)

    def loss(cut: np.ndarray, row: int, group: slice) -> float:
        packed = group_int.round_group_int(cut, bits=2, group=16, symmetric=False)
        e = (decode_f32(packed) - values)[row, group].astype(np.float64)
        return float(np.square(x[:, group] @ e).sum())

    clipped = 0
    for row in range(6):
        for start in range(0, columns, 16):
            group = slice(start, min(start + 16, columns))
            losses = []
            for i in range(10):
                bound = np.abs(values[row, group]).max() * (1 - 0.05 * i)
                cut = values.copy()
                cut[row, group] = np.clip(cut[row, group], -bound, bound)
                losses.append(loss(cut, row, group))
            assert loss(found, row, group) <= min(losses) * (1 + 1e-3)
            clipped += int(np.argmin(losses) > 0)
    assert clipped > 5


def test_moving_alone_changes_no_function(tmp_path: Path) -> None:
    path = recipes.speaking(tmp_path, "qwen2", planted=20)
    base = recipes.hidden(recipes.draft_of(path))
    draft = recipes.applied(recipes.draft_of(path), "{method: awq, quantise: false, group: 32}")
    assert not draft.packed
    assert draft.changed
    assert recipes.distance(recipes.hidden(draft), base) < 1e-8


def test_a_part_of_the_tensors(tmp_path: Path) -> None:
    draft = recipes.applied(
        recipes.draft_of(recipes.speaking(tmp_path)), f"{{method: awq, {ROUNDING}, tensors: '*.1.mlp*'}}"
    )
    assert {name.split(".")[2] for name in draft.changed} == {"1"}
    assert len(draft.packed) == 3


def test_resumes_and_runs(tmp_path: Path) -> None:
    made = recipes.check_compressed(
        recipes.speaking(tmp_path), f"{{method: awq, {ROUNDING}, grid: 4}}", tmp_path
    )
    assert made.specs["model.layers.1.mlp.down_proj.weight"].group == 32
