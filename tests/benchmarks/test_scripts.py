"""The plan, the pinned lists, quality, greedy texts and the README's regions."""

from __future__ import annotations

import json

import greedy
import numpy as np
import pytest
import quality
import readme
from harness import environments, files, pages, plan
from harness.environments import ENVIRONMENT, HERE, REQUIREMENTS

from gristmill.errors import GristmillError


def test_every_entry_has_a_worker_an_environment_and_a_recipe():
    entries = plan.entries() + quality.entries() + [greedy.OURS, greedy.THEIRS]
    for entry in entries:
        assert (HERE / "workers" / entry.script).exists()
        assert entry.environment == "" or entry.environment in ENVIRONMENT
        assert callable(files._recipe(f"{entry.model}/{entry.file}"))
        assert entry.engine in plan.TITLES
    for several in (plan.entries(), quality.entries()):
        assert len({entry.name for entry in several}) == len(several)
    assert {engine for engine, _, _ in plan.CANNOT} <= set(plan.TITLES)


def test_every_package_is_pinned():
    used = {environment.requirements for environment in ENVIRONMENT.values()}
    assert {path.stem for path in REQUIREMENTS.glob("*.txt")} == used
    for name in used:
        lines = (REQUIREMENTS / f"{name}.txt").read_text().splitlines()
        packages = [line for line in lines if line and not line.startswith("#")]
        assert packages
        assert all(line.count("==") == 1 for line in packages), name


def test_an_environment_of_another_list_is_not_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "ENVIRONMENTS", tmp_path)
    assert not environments.is_complete("llamacpp")
    (tmp_path / "llamacpp").mkdir()
    note = tmp_path / "llamacpp" / environments.DONE
    note.write_text(environments._pins(ENVIRONMENT["llamacpp"]))
    assert environments.is_complete("llamacpp")
    note.write_text(environments._pins(ENVIRONMENT["llamacpp-avx2"]))
    assert not environments.is_complete("llamacpp")


def test_a_failed_command_is_one_line():
    with pytest.raises(environments.SetupError, match=r"^thing could not be made: second$"):
        environments.checked(["sh", "-c", "echo first >&2; echo second >&2; exit 3"], "thing", {})


def test_a_file_appears_only_when_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MODELS", tmp_path)

    def broken(out, say):
        out.write_text("half")
        raise environments.SetupError("no more")

    monkeypatch.setattr(files, "_recipe", lambda name: broken)
    with pytest.raises(environments.SetupError):
        files.ensure_file("m/x.gguf", lambda text: None)
    assert not (tmp_path / "m" / "x.gguf").exists()
    monkeypatch.setattr(files, "_recipe", lambda name: lambda out, say: out.write_text("whole"))
    assert files.ensure_file("m/x.gguf", lambda text: None).read_text() == "whole"


def save(tmp_path, name, values):
    path = tmp_path / name
    np.save(path, values.astype(np.float32))
    return path


def test_quality_leaves_padding_columns_out(tmp_path):
    random = np.random.default_rng(1)
    base = random.normal(size=(6, 10))
    padded = np.concatenate([base, np.full((6, 3), 50.0)], 1)
    piece = np.arange(6, dtype=np.int32)
    first = save(tmp_path, "base.npy", base)
    found = quality.compare([piece], [first], [save(tmp_path, "same.npy", padded)])
    assert found["kl_mean"] == 0.0
    assert found["top1_agreement"] == 1.0
    assert found["perplexity"] == found["base_perplexity"]
    other = base.copy()
    other[0, base[0].argmax()] -= 9.0
    found = quality.compare([piece], [first], [save(tmp_path, "other.npy", other)])
    assert found["kl_max"] > 0.1
    assert found["top1_agreement"] == pytest.approx(5 / 6)


def test_quality_refuses_logits_that_do_not_fit(tmp_path):
    piece = np.arange(6, dtype=np.int32)
    first = save(tmp_path, "base.npy", np.zeros((6, 10)))
    for shape in ((5, 10), (6, 9)):
        with pytest.raises(GristmillError, match="do not go with"):
            quality.compare([piece], [first], [save(tmp_path, "other.npy", np.zeros(shape))])
    with pytest.raises(GristmillError, match="NaN or infinity"):
        quality.compare([piece], [first], [save(tmp_path, "other.npy", np.full((6, 10), -np.inf))])


class Engine:
    """Continues with a fixed text, whatever came before, and has fixed logits."""

    def __init__(self, logits, text=()):
        self.values = np.asarray(logits, np.float32)
        self.text = list(text)
        self.asked = []

    def ask(self, request):
        self.asked.append(request)
        if request["op"] == "logits":
            np.save(request["output"], np.tile(self.values, (len(request["tokens"]), 1)))
            return {}
        return {"ids": [self.text[: request["new_tokens"]]]}


def test_equal_texts_ask_nothing_more():
    engine = Engine([0.0])
    assert greedy.audit(engine, engine, [7], [1, 2, 3], [1, 2, 3]) == []
    assert engine.asked == []


def test_a_near_tie_goes_on_with_the_other_text():
    ours = Engine([0.0, 5.0004, 5.0], text=[3])
    theirs = Engine([0.0, 5.0, 5.0004])
    events = greedy.audit(ours, theirs, [7], [0, 1, 9], [0, 2, 3])
    assert [event["kind"] for event in events] == ["near tie"]
    assert events[0]["position"] == 1
    assert events[0]["gap_ours"] == pytest.approx(4e-4, rel=0.01)
    assert events[0]["gap_theirs"] == pytest.approx(-4e-4, rel=0.01)
    assert ours.asked[-1]["prompts"] == [[7, 0, 2]]
    # Had gristmill gone another way again, that would be an event of its own.
    again = Engine([0.0, 5.0004, 5.0, 5.0], text=[1])
    events = greedy.audit(again, Engine([0.0, 5.0, 5.0004, 5.0]), [7], [0, 1, 9], [0, 2, 3])
    assert [event["position"] for event in events] == [1, 2]


def test_a_clear_difference_ends_the_audit():
    ours, theirs = Engine([0.0, 5.01, 5.0]), Engine([0.0, 5.0, 5.0001])
    events = greedy.audit(ours, theirs, [7], [1, 1, 1], [2, 2, 2])
    assert [event["kind"] for event in events] == ["difference"]


TEXT = "a\n<!-- demo:begin: why -->\nold\n<!-- demo:end -->\nb\n"


def test_a_region_is_replaced_and_nothing_else():
    once = pages.fill(TEXT, "demo", ["new", "lines"])
    assert once == "a\n<!-- demo:begin: why -->\nnew\nlines\n<!-- demo:end -->\nb\n"
    assert pages.fill(once, "demo", ["new", "lines"]) == once
    with pytest.raises(SystemExit, match="no region results"):
        pages.fill(TEXT, "results", [])


def test_the_readme_has_every_region():
    text = readme.README.read_text()
    for name in ("demo", "generate", "results"):
        pages.fill(text, name, [])


def test_regions_come_from_the_files_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.regions() == {}
    (tmp_path / "demo.json").write_text(json.dumps({"demo": "one\ntwo", "generate": "three"}))
    assert readme.regions() == {"demo": ["```", "one", "two", "```"], "generate": ["```", "three", "```"]}
