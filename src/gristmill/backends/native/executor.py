"""The native executor: a lowered program, its weights and its threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gristmill.backends.native import _native
from gristmill.backends.native.lower import lower, prompt_in_bf16
from gristmill.backends.native.weights import NativeWeight, WeightStore
from gristmill.errors import Cancelled, GristmillError, KVExhausted, ModelError, UsageError
from gristmill.program.batch import Batch, CancelFlag, KVView
from gristmill.program.kv import kv_formats
from gristmill.program.nodes import Program

if TYPE_CHECKING:
    from gristmill.formats.packed import Packed
    from gristmill.io.checkpoint import Checkpoint, Extent

ACTIVATIONS = ("exact", "bf16", "fast")
_KV_FORMATS = {
    "f32": _native.KvFormat.F32,
    "bf16": _native.KvFormat.BF16,
    "int4": _native.KvFormat.INT4,
    "int4-channel": _native.KvFormat.INT4_CHANNEL,
}
_PLACEMENTS = {"table": _native.KvPlacement.TABLE, "mapped": _native.KvPlacement.MAPPED}
KV_PLACEMENT = "table"
_NO_CANCEL = np.zeros(0, np.int32)


def default_threads() -> int:
    """Processors this process may use: affinity, cut by the cgroup's CPU quota."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:
        count = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 here
    return max(1, count)


class NativeKVView:
    """One sequence's keys and values in native memory."""

    def __init__(self, native: _native.KvView) -> None:
        self._native: _native.KvView | None = native

    @property
    def native(self) -> _native.KvView:
        """The C++ view; raises GristmillError once closed."""
        if self._native is None:
            raise GristmillError("the sequence's KV view is closed")
        return self._native

    @property
    def capacity(self) -> int:
        """Most tokens it can hold."""
        return int(self.native.capacity)

    @property
    def length(self) -> int:
        """Committed tokens."""
        return int(self.native.length)

    def truncate(self, length: int) -> None:
        """Forgets the tokens from `length` on. UsageError where a sliding window has moved on.

        So, too, where `int4-channel` would have to break up groups of tokens: it can only go back to a
        multiple of 64, or within the last, unfinished group.
        """
        try:
            self.native.truncate(length)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def nbytes(self) -> int:
        """Bytes of the memory it refers to, shared or not."""
        return int(self.native.used_bytes())

    def wanted(self, tokens: int) -> int:
        """Bytes that `reserve` would take."""
        return int(self.native.wanted_bytes(tokens))

    def reserve(self, tokens: int) -> None:
        """Takes memory for that many more tokens, so that a step needs none. Raises KVExhausted."""
        try:
            self.native.prepare(tokens)
        except _native.KvExhausted as error:
            raise KVExhausted(str(error)) from None

    def fork(self, length: int, capacity: int) -> NativeKVView:
        """A view of the first `length` tokens; their memory is shared until one of the two writes over it.

        Raises UsageError as `truncate` does, KVExhausted without a mapping.
        """
        try:
            return NativeKVView(self.native.fork(length, capacity))
        except _native.KvExhausted as error:
            raise KVExhausted(str(error)) from None
        except ValueError as error:
            raise UsageError(str(error)) from None

    def span(self, index: int) -> _native.KvSpan:
        """The memory of tokens 256 * index and on, which then outlives the view."""
        return self.native.span(index)

    def adopt(self, spans: list[_native.KvSpan], length: int) -> None:
        """Begins an empty view with `length` tokens that lie in spans. Raises UsageError, KVExhausted."""
        try:
            self.native.adopt(spans, length)
        except _native.KvExhausted as error:
            raise KVExhausted(str(error)) from None
        except ValueError as error:
            raise UsageError(str(error)) from None

    def close(self) -> None:
        """Gives the memory back. Idempotent."""
        self._native = None


class NativeKVPool:
    """The memory of all sequences' keys and values of one executor."""

    def __init__(self, native: _native.KvPool, share_tokens: int) -> None:
        self._native = native
        self.share_tokens = share_tokens
        """Prefixes are shared in multiples of this many tokens."""
        self.span_bytes = int(native.frame_bytes)
        """Bytes of 256 tokens in all layers."""
        self.windows = [int(window) for window in native.windows]
        """Windows that layers have, 0 for none, as in `KvSpan.held`."""
        self.limit = int(native.limit)
        """Most bytes in use."""
        self.backing = str(native.backing)

    @property
    def used(self) -> int:
        """Bytes that sequences and cached prefixes refer to."""
        return int(self._native.used)

    def stats(self) -> dict[str, int]:
        """limit, used, committed, reserved: bytes. frames, mappings, mapping_limit: numbers."""
        return dict(self._native.stats())

    def trim(self, keep: int = 0) -> None:
        """Gives the pages of unused memory back to the system, all but `keep` bytes."""
        self._native.trim(keep)

    def allocate(self, capacity: int) -> _native.KvView:
        return self._native.allocate(capacity)


