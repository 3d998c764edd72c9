"""SVDQuant: the low-rank fit, smoothing factors, and whole small models against their float64 oracle."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from gristmill.backends.native import NativeExecutor
from gristmill.backends.reference import ReferenceExecutor
from gristmill.calibrate import gptq as solver
from gristmill.errors import ModelError, UsageError
from gristmill.formats.packed import decode
from gristmill.io.checkpoint import Checkpoint
from gristmill.io.convert import prepare
from gristmill.io.json_file import read_object
from gristmill.methods.compress import compress
from gristmill.methods.draft import Draft
from gristmill.methods.recipe import Recipe
from gristmill.methods.weights import svdquant
from gristmill.methods.weights.svdquant import candidates, low_rank
from tests.kits import files, models, recipes


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random tokens in place of calibration text: the small models have no tokenizer."""
    ids = [models.tokens(n, 250, seed=n).tolist() for n in (40, 33)]
    monkeypatch.setattr(Draft, "sequences", ids)


def made(source: Path, out: Path, options: str, more: str = "", tensors: str = "'*'") -> Checkpoint:
    grid = "" if "grid:" in options else "grid: 2, "
    text = f"methods: [{{method: svdquant, {grid}iterations: 2, {options}, tensors: [{tensors}]}}{more}]"
    compress(source, Recipe.from_yaml(text), out, evaluate=False)
    return Checkpoint.open(out)


def logits(checkpoint: Checkpoint) -> np.ndarray:
    executor = ReferenceExecutor.load(checkpoint, dtype="float64")
    return models.logits(executor, models.tokens(30, executor.vocab_size), [30])


def distance(checkpoint: Checkpoint, source: Path) -> float:
    expected = logits(Checkpoint.open(prepare(source)))
    return float(np.square(logits(checkpoint) - expected).mean() / np.square(expected).mean())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    of = files.config("llama", hidden_size=192, intermediate_size=328)
    return models.save(tmp_path_factory.mktemp("svdquant") / "small", of)[0]


@pytest.mark.parametrize("shape", [(50, 30), (30, 50), (1, 20), (20, 1), (17, 17)])
def test_the_fit_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    w = torch.from_numpy(np.random.default_rng(1).normal(size=shape))
    sizes = np.linalg.svd(w.numpy(), compute_uv=False)
    before = np.inf
    for rank in (0, 1, 5, 17, 200):
        up, down = low_rank(w, rank)
        kept = min(rank, *shape)
        assert (up.shape, down.shape) == ((shape[0], kept), (kept, shape[1]))
        left = float((w - up @ down).square().sum())
        expected = float(np.square(sizes[kept:]).sum())
        assert left == pytest.approx(expected, rel=1e-9, abs=1e-20 * float(np.square(sizes).sum()))
        assert left <= before
        before = left
        peaks = down.gather(1, down.abs().argmax(1, keepdim=True))
        assert bool((peaks > 0).all())


def test_the_fit_of_a_matrix_without_a_direction_of_its_own() -> None:
    for w in (torch.zeros(8, 12), torch.eye(12), torch.zeros(12, 8), torch.ones(9, 9)):
        for start in (None, low_rank(torch.ones_like(w), 4)[1]):
            up, down = low_rank(w, 4, start=start)
            assert bool(up.isfinite().all() and down.isfinite().all())
    up, down = low_rank(torch.ones(9, 9), 4)
    assert torch.allclose(up @ down, torch.ones(9, 9), atol=1e-6)


def test_the_subspace_iteration_comes_near() -> None:
    rng = np.random.default_rng(2)
    w = torch.from_numpy(rng.normal(size=(60, 40)) * 0.7 ** np.arange(40)).float()
    near = w * torch.linspace(0.8, 1.2, 40)
    best = (near - torch.matmul(*low_rank(near, 6))).norm()
    found = (near - torch.matmul(*low_rank(near, 6, start=low_rank(w, 6)[1]))).norm()
    assert best <= found * 1.00001
    assert found < best * 1.01


