"""FlexQ: the integer product by planes and by bytes, the weights, and what the analysis picks."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from gristmill.backends.native import NativeExecutor, _native
from gristmill.backends.reference import ReferenceExecutor
from gristmill.calibrate.planted import plant
from gristmill.calibrate.stream import Stream
from gristmill.errors import UsageError
from gristmill.formats import dense, group_int
from gristmill.io.checkpoint import Checkpoint
from gristmill.io.convert import prepare
from gristmill.methods.activations import flexq
from gristmill.methods.activations.round_activations import inputs_of
from gristmill.methods.base import linear_weights
from gristmill.methods.compress import compress
from gristmill.methods.draft import Draft
from gristmill.methods.recipe import Recipe
from gristmill.models import build_program
from gristmill.program.builder import Builder
from gristmill.program.edits import round_inputs
from tests.kits import models, planes

KINDS = ["o_proj", "down_proj", "q_proj", "gate_proj"]


def codes(rng: np.random.Generator, bits: int, shape: tuple[int, int]) -> np.ndarray:
    """Random codes, with both ends of the range in every row and column of the corner."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    result = rng.integers(low, high + 1, shape)
    result[0], result[-1] = low, high
    return result


@pytest.mark.parametrize("q", range(1, 9))
@pytest.mark.parametrize("p", range(1, 9))
def test_planes_give_the_integer_product(p: int, q: int) -> None:
    rng = np.random.default_rng([p, q])
    for m, n, k in ((1, 1, 64), (5, 3, 192), (9, 4, 576), (2, 7, 104)):
        x, w = codes(rng, p, (m, k)), codes(rng, q, (n, k))
        assert np.array_equal(planes.product(planes.split(x, p), planes.split(w, q)), x @ w.T)
    # One-hot codes: every pair of planes with its own sign and weight.
    for i in range(p):
        for j in range(q):
            x, w = np.zeros((1, 40), int), np.zeros((1, 40), int)
            x[0, 37] = -(1 << i) if i == p - 1 else 1 << i
            w[0, 37] = -(1 << j) if j == q - 1 else 1 << j
            found = planes.product(planes.split(x, p), planes.split(w, q))
            assert found[0, 0] == x[0, 37] * w[0, 37]


def test_the_order_of_bits() -> None:
    x = np.array([[1, 0, -32, 31, *[0] * 29, -1]])
    expected = [[9, 2], [8, 2], [8, 2], [8, 2], [8, 2], [4, 2]]
    assert planes.split(x, 6)[:, 0].tolist() == expected


