"""Quantised Hugging Face directories: codes kept, values exact, logits those of the dequantised model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill.backends.native import NativeExecutor
from gristmill.backends.reference import ReferenceExecutor
from gristmill.formats import group_int
from gristmill.formats.packed import decode, decode_f32
from gristmill.io.checkpoint import Checkpoint
from gristmill.io.convert import _requantise, import_huggingface
from gristmill.program.edits import linears_of, round_inputs
from tests.kits import files, models, quantised
from tests.kits.quantised import Layer, Stored


def convert(source: Path) -> Checkpoint:
    out = source.with_name(f"{source.name}-checkpoint")
    out.mkdir()
    import_huggingface(source, out)
    return Checkpoint.open(out)


def check(checkpoint: Checkpoint, layers: dict[str, Layer]) -> None:
    """Every code, and every value in float64, is what was written."""
    for name, one in layers.items():
        packed = checkpoint.packed(name)
        codes, _, _ = group_int.unpack(packed)
        assert np.array_equal(codes, one.codes), name
        assert np.array_equal(decode(packed), one.values()), name


GPTQ: dict[str, Any] = {"quant_method": "gptq", "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "GEMM", "zero_point": True}
Case = tuple[dict[str, Any], Callable[[Layer], Stored], dict[str, Any]]


def gptq(bits: int, group: int, zero: int | None, form: str, **extra: Any) -> Case:
    config = {**GPTQ, "bits": bits, "group_size": group, "checkpoint_format": form} | extra
    return config, partial(quantised.gptq, form=form), {"bits": bits, "group": group, "zero": zero}


def packed(bits: int, group: int, zero: int | None, *, plain: bool = False, **made: Any) -> Case:
    symmetric = zero == 1 << (bits - 1)
    sizes = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    config = quantised.scheme(num_bits=bits, symmetric=symmetric, **sizes)
    if plain:
        config["format"] = "int-quantized"
        # Beside weights in groups it cannot be run, see test_hostile.
        inputs = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token", "symmetric": True}
        config["config_groups"]["group_0"]["input_activations"] = inputs if group == -1 else None
    encode = partial(quantised.plain if plain else quantised.packed, symmetric=symmetric)
    return config, encode, {"bits": bits, "group": group, "zero": zero, **made}


CASES: dict[str, Case] = {
    **{
        f"gptq-{bits}-{form}-{'sym' if sym else 'asym'}": gptq(
            bits, 32, 1 << (bits - 1) if sym else None, form
        )
        for bits in (2, 3, 4, 8)
        for form in ("gptq", "gptq_v2")
        for sym in (True, False)
    },
    "gptq-row": gptq(4, -1, 8, "gptq"),
    "gptq-row-asym": gptq(3, -1, None, "gptq"),
    "gptq-ragged": gptq(4, 64, None, "gptq_v2"),
    "gptq-longer-than-rows": gptq(4, 128, 8, "gptq", dynamic={"-:.*lm_head": {}}),
    "awq": (AWQ, quantised.awq, {"bits": 4, "group": 32, "zero": None}),
    "awq-same-zeros": (AWQ, quantised.awq, {"bits": 4, "group": 32, "zero": 7}),
    "awq-row": ({**AWQ, "group_size": -1}, quantised.awq, {"bits": 4, "group": -1, "zero": None}),
    "awq-bf16": (AWQ, quantised.awq, {"bits": 4, "group": 32, "zero": 9, "dtype": "BF16"}),
    **{f"packed-{bits}": packed(bits, 32, 1 << (bits - 1)) for bits in range(2, 9)},
    **{f"packed-{bits}-asym": packed(bits, 32, None) for bits in range(2, 9)},
    "packed-channel": packed(4, -1, 8),
    "packed-channel-asym": packed(8, -1, None),
    "packed-bf16": packed(4, 16, 8, dtype="BF16"),
    "packed-bf16-asym": packed(4, 16, None, dtype="BF16"),
    "packed-f32": packed(8, 16, 128, dtype="F32"),
    "plain-channel": packed(8, -1, 128, plain=True),
    "plain-channel-asym": packed(8, -1, None, plain=True),
    "plain-group-bf16": packed(8, 32, 128, plain=True, dtype="BF16"),
    "plain-4": packed(4, 32, None, plain=True),
}


def layers_of(of: dict[str, Any], made: dict[str, Any]) -> dict[str, Layer]:
    result = {}
    for seed, (name, shape) in enumerate(quantised.linears(of).items()):
        group = shape[1] if made["group"] == -1 else made["group"]
        result[name] = quantised.layer(shape, **{**made, "group": group}, seed=seed)
    return result


@pytest.mark.parametrize("name", CASES)
def test_codes_and_values_are_kept(tmp_path: Path, name: str) -> None:
    quantization, encode, made = CASES[name]
    of = quantised.small()
    layers = layers_of(of, made)
    source = quantised.write(tmp_path / "m", of, quantization, quantised.stored(of, layers, encode))
    checkpoint = convert(source)
    check(checkpoint, layers)
    for matrix in layers:
        spec = checkpoint.specs[matrix]
        assert spec.mins == (made["zero"] is None)
        if not spec.mins:
            assert spec.offset == made["zero"]
            assert spec.scales == ("f16" if made.get("dtype", "F16") == "F16" else "f32")
        # Groups of 32 and whole rows hold planes of any bits; nothing has planes of 7.
        assert spec.bits == (8 if made["bits"] == 7 else made["bits"])
    assert checkpoint.specs["model.embed_tokens.weight"].format == "f32"
    assert {key: checkpoint.config[key] for key in of} == of
    assert checkpoint.verify() > 0


@pytest.mark.parametrize("name", ["gptq-3-gptq-asym", "gptq-8-gptq-sym", "awq", "packed-4", "packed-8-asym"])
def test_logits_are_those_of_the_dequantised_model(tmp_path: Path, name: str) -> None:
    quantization, encode, made = CASES[name]
    of = quantised.small(num_hidden_layers=2)
    layers = layers_of(of, made)
    codes = convert(quantised.write(tmp_path / "q", of, quantization, quantised.stored(of, layers, encode)))
    floats = convert(files.write_huggingface(tmp_path / "f", of, quantised.dequantised(of, layers)))
    ids = models.tokens(40, of["vocab_size"])
    schedule = [33, *[1] * 7]
    expected = models.logits(ReferenceExecutor.load(floats.directory, dtype="float64"), ids, schedule)
    reference = models.logits(ReferenceExecutor.load(codes.directory, dtype="float64"), ids, schedule)
    assert models.relative_error(reference, expected) <= 1e-6
    options: Any = {"activations": "exact", "kv_dtype": "f32", "threads": 2}
    with closing(NativeExecutor.load(codes, **options)) as executor:
        assert models.relative_error(models.logits(executor, ids, schedule, 33), expected) <= 1e-5


@pytest.mark.parametrize("zero", [128, None])
def test_inputs_in_eight_bits_are_those_of_the_mode_fast(tmp_path: Path, zero: int | None) -> None:
    """W8A8: rounded per token over whole rows, as the op `encode` says, without a node of its own."""
    quantization, encode, made = packed(8, -1, zero, plain=True)
    of = quantised.small(num_hidden_layers=2)
    layers = layers_of(of, made)
    checkpoint = convert(
        quantised.write(tmp_path / "q", of, quantization, quantised.stored(of, layers, encode))
    )
    program = checkpoint.program()
    for source, nodes in linears_of(program, set(layers)).items():
        width = program.buffers[source].shape[1]
        assert isinstance(width, int)
        program = round_inputs(program, [n.name for n in nodes], group=-(-width // 8) * 8, bits=[8])
    weights = {name: decode_f32(checkpoint.packed(name)) for name in checkpoint.specs}
    weights |= {name: checkpoint.vector(name) for name in program.weights if name not in weights}
    ids = models.tokens(40, of["vocab_size"])
    rounded, plain = (
        models.logits(ReferenceExecutor(one, weights, kv_dtype="f32"), ids, [40])
        for one in (program, checkpoint.program())
    )
    with closing(NativeExecutor.load(checkpoint, kv_dtype="f32")) as executor:
        assert executor.activations == "fast"
        found = models.logits(executor, ids, [40])
    distance = [np.median(np.abs(found - expected)) for expected in (rounded, plain)]
    # Not wholly the same: a last bit becomes a step of a code now and then.
    assert distance[0] < distance[1] / 10


def test_groups_too_short_for_planes_widen_the_codes(tmp_path: Path) -> None:
    of = quantised.small()
    kept = {(2, 16): 2, (2, 8): 4, (3, 16): 4, (3, 32): 3, (5, 16): 6, (5, 8): 8, (6, 16): 6, (6, 8): 8}
    for (bits, group), expected in kept.items():
        quantization, encode, made = packed(bits, group, None)
        layers = layers_of(of, made)
        source = tmp_path / f"{bits}-{group}"
        checkpoint = convert(quantised.write(source, of, quantization, quantised.stored(of, layers, encode)))
        check(checkpoint, layers)
        assert {checkpoint.specs[name].bits for name in layers} == {expected}


@pytest.mark.parametrize("kind", ["gptq", "packed"])
def test_columns_in_the_order_of_activations(tmp_path: Path, kind: str) -> None:
    """Codes in groups side by side, the order in the program; logits those of the dequantised model."""
    of = quantised.small(num_hidden_layers=2)
    # Rows of 96 and 160 with a ragged last group; q and k of a layer share an order, v has another or none.
    quantization, encode, made = gptq(3, 64, None, "gptq", desc_act=True)
    if kind == "packed":
        quantization, encode, made = packed(5, 32, None)
        quantization["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    layers = layers_of(of, made)
    orders = {}
    tensors = quantised.stored(of, layers, encode)
    for seed, (name, one) in enumerate(layers.items()):
        # The layer's codes lie in order of their groups; the file has the model's own columns.
        width = one.codes.shape[1]
        rng = np.random.default_rng([7, seed - ("k_proj" in name)])
        groups = np.arange(width, dtype=np.int32) // one.group
        if not name.endswith("1.self_attn.v_proj.weight"):
            groups = rng.permutation(groups)
        orders[name] = sorted(range(width), key=lambda column: groups[column])
        turned = replace(one, codes=one.codes[:, np.argsort(orders[name])])
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{part}": item for part, item in encode(turned).items()}
        tensors[f"{stem}.{'g_idx' if kind == 'gptq' else 'weight_g_idx'}"] = "I32", groups
    checkpoint = convert(quantised.write(tmp_path / "q", of, quantization, tensors))
    check(checkpoint, layers)
    assert checkpoint.edited
    assert checkpoint.verify() > 0
    encodes = [node for node in checkpoint.program().nodes if node.op == "encode"]
    assert len(encodes) == 2 * 6 - 1  # k has q's in both layers, v none in one
    values = quantised.dequantised(of, layers)
    for name, order in orders.items():
        values[name] = np.ascontiguousarray(values[name][:, np.argsort(order)])
    floats = convert(files.write_huggingface(tmp_path / "f", of, values))
    ids = models.tokens(40, of["vocab_size"])
    schedule = [33, *[1] * 7]
    expected = models.logits(ReferenceExecutor.load(floats.directory, dtype="float64"), ids, schedule)
    reference = models.logits(ReferenceExecutor.load(checkpoint.directory, dtype="float64"), ids, schedule)
    assert models.relative_error(reference, expected) <= 1e-6
    options: Any = {"kv_dtype": "f32", "threads": 2}
    with closing(NativeExecutor.load(checkpoint, activations="exact", **options)) as executor:
        assert models.relative_error(models.logits(executor, ids, schedule, 33), expected) <= 1e-5
    # Re-quantised, the columns stay in their order.
    (tmp_path / "f32").mkdir()
    _requantise(checkpoint.directory, tmp_path / "f32", "f32", None)
    with closing(NativeExecutor.load(tmp_path / "f32", activations="exact", **options)) as executor:
        assert models.relative_error(models.logits(executor, ids, schedule, 33), expected) <= 1e-5


def test_pieces_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices cut into the smallest pieces: rows that do not begin a word of zeros, zeros read in parts."""
    of = quantised.small()
    monkeypatch.setattr("gristmill.io.checkpoint._CHUNK", 1)
    monkeypatch.setattr("gristmill.io.quantised.layers._PIECE", 1)
    for at, name in enumerate(("gptq-3-gptq-asym", "gptq-2-gptq-sym", "awq", "packed-6-asym", "plain-4")):
        quantization, encode, made = CASES[name]
        layers = layers_of(of, made)
        tensors = quantised.stored(of, layers, encode)
        check(convert(quantised.write(tmp_path / str(at), of, quantization, tensors)), layers)