def test_candidates() -> None:
    a, b = np.array([4.0, 0.0, 1.0, 9.0]), np.array([1.0, 2.0, 0.0, 3.0])
    found = candidates(a, b, 20)
    assert np.array_equal(found[0], np.ones(4))
    # Those that divide by the weight that is 0 are not finite, and would be all 1.
    assert len(found) == 1 + 19
    full = candidates(a, np.maximum(b, 0.5), 20)
    assert len(full) == 39
    expected = np.array([2.0, 1.0, 1.0, 3.0])
    assert np.allclose(full[19], expected / np.prod(expected) ** 0.25)
    assert all(np.prod(s) == pytest.approx(1) for s in full)


@pytest.mark.parametrize("case", ["llama-biases", "mistral", "qwen2", "qwen3", "gemma3"])
def test_full_rank_gives_the_model_back(case: str, tmp_path: Path) -> None:
    """With every direction in the branch nothing is left to be rounded; scales are folded exactly."""
    of = models.configs()[case]
    small, _ = models.save(tmp_path / "small", of)
    checkpoint = made(small, tmp_path / "out", "rank: 4096")
    assert distance(checkpoint, small) < 1e-3  # bf16
    assert checkpoint.factors
    ranks = {w.shape[0] for name, w in checkpoint.program().weights.items() if "svd_down" in name}
    assert max(ranks) <= of["hidden_size"]
    checkpoint.verify()


def test_every_part_helps(source: Path, tmp_path: Path) -> None:
    """With outliers planted: rounding alone, smoothed, with a branch of growing rank."""
    from gristmill.calibrate.planted import plant
    from gristmill.models import build_program

    of = files.config("llama", hidden_size=192, intermediate_size=328)
    tensors = plant(build_program(of), files.weights(of), share=0.02)
    planted = files.write_huggingface(tmp_path / "planted", of, tensors)
    plain, smooth, both, more = (
        distance(made(planted, tmp_path / f"out{i}", options), planted)
        for i, options in enumerate(("rank: 0, grid: 0", "rank: 0", "rank: 16", "rank: 64"))
    )
    assert smooth < plain
    assert both < smooth
    assert more < both


@pytest.mark.parametrize("options", ["rank: 5", "rank: 17, branch: int8", "rank: 8, quantise: gptq"])
def test_what_is_stored_is_the_oracle(options: str, source: Path, tmp_path: Path) -> None:
    """Every stacked group: U D + residual is the scaled matrix up to half a step of every group's scale."""
    checkpoint = made(source, tmp_path / "out", options + ", activation_bits: none")
    base = Checkpoint.open(prepare(source))
    program = checkpoint.program()
    assert not any(node.op == "encode" for node in program.nodes)
    downs = [name for name in program.weights if name.endswith("svd_down.weight")]
    assert len(downs) == 4 * 2  # q/k/v, o, gate/up, down of two layers share one each
    shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for name in base.specs:
        if not name.endswith("_proj.weight"):
            continue
        rows, columns = checkpoint.factors[name]
        scaled = decode(base.packed(name)) * rows[:, None] * columns
        stem = name.removesuffix(".weight")
        first = stem
        for other, owner in shared.items():
            first = first.replace(other, owner)
        up = decode(checkpoint.packed(f"{stem}.svd_up.weight"))
        down = decode(checkpoint.packed(f"{first}.svd_down.weight"))
        packed = checkpoint.packed(name)
        assert (packed.bits, packed.group) == (4, 64)
        error = np.abs(scaled - up @ down - decode(packed))
        scale = np.repeat(packed.arrays["scales"].transpose(0, 2, 1).reshape(-1, packed.spec.groups), 64, 1)
        steps = error / np.maximum(scale[: error.shape[0], : error.shape[1]].astype(np.float64), 1e-9)
        assert steps.max() < (0.51 if "gptq" not in options else 8)
    ids = models.tokens(30, program.vocab_size)
    with closing(NativeExecutor.load(tmp_path / "out", activations="exact", kv_dtype="f32")) as native:
        assert models.relative_error(models.logits(native, ids, [30]), logits(checkpoint)) < 1e-4
        # The branch is part of the linears: besides them there are only its first halves.
        native.profile(True)
        models.logits(native, ids, [30])
        names = [name for name, _ in native.node_times()]
    assert not any("svd_up" in name or "svd_sum" in name for name in names)
    assert sum("svd_down" in name for name in names) == len(downs)


