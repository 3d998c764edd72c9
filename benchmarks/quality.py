"""Compares the logits of every engine and mode with the base's on one text, and writes JSON.

The base is gristmill with the file's weights dequantised to float32, float32 activations and a float32 KV
cache; Transformers in float32, on weights dequantised by the gguf package, is among the compared. Text and
figures are those of `gristmill evaluate`: independent windows, KL(base || other) over the whole vocabulary in
nats, share of positions with the same best token, perplexity.
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
from harness import plan
from harness.environments import SetupError
from harness.files import DEMO, ensure_file
from harness.measure import Record, Say, open_record
from harness.plan import Entry
from harness.remote import Refused, choose_cpus, end_on_sigterm
from numpy.typing import NDArray

from gristmill.errors import GristmillError
from gristmill.evaluate.metrics import Quality
from gristmill.evaluate.text import builtin_text, windows
from gristmill.io.convert import prepare
from gristmill.io.tokenizer import Tokenizer

OUT = Path(__file__).resolve().parent / "results" / "quality.json"
WINDOW = 512
OURS = (
    ("stored", "exact", "f32"),
    ("stored", "bf16", "f32"),
    ("stored", "bf16", "bf16"),
    ("stored", "fast", "f32"),
    ("stored", "fast", "bf16"),
    ("int8", "exact", "f32"),
    ("int8", "fast", "bf16"),
    ("int4", "exact", "f32"),
    ("int4", "fast", "bf16"),
    ("bf16", "bf16", "bf16"),
    ("f32", "exact", "bf16"),
)
"""gristmill's compared modes: weights, activations, KV cache."""
BASE = ("f32", "exact", "f32")


def entries() -> list[Entry]:
    """The base first, then gristmill's modes, then the peers."""
    ours = [
        Entry(
            "gristmill",
            f"{weights}-{activations}-kv-{kv}",
            "",
            DEMO,
            "model.gguf",
            (),
            options={"weights": weights, "activations": activations, "kv_dtype": kv},
        )
        for weights, activations, kv in (BASE, *OURS)
    ]
    peers = [e for e in plan.entries() if e.engine != "gristmill" and e.group == DEMO]
    return ours + peers


def main() -> int:
    """Runs the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="entries whose name holds TEXT"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the text (default 4096)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every engine (default 2)")
    parser.add_argument("--json", type=Path, default=OUT, metavar="PATH", help="the result")
    arguments = parser.parse_args()
    end_on_sigterm()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.0f} s] {text}", file=sys.stderr, flush=True)

    first, *others = entries()
    chosen = [e for e in others if not arguments.only or any(t in e.name for t in arguments.only)]
    try:
        result = run(first, chosen, tokens=arguments.tokens, threads=arguments.threads, say=say)
    except (SetupError, Refused, GristmillError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    say(f"wrote {arguments.json}")
    return 0


def run(base: Entry, others: Sequence[Entry], *, tokens: int, threads: int, say: Say) -> dict[str, Any]:
    """Compares every entry with the base, one after another: the JSON document."""
    text = builtin_text()
    path = prepare(str(ensure_file(f"{DEMO}/model.gguf", say)))
    pieces = windows(Tokenizer.load(path), text, tokens, WINDOW)
    rows = []
    with tempfile.TemporaryDirectory(prefix="gristmill-quality-") as scratch:
        wanted = [Path(scratch) / f"base-{index}.npy" for index in range(len(pieces))]
        record = collect(base, pieces, wanted, threads=threads, say=say)
        if record.failure:
            raise SetupError(f"the base has no logits: {record.failure['reason']}")
        for entry in others:
            rows.append(_row(entry, pieces, wanted, Path(scratch), threads=threads, say=say))
    return {
        "version": 1,
        "base": base.name,
        "text": text.name,
        "text_sha256": text.sha256,
        "window": WINDOW,
        "tokens": sum(len(piece) for piece in pieces),
        "entries": rows,
    }


def collect(
    entry: Entry, pieces: Sequence[NDArray[np.int32]], outputs: Sequence[Path], *, threads: int, say: Say
) -> Record:
    """Has an entry write its logits of every window; the record says what failed."""
    record = Record(entry)
    open_record(record, threads, choose_cpus(threads), say)
    try:
        for piece, output in zip(pieces, outputs, strict=True):
            if record.remote is not None:
                record.remote.ask({"op": "logits", "tokens": piece.tolist(), "output": str(output)})
    except Refused as error:
        record.fail(error.kind, str(error))
        say(f"{entry.name}: {error.kind}: {error}")
    finally:
        record.close()
    return record


def _row(
    entry: Entry,
    pieces: Sequence[NDArray[np.int32]],
    base: Sequence[Path],
    scratch: Path,
    *,
    threads: int,
    say: Say,
) -> dict[str, Any]:
    found = [scratch / f"other-{index}.npy" for index in range(len(pieces))]
    record = collect(entry, pieces, found, threads=threads, say=say)
    row: dict[str, Any] = {
        "name": entry.name,
        "engine": entry.engine,
        "mode": entry.mode,
        **entry.options,
        **record.info,
        "figures": None,
        "failure": record.failure,
    }
    if record.failure is None:
        try:
            row["figures"] = compare(pieces, base, found)
            figures = row["figures"]
            say(f"{entry.name}: KL {figures['kl_mean']:.3g}, top-1 {100 * figures['top1_agreement']:.2f} %")
        except GristmillError as error:
            row["failure"] = {"kind": "error", "reason": str(error)}
            say(f"{entry.name}: {error}")
    for path in found:
        path.unlink(missing_ok=True)
    return row


def compare(
    pieces: Sequence[NDArray[np.int32]], base: Sequence[Path], other: Sequence[Path]
) -> dict[str, Any]:
    """The figures of saved logits [tokens, vocab] of windows against the base's.

    Columns past the base's vocabulary, which some engines pad with, are left out. GristmillError if logits
    are missing or not finite.
    """
    quality = Quality()
    for piece, first, second in zip(pieces, base, other, strict=True):
        expected, found = np.load(first, mmap_mode="r"), np.load(second, mmap_mode="r")
        if found.shape[0] != len(piece) or found.shape[1] < expected.shape[1]:
            raise GristmillError(f"logits of shape {found.shape} do not go with the base's {expected.shape}")
        following = np.full(len(piece), -1, np.int64)
        following[:-1] = piece[1:]
        quality.add(expected, found[:, : expected.shape[1]], following)
    return quality.figures()


if __name__ == "__main__":
    sys.exit(main())
