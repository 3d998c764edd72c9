"""Describes the machine a figure was measured on, without anything that names it or its user."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

_FEATURES = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vbmi",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
"""CPU features that inference kernels use, by their names in /proc/cpuinfo."""


def machine() -> dict[str, Any]:
    """The machine as plain JSON data.

    cpu, cores (physical, or None), logical_cpus, usable_cpus (affinity and the cgroup's quota), features,
    caches (name -> bytes), memory_bytes, huge_pages, levels (kernels this machine can run), os, python, and
    versions of gristmill and its numeric packages. Holds no host name, user name or path.
    """
    import psutil

    from gristmill.backends.native import _native
    from gristmill.backends.native.executor import default_threads
    from gristmill.version import __version__

    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cpus": psutil.cpu_count(),
        "usable_cpus": default_threads(),
        "features": [name for name in _FEATURES if name in flags],
        "caches": _caches(),
        "memory_bytes": psutil.virtual_memory().total,
        "huge_pages": _huge_pages(),
        "levels": list(_native.available_levels()),
        "level": _native.default_level(),
        "os": f"{platform.system()} {re.match(r'[0-9.]*', platform.release())[0]}",  # type: ignore[index]
        "libc": " ".join(platform.libc_ver()).strip(),
        "python": platform.python_version(),
        "versions": {
            "gristmill": __version__,
            "numpy": metadata.version("numpy"),
            "tokenizers": metadata.version("tokenizers"),
        },
    }


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    entries = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in entries}


def _caches() -> dict[str, int]:
    """Sizes in bytes of the caches that the first processor sees: L1d, L2, L3."""
    result = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind = (index / "type").read_text().strip()
            level = (index / "level").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue  # not described on this machine
        if kind != "Instruction" and size.endswith("K"):
            result[f"L{level}{'d' if kind == 'Data' else ''}"] = int(size[:-1]) << 10
    return result


def _huge_pages() -> str:
    """The kernel's setting for transparent huge pages: always, madvise, never, or unknown."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen[1] if chosen else "unknown"


def peak_rss_bytes() -> int:
    """Most memory this process has had resident at once, in bytes."""
    import resource
    import sys

    try:
        # The kernel's ru_maxrss remembers the process that started this one; VmHWM does not.
        found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found[1]) << 10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes: whether others were using the machine while a figure was taken."""
    return [round(x, 2) for x in os.getloadavg()]
