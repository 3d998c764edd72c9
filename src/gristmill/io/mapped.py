"""Read-only mapping of a file, and the errors every reader turns system errors into."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError


def map_file(path: Path) -> NDArray[np.uint8]:
    """The file's bytes as a read-only view; the mapping lives as long as a view of it does.

    ModelError if the file cannot be opened or is empty. A file that another program shortens while it is mapped
    kills the process on access, as with any mapping.
    """
    try:
        with open(path, "rb") as file:
            if file.seek(0, 2) == 0:
                raise ModelError(f"{path} is empty")
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None


def read_small(path: Path, limit: int) -> bytes:
    """A whole small file; ModelError if it cannot be read or is larger than `limit` bytes."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) > limit:
        raise ModelError(f"{path} is larger than the {limit >> 20} MB that such a file may have")
    return data
