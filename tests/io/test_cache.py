"""The cache under stress: several processes at once, a full disk, processes killed half-way."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gristmill.errors import GristmillError, ModelError
from gristmill.io import cache, checkpoint, convert
from gristmill.io.checkpoint import Checkpoint
from gristmill.io.convert import prepare
from tests.kits.files import config, weights, write_gguf
from tests.kits.hostile import assert_one_line, assert_refused


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    of = config(num_hidden_layers=1)
    return write_gguf(tmp_path_factory.mktemp("source") / "x.gguf", of, weights(of), "Q4_1")[0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def checkpoints(own_cache: Path) -> list[str]:
    """Names of everything in the cache's checkpoints, unfinished ones included."""
    base = own_cache / "checkpoints"
    return sorted(path.name for path in base.iterdir()) if base.exists() else []


PROCESS = """
import os, sys, time
from gristmill.io import checkpoint, convert
source, mode, flag = sys.argv[1:4]
made = []
for name in ("_import", "_requantise"):
    def wrapped(*arguments, real=getattr(convert, name), name=name):
        made.append(name)
        time.sleep(0.1)
        return real(*arguments)
    setattr(convert, name, wrapped)
if flag == "stop":
    def stop(self):
        print("stopped", flush=True)
        time.sleep(60)
    checkpoint.Writer.sync = stop
else:
    print("ready", flush=True)
    while not os.path.exists(flag):
        time.sleep(0.001)
path = convert.prepare(source, mode)
print(path, checkpoint.Checkpoint.open(path).verify(), ",".join(made))
"""


