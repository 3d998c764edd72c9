"""Directories that are whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Yields an empty hidden directory beside `target`, which must not exist.

    On leaving normally the directory, on the disk in full, takes its place in one rename; on an exception it
    is removed. Raises OSError.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        for file in (*partial.iterdir(), partial):
            _sync(file)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
