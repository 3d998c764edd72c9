"""Tables of what is in the cache and of what a model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

    from gristmill.io.hub import Cached, Source


def size(count: float) -> str:
    """Bytes for people, in decimal units."""
    if count < 1e3:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1e3
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1e3:,.2f} GB"


def plain_table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty rich table in the program's style; `right` names the columns of numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def cached(entry: Cached) -> dict[str, Any]:
    """A converted model as plain JSON data."""
    return {
        "name": entry.name,
        "model": entry.model,
        "weights": entry.weights,
        "bytes": entry.nbytes,
        "source": list(entry.source),
        "stale": entry.stale,
    }


def cached_table(entries: Sequence[Cached], *, removed: bool) -> RenderableType:
    """The converted models, one per line."""
    from rich.text import Text

    if not entries:
        return Text("nothing to remove" if removed else "no converted models")
    table = plain_table("name", "model", "weights", "size", "source", right=("size",))
    for entry in entries:
        place = entry.source[0] if entry.source else ""
        note = "removed" if removed else "gone or changed" if entry.stale else ""
        table.add_row(
            Text(entry.name),
            Text(entry.model),
            entry.weights,
            size(entry.nbytes),
            Text(f"{place} ({note})" if note else place),
        )
    return table


def pulled(model: str, source: Source, paths: Mapping[str, Path]) -> dict[str, Any]:
    """What `pull` did, as plain JSON data."""
    return {
        "model": model,
        "kind": source.kind,
        "source": [str(path) for path in source.files],
        "checkpoints": [
            {"weights": mode, "path": str(path), "bytes": (path / "model.safetensors").stat().st_size}
            for mode, path in paths.items()
        ],
    }


def pulled_table(result: Mapping[str, Any]) -> RenderableType:
    """Where a model now is."""
    from rich.text import Text

    table = plain_table("weights", "size", "checkpoint", right=("size",))
    for one in result["checkpoints"]:
        table.add_row(one["weights"], size(one["bytes"]), Text(one["path"]))
    return table


def exported(model: str, form: str, out: Path) -> dict[str, Any]:
    """What `export` did, as plain JSON data."""
    files = sorted(file for file in out.iterdir() if file.is_file())
    return {
        "model": model,
        "as": form,
        "path": str(out),
        "files": [{"name": file.name, "bytes": file.stat().st_size} for file in files],
    }


def exported_table(result: Mapping[str, Any]) -> RenderableType:
    """What was written."""
    from rich.text import Text

    table = plain_table("file", "size", right=("size",))
    for one in result["files"]:
        table.add_row(Text(f"{result['path']}/{one['name']}"), size(one["bytes"]))
    return table


def model_table(result: Mapping[str, Any], tensors: bool = False) -> Group:
    """What `inspect.run` returns; with `tensors`, a line per tensor too."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for label, value in _facts(result):
        facts.add_row(label, Text(_printable(value)))
    formats = plain_table(
        "format",
        "tensors",
        "parameters",
        "size",
        "bits/weight",
        right=("tensors", "parameters", "size", "bits/weight"),
    )
    for row in result["formats"]:
        bits = row["bits_per_weight"]
        formats.add_row(
            Text(row["format"]),
            f"{row['tensors']:,}",
            f"{row['parameters']:,}",
            size(row["bytes"]),
            f"{bits:.2f}" if bits is not None else "",
        )
    parts: list[RenderableType] = [facts, Text(), formats]
    if tensors:
        table = plain_table("tensor", "format", "shape", "size", right=("shape", "size"))
        for row in result["tensors"]:
            shape = " x ".join(str(n) for n in row["shape"])
            table.add_row(Text(_printable(row["name"])), row["format"], shape, size(row["bytes"]))
        parts += [Text(), table]
    return Group(*parts)


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and value of every line about a model."""
    files = result["files"]
    stored = sum(file["bytes"] for file in files)
    kinds = {"gguf": "GGUF", "hf": "Hugging Face directory", "checkpoint": "gristmill checkpoint"}
    place = files[0]["path"] if result["kind"] == "gguf" else str(Path(files[0]["path"]).parent)
    counted = f"{len(files)} files, " if len(files) > 1 else ""
    lines = [
        ("model", result["name"]),
        ("source", f"{kinds[result['kind']]}, {counted}{size(stored)}: {place}"),
        ("architecture", result["architecture"]),
    ]
    if not result["supported"]:
        lines.append(("not supported", result["reason"]))
    bits = result["bits_per_weight"]
    lines.append(
        (
            "weights",
            f"{result['parameters']:,} parameters, {size(result['weight_bytes'])}"
            + (f", {bits:.2f} bits per weight" if bits is not None else ""),
        )
    )
    config = result["config"]
    if config is not None:
        heads = f"{config['heads']} heads"
        if config["kv_heads"] != config["heads"]:
            heads += f" over {config['kv_heads']} of keys and values"
        lines += [
            ("layers", f"{config['layers']} of width {config['hidden_size']}"),
            ("attention", f"{heads}, {config['head_dim']} wide{_windows(config['windows'])}"),
            ("positions", "; ".join(_rope(rope) for rope in config["ropes"])),
            ("feed-forward", f"{config['intermediate_size']} wide, {config['activation']}, gated"),
            ("vocabulary", f"{config['vocab_size']:,}{', head tied' if config['tied'] else ''}"),
        ]
        cache = result["kv_bytes_per_token"]
        lines.append(
            (
                "context",
                f"{config['context']:,} tokens; {size(cache['bf16'])} of bf16 KV per token, "
                f"{size(cache['bf16'] * config['context'])} in all"
                + (" if no window bounded it" if len(config["windows"]) > 1 else ""),
            )
        )
    lines.append(("tokenizer", _tokenizer(result["tokenizer"])))
    return [*lines, *_made(result)]


def _made(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a recipe did, and how near the result is to its base, of a checkpoint that tells.

    The values are from a file that may be anyone's: what is not as it should be is left out.
    """
    lines = []
    if methods := [one for one in result.get("methods", ()) if isinstance(one, str)]:
        lines.append(("recipe", f"{', then '.join(methods)} (--json has its text)"))
    calibration, quality = result.get("calibration", {}), result.get("quality", {})
    if _all(calibration, text=str, tokens=int):
        lines.append(("calibrated on", f"{calibration['tokens']:,} tokens of {calibration['text']}"))
    lines += [("note", one) for one in result.get("notes", ()) if isinstance(one, str)]
    figures = ("kl_mean", "top1_agreement", "perplexity", "base_perplexity")
    if _all(quality, text=str, tokens=int, **dict.fromkeys(figures, float)):
        kl, top1, perplexity, base = (quality[key] for key in figures)
        lines.append(
            (
                "quality",
                f"KL {kl:.4g}, top-1 {100 * top1:.1f} %, perplexity {perplexity:.3f} (base {base:.3f}), "
                f"over {quality['tokens']:,} tokens of {quality['text']}",
            )
        )
    return lines


