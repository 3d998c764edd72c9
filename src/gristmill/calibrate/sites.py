"""Where scales may be moved between weights without changing the function, read from a semantic program.

A site has a number of channels. Dividing what produces channel c by s[c] and multiplying what consumes it by
s[c] leaves the model as it was, exactly but for rounding, for any s > 0. Kinds:

- `norm`: an rmsnorm whose readers are all linears (q, k and v; gate and up; just one).
- `gated`: the linear that writes `up` of act(gate) * up, which is linear in up -> the linears behind (down).
- `values`: v -> attention, a weighted mean of values -> o. Under grouped queries the channel (g, d) of a
  key-value head reaches the columns (h, d) of every head h of its group: one channel of the site.
- `keys`: k divided and q multiplied. A rotary pair has one channel, as a common factor commutes with the
  rotation; columns that are not rotated have one each. Where heads are normed, the factor has to be in the
  norms' weights, which all heads share. Logits are unchanged (FireQ, arXiv 2505.20839: "pre-RoPE" scaling).

A place is listed only if everything that reads the scaled buffers is known, and if no tensor in it is read
elsewhere. The output head is no consumer: it stays as it is, tied or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import UsageError
from gristmill.program.nodes import SEMANTIC, Node, Program, ProgramError, terms

if TYPE_CHECKING:
    from torch import Tensor

NORM, GATED, VALUES, KEYS = "norm", "gated", "values", "keys"
SMOOTHING = (NORM, GATED, VALUES)
"""The kinds whose consumers are linears that read the scaled channels: sites of smoothing methods."""


@dataclass(frozen=True, eq=False)
class Part:
    """A tensor of a site and how the channels lie in it."""

    weight: str
    channels: NDArray[np.intp]
    """The site's channel of every row (or vector entry), or of every column if `consumes`."""
    consumes: bool
    """Multiplied by the factors; otherwise divided."""
    axis: int = 0
    """0: rows, or the entries of a vector; 1: columns."""
    offset: float = 0.0
    """What the op adds to the stored numbers before it uses them: Gemma's norms multiply by 1 + weight."""


