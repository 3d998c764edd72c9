"""Inputs of linears rounded to integers per token and group: the baselines W8A8, W6A8, W4A8, W4A4."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from gristmill.errors import UsageError
from gristmill.formats.packed import round_up
from gristmill.methods.base import Method, Options
from gristmill.methods.draft import Draft
from gristmill.program.edits import linears_of, round_inputs
from gristmill.program.nodes import Node, Program


class RoundActivationsOptions(Options):
    """bits 2 to 8; group: columns per scale, as in the weights; 0 for the whole row."""

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    group: Annotated[int, Field(ge=0, le=1024, multiple_of=8)] = 64


class RoundActivations(Method[RoundActivationsOptions]):
    """Symmetric, at run time, without calibration; the weights are left to another method."""

    name = "round_activations"
    title = "Inputs of linears as 2- to 8-bit integers per token and group"
    paper = "baseline"
    options = RoundActivationsOptions

    def slots(self, options: RoundActivationsOptions) -> Sequence[str]:
        """Weights stay as they are."""
        return ("activation_encoding",)

    def input_group(self, options: RoundActivationsOptions) -> int | None:
        """Its own."""
        return options.group

    def apply(self, draft: Draft, options: RoundActivationsOptions, tensors: Sequence[str]) -> None:
        """One `encode` in front of the chosen linears of every input."""
        program = draft.program
        for source, nodes in inputs_of(program, tensors).items():
            group = options.group or round_up(width_of(program, source), 8)
            program = round_inputs(program, [n.name for n in nodes], group=group, bits=[options.bits])
        draft.edit(program)


def inputs_of(program: Program, tensors: Sequence[str]) -> dict[str, list[Node]]:
    """Input buffer -> the linears of these weights that read it; UsageError if one is rounded already."""
    found = linears_of(program, tensors)
    writers = program.writers()
    for source, nodes in found.items():
        if writers[source].op == "encode":
            raise UsageError(f"the input of {nodes[0].weights[0]} is rounded or put in order already")
    return found


def width_of(program: Program, buffer: str) -> int:
    """Columns of a buffer that a linear reads."""
    width = program.buffers[buffer].shape[1]
    assert isinstance(width, int)
    return width


METHOD = RoundActivations()