def start(source: Path, mode: str, flag: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(source), mode, flag]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("mode", ["stored", "int8"])
def test_processes_at_once_convert_once(tmp_path: Path, own_cache: Path, source: Path, mode: str) -> None:
    flag = tmp_path / "go"
    processes = [start(source, mode, str(flag)) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    flag.touch()
    results = []
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        results.append(out.split())
    assert len({(path, count) for path, count, *_ in results}) == 1
    made = [name for _, _, *names in results for part in names for name in part.split(",")]
    assert sorted(made) == (["_import"] if mode == "stored" else ["_import", "_requantise"])
    assert len(checkpoints(own_cache)) == len(made)


def test_killed_half_way_leaves_a_usable_cache(own_cache: Path, source: Path) -> None:
    process = start(source, "stored", "stop")
    assert process.stdout is not None
    assert process.stdout.readline() == "stopped\n"
    partial = checkpoints(own_cache)
    assert len(partial) == 1
    assert partial[0].startswith(".")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    path = prepare(source)
    assert Checkpoint.open(path).verify() > 0
    assert checkpoints(own_cache) == [path.name]


def test_killed_at_any_moment_leaves_a_usable_cache(own_cache: Path, source: Path, tmp_path: Path) -> None:
    for delay in (0.02, 0.11, 0.14, 0.18):
        process = start(source, "int8", str(tmp_path))
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        for name in checkpoints(own_cache):
            if not name.startswith("."):
                assert Checkpoint.open(own_cache / "checkpoints" / name).verify() > 0
    path = prepare(source, "int8")
    assert Checkpoint.open(path).verify() > 0
    assert not [name for name in checkpoints(own_cache) if name.startswith(f".{path.name}")]


def test_leftovers_of_others_are_swept_but_not_work_in_progress(own_cache: Path, source: Path) -> None:
    base = own_cache / "checkpoints"
    (base / ".dead-1.1-int4.4711").mkdir(parents=True)
    (base / ".dead-1.1-int4.4711" / "model.safetensors").write_bytes(b"half")
    with cache.building("alive-1.1-stored") as directory:
        assert directory is not None
        cache.sweep()
        assert directory.is_dir()
        assert not (base / ".dead-1.1-int4.4711").exists()
    assert checkpoints(own_cache) == ["alive-1.1-stored"]


# ---- a full disk -------------------------------------------------------------------------------------------


def full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def after(calls: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, until it has been called so many times; then the disk is full."""
    left = [calls]

    def limited(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        return real(*arguments, **options) if left[0] >= 0 else full()

    return limited


FAILURES: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "at once": (os, "posix_fallocate", lambda real: full),
    "in the weights": (checkpoint.Writer, "write", lambda real: after(5, real)),
    "when synced": (os, "fsync", lambda real: full),
    "in the config": (checkpoint, "dump_json", lambda real: full),
    "in the report": (checkpoint, "dump_json", lambda real: after(2, real)),
    "in the rename": (os, "rename", lambda real: full),
    "in the tokenizer": (convert, "_write_tokenizer", lambda real: full),
}


@pytest.mark.parametrize("name", FAILURES)
def test_full_disk_leaves_nothing_half_written(
    own_cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    where, attribute, broken = FAILURES[name]
    with monkeypatch.context() as patch:
        patch.setattr(where, attribute, broken(getattr(where, attribute)))
        with pytest.raises(GristmillError) as raised:
            prepare(source)
    text = str(raised.value)
    assert_one_line(text)
    assert "no room left" in text
    assert "GRISTMILL_CACHE" in text
    assert checkpoints(own_cache) == []
    assert Checkpoint.open(prepare(source)).verify() > 0


def test_full_disk_when_requantising_keeps_what_there_was(
    own_cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = prepare(source)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Writer, "write", after(3, checkpoint.Writer.write))
        with pytest.raises(GristmillError, match="no room left"):
            prepare(source, "int4")
    assert checkpoints(own_cache) == [stored.name]
    assert Checkpoint.open(prepare(source, "int4")).verify() > 0


def test_full_disk_when_remembering(own_cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(GristmillError, match="no room left"):
            prepare(source)
    assert not list((own_cache / "sources").iterdir())
    assert Checkpoint.open(prepare(source)).verify() > 0


def test_a_real_limit_on_file_size(own_cache: Path, source: Path) -> None:
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
        "from gristmill.errors import GristmillError\n"
        "from gristmill.io.convert import prepare\n"
        "try: prepare(sys.argv[1])\n"
        "except GristmillError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True
    )
    assert "failed: File too large" in done.stdout
    assert_one_line(done.stdout.strip())
    assert checkpoints(own_cache) == []


def test_interrupt_leaves_nothing(own_cache: Path, source: Path) -> None:
    def progress(label: str, done: int, total: int) -> None:
        if label == "converting" and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, "stored", progress)
    assert checkpoints(own_cache) == []


def test_cache_that_cannot_be(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(GristmillError, match="Not a directory") as raised:
        prepare(source)
    assert_one_line(str(raised.value))
    for number in (errno.EACCES, errno.EROFS):
        with pytest.raises(GristmillError, match="GRISTMILL_CACHE can name another directory"):
            raise cache.storage_error(OSError(number, os.strerror(number)), "writing")


# ---- what is remembered ------------------------------------------------------------------------------------


def test_key_follows_path_size_time_and_inode(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"one")
    keys = [cache.source_key([path])]
    assert cache.source_key([path]) == keys[0]
    os.utime(path, ns=(1, 1))
    keys.append(cache.source_key([path]))
    path.write_bytes(b"longer")
    os.utime(path, ns=(1, 1))
    keys.append(cache.source_key([path]))
    other.write_bytes(b"longer")
    os.utime(other, ns=(1, 1))
    os.replace(other, path)  # same path, size and time, another inode
    keys.append(cache.source_key([path]))
    keys.append(cache.source_key([path, path]))
    assert len(set(keys)) == len(keys)
    assert_refused(lambda: cache.source_key([tmp_path / "absent"]), "No such file")


def test_content_hash(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1" * 5_000_000)
    (tmp_path / "b").write_bytes(b"2")
    a, b = tmp_path / "a", tmp_path / "b"
    calls: list[tuple[str, int, int]] = []
    whole = cache.content_hash([a, b], lambda *call: calls.append(call))
    assert calls[-1] == ("reading", 5_000_001, 5_000_001)
    assert len(calls) >= 3
    assert cache.content_hash([a, b]) == whole != cache.content_hash([b, a])
    # A single file's name does not matter, those of several do.
    (tmp_path / "c").write_bytes(b"2")
    assert cache.content_hash([b]) == cache.content_hash([tmp_path / "c"])
    assert cache.content_hash([a, tmp_path / "c"]) != whole
    with pytest.raises(ModelError):
        cache.content_hash([tmp_path / "absent"])


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"content": 5}', '{"content": "../../etc"}', "\xff"])
def test_damaged_memory_is_no_memory(own_cache: Path, source: Path, text: str) -> None:
    path = prepare(source)
    (remembered,) = (own_cache / "sources").iterdir()
    remembered.write_bytes(text.encode("latin-1"))
    assert prepare(source) == path
    assert json.loads(remembered.read_text())["content"] in path.name


def test_entries_and_removal(own_cache: Path, source: Path) -> None:
    assert cache.entries() == []
    path = prepare(source)
    assert cache.entries() == [(path.name, sum(file.stat().st_size for file in path.iterdir()))]
    opened = Checkpoint.open(path)
    cache.remove(path.name)
    assert cache.entries() == []
    assert opened.verify
    assert float(opened.vector("model.norm.weight")[0]) != 0  # its pages stay
    with pytest.raises(GristmillError, match="removing"):
        cache.remove(path.name)
