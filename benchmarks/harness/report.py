"""Ratios, targets, tables and the plot, all from the JSON documents that the scripts wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .files import DEMO, LARGE
from .plan import BATCH, DECODE, LONG_BATCH, PREFILL, TITLES

Document = Mapping[str, Any]
MEGABYTE = 1e6
STARTUP_S = 0.6
STARTUP_BYTES = 150 * MEGABYTE


@dataclass(frozen=True)
class Check:
    """One thing the project set out to reach, and what was measured."""

    item: str
    what: str
    measured: float
    required: float
    at_most: bool = False
    against: str = ""
    per_round: tuple[float, ...] = ()

    @property
    def met(self) -> bool:
        """Whether the measured value is on the right side."""
        return self.measured <= self.required if self.at_most else self.measured >= self.required

    def as_json(self) -> dict[str, Any]:
        """All fields, and `met`."""
        return {**asdict(self), "met": self.met}


class Results:
    """A document of peers.py, looked up by entry and figure."""

    def __init__(self, document: Document) -> None:
        self.entries = {entry["name"]: entry for entry in document["entries"]}
        self.document = document

    def figure(self, name: str, figure: str, key: str = "tokens_per_s") -> float | None:
        """A median; None if it was not measured."""
        entry = self.entries.get(name)
        value = entry and entry["figures"].get(figure, {}).get(key)
        return float(value) if value else None

    def samples(self, name: str, figure: str, key: str = "tokens_per_s") -> list[float]:
        """A figure's samples, one a round."""
        entry = self.entries.get(name)
        found = entry["figures"].get(figure, {}).get("samples", []) if entry else []
        return [float(sample[key]) for sample in found if key in sample]

    def fastest(self, model: str, figure: str, key: str = "tokens_per_s") -> str | None:
        """The name of the fastest peer at a figure, with no instruction set forced."""
        rates = {
            name: self.figure(name, figure, key)
            for name, entry in self.entries.items()
            if entry["engine"] != "gristmill" and entry["model"] == model and entry["isa"] == "best"
        }
        known = {name: rate for name, rate in rates.items() if rate}
        return max(known, key=lambda name: known[name]) if known else None

    def ratio(
        self,
        item: str,
        required: float,
        ours: str,
        theirs: str | None,
        *,
        figure: str,
        key: str = "tokens_per_s",
    ) -> Iterator[Check]:
        """A check that `ours` is `required` times as fast as `theirs`; nothing if one was not measured."""
        mine = self.figure(ours, figure, key)
        other = self.figure(theirs, figure, key) if theirs else None
        if mine is None or other is None or theirs is None:
            return
        pairs = zip(self.samples(ours, figure, key), self.samples(theirs, figure, key), strict=False)
        label = f"{figure}{' with its prompts' if key == 'total_tokens_per_s' else ''}: {ours}"
        yield Check(item, label, mine / other, required, False, theirs, tuple(a / b for a, b in pairs))

    def fraction(self, item: str, required: float, ours: str, figure: str) -> Iterator[Check]:
        """A check of the roofline fraction."""
        value = self.figure(ours, figure, "roofline_fraction")
        if value is not None:
            yield Check(item, f"{figure}, fraction of the roofline: {ours}", value, required)


def checks(peers: Document, quality: Document | None = None, greedy: Document | None = None) -> list[Check]:
    """Every target that the documents have figures for."""
    found = list(_speed(Results(peers)))
    found += _startup(peers)
    if quality:
        found += _quality(quality)
    if greedy:
        found.append(Check("8", "texts equal to Transformers' in f32", greedy["equal"], greedy["prompts"]))
        found.append(Check("8", "differences that are no near ties", greedy["differences"], 0, True))
    return sorted(found, key=lambda check: check.item)


