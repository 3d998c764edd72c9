"""The public interface on the demo model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import gristmill
from gristmill.api import Model, load
from gristmill.backends.native import _native
from gristmill.backends.native.executor import NativeExecutor
from gristmill.errors import GristmillError, ModelError, TemplateError, UsageError
from gristmill.program.batch import CancelFlag

QUESTION = "Name three colours of the rainbow."
PROMPTS = ["Once upon a time", "The capital of France is", "def add(a, b):\n", "1, 2, 3, 4,", "Dear"]
STORY = "The miller walked to the river. " * 700
"""About 5,000 tokens."""


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys, gristmill; gristmill.__version__; dir(gristmill); print(*sys.modules)"
    names = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "gristmill" in names
    assert not {"numpy", "gristmill.api", "gristmill.errors", "tokenizers", "torch"} & set(names)


def test_every_public_name_is_there() -> None:
    for name in gristmill.__all__:
        assert getattr(gristmill, name) is not None
    assert set(gristmill.__all__) <= set(dir(gristmill))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        gristmill.lode  # noqa: B018


def test_loading_and_generating_needs_no_torch_and_prints_nothing(cache: None) -> None:
    code = """
import sys, json, gristmill
with gristmill.load("smollm2", threads=2, context=64) as model:
    result = model.generate("Hi", max_tokens=3)
