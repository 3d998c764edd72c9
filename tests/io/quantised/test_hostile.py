"""Quantised directories that are damaged, hostile or not supported: one line says which tensor, or which
option.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gristmill.errors import ModelError
from gristmill.io.convert import import_huggingface
from tests.kits import quantised
from tests.kits.hostile import MEMORY_LIMIT, assert_one_line, assert_refused, traced_peak
from tests.kits.quantised import Stored

OF = quantised.small()
LINEAR = "model.layers.0.mlp.up_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
PACKED = quantised.scheme(num_bits=4, symmetric=False, strategy="group", group_size=32)
PLAIN = {**quantised.scheme(num_bits=8, symmetric=False, strategy="channel"), "format": "int-quantized"}


def sound(quantization: dict[str, Any]) -> Stored:
    bits, group = (8, None) if quantization is PLAIN else (4, 32)
    layers = {
        name: quantised.layer(shape, bits, group or shape[1]) for name, shape in quantised.linears(OF).items()
    }
    encoders = {
        id(GPTQ): quantised.gptq,
        id(AWQ): quantised.awq,
        id(PACKED): lambda one: quantised.packed(one, False),
        id(PLAIN): lambda one: quantised.plain(one, False),
    }
    return quantised.stored(OF, layers, encoders[id(quantization)])


TENSORS = {id(kind): sound(kind) for kind in (GPTQ, AWQ, PACKED, PLAIN)}


def attempt(directory: Path, quantization: object, tensors: Stored) -> None:
    """Writes a model and imports it."""
    directory.mkdir(exist_ok=True)
    source = quantised.write(directory / "m", OF, quantization, tensors)
    out = directory / "out"
    out.mkdir(exist_ok=True)
    import_huggingface(source, out)


def edited(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with values replaced by path, or removed (...)."""
    result = copy.deepcopy(config)
    for path, value in changes.items():
        *parents, last = path.split("/")
        target = result
        for key in parents:
            target = target[key]
        if value is ...:
            target.pop(last, None)
        else:
            target[last] = value
    return result