def _speed(results: Results) -> Iterator[Check]:
    ours = f"{DEMO}/gristmill"
    best = results.fastest(DEMO, DECODE.name)
    yield from results.ratio("1", 4.0, f"{ours}/int4", best, figure=DECODE.name)
    yield from results.ratio("1", 3.25, f"{ours}/stored", best, figure=DECODE.name)
    for mode in ("int4", "stored"):
        yield from results.fraction("1", 0.7, f"{ours}/{mode}", DECODE.name)
    best = results.fastest(DEMO, PREFILL.name)
    for mode, required in (("int8", 2.0), ("int4", 2.0), ("stored", 1.75), ("bf16", 1.75)):
        yield from results.ratio("2", required, f"{ours}/{mode}", best, figure=PREFILL.name)
    yield from results.ratio("2", 1.0, f"{ours}/f32", f"{DEMO}/transformers/f32", figure=PREFILL.name)
    vllm = f"{DEMO}/vllm/bf16"
    for mode in ("int4", "stored"):
        yield from results.ratio(
            "3", 6.0, f"{ours}/{mode}", vllm, figure=BATCH.name, key="total_tokens_per_s"
        )
        yield from results.ratio("3", 6.0, f"{ours}/{mode}", vllm, figure=BATCH.name)
        yield from results.ratio("3", 4.0, f"{ours}/{mode}", vllm, figure=LONG_BATCH.name)
    large = f"{LARGE}/gristmill/int4"
    yield from results.ratio("4", 1.75, large, results.fastest(LARGE, DECODE.name), figure=DECODE.name)
    yield from results.fraction("4", 0.75, large, DECODE.name)
    yield from results.ratio("4", 5.0, large, f"{LARGE}/llamacpp/q4_0", figure=PREFILL.name)
    yield from results.ratio("4", 1.3, large, results.fastest(LARGE, PREFILL.name), figure=PREFILL.name)
    for mode, theirs in (("stored", "q4_1"), ("int4", "q4_0")):
        other = f"{DEMO}/llamacpp/{theirs}/avx2"
        yield from results.ratio("7", 1.0, f"{ours}/{mode}/avx2", other, figure=DECODE.name)


def _startup(peers: Document) -> Iterator[Check]:
    startup = peers.get("startup")
    if not startup or "first_token_s" not in startup:
        return
    yield Check("5", "process start to first token, s", startup["first_token_s"], STARTUP_S, True)
    limit = startup["weight_bytes"] + STARTUP_BYTES
    yield Check("5", "peak RSS, bytes", startup["peak_rss_bytes"], limit, True)


def _quality(quality: Document) -> Iterator[Check]:
    rows = {entry["name"]: entry["figures"] for entry in quality["entries"] if entry["figures"]}
    ours = f"{DEMO}/gristmill"
    default = rows.get(f"{ours}/stored-fast-kv-bf16")
    for theirs in ("q4_1", "q4_0"):
        other = rows.get(f"{DEMO}/llamacpp/{theirs}")
        if default and other:
            limit = other["kl_mean"]
            yield Check(
                "1", "KL of stored, fast", default["kl_mean"], limit, True, f"{DEMO}/llamacpp/{theirs}"
            )
    for mode, required in (("stored-exact-kv-f32", 1e-6), ("stored-bf16-kv-f32", 1e-3)):
        if f"{ours}/{mode}" in rows:
            yield Check("6", f"KL of {mode}", rows[f"{ours}/{mode}"]["kl_mean"], required, True)


def check_lines(found: Sequence[Check]) -> list[str]:
    """The checks as lines for people."""
    lines = []
    for check in found:
        sign = "<=" if check.at_most else ">="
        against = f" against {check.against}" if check.against else ""
        spread = (
            f" (rounds {min(check.per_round):.2f} to {max(check.per_round):.2f})" if check.per_round else ""
        )
        verdict = "met" if check.met else "NOT MET"
        values = f"{check.measured:.4g}{spread} {sign} {check.required:.4g}"
        lines.append(f"{check.item}  {check.what}{against}: {values}  {verdict}")
    return lines


def title(entry: Mapping[str, Any]) -> str:
    """An entry's name for people."""
    engine, mode = TITLES[entry["engine"]], entry["mode"]
    named = {"llamacpp": mode.upper(), "gristmill": mode}.get(entry["engine"], mode)
    return f"{engine} {named}"


def _number(value: float | None) -> str:
    return "–" if not value else f"{value:,.0f}"