heavy = {"torch", "transformers", "huggingface_hub", "triton", "pydantic"}
sys.stdout.write(json.dumps([len(result.token_ids), sorted(heavy & set(sys.modules))]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == [3, []]
    assert done.stderr == ""


def test_what_a_loaded_model_says_of_itself(model: Model) -> None:
    assert model.name == "smollm2"
    assert (model.path / "config.json").is_file()
    expected = "bf16" if _native.default_level() == "amx" else "fast"  # what the fixture asked for
    assert (model.weights, model.activations, model.kv_dtype) == ("stored", expected, "bf16")
    assert model.context == 8192
    assert model.chat_template is not None
    assert model.load_s > 0
    assert model.executor.threads == 2


def test_generate(model: Model) -> None:
    pieces: list[str] = []
    result = model.generate(QUESTION, max_tokens=40, on_text=pieces.append)
    assert result.text == "".join(pieces)
    assert result.text == model.tokenizer.decode(result.token_ids)
    assert result.completion_tokens == len(result.token_ids) <= 40
    assert result.prompt_tokens == len(model.prompt_ids(QUESTION))
    assert result.timings.load_s == model.load_s
    assert result.timings.first_token_s > 0
    # An answer in English, not noise.
    assert any(
        colour in result.text.lower() for colour in ("red", "orange", "yellow", "green", "blue", "violet")
    )


def test_raw_text_template_and_ids(model: Model) -> None:
    ids = model.tokenizer.encode("The sky is")
    raw = model.generate("The sky is", raw=True, max_tokens=8)
    assert model.generate(ids, max_tokens=8).token_ids == raw.token_ids
    assert raw.prompt_tokens == len(ids)
    # The completion of raw text begins where the text ends.
    assert raw.text.startswith(" ")
    chat = model.chat([{"role": "user", "content": QUESTION}], max_tokens=8)
    assert model.generate(QUESTION, max_tokens=8).token_ids == chat.token_ids != raw.token_ids


def test_greedy_text_does_not_depend_on_the_threads(model: Model) -> None:
    with load("smollm2", threads=1, context=512, activations=model.activations) as other:
        for sampling in ({}, {"temperature": 0.9, "seed": 5, "top_p": 0.95}):
            one, two = (m.generate(QUESTION, max_tokens=50, **sampling) for m in (model, other))
            assert one.token_ids == two.token_ids
            assert one.text == two.text


SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 12},
    {"temperature": 0.8, "seed": 1, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1},
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_batch_equals_each_alone(model: Model, sampling: dict[str, Any]) -> None:
    prompts = [*PROMPTS, " ".join(PROMPTS) * 30]
    together = model.generate_batch(prompts, raw=True, max_tokens=24, **sampling)
    for prompt, result in zip(prompts, together, strict=True):
        assert model.generate(prompt, raw=True, max_tokens=24, **sampling).token_ids == result.token_ids


def test_a_batch_that_memory_cannot_hold_at_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.io import memory

    expected = [result.token_ids for result in model.generate_batch(PROMPTS, raw=True, max_tokens=3)]
    views: list[int] = []
    allocate = model.executor.allocate
    monkeypatch.setattr(model.executor, "allocate", lambda n: (views.append(n), allocate(n))[1])
    steps: list[int] = []
    step = model.executor.step
    monkeypatch.setattr(
        model.executor, "step", lambda batch, cancel: (steps.append(len(batch.views)), step(batch, cancel))[1]
    )
    # 16 tokens of every layer are 368,640 bytes.
    monkeypatch.setattr(memory, "available_memory", lambda: (memory.RESERVE + 2 * 368_640, "free memory"))
    found = model.generate_batch(PROMPTS, raw=True, max_tokens=3)
    assert [result.token_ids for result in found] == expected
    assert len(views) == len(PROMPTS)
    assert max(steps) == 2


def test_different_seeds_differ_and_the_same_seed_repeats(model: Model) -> None:
    def text(seed: int) -> str:
        return model.generate(QUESTION, max_tokens=30, temperature=1.2, seed=seed).text

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_stream_equals_generate(model: Model) -> None:
    whole = model.generate(QUESTION, max_tokens=30)
    chunks = list(model.stream(QUESTION, max_tokens=30))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == whole.finish_reason
    assert chunks[-1].result is not None
    assert chunks[-1].result.text == whole.text
    assert len(chunks) > 10
    messages = [{"role": "user", "content": QUESTION}]
    assert "".join(chunk.text for chunk in model.stream(messages, max_tokens=30)) == whole.text
    assert (
        "".join(chunk.text for chunk in model.stream(model.prompt_ids(QUESTION), max_tokens=30)) == whole.text
    )


def test_streams_check_at_once_and_can_be_left(model: Model) -> None:
    with pytest.raises(UsageError, match="temperature"):
        model.stream(QUESTION, temperature=-1)
    stream = model.stream(QUESTION)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    interleaved = [model.stream(QUESTION, max_tokens=12) for _ in range(2)]
    texts = ["", ""]
    for chunks in zip(*interleaved, strict=True):
        texts = [text + chunk.text for text, chunk in zip(texts, chunks, strict=True)]
    assert texts[0] == texts[1] == model.generate(QUESTION, max_tokens=12).text


def test_characters_of_several_tokens(model: Model) -> None:
    prompt = "Repeat exactly: 😀🦜é漢字"
    pieces: list[str] = []
    result = model.generate(prompt, max_tokens=40, on_text=pieces.append)
    assert "".join(pieces) == result.text == model.tokenizer.decode(result.token_ids)
    assert all("\ufffd" not in piece for piece in pieces[:-1])


def test_stop_string(model: Model) -> None:
    whole = model.generate("Count: one, two,", raw=True, max_tokens=30).text
    stop = whole[9:14]
    pieces: list[str] = []
    result = model.generate("Count: one, two,", raw=True, max_tokens=30, stop=stop, on_text=pieces.append)
    assert result.finish_reason == "stop"
    assert result.text == "".join(pieces) == whole[: whole.index(stop)]


def test_logprobs(model: Model) -> None:
    result = model.generate(QUESTION, max_tokens=5, logprobs=4)
    assert result.logprobs is not None
    assert [entry.top[0][0] for entry in result.logprobs] == result.token_ids


def test_prompt_longer_than_the_context(cache: None) -> None:
    with load("smollm2", threads=2, context=40) as model:
        with pytest.raises(UsageError, match=r"the prompt has \d+ tokens, but the context holds 40"):
            model.generate(STORY)
        ids = model.tokenizer.encode("a b c d e f g h")
        result = model.generate(ids, ignore_eos=True)
        assert (result.finish_reason, result.completion_tokens) == ("length", 40 - len(ids))
        assert model.generate([1] * 40).completion_tokens == 0


def test_cancel_inside_a_long_prompt(model: Model) -> None:
    flag = CancelFlag()
    timer = threading.Timer(0.3, flag.set)
    timer.start()
    result = model.generate(STORY, raw=True, cancel=flag)
    timer.join()
    assert (result.finish_reason, result.text) == ("cancelled", "")
    assert model.generate(QUESTION, max_tokens=3).finish_reason == "length"


def test_ctrl_c_inside_a_long_prompt(model: Model) -> None:
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        model.generate(STORY, raw=True)
    timer.join()
    assert model.generate(QUESTION, max_tokens=3).finish_reason == "length"


def test_two_threads_at_once(model: Model) -> None:
    expected = [model.generate(prompt, raw=True, max_tokens=20).text for prompt in PROMPTS]
    found: dict[int, str] = {}

    def work(index: int) -> None:
        found[index] = model.generate(PROMPTS[index], raw=True, max_tokens=20).text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(PROMPTS))] == expected


