"""COMET: 4-bit weights, 4-bit activations but for a few blocks of 8 bits into which outliers are gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from gristmill.formats import group_int
from gristmill.methods.activations.round_activations import inputs_of, width_of
from gristmill.methods.base import Method, Options, attention_of
from gristmill.methods.draft import Draft
from gristmill.program.edits import keep_keys, round_inputs
from gristmill.program.kv import kv_formats

if TYPE_CHECKING:
    from torch import Tensor

    from gristmill.program.nodes import Node, Program

LOW_BITS, HIGH_BITS = 4, 8
KV = "int4-channel"


class CometOptions(Options):
    """weight_bits null leaves the weights to another method of the same group, which must come after.

    block: columns that share a scale and a width, in weights and activations. Blocks of 8 bits are those that
    hold a channel above `threshold` times the median of the channels' maxima; or, if `share` is given, so
    large a part of every input's blocks, rounded to nearest; or, with `budget`, as few as leave an error of
    the linears' outputs of at most so much of their norm (over the first `tokens` tokens). permute false
    leaves the channels in their order: the same blocks of 8 bits then hold whatever lies beside an outlier.
    kv: keys and values in 4 bits, by channel (KV4), of the layers whose k_proj is among the tensors.
    """

    weight_bits: Literal[2, 3, 4, 5, 6, 8] | None = 4
    block: Annotated[int, Field(ge=32, le=1024, multiple_of=32)] = 64
    permute: bool = True
    threshold: Annotated[float, Field(ge=1)] = 6.0
    share: Annotated[float, Field(ge=0, le=1)] | None = None
    budget: Annotated[float, Field(gt=0)] | None = None
    tokens: Annotated[int, Field(ge=2, le=1 << 16)] = 1024
    kv: bool = False

    @model_validator(mode="after")
    def _one_rule(self) -> CometOptions:
        if self.share is not None and self.budget is not None:
            raise ValueError("give a share or a budget, not both")
        return self


class Comet(Method[CometOptions]):
    """FMPQ: an order of channels and a list of widths for every input, shared by all linears that read it."""

    name = "comet"
    title = "Blocks of 4- and 8-bit activations, outlier channels gathered; 4-bit weights"
    paper = "COMET: practical W4A4KV4 LLM serving, ASPLOS 2025, arXiv 2410.12168"
    options = CometOptions
    calibrated = True

    def slots(self, options: CometOptions) -> Sequence[str]:
        """The columns' order, the inputs, and the weights unless they are left to another method."""
        order = ("permutation",) if options.permute else ()
        weights = () if options.weight_bits is None else ("rounding", "weight_format")
        return (*order, *weights, "activation_encoding", *(("kv_format",) if options.kv else ()))

    def weight_group(self, options: CometOptions) -> int | None:
        """Its own, unless rounding is left to another method."""
        return None if options.weight_bits is None else options.block

    def input_group(self, options: CometOptions) -> int | None:
        """Its own."""
        return options.block

    def apply(self, draft: Draft, options: CometOptions, tensors: Sequence[str]) -> None:
        """Chooses orders and widths on the model as it stands, changes the program, packs the weights."""
        inputs = inputs_of(draft.program, tensors)
        attention = attention_of(draft.program, tensors) if options.kv else []
        if options.kv and not attention:
            draft.notes.append(
                f"{self.name}: no layer's k_proj is among the tensors: the cache stays as it is"
            )
        kv_formats(keep_keys(draft.program, attention, kv_format=KV))  # a sliding window cannot be kept so
        found = draft.once("comet blocks", lambda: _analyse(draft, options, inputs))
        program = draft.program
        for source, nodes in inputs.items():
            order, bits = found[f"{source}/order"], found[f"{source}/bits"]
            name = None
            if options.permute:
                for node in nodes:
                    draft.set(node.weights[0], draft.weight(node.weights[0])[:, order])
                producers = _foldable(draft.program, source, nodes, tensors)
                draft.adapters = draft.adapters and not producers
                for weight in producers:
                    draft.set(weight, draft.weight(weight)[order])
                if not producers:
                    name = f"{nodes[0].weights[0].removesuffix('.weight')}.order"
            program = round_inputs(
                program, [n.name for n in nodes], group=options.block, bits=bits.tolist(), order=name
            )
            if name is not None:
                draft.set(name, order.astype(np.float32))
        draft.edit(keep_keys(program, attention, kv_format=KV))
        if options.weight_bits is not None:
            for i, name in enumerate(tensors):
                draft.pack(
                    name,
                    group_int.round_group_int(
                        draft.weight(name),
                        bits=options.weight_bits,
                        group=options.block,
                        symmetric=True,
                        clip="mse",
                    ),
                )
                draft.progress("rounding", i + 1, len(tensors))


