"""Ctrl-C at the edges of a process: quiet and 130, whatever is being imported or torn down."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

AT_IMPORT = """
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["gristmill", "--version"]
runpy.run_module("gristmill", run_name="__main__")
"""

AT_EXIT = """
import atexit, os, runpy, signal, sys
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
sys.argv = ["gristmill", "--version"]
runpy.run_module("gristmill", run_name="__main__")
"""


def run(code: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize("module", ["gristmill.cli", "click", "click.types", "gristmill.errors"])
def test_an_interrupt_during_imports(module: str) -> None:
    done = run(AT_IMPORT.format(module=module))
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_an_interrupt_at_exit() -> None:
    done = run(AT_EXIT)
    assert done.returncode == 130
    assert done.stdout.startswith(b"gristmill ")
    assert done.stderr == b""


def test_an_ignored_interrupt_stays_ignored() -> None:
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    for code in (AT_IMPORT.format(module="click"), AT_EXIT):
        done = run(ignoring + code)
        assert done.returncode == 0
        assert done.stdout.startswith(b"gristmill ")
        assert done.stderr == b""


def test_the_trial_raises_where_nobody_listens() -> None:
    """Python's own way, so that the tests above could fail."""
    code = AT_IMPORT.format(module="click").replace('run_module("gristmill"', 'run_module("click"')
    assert run(code).returncode == -signal.SIGINT
