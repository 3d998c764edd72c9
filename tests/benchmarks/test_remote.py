"""Worker processes: replies, refusals, deaths, and that an idle one is stopped."""

from __future__ import annotations

import os
import sys
import time

import pytest
from harness import remote
from harness.environments import HERE
from harness.remote import Refused, Remote, choose_cpus

SCRIPT = """
import os, signal, sys, threading, time
sys.path.insert(0, {workers!r})
from worker import UnsupportedError, Worker, serve

class Fake(Worker):
    def load(self, model, mode, threads, options):
        print("noise on stdout")
        os.system("echo noise of a child")
        self.notes = [str(len(os.sched_getaffinity(0)))]
        threading.Thread(target=self.spin, daemon=True).start()
        return 7
    def spin(self):
        while True: pass
    def versions(self): return {{"fake": "1"}}
    def prefill(self, prompt):
        if prompt[0] == 1: raise UnsupportedError("no prompts that begin with 1")
        if prompt[0] == 2: raise ValueError("two\\nlines")
        if prompt[0] == 3: os.kill(os.getpid(), signal.SIGABRT)
        if prompt[0] == 4: time.sleep(60)
        return 0.5
    def decode(self, prompts, new_tokens): return 1.0, 2.0, new_tokens
    def logits(self, tokens):
        import numpy
        return numpy.zeros((len(tokens) + (tokens[0] == 9), 5), numpy.float64)

serve(Fake)
"""
LOAD = {"op": "load", "model": "m", "mode": "x", "threads": 1, "options": {}}


@pytest.fixture
def worker(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "LOGS", tmp_path)
    script = tmp_path / "fake.py"
    script.write_text(SCRIPT.format(workers=str(HERE / "workers")))
    started = Remote("a/fake", sys.executable, script, os.environ, choose_cpus(1))
    yield started
    started.close()


def cpu_ticks(pid: int) -> int:
    """Processor time that a process has taken."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_replies_are_not_mixed_with_what_libraries_print(worker):
    before = os.sched_getaffinity(0)
    reply = worker.ask(LOAD)
    assert reply["weights_bytes"] == 7
    assert reply["versions"] == {"fake": "1"}
    assert reply["notes"] == ["1"], "a worker gets the processors it was given"
    assert os.sched_getaffinity(0) == before
    assert worker.ask({"op": "decode", "prompts": [[0]], "new_tokens": 4}) == {
        "prefill_seconds": 1.0,
        "seconds": 2.0,
        "tokens": 4,
    }
    assert "noise on stdout" in worker.log.read_text()
    assert "noise of a child" in worker.log.read_text()


def test_an_idle_worker_does_not_run(worker):
    worker.ask(LOAD)  # from here on one of its threads spins
    pid = worker._process.pid
    time.sleep(0.05)
    before = cpu_ticks(pid)
    time.sleep(0.3)
    assert cpu_ticks(pid) == before
    assert worker.ask({"op": "prefill", "prompt": [0]})["seconds"] == 0.5


def test_refusals_leave_the_worker_alive(worker):
    worker.ask(LOAD)
    for token, kind, reason in (
        (1, "unsupported", "no prompts that begin with 1"),
        (2, "error", "ValueError: two lines"),
    ):
        with pytest.raises(Refused, match=reason) as caught:
            worker.ask({"op": "prefill", "prompt": [token]})
        assert caught.value.kind == kind
    with pytest.raises(Refused, match="for gristmill only"):
        worker.ask({"op": "roofline", "batch": 1, "context": 1, "new_tokens": 2})
    assert worker.ask({"op": "prefill", "prompt": [0]})["tokens"] == 1


def test_logits_are_written_as_float32_and_counted(worker, tmp_path):
    import numpy as np

    worker.ask(LOAD)
    output = tmp_path / "x.npy"
    worker.ask({"op": "logits", "tokens": [1, 2], "output": str(output)})
    assert np.load(output).dtype == np.float32
    with pytest.raises(Refused, match="2 tokens gave logits of shape"):
        worker.ask({"op": "logits", "tokens": [9, 9], "output": str(output)})


def test_a_death_is_told_with_its_signal(worker):
    worker.ask(LOAD)
    with pytest.raises(Refused, match="SIGABRT") as caught:
        worker.ask({"op": "prefill", "prompt": [3]})
    assert caught.value.kind == "died"
    with pytest.raises(Refused, match="SIGABRT"):
        worker.ask({"op": "prefill", "prompt": [0]})


def test_no_answer_ends_the_worker(worker):
    worker.ask(LOAD)
    with pytest.raises(Refused, match="no answer within") as caught:
        worker.ask({"op": "prefill", "prompt": [4]}, timeout=0.2)
    assert caught.value.kind == "timeout"
    assert worker._process.poll() is not None


def test_cpus_are_ones_this_process_may_use():
    allowed = os.sched_getaffinity(0)
    assert set(choose_cpus(1)) <= allowed
    assert len(choose_cpus(1)) == 1
    assert sorted(choose_cpus(10_000)) == sorted(allowed)
