"""AWQ: channels with large inputs are scaled up in the weights, site by site, before rounding to nearest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gristmill.calibrate.sites import SMOOTHING, VALUES, Site
from gristmill.formats import group_int
from gristmill.formats.packed import Packed, decode_f32
from gristmill.methods.base import CodeOptions, Method
from gristmill.methods.draft import Arrays, Draft
from gristmill.methods.weights._smoothing import best_of, first_tokens, move, sites_within
from gristmill.program.edits import linears_of
from gristmill.program.nodes import Node

if TYPE_CHECKING:
    from gristmill.calibrate.stream import Rows, Stream

_FLOOR = 1e-4
_CLIP_STEP, _CLIP_STEPS = 0.05, 10


class AwqOptions(CodeOptions):
    """bits, group, symmetric: of the codes, rounded to nearest; quantise false leaves that to another method.

    grid: strengths tried per site, 0 to below 1. clip: search how much of every group's range to keep.
    values: scale v and o as well. tokens: that the search runs over.
    """

    symmetric: bool = False
    quantise: bool = True
    grid: Annotated[int, Field(ge=1, le=100)] = 20
    clip: bool = True
    values: bool = True
    tokens: Annotated[int, Field(ge=2, le=1 << 20)] = 1024


class Awq(Method[AwqOptions]):
    """s = mean|x|^strength per site, the strength by the error of the rounded block's output."""

    name = "awq"
    title = "Scale up the weights that meet large inputs, as strongly as each block likes best"
    paper = "AWQ, MLSys 2024, arXiv 2306.00978"
    options = AwqOptions
    calibrated = True

    def slots(self, options: AwqOptions) -> Sequence[str]:
        """It scales and, unless told otherwise, rounds."""
        return ("smoothing", "rounding", "weight_format") if options.quantise else ("smoothing",)

    def weight_group(self, options: AwqOptions) -> int | None:
        """Its own, unless rounding is left to another method."""
        return options.group if options.quantise else None

    def apply(self, draft: Draft, options: AwqOptions, tensors: Sequence[str]) -> None:
        """Finds every site's factors in the model as it is, moves them, then packs every tensor."""
        kinds = [kind for kind in SMOOTHING if kind != VALUES or options.values]
        sites = sites_within(draft, tensors, kinds)
        of_buffer = {site.buffer: site for site in sites}
        readers = linears_of(draft.program)
        left = set(tensors)
        factors, grams = {}, {}
        stream = draft.stream(first_tokens(draft.sequences, options.tokens))
        for node in stream:
            if not left:
                break
            if node.op != "linear" or node.weights[0] not in left:
                continue
            buffer = node.inputs[0]

            def compute(node: Node = node, buffer: str = buffer) -> Arrays:
                found: Arrays = {"gram": _grams(stream.inputs(node), options.group)}
                if buffer in of_buffer:
                    site = of_buffer[buffer]
                    found["factors"] = _search(stream, site, readers[buffer], options)
                return found

            kept = draft.once(f"{self.name} {buffer}", compute)
            for linear in readers[buffer]:
                grams[linear.weights[0]] = kept["gram"]
            if buffer in of_buffer:
                site = of_buffer[buffer]
                factors[buffer] = kept["factors"]
                # Whoever reads the buffer later meets inputs that are so much smaller.
                shrunk = _grouped(1 / kept["factors"][site.channels][None], kept["gram"].shape[1])[0]
                for name in site.consumers:
                    grams[name] = kept["gram"] * shrunk[:, :, None] * shrunk[:, None, :]
            left.difference_update(linear.weights[0] for linear in readers[buffer])
            draft.progress("searching scales", len(tensors) - len(left), len(tensors))
        move(draft, sites, factors)
        for i, name in enumerate(tensors if options.quantise else ()):
            values = draft.weight(name)
            if options.clip:
                values = _clipped(values, grams[name], options)
            draft.pack(name, _rounded(values, options))
            draft.progress("rounding", i + 1, len(tensors))


def _rounded(values: NDArray[np.float32], options: AwqOptions) -> Packed:
    return group_int.round_group_int(
        values,
        bits=options.bits,
        group=options.group,
        symmetric=options.symmetric,
    )


def _search(stream: Stream, site: Site, linears: Sequence[Node], options: AwqOptions) -> NDArray[np.float64]:
    """The factors [site.width] whose block, its consumers rounded, comes closest to the block as it is."""
    import torch

    from gristmill.calibrate.statistics import MeanAbs

    rows = stream.inputs(linears[0])
    mean = MeanAbs(rows[0].shape[1])
    for x in rows:
        mean.update(x)
    size = np.maximum(site.largest(mean.result().numpy()), _FLOOR)
    last = _end_of_block(stream, linears)
    wanted = stream.evaluate_span(linears[0], last)

    def loss(factors: NDArray[np.float64]) -> float:
        along = factors[site.channels].astype(np.float32)
        weights = {}
        for name in site.consumers:
            scaled = stream.executor.weights[name].numpy() * along
            weights[name] = torch.from_numpy(decode_f32(_rounded(scaled, options)) / along)
        found = stream.evaluate_span(linears[0], last, weights)
        return sum(float((x - y).double().square().sum()) for x, y in zip(found, wanted, strict=True))

    powers: Iterator[NDArray[np.float64]] = (size ** (i / options.grid) for i in range(options.grid))
    candidates = (power / np.sqrt(power.max() * power.min()) for power in powers)
    return best_of(f"awq: scales of {site.name}", candidates, loss)


def _end_of_block(stream: Stream, linears: Sequence[Node]) -> Node:
    """Of several linears (q, k, v; gate, up) the linear behind them all; a single one is its own end."""
    nodes = stream.program.nodes
    after = nodes.index(linears[-1]) + 1
    return linears[0] if len(linears) == 1 else next(node for node in nodes[after:] if node.op == "linear")


def _grouped(values: NDArray[Any], group: int) -> NDArray[Any]:
    """[N, K] -> [N, G, group], zeros behind a ragged last group."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % group)))
    return padded.reshape(len(values), -1, group)


def _grams(rows: Rows, group: int) -> NDArray[np.float32]:
    """sum x x^T of every group of columns: [G, group, group]."""
    import torch

    x = torch.cat(rows).numpy()
    grouped = _grouped(x, group or x.shape[1]).transpose(1, 2, 0)
    return np.asarray(np.matmul(grouped, grouped.transpose(0, 2, 1)), np.float32)


def _clipped(
    values: NDArray[np.float32], gram: NDArray[np.float32], options: AwqOptions
) -> NDArray[np.float32]:
    """The weights [N, K], every group cut to the part of its range whose codes leave least output error."""
    group = gram.shape[1]
    size = np.abs(_grouped(values, group)).max(axis=2, keepdims=True)
    best = np.full(size.shape[:2], np.inf, np.float32)
    chosen = values
    for i in range(_CLIP_STEPS):
        bound = np.broadcast_to(size * np.float32(1 - _CLIP_STEP * i), (*size.shape[:2], group))
        bound = bound.reshape(len(values), -1)[:, : values.shape[1]]
        cut = np.clip(values, -bound, bound)
        error = _grouped(decode_f32(_rounded(cut, options)) - values, group)
        # [G, N, group] @ [G, group, group]
        loss = (np.matmul(error.transpose(1, 0, 2), gram).transpose(1, 0, 2) * error).sum(axis=2)
        better = np.repeat(loss < best, group, axis=1)[:, : values.shape[1]]
        chosen, best = np.where(better, cut, chosen), np.minimum(best, loss)
    return chosen


METHOD = Awq()
