"""The decoding loop over an executor without arithmetic."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import numpy as np
import pytest

from gristmill.backends.native import _native
from gristmill.engine.loop import PROMPT_CUT, Generation, Runner
from gristmill.engine.result import Result
from gristmill.engine.sampling import SamplingParams
from gristmill.errors import GristmillError, UsageError
from gristmill.program.batch import CancelFlag
from tests.engine.fakes import FakeExecutor, FakeTokenizer


def make_engine(executor: FakeExecutor, tokenizer: FakeTokenizer | None = None, **options: Any) -> Runner:
    return Runner(executor, tokenizer or FakeTokenizer(), **{"context": 2000, **options})


def generate(
    engine: Runner, *prompts: list[int], cancel: CancelFlag | None = None, **sampling: Any
) -> list[Result]:
    several = [engine.begin(prompt, SamplingParams(**sampling)) for prompt in prompts]
    engine.run(several, cancel)
    return [one.result() for one in several]


def scripted(prompt_length: int, tokens: list[int]) -> dict[int, int]:
    return {prompt_length + i: token for i, token in enumerate(tokens)}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 64, length).tolist()


SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 1.5, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("max_step", "max_sequences"), [(512, 64), (48, 3), (17, 1)])
def test_a_batch_says_what_each_sequence_says_alone(
    sampling: dict[str, Any], max_step: int, max_sequences: int
) -> None:
    prompts = [prompt_of(n, seed=n) for n in (1, 5, 16, 17, 100, 40, 2)]
    tokenizer = FakeTokenizer(ends=(9,))
    alone = [
        generate(make_engine(FakeExecutor(), tokenizer), prompt, max_tokens=30, **sampling)[0]
        for prompt in prompts
    ]
    executor = FakeExecutor()
    engine = make_engine(executor, tokenizer, max_step_tokens=max_step, max_sequences=max_sequences)
    together = generate(engine, *prompts, max_tokens=30, **sampling)
    assert [(r.text, r.token_ids, r.finish_reason) for r in together] == [
        (r.text, r.token_ids, r.finish_reason) for r in alone
    ]
    assert len({r.completion_tokens for r in together}) > 1, "no sequence left before the others"
    assert all(sum(lengths) <= max_step and len(lengths) <= max_sequences for lengths in executor.steps)
    assert executor.open_views == 0


def test_prompts_are_cut_at_fixed_positions_only() -> None:
    executor = FakeExecutor()
    generate(make_engine(executor), prompt_of(588), prompt_of(130), prompt_of(33), max_tokens=5)
    assert all(cut % PROMPT_CUT == 0 or cut in (588, 130, 33) for cut in executor.cuts)
    # The short one does not wait for the long one, which goes before the one in between.
    assert executor.steps[:3] == [[33, 208], [1, 240], [1, 140, 112]]


def test_the_seed_matters_and_is_told() -> None:
    engine = make_engine(FakeExecutor())
    one, two = generate(engine, [1, 2], [1, 2], max_tokens=40, temperature=1.0)
    assert one.seed != two.seed
    assert one.token_ids != two.token_ids
    assert (
        generate(engine, [1, 2], max_tokens=40, temperature=1.0, seed=one.seed)[0].token_ids == one.token_ids
    )


def test_every_end_token_ends_and_is_counted_but_not_shown() -> None:
    for end in (9, 40):
        executor = FakeExecutor(script=scripted(3, [0, 1, end, 2]))
        result = generate(make_engine(executor, FakeTokenizer(ends=(9, 40))), [1, 2, 3])[0]
        assert (result.text, result.finish_reason) == ("ab", "stop")
        assert (result.token_ids, result.completion_tokens, result.prompt_tokens) == ([0, 1, end], 3, 3)


def test_ignore_eos_goes_on() -> None:
    executor = FakeExecutor(script=scripted(1, [0, 9, 1]))
    engine = make_engine(executor, FakeTokenizer(ends=(9,)))
    result = generate(engine, [5], max_tokens=3, ignore_eos=True)[0]
    assert (result.text, result.token_ids, result.finish_reason) == ("ab", [0, 9, 1], "length")


def streamed(executor: FakeExecutor, tokenizer: FakeTokenizer, **sampling: Any) -> tuple[list[str], Result]:
    engine = make_engine(executor, tokenizer)
    one = engine.begin([1], SamplingParams(**sampling))
    pieces: list[str] = []
    one.on_text = pieces.append
    engine.run([one])
    assert "".join(pieces) == one.result().text
    assert all(pieces)
    return pieces, one.result()


def test_characters_across_tokens_are_whole() -> None:
    text = "a€😀é"
    data = text.encode()
    tokenizer = FakeTokenizer({i: data[i : i + 1] for i in range(len(data))})
    executor = FakeExecutor(script=scripted(1, list(range(len(data)))))
    pieces, result = streamed(executor, tokenizer, max_tokens=len(data))
    assert pieces == list(text)
    assert result.text == text
    # Cut inside a character.
    pieces, result = streamed(FakeExecutor(script=executor.script), tokenizer, max_tokens=3)
    assert pieces == ["a", "\ufffd"]


@pytest.mark.parametrize(
    ("tokens", "stops", "pieces", "reason"),
    [
        ([b"ab", b"cd", b"ef"], ["bc"], ["a"], "stop"),
        ([b"ab", b"cd", b"ef"], ["cdx"], ["ab", "cdef"], "length"),
        ([b"ab", b"cd", b"ef"], ["f"], ["ab", "cd", "e"], "stop"),
        ([b"ab", b"cd", b"ef"], ["ab"], [], "stop"),
        ([b"x", b"\n", b"\n", b"y"], ["\n\n"], ["x"], "stop"),
        ([b"x", b"\n", b"y"], ["\n\n"], ["x", "\ny"], "length"),
        ([b"x", b"\n"], ["\n\n"], ["x", "\n"], "length"),
    ],
)
def test_stop_strings(tokens: list[bytes], stops: list[str], pieces: list[str], reason: str) -> None:
    tokenizer = FakeTokenizer(dict(enumerate(tokens)))
    executor = FakeExecutor(script=scripted(1, list(range(len(tokens)))))
    found, result = streamed(executor, tokenizer, stop=stops, max_tokens=len(tokens))
    assert (found, result.finish_reason) == (pieces, reason)
    assert executor.open_views == 0


def test_a_held_back_stop_beginning_is_shown_when_an_end_token_comes() -> None:
    executor = FakeExecutor(script=scripted(1, [0, 1, 9]))
    found, result = streamed(executor, FakeTokenizer({0: b"x", 1: b"STO"}, ends=(9,)), stop=["STOP"])
    assert (found, result.finish_reason) == (["x", "STO"], "stop")


def test_context() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor, context=20)
    with pytest.raises(UsageError, match="the prompt has 21 tokens, but the context holds 20"):
        engine.begin(prompt_of(21), SamplingParams())
    for length in (20, 19, 17, 1):
        result = generate(engine, prompt_of(length))[0]
        assert (result.completion_tokens, result.finish_reason) == (20 - length, "length")
        assert result.prompt_tokens == length
    assert generate(engine, prompt_of(17), max_tokens=2)[0].completion_tokens == 2
    assert generate(engine, prompt_of(17), max_tokens=9)[0].completion_tokens == 3
    assert executor.open_views == 0


@pytest.mark.parametrize("prompt", [[], [64], [-1], [[1]], [1.5], ["a"], np.zeros(0, np.int32)])
def test_refuses_wrong_prompts(prompt: Any) -> None:
    with pytest.raises(UsageError) as caught:
        make_engine(FakeExecutor()).begin(prompt, SamplingParams())
    assert "\n" not in str(caught.value)


def test_max_sequences_must_leave_room_for_prompts() -> None:
    with pytest.raises(UsageError, match="max_sequences"):
        make_engine(FakeExecutor(), max_step_tokens=64, max_sequences=64)


def test_cancel_from_the_text_callback() -> None:
    executor, flag = FakeExecutor(), CancelFlag()
    engine = make_engine(executor)
    one = engine.begin([1, 2], SamplingParams())
    pieces: list[str] = []

    def on_text(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 4:
            flag.set()

    one.on_text = on_text
    engine.run([one], flag)
    result = one.result()
    assert (result.finish_reason, result.completion_tokens, len(pieces)) == ("cancelled", 4, 4)
    assert len(executor.steps) == 4
    assert executor.open_views == 0


def test_cancel_inside_a_long_prompt() -> None:
    executor, flag = FakeExecutor(), CancelFlag()
    executor.on_step = lambda fake, _: flag.set() if len(fake.steps) == 2 else None
    first, second = generate(make_engine(executor), prompt_of(1500), prompt_of(700), cancel=flag)
    for result in (first, second):
        assert (result.finish_reason, result.text, result.completion_tokens) == ("cancelled", "", 0)
        assert result.timings.first_token_s == 0
    assert len(executor.steps) == 2
    assert executor.open_views == 0


def test_a_flag_that_is_set_before_the_call_computes_nothing() -> None:
    executor, flag = FakeExecutor(), CancelFlag()
    flag.set()
    assert generate(make_engine(executor), [1], cancel=flag)[0].finish_reason == "cancelled"
    assert executor.steps == []


def test_memory_is_given_back_when_the_executor_fails() -> None:
    executor = FakeExecutor()

    def fail(fake: FakeExecutor, _: CancelFlag | None) -> None:
        if len(fake.steps) == 3:
            raise RuntimeError("broken")

    executor.on_step = fail
    with pytest.raises(RuntimeError, match="broken"):
        generate(make_engine(executor), [1], [2], [3])
    assert len(executor.views) == 3
    assert executor.open_views == 0


def test_memory_is_given_back_when_allocation_fails() -> None:
    class Small(FakeExecutor):
        def allocate(self, capacity: int) -> Any:
            if len(self.views) == 2:
                raise GristmillError("no memory")
            return super().allocate(capacity)

    executor = Small()
    with pytest.raises(GristmillError, match="no memory"):
        generate(make_engine(executor), [1], [2], [3])
    assert executor.open_views == 0


def test_memory_is_given_back_when_a_callback_fails() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    one = engine.begin([1], SamplingParams())

    def fail(_: str) -> None:
        raise ZeroDivisionError

    one.on_text = fail
    with pytest.raises(ZeroDivisionError):
        engine.run([one])
    assert executor.open_views == 0


def test_memory_is_given_back_when_the_steps_are_left() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    steps = engine.steps([engine.begin([1], SamplingParams())])
    next(steps)
    assert executor.open_views == 1
    steps.close()
    assert executor.open_views == 0


def test_logits_that_are_not_numbers_are_reported() -> None:
    class Broken(FakeExecutor):
        def step(self, batch: Any, cancel: CancelFlag | None = None) -> Any:
            return super().step(batch, cancel) * np.float32(np.nan)

    executor = Broken()
    with pytest.raises(GristmillError, match=r"cannot choose a token.*NaN"):
        generate(make_engine(executor), [1])
    assert executor.open_views == 0


def test_a_kept_view_stays_open_and_its_tokens_are_not_computed_again() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    prompt = prompt_of(50)
    fresh = generate(engine, prompt, max_tokens=8)[0]
    view = executor.allocate(100)
    first = engine.begin(prompt[:40], SamplingParams(max_tokens=3))
    first.keep(view, 0)
    engine.run([first])
    assert view.length == 42  # The last token is not needed.
    view.truncate(40)
    executor.steps.clear()
    second = engine.begin(prompt, SamplingParams(max_tokens=8))
    second.keep(view, 40)
    engine.run([second])
    assert executor.steps[0] == [10]
    result = second.result()
    assert (result.token_ids, result.cached_tokens, result.prompt_tokens) == (fresh.token_ids, 40, 50)
    assert executor.open_views == 1


def test_logprobs_come_with_every_token() -> None:
    result = generate(make_engine(FakeExecutor()), [1, 2], max_tokens=6, logprobs=3)[0]
    assert result.logprobs is not None
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    for entry in result.logprobs:
        assert len(entry.top) == 3
        assert entry.top[0] == (entry.token_id, entry.logprob), "greedy takes the most probable"
        values = [value for _, value in entry.top]
        assert values == sorted(values, reverse=True)
        assert values[0] < 0
    assert generate(make_engine(FakeExecutor()), [1, 2], max_tokens=6)[0].logprobs is None


def test_timings() -> None:
    result = generate(make_engine(FakeExecutor(), load_s=1.5), prompt_of(600), max_tokens=5)[0]
    times = result.timings
    assert times.load_s == 1.5
    assert times.first_token_s > 0
    assert times.prefill_tokens_per_s > 0
    assert times.decode_tokens_per_s > 0
    assert generate(make_engine(FakeExecutor()), [1], max_tokens=1)[0].timings.decode_tokens_per_s == 0


def test_threads_take_turns() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    prompts = [prompt_of(20, seed=i) for i in range(4)]
    expected = [generate(engine, prompt, max_tokens=25)[0].token_ids for prompt in prompts]
    busy = threading.Lock()

    def alone(_: FakeExecutor, __: CancelFlag | None) -> None:
        assert busy.acquire(blocking=False)
        busy.release()

    executor.on_step = alone
    found: dict[int, list[int]] = {}

    def work(index: int) -> None:
        found[index] = generate(engine, prompts[index], max_tokens=25)[0].token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == expected


def test_closed() -> None:
    executor = FakeExecutor()
    engine = make_engine(executor)
    one = engine.begin([1], SamplingParams())
    engine.close()
    engine.close()
    assert executor.closed
    with pytest.raises(UsageError, match="closed"):
        engine.begin([1], SamplingParams())
    with pytest.raises(UsageError, match="closed"):
        engine.run([one])


# ---- Ctrl-C ------------------------------------------------------------------------------------------------


def interrupt(fake: FakeExecutor, _: CancelFlag | None) -> None:
    if len(fake.steps) == 3:
        os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_raises_and_gives_memory_back() -> None:
    executor = FakeExecutor()
    executor.on_step = interrupt
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        generate(make_engine(executor), [1], [2])
    assert executor.open_views == 0
    assert signal.getsignal(signal.SIGINT) is handler


def test_interrupt_with_a_handler_that_returns_cancels() -> None:
    executor, flag = FakeExecutor(), CancelFlag()
    executor.on_step = interrupt
    seen: list[bool] = []
    former = signal.signal(signal.SIGINT, lambda *_: seen.append(flag.is_set()))
    try:
        result = generate(make_engine(executor), [1], cancel=flag)[0]
    finally:
        signal.signal(signal.SIGINT, former)
    assert (result.finish_reason, result.completion_tokens) == ("cancelled", 2)
    # The flag was set before Python came to run a handler: that is what stops a native step.
    assert seen == [True]
    assert executor.open_views == 0


def test_watch_leaves_an_ignored_signal_alone() -> None:
    word = np.zeros(1, np.int32)
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert not _native.watch_interrupt(word)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, former)
    assert word[0] == 0
    assert _native.watch_interrupt(word)
    assert not _native.watch_interrupt(word), "watches do not nest"
    _native.unwatch_interrupt()
    _native.unwatch_interrupt()


def test_finished_only() -> None:
    one = make_engine(FakeExecutor()).begin([1], SamplingParams())
    assert isinstance(one, Generation)
    with pytest.raises(GristmillError, match="not finished"):
        one.result()
