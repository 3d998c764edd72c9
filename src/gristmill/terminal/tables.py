"""Tables of what is in the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType
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
