"""A worker process: started in a peer's environment, asked one thing at a time, stopped while others run."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .environments import HERE

LOGS = HERE / ".models" / "logs"


def end_on_sigterm() -> None:
    """SIGTERM ends this program as Ctrl-C does: servers and workers, stopped or not, end with it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


class Refused(Exception):
    """A worker did not do what was asked; `kind` is unsupported, error, died or timeout."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class Remote:
    """One worker. Between requests its processes are stopped, so none of its threads can spin."""

    def __init__(
        self, name: str, python: Path, script: Path, variables: Mapping[str, str], cpus: Sequence[int]
    ) -> None:
        """Starts `script` with `python` on the processors `cpus`; stderr goes to a log named after it."""
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{name.replace('/', '-')}.log"
        self.name = name
        allowed = os.sched_getaffinity(0)
        # Affinity is inherited, and set before the runtime counts its processors.
        os.sched_setaffinity(0, cpus)
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [str(python), str(script)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=dict(variables),
                    cwd=script.parent,
                    start_new_session=True,
                )
        finally:
            os.sched_setaffinity(0, allowed)
        self._pending = b""

    def ask(self, request: Mapping[str, Any], timeout: float = 600.0) -> dict[str, Any]:
        """The reply to a request. Raises Refused, after which the worker lives on unless it died."""
        process = self._process
        assert process.stdin is not None  # both were asked for
        self._signal(signal.SIGCONT)
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            reply = json.loads(self._line(timeout))
        except BrokenPipeError:
            raise self._died() from None
        finally:
            self._signal(signal.SIGSTOP)
        if not reply.pop("ok"):
            raise Refused(reply["kind"], reply["reason"])
        return dict(reply)

    def _line(self, timeout: float) -> bytes:
        assert self._process.stdout is not None
        end = time.monotonic() + timeout
        source = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            ready, _, _ = select.select([source], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.close()
                raise Refused("timeout", f"no answer within {timeout:.0f} s")
            got = os.read(source, 1 << 16)
            if not got:
                raise self._died()
            self._pending += got
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _died(self) -> Refused:
        code = self._process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["no message"]
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        return Refused("died", f"the process ended with {how}: {lines[-1][:300]}")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Ends the worker and what it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def choose_cpus(count: int) -> list[int]:
    """`count` of the processors this process may use, on as many different cores as there are."""
    allowed = sorted(os.sched_getaffinity(0))
    first: list[int] = []
    others: list[int] = []
    seen: set[str] = set()
    for cpu in allowed:
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            siblings = str(cpu)
        (others if siblings in seen else first).append(cpu)
        seen.add(siblings)
    return (first + others)[:count]
