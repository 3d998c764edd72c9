"""The reference executor: protocol, dtypes, taps, gradients, exact decoding, lowered programs."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gristmill.backends.native import NativeExecutor
from gristmill.backends.reference import ReferenceExecutor
from gristmill.errors import Cancelled, ModelError, UsageError
from gristmill.formats import dense
from gristmill.formats.packed import decode
from gristmill.io import convert
from gristmill.io.checkpoint import Checkpoint
from gristmill.models import build_program
from gristmill.program.batch import CancelFlag
from gristmill.program.checker import check
from gristmill.program.kv import KV_FORMATS
from gristmill.program.nodes import Program, Weight
from gristmill.program.passes import lower, select_early
from gristmill.program.render import LOWERING
from tests.kits import files, models
from tests.kits.executor import (
    PROMPT,
    Subject,
    batch_of,
    check_empty_sequences,
    check_errors,
    check_shapes,
)

NAMES = ["llama", "qwen2", "gemma3-linear"]


def make(name: str, dtype: str = "float32", seed: int = 0) -> ReferenceExecutor:
    of = models.configs()[name]
    return ReferenceExecutor(build_program(of), files.weights(of, seed), dtype=dtype)


def test_protocol() -> None:
    """All but the bits of other batch shapes, which PyTorch does not promise."""
    subject = Subject(make("gemma3-linear", "float64"))
    check_shapes(subject)
    check_empty_sequences(subject)
    check_errors(subject)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_truncation_and_cancellation_agree(name: str) -> None:
    executor = make(name, "float64")
    ids = models.tokens(60, executor.vocab_size)
    whole = models.logits(executor, ids, [60])
    for chunks in ([20, 1, 39], [1] * 60):
        assert models.relative_error(models.logits(executor, ids, chunks), whole) < 1e-7
    view = executor.allocate(60)
    executor.step(batch_of([(view, ids, PROMPT)]))
    view.truncate(11)
    again = executor.step(batch_of([(view, ids[11:], PROMPT)]))
    assert models.relative_error(again, whole[11:]) < 1e-7
    two = [executor.allocate(60) for _ in range(2)]
    both = executor.step(batch_of([(two[0], ids[::-1][:9], PROMPT), (two[1], ids, PROMPT)]))
    assert models.relative_error(both[9:], whole) < 1e-7


def test_a_cancelled_step_leaves_no_trace() -> None:
    executor = make("llama")
    ids = models.tokens(9, executor.vocab_size)
    view = executor.allocate(9)
    executor.step(batch_of([(view, ids[:4], PROMPT)]))
    held = view.nbytes()
    flag = CancelFlag()
    flag.set()
    with pytest.raises(Cancelled):
        executor.step(batch_of([(view, ids[4:], PROMPT)]), flag)
    assert (view.length, view.nbytes()) == (4, held)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.1), ("float16", 0.02)])
def test_dtypes(dtype: str, limit: float) -> None:
    ids = models.tokens(40, 272)
    exact = models.logits(make("gemma3-linear", "float64"), ids, [40])
    found = models.logits(make("gemma3-linear", dtype), ids, [40])
    assert 0 < models.relative_error(found, exact) < limit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("early", [False, True])
def test_lowered_programs_compute_the_same(name: str, early: bool) -> None:
    semantic = make(name, "float64")
    program = lower(semantic.program, [*LOWERING, *([select_early] if early else [])])
    lowered = ReferenceExecutor(program, semantic.weights, dtype="float64")
    ids = models.tokens(40, semantic.vocab_size)
    for rows in ([39], [0, 7, 21]):
        found = lowered.step(batch_of([(lowered.allocate(40), ids, PROMPT)], rows))
        expected = semantic.step(batch_of([(semantic.allocate(40), ids, PROMPT)], rows))
        assert models.relative_error(found, expected) < 1e-7


def test_taps_see_named_buffers() -> None:
    executor = make("llama")
    ids = models.tokens(5, executor.vocab_size)
    view = executor.allocate(8)
    with executor.tap("layers.1.mlp.down_proj", "embed_tokens", "lm_head") as seen:
        first = executor.step(batch_of([(view, ids, PROMPT)], [4]))
        executor.step(batch_of([(view, ids[:1], PROMPT)]))
    executor.step(batch_of([(view, ids[:1], PROMPT)]))
    assert [tuple(t.shape) for t in seen["layers.1.mlp.down_proj"]] == [(5, 192), (1, 192)]
    assert torch.equal(
        seen["embed_tokens"][0], executor.weights["model.embed_tokens.weight"][ids.astype(np.int64)]
    )
    assert np.array_equal(seen["lm_head"][0].numpy(), first)
    with pytest.raises(UsageError, match=r"no buffer 'layers\.9"), executor.tap("layers.9.mlp.down_proj"):
        pass


def test_gradients_match_differences() -> None:
    executor = make("gemma3-linear", "float64")
    ids = models.tokens(30, executor.vocab_size)
    name = "model.layers.0.self_attn.k_proj.weight"

    def loss() -> torch.Tensor:
        logits = executor.forward(batch_of([(executor.allocate(30), ids, PROMPT)], [29]))
        return torch.logsumexp(logits[0], 0) - logits[0, 3]

    weight = executor.weights[name].clone().requires_grad_()
    executor.weights[name] = weight
    loss().backward()
    assert weight.grad is not None
    at = divmod(int(weight.grad.abs().argmax()), weight.shape[1])
    step = 1e-5
    values = []
    for sign in (1, -1):
        moved = weight.detach().clone()
        moved[at] += sign * step
        executor.weights[name] = moved
        values.append(float(loss().detach()))
    assert float(weight.grad[at]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("weights", ["stored", "bf16", "int8", "int4", "mixed"])
def test_packed_weights_are_decoded_exactly(tmp_path: Path, weights: str) -> None:
    of = files.config("llama")
    tensors = files.weights(of)
    kinds = {
        n: kind
        for (n, v), kind in zip(
            tensors.items(), ["Q8_0", "Q4_1", "Q5_1", "F16", "BF16", "Q5_0"] * 9, strict=False
        )
        if v.ndim == 2
    }
    (tmp_path / "stored").mkdir()
    convert.import_gguf(files.write_gguf(tmp_path / "x.gguf", of, tensors, kinds), tmp_path / "stored")
    path = tmp_path / weights
    if weights == "mixed":
        files.write_mixed(tmp_path / "stored", path)
    elif weights != "stored":
        path.mkdir()
        convert._requantise(tmp_path / "stored", path, weights, None)
    checkpoint = Checkpoint.open(path)
    reference = ReferenceExecutor.load(checkpoint, dtype="float64")
    for name in checkpoint.specs:
        assert np.array_equal(reference.weights[name].numpy(), decode(checkpoint.packed(name)))
    ids = models.tokens(30, 272)
    native = NativeExecutor.load(path, activations="exact", kv_dtype="f32", threads=2)
    found = models.logits(native, ids, [20, *[1] * 10], 20)
    native.close()
    assert models.relative_error(found, models.logits(reference, ids, [30])) < 1e-5


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [*(("llama-smollm2", f) for f in KV_FORMATS), ("gemma3-linear", "int4"), ("qwen3", "int4-channel")],
)
def test_kv_formats_round_as_the_native_ones(tmp_path: Path, name: str, kv_dtype: str) -> None:
    source, _ = models.save(tmp_path / "hf", models.configs()[name])
    path = tmp_path / "checkpoint"
    path.mkdir()
    convert.import_huggingface(source, path)
    # Which numbers are on an edge depends on how PyTorch sums on the processor: with these ids few are.
    ids = models.tokens(150, 272, seed=1)
    with closing(NativeExecutor.load(path, activations="exact", kv_dtype=kv_dtype, threads=2)) as native:
        found = models.logits(native, ids, [90, *[1] * 60], 90)
    exact = models.logits(ReferenceExecutor.load(path), ids, [150])
    expected = models.logits(ReferenceExecutor.load(path, kv_dtype=kv_dtype), ids, [100, 50])
    lost = models.relative_error(expected, exact)
    assert (lost > 1e-5) == (kv_dtype != "f32")
    # A number on the edge between two codes may fall either way.
    assert models.relative_error(found, expected) < 1e-5 + 0.1 * lost


@pytest.mark.parametrize("name", NAMES)
def test_scales_of_keys_cancel(name: str) -> None:
    plain = make(name, "float64")
    rng = np.random.default_rng(1)
    nodes, weights = [], dict(plain.weights)
    declared = dict(plain.program.weights)
    for node in plain.program.nodes:
        nodes.append(node)
        if node.op == "attention":
            scale = f"{node.name}.key_scale"
            size = node.attributes["kv_heads"] * node.attributes["head_dim"]
            declared[scale] = Weight(scale, (size,))
            weights[scale] = torch.from_numpy(np.exp(rng.standard_normal(size)))
            nodes[-1] = replace(node, weights=(scale,))
    program = check(plain.program.with_nodes(tuple(nodes), weights=declared))
    assert Program.from_json(program.to_json()) == program
    ids = models.tokens(60, plain.vocab_size)
    expected = models.logits(plain, ids, [60])
    for of in (program, lower(program, LOWERING)):
        scaled = ReferenceExecutor(of, weights, dtype="float64")
        assert models.relative_error(models.logits(scaled, ids, [30, 30]), expected) < 1e-7
    vectors = {n: w.numpy().astype(np.float32) for n, w in weights.items() if w.ndim == 1}
    packed = {n: dense.pack(w.numpy(), "f32") for n, w in weights.items() if w.ndim == 2}
    native = NativeExecutor(program, packed, vectors, activations="exact", kv_dtype="f32", threads=2)
    assert models.relative_error(models.logits(native, ids, [30, *[1] * 30]), expected) < 1e-5
    native.close()


def test_what_is_missing_is_named() -> None:
    of = models.configs()["llama"]
    tensors = files.weights(of)
    program = build_program(of)
    gone = dict(tensors)
    del gone["model.norm.weight"]
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        ReferenceExecutor(program, gone)
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*\[3\].*\[192\]"):
        ReferenceExecutor(program, tensors | {"model.norm.weight": np.zeros(3, np.float32)})
    with pytest.raises(UsageError, match="int8"):
        ReferenceExecutor(program, tensors, dtype="int8")
