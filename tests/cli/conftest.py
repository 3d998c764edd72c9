"""The real program in processes of its own, over a cache of the tests' own with the demo model in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.kits import files
from tests.kits.hostile import assert_one_line

PROGRAM = [sys.executable, "-m", "gristmill"]


class Gristmill:
    """Runs the command line; every method gives what the process wrote."""

    def __init__(self, cache: Path) -> None:
        settings = {k: v for k, v in os.environ.items() if not k.startswith("GRISTMILL_")}
        self.environment = settings | {"GRISTMILL_CACHE": str(cache), "COLUMNS": "200"}

    def run(
        self, *arguments: str | bytes, stdin: bytes = b"", **environment: str
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*PROGRAM, *arguments],
            input=stdin,
            capture_output=True,
            timeout=120,
            check=False,
            env=self.environment | environment,
        )

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*PROGRAM, *arguments], env=self.environment, **options)

    def text(self, *arguments: str | bytes, stdin: bytes = b"", **environment: str) -> str:
        """stdout of a run that must succeed and say nothing on stderr."""
        done = self.run(*arguments, stdin=stdin, **environment)
        assert done.stderr == b""
        assert done.returncode == 0
        return done.stdout.decode()

    def json(self, *arguments: str | bytes, stdin: bytes = b"") -> Any:
        """The one line of JSON of a run with --json that must succeed."""
        text = self.text(*arguments, "--json", stdin=stdin)
        assert text.endswith("\n")
        assert text.count("\n") == 1
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    def refused(self, code: int, *arguments: str | bytes, stdin: bytes = b"", **environment: str) -> str:
        """The error of a run that must fail: one line on stderr, nothing on stdout."""
        done = self.run(*arguments, stdin=stdin, **environment)
        assert done.stdout == b""
        message = done.stderr.decode()
        assert message.startswith("error: ")
        assert message.endswith("\n")
        assert_one_line(message[:-1])
        assert done.returncode == code, message
        return message.removeprefix("error: ").rstrip("\n")


@pytest.fixture(scope="session")
def gristmill(tmp_path_factory: pytest.TempPathFactory) -> Gristmill:
    program = Gristmill(tmp_path_factory.mktemp("cache"))
    pulled = program.run("pull", "smollm2")
    assert pulled.returncode == 0, pulled.stderr.decode()
    return program


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF model of two layers with a tokenizer, without a chat template, of 128 tokens of context."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    of = files.config()
    return files.write_gguf(path, of, files.weights(of), "Q8_0")[0]


@pytest.fixture
def with_template(gristmill: Gristmill, tiny: Path, tmp_path: Path) -> Callable[[str], str]:
    """Makes a checkpoint directory of the tiny model with a chat template."""

    def make(template: str) -> str:
        (made,) = gristmill.json("pull", str(tiny))["checkpoints"]
        directory = tmp_path / "model"
        directory.mkdir()
        for file in Path(made["path"]).iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        (directory / "chat_template.jinja").write_text(template)
        return str(directory)

    return make


def matches(value: Any, schema: Any, where: str = "$") -> None:
    """Checks JSON data against a type, a tuple of types, [schema of every item] or {key: schema} in full."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        assert set(value) == set(schema), where
        for key, inner in schema.items():
            matches(value[key], inner, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for index, item in enumerate(value):
            matches(item, schema[0], f"{where}[{index}]")
    else:
        assert type(value) in (schema if isinstance(schema, Sequence) else (schema,)), where
