"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

Of a linear layer [N, K] with G = ceil(K / group) groups: `qweight` int32 [K * bits / 32, N], `qzeros` int32
[G, N * bits / 32], `scales` [G, N], `g_idx` int32 [K], the group of each column. Codes are a stream of bits,
lowest first, down the columns of qweight and along the rows of qzeros. "gptq_v2" stores the zeros themselves,
"gptq" the zeros minus one: at 2, 4 and 8 bits as one subtraction from the word, so that a zero of 0 borrows
from the next field, at 3 bits field by field (GPTQModel, nn_modules/qlinear/__init__.py, utils/model.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gristmill.errors import ModelError
from gristmill.io.expected import Shapes, flag, integer
from gristmill.io.mapped import short
from gristmill.io.quantised.layers import (
    FLOATS,
    Codes,
    Stored,
    Tensors,
    Words,
    fields,
    group_size,
    matrix,
    modules,
    read_order,
)

_BITS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A word with a one in every field."""


class Gptq:
    """Reads the GPTQ layers of a directory."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is the quantization_config; ModelError for what is not supported."""
        self.bits = integer(config, "bits")
        if self.bits not in _BITS:
            raise ModelError(f"GPTQ codes have 2, 3, 4 or 8 bits, not {self.bits}")
        self.group = group_size(config.get("group_size", 128))
        self.ordered = flag(config, "desc_act")
        form = config.get("checkpoint_format") or config.get("format") or "gptq"
        if form not in ("gptq", "gptq_v2"):
            raise ModelError(
                f"the GPTQ checkpoint format {short(form)} cannot be read (gptq and gptq_v2 can)"
            )
        self.less_one = form == "gptq"
        # "-:pattern" names layers that are not quantised, which their tensors show.
        special = config.get("dynamic") or {}
        if not isinstance(special, dict) or any(not key.startswith("-:") for key in special):
            raise ModelError("GPTQ with settings per layer (dynamic) cannot be read")

    def matrices(self, tensors: Tensors, expected: Shapes) -> dict[str, Stored]:
        """See `gristmill.io.quantised.Reader`."""
        result = {}
        for module, shape in modules(tensors, expected, "qweight"):
            result[f"{module}.weight"] = self._matrix(tensors, module, shape)
            # AutoGPTQ writes biases of zeros for layers that have none.
            bias = f"{module}.bias"
            if bias in tensors and bias not in expected and tensors.take(bias, FLOATS, (shape[0],)).any():
                raise ModelError(f"{tensors.path}: {bias} is not zero, but the architecture has no such bias")
        return result

    def _matrix(self, tensors: Tensors, module: str, shape: tuple[int, int]) -> Stored:
        (n, k), bits = shape, self.bits
        group = k if self.group == -1 else self.group
        groups = -(-k // group)
        qweight = tensors.take(f"{module}.qweight", ("I32",), (-(-k * bits // 32), n)).view(np.uint32)
        qzeros = tensors.take(f"{module}.qzeros", ("I32",), (groups, -(-n * bits // 32))).view(np.uint32)
        scales = tensors.take(f"{module}.scales", FLOATS, (groups, n))
        order = read_order(tensors, f"{module}.g_idx", k, group, required=self.ordered)

        def codes(start: int, stop: int) -> Codes:
            return _stream(qweight[:, start:stop].T, bits)[:, :k]

        def zeros(start: int, stop: int) -> Codes:
            # Every 32 fields begin a word, whatever their bits.
            base = start // 32 * 32
            words = qzeros[:, base * bits // 32 : -(-stop * bits // 32)]
            if self.less_one and bits in _ONES:
                words = words + np.uint32(_ONES[bits])
            fields = _stream(words, bits)[:, start - base : stop - base].T
            return (fields + np.uint8(1)) & np.uint8(7) if self.less_one and bits == 3 else fields

        return matrix(
            f"{tensors.path}, {module}",
            shape,
            bits=bits,
            group=group,
            codes=codes,
            scales=scales.T,
            zeros=zeros,
            order=order,
        )


def _stream(words: Words, bits: int) -> Codes:
    """[R, C] words -> [R, C * 32 / bits] (rounded down): fields that may go on in the next word."""
    if 8 % bits == 0:
        return fields(words, bits)
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    count = stream.shape[1] // bits
    parts = stream[:, : count * bits].reshape(len(words), count, bits)
    return np.packbits(parts, axis=2, bitorder="little")[..., 0]