@dataclass(frozen=True, eq=False)
class Site:
    """Channels that may be scaled. Those of kinds in SMOOTHING have linears as consumers."""

    kind: str
    name: str
    """The node that produces the channels."""
    buffer: str
    """What the consumers read (of kind `keys`: the keys before the rotation)."""
    channels: NDArray[np.intp]
    """The channel of every column of `buffer`."""
    parts: tuple[Part, ...]

    @property
    def width(self) -> int:
        """Number of channels."""
        return int(self.channels.max()) + 1

    @property
    def producers(self) -> tuple[str, ...]:
        """Names of the tensors that are divided: a norm's weight, or a matrix and its bias."""
        return tuple(part.weight for part in self.parts if not part.consumes)

    @property
    def consumers(self) -> tuple[str, ...]:
        """Names of the tensors that are multiplied: matrices, in columns (of kind `keys`: in rows)."""
        return tuple(part.weight for part in self.parts if part.consumes)

    def largest(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """The largest of the values [columns of `buffer`] that belong to each channel: [width]."""
        result = np.full(self.width, -np.inf)
        np.maximum.at(result, self.channels, values)
        return result


def find_sites(program: Program, kinds: Sequence[str] = SMOOTHING) -> list[Site]:
    """The sites of these kinds, in the order of their nodes. ProgramError if the program is not semantic."""
    if program.level != SEMANTIC:
        raise ProgramError(f"sites are looked for in semantic programs, not in a {program.level} one")
    finder = _Finder(program)
    found = []
    for node in program.nodes:
        for kind in kinds:
            site = _FIND[kind](finder, node)
            if site is not None:
                found.append(site)
    return found


class _Finder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.readers = program.readers()
        self.writers = program.writers()
        self.uses: dict[str, int] = {}
        for node in program.nodes:
            for weight in node.weights:
                self.uses[weight] = self.uses.get(weight, 0) + 1

    def width(self, buffer: str) -> int:
        width = self.program.buffers[buffer].shape[-1]
        assert isinstance(width, int)
        return width

    def written_by(self, buffer: str, op: str) -> Node | None:
        """The node that writes a buffer for one reader alone, if it is of that op."""
        node = self.writers[buffer]
        alone = len(self.readers[buffer]) == 1 and buffer != self.program.output
        return node if node.op == op and alone else None

    def site(
        self, kind: str, name: str, buffer: str, channels: NDArray[np.intp], parts: list[Part]
    ) -> Site | None:
        """The site, unless a tensor of it is used elsewhere too."""
        if any(self.uses[part.weight] > 1 for part in parts):
            return None
        return Site(kind, name, buffer, channels, tuple(parts))

    def consumers(self, buffer: str, channels: NDArray[np.intp]) -> list[Part]:
        """The matrices of all readers of a buffer; none if one is not a linear, or is the head."""
        readers = self.readers[buffer]
        seen = (buffer, *(name for node in readers for name in node.outputs))
        if self.program.output in seen or any(node.op != "linear" for node in readers):
            return []
        return [Part(node.weights[0], channels, True, 1) for node in readers]

    def norm(self, node: Node) -> Site | None:
        if node.op != "rmsnorm":
            return None
        buffer = node.outputs[0]
        channels = np.arange(self.width(buffer))
        consumers = self.consumers(buffer, channels)
        if not consumers:
            return None
        weight = Part(node.weights[0], channels, False, offset=node.attributes["weight_offset"])
        return self.site(NORM, node.name, buffer, channels, [weight, *consumers])

    def gated(self, node: Node) -> Site | None:
        if node.op != "gated":
            return None
        channels = np.arange(self.width(node.outputs[0]))
        return self._through(GATED, node, node.inputs[1], channels, channels)

    def values(self, node: Node) -> Site | None:
        if node.op != "attention":
            return None
        heads, groups, size = (node.attributes[key] for key in ("heads", "kv_heads", "head_dim"))
        group = np.arange(heads) * groups // heads
        columns = (group[:, None] * size + np.arange(size)).reshape(-1)
        return self._through(VALUES, node, node.inputs[2], np.arange(groups * size), columns)

    def _through(
        self, kind: str, node: Node, source: str, rows: NDArray[np.intp], columns: NDArray[np.intp]
    ) -> Site | None:
        """A linear that `node` alone reads, and is linear in -> the linears behind `node`."""
        producer = self.written_by(source, "linear")
        consumers = self.consumers(node.outputs[0], columns)
        if producer is None or not consumers:
            return None
        parts = [*_rows(producer, rows, False), *consumers]
        return self.site(kind, producer.name, node.outputs[0], columns, parts)

    def keys(self, node: Node) -> Site | None:
        if node.op != "attention":
            return None
        heads, groups, size = (node.attributes[key] for key in ("heads", "kv_heads", "head_dim"))
        rope = node.attributes["rope"]
        half = 0 if rope is None else int(rope["dim"]) // 2
        own = np.arange(size)
        pair = np.where(own < 2 * half, own % max(half, 1), own - half)
        count = size - half
        of_head = np.arange(heads) * groups // heads
        q, k = node.inputs[:2]
        for op in ("linear", "head_rmsnorm"):
            query, key = self.written_by(q, op), self.written_by(k, op)
            if query is None or key is None:
                continue
            if op == "linear":
                rows = (np.arange(groups)[:, None] * count + pair).reshape(-1)
                columns = (of_head[:, None] * count + pair).reshape(-1)
                parts = [*_rows(key, rows, False), *_rows(query, columns, True)]
                return self.site(KEYS, key.name, k, rows, parts)
            parts = [
                Part(one.weights[0], pair, consumes, offset=one.attributes["weight_offset"])
                for one, consumes in ((key, False), (query, True))
            ]
            return self.site(KEYS, key.name, k, np.tile(pair, groups), parts)
        return None


_FIND = {NORM: _Finder.norm, GATED: _Finder.gated, VALUES: _Finder.values, KEYS: _Finder.keys}


def _rows(node: Node, channels: NDArray[np.intp], consumes: bool) -> list[Part]:
    """The rows of a linear's matrix, and its bias."""
    (term,) = terms(node)
    names = [term.weight] if term.bias is None else [term.weight, term.bias]
    return [Part(name, channels, consumes) for name in names]


def fold(
    weights: Mapping[str, NDArray[np.floating] | Tensor], site: Site, factors: NDArray[np.floating] | Tensor
) -> dict[str, Any]:
    """Moves factors [site.width] from the producer of a site to its consumers: the changed tensors.

    Producers are divided and consumers multiplied, in float64, and every tensor is rounded once to the dtype
    it came in; arrays give arrays and PyTorch tensors give tensors. Factors of 1 give the same bits.
    UsageError for factors that are not positive and finite, one per channel.
    """
    s = np.asarray(factors, np.float64)
    if s.shape != (site.width,):
        raise UsageError(f"the site {site.name} has {site.width} channels, not factors of shape {s.shape}")
    if not np.all((s > 0) & np.isfinite(s)):
        raise UsageError(f"the factors of the site {site.name} must be positive and finite")
    changed: dict[str, Any] = {}
    for part in site.parts:
        factor = s[part.channels] if part.consumes else 1 / s[part.channels]
        changed[part.weight] = _scaled(weights[part.weight], factor, part)
    return changed


def _scaled(value: Any, factor: NDArray[np.float64], part: Part) -> Any:
    if not isinstance(value, np.ndarray):
        import torch

        wide = _scaled(value.detach().to(torch.float64).numpy(), factor, part)
        return torch.from_numpy(wide).to(value.dtype)
    along = factor[:, None] if part.axis == 0 and value.ndim == 2 else factor
    # (value + offset) * factor - offset, but so that a factor of 1 gives the very value.
    result = value.astype(np.float64) * along
    if part.offset:
        result -= part.offset * (1 - along)
    return result.astype(value.dtype)
