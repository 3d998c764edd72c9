"""docs/cli.md says what the command line really takes."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from gristmill.cli import app

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
TYPES = {"integer": "N", "float": "X", "text": "TEXT", "filename": "FILE", "path": "FILE"}


def spelling(option: click.Option) -> str:
    names = ", ".join(option.opts)
    if option.is_flag:
        return names
    if isinstance(option.type, click.Choice):
        return f"{names} {'|'.join(option.type.choices)}"
    return f"{names} {option.metavar or TYPES[option.type.name]}"


def meaning(option: click.Option) -> str:
    text = option.help or ""
    return f"{text} [default: {option.default}]" if option.show_default else text


def options(command: click.Command) -> dict[str, str]:
    command.get_params(click.Context(command))  # `serve` reads its options when it is used
    return {spelling(p): meaning(p) for p in command.params if isinstance(p, click.Option)}


def sections() -> dict[str, str]:
    """Heading -> the text below it."""
    parts = re.split(r"^## (.+)\n", PAGE.read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def written(text: str) -> dict[str, str]:
    """The options in the code blocks of a section: each begins a line with -, its text may go on below."""
    found: dict[str, str] = {}
    for block in re.findall(r"^```\n(.*?)^```", text, flags=re.M | re.S):
        last = None
        for line in block.splitlines():
            if line.startswith("-"):
                last, _, rest = line.partition("  ")
                found[last] = rest.strip()
            elif last is not None:
                found[last] = f"{found[last]} {line.strip()}".strip()
    return found


def test_every_verb_has_a_section() -> None:
    assert {name for name in sections() if name in app.commands} == set(app.commands)


@pytest.mark.parametrize("verb", sorted(app.commands))
def test_a_section_lists_the_verbs_options(verb: str) -> None:
    parts = sections()
    found = written(parts[verb])
    for shared in re.findall(r"\]\(#([\w-]+)\)", parts[verb]):
        titles = [title for title in parts if title.lower().replace(" ", "-") == shared]
        assert len(titles) == 1, f"#{shared} leads nowhere"
        found |= written(parts[titles[0]])
    expected = options(app.commands[verb])
    assert found == expected, "\n".join(f"{name:<40}  {text}" for name, text in expected.items())


@pytest.mark.parametrize("verb", sorted(app.commands))
def test_a_section_shows_the_arguments(verb: str) -> None:
    names = [p.name.upper() for p in app.commands[verb].params if isinstance(p, click.Argument) and p.name]
    usage = re.search(rf"^gristmill {verb}.*$", sections()[verb], flags=re.M)
    assert usage is not None
    assert re.findall(r"\b[A-Z]+\b", usage[0].replace("OPTIONS", "")) == names


def test_the_environment_is_complete() -> None:
    """The variables that options read, and those the code reads by itself."""
    source = Path(__file__).parents[2]
    used = {
        name
        for path in [*source.glob("src/gristmill/**/*.py"), *source.glob("native/**/*.cc")]
        for name in re.findall(r'"(GRISTMILL_[A-Z_]+)"', path.read_text())
    }
    listed = set(re.findall(r"^(GRISTMILL_\w+)", sections()["Environment"], flags=re.M))
    assert listed == used


def test_the_exit_codes_are_named() -> None:
    from gristmill.terminal import output

    codes = {0, output.FAILED, output.USAGE, output.INTERRUPTED, output.BROKEN_PIPE}
    assert {int(n) for n in re.findall(r"^(\d+)  ", sections()["Exit codes"], flags=re.M)} == codes
