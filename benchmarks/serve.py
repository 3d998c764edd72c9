"""Measures gristmill's server beside other CPU servers: one load generator, one machine, one run.

Each server is started alone and stopped while another has its turn. In every round and for every number of
users all get the same requests, in turns. Writes JSON and a plot. Measure on a machine that does nothing
else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from harness import load, servers
from harness.environments import HERE, Say, SetupError
from harness.remote import end_on_sigterm
from harness.revision import commit
from harness.servers import Server

OUT = HERE / "results" / "serve.json"
PLOT = HERE.parent / "docs" / "serve.png"
USERS = (1, 4, 16, 64)
REQUESTS = {1: 16, 4: 48, 16: 144, 64: 384}
"""Requests of a turn by users; the first of every user only warm up."""
PREFIX_TOKENS = 1000
TAIL_TOKENS = 16
SEED = 20
LIMIT_S = 300.0
OURS = "gristmill/"


def main() -> int:
    """Runs the command line; the exit status."""
    arguments = _arguments()
    if arguments.summary:
        document = json.loads(arguments.json.read_text())
        print("\n".join([*table(document), *check_lines(document["checks"])]))
        return 0
    if arguments.plot and find_spec("matplotlib") is None:
        print("serve: the plot needs matplotlib (the extra [dev]); --no-plot goes without", file=sys.stderr)
        return 1
    end_on_sigterm()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.0f} s] {text}", file=sys.stderr, flush=True)

    try:
        document = asyncio.run(measure(arguments, say))
    except SetupError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    say(f"wrote {arguments.json}")
    if arguments.plot:
        plot(document, PLOT)
        say(f"wrote {PLOT}")
    print("\n".join([*table(document), *check_lines(document["checks"])]))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="servers whose name holds TEXT, such as gristmill/int4 or vllm; may be repeated",
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of every server (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every server (default 2)")
    parser.add_argument(
        "--users",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        default=USERS,
        metavar="N,N",
        help="numbers of users (default 1,4,16,64)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one round, a third of the requests, not more than 16 users"
    )
    parser.add_argument(
        "--prefix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"time to the first token of {PREFIX_TOKENS} shared tokens, first and second time",
    )
    parser.add_argument("--json", type=Path, default=OUT, metavar="PATH", help="the result")
    parser.add_argument(
        "--plot", action=argparse.BooleanOptionalAction, default=True, help="write docs/serve.png"
    )
    parser.add_argument("--summary", action="store_true", help="measure nothing; print what the results say")
    return parser.parse_args()


class Entry:
    """One server and what was measured of it."""

    def __init__(self, kind: servers.Kind) -> None:
        self.kind = kind
        self.server: Server | None = None
        self.failure = ""
        self.samples: dict[int, list[dict[str, Any]]] = {}
        self.prefix: dict[str, Any] | None = None
        self.memory = 0

    def fail(self, reason: str) -> None:
        """No figures any more; those there are stay."""
        self.failure = reason
        self.close()

    def close(self) -> None:
        """Ends the server."""
        if self.server is not None:
            self.server.close()

    def result(self) -> dict[str, Any]:
        """As it goes into the JSON."""
        return {
            "name": self.kind.name,
            "version": self.kind.version(),
            "settings": self.kind.settings,
            "start_s": self.server.start_s if self.server else None,
            "private_bytes": self.memory,
            "figures": {str(users): summary(samples) for users, samples in self.samples.items()},
            "prefix": self.prefix,
            "failure": self.failure,
        }


def summary(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds of every number, and the samples."""
    names = [name for name, value in samples[0].items() if not isinstance(value, dict)]
    values = {name: [s[name] for s in samples if s[name] is not None] for name in names}
    return {**{name: median(v) if v else None for name, v in values.items()}, "samples": list(samples)}