def test_the_branch_counts_as_bits_not_as_weights(tmp_path: Path) -> None:
    found = made(recipes.one_layer(tmp_path), tmp_path / "out", "rank: 5")
    outputs = 128 + 64 + 64 + 128 + 256 + 256 + 128  # q, k, v, o, gate, up, down
    downs = 16 * 2 * (3 * 128 + 256)  # bf16, 5 rows padded to 16, for q/k/v, o and gate/up, and for down
    ups = outputs * 8 * 2  # bf16, 5 columns padded to 8
    recipes.check_bits(found.directory, downs + ups)


def test_a_branch_without_a_finite_error_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svdquant._Error, "__call__", lambda *_: float("nan"))
    with pytest.raises(ModelError, match=r"svdquant: the branch of layers\.0\.\S+ has no finite error$"):
        made(source, tmp_path / "out", "rank: 4, grid: 0")


@pytest.mark.parametrize("count", [1, 5, 11, 99])
def test_rows_are_spread_over_all_of_the_text(count: int) -> None:
    parts = [torch.rand(n, 3) for n in (4, 1, 6)]
    whole = torch.cat(parts)
    expected = whole[torch.linspace(0, 10, min(count, 11)).long()]
    assert torch.equal(svdquant.spread(parts, count), expected)


def test_only_the_tensors_asked_for(source: Path, tmp_path: Path) -> None:
    checkpoint = made(source, tmp_path / "out", "rank: 4", tensors="'*.mlp.down_proj*', '*.k_proj*'")
    changed = {name for name, spec in checkpoint.specs.items() if spec.format != "f32"}
    assert {name.split(".")[-2] for name in changed} == {"down_proj", "k_proj", "svd_down", "svd_up"}
    # Their sites reach other matrices, which stay as they are.
    assert not checkpoint.factors
    notes = (tmp_path / "out" / "report.json").read_text()
    assert "4 matrices are not smoothed" in notes


def test_another_method_rounds_the_residual(source: Path, tmp_path: Path) -> None:
    more = ", {method: rtn, group: 64, bits: 4}"
    split = made(source, tmp_path / "split", "rank: 8, quantise: none", more)
    whole = made(source, tmp_path / "whole", "rank: 8")
    assert distance(split, source) == pytest.approx(distance(whole, source), rel=0.3)
    recipe = f"methods: [{{method: svdquant, rank: 8}}{more}]"
    with pytest.raises(UsageError, match="both fill the slot rounding"):
        compress(source, Recipe.from_yaml(recipe), tmp_path / "no", evaluate=False)


def test_says_where_gptq_rounded_to_nearest(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_factor(hessian: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
        return torch.eye(len(hessian), dtype=torch.float64), float("inf")

    monkeypatch.setattr(solver, "_root", no_factor)
    made(source, tmp_path / "out", "rank: 4, quantise: gptq", tensors="'*.0.*.[qk]_proj*'")
    assert (
        "svdquant: no factor of the Hessian; rounded to nearest: model.layers.0.self_attn.q_proj.weight, "
        "model.layers.0.self_attn.k_proj.weight"
    ) in read_object(tmp_path / "out" / "report.json")["notes"]


def test_resumes_with_the_same_bytes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made(source, tmp_path / "whole", "rank: 8, quantise: gptq")
    once, calls = Draft.once, 0

    def stopping(self: Draft, *args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return once(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Draft, "once", stopping)
        with pytest.raises(KeyboardInterrupt):
            made(source, tmp_path / "again", "rank: 8, quantise: gptq")
    again = made(source, tmp_path / "again", "rank: 8, quantise: gptq")
    for name in ("model.safetensors", "smoothing.safetensors", "program.json"):
        assert (again.directory / name).read_bytes() == (whole.directory / name).read_bytes()
