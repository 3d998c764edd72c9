"""The model files of the peers, made the first time they are needed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from .environments import HERE, Say, checked, ensure

MODELS = HERE / ".models"
PREPARE = HERE / "prepare"
RECIPES = HERE.parent / "examples" / "recipes"
DEMO = "smollm2"
LARGE = "1b"
"""The model of about 1 B random weights."""

Recipe = Callable[[Path, Say], None]


def path_of(name: str) -> Path:
    """Where a model file or directory lies, such as `smollm2/q4_0.gguf`."""
    return MODELS / name


def ensure_file(name: str, say: Say) -> Path:
    """Makes a model file, and those it is made from, unless it is there; returns its path.

    It appears under its name only when whole. Raises SetupError if it cannot be made.
    """
    target = path_of(name)
    if target.exists():
        return target
    recipe = _recipe(name)
    say(f"making {name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    recipe(partial, say)
    partial.rename(target)
    return target


def _recipe(name: str) -> Recipe:
    model, _, part = name.partition("/")
    if part == "model.gguf" and model == DEMO:
        return _demo
    if part in ("model.gguf", "hf"):
        return _converted if model == DEMO else _random(part)
    if part == "tokens.json":
        return lambda out, say: _python("transformers", "models.py tokens", f"{DEMO}/hf", out, say)
    if part in ("q4_0.gguf", "q4_1.gguf", "q8_0.gguf"):
        kind = part.partition(".")[0]
        source = f"{model}/model.gguf"
        return lambda out, say: _python("llamacpp", "llamacpp_quantize.py", source, out, say, mode=kind)
    if part == "f32.gguf":
        source = f"{model}/model.gguf"
        return lambda out, say: _python("llamacpp", "llamacpp_quantize.py", source, out, say, mode="f32")
    if part == "calibration.json":
        return lambda out, say: _calibration(model, out, say)
    if part.startswith("recipes/"):
        return lambda out, say: _compressed(model, part.removeprefix("recipes/").partition(".")[0], out, say)
    if part.startswith("quants/"):
        return _quants(model, part.removeprefix("quants/"))
    if part.startswith("openvino-"):
        kind, source = part.removeprefix("openvino-"), f"{model}/hf"
        return lambda out, say: _python("openvino", "openvino_export.py", source, out, say, mode=kind)
    if part.startswith("ort-"):
        return lambda out, say: _onnx(model, part.removeprefix("ort-"), out, say)
    raise KeyError(f"no recipe makes {name}")


def _python(environment: str, script: str, source: str, out: Path, say: Say, *, mode: str = "") -> None:
    """Runs a preparation script, given with its leading arguments: SCRIPT SOURCE OUT [MODE]."""
    given = str(ensure_file(source, say))
    python = ensure(environment, say)
    file, *leading = script.split()
    command = [str(python), str(PREPARE / file), *leading, given, str(out), *([mode] if mode else [])]
    checked(command, out.name.removesuffix(".partial"), variables())


def _demo(out: Path, say: Say) -> None:
    from gristmill.io.hub import resolve

    shutil.copyfile(resolve(DEMO).files[0], out)


def by_recipe(name: str) -> str:
    """The file of the demo model compressed by a recipe of examples/recipes; another one if that changes."""
    text = (RECIPES / f"{name}.yaml").read_bytes()
    return f"{DEMO}/recipes/{name}.{hashlib.sha256(text).hexdigest()[:8]}"


def _compressed(model: str, name: str, out: Path, say: Say) -> None:
    """In a process of its own, as it takes PyTorch."""
    source, recipe = ensure_file(f"{model}/model.gguf", say), RECIPES / f"{name}.yaml"
    command = [sys.executable, "-m", "gristmill", "compress", str(source), "--recipe", str(recipe)]
    checked([*command, "-o", str(out), "--no-evaluate"], f"{model} by {name}", dict(os.environ))


def _converted(out: Path, say: Say) -> None:
    _python("transformers", "models.py from-gguf", f"{DEMO}/model.gguf", out, say)


def _random(part: str) -> Recipe:
    """One run makes both forms; each is moved to its place."""

    def make(out: Path, say: Say) -> None:
        both = out.with_name("both.partial")
        if both.exists():
            shutil.rmtree(both)
        _python("transformers", "models.py random", f"{DEMO}/model.gguf", both, say)
        other = "hf" if part == "model.gguf" else "model.gguf"
        (both / part).rename(out)
        if not (out.parent / other).exists():
            (both / other).rename(out.parent / other)
        shutil.rmtree(both)

    return make


def _quants(model: str, name: str) -> Recipe:
    """The layers alone at few bits: by llama.cpp, those files as plain floats, or by llm-compressor."""
    kind = name.removesuffix(".gguf")
    if name.endswith("-floats"):
        source = f"{model}/quants/{name.removesuffix('-floats')}.gguf"
        return lambda out, say: _python("transformers", "models.py from-gguf", source, out, say)
    if name.endswith(".gguf"):
        script, source = "llamacpp_quantize.py --keep-embedding", f"{model}/f32.gguf"
        return lambda out, say: _python("llamacpp", script, source, out, say, mode=kind)

    def make(out: Path, say: Say) -> None:
        ensure_file(f"{model}/calibration.json", say)
        _python("llmcompressor", "llmcompressor_quantize.py", f"{model}/hf", out, say, mode=kind)

    return make


def _calibration(model: str, out: Path, say: Say) -> None:
    """The token ids that gristmill's methods calibrate on unless told otherwise."""
    from gristmill.calibrate.text import CalibrationText

    sequences = CalibrationText().read(ensure_file(f"{model}/model.gguf", say))
    out.write_text(json.dumps({**sequences.report(), "ids": sequences.ids}))


def _onnx(model: str, mode: str, out: Path, say: Say) -> None:
    source = ensure_file(f"{model}/hf", say)
    python = ensure("ortgenai", say)
    scratch = out.with_name(out.name + ".cache")
    command = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out)]
    checked([*command, "-p", mode, "-e", "cpu", "-c", str(scratch)], out.name, variables())
    shutil.rmtree(scratch, ignore_errors=True)


def variables(threads: int | None = None) -> dict[str, str]:
    """The environment variables of workers and preparation: offline, and a number of OpenMP threads."""
    result = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # The interpreter's own settings must not leak into another environment's.
    for name in ("PYTHONPATH", "PYTHONHOME", "GRISTMILL_ISA"):
        result.pop(name, None)
    if threads:
        result["OMP_NUM_THREADS"] = str(threads)
    if sys.stderr.isatty():
        result["NO_COLOR"] = "1"
    return result