async def measure(arguments: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Measures what was asked for: the JSON document."""
    from gristmill.bench import machine
    from gristmill.bench.host import load_average

    before, begin = load_average(), time.time()
    revision = commit(HERE.parent)  # others may commit while this runs
    only = arguments.only
    entries = [Entry(k) for k in servers.kinds() if not only or any(text in k.name for text in only)]
    if not entries:
        raise SetupError("no server has such a name")
    rounds = 1 if arguments.quick else arguments.rounds
    levels = [n for n in arguments.users if n <= (16 if arguments.quick else servers.MAX_USERS)]
    for entry in entries:
        entry.kind.prepare(say)
    prompts = load.Prompts(load.demo_ids(), SEED)
    warm = prompts.take(4)
    try:
        for entry in entries:
            await start(entry, warm, arguments.threads, say)
        for turn in range(rounds):
            for users in levels:
                count = REQUESTS.get(users, 8 * users)
                asks = prompts.take(max(2 * users + 2, count // 3) if arguments.quick else count)
                # Nobody is always first.
                for place in range(len(entries)):
                    entry = entries[(place + turn) % len(entries)]
                    await have_turn(entry, asks, users, f"round {turn + 1}, {users} users", say)
        if arguments.prefix:
            for entry in entries:
                await have_prefix(entry, prompts, say)
    finally:
        for entry in entries:
            entry.close()
    document: dict[str, Any] = {
        "version": 1,
        "date": time.strftime("%Y-%m-%d", time.gmtime(begin)),
        "seconds": time.time() - begin,
        **revision,
        "machine": {**machine(), "load_average_before": before},
        "settings": {
            "rounds": rounds,
            "threads": arguments.threads,
            "users": levels,
            "prompt_tokens": load.PROMPT_TOKENS,
            "output_tokens": load.OUTPUT_TOKENS,
            "requests": {str(n): REQUESTS.get(n, 8 * n) for n in levels},
            "quick": arguments.quick,
            "sampling": "greedy, end of text ignored, streamed, prompts as token ids",
        },
        "entries": [entry.result() for entry in entries],
    }
    document["checks"] = checks(document)
    return document


async def start(entry: Entry, warm: Sequence[load.Ask], threads: int, say: Say) -> None:
    """Starts a server, lets it answer a few requests, and stops it until its turn."""
    say(f"{entry.kind.name}: starting")
    entry.server = server = Server(entry.kind, threads)
    try:
        await server.wait_ready()
    except SetupError as error:
        say(str(error))
        entry.fail(str(error))
        return
    for ask in warm:
        outcome = await load.complete(server.address, ask)
        if outcome.error:
            say(f"{entry.kind.name}: {outcome.error}")
            entry.fail(outcome.error)
            return
    say(f"{entry.kind.name}: ready after {server.start_s:.1f} s")
    server.pause()


async def have_turn(entry: Entry, asks: Sequence[load.Ask], users: int, label: str, say: Say) -> None:
    """One load on one server; its figures become a sample."""
    server = entry.server
    if entry.failure or server is None:
        return
    server.resume()
    await asyncio.sleep(0.5)
    run = await load.closed_loop(server.address, asks, users, limit_s=LIMIT_S)
    if not server.alive():
        entry.fail(f"the server ended at {users} users")
        say(f"{entry.kind.name}: {entry.failure}")
        return
    entry.memory = max(entry.memory, server.memory_bytes())
    server.pause()
    try:
        found = load.figures(run)
    except ValueError as error:
        say(f"{label}: {entry.kind.name}: {error}")
        return
    entry.samples.setdefault(users, []).append(found)
    say(
        f"{label}: {entry.kind.name}: {found['output_tokens_per_s']:.0f} tokens/s, "
        f"TTFT {found['ttft_ms_p50'] or 0:.0f} ms, TPOT {found['tpot_ms_p50'] or 0:.1f} ms (p99 "
        f"{found['tpot_ms_p99'] or 0:.1f}), {found['failed']} failed, {found['short']} short"
    )


async def have_prefix(entry: Entry, prompts: load.Prompts, say: Say) -> None:
    """Time to the first token after 1,000 tokens, new and then seen before with another end; medians of 5."""
    server = entry.server
    if entry.failure or server is None:
        return
    server.resume()
    await asyncio.sleep(0.5)
    sizes = (PREFIX_TOKENS, PREFIX_TOKENS)
    tail = (TAIL_TOKENS, TAIL_TOKENS)
    first, second, several, cached = [], [], [], []
    for _ in range(5):
        shared, other = prompts.take(2, sizes, (8, 8))
        ends = prompts.take(2, tail, (8, 8))
        both = [load.Ask(shared.prompt + end.prompt, 8) for end in ends]
        new = await load.complete(server.address, both[0])
        again = await load.complete(server.address, both[1])
        forked = await load.complete(server.address, load.Ask(other.prompt, 8), extra={"n": 4})
        if new.error or again.error:
            entry.prefix = {"failure": new.error or again.error}
            break
        first.append(1000 * new.ttft)
        second.append(1000 * again.ttft)
        cached.append(again.cached)
        if not forked.error:
            several.append(1000 * forked.ttft)
    else:
        entry.prefix = {
            "prefix_tokens": PREFIX_TOKENS,
            "ttft_ms_first": median(first),
            "ttft_ms_second": median(second),
            "cached_tokens": median(cached),
            "ttft_ms_n4": median(several) if several else None,
            "samples": {"first": first, "second": second, "n4": several},
        }
    server.pause()
    say(f"{entry.kind.name}: prefix {json.dumps(entry.prefix)}")


def checks(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the figures say of the targets; those that nothing was measured for are left out."""
    entries = {entry["name"]: entry for entry in document["entries"]}
    peers = [entry for name, entry in entries.items() if not name.startswith(OURS)]
    result = []

    def rate(entry: Mapping[str, Any], name: str) -> float | None:
        value = entry["figures"].get("16", {}).get(name)
        return None if value is None else float(value)

    for name, entry in entries.items():
        if not name.startswith(OURS):
            continue
        ours, theirs = (
            rate(entry, "output_tokens_per_s"),
            [value for peer in peers if (value := rate(peer, "output_tokens_per_s"))],
        )
        if ours and theirs:
            ratio = ours / max(theirs)
            result.append(
                _check(f"{name}: tokens/s at 16 users against the best peer", ratio, "at least 3", ratio >= 3)
            )
        ours, theirs = (
            rate(entry, "tpot_ms_p99"),
            [value for peer in peers if (value := rate(peer, "tpot_ms_p99"))],
        )
        if ours and theirs:
            ratio = ours / min(theirs)
            result.append(
                _check(f"{name}: p99 TPOT at 16 users against the least peer", ratio, "at most 1", ratio <= 1)
            )
        if entry["prefix"] and "ttft_ms_second" in entry["prefix"]:
            before, after = entry["prefix"]["ttft_ms_first"], entry["prefix"]["ttft_ms_second"]
            limit = max(0.1 * before, 15.0)
            result.append(
                _check(
                    f"{name}: ms to the first token, prefix seen",
                    after,
                    f"at most {limit:.1f}",
                    after <= limit,
                )
            )
        failed = sum(sample["failed"] for f in entry["figures"].values() for sample in f["samples"])
        result.append(_check(f"{name}: failed requests", failed, "none", failed == 0))
    return result


def _check(what: str, value: float, target: str, met: bool) -> dict[str, Any]:
    return {"what": what, "value": value, "target": target, "met": met}


def check_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The checks as lines of text."""
    return [
        f"{'met    ' if row['met'] else 'NOT MET'} {row['what']}: {row['value']:.3g} ({row['target']})"
        for row in rows
    ]


COLUMNS = (
    ("tokens/s", "output_tokens_per_s"),
    ("requests/s", "requests_per_s"),
    ("TTFT p50", "ttft_ms_p50"),
    ("TTFT p99", "ttft_ms_p99"),
    ("TPOT p50", "tpot_ms_p50"),
    ("TPOT p99", "tpot_ms_p99"),
    ("gap p99", "gap_ms_p99"),
    ("failed", "failed"),
)


def table(document: Mapping[str, Any]) -> list[str]:
    """The figures as a Markdown table; times in ms."""
    names = " | ".join(title for title, _ in COLUMNS)
    lines = [f"| users | server | {names} |", f"| ---: | --- |{' ---: |' * len(COLUMNS)}"]
    for users in document["settings"]["users"]:
        for entry in document["entries"]:
            found = entry["figures"].get(str(users))
            if not found:
                continue
            cells = [_number(found[key]) for _, key in COLUMNS]
            name = f"**{entry['name']}**" if entry["name"].startswith(OURS) else entry["name"]
            lines.append(f"| {users} | {name} | {' | '.join(cells)} |")
    lines += [f"\n{e['name']}: {e['failure']}." for e in document["entries"] if e["failure"]]
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Tokens per second, TTFT and TPOT over users, as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    panels = (
        ("output tokens/s", "output_tokens_per_s", None),
        ("TTFT, ms: p50, p99 dashed", "ttft_ms_p50", "ttft_ms_p99"),
        ("TPOT, ms: p50, p99 dashed", "tpot_ms_p50", "tpot_ms_p99"),
    )
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    for axis, (label, key, other) in zip(figure.subplots(1, 3), panels, strict=True):
        for index, entry in enumerate(document["entries"]):
            users = [int(n) for n in entry["figures"]]
            width = 2.2 if entry["name"].startswith(OURS) else 1.2
            for name, style in ((key, "o-"), (other, "--")):
                if name:
                    values = [entry["figures"][str(n)][name] for n in users]
                    axis.plot(
                        users,
                        [float("nan") if v is None else v for v in values],
                        style,
                        color=f"C{index}",
                        linewidth=width,
                        label=entry["name"] if name == key else None,
                    )
        axis.set_xscale("log", base=2)
        axis.set_xticks(document["settings"]["users"], [str(n) for n in document["settings"]["users"]])
        axis.set_yscale("log")
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("users", fontsize=8)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    machine, settings = document["machine"], document["settings"]
    figure.suptitle(
        "SmolLM2-135M, prompts of {}–{} tokens, ".format(*settings["prompt_tokens"])
        + "answers of {}–{}; ".format(*settings["output_tokens"])
        + f"{machine['cpu']}, "
        f"{settings['threads']} threads, medians of {settings['rounds']} rounds, {document['date']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
