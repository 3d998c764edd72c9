"""Tables of methods and of what a recipe made of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gristmill.terminal.tables import plain_table, size

if TYPE_CHECKING:
    from rich.console import Group, RenderableType


def compressed_table(report: Mapping[str, Any]) -> RenderableType:
    """The report of a compressed model."""
    table = plain_table("", "")
    table.show_header = False
    table.add_row("written", str(report["out"]))
    table.add_row("methods", ", ".join(report["methods"]))
    if text := report["calibration"]:
        table.add_row("calibrated on", f"{text['tokens']} tokens of {text['text']}")
    table.add_row("bits per weight", f"{report['bits_per_weight']:.2f}")
    table.add_row("size", size(report["weight_bytes"]))
    table.add_row("took", f"{report['seconds']:.0f} s, {size(report['peak_rss_bytes'])} of memory at most")
    for note in report["notes"]:
        table.add_row("note", note)
    if quality := report.get("quality"):
        table.add_row("KL to the base (nats)", f"{quality['kl_mean']:.4g}")
        table.add_row("top-1 agreement", f"{100 * quality['top1_agreement']:.2f} %")
        table.add_row("perplexity", f"{quality['perplexity']:.3f} (base {quality['base_perplexity']:.3f})")
        table.add_row("measured on", f"{quality['tokens']} tokens of {quality['text']}")
    return table


def methods_table(listing: Sequence[Mapping[str, Any]]) -> RenderableType:
    """All methods, one per line; figures only where a stored run has them."""
    columns = ("method", "what it does", "slots", "bits", "KL", "decode", "prefill", "measured", "paper")
    table = plain_table(*columns, right=("bits", "KL", "decode", "prefill"))
    for entry in listing:
        found = entry["evidence"]
        figures = ("", "", "", "", "no")
        if found:
            figures = (
                f"{found['bits_per_weight']:.2f}",
                f"{found['kl_mean']:.4g}",
                f"{found['decode_ratio']:.2f}x",
                f"{found['prefill_ratio']:.2f}x",
                f"yes: {found['recipe']}, {_commits(found)}",
            )
        table.add_row(entry["name"], entry["title"], ", ".join(entry["slots"]), *figures, entry["paper"])
    return table


def _commits(found: Mapping[str, Any]) -> str:
    """Of a stored run: where quality was measured and, if that is another one, where speeds were."""
    quality, speeds = found["commit"][:8], found.get("speeds_commit", found["commit"])[:8]
    return quality if quality == speeds else f"{quality} (speeds {speeds})"


def method_table(entry: Mapping[str, Any]) -> Group:
    """One method and its options."""
    from rich.console import Group
    from rich.text import Text

    table = plain_table("option", "type", "default")
    for name, schema in entry["options"].items():
        kind = schema.get("type") or schema.get("enum") or [part.get("type") for part in schema["anyOf"]]
        limits = [f"{word} {schema[key]}" for key, word in _LIMITS.items() if key in schema]
        text = " or ".join(str(k) for k in kind) if isinstance(kind, list) else str(kind)
        if "enum" in schema:
            text = " or ".join(str(value) for value in schema["enum"])
        table.add_row(name, ", ".join([text, *limits]), str(schema.get("default", "required")))
    lines = [entry["title"], f"{entry['name']}: {entry['paper']}", f"slots: {', '.join(entry['slots'])}"]
    return Group(Text("\n".join(lines)), Text(""), table, Text(""), Text(entry["about"]))


_LIMITS = {"minimum": "from", "maximum": "to", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}


def comparison_table(result: Mapping[str, Any]) -> RenderableType:
    """The results of `compare`; those on the Pareto front of bytes and KL are marked."""
    columns = ("", "bits", "size", "KL", "top-1 %", "perplexity", "decode tok/s", "prefill tok/s", "best")
    table = plain_table(*columns, right=columns[1:-1])
    for row in result["results"]:
        table.add_row(
            row["name"],
            f"{row['bits_per_weight']:.2f}",
            size(row["weight_bytes"]),
            f"{row['kl_mean']:.4g}",
            f"{100 * row['top1_agreement']:.1f}",
            f"{row['perplexity']:.3f}",
            f"{row['decode_tokens_per_s']:.0f} ({row['decode_ratio']:.2f}x)",
            f"{row['prefill_tokens_per_s']:,.0f} ({row['prefill_ratio']:.2f}x)",
            "*" if row["pareto"] else "",
        )
    return table
