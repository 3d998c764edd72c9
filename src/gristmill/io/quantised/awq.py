"""AWQ checkpoints, as AutoAWQ writes them (version "gemm").

Of a linear layer [N, K] with G groups: `qweight` int32 [K, N / 8], `qzeros` int32 [G, N / 8], `scales`
[G, N]. A word holds eight rows of one column, four bits each, from the lowest on in the order 0, 2, 4, 6, 1,
3, 5, 7 (AutoAWQ, awq/modules/linear/gemm.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gristmill.errors import ModelError
from gristmill.io.expected import Shapes, flag
from gristmill.io.mapped import short
from gristmill.io.quantised.layers import (
    FLOATS,
    Codes,
    Rows,
    Stored,
    Tensors,
    Words,
    fields,
    group_size,
    matrix,
    modules,
)

_BITS = 4
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of its eight rows lies."""


class Awq:
    """Reads the AWQ layers of a directory."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config` is the quantization_config; ModelError for what is not supported."""
        version = config.get("version", "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise ModelError(f"the AWQ version {short(version)} cannot be read ('gemm' can)")
        bits = config.get("bits", config.get("w_bit"))
        if bits != _BITS:
            raise ModelError(f"AWQ codes have 4 bits, not {short(bits)}")
        self.group = group_size(config.get("group_size", config.get("q_group_size", 128)))
        self.zeros = flag(config, "zero_point", True)

    def matrices(self, tensors: Tensors, expected: Shapes) -> dict[str, Stored]:
        """See `gristmill.io.quantised.Reader`."""
        return {
            f"{module}.weight": self._matrix(tensors, module, shape)
            for module, shape in modules(tensors, expected, "qweight")
        }

    def _matrix(self, tensors: Tensors, module: str, shape: tuple[int, int]) -> Stored:
        n, k = shape
        if n % 8:
            raise ModelError(f"{tensors.path}: {module} has {n} rows, which do not fill AWQ's words of 8")
        group = k if self.group == -1 else self.group
        groups = -(-k // group)
        qweight = tensors.take(f"{module}.qweight", ("I32",), (k, n // 8)).view(np.uint32)
        scales = tensors.take(f"{module}.scales", FLOATS, (groups, n))
        zeros: Rows | int = 8
        if self.zeros or f"{module}.qzeros" in tensors:
            zeros = _rows(tensors.take(f"{module}.qzeros", ("I32",), (groups, n // 8)).view(np.uint32))
        return matrix(
            f"{tensors.path}, {module}",
            shape,
            bits=_BITS,
            group=group,
            codes=_rows(qweight),
            scales=scales.T,
            zeros=zeros,
        )


def _rows(words: Words) -> Rows:
    """Words [C, N / 8] -> their fields [N, C], by rows."""

    def take(start: int, stop: int) -> Codes:
        part = words[:, start // 8 : stop // 8]
        places = fields(part, _BITS).reshape(*part.shape, 8)
        return places[..., _PLACES].transpose(1, 2, 0).reshape(stop - start, len(words))

    return take
