"""`python -m gristmill.demo`: asks the demo model a question, then measures all its modes on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.table import Table

MODEL = "smollm2"
QUESTION = "What does a grist mill do?"
MODES = ("f32", "bf16", "int8", "int4", "stored")
PREFILL, CONTEXT = 512, 512
TOKENS = 1024
REPEATS = 3


def main() -> int:
    """Runs the demonstration; the exit status."""
    from rich.console import Console

    from gristmill.errors import GristmillError

    console = Console()
    try:
        begin = time.perf_counter()
        ask(console, MODEL)
        rows = measure(console, MODEL)
        console.print(table(rows))
        console.print(f"{notes(rows)} {time.perf_counter() - begin:.0f} s in all.", highlight=False)
    except GristmillError as error:
        print(f"gristmill: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def ask(console: Console, model: str, max_tokens: int = 120) -> str:
    """Loads the model as stored, prints the question, and the answer as it comes; the answer."""
    import gristmill

    with _bar(console) as bar:
        loaded = gristmill.load(model, progress=_Track(bar, "getting the model"))
    with loaded:
        console.print(f"[bold]{QUESTION}[/bold]")
        result = loaded.generate(
            QUESTION,
            max_tokens=max_tokens,
            temperature=0.0,
            on_text=lambda text: console.print(text, end="", markup=False, highlight=False, soft_wrap=True),
        )
        times = result.timings
        console.print(
            f"\n[dim]{result.completion_tokens} tokens, {times.decode_tokens_per_s:.0f} tokens/s; loaded in "
            f"{times.load_s:.2f} s, first token {1000 * times.first_token_s:.0f} ms later[/dim]\n",
            soft_wrap=True,
        )
    return result.text


def measure(
    console: Console,
    model: str,
    modes: Sequence[str] = MODES,
    *,
    tokens: int = TOKENS,
    prefill: int = PREFILL,
    context: int = CONTEXT,
    repeats: int = REPEATS,
    decode_steps: int = 64,
) -> list[dict[str, Any]]:
    """Per mode: its name as `weights`, the `speed` of `bench.run`, the `quality` of `evaluate.run`."""
    from gristmill import bench, evaluate

    rows = []
    with _bar(console) as bar:
        for index, weights in enumerate(modes):
            if not console.is_terminal:
                console.print(f"measuring {weights} ({index + 1} of {len(modes)})", highlight=False)
            speed = bench.run(
                model,
                weights=weights,
                prefill=(prefill,),
                decode=((1, context),),
                repeats=repeats,
                decode_steps=decode_steps,
                progress=_Track(bar, f"{weights}: speed"),
            )
            quality = evaluate.run(
                model, weights=weights, tokens=tokens, progress=_Track(bar, f"{weights}: quality")
            )
            rows.append({"weights": weights, "speed": speed, "quality": quality})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """What `measure` found, a line per mode."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    machine, first = rows[0]["speed"]["machine"], rows[0]["speed"]["modes"]
    result = Table(
        title=f"{machine['cpu']}, {first['threads']} threads, kernels {first['level']}",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_edge=False,
    )
    result.add_column("\nweights", no_wrap=True)
    for name in (
        "arith-\nmetic",
        "\nbits",
        "\nMB",
        "prefill\ntok/s",
        "decode\ntok/s",
        "roof-\nline",
        "mean KL\nnats",
        "\ntop-1",
        "perplex-\nity",
    ):
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        speed, quality = row["speed"], row["quality"]
        modes, decode = speed["modes"], speed["decode"][0]
        result.add_row(
            row["weights"],
            modes["arithmetic"].partition(" ")[0] + ("*" if _two_arithmetics(row) else ""),
            f"{modes['bits_per_weight']:.2f}",
            f"{speed['weight_bytes'] / 1e6:,.0f}",
            f"{speed['prefill'][0]['tokens_per_s']:,.0f}",
            f"{decode['tokens_per_s']:,.0f}",
            f"{100 * decode['roofline_fraction']:.0f} %",
            f"{quality['kl_mean']:.2g}",
            f"{100 * quality['top1_agreement']:.1f} %",
            f"{quality['perplexity']:.2f}",
        )
    return result


def _two_arithmetics(row: dict[str, Any]) -> bool:
    modes = row["speed"]["modes"]
    return bool(modes["prompt_activations"] != modes["activations"])


def notes(rows: Sequence[dict[str, Any]]) -> str:
    """What the table's numbers are of."""
    speed, quality = rows[0]["speed"], rows[0]["quality"]
    prompt, decode = speed["prefill"][0], speed["decode"][0]
    prompts = {row["speed"]["modes"]["prompt_activations"] for row in rows if _two_arithmetics(row)}
    return "".join(f"*: prompts in {name}. " for name in sorted(prompts)) + (
        f"Prefill of {prompt['tokens']} tokens; decode at batch 1 after {decode['context']}; KV "
        f"{speed['modes']['kv_dtype']}; medians of {speed['repeats']}. Roofline: the step's bytes over "
        f"the read bandwidth of this process. KL and top-1 against the base (f32, exact; perplexity "
        f"{quality['base_perplexity']:.2f}) over {quality['tokens']} tokens of {quality['text']}."
    )


def _bar(console: Console) -> Bar:
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(TextColumn("{task.description}"), BarColumn(), console=console, transient=True)


class _Track:
    """Shows the progress of one piece of work as one line of a bar."""

    def __init__(self, bar: Bar, title: str) -> None:
        self._bar = bar
        self._title = title
        self._task = bar.add_task(title, total=None)

    def __call__(self, label: str, done: int, total: int) -> None:
        """As `gristmill.io.checkpoint.Progress` says."""
        self._bar.update(
            self._task,
            description=f"{self._title} ({label})",
            completed=done,
            total=total,
            visible=done < total,
        )


if __name__ == "__main__":
    sys.exit(main())
