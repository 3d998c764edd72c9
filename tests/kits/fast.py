"""The linear layers of `fast` arithmetic in the reference executor, written down from docs/arithmetic.md.

The reference rounds only what the program rounds. `fast` also rounds rows that meet integer weights to int8,
and rows that meet other codes and halves to bfloat16; with that done here too, what is left between the
native executor and the reference is the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from gristmill.backends.reference import ops
from gristmill.formats.packed import PackedSpec
from gristmill.io.checkpoint import Checkpoint
from gristmill.program.nodes import Node


@contextmanager
def fast_linears(checkpoint: Checkpoint) -> Iterator[None]:
    """Within the block, reference executors of this checkpoint's program run linears as `fast` does.

    Of generated tokens: at `amx` prompts meet small groups otherwise.
    """
    writers = checkpoint.program().writers()
    plain = ops.FUNCTIONS["linear"]

    def linear(
        context: ops.Context, node: Node, inputs: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        writer = writers[node.inputs[0]]
        kind = writer.attributes["kind"] if writer.op == "encode" else "none"
        rows = _rows(inputs[0], checkpoint.specs[node.weights[0]], kind)
        return plain(context, node, [rows], weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.FUNCTIONS, "linear", linear)
        yield


def _rows(x: Tensor, spec: PackedSpec, kind: str) -> Tensor:
    """Rows x [T, K] as a weight of this spec meets them; kind: how the program has rounded them already."""
    if kind == "fp8" or spec.format == "f32":
        return x
    if spec.scales in ("f16", "f32"):
        groups = -(-x.shape[1] // spec.group)
        return x if kind == "int" else ops.round_rows(x, spec.group, torch.full((groups,), 127.0))
    return x.to(torch.bfloat16).to(x.dtype)
