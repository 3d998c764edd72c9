"""The demonstration in a reduced form: one question, one mode, few tokens."""

from __future__ import annotations

import io

from rich.console import Console

from gristmill import demo
from gristmill.backends.native import _native


def test_it_answers_and_measures():
    console = Console(width=80, file=io.StringIO())
    answer = demo.ask(console, demo.MODEL, max_tokens=8)
    rows = demo.measure(
        console, demo.MODEL, ("stored", "int4"), tokens=16, prefill=8, context=8, repeats=1, decode_steps=2
    )
    assert answer
    shown = console.file.getvalue()
    assert demo.QUESTION in shown
    assert answer.split()[0] in shown
    assert [row["weights"] for row in rows] == ["stored", "int4"]
    console.print(demo.table(rows))
    console.print(demo.notes(rows))
    shown = console.file.getvalue()
    assert "…" not in shown, "the table fits a terminal of 80 columns"
    lines = {words[0]: words for line in shown.splitlines() if (words := line.split())}
    two = _native.default_level().startswith("amx")
    assert lines["stored"][1:4] == ["int8*" if two else "int8", "5.74", "97"]
    assert lines["int4"][1:4] == ["int8*" if two else "int8", "4.50", "76"]
    assert ("*: prompts in bf16." in shown) == two
    assert float(lines["stored"][8]) < float(lines["int4"][8]), "KL grows as bits go"
