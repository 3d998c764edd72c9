"""A real server on the demo model, and an application over a scripted engine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

KEY = "sesame"


class ServerProcess:
    """`gristmill serve` as a user runs it."""

    def __init__(
        self,
        *arguments: str,
        cache: Path,
        env: dict[str, str] | None = None,
        wait: bool = True,
        patch: str | None = None,
    ) -> None:
        """patch: Python that runs before the program."""
        program = ["-m", "gristmill"]
        if patch is not None:
            program = ["-c", f"{patch}\nimport sys\nfrom gristmill.cli import main\nmain(sys.argv[1:])"]
        command = [sys.executable, *program, "serve", "--port", "0", *arguments]
        environment = {**os.environ, "GRISTMILL_CACHE": str(cache), **(env or {})}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        self.url = ""
        self._found = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            assert self._found.wait(60), self.lines
            deadline = time.monotonic() + 60
            while httpx.get(f"{self.url}/ready").status_code != 200:
                assert time.monotonic() < deadline, self.lines
                assert self.process.poll() is None, self.lines
                time.sleep(0.05)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            if match := re.search(r"listening on ([^\s\"]+)", line):
                self.url = match[1]
                self._found.set()
        self._found.set()

    def rss(self) -> int:
        """Resident bytes."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return int(fields[1]) * 4096

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signals, waits; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join(5)
        return code


@pytest.fixture(scope="session")
def server_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve-cache")


@pytest.fixture(scope="session")
def server(server_cache: Path) -> Iterator[ServerProcess]:
    """Shared by tests that leave it as it was."""
    made = ServerProcess("smollm2", "-w", "int4", "--threads", "2", cache=server_cache)
    yield made
    assert made.process.poll() is None, made.lines[-20:]
    assert made.stop() == 0
    assert not any("Traceback" in line for line in made.lines), made.lines


@pytest.fixture
def start(server_cache: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers of a test's own."""
    made: list[ServerProcess] = []

    def run(*arguments: str, **options: Any) -> ServerProcess:
        made.append(ServerProcess(*arguments, cache=server_cache, **options))
        return made[-1]

    yield run
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()
