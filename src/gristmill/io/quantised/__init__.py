"""Hugging Face directories quantised already (GPTQ, AWQ, compressed-tensors), read in their own codes.

Each format has one file. All come down to value = scale * (code - zero), with a scale and a zero per row and
group of columns; `gristmill.io.quantised.layers` makes a packed matrix of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from gristmill.errors import ModelError
from gristmill.io.expected import Shapes
from gristmill.io.mapped import short
from gristmill.io.quantised.awq import Awq
from gristmill.io.quantised.compressed_tensors import CompressedTensors
from gristmill.io.quantised.gptq import Gptq
from gristmill.io.quantised.layers import Stored, Tensors


class Reader(Protocol):
    """How the quantised matrices of one directory are read."""

    def matrices(self, tensors: Tensors, expected: Shapes) -> dict[str, Stored]:
        """The quantised ones among the expected matrices, by name; their parts are taken out of `tensors`.

        ModelError for a part that is missing, of another shape or dtype, or cannot be expressed.
        """
        ...


PARTS = (
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
)
"""What a quantised matrix may be stored as, beside `weight`."""

_READERS: dict[str, Callable[[Mapping[str, Any]], Reader]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
}


def reader(config: Mapping[str, Any]) -> Reader | None:
    """The reader that a config's `quantization_config` calls for; None if there is none.

    ModelError, naming it, for a method, version or option that cannot be read.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if not isinstance(quantization, dict) or not isinstance(method, str) or method not in _READERS:
        raise ModelError(f"quantised with {short(method)}, which cannot be read ({', '.join(_READERS)} can)")
    return _READERS[method](quantization)
