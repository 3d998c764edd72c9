"""A program as a table of plain data: what the command line draws, and dumps as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gristmill.errors import UsageError
from gristmill.program.costs import (
    Cost,
    Row,
    WeightBytes,
    Work,
    describe,
    parameters,
    state_bytes,
    step_costs,
    sum_costs,
    weight_total,
)
from gristmill.program.nodes import LOWERED, SEMANTIC, Program
from gristmill.program.passes import fuse_add_rmsnorm, fuse_gated, group_linears, hoist_rope, lower

LOWERING = (group_linears, fuse_gated, fuse_add_rmsnorm, hoist_rope)
"""The passes that give the lowered level of a semantic program."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """A program in one step, ready to be printed. `dataclasses.asdict` gives JSON data.

    Bytes and operations are those of one step: weights read once, gathered rows of a table only, keys and
    values in reach read once per sequence.
    """

    name: str
    level: str
    digest: str
    """SHA-256 of the program's text."""
    columns: tuple[str, ...]
    """Batch columns that the program reads."""
    rows: tuple[Row, ...]
    """Nodes in order; layers that differ in their number alone share a row, unless asked for singly."""
    total: Cost
    """Sum of the rows' costs."""
    nodes: int
    parameters: int
    weight_bytes: float
    """Of all weights, each once, as they are stored."""
    state_bytes_per_token: float
    """That one more token of a sequence adds, before any window is full."""


def render(
    program: Program,
    work: Work | None = None,
    *,
    weight_bytes: WeightBytes | None = None,
    formats: Mapping[str, str] | None = None,
    kv_dtype: str | None = None,
    level: str = SEMANTIC,
    collapse: bool = True,
) -> Rendering:
    """The table of `program` at a level.

    work: the step whose bytes and operations are counted; without it, the next token of one sequence of 512.
    weight_bytes: stored bytes of each tensor by name (a mapping or a function); without it, float32.
    formats: a short text per tensor, as far as known. kv_dtype: as in `step_costs`. level:
    `semantic`, or `lowered` to see it after the passes in LOWERING (a program that is lowered already stays
    so); UsageError for another.
    """
    if level not in (SEMANTIC, LOWERED):
        raise UsageError(f"level must be {SEMANTIC} or {LOWERED}, not {level!r}")
    if level == LOWERED and program.level == SEMANTIC:
        program = lower(program, LOWERING)
    costs = step_costs(program, work or Work.decode(1, 512), weight_bytes, kv_dtype)
    return Rendering(
        name=program.name,
        level=program.level,
        digest=program.digest(),
        columns=program.columns(),
        rows=tuple(describe(program, costs, formats=formats, collapse=collapse)),
        total=sum_costs(costs),
        nodes=len(program.nodes),
        parameters=parameters(program),
        weight_bytes=weight_total(program, weight_bytes),
        state_bytes_per_token=state_bytes(program, 1, kv_dtype),
    )
