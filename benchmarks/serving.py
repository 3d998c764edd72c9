"""Fills the measured regions of docs/serving-benchmarks.md from the JSON files in `results/`."""

from __future__ import annotations

import json
import sys
from typing import Any

import clients
import serve
from harness.environments import HERE
from harness.pages import fill

PAGE = HERE.parent / "docs" / "serving-benchmarks.md"
RESULTS = HERE / "results"


def main() -> int:
    """Writes the page; a region without results stays as it is. The exit status."""
    text = PAGE.read_text()
    for name, lines in regions().items():
        text = fill(text, name, lines)
    PAGE.write_text(text)
    return 0


def _read(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


def regions() -> dict[str, list[str]]:
    """The lines of every region that there are results for."""
    found: dict[str, list[str]] = {}
    if document := _read("serve"):
        found["load"] = load_lines(document)
        found["prefix"] = prefix_lines(document)
    soak = _read("soak")
    if "soak" in soak:
        found["soak"] = soak_lines(soak["soak"])
    if "burst" in soak:
        found["burst"] = burst_lines(soak["burst"])
    if document := _read("clients"):
        found["clients"] = clients.table(document)
    return found


def _measured(document: dict[str, Any]) -> str:
    changed = " with changes" if document["changed"] else ""
    return f"{document['machine']['cpu']}, {document['date']}, commit {document['commit']}{changed}"


def load_lines(document: dict[str, Any]) -> list[str]:
    """The comparison: machine, table, what each server was told, targets."""
    settings = document["settings"]
    lines = [
        f"{_measured(document)}. {settings['threads']} threads for every server, medians of "
        f"{settings['rounds']} rounds; times in ms.",
        "",
        *serve.table(document),
        "",
        "![tokens per second and latencies over users](serve.png)",
        "",
    ]
    for entry in document["entries"]:
        memory = f", {entry['private_bytes'] / 1e6:,.0f} MB of its own" if entry["private_bytes"] else ""
        lines.append(f"- {entry['name']}: {entry['version']}; {entry['settings']}{memory}.")
    shares = [
        sample["generator_cpu_share"]
        for entry in document["entries"]
        for figures in entry["figures"].values()
        for sample in figures["samples"]
    ]
    if shares:
        lines += ["", f"The load generator took at most {max(shares):.1%} of one processor."]
    return [*lines, "", *(f"- {line}" for line in serve.check_lines(document["checks"]))]


def prefix_lines(document: dict[str, Any]) -> list[str]:
    """Time to the first token of a prompt whose first 1,000 tokens are new, then known."""
    lines = [
        "| server | new, ms | known, ms | tokens from the cache | new with n = 4, ms |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for entry in document["entries"]:
        found = entry["prefix"]
        if found and "ttft_ms_first" in found:
            several = f"{found['ttft_ms_n4']:.0f}" if found["ttft_ms_n4"] else "–"
            lines.append(
                f"| {entry['name']} | {found['ttft_ms_first']:.0f} | {found['ttft_ms_second']:.1f} | "
                f"{found['cached_tokens']:.0f} | {several} |"
            )
        elif found:
            lines.append(f"| {entry['name']} | {found['failure']} | | | |")
    return lines


def soak_lines(section: dict[str, Any]) -> list[str]:
    """What a soak saw, and its checks."""
    requests = ", ".join(f"{name} {count}" for name, count in sorted(section["requests"].items()))
    return [
        f"{_measured(section)}. {section['users']} users, {section['minutes']:g} minutes, weights "
        f"{section['weights']}: {section['tokens']:,} tokens ({section['tokens_per_s']:.0f} per second), "
        f"p99 TTFT {section['ttft_ms_p99'] or 0:.0f} ms, {section['canaries']} answers compared. "
        f"Requests: {requests}.",
        "",
        "![memory, KV memory, and numbers over time](soak.png)",
        "",
        *_checks(section),
    ]


def burst_lines(section: dict[str, Any]) -> list[str]:
    """What overload did, and its checks."""
    before, after = section["peak_requests_per_s"]
    first, last = section["batch_requests_per_s"]
    return [
        f"{_measured(section)}. Peak {before:.2f} requests/s before and {after:.2f} after, offered "
        f"{section['offered_requests_per_s']:.1f} for {section['minutes']:g} minutes with a queue of "
        f"{section['max_queue']}. As many as are let in at one moment, alone: {first:.2f} before and "
        f"{last:.2f} after.",
        "",
        *_checks(section),
    ]


def _checks(section: dict[str, Any]) -> list[str]:
    return [
        f"- {'met' if check['met'] else '**not met**'}: {check['what']}: {_shown(check['value'])}"
        for check in section["checks"]
    ]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
