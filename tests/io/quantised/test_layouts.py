"""The layouts against the libraries that write them, by words made once with their own code.

The digests are of what GPTQModel 7.3 (PackableQuantLinear.pack_original and its conversion to v1), AutoAWQ
(WQLinear_GEMM.from_linear) and compressed-tensors 0.17 (the pack-quantized compressor) wrote for the codes
and zeros of `tests.kits.quantised.ruled`. They hold the encoder of the tests, which the reader is then held
to. Where compressed-tensors is installed, the library itself is asked too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill.formats import group_int
from gristmill.io.quantised import reader
from gristmill.io.quantised.layers import Tensors
from gristmill.io.safetensors import SafetensorsFile
from tests.kits import quantised
from tests.kits.quantised import Layer, Stored

GPTQ = {
    (2, "gptq_v2"): "a897e162083ec988", (2, "gptq"): "b07ff4c9afd49370",
    (3, "gptq_v2"): "142ee7705ad4b110", (3, "gptq"): "8cbf672623662036",
    (4, "gptq_v2"): "59b177070021804b", (4, "gptq"): "25b68b3c58958a19",
    (8, "gptq_v2"): "48d3f21502ad44e1", (8, "gptq"): "06364984f633dff1",
}  # fmt: skip
AWQ = "7541d177f55230fc"
PACKED = {
    (2, False): "afd227bcea55a173", (3, False): "f81b1077c2299bd2", (4, False): "4c40524789c581cb",
    (5, False): "daf4536f4ea048b1", (8, False): "f96573ac91694d34", (4, True): "e6e83241c77168a1",
    (6, True): "429dd4a02775a7b5", (7, True): "0dcdb89bcb3f61f5", (8, True): "0c7b9fbf5ebef792",
}  # fmt: skip


def read(tmp_path: Path, quantization: dict[str, Any], one: Layer, parts: Stored) -> None:
    """The reader finds the codes and values of a layer."""
    path = quantised.write(tmp_path, {}, quantization, {f"m.{name}": item for name, item in parts.items()})
    tensors = Tensors(path)
    file = SafetensorsFile(path / "model.safetensors")
    for name in file.entries:
        tensors.add(name, file, name)
    found = reader(json.loads((path / "config.json").read_text()))
    assert found is not None
    n, k = one.codes.shape
    item = found.matrices(tensors, {"m.weight": (n, k)})["m.weight"].matrix
    assert not list(tensors)
    packed = item.rows(0, n)
    assert packed.spec == item.spec
    assert np.array_equal(group_int.unpack(packed)[0], one.codes)
    assert np.array_equal(group_int.decode(packed), one.values())


@pytest.mark.parametrize(("bits", "form"), GPTQ)
def test_gptq(tmp_path: Path, bits: int, form: str) -> None:
    one = quantised.ruled(32, 32, bits, 16)
    parts = quantised.gptq(one, form)
    assert quantised.digest(parts["qweight"][1], parts["qzeros"][1]) == GPTQ[bits, form]
    config = {"quant_method": "gptq", "bits": bits, "group_size": 16, "checkpoint_format": form}
    read(tmp_path, config, one, parts)


def test_awq(tmp_path: Path) -> None:
    one = quantised.ruled(32, 32, 4, 16)
    parts = quantised.awq(one)
    assert quantised.digest(parts["qweight"][1], parts["qzeros"][1]) == AWQ
    read(tmp_path, {"quant_method": "awq", "bits": 4, "group_size": 16}, one, parts)


@pytest.mark.parametrize(("bits", "symmetric"), PACKED)
def test_packed(tmp_path: Path, bits: int, symmetric: bool) -> None:
    one = quantised.ruled(20, 48, bits, 16)
    one = quantised.symmetric(one) if symmetric else one
    parts = quantised.packed(one, symmetric)
    written = [parts[name][1] for name in ("weight_packed", "weight_zero_point") if name in parts]
    assert quantised.digest(*written) == PACKED[bits, symmetric]
    config = quantised.scheme(num_bits=bits, symmetric=symmetric, strategy="group", group_size=16)
    read(tmp_path, config, one, parts)


def test_packed_by_the_library(tmp_path: Path) -> None:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    one = quantised.ruled(20, 48, 4, 16)
    parts = quantised.packed(one, False)
    codes, zeros = (torch.from_numpy((x - 8).astype(np.int8)) for x in (one.codes, one.zeros))
    parts["weight_packed"] = "I32", pack_to_int32(codes, 4).numpy()
    parts["weight_zero_point"] = "I32", pack_to_int32(zeros, 4, packed_dim=0).numpy()
    read(tmp_path, quantised.scheme(num_bits=4, symmetric=False, strategy="group", group_size=16), one, parts)


def test_words_by_hand(tmp_path: Path) -> None:
    """One word of each layout, spelt out: hexadecimal digits are 4-bit codes, the lowest on the right."""
    codes = np.tile(np.arange(8), (8, 1))
    ones = np.ones((8, 1), np.float32)
    one = Layer(4, 8, codes, ones, np.full((8, 1), 8), "F32")
    rows = np.full((8, 1), 0x76543210, np.uint32).view(np.int32)
    eights = np.full((1, 1), 0x88888888, np.uint32).view(np.int32)
    sevens = eights - np.int32(0x11111111)
    scale: Stored = {"scales": ("F32", ones.T)}
    gptq: Stored = {"qweight": ("I32", rows.T), "qzeros": ("I32", sevens), **scale}
    read(tmp_path / "gptq", {"quant_method": "gptq", "bits": 4, "group_size": 8}, one, gptq)
    shape = np.array([8, 8])
    packed: Stored = {
        "weight_packed": ("I32", rows), "weight_scale": ("F32", ones), "weight_shape": ("I64", shape)
    }  # fmt: skip
    config = quantised.scheme(num_bits=4, strategy="channel")
    read(tmp_path / "packed", config, one, packed)
    # AWQ's words go down the rows, in the order 0, 2, 4, 6, 1, 3, 5, 7: row i holds the codes i.
    down = Layer(4, 8, codes.T, ones, one.zeros, "F32")
    awq: Stored = {
        "qweight": ("I32", np.full((8, 1), 0x75316420, np.uint32).view(np.int32)),
        "qzeros": ("I32", eights),
        **scale,
    }
    read(tmp_path / "awq", {"quant_method": "awq", "bits": 4, "group_size": 8}, down, awq)


def test_a_zero_of_16_steps_never_arises(tmp_path: Path) -> None:
    """A zero of 0, stored minus one, borrows from its neighbour; adding one to the word gives both back."""
    codes = np.zeros((8, 8), np.int64)
    zeros = np.array([[0], [5], [0], [0], [15], [0], [1], [0]])
    one = Layer(4, 8, codes, np.ones((8, 1), np.float32), zeros, "F32")
    parts = quantised.gptq(one)
    assert parts["qzeros"][1].view(np.uint32).tolist() == [[(0x010F0050 - 0x11111111) % (1 << 32)]]
    read(tmp_path, {"quant_method": "gptq", "bits": 4, "group_size": 8}, one, parts)
