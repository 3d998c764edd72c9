"""The phases of a start: the arithmetic on spans, the clock around a function, and one real start."""

from __future__ import annotations

import json
import sys
import types

import pytest

from gristmill import bench
from gristmill.bench import phases, trace
from gristmill.bench.trace import STEPS
from gristmill.errors import GristmillError, UsageError


def table(*spans: tuple[str, float, float], end: float = 110.0) -> dict[str, tuple[float, float]]:
    report = {"started": 101.0, "imported": 103.0, "spans": [list(span) for span in spans]}
    return phases.phase_table(100.0, end, report)


def test_phases_and_what_lies_between():
    found = table(("tokenizer", 104.0, 106.0), ("prefill", 106.0, 109.0))
    assert found == {
        "interpreter": (0.0, 1.0),
        "imports": (1.0, 2.0),
        "tokenizer": (4.0, 2.0),
        "prefill": (6.0, 3.0),
        "other": (10.0, 2.0),
    }


def test_time_spent_twice_at_once_counts_once_for_the_rest():
    found = table(
        ("tokenizer", 103.0, 107.0), ("weights and kernels", 104.0, 106.0), ("prefill", 106.0, 109.0)
    )
    assert found["weights and kernels"] == (4.0, 2.0)
    assert found["other"] == (10.0, 1.0)


def test_what_happens_after_the_first_byte_is_left_out():
    found = table(("prefill", 104.0, 120.0), ("tokenizer", 111.0, 112.0))
    assert found["prefill"] == (4.0, 6.0)
    assert "tokenizer" not in found
    assert found["other"][1] == pytest.approx(1.0)


def test_the_clock_keeps_the_first_call_and_the_result(monkeypatch):
    module = types.ModuleType("clocked_module")

    class Thing:
        def __init__(self, value: int) -> None:
            self.value = value

        @classmethod
        def make(cls, value: int) -> Thing:
            if value < 0:
                raise ValueError("negative")
            return cls(value)

    module.Thing = Thing
    monkeypatch.setitem(sys.modules, "clocked_module", module)
    spans: dict[str, tuple[float, float]] = {}
    trace._time("make", "clocked_module", "Thing.make", spans)
    trace._time("init", "clocked_module", "Thing.__init__", spans)
    with pytest.raises(ValueError, match="negative"):
        Thing.make(-1)
    first = spans["make"]
    assert Thing.make(3).value == 3
    assert spans["make"] == first
    assert spans["init"][0] <= spans["init"][1]


def test_every_step_names_something_that_exists():
    from importlib import import_module

    for _, module, function in STEPS:
        owner = import_module(module)
        *classes, attribute = function.split(".")
        for name in classes:
            owner = getattr(owner, name)
        assert attribute in vars(owner), (module, function)


def test_a_command_that_fails_is_reported_in_one_line():
    script = "import sys; print('gristmill: no such model', file=sys.stderr); sys.exit(1)"
    with pytest.raises(GristmillError, match=r"failed with status 1: gristmill: no such model$"):
        phases._first_byte([sys.executable, "-c", script])


def test_repeats_are_checked():
    with pytest.raises(UsageError):
        bench.startup("smollm2", repeats=0)


def test_a_real_start():
    result = bench.startup("smollm2", threads=1, repeats=1)
    names = [phase["name"] for phase in result["phases"]]
    assert names[:2] == ["interpreter", "imports"]
    assert set(names) == {"interpreter", "imports", "other"} | {name for name, _, _ in STEPS}
    assert all(phase["seconds"] >= 0 for phase in result["phases"])
    total = sum(phase["seconds"] for phase in result["phases"])
    assert total >= result["traced_first_token_s"] * 0.999
    assert result["peak_rss_bytes"] > 96_576_768
    assert result["first_token_s"] > 0
    json.dumps(result)
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(bench.render_startup(result))
    shown = console.export_text()
    assert all(name in shown for name in names)
