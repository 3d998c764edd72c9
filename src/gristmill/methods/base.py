"""What a method is: a paper, options, the slots it fills, and what it does to a draft of a model.

Slots are aspects of a tensor. *Stackable* ones may be filled by several methods, which act in recipe order;
some name slots that they must precede. *Exclusive* ones have one owner per tensor. `recipe.plan` finds
conflicts before anything is computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from gristmill.formats.packed import group_step

if TYPE_CHECKING:
    from gristmill.methods.draft import Draft
    from gristmill.program.nodes import Program

PRECEDES: dict[str, frozenset[str]] = {
    "smoothing": frozenset({"permutation", "low_rank", "pruning", "rounding", "activation_encoding"}),
    "rotation": frozenset({"permutation", "low_rank", "pruning", "rounding", "activation_encoding"}),
    "permutation": frozenset({"low_rank", "pruning", "rounding", "activation_encoding"}),
    "low_rank": frozenset({"pruning", "rounding"}),
    "pruning": frozenset({"rounding"}),
    "key_scaling": frozenset({"rounding", "low_rank"}),
}
"""The slots that must not be filled before a slot on the same tensor. (Rounding a tensor ends it.)"""

EXCLUSIVE = ("low_rank", "key_scaling", "rounding", "weight_format", "activation_encoding", "kv_format")
"""Slots with one owner per tensor."""


class Options(BaseModel):
    """Base of every method's options: unknown names and values out of range are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CodeOptions(Options):
    """Base of the options of methods that round weights: `bits` per code, `group` columns per scale."""

    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group: Annotated[int, Field(ge=0, le=1024)] = 64

    @field_validator("group")
    @classmethod
    def _whole_pieces(cls, group: int, info: ValidationInfo) -> int:
        if "bits" in info.data:  # else they are refused already
            check_group(group, info.data["bits"])
        return group


def check_group(group: int, bits: int, *, sparse: bool = False) -> None:
    """ValueError unless codes of `bits` can be stored in groups of so many columns (0: the whole row)."""
    step = group_step(bits, sparse=sparse)
    if group % step:
        kind = "2:4 codes" if sparse else f"{bits}-bit codes"
        raise ValueError(
            f"groups of {kind} are multiples of {step} columns, or 0 for the whole row, not {group}"
        )


Chosen = TypeVar("Chosen", bound=Options)


class Method(ABC, Generic[Chosen]):
    """A published technique. Subclasses are stateless; the module holds one instance, `METHOD`."""

    name: ClassVar[str]
    title: ClassVar[str]
    """One line: what it does."""
    paper: ClassVar[str]
    """Authors' short title, venue or year, and the arXiv id."""
    options: ClassVar[type[Options]] = Options
    calibrated: ClassVar[bool] = False
    """Whether it runs the model over calibration text (and so needs PyTorch)."""

    def reads_text(self, options: Chosen) -> bool:
        """Whether it does so with these options."""
        return self.calibrated

    @abstractmethod
    def slots(self, options: Chosen) -> Sequence[str]:
        """The slots that it fills on the tensors it is applied to."""

    def weight_group(self, options: Chosen) -> int | None:
        """Columns per scale of the integers that weights become, 0 for the whole row; None if none do."""
        return None

    def input_group(self, options: Chosen) -> int | None:
        """The same of the integers that inputs are rounded to: weights that meet them need the same group."""
        return None

    def tensors(self, program: Program, options: Chosen) -> list[str]:
        """The weights that it may be applied to: unless overridden, those of all linears but the head."""
        return linear_weights(program)

    @abstractmethod
    def apply(self, draft: Draft, options: Chosen, tensors: Sequence[str]) -> None:
        """Changes the draft. `tensors`: the weights chosen, in program order.

        Long work goes through `draft.once`, so that an interrupted run resumes. Deterministic. Raises
        UsageError for options that this model cannot be given.
        """


def linear_weights(program: Program) -> list[str]:
    """The matrices of all linears in program order, but the one that makes the logits."""
    return [
        node.weights[0]
        for node in program.nodes
        if node.op == "linear" and program.output not in node.outputs
    ]


def attention_of(program: Program, weights: Collection[str]) -> list[str]:
    """The attention nodes, by name, whose keys come from one of these weights."""
    writers = program.writers()
    found = []
    for node in program.nodes:
        if node.op == "attention":
            key = writers[node.inputs[1]]
            while key.op == "head_rmsnorm":
                key = writers[key.inputs[0]]
            if key.op == "linear" and key.weights[0] in weights:
                found.append(node.name)
    return found
