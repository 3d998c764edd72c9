"""The result of an evaluation as a table for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def render(result: Mapping[str, Any]) -> Table:
    """A table of the dictionary that `run` returns."""
    from rich.table import Table

    modes, base = result["modes"], result["base_modes"]
    table = Table(
        title=f"{result['model']} against {result['base']}, {result['tokens']} tokens of {result['text']} "
        f"in windows of {result['window']}",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("model", justify="right")
    table.add_column("base", justify="right")
    for key in ("weights", "activations", "kv_dtype"):
        table.add_row(key.replace("kv_dtype", "KV"), str(modes[key]), str(base[key]))
    table.add_row("bits per weight", f"{result['bits_per_weight']:.2f}", "")
    table.add_row("perplexity", f"{result['perplexity']:.4f}", f"{result['base_perplexity']:.4f}")
    table.add_row("  ratio", with_interval(result, "perplexity_ratio", ".4f"), "")
    table.add_row("top-1 agreement", f"{100 * result['top1_agreement']:.2f} %", "")
    for name, key in (
        ("mean", "kl_mean"),
        ("median", "kl_p50"),
        ("99th percentile", "kl_p99"),
        ("max", "kl_max"),
    ):
        table.add_row(f"KL, {name} (nats)", with_interval(result, key, ".3g"), "")
    return table


def with_interval(result: Mapping[str, Any], key: str, form: str) -> str:
    """A figure and, where there is one, its interval (`Quality` says what that holds)."""
    limits = result.get(f"{key}_ci95")
    return f"{result[key]:{form}}" + (f" ({limits[0]:{form}} to {limits[1]:{form}})" if limits else "")
