"""The reference executor: eager PyTorch, node by node, with taps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gristmill.backends.reference.ops import FUNCTIONS, Context, Entries, run
from gristmill.errors import Cancelled, GristmillError, ModelError, UsageError
from gristmill.program.batch import Batch, CancelFlag, KVView
from gristmill.program.kv import check_kv_dtype
from gristmill.program.nodes import Program

if TYPE_CHECKING:
    from gristmill.io.checkpoint import Checkpoint

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class ReferenceKVView:
    """One sequence's states as tensors. Windows are kept whole, so that any truncation is possible."""

    def __init__(self, owner: ReferenceExecutor, capacity: int) -> None:
        self.owner = owner
        self.capacity = capacity
        self.length = 0
        self.entries: dict[str, Entries] | None = {}

    @property
    def held(self) -> dict[str, Entries]:
        """Entries by state; GristmillError once closed."""
        if self.entries is None:
            raise GristmillError("the sequence's KV view is closed")
        return self.entries

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on."""
        held = self.held
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot truncate a KV view of {self.length} tokens to {length}")
        self.entries = {name: (k[:length], v[:length]) for name, (k, v) in held.items()}
        self.length = length

    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.numel() * t.element_size() for pair in self.held.values() for t in pair)

    def close(self) -> None:
        """Drops the tensors. Idempotent."""
        self.entries = None


class ReferenceExecutor:
    """Runs a program, semantic or lowered, in PyTorch: the oracle, and where calibration sees activations.

    weights: every tensor of the program under its name, matrices [outputs, inputs], all converted to `dtype`
    (float64, float32, bfloat16 or float16), in which the buffers and the KV are, too. kv_dtype: the format
    (`program.kv`) that all keys and values are rounded to; None: what the program says, else none.
    Raises ModelError for a missing tensor, a shape that disagrees with the program, or an op that the backend
    lacks.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, Tensor | NDArray[np.floating]],
        *,
        dtype: str = "float32",
        kv_dtype: str | None = None,
    ) -> None:
        check_kv_dtype(kv_dtype)
        if dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        for node in program.nodes:
            if node.op not in FUNCTIONS:
                raise ModelError(
                    f"the reference backend cannot run node {node.name!r}: op {node.op!r} is not supported"
                )
        self.program = program
        self.dtype = DTYPES[dtype]
        self.kv_formats = {
            node.state: kv_dtype or node.attributes.get("kv_format", "")
            for node in program.nodes
            if node.state is not None
        }
        self.vocab_size = program.vocab_size
        self.weights: dict[str, Tensor] = {}
        """The tensors by name, in `dtype`. They may be replaced, or made to require gradients."""
        for name, declared in program.weights.items():
            if name not in weights:
                raise ModelError(f"the model has no tensor {name!r}")
            value = weights[name]
            # A NumPy view of a mapped file is read-only; PyTorch needs its own copy.
            tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
            if tuple(tensor.shape) != declared.shape:
                raise ModelError(
                    f"tensor {name!r} has the shape {list(tensor.shape)}, but the program needs "
                    f"{list(declared.shape)}"
                )
            self.weights[name] = tensor.to(self.dtype)
        self.last_reader = {name: i for i, node in enumerate(program.nodes) for name in node.inputs}
        """For every buffer that is read, the index of the last node that does."""
        self._taps: list[tuple[frozenset[str], dict[str, list[Tensor]]]] = []

    @classmethod
    def load(
        cls, source: Path | Checkpoint, *, dtype: str = "float32", kv_dtype: str | None = None
    ) -> ReferenceExecutor:
        """Loads a checkpoint, given open or by its directory.

        Packed weights are decoded exactly, in float64, and rounded once to `dtype`.
        """
        from gristmill.formats.packed import decode
        from gristmill.io.checkpoint import Checkpoint

        checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
        if dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        weights: dict[str, Tensor] = {}
        for name in checkpoint.names():
            if name in checkpoint.specs:
                weights[name] = torch.from_numpy(decode(checkpoint.packed(name))).to(DTYPES[dtype])
            else:
                weights[name] = torch.from_numpy(np.array(checkpoint.vector(name)))
        return cls(checkpoint.program(), weights, dtype=dtype, kv_dtype=kv_dtype)

    def allocate(self, capacity: int) -> ReferenceKVView:
        """An empty view for a sequence of up to `capacity` tokens."""
        if capacity < 1:
            raise UsageError(f"a KV view needs room for a token, not {capacity}")
        return ReferenceKVView(self, capacity)

    @contextmanager
    def tap(self, *names: str) -> Iterator[dict[str, list[Tensor]]]:
        """Collects buffers during the steps inside the `with` block: name -> one tensor per step.

        A buffer is called like the node that writes it, or, of a node with several outputs, by its own name.
        UsageError for a name that the program lacks. Tensors of `forward` carry their gradients' history.
        """
        for name in names:
            if name not in self.program.buffers:
                raise UsageError(f"the program {self.program.name} has no buffer {name!r}")
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        entry = (frozenset(names), seen)
        self._taps.append(entry)
        try:
            yield seen
        finally:
            self._taps = [tap for tap in self._taps if tap is not entry]

    def forward(self, batch: Batch, cancel: CancelFlag | None = None) -> Tensor:
        """As `step`, but the logits are a tensor [R, vocab] of `dtype`, differentiable in the weights."""
        views = [self._own(view) for view in batch.views]
        batch.check(self.vocab_size)
        context = Context(
            ids=torch.from_numpy(batch.tokens.astype(np.int64)),
            position=torch.from_numpy(batch.positions().astype(np.int64)),
            logit_rows=torch.from_numpy(batch.logit_rows.astype(np.int64)),
            lengths=batch.lengths.tolist(),
            past=[view.held for view in views],
            kv_formats=self.kv_formats,
        )
        buffers: dict[str, Tensor] = {}
        for i, node in enumerate(self.program.nodes):
            if cancel is not None and cancel.is_set():
                raise Cancelled("cancelled")
            inputs = [buffers[name] for name in node.inputs]
            outputs = run(context, node, inputs, [self.weights[name] for name in node.weights])
            for name, value in zip(node.outputs, outputs, strict=True):
                buffers[name] = value
                for names, seen in self._taps:
                    if name in names:
                        seen[name].append(value)
            for name in node.inputs:
                if self.last_reader[name] == i and name != self.program.output:
                    buffers.pop(name, None)
        for view, entries, length in zip(views, context.appended, context.lengths, strict=True):
            view.entries = entries
            view.length += length
        return buffers[self.program.output]

    def step(self, batch: Batch, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        """Runs the tokens of `batch` and appends them to their views: logits [R, vocab] float32.

        Raises Cancelled (views unchanged) and UsageError (a batch that does not fit).
        """
        with torch.no_grad():
            logits: NDArray[np.float32] = self.forward(batch, cancel).to(torch.float32).numpy()
        return logits

    def _own(self, view: KVView) -> ReferenceKVView:
        if not isinstance(view, ReferenceKVView) or view.owner is not self:
            raise UsageError("the KV view belongs to another executor")
        return view

    def close(self) -> None:
        """Drops the weights. Idempotent."""
        self.weights = {}
