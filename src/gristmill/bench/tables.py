"""Results of measurements as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def megabytes(count: float) -> str:
    """Bytes in units of 1,000,000, as sizes of model files are given."""
    return f"{count / 1e6:,.1f} MB"


def render(result: Mapping[str, Any]) -> Group:
    """Tables of the dictionary that `run` returns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    modes, about = result["modes"], result["machine"]
    same = modes["prompt_activations"] == modes["activations"]
    prompts = "" if same else f" ({modes['prompt_activations']} for prompts)"
    head = Text(
        f"{result['model']['name']}: weights {modes['weights']} "
        f"({modes['bits_per_weight']:.2f} bits per weight, {megabytes(result['weight_bytes'])}, "
        f"head {modes['head']}, in the {modes['weights_in']}), "
        f"activations {modes['activations']}{prompts}, KV {modes['kv_dtype']}\n"
        f"{about['cpu']}, {modes['threads']} threads, kernels {modes['level']}"
    )
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        show_edge=False,
        caption="decode: sequences x context; generate: through the whole engine",
        caption_justify="left",
    )
    for name in ("", "tokens/s", "generate", "roofline", "MB/step", "read GB/s", "Gop/s"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in result["prefill"]:
        table.add_row(
            f"prefill {row['tokens']}",
            f"{row['tokens_per_s']:,.0f}",
            "",
            "",
            "",
            "",
            f"{row['operations_per_s'] / 1e9:,.0f}",
        )
    for row in result["decode"]:
        table.add_row(
            f"decode {row['batch']} x {row['context']}",
            f"{row['tokens_per_s']:,.1f}",
            f"{row['generate_tokens_per_s']:,.1f}" if "generate_tokens_per_s" in row else "",
            f"{100 * row['roofline_fraction']:.0f} %",
            f"{row['bytes_per_step'] / 1e6:,.1f}",
            f"{row['bandwidth_bytes_per_s'] / 1e9:.1f}",
            "",
        )
    foot = Text(
        f"load {result['load_s']:.3f} s, first token {result['first_token_s']:.3f} s, "
        f"peak memory {megabytes(result['peak_rss_bytes'])}; medians of {result['repeats']}"
    )
    return Group(head, table, foot)


def render_startup(result: Mapping[str, Any]) -> Table:
    """A table of the dictionary that `startup` returns."""
    from rich.table import Table

    table = Table(title="from process start to first token, medians", title_justify="left")
    table.add_column("phase")
    table.add_column("ms", justify="right")
    for phase in result["phases"]:
        table.add_row(phase["name"], f"{1000 * phase['seconds']:.1f}")
    table.add_section()
    table.add_row("first token", f"{1000 * result['first_token_s']:.1f}")
    table.add_row("peak memory", megabytes(result["peak_rss_bytes"]))
    return table