class NativeExecutor:
    """Runs a semantic program on the CPU.

    extents: where a weight's arrays lie in a file; with it they are read from there rather than through the
    map, so that the pages do not count twice. activations: `exact` (f32), `bf16`, or `fast` (int8 per token
    and group for integer weights; float weights as stored). kv_dtype: format of all keys and values; None:
    what the program says, else `bf16`. A row's result does not depend on the other rows, the thread count, or
    where a prompt was cut.
    """

    def __init__(
        self,
        program: Program,
        packed: Mapping[str, Packed],
        vectors: Mapping[str, NDArray[np.float32]],
        *,
        activations: str = "fast",
        kv_dtype: str | None = None,
        threads: int | None = None,
        level: str | None = None,
        extents: Callable[[str], Mapping[str, Extent]] | None = None,
    ) -> None:
        if activations not in ACTIVATIONS:
            raise UsageError(f"activations must be one of {', '.join(ACTIVATIONS)}, not {activations!r}")
        if threads is not None and not 1 <= threads <= 1024:
            raise UsageError(f"threads must be between 1 and 1024, not {threads}")
        self.program = program
        self.activations = activations
        formats = kv_formats(program, kv_dtype)
        self.kv_dtype = "+".join(sorted(set(formats.values())))
        try:
            self.level = level or _native.default_level()
            self._pool = _native.Pool(threads or default_threads())
            self._native = _native.Program(self.level, self._pool)
        except ValueError as error:
            raise UsageError(str(error)) from None
        used = sorted({name for node in program.nodes for name in node.weights if name in packed})
        self._store = WeightStore([packed[name] for name in used], extents)
        self.weights: dict[str, NativeWeight] = {}

        def weight(name: str) -> NativeWeight:
            if name not in self.weights:
                if name not in packed:
                    raise ModelError(f"the model has no tensor {name!r}")
                self.weights[name] = self._store.register(self._native, name, packed[name])
            return self.weights[name]

        def vector(name: str) -> NDArray[np.float32]:
            if name not in vectors:
                raise ModelError(f"the model has no tensor {name!r}")
            return vectors[name]

        attention = [node for node in program.nodes if node.op == "attention"]
        for node in attention:
            if int(node.attributes["head_dim"]) % 16:
                raise ModelError(
                    f"the native backend cannot run node {node.name!r}: "
                    f"head_dim {node.attributes['head_dim']} is not a multiple of 16"
                )
        geometry = [
            (
                int(n.attributes.get("window", 0)),
                int(n.attributes["kv_heads"]),
                int(n.attributes["head_dim"]),
                _KV_FORMATS[formats[str(n.state)]],
            )
            for n in attention
        ]
        self._native.set_geometry(geometry)
        layers = {str(node.state): i for i, node in enumerate(attention)}
        lowered = lower(
            program,
            self._native,
            weight,
            vector,
            activations=activations,
            kv_layers=layers,
        )
        self._share_tokens = 64 if "int4-channel" in formats.values() else 1
        self.limit_kv()
        self._ropes = lowered.ropes
        self._positions = 0
        self.vocab_size = lowered.vocab_size
        self.weight_bytes = sum(w.nbytes for w in self.weights.values())

    @classmethod
    def load(
        cls,
        source: Path | Checkpoint,
        *,
        activations: str | None = None,
        kv_dtype: str | None = None,
        threads: int | None = None,
        level: str | None = None,
    ) -> NativeExecutor:
        """Loads a checkpoint, given open or by its directory.

        activations None: what the checkpoint's recipe means, else `fast` for integer formats, as stored for
        float ones.
        """
        from gristmill.io.checkpoint import Checkpoint

        checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
        program = checkpoint.program()
        return cls(
            program,
            _Tensors(checkpoint.packed, checkpoint.specs),
            _Tensors(checkpoint.vector, set(checkpoint.names()) - set(checkpoint.specs)),
            extents=checkpoint.extents,
            activations=activations or checkpoint.activations or "fast",
            kv_dtype=kv_dtype,
            threads=threads,
            level=level,
        )

    @property
    def pool(self) -> _native.Pool:
        """The threads that run a step."""
        return self._pool

    @property
    def threads(self) -> int:
        """Threads that run a step."""
        return int(self._pool.threads)

    @property
    def prompt_activations(self) -> str:
        """`bf16` where rows of prompts meet integer weights so (docs/arithmetic.md), else `activations`."""
        phased = any(prompt_in_bf16(self._native, w) for w in self.weights.values())
        return "bf16" if phased and self.activations == "fast" else self.activations

    @property
    def weights_in_arena(self) -> bool:
        """Whether the weights were copied onto huge pages; otherwise they are read from the mapped file."""
        return self._store.in_arena

    def _extend_positions(self, count: int) -> None:
        if count <= self._positions:
            return
        from gristmill.program.rope import rope_inverse_frequencies

        self._positions = max(512, 1 << (count - 1).bit_length())
        for table, attributes in self._ropes:
            inverse, factor = rope_inverse_frequencies(attributes["rope"], attributes["head_dim"])
            # float32 throughout, as the models were trained with.
            angles = (
                np.arange(self._positions, dtype=np.float32)[:, None] * inverse.astype(np.float32)[None, :]
            )
            scale = np.float32(factor)
            self._native.set_rope(table, np.cos(angles) * scale, np.sin(angles) * scale)

    def limit_kv(self, limit: int = 0, placement: str = KV_PLACEMENT) -> None:
        """Keys and values take at most `limit` bytes from now on (0: the machine's memory).

        placement: `table` (anonymous memory on huge pages where the system grants them; kernels look up where
        each 256 tokens lie) or `mapped` (a memory file, mapped into one run of addresses per sequence). Views
        made before keep their memory. Raises UsageError, and GristmillError where the addresses cannot be
        reserved.
        """
        if placement not in _PLACEMENTS:
            raise UsageError(f"the KV placement must be one of {', '.join(_PLACEMENTS)}, not {placement!r}")
        try:
            pool = self._native.kv_pool(limit, _PLACEMENTS[placement])
        except MemoryError:
            raise GristmillError("the addresses for the KV cache cannot be reserved (ulimit -v?)") from None
        except RuntimeError as error:
            raise GristmillError(str(error)) from None
        self.kv_pool = NativeKVPool(pool, self._share_tokens)

    @property
    def progress(self) -> int:
        """Nodes run since the start; to be read from other threads."""
        return int(self._native.progress)

    def allocate(self, capacity: int) -> NativeKVView:
        """A view for a sequence of up to `capacity` tokens; its pages are committed as they are written."""
        self._extend_positions(capacity)
        try:
            return NativeKVView(self.kv_pool.allocate(capacity))
        except _native.KvExhausted as error:
            raise KVExhausted(str(error)) from None
        except ValueError as error:
            raise UsageError(str(error)) from None
        except MemoryError:
            raise GristmillError(f"no memory for a KV cache of {capacity} tokens") from None

    def step(self, batch: Batch, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        """Runs the tokens of `batch` and appends them to their views: logits [R, vocab] float32.

        Raises Cancelled (views unchanged), UsageError (a step that does not fit) and KVExhausted.
        """
        rows = batch.logit_rows
        # The native step checks the rest.
        if len(rows) > 1 and bool((rows[1:] <= rows[:-1]).any()):
            raise UsageError("logit_rows must be ascending row indices of the batch")
        if len(batch.phases) != len(batch.tokens):
            raise UsageError(f"the batch has {len(batch.phases)} phases for {len(batch.tokens)} tokens")
        logits = np.empty((len(rows), self.vocab_size), np.float32)
        views = [_native_view(view) for view in batch.views]
        try:
            done = self._native.run(
                batch.tokens,
                batch.phases,
                views,
                batch.lengths.tolist(),
                rows,
                logits,
                _NO_CANCEL if cancel is None else cancel.word,
            )
        except ValueError as error:
            raise UsageError(str(error)) from None
        except _native.KvExhausted as error:
            raise KVExhausted(str(error)) from None
        if not done:
            raise Cancelled("cancelled")
        return logits

    def profile(self, on: bool) -> None:
        """Starts (and clears) or stops the per-node clock."""
        self._native.set_profiling(on)

    def node_times(self) -> list[tuple[str, float]]:
        """Seconds per native node since profiling was switched on."""
        return [(str(name), float(seconds)) for name, seconds in self._native.profile()]

    def close(self) -> None:
        """Stops the threads and gives the memory back when the last reference goes."""
        del self._native, self._pool, self._store, self.kv_pool


def _native_view(view: KVView) -> _native.KvView:
    if not isinstance(view, NativeKVView):
        raise UsageError("the KV view belongs to another executor")
    return view.native


class _Tensors(Mapping[str, Any]):
    """A checkpoint's tensors by name, read on access."""

    def __init__(self, read: Any, names: Any) -> None:
        self._read = read
        self._names = frozenset(names)

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
