"""Layer after layer: rounding with the Hessian of the inputs, as the layers in front now give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gristmill.formats.packed import Packed
from gristmill.methods.draft import Draft
from gristmill.program.edits import linears_of

if TYPE_CHECKING:
    from torch import Tensor

    from gristmill.calibrate.gptq import Rounded


def round_in_sequence(
    draft: Draft,
    label: str,
    tensors: Sequence[str],
    solve: Callable[[NDArray[np.float32], Tensor], Rounded],
) -> None:
    """Packs all `tensors` in program order; the layers behind see those that are packed already.

    solve: rounds the matrices that read one buffer (q, k and v; gate and up), which lie one above the other,
    given the Hessian [K, K] of that buffer (`statistics.Hessian`). Resumes; `label` names the work.
    """
    from gristmill.calibrate.statistics import Hessian

    left = set(tensors)
    readers = linears_of(draft.program)
    stream = draft.stream()
    for node in stream:
        if not left:
            return
        if node.op != "linear" or node.weights[0] not in left:
            continue
        names = [one.weights[0] for one in readers[node.inputs[0]] if one.weights[0] in left]

        def compute(
            names: Sequence[str] = names, rows: Sequence[Tensor] = stream.inputs(node)
        ) -> dict[str, Packed]:
            hessian = Hessian(rows[0].shape[1])
            for x in rows:
                hessian.update(x)
            values = [draft.weight(name) for name in names]
            rounded = solve(np.concatenate(values), hessian.result())
            note_damping(draft, label, names, rounded)
            ends = np.cumsum([len(value) for value in values])
            return {
                name: rounded.pack(slice(end - len(value), end))
                for name, value, end in zip(names, values, ends, strict=True)
            }

        draft.pack_once(f"{label} {' '.join(names)}", names, compute)
        left.difference_update(names)
        draft.progress(label, len(tensors) - len(left), len(tensors))


def note_damping(draft: Draft, label: str, names: Sequence[str], rounded: Rounded) -> None:
    """Says in the report that these matrices could only be rounded to nearest, if that is so."""
    if np.isinf(rounded.damp):
        draft.notes.append(f"{label}: no factor of the Hessian; rounded to nearest: {', '.join(names)}")
