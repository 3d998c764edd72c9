"""The engine on small random models: what a request says depends on nothing but itself."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill.api import Model
from gristmill.backends.native import NativeExecutor
from gristmill.engine import engine as engine_module
from gristmill.engine.engine import Engine, _Pace
from gristmill.engine.request import ContextLengthExceeded, EngineDead, QueueFull, Request, RequestFailed
from gristmill.engine.result import Result
from gristmill.engine.sampling import SamplingParams
from gristmill.errors import GristmillError, UsageError
from gristmill.io import convert
from tests.engine.fakes import FakeTokenizer
from tests.kits import files, models

CONTEXT = 1200
KINDS = {
    "llama": ("llama", None),
    "windowed": ("gemma3-linear", None),
    "int4": ("llama", "int4"),
    "int4-channel": ("llama", "int4-channel"),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engine")
    result = {}
    for name in ("llama", "gemma3-linear"):
        of = models.configs()[name] | {"max_position_embeddings": 2048, "intermediate_size": 256}
        if name == "gemma3-linear":
            of |= {"sliding_window": 100}
        tensors = files.weights(of)
        paths = files.write_gguf(
            root / f"{name}.gguf", of, tensors, {n: "Q8_0" for n, v in tensors.items() if v.ndim == 2}
        )
        result[name] = root / name
        result[name].mkdir()
        convert.import_gguf(paths, result[name])
    return result


class Served:
    """A model and its engine; `alone` says what a request says on its own."""

    def __init__(self, directory: Path, kv_dtype: str | None, **options: Any) -> None:
        executor = NativeExecutor.load(directory, kv_dtype=kv_dtype, threads=2)
        self.model = Model(
            "small",
            directory,
            executor,
            FakeTokenizer(),  # type: ignore[arg-type]
            context=CONTEXT,
            defaults=SamplingParams(),
            weights="stored",
            load_s=0.0,
        )
        self.engine = Engine(self.model, **options)

    def close(self) -> None:
        self.engine.close()
        self.model.close()

    async def run(self, request: Request) -> list[Result]:
        results: dict[int, Result] = {}
        text: dict[int, str] = {}
        async for output in self.engine.stream(request):
            text[output.index] = text.get(output.index, "") + output.text
            if output.result is not None:
                results[output.index] = output.result
                assert text[output.index] == output.result.text
        return [results[i] for i in range(request.n)]

    def together(self, requests: list[Request]) -> list[list[Result]]:
        async def main() -> list[list[Result]]:
            return await asyncio.gather(*(self.run(one) for one in requests))

        return asyncio.run(main())

    def alone(self, prompt: list[int], params: SamplingParams) -> list[int]:
        one = self.model.runner.begin(prompt, params)
        self.model.runner.run([one])
        return one.result().token_ids


@pytest.fixture
def serve(directories: dict[str, Path]) -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def make(kind: str = "llama", **options: Any) -> Served:
        name, kv_dtype = KINDS[kind]
        made.append(Served(directories[name], kv_dtype, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def mixed(rng: np.random.Generator, count: int, vocab: int, longest: int = 500) -> list[Request]:
    """Requests of all lengths; several begin alike."""
    stems = [rng.integers(0, vocab, longest).tolist() for _ in range(3)]
    requests = []
    for i in range(count):
        stem = stems[i % 3][: int(rng.integers(0, longest))]
        prompt = stem + rng.integers(0, vocab, int(rng.integers(1, 60))).tolist()
        requests.append(
            Request(
                prompt,
                SamplingParams(
                    max_tokens=int(rng.integers(1, 40)),
                    temperature=float(rng.choice([0.0, 1.0])),
                    seed=int(rng.integers(0, 1000)),
                    repetition_penalty=float(rng.choice([1.0, 1.2])),
                    ignore_eos=True,
                ),
                f"r{i}",
            )
        )
    return requests


@pytest.mark.parametrize("placement", ["mapped", "table"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_neighbours_and_shared_beginnings_change_nothing(
    serve: Callable[..., Served], kind: str, placement: str
) -> None:
    served = serve(kind, kv_placement=placement)
    requests = mixed(np.random.default_rng(3), 40, served.model.executor.vocab_size)
    alone = [served.alone(list(one.prompt), one.params) for one in requests]
    for _ in range(2):  # the second time most beginnings are cached
        results = served.together(requests)
        assert [result[0].token_ids for result in results] == alone
    counters = served.engine.status().counters
    assert counters["prefix_hits"] > 0
    assert counters["requests_length"] == 80


@pytest.mark.parametrize("kind", list(KINDS))
def test_short_of_memory_nothing_is_lost(serve: Callable[..., Served], kind: str) -> None:
    served = serve(kind)
    requests = mixed(np.random.default_rng(4), 24, served.model.executor.vocab_size, 700)
    alone = [served.alone(list(one.prompt), one.params) for one in requests]
    span = served.model.executor.kv_pool.span_bytes
    served.engine.close()
    small = Engine(served.model, kv_bytes=span * 6, max_sequences=16)
    served.engine = small
    results = served.together(requests)
    assert [result[0].token_ids for result in results] == alone
    status = small.status()
    assert status.kv["limit"] <= 7 * span
    assert status.running == status.waiting == 0


def test_sequences_are_preempted_and_go_on_with_the_same_tokens(serve: Callable[..., Served]) -> None:
    """Prompts of a span less a little: every sequence needs a second span while it decodes."""
    served = serve("llama")
    vocab = served.model.executor.vocab_size
    requests = [
        Request(
            models.tokens(250 + i, vocab, seed=i).tolist(),
            SamplingParams(max_tokens=60, temperature=1.0, seed=i, ignore_eos=True),
            f"r{i}",
        )
        for i in range(8)
    ]
    alone = [served.alone(list(one.prompt), one.params) for one in requests]
    span = served.model.executor.kv_pool.span_bytes
    served.engine.close()
    served.engine = Engine(served.model, kv_bytes=span * 5, max_sequences=8)
    results = served.together(requests)
    assert [result[0].token_ids for result in results] == alone
    assert served.engine.status().counters["preemptions"] > 0


def test_preemption_while_prompts_are_scored(serve: Callable[..., Served]) -> None:
    served = serve("llama")
    vocab = served.model.executor.vocab_size
    requests = [
        Request(
            models.tokens(240 + 5 * i, vocab, seed=i).tolist(),
            SamplingParams(max_tokens=70, ignore_eos=True),
            f"r{i}",
            prompt_logprobs=1 if i % 2 else None,
        )
        for i in range(8)
    ]

    async def scores(request: Request) -> Any:
        found = None
        async for output in served.engine.stream(request):
            found = output.prompt_logprobs or found
        return found

    async def main() -> list[Any]:
        return await asyncio.gather(*(scores(one) for one in requests))

    expected = asyncio.run(main())
    span = served.model.executor.kv_pool.span_bytes
    served.engine.close()
    served.engine = Engine(served.model, kv_bytes=span * 5, max_sequences=8)
    assert asyncio.run(main()) == expected
    assert served.engine.status().counters["preemptions"] > 0
    assert [one is not None for one in expected] == [False, True] * 4


def test_an_error_beside_unread_news_is_told(serve: Callable[..., Served]) -> None:
    """One of several continuations fails while the consumer is elsewhere."""
    served = serve("llama")
    made: list[Even] = []

    def constraint() -> Even:
        made.append(Even(3 if made else 10**6))
        return made[-1]

    async def main() -> None:
        params = SamplingParams(max_tokens=300, ignore_eos=True, temperature=1.0, seed=1)
        stream = served.engine.stream(Request([5, 6], params, "late", n=2, constraint=constraint))
        await asyncio.to_thread(time.sleep, 0.3)
        time.sleep(0.3)  # the loop itself is busy
        with pytest.raises(RequestFailed):  # noqa: PT012
            async with asyncio.timeout(5):
                async for _ in stream:
                    pass

    asyncio.run(main())
    params = {"max_tokens": 20, "ignore_eos": True}
    assert len(served.engine.generate([[1, 2]], raw=True, n=3, **params)) == 3


def test_continuations_of_one_prompt_share_it(serve: Callable[..., Served]) -> None:
    served = serve("llama")
    prompt = models.tokens(300, served.model.executor.vocab_size).tolist()
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=5, ignore_eos=True)
    results = served.together([Request(prompt, params, "n", n=4)])[0]
    for i, result in enumerate(results):
        assert result.token_ids == served.alone(prompt, params.updated({"seed": 5 + i}))
    assert [result.cached_tokens for result in results] == [0, 299, 299, 299]
    assert len({tuple(result.token_ids) for result in results}) == 4


@pytest.mark.parametrize("kind", ["llama", "windowed", "int4", "int4-channel"])
def test_a_conversation_finds_its_earlier_turns(serve: Callable[..., Served], kind: str) -> None:
    served = serve(kind)
    vocab = served.model.executor.vocab_size
    ids = models.tokens(330, vocab).tolist()
    cached, lengths = [], []
    for turn in range(4):
        params = SamplingParams(max_tokens=30, ignore_eos=True)
        lengths.append(len(ids))
        result = served.together([Request(ids, params, f"t{turn}")])[0][0]
        assert result.token_ids == served.alone(ids, params)
        cached.append(result.cached_tokens)
        ids = ids + result.token_ids + models.tokens(20, vocab, seed=turn).tolist()
    assert cached[0] == 0
    executor = served.model.executor
    if kind == "int4-channel" and executor.prompt_activations != executor.activations:
        # Where prompts have an arithmetic of their own, an answer that is read anew is not what is cached;
        # the prompt before is, as far as it fills groups of 64 tokens.
        assert cached[1:] == [length // 64 * 64 for length in lengths[:-1]]
    else:
        assert cached == sorted(set(cached)), "each turn finds more than the one before"
    assert cached[-1] > 330


def test_log_probabilities_of_a_prompt(serve: Callable[..., Served]) -> None:
    served = serve("llama")
    executor = served.model.executor
    ids = models.tokens(300, executor.vocab_size)
    logits = models.logits(executor, ids, [16] * 18 + [12]).astype(np.float64)
    exact = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    exact -= logits.max(-1, keepdims=True)

    async def main() -> list[Any]:
        outputs = []
        request = Request(ids.tolist(), SamplingParams(max_tokens=0), "s", prompt_logprobs=2)
        async for output in served.engine.stream(request):
            outputs.append(output)
        return outputs

    (output,) = asyncio.run(main())
    assert (output.finish_reason, output.token_ids) == ("length", [])
    scores = output.prompt_logprobs
    assert scores[0] is None
    assert len(scores) == 300
    for position, score in enumerate(scores[1:]):
        row = exact[position]
        assert score.token_id == ids[position + 1]
        assert score.logprob == pytest.approx(row[score.token_id], abs=1e-4)
        assert [token for token, _ in score.top] == np.argsort(-row, kind="stable")[:2].tolist()
        if score.token_id == score.top[0][0]:
            assert score.logprob == score.top[0][1], "greedy is told by equality"


def test_logit_bias_and_least_tokens(serve: Callable[..., Served]) -> None:
    served = serve("llama")
    ends = served.model.tokenizer.eos_token_ids
    params = SamplingParams(max_tokens=8, logit_bias={7: 100.0})
    assert served.together([Request([1, 2, 3], params, "a")])[0][0].token_ids == [7] * 8
    end = next(iter(ends)) if ends else 5
    params = SamplingParams(max_tokens=8, logit_bias={end: 100.0}, stop_token_ids=(end,), min_tokens=3)
    result = served.together([Request([1, 2, 3], params, "b")])[0][0]
    assert len(result.token_ids) == 4
    assert result.token_ids[-1] == end
    assert result.finish_reason == "stop"


class Even:
    """Allows even tokens only, and fails after some."""

    def __init__(self, most: int = 10**6) -> None:
        self.left = most

    def mask(self, words: Any) -> bool:
        words.fill(0x55555555)
        if self.left == 0:
            words.fill(0)
        return True

    def accept(self, token: int) -> None:
        assert token % 2 == 0
        self.left -= 1


def test_constraints(serve: Callable[..., Served]) -> None:
    served = serve("llama")
    params = SamplingParams(max_tokens=30, temperature=1.0, seed=1, ignore_eos=True)
    free = Request([5, 6], params, "free")
    bound = Request([5, 6], params, "bound", n=2, constraint=Even)
    one, two = served.together([free, bound])
    assert one[0].token_ids == served.alone([5, 6], params)
    assert all(token % 2 == 0 for result in two for token in result.token_ids)

    async def stuck() -> None:
        async for _ in served.engine.stream(Request([5], params, "stuck", constraint=lambda: Even(3))):
            pass

    with pytest.raises(RequestFailed, match="no token is allowed"):
        asyncio.run(stuck())
    assert served.engine.status().running == 0


def test_wrong_requests_raise_at_once(serve: Callable[..., Served]) -> None:
    served = serve("llama")

    async def refuse(error: type[Exception], prompt: list[int], **options: Any) -> None:
        params = options.pop("params", SamplingParams(max_tokens=4))
        with pytest.raises(error):
            served.engine.stream(Request(prompt, params, "x", **options))

    for case in (
        refuse(UsageError, []),
        refuse(UsageError, [10**6]),
        refuse(UsageError, [-1]),
        refuse(UsageError, [1], n=0),
        refuse(UsageError, [1], n=17),
        refuse(UsageError, [1], n=True),
        refuse(UsageError, [1], params=SamplingParams(max_tokens=0)),
        refuse(ContextLengthExceeded, [1] * (CONTEXT + 1)),
        refuse(ContextLengthExceeded, [1] * CONTEXT),
    ):
        asyncio.run(case)
    result = served.together([Request([1] * (CONTEXT - 1), SamplingParams(ignore_eos=True), "y")])[0][0]
    assert (result.finish_reason, result.completion_tokens) == ("length", 1)


def test_what_is_as_good_as_here_takes_room(serve: Callable[..., Served]) -> None:
    engine = serve("llama", max_sequences=1, max_waiting=2).engine
    for coming in range(3):
        assert engine.check_room(coming) == (0, 0)
    with pytest.raises(QueueFull):
        engine.check_room(3)


@pytest.mark.parametrize(
    ("ends", "now", "gap"),
    [
        ([], 3.0, 3.0),  # none yet: as long as the first takes, at least
        ([30.0, 30.001, 60.0, 60.001], 61.0, 61 / 4),  # two at a time are no fast pace
        ([30.0 * i for i in range(1, 21)], 600.0, 30.0),
        ([0.1 * i for i in range(1, 101)], 10.0, 0.1),
        ([0.1 * i for i in range(1, 101)], 42.0, (42.0 - 8.4) / 16),  # it has become slow
    ],
)
def test_how_soon_a_place_is_free(ends: list[float], now: float, gap: float) -> None:
    pace = _Pace(0.0)
    for end in ends:
        pace.end(end)
    assert pace.gap(now) == pytest.approx(gap)
    assert _Pace().gap(now) == 0


def test_time_without_requests_is_no_pace(serve: Callable[..., Served]) -> None:
    served = serve("llama")
    request = Request([1], SamplingParams(max_tokens=1, ignore_eos=True), "p")
    served.together([request])
    time.sleep(1.5)
    served.together([replace(request, id="q")])
    assert served.engine._pace.gap(time.monotonic()) < 1


def test_a_full_queue_refuses(serve: Callable[..., Served]) -> None:
    served = serve("llama", max_sequences=1, max_waiting=2)

    async def main() -> None:
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        streams = []
        refusal = None
        try:
            for i in range(10):
                streams.append(served.engine.stream(Request([i], params, f"q{i}")))
        except QueueFull as error:
            refusal = error
        assert refusal is not None
        assert refusal.retry_after >= 1
        assert len(streams) in (3, 4)
        tasks = [asyncio.create_task(anext(stream)) for stream in streams]  # type: ignore[arg-type]
        await tasks[0]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            await stream.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("when", ["waiting", "prompt", "decoding"])
def test_an_abort_frees_everything_within_a_step(serve: Callable[..., Served], when: str) -> None:
    served = serve("llama", max_sequences=2)

    async def main() -> None:
        long = SamplingParams(max_tokens=600, ignore_eos=True)
        blockers = [served.engine.stream(Request([i] * 300, long, f"b{i}")) for i in range(2)]
        tasks = [asyncio.ensure_future(anext(stream)) for stream in blockers]  # type: ignore[arg-type]
        victim = served.engine.stream(Request([9] * 1000, long, "victim"))
        if when == "prompt":
            served.engine.abort("b0")
        if when == "decoding":
            served.engine.abort("b0")
            await anext(victim)
        await asyncio.sleep(0.02)
        await victim.aclose()
        served.engine.abort("victim")
        for stream, task in zip(blockers, tasks, strict=True):
            await asyncio.gather(task, return_exceptions=True)
            await stream.aclose()
            served.engine.abort("b0")
            served.engine.abort("b1")
        await asyncio.wait_for(served.engine.idle(), 5)

    asyncio.run(main())
    served.engine.forget()
    time.sleep(0.1)
    assert served.model.executor.kv_pool.used == 0
    assert served.model.executor.kv_pool.stats()["mappings"] == 1
    assert served.model.executor.kv_pool.stats()["committed"] == 0


def test_a_stream_that_nobody_reads_is_aborted_when_it_is_closed(serve: Callable[..., Served]) -> None:
    served = serve("llama")

    async def main() -> None:
        params = SamplingParams(max_tokens=1100, ignore_eos=True)
        closed = served.engine.stream(Request([1], params, "closed"))
        await closed.aclose()
        dropped = served.engine.stream(Request([2], params, "dropped"))
        del dropped
        await asyncio.wait_for(served.engine.idle(), 5)

    asyncio.run(main())
    assert served.engine.status().counters["requests_cancelled"] == 2


def test_news_are_passed_on_before_the_next_step(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("llama")
    step = served.model.executor.step
    steps, behind = 0, []
    heard = 0

    def counted(*args: Any) -> Any:
        nonlocal steps
        behind.append(steps - heard)
        steps += 1
        return step(*args)

    async def main() -> None:
        nonlocal heard
        async for _ in served.engine.stream(
            Request([1], SamplingParams(max_tokens=200, ignore_eos=True), "a")
        ):
            heard += 1

    served.engine._crowded = True
    monkeypatch.setattr(engine_module, "HEARD_SECONDS", 5.0)
    monkeypatch.setattr(served.model.executor, "step", counted)
    asyncio.run(main())
    assert behind == [0] * 200


def test_a_loop_that_stands_still_is_not_waited_for(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("llama")
    served.engine._crowded = True
    params = SamplingParams(max_tokens=300, ignore_eos=True)
    waits = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            return super().wait(timeout)

    async def main() -> int:
        pieces = 0
        async for _ in served.engine.stream(Request([1], params, "slow")):
            time.sleep(0.1)
            pieces += 1
        return pieces

    monkeypatch.setattr(engine_module.threading, "Event", Event)
    assert asyncio.run(main()) < 150  # several tokens a piece: the engine went on
    assert waits == [engine_module.HEARD_SECONDS]  # and was deaf from then on


def test_where_processors_are_spare_no_loop_is_waited_for(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "default_threads", lambda: 1000)
    assert not serve("llama").engine._crowded
    monkeypatch.setattr(engine_module, "default_threads", lambda: 1)
    assert serve("llama").engine._crowded


def test_deadlines(serve: Callable[..., Served]) -> None:
    served = serve("llama")
    params = SamplingParams(max_tokens=1000, ignore_eos=True)
    result = served.together([Request([1], params, "d", deadline=time.monotonic() + 0.05)])[0][0]
    assert result.finish_reason == "timeout"
    assert result.completion_tokens < 1000


def test_a_failing_step_takes_its_requests_along_and_no_others(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("llama")
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    step = served.model.executor.step

    def fail(*_: Any) -> Any:
        monkeypatch.setattr(served.model.executor, "step", step)
        raise RuntimeError("injected")

    monkeypatch.setattr(served.model.executor, "step", fail)
    with pytest.raises(RequestFailed, match="injected"):
        served.together([Request([1, 2], params, "f")])
    assert served.together([Request([1, 2], params, "g")])[0][0].token_ids == served.alone([1, 2], params)
    assert served.engine.status().counters["step_failures"] == 1
    assert served.engine.status().alive


def test_steps_that_keep_failing_end_the_engine(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("llama")

    def fail(*_: Any) -> Any:
        raise RuntimeError("injected")

    monkeypatch.setattr(served.model.executor, "step", fail)
    for i in range(3):
        with pytest.raises(GristmillError, match="injected"):
            served.together([Request([1, 2], SamplingParams(max_tokens=2), f"f{i}")])
    served.engine._thread.join(5)
    assert not served.engine.status().alive
    with pytest.raises(EngineDead):
        served.together([Request([1, 2], SamplingParams(max_tokens=2), "later")])


def test_a_hanging_step_shows(serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve("llama")
    free = threading.Event()
    step = served.model.executor.step

    def hang(*arguments: Any) -> Any:
        free.wait(20)
        return step(*arguments)

    monkeypatch.setattr("gristmill.engine.engine.HANG_SECONDS", 0.3)
    monkeypatch.setattr(served.model.executor, "step", hang)
    thread = threading.Thread(
        target=lambda: served.together([Request([1, 2], SamplingParams(max_tokens=2), "h")])
    )
    thread.start()
    began = time.monotonic()
    while served.engine.status().alive:
        assert time.monotonic() - began < 2
        time.sleep(0.05)
    free.set()
    thread.join()
    assert served.engine.status().alive


def test_generate_is_what_the_model_says(serve: Callable[..., Served]) -> None:
    served = serve("llama")
    prompts = [models.tokens(n, served.model.executor.vocab_size, seed=n).tolist() for n in (3, 40, 300)]
    options = {"max_tokens": 12, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    results = served.engine.generate(prompts, raw=True, n=2, **options)
    for i, prompt in enumerate(prompts):
        for k in range(2):
            expected = served.alone(prompt, SamplingParams(**{**options, "seed": 3 + k}))  # type: ignore[arg-type]
            assert results[2 * i + k].token_ids == expected


def test_wrong_sizes_are_refused(directories: dict[str, Path]) -> None:
    with closing(Served(directories["llama"], None)) as served:
        for options in ({"max_sequences": 0}, {"kv_bytes": 1}, {"prompt_tokens": 3}, {"max_waiting": -1}):
            with pytest.raises(UsageError):
                Engine(served.model, **options)  # type: ignore[arg-type]


def test_draining_and_closing(serve: Callable[..., Served]) -> None:
    served = serve("llama")

    async def main() -> None:
        stream = served.engine.stream(Request([1], SamplingParams(max_tokens=50, ignore_eos=True), "a"))
        served.engine.drain()
        with pytest.raises(EngineDead):
            served.engine.stream(Request([1], SamplingParams(max_tokens=5), "b"))
        outputs = [output async for output in stream]
        assert sum(len(output.token_ids) for output in outputs) == 50
        await served.engine.idle()

    asyncio.run(main())
    assert served.engine.status().draining
    served.engine.close()
    served.engine.close()
    assert not served.engine.status().alive
