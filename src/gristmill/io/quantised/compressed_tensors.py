"""Checkpoints of the compressed-tensors package (llm-compressor, vLLM) whose weights are integers.

Of a module [N, K], codes being signed integers q of b bits and value = scale * (q - zero point):

- "pack-quantized": `weight_packed` int32 [N, ceil(K / p)], p = 32 // b fields of q + 2^(b-1) in each word,
  lowest bits first; `weight_shape` int64 [2]; `weight_zero_point` int32 [ceil(N / p), G], packed likewise
  down the rows;
- "int-quantized", "naive-quantized": `weight` int8 [N, K]; `weight_zero_point` int8 [N, G];
- `weight_scale` [N, G], G = 1 for the strategy "channel"; one value alone for "tensor".

(compressed-tensors 0.17, compressors/pack_quantized and compressors/naive_quantized.) Which modules are
quantised, and by which of several config_groups, shows in the tensors themselves; the patterns of `targets`
and `ignore`, regular expressions of unknown cost, are not evaluated.

`input_activations` are read where running the weights rounds inputs in just that way: dynamic int8 with one
scale per token beside weights with one scale per row, the arithmetic `fast` of such weights. All others are
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError
from gristmill.io.expected import Shapes, flag, integer
from gristmill.io.mapped import short
from gristmill.io.quantised.layers import (
    FLOATS,
    Codes,
    Rows,
    Stored,
    Tensors,
    fields,
    group_size,
    matrix,
    modules,
    read_order,
)

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
_PLAIN = ("int-quantized", "naive-quantized")
_STRATEGIES = ("group", "channel", "tensor")


@dataclass(frozen=True)
class Scheme:
    """How the modules of a config group are quantised; `group` -1 is the whole row."""

    packed: bool
    bits: int
    group: int
    symmetric: bool
    ordered: bool

    def columns(self, k: int) -> int:
        """Columns per scale in rows of k."""
        return k if self.group == -1 else self.group


def _scheme(name: str, group: object, form: object) -> Scheme:
    where = f"the config group {short(name)}"
    if not isinstance(group, dict):
        raise ModelError(f"{where} is not spelt out")
    form = group.get("format") or form
    if form != PACKED and form not in _PLAIN:
        raise ModelError(f"the compressed-tensors format {short(form)} cannot be read")
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict):
        raise ModelError(f"{where} does not quantise weights")
    bits = integer(weights, "num_bits")
    if weights.get("type", "int") != "int":
        raise ModelError(f"{where} has {short(weights['type'])} weights of {bits} bits; integers can be read")
    if not 2 <= bits <= 8:
        raise ModelError(f"{where} has codes of {bits} bits; 2 to 8 can be read")
    if weights.get("dynamic"):
        raise ModelError(f"{where} has dynamic weights")
    if inputs is not None:
        _check_inputs(where, inputs)
    if group.get("output_activations") is not None:
        raise ModelError(f"{where} quantises output activations, which cannot be run")
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy not in _STRATEGIES:
        raise ModelError(f"{where} has the strategy {short(strategy)}; {', '.join(_STRATEGIES)} can be read")
    columns = group_size(size) if strategy == "group" else -1
    if inputs is not None and columns != -1:
        raise ModelError(
            f"{where} has activations with one scale per token beside weights in groups of {columns} "
            "columns, which cannot be run"
        )
    return Scheme(
        packed=form == PACKED,
        bits=bits,
        group=columns,
        symmetric=flag(weights, "symmetric", True),
        ordered=weights.get("actorder") in (True, "group", "dynamic"),
    )


def _check_inputs(where: str, inputs: object) -> None:
    """ModelError unless these input_activations are dynamic symmetric int8 with one scale per token."""
    kind = (inputs.get("type", "int"), inputs.get("num_bits", 8)) if isinstance(inputs, dict) else None
    if not isinstance(inputs, dict) or kind != ("int", 8):
        raise ModelError(f"{where} has activations that are not int8, which cannot be run")
    if inputs.get("dynamic") is not True:
        raise ModelError(f"{where} has static input scales, which cannot be run")
    if not flag(inputs, "symmetric", True):
        raise ModelError(f"{where} has activations with a zero point, which cannot be run")
    if (strategy := inputs.get("strategy")) != "token":
        raise ModelError(f"{where} has activations of the strategy {short(strategy)}; token can be run")


class CompressedTensors:
    """Reads the integer weights of a directory."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is the quantization_config; ModelError for what is not supported."""
        sparsity = config.get("sparsity_config") or {}
        form = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
        if form not in (None, "dense"):
            raise ModelError(f"sparse weights ({short(form)}) cannot be read")
        for key in ("kv_cache_scheme", "transform_config"):
            if config.get(key):
                raise ModelError(f"quantization_config has a {key}, which cannot be run")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ModelError("quantization_config has no config_groups")
        schemes = (_scheme(name, group, config.get("format")) for name, group in groups.items())
        self.schemes = list(dict.fromkeys(schemes))

    def matrices(self, tensors: Tensors, expected: Shapes) -> dict[str, Stored]:
        """See `gristmill.io.quantised.Reader`."""
        result = {}
        for part, packed in (("weight_packed", True), ("weight_scale", False)):
            for module, shape in modules(tensors, expected, part):
                scheme = self._find(tensors, module, shape, packed)
                result[f"{module}.weight"] = _matrix(tensors, module, shape, scheme)
        return result

    def _find(self, tensors: Tensors, module: str, shape: tuple[int, int], packed: bool) -> Scheme:
        """The one scheme that a module's tensors agree with."""
        fitting = [one for one in self.schemes if one.packed == packed]
        if len(fitting) > 1:
            fitting = [one for one in fitting if _fits(tensors, module, shape, one)]
        if len(fitting) != 1:
            which = "none" if not fitting else "more than one"
            raise ModelError(f"{tensors.path}: {which} of the config_groups fits the tensors of {module}")
        return fitting[0]


