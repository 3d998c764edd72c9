"""The memory plan: what weights and KV caches will take, against what this process may take.

Made before weights are read, so that a model that cannot fit is refused in one line, with a setting that
does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gristmill.errors import GristmillError, UsageError
from gristmill.program.batch import MAX_STEP_TOKENS
from gristmill.program.kv import KV_DEFAULT, check_kv_dtype, kv_bytes, kv_formats
from gristmill.program.nodes import CONSTANT, WINDOW, Program

RESERVE = 128 << 20
"""Bytes set aside for the interpreter, the buffers of a step and the logits."""
BLOCK_TOKENS = 16
SPAN_TOKENS = 256
"""The KV cache grows by blocks; the ring of a windowed layer holds its window and the tokens of the longest
step in whole spans, and one span more."""
_UNLIMITED = 1 << 60
_REQUANTISED_BITS = {"int8": 8.25, "int4": 4.5}


class MemoryPlanError(GristmillError):
    """Weights and KV cache do not fit into the memory that is left."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What one state keeps: arrays of these shapes per token, for `window` tokens or (0) for all of them."""

    shapes: tuple[tuple[int, ...], ...]
    kv_format: str
    window: int = 0
    constant: bool = False
    """One entry per sequence, however long it is."""

    def tokens(self, context: int) -> int:
        """Tokens that memory is taken for in a sequence of at most `context`."""
        if self.constant:
            return 1
        blocks = -(-context // BLOCK_TOKENS)
        if self.window:
            spans = -(-(self.window + MAX_STEP_TOKENS) // SPAN_TOKENS) + 1
            blocks = min(blocks, spans * SPAN_TOKENS // BLOCK_TOKENS)
        return blocks * BLOCK_TOKENS

    def nbytes(self, context: int) -> int:
        """Bytes of a sequence of at most `context` tokens."""
        return int(kv_bytes(self.shapes, self.kv_format, self.tokens(context)))


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes wanted and bytes there are."""

    weight_bytes: int
    kv_bytes: int
    """Of all sequences, each grown to the whole context."""
    reserve_bytes: int
    available_bytes: int
    limited_by: str
    """Where `available_bytes` comes from: "free memory" or "the container's memory limit"."""
    context: int
    sequences: int
    kv_dtype: str
    largest_context: int
    """The longest context, up to the one asked for, that fits these weights and sequences; 0 if none does."""
    smaller_weights: str | None
    """A weight mode that fits with the context asked for, where these weights do not fit at all."""

    @property
    def need_bytes(self) -> int:
        """Everything together."""
        return self.weight_bytes + self.kv_bytes + self.reserve_bytes

    @property
    def fits(self) -> bool:
        """Whether there is enough memory."""
        return self.need_bytes <= self.available_bytes

    def check(self) -> Plan:
        """Returns the plan if it fits; raises MemoryPlanError with the numbers and a setting that fits."""
        if self.fits:
            return self
        many = f"{self.sequences} sequences of " if self.sequences > 1 else ""
        text = (
            f"the model needs {_size(self.need_bytes)} (weights {_size(self.weight_bytes)}, KV cache "
            f"{_size(self.kv_bytes)} for {many}{self.context} tokens in {self.kv_dtype}, "
            f"{_size(self.reserve_bytes)} to work in), but {_size(self.available_bytes)} are left "
            f"({self.limited_by})"
        )
        if self.largest_context:
            text += f": a context of {self.largest_context} tokens fits (--context {self.largest_context})"
        elif self.smaller_weights:
            text += f": {self.smaller_weights} weights fit (--weights {self.smaller_weights})"
        else:
            text += ": no context fits; free some memory or choose a smaller model"
        raise MemoryPlanError(text)


def plan(
    model: Program | Mapping[str, Any],
    weight_bytes: int,
    kv_dtype: str | None,
    context: int,
    sequences: int = 1,
    *,
    available: tuple[int, str] | None = None,
) -> Plan:
    """Plans `sequences` sequences of up to `context` tokens of a model (its program, or its config).

    kv_dtype None: as the program says, else bf16. Does not raise for lack of memory: `Plan.check` does.
    `available` (bytes, what limits them) is measured unless given. UsageError for an unknown KV dtype or
    counts below 1; ModelError for a damaged config.
    """
    check_kv_dtype(kv_dtype)
    if context < 1 or sequences < 1:
        raise UsageError(f"a context of {context} tokens for {sequences} sequences cannot be planned")
    layers, parameters = _layers(model, kv_dtype)
    total, limited_by = available or available_memory()

    def kv(tokens: int) -> int:
        return sequences * sum(layer.nbytes(tokens) for layer in layers)

    def fits(tokens: int, weights: int = weight_bytes) -> bool:
        return weights + kv(tokens) + RESERVE <= total

    smaller = None
    largest = context if fits(context) else _largest(context, fits)
    if not largest:
        sizes = {mode: int(parameters * bits / 8) for mode, bits in _REQUANTISED_BITS.items()}
        smaller = next((m for m, size in sizes.items() if size < weight_bytes and fits(context, size)), None)
    formats = "+".join(sorted({layer.kv_format for layer in layers}))
    return Plan(
        weight_bytes, kv(context), RESERVE, total, limited_by, context, sequences, formats, largest, smaller
    )


def _largest(context: int, fits: Any) -> int:
    """The longest fitting context below `context`, cut to a round number; 0 if not even one block fits."""
    low, high = 0, context
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    step = 256 if low >= 1024 else BLOCK_TOKENS
    return low // step * step


def _layers(model: Program | Mapping[str, Any], kv_dtype: str | None) -> tuple[list[Layer], int]:
    """The states of a model, and the number of its weights."""
    if isinstance(model, Program):
        formats = kv_formats(model, kv_dtype)
        states = [
            Layer(
                tuple(state.entry.values()),
                formats[name],
                state.window if state.growth == WINDOW else 0,
                state.growth == CONSTANT,
            )
            for name, state in model.states.items()
        ]
        return states, sum(prod(weight.shape) for weight in model.weights.values())
    from gristmill.io.expected import expected_tensors
    from gristmill.models import read_config

    config = read_config(model)
    entry = ((2, config.kv_heads, config.head_dim),)
    tensors = expected_tensors(model).values()
    layers = [Layer(entry, kv_dtype or KV_DEFAULT, window) for window in config.windows]
    return layers, sum(prod(shape) for shape in tensors)


def _size(count: int) -> str:
    if count >= 10**9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.0f} MB"


# ---- what there is ----------------------------------------------------------------------------------------


def available_memory(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes this process can still take without swapping, and what limits them.

    The smaller of the machine's free memory (page cache counts as free) and what is left of the memory limits
    of this process's cgroup and the ones above it, v1 or v2. `root` is where /proc and /sys are looked for.
    """
    free = _free_memory(root)
    left = _cgroup_left(root)
    if left is not None and left < free:
        return left, "the container's memory limit"
    return free, "free memory"


def _free_memory(root: Path) -> int:
    text = _read(root / "proc/meminfo")
    if match := re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE):
        return int(match[1]) << 10
    # Not Linux. Imported on use: it takes longer than opening a model.
    import psutil

    return int(psutil.virtual_memory().available)


def _cgroup_left(root: Path) -> int | None:
    """Bytes left under the tightest memory limit of this process's cgroups; None without a limit."""
    paths: dict[str, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    left: list[int] = []
    for line in _read(root / "proc/self/mountinfo").splitlines():
        fields, _, tail = line.partition(" - ")
        names, kinds = fields.split(" "), tail.split(" ")
        if len(names) < 5 or len(kinds) < 3 or kinds[0] not in paths:
            continue
        if kinds[0] == "cgroup" and "memory" not in kinds[2].split(","):
            continue
        mounted, point = (re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), name) for name in names[3:5])
        path = paths[kinds[0]]
        # A container sees its own cgroup mounted: what lies above the mount is not visible.
        if mounted != "/":
            path = path[len(mounted) :] if path == mounted or path.startswith(mounted + "/") else ""
        top = root / point.lstrip("/")
        at = top.joinpath(*(part for part in path.split("/") if part not in ("", "..")))
        for directory in (at, *at.parents):
            left += _limit_left(directory, kinds[0])
            if directory == top:
                break
    return min(left, default=None)


def _limit_left(directory: Path, kind: str) -> list[int]:
    """What is left of one cgroup's limit, as a list of one number, or of none where it has no limit."""
    names = ("memory.max", "memory.current", "")
    if kind == "cgroup":
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    limit, used, prefix = _number(directory / names[0]), _number(directory / names[1]), names[2]
    if limit is None or used is None or limit >= _UNLIMITED:
        return []
    stat = _read(directory / "memory.stat")
    # The cache of files is given back when memory runs short.
    cached = sum(int(n) for n in re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat, re.MULTILINE))
    return [max(limit - max(used - cached, 0), 0)]


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    """A file's text, empty where there is none: any part of /proc and /sys may be absent or forbidden."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
