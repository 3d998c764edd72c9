"""The examples of the guide do what it says."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.serve.conftest import ServerProcess

GUIDE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
COMMANDS = [text for kind, text in BLOCKS if not kind and text.startswith("curl ")]
PROGRAMS = [text for kind, text in BLOCKS if kind == "python" and ADDRESS in text]


def test_there_are_examples() -> None:
    assert len(COMMANDS) >= 4
    assert PROGRAMS


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(server: ServerProcess, command: str) -> None:
    done = subprocess.run(
        ["bash", "-ec", command.replace(ADDRESS, server.url).replace("curl ", "curl -sS --fail-with-body ")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    if '"stream": true' in command:
        lines = [line for line in done.stdout.split("\n") if line]
        assert lines[-1] == "data: [DONE]"
        assert "choices" in json.loads(lines[0].removeprefix("data: "))
    elif "/metrics" not in command:
        assert "error" not in json.loads(done.stdout)


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs(server: ServerProcess, program: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(program.replace(ADDRESS, server.url), "docs/serve.md", "exec"), {})
    assert len(capsys.readouterr().out) > 20


def test_every_setting_and_limit_that_is_named_is_there() -> None:
    from gristmill.serve.settings import Settings

    names = {name.replace("-", "_") for name in re.findall(r"`--([a-z-]+)", GUIDE)}
    assert len(names) > 10
    assert names - {"config", "help"} <= Settings.model_fields.keys()


def test_every_metric_that_is_named_is_there(server: ServerProcess) -> None:
    section = GUIDE.split("\n## Metrics\n")[1].split("\n## ")[0]
    names = set(re.findall(r"`([a-z_0-9]+)`", section))
    names -= {"finished_reason", "handler", "http_requests_total", "method", "model_name", "status"}
    assert len(names) > 20
    text = httpx.get(f"{server.url}/metrics").text
    there = set(re.findall(r"^# HELP gristmill:(\S+)", text, re.MULTILINE))
    assert names <= there
