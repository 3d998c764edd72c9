"""Rounded inputs and low-rank branches: native against reference, and the executors' contract."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch

from gristmill.backends.native import NativeExecutor, _native
from gristmill.backends.reference import ReferenceExecutor
from gristmill.backends.reference.ops import round_e4m3
from gristmill.errors import ModelError
from gristmill.formats import dense, fp8, group_int
from gristmill.formats.packed import Packed, decode_f32
from gristmill.models import build_program
from gristmill.program.builder import Builder
from gristmill.program.edits import add_branch, keep_keys, linears_of, round_inputs
from gristmill.program.nodes import Program, ProgramError
from tests.kits import files, models
from tests.kits.executor import check_threads

Tensors = dict[str, np.ndarray]
RANK = 5


def edited(case: str, kind: str) -> tuple[Program, dict[str, Packed], Tensors]:
    """A small model whose linears have rounded and permuted inputs, low-rank branches, or both."""
    rng = np.random.default_rng(3)
    of = models.configs()[case]
    program = build_program(of)
    tensors = {k: v.astype(np.float32) for k, v in files.weights(of).items()}
    for source, nodes in linears_of(program).items():
        names = [node.name for node in nodes]
        if "lm_head" in names:
            continue
        width = int(program.buffers[source].shape[1])
        if "branch" in kind:
            program = add_branch(program, names, RANK, name="low_rank")
        if "round" in kind:
            groups = -(-width // 32)
            bits = [8 if g == 0 else 4 for g in range(groups)] if "mixed" in kind else [6]
            program = round_inputs(program, names, group=32, bits=bits, order=f"{names[0]}.order")
        elif "order" in kind:
            program = round_inputs(program, names, order=f"{names[0]}.order")
    for name, weight in program.weights.items():
        if name.endswith(".order"):
            tensors[name] = rng.permutation(weight.shape[0]).astype(np.float32)
        elif name not in tensors:
            tensors[name] = rng.normal(0, 0.1, weight.shape).astype(np.float32)
    packed = {}
    for name, values in tensors.items():
        if values.ndim == 2:
            plain = "low_rank" in name or "embed" in name or "lm_head" in name
            packed[name] = dense.pack(values, "bf16") if plain else group_int.quantise(values, 4)
    vectors = {name: values for name, values in tensors.items() if values.ndim == 1}
    return program, packed, vectors


@pytest.mark.parametrize("kind", ["branch", "order", "branch order"])
@pytest.mark.parametrize("case", ["llama-smollm2", "llama-biases", "qwen3", "gemma3-linear"])
def test_native_agrees_with_reference(case: str, kind: str) -> None:
    program, packed, vectors = edited(case, kind)
    weights = {**vectors, **{name: decode_f32(p) for name, p in packed.items()}}
    ids = models.tokens(40, program.vocab_size)
    expected = models.logits(ReferenceExecutor(program, weights, dtype="float64"), ids, [40])
    for activations, tolerance in (("exact", 1e-4), ("fast", 0.05)):
        with closing(
            NativeExecutor(program, packed, vectors, activations=activations, kv_dtype="f32", threads=2)
        ) as executor:
            assert models.relative_error(models.logits(executor, ids, [40]), expected) < tolerance


@pytest.mark.parametrize("level", _native.available_levels())
@pytest.mark.parametrize("activations", ["exact", "fast"])
@pytest.mark.parametrize("bits", [[8], [6], [4], [8, 4, 4, 6]])
@pytest.mark.parametrize("ordered", [False, True])
def test_rounded_product(level: str, activations: str, bits: list[int], ordered: bool) -> None:
    """One linear, K = 104 with a ragged last group, against float64: no later rounding hides an error."""
    rng = np.random.default_rng(5)
    k, n, rank = 104, 37, 3
    b = Builder("one")
    x = b.embedding("table.weight", 50, k)
    y = b.linear(x, "lm_head", n, bias=True)
    program = b.build(b.select_rows(y))
    program = add_branch(program, ["lm_head"], rank, name="low_rank")
    plain = round_inputs(program, ["lm_head"], order="order") if ordered else program
    program = round_inputs(program, ["lm_head"], group=32, bits=bits, order="order" if ordered else None)
    tensors = {name: rng.normal(0, 1, w.shape).astype(np.float32) for name, w in program.weights.items()}
    packed = {
        name: group_int.quantise(v, 4) if name == "lm_head.weight" else dense.pack(v, "f32")
        for name, v in tensors.items()
        if v.ndim == 2
    }
    vectors = {"lm_head.bias": tensors["lm_head.bias"]}
    if ordered:
        vectors["order"] = rng.permutation(k).astype(np.float32)
    weights = {**vectors, **{name: decode_f32(p) for name, p in packed.items()}}
    ids = models.tokens(30, n)
    expected = models.logits(ReferenceExecutor(program, weights, dtype="float64"), ids, [30])
    with closing(
        NativeExecutor(program, packed, vectors, activations=activations, threads=2, level=level)
    ) as executor:
        assert models.relative_error(models.logits(executor, ids, [30]), expected) < 1e-5
    # The rounding is seen: without it the result is another one.
    unrounded = models.logits(ReferenceExecutor(plain, weights, dtype="float64"), ids, [30])
    assert models.relative_error(unrounded, expected) > 1e-3


@pytest.mark.parametrize("level", _native.available_levels())
@pytest.mark.parametrize("weight", ["f32", "bf16", "int4", "e4m3"])
@pytest.mark.parametrize("ordered", [False, True])
def test_e4m3_product(level: str, weight: str, ordered: bool) -> None:
    """Rows of E4M3 with a scale against float64, K = 104: bf16 weights exactly, others as bf16."""
    rng = np.random.default_rng(6)
    k, n = 104, 37
    b = Builder("one")
    x = b.embedding("table.weight", 50, k)
    y = b.linear(x, "lm_head", n, bias=True)
    program = b.build(b.select_rows(y))
    plain = round_inputs(program, ["lm_head"], order="order") if ordered else program
    program = round_inputs(program, ["lm_head"], fp8=True, order="order" if ordered else None)
    tensors = {name: rng.normal(0, 1, w.shape).astype(np.float32) for name, w in program.weights.items()}
    tensors["table.weight"][3] = 0
    tensors["table.weight"][4, 0] = 1000
    values = tensors["lm_head.weight"]
    e4m3 = group_int.pack(
        rng.integers(0, 16, (n, k)).astype(np.uint8),
        rng.integers(30, 60, (n, 4)).astype(np.uint8),
        bits=4,
        group=32,
        offset=8,
        exponent=2,
        rounded=True,
    )
    of = {"int4": lambda: group_int.quantise(values, 4), "e4m3": lambda: e4m3}
    packed = {
        "table.weight": dense.pack(tensors["table.weight"], "f32"),
        "lm_head.weight": of[weight]() if weight in of else dense.pack(values, weight),
    }
    vectors = {"lm_head.bias": tensors["lm_head.bias"]}
    if ordered:
        vectors["order"] = rng.permutation(k).astype(np.float32)
    weights = {**vectors, **{name: decode_f32(p) for name, p in packed.items()}}
    ids = np.concatenate([[3, 4], models.tokens(30, n)]).astype(np.int32)
    expected = models.logits(ReferenceExecutor(program, weights, dtype="float64"), ids, [32])
    for activations in ("exact", "fast"):
        with closing(
            NativeExecutor(program, packed, vectors, activations=activations, threads=2, level=level)
        ) as executor:
            found = models.logits(executor, ids, [32])
        exact = activations == "exact" or weight in ("bf16", "e4m3")
        for rows in (slice(1, 2), slice(2, None)):  # the row of one large value apart from the others
            assert models.relative_error(found[rows], expected[rows]) < (1e-5 if exact else 2**-7)
        assert np.array_equal(found[0], vectors["lm_head.bias"])  # a row of zeros
    unrounded = models.logits(ReferenceExecutor(plain, weights, dtype="float64"), ids, [32])[2:]
    assert models.relative_error(unrounded, expected[2:]) > 1e-4


def test_e4m3_rounding_of_the_reference() -> None:
    x = torch.from_numpy(
        np.concatenate([fp8.decode(np.arange(127, dtype=np.uint8)), np.linspace(0, 500, 9999)])
    )
    for dtype in (torch.float32, torch.float64):
        found = round_e4m3(x.to(dtype))
        assert found.dtype == dtype
        assert np.array_equal(found.numpy(), fp8.round_e4m3(x.to(dtype).numpy()))


@pytest.mark.parametrize("level", _native.available_levels())
@pytest.mark.parametrize("activations", ["exact", "bf16", "fast"])
def test_contract(level: str, activations: str) -> None:
    """The same bits for any cut of the prompt, company and thread count."""
    edit = edited("llama", "branch mixed round")
    options = {"activations": activations, "level": level}
    check_threads(lambda threads: NativeExecutor(*edit, threads=threads, **options))


def test_json_round_trip() -> None:
    program, *_ = edited("llama", "branch mixed round")
    assert Program.from_json(program.to_json()) == program


def test_refused() -> None:
    program = build_program(models.configs()["llama"])
    q, o = "layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj"
    with pytest.raises(ProgramError, match="do not read one buffer"):
        round_inputs(program, [q, o], group=32, bits=[8])
    rounded = round_inputs(program, [q], group=32, bits=[8])
    with pytest.raises(ProgramError, match="rounded already"):
        round_inputs(rounded, [q], group=32, bits=[8])
    with pytest.raises(ProgramError, match="neither group nor bits"):
        round_inputs(program, [q], group=32, fp8=True)
    attention = "layers.0.self_attn.attention"
    scaled = keep_keys(program, [attention], kv_format="int4", scaled=True)
    assert Program.from_json(scaled.to_json()) == scaled
    with pytest.raises(ProgramError, match="scaled already"):
        keep_keys(scaled, [attention], scaled=True)
    with pytest.raises(ProgramError, match="kv_format"):
        keep_keys(program, [attention], kv_format="int3")
    with pytest.raises(ProgramError, match="neither one number"):
        round_inputs(program, [q], group=32, bits=[8, 4])
    with pytest.raises(ProgramError, match="already"):
        add_branch(add_branch(program, [q], 4, name="a"), [q], 4, name="a")


def test_groups_must_agree() -> None:
    program, packed, vectors = edited("llama", "round")
    name = "model.layers.0.self_attn.q_proj.weight"
    packed[name] = group_int.quantise(decode_f32(packed[name]), 8)  # groups of 64
    with pytest.raises(ModelError, match="rounded in groups of 32"):
        NativeExecutor(program, packed, vectors, activations="fast")


def test_order_must_be_one() -> None:
    program, packed, vectors = edited("llama", "round")
    vectors["layers.0.self_attn.q_proj.order"][:] = 0
    with pytest.raises(ModelError, match="no order"):
        NativeExecutor(program, packed, vectors, activations="fast")