def speed_table(peers: Document, quality: Document | None) -> list[str]:
    """The demo model's figures as a Markdown table, gristmill first."""
    results = Results(peers)
    measured = {}
    for row in quality["entries"] if quality else ():
        name = (
            row["name"]
            .replace("-fast-kv-bf16", "")
            .replace("-bf16-kv-bf16", "")
            .replace("-exact-kv-bf16", "")
        )
        # "stored" is the default mode, fast; its other arithmetics have rows of their own.
        if row["figures"] and ("gristmill" not in name or "stored-bf16" not in row["name"]):
            measured[name] = row["figures"]
    lines = [
        "| tokens/s | MB | prefill 512 | decode | batch 16 | batch 16 at 512 | KL | top-1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for entry in peers["entries"]:
        if entry["model"] != DEMO or entry["isa"] != "best":
            continue
        name = entry["name"]
        figures = measured.get(name)
        cells = [
            f"{entry['weights_bytes'] / MEGABYTE:.0f}" if entry.get("weights_bytes") else "–",
            _number(results.figure(name, PREFILL.name)),
            _number(results.figure(name, DECODE.name)),
            _number(results.figure(name, BATCH.name, "total_tokens_per_s")),
            _number(results.figure(name, LONG_BATCH.name)),
            f"{figures['kl_mean']:.2g}" if figures else "–",
            f"{100 * figures['top1_agreement']:.1f} %" if figures else "–",
        ]
        shown = f"**{title(entry)}**" if entry["engine"] == "gristmill" else title(entry)
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return lines


def small_table(peers: Document, wanted: Sequence[Mapping[str, Any]], label: str) -> list[str]:
    """Prefill and decode of some entries as a Markdown table."""
    results = Results(peers)
    lines = [f"| {label} | MB | prefill 512 | decode |", "| --- | ---: | ---: | ---: |"]
    for entry in wanted:
        name = entry["name"]
        if entry["failure"] and not entry["figures"]:
            lines.append(f"| {title(entry)} | – | {entry['failure']['reason']} | – |")
            continue
        size = entry.get("weights_bytes", 0) / MEGABYTE
        rates = [_number(results.figure(name, shape.name)) for shape in (PREFILL, DECODE)]
        lines.append(f"| {title(entry)} | {size:,.0f} | {' | '.join(rates)} |")
    return lines


def plot(peers: Document, path: Path) -> None:
    """Bars of every engine and mode at the main figures, as a PNG. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    results = Results(peers)
    panels = [
        (DEMO, DECODE, "tokens_per_s", "SmolLM2-135M: decode at 512"),
        (DEMO, PREFILL, "tokens_per_s", "SmolLM2-135M: prefill of 512"),
        (DEMO, BATCH, "total_tokens_per_s", "SmolLM2-135M: batch 16, prompts of 64 and 64 new"),
        (LARGE, DECODE, "tokens_per_s", "1 B random weights: decode at 512"),
    ]
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9), constrained_layout=True)
    for axis, (model, shape, key, label) in zip(axes.flat, panels, strict=True):
        rows = []
        for name, entry in results.entries.items():
            rate = results.figure(name, shape.name, key)
            if rate and entry["model"] == model and entry["isa"] == "best":
                spread = results.samples(name, shape.name, key)
                rows.append((rate, title(entry), entry["engine"] == "gristmill", min(spread), max(spread)))
        rows.sort()
        rates = [row[0] for row in rows]
        colours = ["#c2571a" if row[2] else "#8a97a6" for row in rows]
        errors = [[row[0] - row[3] for row in rows], [row[4] - row[0] for row in rows]]
        axis.barh([row[1] for row in rows], rates, color=colours, xerr=errors, ecolor="#444444")
        for index, rate in enumerate(rates):
            axis.text(max(rate, rows[index][4]), index, f" {rate:,.0f}", va="center", fontsize=8)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("tokens/s", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    machine, settings = peers["machine"], peers["settings"]
    figure.suptitle(
        f"{machine['cpu']}, {machine['level']} kernels, {settings['threads']} threads, medians and range of "
        f"{settings['rounds']} rounds, {peers['date']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