WEIGHTS = "config_groups/group_0/weights"
INPUTS = "config_groups/group_0/input_activations"
TOKEN = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token", "symmetric": True}
CONFIGS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (GPTQ, {"bits": ...}, "has no bits"),
    (GPTQ, {"bits": 5}, "2, 3, 4 or 8 bits, not 5"),
    (GPTQ, {"bits": 10**40}, "invalid bits"),
    (GPTQ, {"bits": 4.0}, "invalid bits"),
    (GPTQ, {"bits": 8}, "q_proj.qweight' has the shape"),
    (GPTQ, {"group_size": 0}, "invalid group_size: 0"),
    (GPTQ, {"group_size": -2}, "invalid group_size: -2"),
    (GPTQ, {"group_size": True}, "invalid group_size: True"),
    (GPTQ, {"group_size": 10**70}, "invalid group_size: a huge number"),
    (GPTQ, {"group_size": 64}, "qzeros' has the shape"),
    (GPTQ, {"desc_act": "no"}, "invalid desc_act"),
    (GPTQ, {"checkpoint_format": "marlin"}, "checkpoint format 'marlin'"),
    (GPTQ, {"checkpoint_format": {}, "format": ["x"]}, "checkpoint format a list"),
    (GPTQ, {"dynamic": {"+:.*up_proj": {"bits": 8}}}, "settings per layer"),
    (AWQ, {"version": "gemv"}, "version 'gemv'"),
    (AWQ, {"version": 5}, "version 5"),
    (AWQ, {"bits": 8}, "AWQ codes have 4 bits, not 8"),
    (AWQ, {"bits": ...}, "AWQ codes have 4 bits, not None"),
    (AWQ, {"zero_point": 1}, "invalid zero_point"),
    (AWQ, {"group_size": 96}, "scales' has the shape"),
    (PACKED, {"format": "float-quantized"}, "format 'float-quantized'"),
    (PACKED, {"format": "marlin-24"}, "format 'marlin-24'"),
    (PACKED, {"format": ...}, "format None"),
    (PACKED, {"config_groups/group_0/format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
    (PACKED, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights .'sparse-24-bitmask'"),
    (PACKED, {"sparsity_config": 5}, "sparse weights .5"),
    (PACKED, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    (PACKED, {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
    (PACKED, {"config_groups": {}}, "no config_groups"),
    (PACKED, {"config_groups": []}, "no config_groups"),
    (PACKED, {"config_groups/group_0": ["Linear"]}, "'group_0' is not spelt out"),
    (PACKED, {WEIGHTS: None}, "does not quantise weights"),
    (PACKED, {f"{WEIGHTS}/type": "float"}, "'float' weights of 4 bits"),
    (PACKED, {f"{WEIGHTS}/num_bits": 1}, "codes of 1 bits"),
    (PACKED, {f"{WEIGHTS}/num_bits": 16}, "codes of 16 bits"),
    (PACKED, {f"{WEIGHTS}/num_bits": 3}, "weight_packed' has the shape"),
    (PACKED, {f"{WEIGHTS}/dynamic": True}, "dynamic weights"),
    (PACKED, {f"{WEIGHTS}/strategy": "block"}, "strategy 'block'"),
    (PACKED, {f"{WEIGHTS}/group_size": None}, "invalid group_size: None"),
    (PACKED, {f"{WEIGHTS}/symmetric": "yes"}, "invalid symmetric"),
    (PACKED, {f"{WEIGHTS}/symmetric": True}, "weight_zero_point' is I32"),
    (PACKED, {f"{WEIGHTS}/actorder": "group"}, "lacks the tensor .*weight_g_idx"),
    (PACKED, {INPUTS: {"num_bits": 8, "type": "int", "dynamic": False}}, "static input scales"),
    (PACKED, {INPUTS: {"num_bits": 8, "type": "float", "dynamic": True}}, "activations that are not int8"),
    (PACKED, {INPUTS: {"num_bits": 4, "type": "int", "dynamic": True}}, "activations that are not int8"),
    (PACKED, {INPUTS: 5}, "activations that are not int8"),
    (PACKED, {INPUTS: TOKEN}, "one scale per token beside weights in groups of 32 columns"),
    (PLAIN, {INPUTS: {**TOKEN, "symmetric": False}}, "activations with a zero point"),
    (PLAIN, {INPUTS: {**TOKEN, "symmetric": "x"}}, "invalid symmetric"),
    (PLAIN, {INPUTS: {**TOKEN, "strategy": "tensor"}}, "activations of the strategy 'tensor'"),
    (PLAIN, {INPUTS: {**TOKEN, "strategy": "group", "group_size": 32}}, "the strategy 'group'"),
    (PLAIN, {INPUTS: {"dynamic": True}}, "activations of the strategy None"),
    (PACKED, {"config_groups/group_0/output_activations": {}}, "output activations"),
    (PLAIN, {f"{WEIGHTS}/num_bits": 4}, "holds codes of more than 4 bits"),
    (PLAIN, {"format": "pack-quantized"}, "none of the config_groups fits"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "changes", "message"), CONFIGS)
def test_configs(tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    assert_refused(lambda: attempt(tmp_path, edited(base, changes), TENSORS[id(base)]), message)


def test_schemes_are_told_apart_by_the_tensors(tmp_path: Path) -> None:
    """Two groups of 8 and 4 bits; then two of which either would do."""
    linears = quantised.linears(OF)
    made = {
        name: quantised.layer(shape, 8 if "mlp" in name else 4, 32, zero=128 if "mlp" in name else None)
        for name, shape in linears.items()
    }
    tensors = quantised.stored(OF, made, lambda one: quantised.packed(one, one.bits == 8))
    both = edited(PACKED, {})
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    both["config_groups"]["group_1"] = {"targets": ["re:.*mlp.*"], "weights": eight}
    attempt(tmp_path / "a", both, tensors)
    seven = edited(both, {"config_groups/group_2": {"targets": ["x"], "weights": {**eight, "num_bits": 7}}})
    assert_refused(lambda: attempt(tmp_path / "b", seven, tensors), "more than one of the config_groups fits")
    other = edited(both, {"config_groups/group_1/weights/group_size": 16})
    assert_refused(lambda: attempt(tmp_path / "c", other, tensors), "none of the config_groups fits")


KINDS = [(GPTQ, "qweight"), (GPTQ, "qzeros"), (GPTQ, "scales"), (AWQ, "qweight"), (AWQ, "qzeros"),
         (AWQ, "scales"), (PACKED, "weight_packed"), (PACKED, "weight_scale"), (PACKED, "weight_zero_point"),
         (PACKED, "weight_shape"), (PLAIN, "weight"), (PLAIN, "weight_scale"),
         (PLAIN, "weight_zero_point")]  # fmt: skip


@pytest.mark.parametrize(("base", "part"), KINDS)
def test_parts(tmp_path: Path, base: dict[str, Any], part: str) -> None:
    """A part that is missing, of another shape, or of another dtype."""
    tensors, name = TENSORS[id(base)], f"{LINEAR}.{part}"
    dtype, values = tensors[name]
    without = {key: item for key, item in tensors.items() if key != name}
    assert_refused(
        lambda: attempt(tmp_path / "a", base, without),
        "lacks the tensor|none of the config_groups|has the tensor",
    )
    for at, wrong in enumerate((values[:-1], values.reshape(1, *values.shape), values.ravel()[:0])):
        assert_refused(
            lambda at=at, wrong=wrong: attempt(
                tmp_path / f"s{at}", base, tensors | {name: (dtype, np.ascontiguousarray(wrong))}
            ),
            "has the shape",
        )
    other = {"I32": ("F32", np.float32), "I64": ("F64", np.float64)}.get(dtype, ("U8", np.uint8))
    changed = tensors | {name: (other[0], values.astype(other[1]))}
    assert_refused(lambda: attempt(tmp_path / "d", base, changed), f"is {other[0]}; its")


def test_orders_of_columns(tmp_path: Path) -> None:
    tensors, name = TENSORS[id(GPTQ)], f"{LINEAR}.g_idx"
    index = tensors[name][1]
    plain = {key: item for key, item in tensors.items() if not key.endswith("g_idx")}
    attempt(tmp_path / "plain", GPTQ, plain)
    ordered = {**GPTQ, "desc_act": True}
    attempt(tmp_path / "trivial", ordered, tensors)
    assert_refused(lambda: attempt(tmp_path / "absent", ordered, plain), "lacks the tensor .*g_idx")
    reordered = {"reversed": index[::-1], "shuffled": np.random.default_rng(1).permutation(index)}
    for at, values in reordered.items():
        attempt(tmp_path / at, ordered, tensors | {name: ("I32", np.ascontiguousarray(values))})
    for at, (values, message) in enumerate((
        (np.where(index == 1, 0, index), "g_idx' do not have 32 columns each"),
        (np.where(np.arange(len(index)) == 5, 2, index), "g_idx' do not have 32 columns each"),
        (index - 1, "groups out of range"),
        (index + 1, "groups out of range"),
        (np.full_like(index, 2**31 - 1), "groups out of range"),
        (index[:-1], "has the shape"),
    )):  # fmt: skip
        changed = tensors | {name: ("I32", np.ascontiguousarray(values))}
        assert_refused(lambda at=at, t=changed: attempt(tmp_path / str(at), GPTQ, t), message)


def test_orders_of_a_matrix_that_is_no_linear_layer_alone(tmp_path: Path) -> None:
    """A tied embedding stored in an order would be looked up in it."""
    of = {**OF, "tie_word_embeddings": True}
    layers = {n: quantised.layer(s, 4, 32) for n, s in quantised.linears(of).items()}
    name = "model.embed_tokens.weight"
    layers[name] = quantised.layer((of["vocab_size"], of["hidden_size"]), 4, 32)
    tensors = quantised.stored(of, layers, quantised.gptq)
    index = tensors["model.embed_tokens.g_idx"]
    tensors["model.embed_tokens.g_idx"] = index[0], np.ascontiguousarray(index[1][::-1])
    source = quantised.write(tmp_path / "m", of, GPTQ, tensors)
    (tmp_path / "out").mkdir()
    assert_refused(
        lambda: import_huggingface(source, tmp_path / "out"), "embed_tokens.weight is not read by linear"
    )


def test_biases_of_layers_that_have_none(tmp_path: Path) -> None:
    """AutoGPTQ writes zeros; anything else would be lost."""
    tensors, rows = TENSORS[id(GPTQ)], OF["intermediate_size"]
    zeros = tensors | {f"{LINEAR}.bias": ("F16", np.zeros(rows, np.float16))}
    attempt(tmp_path / "a", GPTQ, zeros)
    ones = tensors | {f"{LINEAR}.bias": ("F16", np.ones(rows, np.float16))}
    assert_refused(lambda: attempt(tmp_path / "b", GPTQ, ones), "up_proj.bias is not zero")


def test_values_that_cannot_be_kept(tmp_path: Path) -> None:
    for at, (base, part) in enumerate(((GPTQ, "scales"), (AWQ, "scales"), (PACKED, "weight_scale"))):
        dtype, values = TENSORS[id(base)][f"{LINEAR}.{part}"]
        bad = values.copy()
        bad.flat[3] = np.inf
        tensors = TENSORS[id(base)] | {f"{LINEAR}.{part}": (dtype, bad)}
        assert_refused(
            lambda at=at, base=base, t=tensors: attempt(tmp_path / str(at), base, t), "up_proj has scales"
        )
    shape = TENSORS[id(PACKED)] | {f"{LINEAR}.weight_shape": ("I64", np.array([1, 1]))}
    assert_refused(lambda: attempt(tmp_path / "shape", PACKED, shape), "up_proj.weight_shape is not 160 x 96")
    # Groups of 4 columns have no packed form.
    layers = {n: quantised.layer(s, 4, 4) for n, s in quantised.linears(OF).items()}
    tensors = quantised.stored(OF, layers, quantised.gptq)
    assert_refused(lambda: attempt(tmp_path / "g", {**GPTQ, "group_size": 4}, tensors), "q_proj: .*not 4")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.floats() | st.text(max_size=8) | st.just(10**60),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ("bits", "group_size", "desc_act", "checkpoint_format", "dynamic", "version", "zero_point", "format",
        "config_groups", "sparsity_config", "kv_cache_scheme", "config_groups/group_0", WEIGHTS, INPUTS,
        f"{WEIGHTS}/num_bits", f"{WEIGHTS}/group_size", f"{WEIGHTS}/strategy", f"{WEIGHTS}/symmetric",
        f"{WEIGHTS}/actorder", f"{WEIGHTS}/type", "quant_method")  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([GPTQ, AWQ, PACKED, PLAIN]), st.sampled_from(KEYS), JSON)
def test_any_value_of_an_option(
    tmp_path_factory: pytest.TempPathFactory, base: dict[str, Any], key: str, value: Any
) -> None:
    """It is read, or refused in one line; nothing else happens."""
    if "/" in key and "config_groups" not in base:
        key = key.rpartition("/")[2]
    try:
        attempt(tmp_path_factory.mktemp("any"), edited(base, {key: value}), TENSORS[id(base)])
    except ModelError as error:
        assert_one_line(str(error))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(0, 40), max_size=3),
    st.sampled_from([("I32", np.int32), ("I64", np.int64), ("I8", np.int8), ("F16", np.float16)]),
    st.integers(0, 255),
)
def test_any_tensor_in_place_of_a_part(
    tmp_path_factory: pytest.TempPathFactory,
    kind: tuple[dict[str, Any], str],
    shape: list[int],
    dtype: tuple[str, Any],
    fill: int,
) -> None:
    base, part = kind
    values = np.frombuffer(bytes([fill]) * int(np.prod(shape)) * np.dtype(dtype[1]).itemsize, dtype[1])
    tensors = TENSORS[id(base)] | {f"{LINEAR}.{part}": (dtype[0], values.reshape(shape))}
    try:
        attempt(tmp_path_factory.mktemp("any"), base, tensors)
    except ModelError as error:
        assert_one_line(str(error))


def test_memory_is_not_taken_on_a_configs_word(tmp_path: Path) -> None:
    huge = {**GPTQ, "group_size": 2**31 - 1}
    tensors = TENSORS[id(GPTQ)]
    assert traced_peak(lambda: attempt(tmp_path, huge, tensors)) < MEMORY_LIMIT
