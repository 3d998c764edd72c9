"""Runs a model over many sequences, node by node: every layer can be seen, and changed, before it runs."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gristmill.backends.reference import ReferenceExecutor
from gristmill.backends.reference.ops import Context, run
from gristmill.errors import UsageError
from gristmill.program.nodes import Node

Rows = list[Tensor]
"""A buffer of all sequences: one tensor [tokens, width] each, in the executor's dtype."""

IN_MEMORY = 512 << 20
"""Bytes of a stream's buffers that are held in memory."""


class _Growing:
    """A buffer while it is written, sequence by sequence: in memory while there is room, then in a file."""

    def __init__(self, room: int, scratch: Path | None) -> None:
        """room: bytes of memory."""
        self.resident = 0
        self._room, self._scratch = room, scratch
        self._rows: Rows = []
        self._file: IO[bytes] | None = None
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []

    def append(self, rows: Tensor) -> None:
        """The rows of the next sequence. OSError where the disk is full."""
        if self._file is None and self.resident + rows.nbytes <= self._room:
            self._rows.append(rows)
            self.resident += rows.nbytes
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._scratch)  # noqa: SIM115 (closed by `finish`)
        # Written, not mapped for writing: a full disk is an error then, not a signal.
        self._file.write(rows.contiguous().view(torch.uint8).numpy().data)
        self._shapes.append((rows.shape, rows.dtype))

    def finish(self) -> Rows:
        """All of them."""
        if self._file is None:
            return self._rows
        with self._file as file:
            file.flush()
            whole = torch.frombuffer(mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE), dtype=torch.uint8)
        begin = 0
        for shape, dtype in self._shapes:
            end = begin + shape.numel() * dtype.itemsize
            self._rows.append(whole[begin:end].view(dtype).view(shape))
            begin = end
        return self._rows


