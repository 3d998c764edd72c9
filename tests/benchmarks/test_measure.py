"""Turns, samples, medians, and what is left out after a slow or failed request."""

from __future__ import annotations

import pytest
from harness import measure
from harness.environments import SetupError
from harness.measure import Record, prompts, run_group, summary, turn
from harness.plan import BATCH, DECODE, GENERATE, PREFILL, Entry
from harness.remote import Refused


class FakeRemote:
    """Answers as a worker would; `seconds` a request takes, `refuse` op -> exception."""

    def __init__(self, seconds=(2.0,), refuse=None):
        self.seconds = list(seconds)
        self.refuse = refuse or {}
        self.asked = []
        self.closed = False

    def ask(self, request, timeout=600.0):
        self.asked.append(request)
        if request["op"] in self.refuse:
            raise self.refuse[request["op"]]
        seconds = self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        if request["op"] == "roofline":
            return {"bytes_per_step": 100.0, "bytes_per_second": 1000.0}
        tokens = len(request.get("prompts", [])) * request.get("new_tokens", 0)
        return {"seconds": seconds, "prefill_seconds": 1.0, "tokens": tokens, "load_seconds": 0.0}

    def close(self):
        self.closed = True


def record(engine="peer", shapes=(PREFILL, DECODE), remote=None) -> Record:
    made = Record(Entry(engine, "m", "", "model", "file", shapes))
    made.remote = remote or FakeRemote()
    return made


def test_sequences_of_a_batch_read_different_pieces():
    pieces = prompts(range(2000), BATCH)
    assert len(pieces) == 16
    assert all(len(piece) == 64 for piece in pieces)
    assert len({token for piece in pieces for token in piece}) == 16 * 64
    with pytest.raises(SetupError, match="the text has 100 tokens, 1024 are wanted"):
        prompts(range(100), BATCH)


def test_short_requests_are_repeated_and_their_median_is_the_sample():
    one = record(remote=FakeRemote(seconds=(0.1, 0.4, 0.2, 9.0)))
    turn(one, PREFILL, range(600), 64)
    assert len(one.remote.asked) == 3
    assert one.samples[PREFILL.name] == [{"tokens_per_s": 512 / 0.2}]
    long = record(remote=FakeRemote(seconds=(1.5,)))
    turn(long, PREFILL, range(600), 64)
    assert len(long.remote.asked) == 1


def test_rates_with_and_without_the_prompts():
    one = record(shapes=(BATCH,))
    turn(one, BATCH, range(2000), 64)
    # The prompts took 1 s and the rest 2 s.
    assert one.samples[BATCH.name] == [{"tokens_per_s": 16 * 64 / 2.0, "total_tokens_per_s": 16 * 64 / 3.0}]
    assert [request["op"] for request in one.remote.asked] == ["decode"]


def test_gristmill_has_its_bandwidth_measured_before_every_decode():
    one = record("gristmill", (DECODE,))
    turn(one, DECODE, range(600), 64)
    assert [request["op"] for request in one.remote.asked] == ["roofline", "decode"]
    # 64 tokens in 2 s are 1/32 s a step; 100 bytes at 1000 a second need 0.1 s.
    assert one.samples[DECODE.name][0]["roofline_fraction"] == pytest.approx(0.1 * 32)


def test_the_public_interface_has_only_a_total():
    one = record("gristmill", (GENERATE,))
    turn(one, GENERATE, range(2000), 64)
    assert one.samples[GENERATE.name] == [{"total_tokens_per_s": 16 * 64 / 2.0}]


def test_summary_is_the_median_over_rounds():
    found = summary([{"tokens_per_s": 3.0}, {"tokens_per_s": 1.0}, {"tokens_per_s": 2.0}])
    assert found["tokens_per_s"] == 2.0
    assert len(found["samples"]) == 3


def run(monkeypatch, records, rounds=3, only=()):
    monkeypatch.setattr(measure, "open_record", lambda record, threads, cpus, say: None)
    text = type("File", (), {"read_text": lambda self: '{"ids": ' + str(list(range(9000))) + "}"})()
    monkeypatch.setattr(measure, "ensure_file", lambda name, say: text)
    lines = []
    run_group(records, rounds=rounds, threads=1, new_tokens=64, only=only, say=lines.append)
    return lines


def test_every_round_gives_every_figure_a_sample(monkeypatch):
    first, second = record(), record()
    remotes = [first.remote, second.remote]
    run(monkeypatch, [first, second])
    for one in (first, second):
        assert {name: len(samples) for name, samples in one.samples.items()} == {
            PREFILL.name: 3,
            DECODE.name: 3,
        }
    assert all(remote.closed for remote in remotes)


def test_only_the_figures_that_were_asked_for(monkeypatch):
    one = record()
    run(monkeypatch, [one], only=[DECODE.name])
    assert list(one.samples) == [DECODE.name]


def test_a_slow_figure_is_not_repeated(monkeypatch):
    one = record()
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(measure.time, "monotonic", lambda: float(next(clock)))
    run(monkeypatch, [one])
    assert {name: len(samples) for name, samples in one.samples.items()} == {PREFILL.name: 1, DECODE.name: 1}


def test_what_a_peer_refuses_is_recorded_with_its_reason(monkeypatch):
    one = record(remote=FakeRemote(refuse={"decode": Refused("unsupported", "it cannot")}))
    lines = run(monkeypatch, [one])
    result = one.result((PREFILL, DECODE))
    assert result["refused"] == {DECODE.name: {"kind": "unsupported", "reason": "it cannot"}}
    assert list(result["figures"]) == [PREFILL.name]
    assert result["failure"] is None
    assert sum("it cannot" in line for line in lines) == 1


def test_a_death_keeps_the_figures_there_are(monkeypatch):
    one = record(remote=FakeRemote(refuse={"decode": Refused("died", "SIGILL")}))
    run(monkeypatch, [one])
    result = one.result((PREFILL, DECODE))
    assert result["failure"] == {"kind": "died", "reason": f"{DECODE.title}: SIGILL"}
    assert len(result["figures"][PREFILL.name]["samples"]) == 1
    assert one.remote is None