@pytest.mark.parametrize("level", _native.available_levels())
@pytest.mark.parametrize("q", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("p", [2, 3, 4, 5, 6, 7, 8])
def test_the_byte_path_gives_the_same_integers(level: str, p: int, q: int) -> None:
    """All scales are 1, so that the kernel's floats are the integers: K = 104, a ragged last group."""
    rng = np.random.default_rng([p, q])
    m, n, k, group = 6, 37, 104, 32
    top = (1 << (p - 1)) - 1
    x = rng.integers(-top, top + 1, (m, k))
    x[:, ::group] = top  # the largest of every group, so that its scale is 1
    w = codes(rng, q, (n, k))
    b = Builder("one")
    program = b.build(b.select_rows(b.linear(b.embedding("table.weight", m, k), "lm_head", n)))
    program = round_inputs(program, ["lm_head"], group=group, bits=[p])
    offset = 1 << (q - 1)
    packed = {
        "table.weight": dense.pack(x.astype(np.float32), "f32"),
        "lm_head.weight": group_int.pack(
            (w + offset).astype(np.uint8),
            np.ones((n, -(-k // group)), np.float16),
            bits=q,
            group=group,
            offset=offset,
        ),
    }
    with closing(NativeExecutor(program, packed, {}, activations="fast", level=level)) as executor:
        found = models.logits(executor, np.arange(m, dtype=np.int32), [m])
    assert np.array_equal(found, (x @ w.T).astype(np.float32))
    assert np.array_equal(found, planes.product(planes.split(x, p), planes.split(w, q)))


@pytest.mark.parametrize("k", [64, 192, 576, 104])
def test_six_bit_weights(k: int) -> None:
    """To half a scale, the largest of a group to 31, nothing lost to a floor, and rounded again the same."""
    rng = np.random.default_rng(k)
    values = rng.normal(0, 1, (5, k)).astype(np.float32)
    values[1] *= 1e-4  # far below the floor of 1e-5 that the released code has for a scale
    values[2, :64] = 0
    packed = group_int.round_group_int(values, bits=6, group=64, symmetric=True)
    found, scales, _ = group_int.unpack(packed)
    wide = np.repeat(scales.astype(np.float64), 64, axis=1)[:, :k]
    # A float16 scale is off by 2^-11 of itself, or by half the smallest subnormal.
    slack = 31 * (wide * 2.0**-11 + 2.0**-25)
    assert np.all(np.abs(group_int.decode(packed) - values) <= wide / 2 + slack)
    for row in (0, 1, 3, 4):
        for start in range(0, k, 64):
            piece = np.abs(values[row, start : start + 64])
            assert abs(int(found[row, start + piece.argmax()]) - 32) == 31
    assert not np.any(group_int.decode(packed)[2, :64])
    again = group_int.round_group_int(group_int.decode_f32(packed), bits=6, group=64, symmetric=True)
    assert np.array_equal(group_int.unpack(again)[0], found)


def draft_of(directory: Path, planted: bool = False) -> Draft:
    """A draft with two short sequences, and perhaps one outlier channel in every input of down_proj."""
    draft = Draft(Checkpoint.open(directory))
    vocab = draft.program.vocab_size
    draft.sequences = [models.tokens(n, vocab, seed=n).tolist() for n in (40, 24)]
    if planted:
        weights = {name: draft.weight(name) for name in draft.program.weights}
        for name, value in plant(draft.program, weights, ["gated"], share=1e-6).items():
            draft.set(name, value)
    return draft


@pytest.fixture(scope="module")
def stored(small: Path) -> Path:
    return prepare(small)


def by_kind(draft: Draft) -> list[dict]:
    inputs = inputs_of(draft.program, linear_weights(draft.program))
    return [{s: n for s, n in inputs.items() if n[0].name.endswith(kind)} for kind in KINDS]


def test_the_analysis_measures_divergence(stored: Path) -> None:
    """Against the same figure from whole runs of separately edited models, in float64."""
    draft = draft_of(stored)
    found = flexq.sensitivities(draft, by_kind(draft), bits=4, group=64, tokens=52)
    weights = {name: draft.weight(name) for name in draft.program.weights}

    def logits(program: object) -> torch.Tensor:
        executor = ReferenceExecutor(program, weights, dtype="float64")
        return torch.cat(Stream(executor, [draft.sequences[0], draft.sequences[1][:12]]).run_to_end())

    base = logits(draft.program).log_softmax(-1)
    for value, inputs in zip(found, by_kind(draft), strict=True):
        program = draft.program
        for nodes in inputs.values():
            program = round_inputs(program, [node.name for node in nodes], group=64, bits=[4])
        other = logits(program).log_softmax(-1)
        expected = float((base.exp() * (base - other)).sum(-1).mean())
        assert value == pytest.approx(expected, rel=1e-3)
        assert value > 1e-6


def test_an_outlier_is_found(stored: Path) -> None:
    def worst(planted: bool) -> str:
        draft = draft_of(stored, planted)
        kl = flexq.sensitivities(draft, by_kind(draft), bits=6, group=64, tokens=64)
        return KINDS[flexq.promoted(kl, 0.25)[0]]

    assert worst(planted=False) != "down_proj"
    assert worst(planted=True) == "down_proj"


def test_promotion() -> None:
    kl = np.array([0.1, 0.4, 0.2, 0.4])
    assert flexq.promoted(kl, 0.25) == [1]
    assert flexq.promoted(kl, 0.3) == [1, 3]
    assert flexq.promoted(kl, 0) == []
    assert flexq.promoted(kl, 1) == [1, 3, 2, 0]
    assert flexq.promoted(kl, 1, budget=0.35) == [1, 3]
    assert flexq.promoted(kl, 0, budget=2) == []
    assert flexq.promoted(kl, 0, budget=0) == [1, 3, 2, 0]


def bits_of(directory: Path) -> dict[str, int]:
    """Bits of every rounded input by the last part of its name and the layer."""
    encodes = [n for n in Checkpoint.open(directory).program().nodes if n.op == "encode"]
    parts = [(n.name.split("."), n.attributes["bits"]) for n in encodes]
    return {part[-2] + part[1]: bits for part, (bits,) in parts}


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_models(case: str, tmp_path: Path) -> None:
    """Down projections in 8 bits, all else in 6; native and reference agree."""
    model, _ = models.save(tmp_path / "model", models.configs()[case])
    recipe = Recipe.from_yaml("methods: [{method: flexq, sensitive: down, group: 32}]")
    compress(model, recipe, tmp_path / "out", evaluate=False)
    found = bits_of(tmp_path / "out")
    assert {name for name, bits in found.items() if bits == 8} == {"down_proj0", "down_proj1"}
    assert set(found.values()) == {6, 8}
    made = Checkpoint.open(tmp_path / "out")
    assert {made.specs[n].bits for n in linear_weights(made.program())} == {6}
    ids = models.tokens(30, made.program().vocab_size)
    expected = models.logits(ReferenceExecutor.load(made, dtype="float64"), ids, [30])
    for activations in ("exact", "fast"):
        with closing(
            NativeExecutor.load(tmp_path / "out", activations=activations, kv_dtype="f32")
        ) as executor:
            models.check_rounded(models.logits(executor, ids, [30]), expected)


def test_resumes_with_the_same_bytes(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe.from_yaml("methods: [{method: flexq, per: layer, share: 0.3, tokens: 64}]")
    calls = []
    real = flexq._divergence

    def counting(p: torch.Tensor, q: torch.Tensor) -> float:
        calls.append(len(p))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(p, q)

    monkeypatch.setattr(flexq, "_divergence", counting)
    monkeypatch.setattr(Draft, "sequences", [models.tokens(32, 250, seed=n).tolist() for n in range(3)])
    stop = 0
    compress(small, recipe, tmp_path / "whole", evaluate=False)
    assert calls == [32] * 16  # eight inputs, two sequences
    calls.clear()
    stop = 12
    with pytest.raises(KeyboardInterrupt):
        compress(small, recipe, tmp_path / "resumed", evaluate=False)
    calls.clear()
    stop = 0
    compress(small, recipe, tmp_path / "resumed", evaluate=False)
    assert len(calls) == 8
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes()
    assert sorted(bits_of(tmp_path / "whole").values()) == [6] * 5 + [8] * 3


def test_weights_of_another_method(small: Path, tmp_path: Path) -> None:
    program = build_program(models.configs()["llama"])
    own = "methods: [{method: flexq}, {method: rtn}]"
    with pytest.raises(UsageError, match="both fill the slot rounding"):
        Recipe.from_yaml(own).plan(program)
    left = "methods: [{method: flexq, weight_bits: null, sensitive: none}, {method: rtn, bits: 3}]"
    compress(small, Recipe.from_yaml(left), tmp_path / "out", evaluate=False)
    assert set(bits_of(tmp_path / "out").values()) == {6}
    made = Checkpoint.open(tmp_path / "out")
    assert {made.specs[n].bits for n in linear_weights(made.program())} == {3}


def test_only_the_analysis_reads_text() -> None:
    for sensitive in ("analysis", "down", "none"):
        recipe = Recipe.from_yaml(f"methods:\n- method: flexq\n  sensitive: {sensitive}\n")
        assert recipe.calibrated == (sensitive == "analysis")
