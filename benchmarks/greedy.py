"""Compares greedy texts: gristmill in float32 with Transformers in float32, token for token.

Prompts are pieces of the evaluation text. Where the two choose differently, both are asked for their logits
at that place: a near tie is one where each engine's own two candidates lie closer together than what float32
rounding explains. From there on the comparison goes on with Transformers' token, so that every later token
is compared too.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness.environments import SetupError
from harness.files import DEMO, ensure_file
from harness.measure import Record, Say, open_record
from harness.plan import Entry
from harness.remote import Refused, Remote, choose_cpus, end_on_sigterm

OUT = Path(__file__).resolve().parent / "results" / "greedy.json"
TIE = 1e-3
"""Logits closer than this may change places between two float32 programs that sum in another order."""
OURS = Entry(
    "gristmill",
    "f32",
    "",
    DEMO,
    "model.gguf",
    (),
    options={"activations": "exact", "kv_dtype": "f32"},
)
THEIRS = Entry("transformers", "f32", "transformers", DEMO, "hf", ())


def main() -> int:
    """Runs the command line; the exit status: 1 as well if a difference is no near tie."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=20, help="number of prompts (default 20)")
    parser.add_argument("--length", type=int, default=100, help="tokens of a prompt (default 100)")
    parser.add_argument("--new-tokens", type=int, default=100, help="tokens to generate (default 100)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, default=OUT, metavar="PATH", help="the result")
    arguments = parser.parse_args()
    end_on_sigterm()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.0f} s] {text}", file=sys.stderr, flush=True)

    try:
        result = run(
            arguments.prompts, arguments.length, arguments.new_tokens, threads=arguments.threads, say=say
        )
    except (SetupError, Refused) as error:
        print(f"greedy: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    say(
        f"{result['equal']} of {result['prompts']} texts are equal, {result['near_ties']} near ties, "
        f"{result['differences']} other differences; wrote {arguments.json}"
    )
    return 1 if result["differences"] else 0


def run(count: int, length: int, new_tokens: int, *, threads: int, say: Say) -> dict[str, Any]:
    """Compares `count` prompts of `length` tokens: the JSON document. Raises SetupError and Refused."""
    ids = json.loads(ensure_file(f"{DEMO}/tokens.json", say).read_text())["ids"]
    if count * length > len(ids):
        raise SetupError(f"the text has {len(ids)} tokens, {count * length} are wanted")
    prompts = [ids[i * length : (i + 1) * length] for i in range(count)]
    records = [Record(OURS), Record(THEIRS)]
    try:
        for record in records:
            open_record(record, threads, choose_cpus(threads), say)
            if record.remote is None:
                raise SetupError(f"{record.entry.name}: {(record.failure or {}).get('reason')}")
        ours, theirs = (record.remote for record in records)
        assert ours is not None  # checked above
        assert theirs is not None
        request = {"op": "continue", "prompts": prompts, "new_tokens": new_tokens}
        say("generating with both")
        mine, other = ours.ask(request), theirs.ask(request)
        rows = [
            {
                "text_equal": mine["texts"][i] == other["texts"][i],
                "events": audit(ours, theirs, prompts[i], mine["ids"][i], other["ids"][i]),
            }
            for i in range(count)
        ]
    finally:
        for record in records:
            record.close()
    events = [event for row in rows for event in row["events"]]
    for event in events:
        say(f"position {event['position']}: {event['ours']} against {event['theirs']}: {event['kind']}, "
            f"gaps {event['gap_ours']:.2g} and {event['gap_theirs']:.2g}")  # fmt: skip
    return {
        "version": 1,
        "versions": [record.info["versions"] for record in records],
        "prompts": count,
        "prompt_tokens": length,
        "new_tokens": new_tokens,
        "equal": sum(row["text_equal"] and not row["events"] for row in rows),
        "near_ties": sum(event["kind"] == "near tie" for event in events),
        "differences": sum(event["kind"] != "near tie" for event in events),
        "tie": TIE,
        "rows": rows,
    }


def audit(
    ours: Remote, theirs: Remote, prompt: Sequence[int], mine: Sequence[int], other: Sequence[int]
) -> list[dict[str, Any]]:
    """Every place where the texts part, with the gap between the two candidates in both engines' logits.

    After each, gristmill goes on from Transformers' text. A difference that is no near tie ends the audit.
    """
    events: list[dict[str, Any]] = []
    mine, other = list(mine), list(other)
    while (position := first_difference(mine, other)) is not None:
        before = [*prompt, *other[:position]]
        chosen = (mine[position], other[position])
        gaps = [_gap(engine, before, chosen) for engine in (ours, theirs)]
        tie = all(abs(gap) < TIE for gap in gaps)
        events.append(
            {
                "position": position,
                "ours": chosen[0],
                "theirs": chosen[1],
                "gap_ours": gaps[0],
                "gap_theirs": gaps[1],
                "kind": "near tie" if tie else "difference",
            }
        )
        if not tie:
            break
        mine = other[: position + 1]
        left = len(other) - len(mine)
        if left:
            request = {"op": "continue", "prompts": [[*prompt, *mine]], "new_tokens": left}
            mine = [*mine, *ours.ask(request)["ids"][0]]
    return events


def first_difference(mine: Sequence[int], other: Sequence[int]) -> int | None:
    """The first index at which two texts of one length differ; None if they do not."""
    pairs = zip(mine, other, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), None)


def _gap(engine: Remote, before: Sequence[int], chosen: tuple[int, int]) -> float:
    """Logit of the first candidate less that of the second, after these tokens."""
    with tempfile.TemporaryDirectory(prefix="gristmill-greedy-") as scratch:
        output = Path(scratch) / "logits.npy"
        engine.ask({"op": "logits", "tokens": list(before), "output": str(output)})
        last = np.load(output)[-1].astype(np.float64)
    return float(last[chosen[0]] - last[chosen[1]])


if __name__ == "__main__":
    sys.exit(main())
