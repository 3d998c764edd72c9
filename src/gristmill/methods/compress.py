"""compress: a model and a recipe become a checkpoint directory."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gristmill.errors import GristmillError, ModelError, UsageError
from gristmill.formats import dense
from gristmill.io import checkpoint
from gristmill.io.checkpoint import Checkpoint, Item, Matrix, Progress, Vector
from gristmill.io.convert import copy_sides, prepare
from gristmill.io.json_file import read_object
from gristmill.methods.draft import Draft, give_memory_back
from gristmill.methods.recipe import Recipe
from gristmill.version import __version__

QUALITY_TOKENS = 4096
"""Tokens of the evaluation whose figures go into report.json."""


def compress(
    model: str | Path,
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    evaluate: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Applies a recipe to a model and writes the checkpoint directory `out`; returns its report.

    recipe: a Recipe, a YAML file, or the name of a method. evaluate: measure the result against the base (its
    weights as stored, decoded to f32; exact arithmetic; f32 KV) and put the figures into report.json.

    What is computed at length is kept in a hidden directory beside `out` until the end: called again with the
    same model and recipe, an interrupted run resumes and gives the same bytes; after an error of a method a
    corrected recipe resumes behind the last method that it has not changed. Raises UsageError for a recipe
    that does not suit the model, naming its line, if `out` exists, or if another recipe's interrupted work is
    in the way; GristmillError if nothing can be written.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    target = Path(out).expanduser().absolute()
    if target.exists():
        raise UsageError(f"{target} exists already")
    source = Checkpoint.open(prepare(model, progress=progress))
    chosen = recipe.plan(source.program())
    if recipe.calibrated:
        _need_torch()
    try:
        steps = step_identities(source, recipe)
        with _workplace(target, identity(source, recipe), steps) as work:
            result = work / "result"
            try:
                # No name for the draft: it holds the model in float32, and ends before the evaluation begins.
                _apply(
                    Draft(source, calibration=recipe.calibration, kept=work / "steps", progress=progress),
                    recipe,
                    chosen,
                    steps,
                    result,
                )
            except (UsageError, ModelError):
                _release(work)
                raise
            give_memory_back()
            if evaluate:
                _add_quality(result, model, progress)
            report = read_object(result / "report.json")
            os.rename(result, target)
    except OSError as error:
        raise GristmillError(f"writing {target} failed: {error.strerror or error}") from None
    return report


def _apply(
    draft: Draft, recipe: Recipe, chosen: Sequence[Sequence[str]], steps: Sequence[str], result: Path
) -> None:
    """Writes the directory `result` anew."""
    for entry, tensors, step in zip(recipe.entries, chosen, steps, strict=True):
        draft.begin(step)
        try:
            entry.method.apply(draft, entry.options, tensors)
        except GristmillError as error:
            place = f"{recipe.where}, line {entry.line}: {entry.method.name}"
            raise type(error)(f"{place}: {error}") from error
    _check_groups(draft)
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    write(draft, recipe, result, floats=recipe.floats, progress=draft.progress)


def write(
    draft: Draft, recipe: Recipe, directory: Path, *, floats: str, progress: Progress | None = None
) -> None:
    """Writes a draft into an existing, empty directory as a checkpoint.

    Matrices that no method finished stay as the source stores them, or become `floats` if they were changed.
    """
    source = draft.source
    items: dict[str, Item] = {}
    for name, weight in draft.program.weights.items():
        if len(weight.shape) == 1:
            items[name] = Vector(weight.shape[0], partial(draft.weight, name))
        elif name in draft.packed:
            packed = draft.packed[name]
            items[name] = Matrix(packed.spec, packed.rows)
        elif name in draft.changed:
            values = draft.weight(name)
            if floats == "f16" and float(np.abs(values).max()) > 65504:
                raise UsageError(f"{recipe.where}: {name} holds values beyond f16: choose `floats: bf16`")
            rows, columns = weight.shape
            items[name] = Matrix(dense.spec((rows, columns), floats), partial(_dense_rows, values, floats))
        else:
            stored = source.packed(name)
            items[name] = Matrix(stored.spec, stored.rows)
    kept = (
        read_object(source.directory / "report.json") if (source.directory / "report.json").exists() else {}
    )
    report = {
        "model": kept.get("model", source.directory.name),
        "weights": recipe.name or "recipe",
        "methods": [entry.method.name for entry in recipe.entries],
        "calibration": draft.calibrated_on,
        "notes": draft.notes,
        "source": kept.get("source"),
        "gristmill": __version__,
        "identity": identity(source, recipe),
    }
    copy_sides(source.directory, directory)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    edited = source.edited or draft.program != source.program()
    checkpoint.write(
        directory,
        config,
        items,
        report=report,
        recipe=recipe.to_yaml(),
        program=draft.program if edited else None,
        factors=draft.factors,
        adapters=draft.adapters,
        activations=draft.activations,
        progress=progress,
        label="writing",
    )


def _check_groups(draft: Draft) -> None:
    """UsageError where inputs are rounded in other groups than the weights that a method has rounded.

    `Recipe.plan` has compared what the methods say of their groups; here is what they did. Where weights in
    the source's codes, of other groups, read such inputs, or float weights beside integers, the inputs are
    not the codes of all products: the model runs in bf16 then.
    """
    program = draft.program
    for encode in (n for n in program.nodes if n.op == "encode" and n.attributes["kind"] == "int"):
        group = encode.attributes["group"]
        integers = others = False
        for reader in program.readers()[encode.outputs[0]]:
            name = reader.weights[0]
            packed = draft.packed.get(name)
            spec = packed.spec if packed else None if name in draft.changed else draft.source.specs[name]
            if spec is None or spec.format not in ("group_int", "sparse24"):
                others = True
                continue
            integers = True
            if spec.group == group or (spec.groups == 1 and group >= spec.shape[1]):
                continue
            others = True
            if packed:
                raise UsageError(
                    f"the inputs of {reader.name} are rounded in groups of {group} columns, its weights in "
                    f"groups of {spec.group}: give both methods the same group"
                )
        if integers and others and draft.activations is None:
            draft.activations = "bf16"
            draft.notes.append(
                f"{encode.name} rounds inputs in groups of {group} columns, in which not all weights that "
                "read them are integers: the model runs with activations bf16"
            )


def _dense_rows(values: np.ndarray[Any, Any], floats: str, start: int, stop: int) -> Any:
    return dense.pack(values[start:stop], floats)


def _add_quality(directory: Path, model: str | Path, progress: Progress | None) -> None:
    from gristmill.evaluate import run

    found = run(directory, model, tokens=QUALITY_TOKENS, progress=progress)
    wanted = ("tokens", "text", "kl_mean", "kl_p99", "top1_agreement", "perplexity", "base_perplexity")
    report = read_object(directory / "report.json")
    report["quality"] = {key: found[key] for key in wanted} | {
        "modes": found["modes"],
        "base_modes": found["base_modes"],
    }
    checkpoint.dump_json(directory / "report.json", report)


def identity(source: Checkpoint, recipe: Recipe) -> str:
    """What must be the same for the result to be the same: the model, the recipe, its text, the version.

    (On one machine with one number of PyTorch's threads: sums of floats depend on both.)
    """
    digest = hashlib.sha256(f"{__version__}\n{recipe.to_yaml()}\n".encode())
    text = Path(recipe.calibration.text).expanduser()
    digest.update(text.read_bytes() if recipe.calibrated and text.is_file() else b"")
    for name in ("config.json", "report.json", "tokenizer.json", checkpoint.PROGRAM, checkpoint.SMOOTHING):
        path = source.directory / name
        digest.update(path.read_bytes() if path.exists() else b"")
    info = (source.directory / checkpoint.WEIGHTS).stat()
    digest.update(f"{info.st_size} {info.st_mtime_ns}".encode())
    return digest.hexdigest()


def step_identities(source: Checkpoint, recipe: Recipe) -> list[str]:
    """For every entry what must be the same for its steps to be the same: `identity` of the recipe up to it.

    Names for directories. How the rest is stored (`floats`) and the recipe's name have no part in it.
    """
    parts = (recipe.entries[: i + 1] for i in range(len(recipe.entries)))
    return [identity(source, Recipe(part, calibration=recipe.calibration))[:32] for part in parts]


@contextmanager
def _workplace(target: Path, wanted: str, steps: Collection[str]) -> Iterator[Path]:
    """A hidden directory beside `target` for one process; removed at the end unless the block raises.

    wanted: the identity of the work. Interrupted work of another identity is an error; work that failed has
    none any more (`_release`), and of that only `steps` are left.
    """
    work = target.with_name(f".{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    (work / "steps").mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is writing {target}") from None
        if target.exists():
            shutil.rmtree(work)
            raise UsageError(f"{target} exists already")
        state = work / "identity"
        if not state.exists():
            partial = state.with_suffix(".partial")
            partial.write_text(wanted)
            os.replace(partial, state)
        if state.read_text() != wanted:
            raise UsageError(
                f"{work} holds the unfinished work of another recipe or model: finish that, or remove it"
            )
        for kept in (work / "steps").iterdir():
            if kept.name not in steps:
                shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
        yield work
        if target.exists():
            shutil.rmtree(work)


def _release(work: Path) -> None:
    """After an error that the same recipe would meet again: leaves the finished steps to a corrected one."""
    if any((work / "steps").glob("*/*.safetensors")):
        shutil.rmtree(work / "result", ignore_errors=True)
        (work / "identity").unlink()
    else:
        shutil.rmtree(work)


def _need_torch() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise UsageError(
            "this recipe calibrates, which needs PyTorch: pip install 'gristmill[torch]' (rtn does without)"
        )
