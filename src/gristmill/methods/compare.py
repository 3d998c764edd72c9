"""compare: several recipes on one model, measured in one run: bytes, quality, speed, and what is best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from gristmill.errors import UsageError
from gristmill.io.checkpoint import Progress
from gristmill.methods.recipe import Recipe

if TYPE_CHECKING:
    from gristmill.bench.measure import Sequences
    from gristmill.bench.subject import Subject

BASELINES = ("bf16", "stored")
"""Weight modes of the model itself that every comparison holds; speeds are ratios to the first."""
CONTEXT = 512
STEPS = 32


def compare(
    model: str | Path,
    recipes: Sequence[Recipe | str | Path],
    out: str | Path,
    *,
    tokens: int = 4096,
    text: str | Path | None = None,
    repeats: int = 5,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compresses a model by each recipe into `out`/<recipe's name> and measures all results in one run.

    A directory that is there already is taken as it is if its recipe is the same. Quality is against the
    model as stored, decoded to f32, in exact arithmetic, over `tokens` tokens of `text` (None: the built-in
    one). Speeds are medians over `repeats` turns, all results taking turns: a prompt of 512 tokens, and 32
    steps of one sequence at 512 tokens of context.

    Returns machine, model, text, and per result: name, recipe (YAML, None for a baseline), methods,
    bits_per_weight, weight_bytes, KL and top-1 figures, decode and prefill in tokens/s and as ratios to bf16,
    and whether it is on the Pareto front of bytes and KL. Raises UsageError for recipes of the same name, and
    what `compress` raises.
    """
    from gristmill.bench.host import load_average, machine
    from gristmill.evaluate import run as evaluate

    if repeats < 1:
        raise UsageError("compare needs at least one repeat")
    chosen = [r if isinstance(r, Recipe) else Recipe.load(r) for r in recipes]
    named = [recipe.name for recipe in chosen]
    twice = sorted({name for name in named if named.count(name) > 1} | set(named) & set(BASELINES))
    if twice or "" in named:
        raise UsageError(f"recipes need names of their own: {', '.join(twice) or 'one has none'}")
    places = [compressed(model, recipe, Path(out), progress) for recipe in chosen]
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for name, recipe in [*((b, None) for b in BASELINES), *((r.name, r) for r in chosen)]:
        subject = places[len(rows) - len(BASELINES)] if recipe else model
        found = evaluate(
            subject,
            model,
            weights="stored" if recipe else name,
            tokens=tokens,
            text=text,
            threads=threads,
            progress=progress,
        )
        rows.append(
            {
                "name": name,
                "recipe": recipe.to_yaml() if recipe else None,
                "methods": [entry.method.name for entry in recipe.entries] if recipe else [],
                **{key: found[key] for key in _QUALITY},
                "modes": found["modes"],
            }
        )
    add_speeds(rows, model, places, repeats=repeats, threads=threads, progress=progress)
    for row in rows:
        row["pareto"] = not any(
            other["weight_bytes"] <= row["weight_bytes"]
            and other["kl_mean"] <= row["kl_mean"]
            and (other["weight_bytes"], other["kl_mean"]) != (row["weight_bytes"], row["kl_mean"])
            for other in rows
        )
    return {
        "machine": {**machine(), "load_average": load_average()},
        "model": found["base"],
        "text": found["text"],
        "tokens": found["tokens"],
        "base_perplexity": found["base_perplexity"],
        "context": CONTEXT,
        "repeats": repeats,
        "results": rows,
    }


_QUALITY = ("bits_per_weight", "weight_bytes", "kl_mean", "kl_p99", "top1_agreement", "perplexity")


def compressed(model: str | Path, recipe: Recipe, out: Path, progress: Progress | None = None) -> Path:
    """`out`/<recipe's name>: made, or taken as it is if it was made from this model by this recipe.

    UsageError if it was made otherwise; also raises what `compress` raises.
    """
    from gristmill.io.checkpoint import Checkpoint
    from gristmill.io.convert import prepare
    from gristmill.io.json_file import read_object
    from gristmill.methods.compress import compress, identity

    target = out / recipe.name
    if not target.exists():
        compress(model, recipe, target, evaluate=False, progress=progress)
        return target
    source = Checkpoint.open(prepare(model, progress=progress))
    report = target / "report.json"
    if not report.is_file() or read_object(report).get("identity") != identity(source, recipe):
        raise UsageError(f"{target} exists and was not made from this model by this recipe: remove it")
    return target


def add_speeds(
    rows: Sequence[dict[str, Any]],
    model: str | Path,
    places: Sequence[Path],
    *,
    repeats: int = 5,
    threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Puts speeds, as `compare` has them, into the rows of the baselines and of the checkpoints `places`."""
    from gristmill.bench.measure import Sequences
    from gristmill.bench.subject import Subject

    with ExitStack() as stack:
        subjects: list[Subject] = [
            *(stack.enter_context(Subject.load(model, weights=b, threads=threads)) for b in BASELINES),
            *(stack.enter_context(Subject.load(place, threads=threads)) for place in places),
        ]
        running: list[Sequences] = []
        for subject in subjects:
            sequences = Sequences(subject.executor, 1, CONTEXT + STEPS)
            stack.callback(sequences.close)
            sequences.prefill(CONTEXT)
            sequences.decode(CONTEXT, STEPS)
            running.append(sequences)
        times: list[tuple[list[float], list[float]]] = [([], []) for _ in running]
        for turn in range(repeats):
            for i, (sequences, (prefill, decode)) in enumerate(zip(running, times, strict=True)):
                prefill.append(sequences.prefill(CONTEXT))
                decode.append(sequences.decode(CONTEXT, STEPS))
                if progress:
                    progress("measuring", turn * len(running) + i + 1, repeats * len(running))
    for row, (prefill, decode) in zip(rows, times, strict=True):
        row["prefill_tokens_per_s"] = CONTEXT / median(prefill)
        row["decode_tokens_per_s"] = STEPS / median(decode)
    for row in rows:
        for kind in ("prefill", "decode"):
            row[f"{kind}_ratio"] = row[f"{kind}_tokens_per_s"] / rows[0][f"{kind}_tokens_per_s"]


def need_plot() -> None:
    """UsageError without matplotlib."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UsageError("the plot needs matplotlib: pip install 'gristmill[plot]', or --no-plot")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """The results as points of bytes and KL, coloured by decode speed, with the Pareto front; a PNG."""
    need_plot()
    from matplotlib.figure import Figure

    rows = result["results"]
    # What equals the base has no place on a logarithmic axis; it is drawn at the foot.
    least = min((row["kl_mean"] for row in rows if row["kl_mean"] > 1e-6), default=1e-3) / 2
    x = [row["weight_bytes"] / 1e6 for row in rows]
    y = [max(row["kl_mean"], least) for row in rows]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    front = sorted((a, b) for a, b, row in zip(x, y, rows, strict=True) if row["pareto"])
    axes.plot(*zip(*front, strict=True), color="0.7", zorder=1, label="Pareto front")
    points = axes.scatter(
        x, y, c=[row["decode_tokens_per_s"] for row in rows], cmap="viridis", s=60, zorder=2
    )
    for a, b, row in zip(x, y, rows, strict=True):
        axes.annotate(row["name"], (a, b), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set(
        yscale="log",
        xlabel="weights (MB)",
        ylabel=f"KL to the base (nats, {result['tokens']} tokens)",
        title=f"{result['model']}: size, quality and speed",
    )
    figure.colorbar(points, label=f"decode at {result['context']} tokens of context (tokens/s)")
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)
