"""The peers' virtual environments, made from pinned lists the first time they are needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
ENVIRONMENTS = HERE / ".envs"
REQUIREMENTS = HERE / "requirements"
DONE = "complete"
"""Written last into an environment: one without it was interrupted and is made anew."""

Say = Callable[[str], None]


class SetupError(Exception):
    """An environment or a model file could not be made; the message says why in one line."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment: the pinned list in `requirements/` and the variables pip runs with."""

    requirements: str
    variables: Mapping[str, str] = field(default_factory=dict)


# llama.cpp is compiled here. Its AMX kernels crashed on a machine that has AMX, so the compiler is kept from
# defining what turns them on; everything else the machine has is used. The second build knows AVX2 at most.
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
AVX2 = (
    "-DGGML_NATIVE=OFF -DGGML_SSE42=ON -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON"
    " -DGGML_BMI2=ON -DGGML_AVX512=OFF -DGGML_AVX_VNNI=OFF"
)
ENVIRONMENT = {
    "llamacpp": Environment(
        "llamacpp", {"CFLAGS": NO_AMX, "CXXFLAGS": NO_AMX, "CMAKE_ARGS": "-DGGML_NATIVE=ON"}
    ),
    "llamacpp-avx2": Environment("llamacpp", {"CMAKE_ARGS": AVX2}),
    "llmcompressor": Environment("llmcompressor"),
    "openvino": Environment("openvino"),
    "ortgenai": Environment("ortgenai"),
    "transformers": Environment("transformers"),
    "vllm": Environment("vllm"),
}
"""Environments by name. gristmill's workers run in the interpreter that runs the benchmark."""


def interpreter(name: str) -> Path:
    """The Python of an environment; "" is the one that runs this."""
    return ENVIRONMENTS / name / "bin" / "python" if name else Path(sys.executable)


def ensure(name: str, say: Say) -> Path:
    """Makes an environment unless it is there, and returns its interpreter.

    Raises SetupError with the last line of pip's output if it cannot be made.
    """
    python = interpreter(name)
    if not name or is_complete(name):
        return python
    environment = ENVIRONMENT[name]
    folder = ENVIRONMENTS / name
    say(f"making the environment {name} (packages are downloaded or compiled, which takes minutes)")
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    variables = {**os.environ, **environment.variables}
    # The lists are whole: what a package asks for beyond them (optimum-intel a torchvision) may not fit.
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
    commands = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "--no-cache-dir"] if environment.variables else pip,
    ]
    commands[1] += ["-r", str(REQUIREMENTS / f"{environment.requirements}.txt")]
    if environment.variables:
        # A wheel built elsewhere would not be built with these variables.
        commands[1] += ["--no-binary", "llama-cpp-python"]
    for command in commands:
        checked(command, f"the environment {name}", variables)
    (folder / DONE).write_text(_pins(environment))
    return python


def is_complete(name: str) -> bool:
    """Whether an environment is there and holds what its list asks for; checked once, then noted in it."""
    note, pins = ENVIRONMENTS / name / DONE, _pins(ENVIRONMENT[name])
    if note.exists():
        return note.read_text() == pins
    if not interpreter(name).exists():
        return False
    code = "from importlib import metadata\nfor d in metadata.distributions(): print(d.name, d.version)"
    run = subprocess.run([interpreter(name), "-c", code], capture_output=True, text=True, check=False)
    installed = dict(line.rsplit(" ", 1) for line in run.stdout.splitlines())
    versions = {_plain(key): value.partition("+")[0] for key, value in installed.items()}
    wanted = (line.split("==") for line in pins.splitlines() if "==" in line and not line.startswith("#"))
    if any(versions.get(_plain(package)) != version for package, version in wanted):
        return False
    note.write_text(pins)
    return True


def _plain(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _pins(environment: Environment) -> str:
    """What an environment is made from, as text."""
    pins = (REQUIREMENTS / f"{environment.requirements}.txt").read_text()
    return pins + "".join(f"# {key}={value}\n" for key, value in environment.variables.items())


def checked(command: list[str], what: str, variables: Mapping[str, str]) -> None:
    """Runs a command quietly. SetupError with the last line it printed if it fails."""
    run = subprocess.run(command, env=dict(variables), capture_output=True, text=True, check=False)
    if run.returncode:
        lines = (run.stderr or run.stdout).strip().splitlines() or ["no output"]
        raise SetupError(f"{what} could not be made: {lines[-1]}")
