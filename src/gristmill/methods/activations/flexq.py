"""FlexQ: 6-bit weights and activations, but 8 bits for the inputs that a sensitivity analysis picks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gristmill.formats import group_int
from gristmill.methods.activations.round_activations import inputs_of
from gristmill.methods.base import Method, Options
from gristmill.methods.draft import Draft
from gristmill.program.edits import round_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from gristmill.program.nodes import Node, Program

SENSITIVE_BITS = 8


class FlexqOptions(Options):
    """weight_bits null leaves the weights to another method of the same group.

    sensitive: which inputs keep 8 bits: by "analysis", those of "down" projections, or "none". The analysis
    rounds one kind of input (per "type") or one input (per "layer") at a time and measures the KL divergence
    of the logits over the first `tokens` tokens of the calibration text. It then promotes the worst: the
    `share` of them, rounded up, or with a `budget` as few as leave a sum below it (nats per token).
    """

    weight_bits: Literal[2, 3, 4, 5, 6, 8] | None = 6
    activation_bits: Annotated[int, Field(ge=2, le=8)] = 6
    group: Annotated[int, Field(ge=32, le=1024, multiple_of=32)] = 64
    sensitive: Literal["analysis", "down", "none"] = "analysis"
    per: Literal["type", "layer"] = "type"
    share: Annotated[float, Field(ge=0, le=1)] = 0.25
    budget: Annotated[float, Field(ge=0)] | None = None
    tokens: Annotated[int, Field(ge=2, le=1 << 16)] = 1024


class Flexq(Method[FlexqOptions]):
    """Round to nearest throughout; only the choice of the 8-bit inputs needs text."""

    name = "flexq"
    title = "6-bit weights and activations, 8 bits for sensitive inputs"
    paper = "FlexQ: INT6 quantization by algorithm-system co-design, 2025, arXiv 2508.04405"
    options = FlexqOptions
    calibrated = True

    def reads_text(self, options: FlexqOptions) -> bool:
        """The analysis does, nothing else."""
        return options.sensitive == "analysis"

    def slots(self, options: FlexqOptions) -> Sequence[str]:
        """The inputs, and the weights unless they are left to another method."""
        weights = () if options.weight_bits is None else ("rounding", "weight_format")
        return (*weights, "activation_encoding")

    def weight_group(self, options: FlexqOptions) -> int | None:
        """Its own, unless rounding is left to another method."""
        return None if options.weight_bits is None else options.group

    def input_group(self, options: FlexqOptions) -> int | None:
        """Its own."""
        return options.group

    def apply(self, draft: Draft, options: FlexqOptions, tensors: Sequence[str]) -> None:
        """Packs the weights, then rounds the inputs."""
        inputs = inputs_of(draft.program, tensors)
        if options.weight_bits is not None:
            for i, name in enumerate(tensors):
                draft.pack(
                    name,
                    group_int.round_group_int(
                        draft.weight(name), bits=options.weight_bits, group=options.group, symmetric=True
                    ),
                )
                draft.progress("rounding", i + 1, len(tensors))
        chosen = _sensitive(draft, options, inputs)
        program = draft.program
        for source, nodes in inputs.items():
            bits = SENSITIVE_BITS if source in chosen else options.activation_bits
            program = _rounded(program, {source: nodes}, options.group, bits)
        draft.edit(program)


def _rounded(program: Program, inputs: Mapping[str, Sequence[Node]], group: int, bits: int) -> Program:
    for nodes in inputs.values():
        program = round_inputs(program, [node.name for node in nodes], group=group, bits=[bits])
    return program


def _sensitive(draft: Draft, options: FlexqOptions, inputs: Mapping[str, Sequence[Node]]) -> set[str]:
    """The inputs that keep 8 bits."""
    if options.sensitive == "none":
        return set()
    if options.sensitive == "down":
        writers = draft.program.writers()
        return {source for source in inputs if writers[source].op == "gated"}
    kinds: dict[str, dict[str, Sequence[Node]]] = {}
    for source, nodes in inputs.items():
        name = " ".join(node.name for node in nodes)
        kind = re.sub(r"\d+", "*", name) if options.per == "type" else name
        kinds.setdefault(kind, {})[source] = nodes
    sets = list(kinds.values())
    found = sensitivities(
        draft, sets, bits=options.activation_bits, group=options.group, tokens=options.tokens
    )
    return {source for i in promoted(found, options.share, options.budget) for source in sets[i]}


def promoted(kl: NDArray[np.float64], share: float, budget: float | None = None) -> list[int]:
    """Indices of the most sensitive, descending, the earlier of equals first: see `FlexqOptions`."""
    order = np.argsort(-kl, kind="stable")
    if budget is None:
        count = int(np.ceil(share * len(kl)))
    else:
        # left[i]: what remains when the first i are promoted.
        left = np.append(np.cumsum(kl[order][::-1])[::-1], 0.0)
        count = int(np.argmax(left <= budget))
    return [int(i) for i in order[:count]]


def sensitivities(
    draft: Draft, sets: Sequence[Mapping[str, Sequence[Node]]], *, bits: int, group: int, tokens: int
) -> NDArray[np.float64]:
    """Mean KL(p || q) in nats per token, float64 [sets]: p of the draft as it stands, q with one set rounded.

    sets: inputs that are rounded together, each with its linears. KL is how much the loss would rise on text
    that the draft itself writes; unlike the rise on a given text it has no sign, so that little text will do.
    """
    from gristmill.backends.reference import ReferenceExecutor

    base = draft.executor
    place = {node.name: i for i, node in enumerate(base.program.nodes)}
    begins: dict[int, list[int]] = {}
    for i, inputs in enumerate(sets):
        begins.setdefault(min(place[nodes[0].name] for nodes in inputs.values()), []).append(i)
    pieces = []
    for ids in draft.sequences:
        pieces.append(ids[:tokens])
        tokens -= len(pieces[-1])
    pieces = [ids for ids in pieces if ids]

    def measure(number: int) -> dict[str, NDArray[np.float64]]:
        """The sum over one sequence: a set's run leaves that of the draft where its first input is read."""
        stream = draft.stream([pieces[number]])
        (logits,) = stream.fork(base).run_to_end()
        sums = np.zeros(len(sets))
        done = number * len(sets)
        for node in stream:
            for i in begins.get(place[node.name], ()):
                rounded = ReferenceExecutor(_rounded(base.program, sets[i], group, bits), base.weights)
                sums[i] = _divergence(logits, *stream.fork(rounded).run_to_end())
                done += 1
                draft.progress("sensitivity", done, len(pieces) * len(sets))
        return {"kl": sums}

    total = np.zeros(len(sets))
    for number in range(len(pieces)):
        total += draft.once(f"flexq sensitivity {number}", partial(measure, number))["kl"]
    return total / sum(map(len, pieces))


def _divergence(p: Tensor, q: Tensor) -> float:
    """The sum of KL(softmax p || softmax q) over rows of logits, in float64, a few rows at a time."""
    import torch

    total = 0.0
    for rows in zip(torch.split(p, 64), torch.split(q, 64), strict=True):
        log_p, log_q = (part.double().log_softmax(-1) for part in rows)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total


METHOD = Flexq()
