"""Recipes: an ordered list of methods with options and tensors, in YAML.

calibration: {text: topics, tokens: 8192, sequence: 512, seed: 0}
floats: bf16                     # how matrices that no method rounds are stored if they were changed
methods:
- method: smoothquant_plus
  alpha: 0.5                     # options of the method
- method: gptq
  bits: 4
  tensors: ["*.mlp.*"]           # patterns of weight names; all that the method can take, if left out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gristmill.errors import UsageError
from gristmill.methods.base import EXCLUSIVE, PRECEDES, Method, Options
from gristmill.methods.registry import method, names

if TYPE_CHECKING:
    from gristmill.program.nodes import Program

_LIMIT = 1 << 20
_Kind = TypeVar("_Kind", bound=BaseModel)
_STRICT = ConfigDict(extra="forbid", frozen=True)


class Calibration(BaseModel):
    """The text that methods are calibrated on: a file, `topics` (pydoc_data.topics) or `self` (samples)."""

    model_config = _STRICT
    text: str = "topics"
    tokens: Annotated[int, Field(ge=2, le=1 << 24)] = 8192
    sequence: Annotated[int, Field(ge=2, le=1 << 16)] = 512
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0


class _Document(BaseModel):
    model_config = _STRICT
    version: Literal[1] = 1
    name: Annotated[str, Field(max_length=100, pattern=r"^(\w[\w.+-]*)?$")] = ""
    calibration: Calibration = Calibration()
    floats: Literal["bf16", "f16", "f32"] = "bf16"
    methods: Annotated[list[dict[str, Any]], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Entry:
    """One method of a recipe."""

    method: Method[Any]
    options: Options
    patterns: tuple[str, ...]
    """Of weight names; empty: all that the method can take."""
    line: int

    def tensors(self, program: Program) -> list[str]:
        """The weights that the method is applied to, in program order.

        UsageError, which begins with the line, for a pattern that none has.
        """
        able = self.method.tensors(program, self.options)
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in able):
                raise UsageError(
                    f"line {self.line}: {self.method.name}: no tensor that it can take is named {pattern}"
                )
        return [n for n in able if not self.patterns or any(fnmatchcase(n, p) for p in self.patterns)]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A validated recipe. Two recipes with the same `to_yaml` do the same."""

    entries: tuple[Entry, ...]
    name: str = ""
    calibration: Calibration = field(default_factory=Calibration)
    floats: str = "bf16"
    where: str = field(default="recipe", compare=False)
    """The file that it is from, for errors."""

    @staticmethod
    def load(source: str | Path) -> Recipe:
        """A recipe from a YAML file or, for the name of a method, that method with its default options.

        UsageError, naming the line, if it is not valid.
        """
        if isinstance(source, str) and source in names():
            return Recipe.from_yaml(f"{{name: {source}, methods: [{{method: {source}}}]}}", source)
        path = Path(source).expanduser()
        try:
            if path.stat().st_size > _LIMIT:
                raise UsageError(f"{path} is too large for a recipe")
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UsageError(
                f"{source} is neither a recipe file nor a method (methods: {', '.join(names())})"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the recipe {path}: {error}") from None
        recipe = Recipe.from_yaml(text, str(path))
        return recipe if recipe.name else replace(recipe, name=path.stem)

    @staticmethod
    def from_yaml(text: str, where: str = "recipe") -> Recipe:
        """Reads YAML text. UsageError, naming the line, if it is not valid."""
        import yaml

        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or "not YAML"
            raise UsageError(f"{where}, line {mark.line + 1 if mark else 1}: {problem}") from None
        except (RecursionError, ValueError) as error:
            raise UsageError(f"{where}: not YAML: {str(error)[:100]}") from None
        lines = _Lines(node)
        if lines.twice:
            key, line, first = lines.twice[0]
            raise UsageError(f"{where}, line {line}: {key[:60]} is given twice, at first in line {first}")
        if not isinstance(data, dict):
            raise UsageError(f"{where}, line 1: a recipe is a mapping with a list of methods")
        document = _validated(_Document, data, where, lines, ())
        entries = []
        for i, item in enumerate(document.methods):
            at = ("methods", i)
            given = dict(item)
            kind, patterns = given.pop("method", None), given.pop("tensors", [])
            if not isinstance(kind, str):
                raise UsageError(f"{where}, line {lines.of(at)}: an entry needs the name of a method")
            patterns = [patterns] if isinstance(patterns, str) else patterns
            good = isinstance(patterns, list) and all(isinstance(p, str) for p in patterns)
            if not good or ("tensors" in item and not patterns):
                raise UsageError(f"{where}, line {lines.of((*at, 'tensors'))}: tensors is a list of patterns")
            try:
                chosen = method(kind)
            except UsageError as error:
                raise UsageError(f"{where}, line {lines.of((*at, 'method'))}: {error}") from None
            options = _validated(chosen.options, given, where, lines, at, prefix=f"{kind}: ")
            entries.append(Entry(chosen, options, tuple(patterns), lines.of(at)))
        return Recipe(tuple(entries), document.name, document.calibration, document.floats, where)

    def to_yaml(self) -> str:
        """The recipe with every option spelled out; reading it gives this recipe again."""
        import yaml

        methods = []
        for entry in self.entries:
            item: dict[str, Any] = {"method": entry.method.name, **entry.options.model_dump(mode="json")}
            methods.append(item | ({"tensors": list(entry.patterns)} if entry.patterns else {}))
        data = {
            "version": 1,
            "name": self.name,
            "calibration": self.calibration.model_dump(),
            "floats": self.floats,
            "methods": methods,
        }
        return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))

    @property
    def calibrated(self) -> bool:
        """Whether some method runs the model over calibration text."""
        return any(entry.method.reads_text(entry.options) for entry in self.entries)

    def plan(self, program: Program) -> list[list[str]]:
        """The tensors of every entry; UsageError, naming file, lines and both methods, for a conflict.

        A conflict is an exclusive slot of one tensor with two owners, a method whose slot must precede that
        of a method before it, or a tensor's integers in other groups than those of the inputs that it meets.
        """
        try:
            return self._plan(program)
        except UsageError as error:
            raise UsageError(f"{self.where}, {error}") from None

    def _plan(self, program: Program) -> list[list[str]]:
        """`plan`, but that errors begin with the line."""
        chosen = [entry.tensors(program) for entry in self.entries]
        filled: dict[tuple[str, str], Entry] = {}  # (tensor, slot) -> the last method that filled it
        for entry, tensors in zip(self.entries, chosen, strict=True):
            slots = entry.method.slots(entry.options)
            for name in tensors:
                for slot in slots:
                    _check_slot(name, slot, entry, filled)
            filled.update({(name, slot): entry for name in tensors for slot in slots})
        _check_groups(program, self.entries, chosen)
        return chosen


