"""llama.cpp's own server, built from the sources that llama-cpp-python's pinned release carries."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from pathlib import Path

from .environments import ENVIRONMENT, ENVIRONMENTS, REQUIREMENTS, Say, checked

FOLDER = ENVIRONMENTS / "llama-server"
BINARY = FOLDER / "llama-server"
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


def version() -> str:
    """The release of llama-cpp-python that the sources come from."""
    lines = (REQUIREMENTS / "llamacpp.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("llama_cpp_python=="))


def ensure_llama_server(say: Say) -> Path:
    """Builds the server unless it is there, with the compiler flags of the peer `llamacpp`; its path.

    Takes some minutes, cmake and a C++ compiler. Raises SetupError if it cannot be built.
    """
    note = FOLDER / "version"
    if BINARY.exists() and note.exists() and note.read_text() == version():
        return BINARY
    say("building llama-server (its sources are downloaded and compiled, which takes minutes)")
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    FOLDER.mkdir(parents=True)
    environment = {**os.environ, **ENVIRONMENT["llamacpp"].variables}
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    pip += ["--no-binary", "llama-cpp-python", "--dest", str(FOLDER), f"llama-cpp-python=={version()}"]
    checked(pip, "the sources of llama-server", environment)
    archive = next(FOLDER.glob("*.tar.gz"))
    with tarfile.open(archive) as file:
        file.extractall(FOLDER, filter="data")
    source = next(FOLDER.glob("*/vendor/llama.cpp"))
    build = FOLDER / "build"
    configure = ["cmake", "-S", str(source), "-B", str(build), *OPTIONS]
    checked(configure, "llama-server", environment)
    jobs = str(os.cpu_count() or 1)
    checked(
        ["cmake", "--build", str(build), "--target", "llama-server", "-j", jobs], "llama-server", environment
    )
    shutil.copy2(build / "bin" / "llama-server", BINARY)
    # Only the binary is needed any more.
    shutil.rmtree(build)
    shutil.rmtree(source.parent.parent)
    archive.unlink()
    note.write_text(version())
    return BINARY
