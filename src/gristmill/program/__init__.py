"""The step program: what a model computes in one step, as nodes over named buffers."""

from gristmill.program.batch import Batch, CancelFlag, Executor, KVView
from gristmill.program.nodes import Buffer, Dim, Node, Program, ProgramError, State, Weight

__all__ = [
    "Batch",
    "Buffer",
    "CancelFlag",
    "Dim",
    "Executor",
    "KVView",
    "Node",
    "Program",
    "ProgramError",
    "State",
    "Weight",
]
