"""Instruction-set levels that are not listed."""

from __future__ import annotations

import numpy as np

from gristmill.backends.native import _native


def emulated() -> list[str]:
    """`amx_emulated` where this processor can run it: it needs what `amx` needs but for the tiles."""
    one = np.ones((1, 1), np.float32)
    try:
        _native.rmsnorm("amx_emulated", one, one[0], one.copy(), 1e-5)
    except ValueError:
        return []
    return ["amx_emulated"]