def test_wrong_requests_are_one_line(model: Model, cache: None, tmp_path: Path) -> None:
    requests: list[tuple[type[GristmillError], Any]] = [
        (UsageError, lambda: model.generate(QUESTION, temperature=-1)),
        (UsageError, lambda: model.generate(QUESTION, temprature=1)),
        (UsageError, lambda: model.generate([10**6])),
        (UsageError, lambda: model.generate([])),
        (UsageError, lambda: model.generate("", raw=True)),
        (UsageError, lambda: model.generate_batch(QUESTION)),  # type: ignore[arg-type]
        (TemplateError, lambda: model.chat([])),
        (TemplateError, lambda: model.chat([{"role": "wizard", "content": "x"}])),
        (UsageError, lambda: load("smollm2", weights="int3")),
        (UsageError, lambda: load("smollm2", activations="half")),
        (UsageError, lambda: load("smollm2", kv_dtype="int8")),
        (UsageError, lambda: load("smollm2", threads=0)),
        (UsageError, lambda: load("smollm2", context=0)),
        (UsageError, lambda: load("smollm2", context=10**6)),
        (ModelError, lambda: load(tmp_path / "nothing.gguf")),
    ]
    for kind, request in requests:
        with pytest.raises(kind) as caught:
            request()
        assert "\n" not in str(caught.value)


def test_progress_and_close(cache: None) -> None:
    calls: list[tuple[str, int, int]] = []
    model = load("smollm2", weights="int4", context=64, progress=lambda *call: calls.append(call))
    assert calls
    assert all(0 <= done <= total for _, done, total in calls)
    model.close()
    model.close()
    with pytest.raises(UsageError, match="closed"):
        model.generate(QUESTION)
    again: list[tuple[str, int, int]] = []
    with load("smollm2", weights="int4", context=64, progress=lambda *call: again.append(call)) as cached:
        assert cached.weights == "int4"
        assert cached.generate(QUESTION, max_tokens=2).completion_tokens == 2
    assert len(again) < len(calls), "the second time nothing is converted"


def test_context_is_chosen_to_fit_the_memory(cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from gristmill.io import memory

    def free(extra: int) -> None:
        # SmolLM2 keeps 2 x 3 heads x 64 numbers of 2 bytes in 30 layers per token.
        monkeypatch.setattr(
            memory, "available_memory", lambda: (weights + memory.RESERVE + extra, "free memory")
        )

    with load("smollm2", threads=1, context=16) as model:
        from gristmill.io.checkpoint import Checkpoint

        weights = Checkpoint.open(model.path).weight_bytes
        assert isinstance(model.executor, NativeExecutor)
    free(23040 * 1100)
    with load("smollm2", threads=1) as model:
        assert model.context == 1024
    with pytest.raises(GristmillError, match="--context 1024"):
        load("smollm2", threads=1, context=2048)
    free(23040 * 100)
    with pytest.raises(GristmillError, match="KV cache"):
        load("smollm2", threads=1)
