"""The cache of converted models: `$GRISTMILL_CACHE`, or gristmill in the user's cache directory.

    sources/<key>.json     content hash of a set of source files; the key is made of path, size, mtime, inode
    checkpoints/<name>/    finished checkpoint directories, named by content hash, versions and weight mode
    locks/<name>.lock      one writer per checkpoint, across processes
    downloads/             files fetched by `pull`
    hub/                   where a model of the Hugging Face hub was put

A checkpoint is built in a hidden directory beside its place and renamed when complete, so that a directory
that exists is whole; what a killed process left behind is removed by the next one that builds the same
checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gristmill.errors import GristmillError, ModelError
from gristmill.io.directory import whole

_READ = 1 << 22
"""Bytes read at a time for a content hash."""


def root() -> Path:
    """The cache's directory; it need not exist yet."""
    chosen = os.environ.get("GRISTMILL_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and base.startswith("/") else Path.home() / ".cache") / "gristmill"


def storage_error(error: OSError, doing: str) -> GristmillError:
    """One line for a failed write: what was being done, where, why, and what helps."""
    reason = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason += "; GRISTMILL_CACHE can name another directory"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = root()
        while not place.exists() and place != place.parent:
            place = place.parent
        free = shutil.disk_usage(place).free >> 20
        reason = f"no room left ({free} MB free in {root()}; set GRISTMILL_CACHE to a directory with more)"
    return GristmillError(f"{doing} failed: {reason}")


def _stat_line(path: Path) -> str:
    try:
        info = path.stat()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    return f"{path}\0{info.st_size}\0{info.st_mtime_ns}\0{info.st_ino}"


def source_key(paths: Sequence[Path]) -> str:
    """A key of the files' paths, sizes, modification times and inodes."""
    text = "\n".join(_stat_line(path) for path in paths)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def recall(key: str) -> str | None:
    """The content hash remembered for a source key, or None."""
    try:
        value = json.loads((root() / "sources" / f"{key}.json").read_bytes())
    except (OSError, ValueError):
        return None
    content = value.get("content") if isinstance(value, dict) else None
    return content if isinstance(content, str) and len(content) == 32 and content.isalnum() else None


def remember(key: str, content: str, paths: Sequence[Path]) -> None:
    """Remembers the content hash of the files with this key. GristmillError if it cannot be written."""
    target = root() / "sources" / f"{key}.json"
    text = json.dumps({"content": content, "files": [str(path) for path in paths]}, indent=1)
    partial = target.with_name(f".{key}.{uuid.uuid4().hex}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")
        os.replace(partial, target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise storage_error(error, f"writing the cache in {root()}") from None


def content_hash(paths: Sequence[Path], progress: Callable[[str, int, int], None] | None = None) -> str:
    """A hash of the files' names and bytes (32 hexadecimal digits). ModelError if one cannot be read.

    `progress` is called as `checkpoint.Progress` says, with bytes.
    """
    total, done = hashlib.sha256(), 0
    size = sum(path.stat().st_size for path in paths if path.exists())
    for path in paths:
        digest = hashlib.sha256()
        try:
            with open(path, "rb", buffering=0) as file:
                while piece := file.read(_READ):
                    digest.update(piece)
                    done += len(piece)
                    if progress:
                        progress("reading", min(done, size), size)
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
        name = path.name if len(paths) > 1 else ""
        total.update(f"{name}\0{digest.hexdigest()}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()[:32]


def checkpoint_path(name: str) -> Path:
    """Where the finished checkpoint `name` is, or would be."""
    return root() / "checkpoints" / name


@contextmanager
def _locked(name: str, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a checkpoint; yields False, at once, if it is taken and `wait` is off."""
    import fcntl

    path = root() / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            # Released by the system if the process dies.
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def building(name: str) -> Iterator[Path | None]:
    """Yields an empty directory to build the checkpoint `name` in, or None if it exists once the lock is
    held.

    On leaving normally the directory, on the disk in full, takes its place in one rename; on an exception it
    is removed. OSErrors of the block become a one-line GristmillError.
    """
    target = checkpoint_path(name)
    try:
        with _locked(name):
            if target.is_dir():
                yield None
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(name)
            with whole(target) as partial:
                yield partial
    except OSError as error:
        raise storage_error(error, f"writing the converted model to {target.parent}") from None


def _remove_leftovers(name: str) -> None:
    """Removes what killed processes left behind of the checkpoint `name`, whose lock is held."""
    for stale in checkpoint_path(name).parent.glob(f".{name}.*"):
        shutil.rmtree(stale, ignore_errors=True)


def sweep() -> None:
    """Removes what killed processes left behind, of every checkpoint that nobody is building now."""
    base = root() / "checkpoints"
    hidden = base.glob(".*") if base.is_dir() else []
    for name in {path.name[1:].rpartition(".")[0] for path in hidden}:
        with _locked(name, wait=False) as free:
            if free:
                _remove_leftovers(name)


def entries() -> list[tuple[str, int]]:
    """(name, bytes) of all finished checkpoints."""
    base = root() / "checkpoints"
    if not base.is_dir():
        return []
    result = []
    for directory in sorted(base.iterdir()):
        if directory.is_dir() and not directory.name.startswith("."):
            files = [file for file in directory.iterdir() if file.is_file()]
            result.append((directory.name, sum(file.stat().st_size for file in files)))
    return result


def remove(name: str) -> None:
    """Removes a finished checkpoint. Processes that have it mapped keep their pages."""
    target = checkpoint_path(name)
    hidden = target.with_name(f".{name}.removed-{uuid.uuid4().hex}")
    try:
        with _locked(name):
            os.rename(target, hidden)
            shutil.rmtree(hidden)
    except OSError as error:
        raise storage_error(error, f"removing {target}") from None