class Stream:
    """A model's step over whole sequences, breadth first: every node runs over all of them before the next.

        for node in stream:
            if node.op == "linear":
                x = stream.inputs(node)
                executor.weights[node.weights[0]] = quantise(x)

    A node is handed out before it runs. It then runs with what `executor.weights` holds at that moment, so
    that later nodes see what was changed. Leaving the loop leaves the node at hand undone; another loop
    begins with it. The weights may change at any time; what has been computed stays.

    Memory: a buffer lives from the node that writes it to the last that reads it, so that at most the widest
    block's buffers are held (four of 16 x 512 tokens and 1,536 columns take 200 MB in float32), and what
    attention and the other nodes need besides is that of one sequence. Of a stream's buffers, and of what
    `evaluate` gives, IN_MEMORY bytes are held in memory; what is beyond lies in files without a name, one per
    buffer, which are mapped, and end with their readers. No gradients are recorded. A sequence's numbers do
    not depend on the other sequences.
    """

    def __init__(
        self,
        executor: ReferenceExecutor,
        sequences: Sequence[Sequence[int] | NDArray[np.int64]],
        scratch: Path | None = None,
    ) -> None:
        """sequences: token ids, each a whole prompt. UsageError for an empty one or an id out of range.

        scratch: the directory for buffers beyond IN_MEMORY; None: the system's. OSError where it is full.
        """
        self.executor = executor
        self._scratch = scratch
        self.program = executor.program
        self._ids = [np.asarray(ids, np.int64) for ids in sequences]
        if not self._ids:
            raise UsageError("a calibration needs at least one sequence")
        for ids in self._ids:
            if ids.ndim != 1 or not len(ids):
                raise UsageError("a calibration sequence must be a list of at least one token id")
            if int(ids.min()) < 0 or int(ids.max()) >= executor.vocab_size:
                raise UsageError(f"a token id is outside the vocabulary of {executor.vocab_size}")
        self._index = {node.name: i for i, node in enumerate(self.program.nodes)}
        self._held: dict[str, Rows] = {}
        self._resident: dict[str, int] = {}  # buffer -> its bytes in memory
        self._next = 0

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self._ids))

    def __iter__(self) -> Iterator[Node]:
        """The nodes that have not run, each before it runs."""
        while self._next < len(self.program.nodes):
            node = self.program.nodes[self._next]
            yield node
            self._run(node)

    def inputs(self, node: Node, index: int = 0) -> Rows:
        """An input of a node, by default its first. UsageError if it is not computed yet, or not any more."""
        return self._buffer(node.inputs[index])

    def evaluate(self, node: Node, weights: Mapping[str, Tensor] | None = None) -> Rows:
        """The first output of a node for other weights; nothing is kept.

        weights: by name, in place of the executor's. UsageError as in `inputs`.
        """
        return self.evaluate_span(node, node, weights)

    def evaluate_span(
        self,
        first: Node,
        last: Node,
        weights: Mapping[str, Tensor] | None = None,
        given: Mapping[str, Rows] | None = None,
    ) -> Rows:
        """The first output of `last` after the nodes from `first` to `last` ran, as in `evaluate`.

        What the span reads and does not write itself must be at hand: say, from q_proj to o_proj while q_proj
        is the node at hand. The buffers in between are those of one sequence at a time.

        given: rows of buffers of the span, for the first sequences or all, in place of the nodes that write
        them; the result has as many sequences.
        """
        given = given or {}
        start, stop = self._index[first.name], self._index[last.name]
        if start > stop:
            raise UsageError(f"node {last.name!r} does not come after {first.name!r}")
        span = [
            node
            for node in self.program.nodes[start : stop + 1]
            if not all(name in given for name in node.outputs)
        ]
        written = set(given)
        for node in span:
            for name in node.inputs:
                if name not in written:
                    self._buffer(name)
            written.update(node.outputs)
        used = self.executor.weights if weights is None else {**self.executor.weights, **weights}
        result = _Growing(self._room(), self._scratch)
        for i in range(min([len(self._ids), *map(len, given.values())])):
            own = {name: rows[i] for name, rows in given.items()}
            for node in span:
                inputs = [own[n] if n in own else self._held[n][i] for n in node.inputs]
                own.update(zip(node.outputs, self._outputs(node, i, inputs, used), strict=True))
            result.append(own[last.outputs[0]])
        return result.finish()

    def fork(self, executor: ReferenceExecutor) -> Stream:
        """A stream that goes on from here with another executor; this one stays where it is.

        UsageError if the other's program differs in a node that has run.
        """
        if executor.program.nodes[: self._next] != self.program.nodes[: self._next]:
            raise UsageError("a stream can only be forked to a program that begins with the same nodes")
        other = Stream(executor, self._ids, self._scratch)
        other._held, other._next = dict(self._held), self._next
        other._resident = dict(self._resident)
        return other

    def run_to_end(self) -> Rows:
        """Runs all nodes that have not run: the program's output, as `output`."""
        for _ in self:
            pass
        return self.output()

    def output(self) -> Rows:
        """The logits of every token, [tokens, vocab] per sequence. UsageError before the last node ran."""
        return self._buffer(self.program.output)

    def _buffer(self, name: str) -> Rows:
        if name not in self._held:
            raise UsageError(f"the stream does not hold the buffer {name!r} at this point")
        return self._held[name]

    def _room(self) -> int:
        return IN_MEMORY - sum(self._resident.values())

    def _run(self, node: Node) -> None:
        inputs = [self._held[name] for name in node.inputs]
        outputs = [_Growing(self._room() // len(node.outputs), self._scratch) for _ in node.outputs]
        for i in range(len(self._ids)):
            values = self._outputs(node, i, [rows[i] for rows in inputs], self.executor.weights)
            for rows, value in zip(outputs, values, strict=True):
                rows.append(value)
        for name, rows in zip(node.outputs, outputs, strict=True):
            self._held[name], self._resident[name] = rows.finish(), rows.resident
        last = self.executor.last_reader
        for name in [*node.inputs, *node.outputs]:
            if last.get(name, self._next) == self._next and name != self.program.output:
                self._held.pop(name, None)
                self._resident.pop(name, None)
        self._next += 1

    def _outputs(
        self, node: Node, index: int, inputs: list[Tensor], weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """A node's outputs for one sequence."""
        ids = torch.from_numpy(self._ids[index])
        every = torch.arange(len(ids))
        # Every node has a context of its own: what attention appends to its state is not needed again.
        context = Context(ids, every, every, [len(ids)], [{}], self.executor.kv_formats)
        with torch.no_grad():
            return run(context, node, inputs, [weights[name] for name in node.weights])
