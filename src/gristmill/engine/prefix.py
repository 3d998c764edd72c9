"""Beginnings of sequences whose keys and values are kept for others that begin alike.

A tree of spans of 256 tokens: a node stands for its own tokens after those of its ancestors, and refers to
the memory that holds them. Nodes at the ends of branches may have fewer tokens. A sequence may begin with any
part of a branch; what it writes after that goes to a copy (native/runtime/kv.h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gristmill.backends.native._native import KvSpan
    from gristmill.backends.native.executor import NativeKVPool, NativeKVView

__all__ = ["PrefixCache"]

SPAN = 256
LEAST = 16
"""Tokens that must agree for a span to be of use, and what shared lengths are multiples of."""


class _Node:
    __slots__ = ("children", "ids", "key", "parent", "span", "used")

    def __init__(self, ids: NDArray[np.int32], span: KvSpan | None, parent: _Node | None) -> None:
        self.ids = ids
        self.span = span
        self.parent = parent
        self.key = ids[:LEAST].tobytes()
        self.children: dict[bytes, list[_Node]] = {}
        """By their first tokens."""
        self.used = 0


def _common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Tokens at the front that are equal."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


class PrefixCache:
    """What is kept, least recently used first to go. Used by one thread."""

    def __init__(self, pool: NativeKVPool) -> None:
        self._pool = pool
        self._root = _Node(np.zeros(0, np.int32), None, None)
        self._nodes: set[_Node] = set()
        self._clock = 0
        self._unit = max(LEAST, pool.share_tokens)

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, ids: NDArray[np.int32], most: int) -> tuple[list[KvSpan], int]:
        """The memory of the longest beginning of `ids` that is kept, and its length, at most `most`."""
        self._clock += 1
        path: list[_Node] = []
        node, length = self._root, 0
        while True:
            piece = ids[length : length + SPAN]
            best, common = self._closest(node, piece)
            if best is None:
                break
            path.append(best)
            best.used = self._clock
            length += common
            if common < SPAN:
                break
            node = best
        length = self._held(path, min(length, most) // self._unit * self._unit)
        spans = [one.span for one in path[: -(-length // SPAN)] if one.span is not None]
        return spans, length

    def insert(self, ids: NDArray[np.int32], view: NativeKVView) -> None:
        """Keeps the beginning of a sequence: `ids` are the tokens that its view holds, or fewer."""
        self._clock += 1
        node = self._root
        whole = len(ids) // self._pool.share_tokens * self._pool.share_tokens
        for begin in range(0, whole, SPAN):
            piece = ids[begin : min(begin + SPAN, whole)]
            if len(piece) < LEAST:
                return
            node = self._put(node, piece, view, begin // SPAN)
            if len(node.ids) < SPAN:
                return

    def evict(self, wanted: int) -> int:
        """Forgets what was not used for longest, until `wanted` bytes are free or no more can be."""
        freed = 0
        while freed < wanted:
            ends = sorted((one for one in self._nodes if not one.children), key=lambda one: one.used)
            ends = [one for one in ends if one.span is not None and one.span.shared == 1]
            if not ends:
                return freed
            for one in ends:
                self._remove(one)
                freed += self._pool.span_bytes
                if freed >= wanted:
                    break
        return freed

    def idle_bytes(self) -> int:
        """Bytes that nobody but the cache refers to."""
        idle = sum(one.span is not None and one.span.shared == 1 for one in self._nodes)
        return idle * self._pool.span_bytes

    def clear(self) -> None:
        """Forgets everything."""
        for node in self._nodes:
            node.span = None  # nodes refer to each other: their memory must not wait for that to be found
        self._nodes.clear()
        self._root.children.clear()

    def _closest(self, node: _Node, piece: NDArray[np.int32]) -> tuple[_Node | None, int]:
        """The child that agrees with the piece longest, and for how many tokens: at least LEAST."""
        best, most = None, 0
        for child in node.children.get(piece[:LEAST].tobytes(), ()):
            common = _common(child.ids, piece)
            if common > most:
                best, most = child, common
        return best, most

    def _put(self, parent: _Node, piece: NDArray[np.int32], view: NativeKVView, index: int) -> _Node:
        """The node of the piece, which may be one that is there and has more tokens."""
        bucket = parent.children.setdefault(piece[:LEAST].tobytes(), [])
        span = view.span(index)
        for child in bucket:
            common = _common(child.ids, piece)
            if common < len(child.ids) and common < len(piece):
                continue
            child.used = self._clock
            if len(piece) > len(child.ids):  # the same sequence, further on
                child.ids, child.span = piece.copy(), span
            elif len(piece) == len(child.ids) and child.span and sum(span.held) > sum(child.span.held):
                child.span = span  # the old one was given up by layers with a window
            return child
        node = _Node(piece.copy(), span, parent)
        node.used = self._clock
        bucket.append(node)
        self._nodes.add(node)
        return node

    def _held(self, path: list[_Node], length: int) -> int:
        """The longest length, up to this, at which all that the next token sees is there."""
        windows = self._pool.windows
        held = [one.span.held if one.span is not None else [] for one in path]
        while length > 0:
            good = all(
                held[span][i]
                for i, window in enumerate(windows)
                for span in range(max(length - window + 1, 0) // SPAN if window else 0, -(-length // SPAN))
            )
            if good:
                return length
            length = (length - 1) // SPAN * SPAN
        return 0

    def _remove(self, node: _Node) -> None:
        self._nodes.discard(node)
        assert node.parent is not None
        bucket = node.parent.children[node.key]
        bucket.remove(node)
        if not bucket:
            del node.parent.children[node.key]
        node.span = None
