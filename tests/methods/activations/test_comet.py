"""COMET: blocks and orders, the permutation that changes nothing, and the products in float64."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gristmill.backends.native import NativeExecutor
from gristmill.backends.reference import ReferenceExecutor
from gristmill.calibrate.planted import plant
from gristmill.calibrate.stream import Stream
from gristmill.errors import UsageError
from gristmill.io.checkpoint import Checkpoint
from gristmill.io.convert import prepare
from gristmill.methods.activations import comet
from gristmill.methods.activations.comet import METHOD, CometOptions
from gristmill.methods.base import linear_weights
from gristmill.methods.compress import compress
from gristmill.methods.draft import Draft
from gristmill.methods.recipe import Recipe
from gristmill.models import build_program
from gristmill.program.nodes import Node, Program
from tests.kits import models, recipes

CASES = ["llama-smollm2", "llama-biases", "mistral", "qwen2", "qwen3", "gemma3-linear"]


def draft_of(case: str, directory: Path, planted: bool = False) -> Draft:
    """A draft with two short sequences, and perhaps planted outliers in every input."""
    model, _ = models.save(directory / case, models.configs()[case])
    draft = Draft(Checkpoint.open(prepare(model)))
    draft.sequences = [models.tokens(n, draft.program.vocab_size, seed=n).tolist() for n in (40, 24)]
    if planted:
        weights = {name: draft.weight(name) for name in draft.program.weights}
        for name, value in plant(draft.program, weights, ["norm", "gated", "values"]).items():
            draft.set(name, value)
    return draft


def apply(draft: Draft, tensors: list[str] | None = None, **options: Any) -> dict[str, Node]:
    """The encodes that COMET puts in, by the name of the first linear behind."""
    METHOD.apply(draft, CometOptions(**options), tensors or linear_weights(draft.program))
    found = [node for node in draft.program.nodes if node.op == "encode"]
    return {node.name.removesuffix(".input"): node for node in found}


def logits(draft: Draft, program: Program | None = None) -> np.ndarray:
    program = program or draft.program
    weights = {name: draft.weight(name) for name in draft.program.weights}
    ids = models.tokens(30, program.vocab_size)
    return models.logits(ReferenceExecutor(program, weights, dtype="float64"), ids, [30])


def unrounded(program: Program) -> Program:
    """The orders alone."""
    nodes: list[Node] = []
    renamed: dict[str, str] = {}
    for original in program.nodes:
        node = replace(original, inputs=tuple(renamed.get(name, name) for name in original.inputs))
        if node.op != "encode":
            nodes.append(node)
        elif node.weights:
            nodes.append(replace(node, attributes={"kind": "none", "group": 0, "bits": []}))
        else:
            renamed[node.outputs[0]] = node.inputs[0]
    return program.with_nodes(tuple(nodes))


@pytest.mark.parametrize("case", CASES)
def test_the_order_changes_nothing(case: str, tmp_path: Path) -> None:
    """Without rounding, gathered columns and folded rows give the model's own logits."""
    draft = draft_of(case, tmp_path)
    expected = logits(draft)
    encodes = apply(draft, weight_bits=None)
    found = logits(draft, unrounded(draft.program))
    assert models.relative_error(found, expected) < 1e-12
    assert models.relative_error(logits(draft), expected) > 1e-3  # and with it, something is seen
    for name, node in encodes.items():
        assert bool(node.weights) != name.endswith("down_proj")
        if node.weights:
            order = draft.weight(node.weights[0])
            assert np.array_equal(np.sort(order), np.arange(len(order)))
            assert not np.array_equal(order, np.arange(len(order)))