def _foldable(program: Program, source: str, nodes: Sequence[Node], tensors: Sequence[str]) -> list[str]:
    """The tensors whose rows, put in order, put the columns of `source` in order; empty if there are none.

    That is so for the result of a gate and an up projection that nothing else reads, both among the tensors.
    """
    readers, writers = program.readers(), program.writers()
    writer = writers[source]
    if writer.op != "gated" or {n.name for n in readers[source]} != {n.name for n in nodes}:
        return []
    producers = [writers[name] for name in writer.inputs]
    for node in producers:
        alone = len(readers[node.outputs[0]]) == 1
        if node.op != "linear" or not alone or node.weights[0] not in tensors:
            return []
    return [weight for node in producers for weight in node.weights]


def _analyse(
    draft: Draft, options: CometOptions, inputs: Mapping[str, Sequence[Node]]
) -> dict[str, NDArray[np.int64]]:
    """Order [width] and widths in bits [blocks] of every input, from one run over the calibration text."""
    from gristmill.calibrate.statistics import AbsMax

    stream = draft.stream()
    first = {nodes[0].name: source for source, nodes in inputs.items()}
    result: dict[str, NDArray[np.int64]] = {}
    for node in stream:
        if node.name not in first:
            continue
        source = first[node.name]
        rows = stream.inputs(node)
        largest = AbsMax(width_of(draft.program, source))
        for x in rows:
            largest.update(x)
        peaks = largest.result().double().numpy()
        order = np.argsort(-peaks, kind="stable") if options.permute else np.arange(len(peaks))
        starts = np.arange(0, len(peaks), options.block)
        blocks = np.maximum.reduceat(peaks[order], starts)
        ranked = np.argsort(-blocks, kind="stable")
        bits = np.full(len(blocks), LOW_BITS)
        if options.budget is not None:
            import torch

            ends = np.cumsum([len(part) for part in rows])
            few = rows[: int(np.searchsorted(ends, options.tokens)) + 1]
            x = torch.cat(few)[: options.tokens, torch.from_numpy(order)]
            weights = [
                draft.executor.weights[n.weights[0]][:, torch.from_numpy(order)] for n in inputs[source]
            ]
            while (output_error(x, weights, options.block, bits) > options.budget) and bits.min() == LOW_BITS:
                bits[ranked[np.count_nonzero(bits == HIGH_BITS)]] = HIGH_BITS
        elif options.share is not None:
            bits[ranked[: int(options.share * len(blocks) + 0.5)]] = HIGH_BITS
        else:
            bits[blocks > options.threshold * np.median(peaks)] = HIGH_BITS
        result |= {f"{source}/order": order, f"{source}/bits": bits}
        done = len(result) // 2
        draft.progress("outliers", done, len(first))
        if done == len(first):
            break  # before the logits, which would be kept whole
    return result


def output_error(x: Tensor, weights: Sequence[Tensor], block: int, bits: NDArray[np.int64]) -> float:
    """||(Q(x) - x) W^T|| / ||x W^T|| over weights [N, K], for x [T, K] rounded in blocks of such bits."""
    import torch

    from gristmill.backends.reference.ops import round_rows

    change = round_rows(x, block, 2.0 ** (torch.from_numpy(bits) - 1) - 1) - x
    squares = np.zeros(2)
    for weight in weights:
        squares += [float((part @ weight.T).double().square().sum()) for part in (change, x)]
    return float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0


METHOD = Comet()
