"""Regions of pages that scripts fill: between `<!-- NAME:begin ... -->` and `<!-- NAME:end -->`."""

from __future__ import annotations

from collections.abc import Sequence


def fill(text: str, name: str, lines: Sequence[str]) -> str:
    """`text` with the lines between a region's two marks replaced. SystemExit if there are none."""
    begin = text.find(f"<!-- {name}:begin")
    end = text.find(f"<!-- {name}:end")
    if begin < 0 or end < begin:
        raise SystemExit(f"the page has no region {name}")
    start = text.index("\n", begin) + 1
    return text[:start] + "\n".join(lines) + "\n" + text[end:]