def _all(values: Mapping[str, Any], **kinds: type) -> bool:
    return all(isinstance(values.get(key), kind) for key, kind in kinds.items())


def _windows(windows: Sequence[Mapping[str, int]]) -> str:
    parts = [f"{w['window']} keys in {w['layers']} layers" for w in windows if w["window"]]
    return f"; sliding window of {', '.join(parts)}" if parts else ""


def _rope(rope: Mapping[str, Any]) -> str:
    if rope.get("type") == "none":
        return "none"
    scaling = "" if rope.get("type", "default") == "default" else f", {rope['type']} scaling"
    factor = f" by {rope['factor']:g}" if scaling and "factor" in rope else ""
    return f"rotary, theta {rope['theta']:g}{scaling}{factor}"


def _tokenizer(tokenizer: Mapping[str, Any] | None) -> str:
    if tokenizer is None:
        return "none"
    if "error" in tokenizer:
        return f"cannot be read: {tokenizer['error']}"
    parts = [tokenizer["kind"], f"{tokenizer['vocabulary']:,} tokens"]
    if "pre_tokenizer" in tokenizer:
        parts.append(f"pre-tokenizer {tokenizer['pre_tokenizer']}")
    for name, label in (("bos", "begins with"), ("eos", "ends with")):
        if tokenizer.get(name):
            parts.append(f"{label} {' '.join(token['text'] for token in tokenizer[name])}")
    parts.append("chat template" if tokenizer["chat_template"] else "no chat template")
    return ", ".join(parts)


def _printable(text: str) -> str:
    """Text of a file without what could move the cursor or change the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def program_table(result: Mapping[str, Any]) -> Group:
    """What `inspect.program` returns, a line per node."""
    from rich.console import Group
    from rich.text import Text

    table = plain_table("node", "op", "weights", "format", "details", "Mop", "kB", right=("Mop", "kB"))
    for row in result["nodes"]:
        table.add_row(
            Text(row["name"]),
            row["op"],
            Text(row["weights"]),
            Text(row["formats"]),
            Text(row["details"]),
            f"{row['operations'] / 1e6:,.2f}",
            f"{(row['weight_bytes'] + row['state_bytes']) / 1e3:,.1f}",
        )
    total = result["total"]
    table.add_section()
    table.add_row(
        "total",
        *("",) * 4,
        f"{total['operations'] / 1e6:,.2f}",
        f"{(total['weight_bytes'] + total['state_bytes']) / 1e3:,.1f}",
    )
    head = Text(
        f"{result['model']}, weights {result['weights']}, KV {result['kv_dtype']}; one step: {result['step']}"
    )
    foot = Text(
        f"{result['parameters']:,} parameters in {size(result['stored_bytes'])}; "
        f"{size(result['state_bytes_per_token'])} of KV per token; program {result['digest'][:12]}"
    )
    return Group(head, Text(), table, Text(), foot)