def _check_slot(name: str, slot: str, entry: Entry, filled: Mapping[tuple[str, str], Entry]) -> None:
    if slot in EXCLUSIVE and (owner := filled.get((name, slot))):
        raise UsageError(
            f"line {entry.line}: {entry.method.name} and {owner.method.name} (line {owner.line}) both fill "
            f"the slot {slot} of {name}"
        )
    for later in PRECEDES.get(slot, ()):
        if owner := filled.get((name, later)):
            raise UsageError(
                f"line {entry.line}: {entry.method.name} ({slot}) must come before {owner.method.name} "
                f"({later}, line {owner.line}) on {name}"
            )


def _check_groups(program: Program, entries: Sequence[Entry], chosen: Sequence[Sequence[str]]) -> None:
    """UsageError where inputs are rounded in other groups than the weights that meet them."""
    inputs: dict[str, tuple[Entry | None, int]] = {}  # tensor -> who rounds what it meets, in which groups
    weights: dict[str, tuple[Entry, int]] = {}
    writers = program.writers()
    for node in program.nodes:
        writer = writers.get(node.inputs[0]) if node.op == "linear" else None
        if writer is not None and writer.op == "encode" and writer.attributes["kind"] == "int":
            inputs[node.weights[0]] = None, writer.attributes["group"]
    for entry, tensors in zip(entries, chosen, strict=True):
        if (group := entry.method.input_group(entry.options)) is not None:
            inputs |= dict.fromkeys(tensors, (entry, group))
        if (group := entry.method.weight_group(entry.options)) is not None:
            weights |= dict.fromkeys(tensors, (entry, group))
    for name in (n for n in weights if n in inputs):
        (rounds, of_inputs), (owner, of_weights) = inputs[name], weights[name]
        columns = program.weights[name].shape[1]
        if _in_row(of_inputs, columns) == _in_row(of_weights, columns):
            continue
        if rounds is None:
            raise UsageError(
                f"line {owner.line}: {owner.method.name} rounds {name} in {_groups(of_weights)}, but the "
                f"model rounds its inputs in {_groups(of_inputs)}: give the method the model's group"
            )
        raise UsageError(
            f"line {rounds.line}: {rounds.method.name} rounds the inputs of {name} in {_groups(of_inputs)}, "
            f"{owner.method.name} (line {owner.line}) its weights in {_groups(of_weights)}: give both "
            "methods the same group"
        )


def _in_row(group: int, columns: int) -> int:
    """A group in a row of so many columns: 0 if it is all of the row."""
    return group if group < columns else 0


def _groups(group: int) -> str:
    return f"groups of {group} columns" if group else "whole rows"


class _Lines:
    """Line numbers of a YAML document's parts by their place: ("methods", 0, "bits")."""

    def __init__(self, root: Any) -> None:
        self.twice: list[tuple[str, int, int]] = []
        """Keys that one mapping has twice, each with its line and the line of the first."""
        self._lines: dict[tuple[str | int, ...], int] = {}
        self._seen: set[int] = set()
        self._walk(root, (), 0)

    def _walk(self, node: Any, at: tuple[str | int, ...], depth: int) -> None:
        if node is None or depth > 20 or id(node) in self._seen:
            return
        self._seen.add(id(node))  # an alias leads to the same node again
        self._lines.setdefault(at, node.start_mark.line + 1)
        if node.id == "mapping":
            known: dict[tuple[str, str], int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if (first := known.get((key.tag, str(key.value)))) is not None:
                    self.twice.append((str(key.value), line, first))
                known[key.tag, str(key.value)] = line
                self._lines[(*at, str(key.value))] = line
                self._walk(value, (*at, str(key.value)), depth + 1)
        elif node.id == "sequence":
            for i, value in enumerate(node.value):
                self._walk(value, (*at, i), depth + 1)

    def of(self, at: Sequence[str | int]) -> int:
        """The line of a place, or of the nearest one around it."""
        place = tuple(at)
        while place and place not in self._lines:
            place = place[:-1]
        return self._lines.get(place, 1)


def _validated(
    kind: type[_Kind],
    data: Mapping[str, Any],
    where: str,
    lines: _Lines,
    at: tuple[str | int, ...],
    *,
    prefix: str = "",
) -> _Kind:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = tuple(first["loc"])
        name = ".".join(str(part) for part in place)
        problem = str(first["msg"])
        if first["type"] == "extra_forbidden":
            problem = f"unknown option; known: {', '.join(kind.model_fields)}"
        elif first["type"] == "value_error":
            problem = str(first["ctx"]["error"])
        said = f"{name}: {problem}" if name else problem
        raise UsageError(f"{where}, line {lines.of((*at, *place))}: {prefix}{said}") from None