def _fits(tensors: Tensors, module: str, shape: tuple[int, int], scheme: Scheme) -> bool:
    n, k = shape
    scale = f"{module}.weight_scale"
    if scale not in tensors or tensors.entry(scale).shape != (n, -(-k // scheme.columns(k))):
        return False
    if (f"{module}.weight_zero_point" in tensors) == scheme.symmetric:
        return False
    return not scheme.packed or tensors.entry(f"{module}.weight_packed").shape[1:] == (
        _words(k, scheme.bits),
    )


def _words(count: int, bits: int) -> int:
    return -(-count // (32 // bits))


def _matrix(tensors: Tensors, module: str, shape: tuple[int, int], scheme: Scheme) -> Stored:
    (n, k), bits, group = shape, scheme.bits, scheme.columns(shape[1])
    groups = -(-k // group)
    where = f"{tensors.path}, {module}"
    if scheme.packed:
        codes = _packed_rows(tensors.take(f"{module}.weight_packed", ("I32",), (n, _words(k, bits))), k, bits)
        if not np.array_equal(tensors.take(f"{module}.weight_shape", ("I64", "I32"), (2,)), shape):
            raise ModelError(f"{tensors.path}: {module}.weight_shape is not {n} x {k}")
    else:
        codes = _signed_rows(tensors.take(f"{module}.weight", ("I8",), shape), bits, where)
    alone = ((1,), ()) if groups == 1 else ()
    scales = tensors.take(f"{module}.weight_scale", FLOATS, (n, groups), *alone)
    zeros = _zeros(tensors, module, scheme, scales.shape, shape=(n, groups))
    order = read_order(tensors, f"{module}.weight_g_idx", k, group, required=scheme.ordered)
    return matrix(
        where,
        shape,
        bits=bits,
        group=group,
        codes=codes,
        scales=np.broadcast_to(scales, (n, groups)),
        zeros=zeros,
        order=order,
    )


def _zeros(
    tensors: Tensors, module: str, scheme: Scheme, stored: tuple[int, ...], shape: tuple[int, int]
) -> Rows | int:
    """The zeros [N, G] (`shape`) of a module whose scales are stored in the shape `stored`."""
    name, bits = f"{module}.weight_zero_point", scheme.bits
    if name not in tensors and scheme.symmetric:
        return 1 << (bits - 1)
    if scheme.packed and not scheme.symmetric and name in tensors and tensors.entry(name).dtype != "I8":
        words = tensors.take(name, ("I32",), (_words(shape[0], bits), shape[1])).view(np.uint32)
        count = 32 // bits

        def take(start: int, stop: int) -> Codes:
            first = start // count
            part = fields(words[first : _words(stop, bits)].T, bits)
            return part[:, start - first * count : stop - first * count].T

        return take
    # Older versions of the package stored zero points unpacked, and those of symmetric weights too.
    points = np.broadcast_to(tensors.take(name, ("I8",), stored), shape)
    return _signed_rows(points, bits, f"{tensors.path}, {name}")


def _packed_rows(words: NDArray[Any], k: int, bits: int) -> Rows:
    return lambda start, stop: fields(words[start:stop].view(np.uint32), bits)[:, :k]


def _signed_rows(values: NDArray[np.int8], bits: int, where: str) -> Rows:
    """Signed integers of `bits` bits, made unsigned; ModelError for one out of range."""

    def take(start: int, stop: int) -> Codes:
        codes = values[start:stop].view(np.uint8) + np.uint8(1 << (bits - 1))
        if bits < 8 and codes.max() >> bits:
            raise ModelError(f"{where} holds codes of more than {bits} bits")
        return codes

    return take
