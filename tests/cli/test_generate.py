"""`gristmill generate` from the outside: text, JSON, streaming, what it imports, how it stops."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Gristmill, matches

QUESTION = "What is a mill?"
TIMES = {
    "load_s": float,
    "first_token_s": float,
    "prefill_tokens_per_s": float,
    "decode_tokens_per_s": float,
}
USAGE = {"prompt_tokens": int, "completion_tokens": int}
GENERATED = {"text": str, "finish_reason": str, "usage": USAGE, "timings": TIMES}


def test_json_and_text_say_the_same(gristmill: Gristmill) -> None:
    found = gristmill.json("generate", "smollm2", QUESTION, "--max-tokens", "12")
    matches(found, GENERATED)
    assert found["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 12
    assert all(value > 0 for value in found["timings"].values())
    text = gristmill.text("generate", "smollm2", QUESTION, "--max-tokens", "12")
    assert found["text"]
    assert text == found["text"] + "\n"


def test_the_answer_is_what_python_gives(gristmill: Gristmill, monkeypatch: pytest.MonkeyPatch) -> None:
    import gristmill as package

    monkeypatch.setenv("GRISTMILL_CACHE", gristmill.environment["GRISTMILL_CACHE"])
    sampling = {"max_tokens": 16, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "seed": 7}
    sampling |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1}
    with package.load("smollm2", activations="exact", kv_dtype="f32", context=512) as model:
        expected = model.generate(QUESTION, **sampling).text
        greedy = model.generate(QUESTION, max_tokens=16).text
    options = [
        part for name, value in sampling.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    options += ["--activations", "exact", "--kv-dtype", "f32", "--context", "512", "--threads", "1"]
    assert gristmill.text("generate", "smollm2", QUESTION, *options) == expected + "\n"
    assert expected != greedy


def test_logprobs(gristmill: Gristmill) -> None:
    found = gristmill.json("generate", "smollm2", QUESTION, "-n", "4", "--logprobs", "2")
    one = {"token_id": int, "token": str, "logprob": float}
    matches(found, GENERATED | {"logprobs": [one | {"top": [one]}]})
    assert len(found["logprobs"]) == 4
    for token in found["logprobs"]:
        assert len(token["top"]) == 2
        # Greedy: the best is the token itself.
        assert token["top"][0] == {key: token[key] for key in one}
    assert "".join(token["token"] for token in found["logprobs"]) == found["text"]


def test_raw_leaves_the_template_out(gristmill: Gristmill) -> None:
    asked = gristmill.json("generate", "smollm2", QUESTION, "-n", "1")
    raw = gristmill.json("generate", "smollm2", QUESTION, "-n", "1", "--raw")
    assert raw["usage"]["prompt_tokens"] < 10 < asked["usage"]["prompt_tokens"]


def test_a_prompt_from_standard_input(gristmill: Gristmill) -> None:
    expected = gristmill.json("generate", "smollm2", "Grüße, 水", "-n", "4")
    piped = gristmill.json("generate", "smollm2", "-", "-n", "4", stdin="Grüße, 水\n".encode())
    assert (piped["text"], piped["usage"]) == (expected["text"], expected["usage"])
    raw = gristmill.json("generate", "smollm2", "-", "-n", "1", "--raw", stdin=b"One\n")
    short = gristmill.json("generate", "smollm2", "-", "-n", "1", "--raw", stdin=b"One")
    assert raw["usage"]["prompt_tokens"] == short["usage"]["prompt_tokens"] + 1


def test_stop_texts(gristmill: Gristmill) -> None:
    options = ("generate", "smollm2", "Count: 1, 2, 3,", "--raw", "-n", "20")
    found = gristmill.json(*options, "--stop", "never there", "--stop", " 5")
    assert found["finish_reason"] == "stop"
    assert found["text"].strip() == "4,"


def test_a_prompt_that_begins_with_a_dash(gristmill: Gristmill) -> None:
    assert gristmill.text("generate", "-n", "1", "smollm2", "--", "-1, -2,")


def test_options_from_the_environment(gristmill: Gristmill) -> None:
    assert "threads" in gristmill.refused(2, "generate", "smollm2", "x", GRISTMILL_THREADS="0")
    assert gristmill.text("generate", "smollm2", "x", "-n", "1", "--threads", "1", GRISTMILL_THREADS="0")


def test_heavy_packages_are_not_imported(gristmill: Gristmill) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "gristmill", "generate", "smollm2", "x", "-n", "2"],
        env=gristmill.environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    imported = {
        name.split(".")[0] for name in re.findall(r"^import time:.*\|\s+(\S+)$", done.stderr, re.MULTILINE)
    }
    assert {"numpy", "tokenizers", "jinja2", "click"} <= imported
    heavy = {
        "torch",
        "transformers",
        "triton",
        "rich",
        "pydantic",
        "huggingface_hub",
        "psutil",
        "gguf",
        "safetensors",
    }
    assert not imported & heavy


def test_text_streams_and_a_closed_pipe_is_quiet(gristmill: Gristmill) -> None:
    # Long enough that the end cannot be reached before the first piece is read.
    process = gristmill.start(
        *("generate", "smollm2", "1, 2, 3, 4,", "--raw", "--activations", "exact", "-n", "8000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    first = os.read(process.stdout.fileno(), 64)
    assert first
    assert process.poll() is None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written(gristmill: Gristmill) -> None:
    with open("/dev/full", "wb") as full:
        process = gristmill.start("generate", "smollm2", "x", "-n", "1", stdout=full, stderr=subprocess.PIPE)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == b"error: No space left on device\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-"])
def test_closed_streams(gristmill: Gristmill, closed: str) -> None:
    command = f'exec "{sys.executable}" -m gristmill generate smollm2 "$0" -n 2 {closed}'
    done = subprocess.run(
        ["sh", "-c", command, "x"], env=gristmill.environment, capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0
    assert done.stderr == b""
    assert bool(done.stdout) == (">&-" not in closed.split())
    done = subprocess.run(
        ["sh", "-c", command, "x" * 9 + "\udcff"],
        env=gristmill.environment,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == b""


def test_characters_that_the_encoding_lacks(gristmill: Gristmill) -> None:
    text = gristmill.text(
        "generate", "smollm2", "Repeat: 水", "-n", "12", PYTHONIOENCODING="ascii", PYTHONUTF8="0"
    )
    assert text.isascii()


def test_interrupt_in_a_long_prefill(gristmill: Gristmill, tmp_path: Path) -> None:
    """The bar on stderr says that the prompt is being computed; Ctrl-C then ends the process at once."""
    story = tmp_path / "story"
    story.write_text("The miller walked to the river. " * 1000)
    screen, errors = pty.openpty()
    with open(story, "rb") as prompt:
        # Slow on purpose: one thread, float32.
        process = gristmill.start(
            *("generate", "smollm2", "-", "--raw", "--activations", "exact", "--threads", "1"),
            stdin=prompt,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    os.close(errors)
    seen = read_until(screen, b"reading the prompt")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output == b""
    assert b"Traceback" not in seen + drain(screen)
    os.close(screen)


def read_until(file: int, text: bytes, seconds: float = 60) -> bytes:
    """Reads a terminal until a text has come."""
    found = b""
    end = time.monotonic() + seconds
    while text not in found:
        assert time.monotonic() < end, found
        if select.select([file], [], [], 0.1)[0]:
            found += os.read(file, 65536)
    return found


def drain(file: int) -> bytes:
    """What else a terminal holds after its process has ended."""
    found = b""
    while select.select([file], [], [], 0.1)[0]:
        try:
            piece = os.read(file, 65536)
        except OSError:
            break
        if not piece:
            break
        found += piece
    return found
