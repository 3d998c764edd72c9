"""Ratios and targets from documents with known figures."""

from __future__ import annotations

import pytest
from harness import report
from harness.report import Check, Results, checks


def entry(name, rates, **more):
    model, engine, mode, *isa = name.split("/")
    figures = {
        figure: {**values, "samples": [values, {k: 2 * v for k, v in values.items()}]}
        for figure, values in rates.items()
    }
    return {
        "name": name,
        "engine": engine,
        "mode": mode,
        "model": model,
        "isa": isa[0] if isa else "best",
        "weights_bytes": 76e6,
        "figures": figures,
        "refused": {},
        "failure": None,
        **more,
    }


def rate(decode, prefill=1.0, **more):
    return {
        "decode_1x512": {"tokens_per_s": decode, **more},
        "prefill_512": {"tokens_per_s": prefill},
        "decode_16x64": {"tokens_per_s": decode, "total_tokens_per_s": prefill},
    }


@pytest.fixture
def peers():
    return {
        "entries": [
            entry("smollm2/gristmill/int4", rate(400.0, 3000.0, roofline_fraction=0.8)),
            entry("smollm2/gristmill/stored", rate(300.0, 2000.0, roofline_fraction=0.6)),
            entry("smollm2/llamacpp/q4_0", rate(100.0, 500.0)),
            entry("smollm2/vllm/bf16", rate(50.0, 1000.0)),
            entry("smollm2/llamacpp/q4_0/avx2", rate(9999.0, 9999.0)),
            entry("smollm2/gristmill/int4/avx2", rate(5000.0)),
            entry("1b/llamacpp/q4_0", rate(8888.0)),
        ]
    }


def named(found, item, what):
    return [check for check in found if check.item == item and what in check.what]


def test_the_fastest_peer_is_of_the_same_model_and_not_held_back(peers):
    results = Results(peers)
    assert results.fastest("smollm2", "decode_1x512") == "smollm2/llamacpp/q4_0"
    assert results.fastest("smollm2", "prefill_512") == "smollm2/vllm/bf16"
    assert results.fastest("smollm2", "decode_16x512") is None
    assert results.fastest("other", "decode_1x512") is None


def test_ratios_are_of_medians_and_say_against_what(peers):
    found = checks(peers)
    int4, stored = named(found, "1", "decode_1x512: ")
    assert (int4.measured, int4.required, int4.met) == (4.0, 4.0, True)
    assert (stored.measured, stored.required, stored.met) == (3.0, 3.25, False)
    assert int4.against == "smollm2/llamacpp/q4_0"
    assert int4.per_round == (4.0, 4.0)
    totals = named(found, "3", "with its prompts: smollm2/gristmill/int4")
    assert [check.measured for check in totals] == [3.0]
    avx2 = named(found, "7", "int4")
    assert [(check.measured, check.met) for check in avx2] == [(pytest.approx(5000 / 9999), False)]


def test_roofline_fractions_are_checked(peers):
    fractions = named(checks(peers), "1", "fraction")
    assert [(check.measured, check.met) for check in fractions] == [(0.8, True), (0.6, False)]


def test_what_was_not_measured_is_no_check(peers):
    found = checks(peers)
    assert not named(found, "2", "f32")
    assert not [check for check in found if check.item in ("4", "5", "6", "8")]


def test_startup_counts_the_weights(peers):
    peers["startup"] = {"first_token_s": 0.7, "peak_rss_bytes": 240e6, "weight_bytes": 96e6}
    seconds, memory = named(checks(peers), "5", "")
    assert not seconds.met
    assert memory.met
    assert memory.required == 246e6
    peers["startup"] = {"failure": {"kind": "error", "reason": "no"}}
    assert not named(checks(peers), "5", "")


def test_quality_and_texts(peers):
    def row(name, kl):
        return {"name": f"smollm2/{name}", "figures": {"kl_mean": kl} if kl is not None else None}

    quality = {
        "entries": [
            row("gristmill/stored-fast-kv-bf16", 0.003),
            row("llamacpp/q4_1", 0.0031),
            row("llamacpp/q4_0", None),
            row("gristmill/stored-exact-kv-f32", 2e-6),
            row("gristmill/stored-bf16-kv-f32", 1e-4),
        ]
    }
    greedy = {"equal": 19, "prompts": 20, "differences": 0}
    found = checks(peers, quality, greedy)
    assert [(check.against, check.met) for check in named(found, "1", "KL")] == [
        ("smollm2/llamacpp/q4_1", True)
    ]
    assert [check.met for check in named(found, "6", "")] == [False, True]
    assert [check.met for check in named(found, "8", "")] == [False, True]


def test_lines_say_what_is_not_met():
    lines = report.check_lines(
        [
            Check("1", "speed", 3.0, 4.0, False, "them", (2.5, 3.5)),
            Check("5", "seconds", 0.5, 0.6, True),
        ]
    )
    assert lines[0] == "1  speed against them: 3 (rounds 2.50 to 3.50) >= 4  NOT MET"
    assert lines[1] == "5  seconds: 0.5 <= 0.6  met"


def test_the_table_has_a_row_for_every_entry_of_the_demo_model(peers):
    quality = {
        "entries": [
            {
                "name": "smollm2/gristmill/int4-fast-kv-bf16",
                "figures": {"kl_mean": 0.365, "top1_agreement": 0.693},
            },
            {"name": "smollm2/llamacpp/q4_0", "figures": {"kl_mean": 0.26, "top1_agreement": 0.742}},
        ]
    }
    rows = report.speed_table(peers, quality)[2:]
    assert len(rows) == 4
    assert rows[0] == "| **gristmill int4** | 76 | 3,000 | 400 | 3,000 | – | 0.36 | 69.3 % |"
    assert rows[2].startswith("| llama.cpp Q4_0 | 76 | 500 | 100 | 500 | – | 0.26 |")


def test_a_failed_entry_shows_its_reason(peers):
    broken = entry("1b/vllm/bf16", {}, failure={"kind": "died", "reason": "SIGKILL"})
    assert "SIGKILL" in report.small_table({"entries": [broken]}, [broken], "x")[-1]


def test_the_plot_is_a_picture(peers, tmp_path):
    pytest.importorskip("matplotlib")
    document = {
        **peers,
        "machine": {"cpu": "c", "level": "avx2"},
        "settings": {"threads": 2, "rounds": 2},
        "date": "today",
    }
    report.plot(document, tmp_path / "sub" / "p.png")
    assert (tmp_path / "sub" / "p.png").read_bytes().startswith(b"\x89PNG")
