"""The stub says exactly what the extension module holds."""

from __future__ import annotations

import ast
import enum
import re
from pathlib import Path
from typing import Any

import pytest

import gristmill
from gristmill.backends.native import _native

STUB = Path(gristmill.__file__).with_name("backends") / "native" / "_native.pyi"


class _Types(ast.NodeTransformer):
    """Replaces the stub's aliases by what they stand for."""

    def __init__(self, aliases: dict[str, ast.expr]) -> None:
        self.aliases = aliases

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.aliases.get(node.id, node)


def parameters(function: ast.FunctionDef) -> list[tuple[str, str, str]]:
    """(name, type, default) of each; the names of those that can be given by position alone do not matter."""
    a = function.args
    assert a.kwonlyargs == []
    assert a.vararg is a.kwarg is None
    every = [*a.posonlyargs, *a.args]
    defaults = ["-"] * (len(every) - len(a.defaults)) + [ast.unparse(d) for d in a.defaults]
    return [
        (
            "/" if arg in a.posonlyargs else arg.arg,
            ast.unparse(arg.annotation) if arg.annotation else "",
            default,
        )
        for arg, default in zip(every, defaults, strict=True)
    ]


def signature(function: ast.FunctionDef) -> tuple[Any, ...]:
    assert function.returns is not None
    return parameters(function), ast.unparse(function.returns)


def in_stub() -> dict[str, Any]:
    """Dotted name -> signature, "property" with its type, or an enumeration's value."""
    tree = ast.parse(STUB.read_text())
    aliases = {
        n.target.id: n.value
        for n in tree.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.value is not None
    }
    tree = _Types(aliases).visit(tree)
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = signature(node)
        if not isinstance(node, ast.ClassDef):
            continue
        found[node.name] = [ast.unparse(base) for base in node.bases]
        for member in node.body:
            if isinstance(member, ast.FunctionDef):
                result = signature(member)
                found[f"{node.name}.{member.name}"] = (
                    ("property", result[1]) if member.decorator_list else result
                )
            elif isinstance(member, ast.Assign):
                assert isinstance(member.targets[0], ast.Name)
                found[f"{node.name}.{member.targets[0].id}"] = ast.literal_eval(member.value)
    return found


def native_signature(function: Any) -> tuple[Any, ...]:
    """What nanobind says of a function, written as the stub writes it."""
    ((text, _, defaults),) = function.__nb_signature__
    text = re.sub(r"ndarray\[dtype=(\w+), order='C', device='cpu'[^\]]*\]", r"NDArray[np.\1]", text)
    text = re.sub(r"\\(\d+)", lambda found: repr(defaults[int(found[1])]), text)
    text = text.replace(f"{_native.__name__}.", "").replace("collections.abc.", "")
    text = re.sub(r"^def \(", "def _(", text)
    function = ast.parse(text + ": ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return signature(function)


def in_module() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in vars(_native).items():
        if name.startswith("__"):
            continue
        if not isinstance(value, type):
            found[name] = native_signature(value)
        elif issubclass(value, enum.Enum):
            found[name] = ["enum.Enum"]
            found |= {f"{name}.{member.name}": member.value for member in value}
        else:
            found[name] = ["Exception"] if issubclass(value, Exception) else []
            for key, member in vars(value).items():
                if isinstance(member, property):
                    found[f"{name}.{key}"] = ("property", native_signature(member.fget)[1])
                elif hasattr(member, "__nb_signature__"):
                    found[f"{name}.{key}"] = native_signature(member)
    return found


def test_the_stub_names_what_is_there() -> None:
    assert sorted(in_stub()) == sorted(in_module())


@pytest.mark.parametrize("name", sorted(in_module()))
def test_the_stub_is_exact(name: str) -> None:
    assert in_stub()[name] == in_module()[name]


def test_classes_without_a_constructor_cannot_be_made() -> None:
    with pytest.raises(TypeError):
        _native.KvView()
