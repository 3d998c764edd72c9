"""Read-only mapping of a file, and the errors every reader turns system errors into."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError


def short(text: object, limit: int = 80) -> str:
    """What a file says, for an error message: on one line, quoted, and of bounded length."""
    if isinstance(text, (list, dict)):
        return f"a {type(text).__name__} of {len(text)} items"
    if isinstance(text, int) and text.bit_length() > 200:
        return "a huge number"
    quoted = repr(text[:limit] if isinstance(text, str) else text)
    return quoted if len(quoted) <= limit else f"{quoted[: limit - 3]}..."


def _opener(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a named pipe waits for somebody to write to it.
    return os.open(path, flags | os.O_NONBLOCK)


def _demand_file(path: Path, handle: int) -> None:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise ModelError(f"{path} is not an ordinary file")


def map_file(path: Path) -> NDArray[np.uint8]:
    """The file's bytes as a read-only view; the mapping lives as long as a view of it does.

    ModelError if the file cannot be opened, is empty, or is no ordinary file. A file that another program
    shortens while it is mapped kills the process on access, as with any mapping.
    """
    try:
        with open(path, "rb", opener=_opener) as file:
            _demand_file(path, file.fileno())
            if file.seek(0, 2) == 0:
                raise ModelError(f"{path} is empty")
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None


def read_small(path: Path, limit: int) -> bytes:
    """A whole small file; ModelError if it cannot be read or is larger than `limit` bytes."""
    try:
        with open(path, "rb", opener=_opener) as file:
            _demand_file(path, file.fileno())
            # Python takes memory for as many bytes as are asked for.
            data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > limit:
        raise ModelError(f"{path} is larger than the {limit >> 20} MB that such a file may have")
    return data
