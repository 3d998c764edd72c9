"""Measures gristmill beside other CPU engines on this machine, taking turns, and writes JSON and a plot.

The first run makes a virtual environment for every peer and the model files they read, which takes longer
than the measurement. Each engine runs in a process of its own with the same number of threads on the same
processors, and is stopped while another has its turn. Measure on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness import measure, plan, report
from harness.environments import SetupError
from harness.files import DEMO, LARGE
from harness.remote import end_on_sigterm

OUT = Path(__file__).resolve().parent / "results" / "peers.json"
OTHERS = (OUT.with_name("quality.json"), OUT.with_name("greedy.json"))
PLOT = Path(__file__).resolve().parent.parent / "docs" / "peers.png"


def main() -> int:
    """Runs the command line; the exit status."""
    arguments = _arguments()
    if arguments.summary:
        return summary(arguments.json)
    if arguments.plot and find_spec("matplotlib") is None:
        print("peers: the plot needs matplotlib (the extra [dev]); --no-plot goes without", file=sys.stderr)
        return 1
    end_on_sigterm()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.0f} s] {text}", file=sys.stderr, flush=True)

    try:
        result = run(arguments, say)
    except SetupError as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    say(f"wrote {arguments.json}")
    if arguments.plot:
        report.plot(result, PLOT)
        say(f"wrote {PLOT}")
    return summary(arguments.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="entries whose name holds TEXT, such as gristmill/int4 or llamacpp; may be repeated",
    )
    parser.add_argument(
        "--figure",
        action="append",
        default=[],
        choices=[s.name for s in plan.SHAPES],
        help="this figure only; may be repeated",
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of every entry (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every engine (default 2)")
    parser.add_argument(
        "--quick", action="store_true", help="one round, 16 new tokens, without the 1 B model"
    )
    parser.add_argument("--skip-large", action="store_true", help="without the model of 1 B parameters")
    parser.add_argument(
        "--json",
        type=Path,
        default=OUT,
        metavar="PATH",
        help=f"the result (default {OUT.parent.name}/{OUT.name} beside this file)",
    )
    parser.add_argument(
        "--plot", action=argparse.BooleanOptionalAction, default=True, help="write docs/peers.png"
    )
    parser.add_argument(
        "--summary", action="store_true", help="measure nothing; print what the results say of the targets"
    )
    return parser.parse_args()


def summary(path: Path) -> int:
    """Prints every target that the results speak of, with those of quality.py and greedy.py beside them."""
    documents = [json.loads(p.read_text()) if p.exists() else None for p in (path, *OTHERS)]
    if documents[0] is None:
        print(f"peers: there is no {path}", file=sys.stderr)
        return 1
    print("\n".join(report.check_lines(report.checks(*documents))))
    return 0


def startup(threads: int, say: measure.Say) -> dict[str, Any]:
    """`gristmill bench --startup` of the demo model, and the bytes of its weights; or why there is none."""
    command = [
        sys.executable,
        "-m",
        "gristmill",
        "bench",
        DEMO,
        "--startup",
        "--json",
        "--threads",
        str(threads),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        say(f"start-up: {reason}")
        return {"failure": {"kind": "error", "reason": reason}}
    result = json.loads(done.stdout)
    from gristmill.io.checkpoint import Checkpoint
    from gristmill.io.convert import prepare

    say(f"start-up: {result['first_token_s']:.2f} s to the first token")
    return {**result, "weight_bytes": Checkpoint.open(prepare(DEMO)).weight_bytes}


def run(arguments: argparse.Namespace, say: measure.Say) -> dict[str, Any]:
    """Measures what was asked for: the JSON document."""
    from gristmill.bench import machine
    from gristmill.bench.host import load_average

    before = load_average()
    begin = time.time()
    chosen = [e for e in plan.entries() if not arguments.only or any(t in e.name for t in arguments.only)]
    if arguments.quick or arguments.skip_large:
        chosen = [e for e in chosen if e.model != LARGE]
    if not chosen:
        raise SetupError("no entry has such a name")
    records = [measure.Record(entry) for entry in chosen]
    settings = {
        "rounds": 1 if arguments.quick else arguments.rounds,
        "threads": arguments.threads,
        "new_tokens": 16 if arguments.quick else plan.NEW_TOKENS,
    }
    for group in dict.fromkeys(entry.group for entry in chosen):
        measure.run_group(
            [r for r in records if r.entry.group == group], **settings, only=arguments.figure, say=say
        )
    document = {
        "version": 1,
        "date": time.strftime("%Y-%m-%d", time.gmtime(begin)),
        "seconds": time.time() - begin,
        "machine": {**machine(), "load_average_before": before},
        "settings": {**settings, "shapes": {s.name: s.title for s in plan.SHAPES}},
        "entries": [record.result(plan.SHAPES) for record in records],
        "cannot": [{"engine": e, "what": what, "why": why} for e, what, why in plan.CANNOT],
    }
    if not (arguments.only or arguments.figure):
        document["startup"] = startup(arguments.threads, say)
    document["checks"] = [check.as_json() for check in report.checks(document)]
    return document


if __name__ == "__main__":
    sys.exit(main())
