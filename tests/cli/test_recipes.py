"""`compress`, `compare` and `methods` from the outside: what they write, their JSON and tables, the plot."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from gristmill.cli import main
from gristmill.io.checkpoint import Checkpoint
from gristmill.methods import method, names
from gristmill.methods.catalogue import describe
from gristmill.terminal import progress
from gristmill.terminal.recipes import method_table
from tests.cli.conftest import Gristmill, matches
from tests.cli.test_output import Screen

NONE = type(None)

W4 = "name: w4\nmethods: [{method: rtn, bits: 4, group: 64}]\n"
W4A8 = """
methods:
- {method: rtn, bits: 4, group: 64}
- {method: round_activations, bits: 8, group: 64}
"""

QUALITY = {
    "tokens": int,
    "text": str,
    "kl_mean": float,
    "kl_p99": float,
    "top1_agreement": float,
    "perplexity": float,
    "base_perplexity": float,
    "modes": dict,
    "base_modes": dict,
}
COMPRESSED = {
    "version": int,
    "model": str,
    "weights": str,
    "methods": [str],
    "calibration": NONE,
    "notes": [str],
    "source": dict,
    "gristmill": str,
    "identity": str,
    "bits_per_weight": float,
    "weight_bytes": int,
    "quality": QUALITY,
    "out": str,
    "seconds": float,
    "peak_rss_bytes": int,
}
ROW = {
    "name": str,
    "recipe": (str, NONE),
    "methods": [str],
    "bits_per_weight": float,
    "weight_bytes": int,
    "kl_mean": float,
    "kl_p99": float,
    "top1_agreement": float,
    "perplexity": float,
    "modes": dict,
    "prefill_tokens_per_s": float,
    "decode_tokens_per_s": float,
    "prefill_ratio": float,
    "decode_ratio": float,
    "pareto": bool,
}
COMPARED = {
    "machine": dict,
    "model": str,
    "text": str,
    "tokens": int,
    "base_perplexity": float,
    "context": int,
    "repeats": int,
    "results": [ROW],
}


def output_of(table: RenderableType) -> str:
    """A table as text, wide enough for every cell."""
    console = Console(file=io.StringIO(), width=200)
    with console.capture() as shown:
        console.print(table)
    return shown.get()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Gristmill:
    """The command line with an empty cache: nothing here needs the demo model."""
    return Gristmill(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two recipe files, the second named after its file: 4-bit weights, and with 8-bit inputs."""
    directory = tmp_path_factory.mktemp("recipes")
    (directory / "one.yaml").write_text(W4)
    (directory / "w4a8.yaml").write_text(W4A8)
    return str(directory / "one.yaml"), str(directory / "w4a8.yaml")