def test_order_and_blocks_by_hand(tmp_path: Path) -> None:
    """Every order is the channels' maxima descending; 8 bits for blocks with an outlier, read off them."""
    draft = draft_of("llama-smollm2", tmp_path, planted=True)
    peaks: dict[str, torch.Tensor] = {}
    stream = Stream(draft.executor, draft.sequences)
    for node in stream:
        if node.op == "linear":
            peaks[node.name] = torch.cat(stream.inputs(node)).abs().amax(0)
    encodes = apply(draft, weight_bits=None, block=64, threshold=8.0)
    assert len(encodes) == 8
    mixed = 0
    for name, node in encodes.items():
        peak = peaks[name].double().numpy()
        blocks = -(-len(peak) // 64)
        outliers = int(np.sum(peak > 8 * np.median(peak)))
        high = -(-outliers // 64)
        assert node.attributes["bits"] == [8] * high + [4] * (blocks - high)
        mixed += 0 < high < blocks
        if node.weights:
            order = draft.weight(node.weights[0]).astype(int)
            assert np.all(np.diff(peak[order]) <= 0)
    assert mixed == 8
    # 264 columns: the last block is ragged, and one of 4 bits.
    assert encodes["layers.1.mlp.down_proj"].attributes["bits"][-1] == 4


def test_equal_channels_keep_their_order(tmp_path: Path) -> None:
    draft = draft_of("llama", tmp_path)
    norm = "model.layers.0.input_layernorm.weight"
    draft.set(norm, np.zeros_like(draft.weight(norm)))
    encodes = apply(draft, weight_bits=None)
    q = encodes["layers.0.self_attn.q_proj"]
    assert np.array_equal(draft.weight(q.weights[0]), np.arange(192))
    assert set(q.attributes["bits"]) == {4}  # no channel above any threshold
    assert np.isfinite(logits(draft)).all()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("permute", [True, False])
def test_share(share: float, permute: bool, tmp_path: Path) -> None:
    """As many blocks with a permutation as without; none, and all, are plain W4A4 and W4A8."""
    draft = draft_of("llama-smollm2", tmp_path, planted=True)
    encodes = apply(draft, weight_bits=None, share=share, permute=permute)
    for node in encodes.values():
        bits = node.attributes["bits"]
        assert bits.count(8) == int(share * len(bits) + 0.5)
        assert set(bits) <= {4, 8}
        assert bool(node.weights) <= permute


def test_the_permutation_pays(tmp_path: Path) -> None:
    """Outliers spread over all blocks: at an equal share, gathering them lowers the error of the logits."""
    errors = {}
    for permute in (True, False):
        draft = draft_of("llama-smollm2", tmp_path / str(permute), planted=True)
        expected = logits(draft)
        apply(draft, weight_bits=None, share=0.2, permute=permute)
        errors[permute] = float(np.square(logits(draft) - expected).mean())
    assert errors[True] < 0.8 * errors[False]


def test_output_error_in_float64() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, (7, 104)).astype(np.float32)
    weights = [rng.normal(0, 1, (n, 104)).astype(np.float32) for n in (5, 9)]
    bits = np.array([8, 4, 4, 6])
    rounded = np.empty(x.shape)
    for g, b in enumerate(bits):
        piece = x[:, 32 * g : 32 * g + 32].astype(np.float64)
        scale = np.abs(piece).max(1, keepdims=True) / (2.0 ** (b - 1) - 1)
        rounded[:, 32 * g : 32 * g + 32] = scale * np.rint(piece / scale)
    above = sum(np.square((rounded - x) @ w.T.astype(np.float64)).sum() for w in weights)
    below = sum(np.square(x @ w.T.astype(np.float64)).sum() for w in weights)
    found = comet.output_error(torch.from_numpy(x), [torch.from_numpy(w) for w in weights], 32, bits)
    assert found == pytest.approx(np.sqrt(above / below), rel=1e-4)
    zero = torch.zeros(3, 104)
    assert comet.output_error(zero, [torch.from_numpy(weights[0])], 32, bits) == 0


def test_budget(tmp_path: Path) -> None:
    """The fewest blocks that pass: the error is within the budget, and with one block less it is not."""
    budget = 0.1
    draft = draft_of("llama-smollm2", tmp_path, planted=True)
    weights = {name: torch.from_numpy(draft.weight(name).copy()) for name in draft.program.weights}
    rows: dict[str, torch.Tensor] = {}
    readers: dict[str, list[str]] = {}
    stream = Stream(draft.executor, draft.sequences)
    for node in stream:
        if node.op == "linear":
            rows[node.name] = torch.cat(stream.inputs(node))
            readers.setdefault(node.inputs[0], []).append(node.weights[0])
    source = {node.name: node.inputs[0] for node in draft.program.nodes if node.op == "linear"}
    partly = 0
    for name, node in apply(draft, weight_bits=None, budget=budget).items():
        order = torch.argsort(-rows[name].abs().amax(0), stable=True)
        bits = np.array(node.attributes["bits"])
        high = int((bits == 8).sum())
        assert bits.tolist() == [8] * high + [4] * (len(bits) - high)
        columns = [weights[w][:, order] for w in readers[source[name]]]
        errors = []
        for many in (high, high - 1):
            tried = np.where(np.arange(len(bits)) < many, 8, 4)
            errors.append(comet.output_error(rows[name][:, order], columns, 64, tried))
        assert errors[0] <= budget or high == len(bits)
        assert errors[1] > budget or high == 0
        partly += 0 < high < len(bits)
    assert partly > 0


def test_rows_that_others_need_stay(tmp_path: Path) -> None:
    """Where gate and up are not the method's to change, the input of down_proj is gathered."""
    draft = draft_of("qwen2", tmp_path)
    expected = logits(draft)
    tensors = [name for name in linear_weights(draft.program) if "down_proj" in name or "gate" in name]
    before = draft.weight("model.layers.0.mlp.up_proj.weight").copy()
    encodes = apply(draft, tensors, weight_bits=None)
    assert all(node.weights for node in encodes.values())
    assert np.array_equal(draft.weight("model.layers.0.mlp.up_proj.weight"), before)
    assert models.relative_error(logits(draft, unrounded(draft.program)), expected) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_native_agrees_with_reference(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Draft, "sequences", [models.tokens(48, 250).tolist()])
    model, _ = models.save(tmp_path / "model", models.configs()[case])
    recipe = Recipe.from_yaml("methods: [{method: comet, block: 32, share: 0.3}]")
    compress(model, recipe, tmp_path / "out", evaluate=False)
    made = Checkpoint.open(tmp_path / "out")
    assert {made.specs[n].bits for n in linear_weights(made.program())} == {4}
    ids = models.tokens(30, made.program().vocab_size)
    expected = models.logits(ReferenceExecutor.load(made, dtype="float64"), ids, [30])
    for activations in ("exact", "fast"):
        with closing(
            NativeExecutor.load(tmp_path / "out", activations=activations, kv_dtype="f32")
        ) as executor:
            models.check_rounded(models.logits(executor, ids, [30]), expected)


@pytest.mark.parametrize(("permute", "orders"), [("true", 3), ("false", 0)])
def test_orders_count_as_bits(
    permute: str, orders: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Draft, "sequences", [models.tokens(48, 250).tolist()])
    recipe = Recipe.from_yaml(f"methods: [{{method: comet, permute: {permute}}}]")
    compress(recipes.one_layer(tmp_path), recipe, tmp_path / "out", evaluate=False)
    # An order in f32 for what q/k/v, o and gate/up read; down's is folded into gate and up.
    recipes.check_bits(tmp_path / "out", orders * 4 * 128)


def test_resumes_with_the_same_bytes(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.from_yaml("methods: [{method: comet}]")
    monkeypatch.setattr(Draft, "sequences", [models.tokens(48, 250).tolist()])
    compress(small, recipe, tmp_path / "whole", evaluate=False)
    real = comet.group_int.round_group_int

    def stopping(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(comet.group_int, "round_group_int", stopping)
    with pytest.raises(KeyboardInterrupt):
        compress(small, recipe, tmp_path / "resumed", evaluate=False)
    monkeypatch.setattr(comet.group_int, "round_group_int", real)

    def never(*args: Any) -> Any:
        raise AssertionError("the blocks were kept")

    monkeypatch.setattr(comet, "_analyse", never)
    compress(small, recipe, tmp_path / "resumed", evaluate=False)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes()


def test_refused() -> None:
    program = build_program(models.configs()["llama"])
    with pytest.raises(UsageError, match="a share or a budget, not both"):
        Recipe.from_yaml("methods: [{method: comet, share: 0.2, budget: 0.1}]")
    with pytest.raises(UsageError, match=r"comet \(permutation\) must come before rtn \(rounding, line 2\)"):
        Recipe.from_yaml("methods:\n- method: rtn\n- method: comet\n  weight_bits: null").plan(program)
    Recipe.from_yaml("methods:\n- {method: comet, weight_bits: null}\n- method: rtn").plan(program)
    Recipe.from_yaml("methods:\n- method: rtn\n- {method: comet, weight_bits: null, permute: false}").plan(
        program
    )


def test_keys_and_values_in_four_bits(tmp_path: Path) -> None:
    draft = draft_of("llama-smollm2", tmp_path)
    apply(draft, kv=True)
    formats = {n.attributes["kv_format"] for n in draft.program.nodes if n.op == "attention"}
    assert formats == {"int4-channel"}
    assert "kv_format" in METHOD.slots(CometOptions(kv=True))
    part = Recipe.from_yaml("methods: [{method: comet, kv: true, tensors: ['*.0.*', '*.1.mlp.*']}]")
    (tensors,) = part.plan(draft.program)
    draft = draft_of("llama-smollm2", tmp_path / "part")
    METHOD.apply(draft, CometOptions(kv=True), tensors)
    found = [n.attributes.get("kv_format") for n in draft.program.nodes if n.op == "attention"]
    assert found == ["int4-channel", None]
    draft = draft_of("llama-smollm2", tmp_path / "none")
    METHOD.apply(draft, CometOptions(kv=True), [name for name in tensors if ".mlp." in name])
    assert draft.notes == ["comet: no layer's k_proj is among the tensors: the cache stays as it is"]
    with pytest.raises(UsageError, match="sliding window"):
        apply(draft_of("gemma3-linear", tmp_path), kv=True)
    both = (
        "methods:\n- method: fireq\n  activations: false\n"
        "- method: comet\n  kv: true\n  weight_bits: null\n  permute: false\n"
    )
    with pytest.raises(UsageError, match=r"comet and fireq .* both fill the slot kv_format"):
        Recipe.from_yaml(both).plan(draft_of("llama", tmp_path).program)