def test_compress(program: Gristmill, tiny: Path, recipes: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    made = program.json("compress", str(tiny), "-r", recipes[1], "-o", str(out))
    matches(made, COMPRESSED)
    assert (made["weights"], made["methods"], made["out"]) == ("w4a8", ["rtn", "round_activations"], str(out))
    assert made["quality"]["tokens"] == 4096
    assert 0 < made["quality"]["kl_mean"] < 0.5
    found = program.json("inspect", str(out), "--verify")
    assert found["supported"] is True
    assert found["kind"] == "checkpoint"
    assert found["weight_bytes"] == made["weight_bytes"]
    assert found["bits_per_weight"] == made["bits_per_weight"]
    assert {row["format"]: row["tensors"] for row in found["formats"]}["int4, group 64"] == 14
    # The rounding of inputs is part of what was written.
    nodes = program.json("inspect", str(out), "--program", "--layers")["nodes"]
    assert sum(node["op"] == "encode" for node in nodes) == 8
    assert "int4, group 64" in program.text("inspect", str(out))
    # It runs, and is not written over.
    answer = program.json("generate", str(out), "Once", "--raw", "-n", "3")
    assert answer["usage"]["completion_tokens"] == 3
    assert "exists already" in program.refused(2, "compress", str(tiny), "-r", "rtn", "-o", str(out))


def test_compress_shows_a_table_and_progress(
    tiny: Path, recipes: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, so that its clock makes every piece of work a long one."""
    screen, errors = Screen(), Screen()
    labels: set[str] = set()
    shown_by = progress.Bar.__call__

    def noting(bar: progress.Bar, label: str, done: int, total: int) -> None:
        labels.add(label)
        shown_by(bar, label, done, total)

    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", errors)
    monkeypatch.setattr(progress.Bar, "__call__", noting)
    monkeypatch.setattr(progress, "_LOOK_S", 0.0)
    monkeypatch.setattr(progress, "_LONG_S", 0.0)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["compress", str(tiny), "-r", recipes[0], "-o", str(out), "--no-evaluate"])
    assert ended.value.code == 0, errors.getvalue()
    assert {"converting", "rounding", "writing"} <= labels
    assert "converting" in errors.getvalue()  # the others may be over before the bar is drawn anew
    shown = screen.getvalue()
    for fact in (str(out), "rtn", "4.70", "of memory at most"):
        assert fact in shown
    assert "perplexity" not in shown
    assert Checkpoint.open(out).verify() > 0


def test_compare(program: Gristmill, tiny: Path, recipes: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["compare", str(tiny), "-o", str(out), "--tokens", "128", "--repeats", "1"]
    for recipe in recipes:
        arguments += ["-r", recipe]
    table = program.text(*arguments)
    for fact in ("bf16", "stored", "w4a8", "4.70", "1.00x", "perplexity"):
        assert fact in table
    png = (out / "pareto.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png[12:16] == b"IHDR"
    assert struct.unpack(">II", png[16:24]) == (1080, 720)
    assert png.endswith(b"IEND\xaeB`\x82")
    stored = json.loads((out / "compare.json").read_text())
    # Again, as JSON, from the directories that are there.
    (out / "pareto.png").unlink()
    written = (out / "w4" / "model.safetensors").stat().st_mtime_ns
    found = program.json(*arguments, "--no-plot")
    assert (out / "w4" / "model.safetensors").stat().st_mtime_ns == written
    assert not (out / "pareto.png").exists()
    assert json.loads((out / "compare.json").read_text()) == found
    for result in (stored, found):
        matches(result, COMPARED)
        assert [row["name"] for row in result["results"]] == ["bf16", "stored", "w4", "w4a8"]
        assert (result["tokens"], result["repeats"]) == (128, 1)
        assert result["results"][0]["decode_ratio"] == result["results"][0]["prefill_ratio"] == 1
        assert any(row["pareto"] for row in result["results"])
    for before, after in zip(stored["results"], found["results"], strict=True):
        assert before["kl_mean"] == after["kl_mean"]
    kl = {row["name"]: row["kl_mean"] for row in found["results"]}
    assert kl["bf16"] < kl["stored"] < kl["w4"]


def test_methods(program: Gristmill) -> None:
    found = program.json("methods")
    entry = {"name": str, "title": str, "paper": str, "slots": [str], "calibrated": bool}
    matches(found, [entry | {"evidence": (dict, NONE)}])
    assert [one["name"] for one in found] == list(names())
    table = program.text("methods")
    for one in found:
        assert one["name"] in table
    described = program.json("methods", "svdquant")
    assert set(described["options"]) == set(method("svdquant").options.model_fields)
    text = program.text("methods", "svdquant")
    for word in (described["paper"], described["title"], *described["options"]):
        assert word in text


@pytest.mark.parametrize("name", names())
def test_the_table_of_a_method(name: str) -> None:
    """In this process: every kind of option has a row."""
    described = describe(name)
    text = output_of(method_table(described))
    for option, schema in described["options"].items():
        assert re.search(rf"^ *{option} .*{re.escape(str(schema.get('default', 'required')))}", text, re.M)


def test_what_is_no_method(program: Gristmill) -> None:
    assert "quetzal" in program.refused(2, "methods", "quetzal")
