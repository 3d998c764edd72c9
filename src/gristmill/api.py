"""The public interface: load a model, generate, chat, stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gristmill.engine.loop import Generation, Runner, check_prompt
from gristmill.engine.result import Chunk, Result
from gristmill.engine.sampling import SamplingParams
from gristmill.errors import GristmillError, UsageError
from gristmill.program.batch import CancelFlag, KVView

if TYPE_CHECKING:
    from gristmill.backends.native import NativeExecutor
    from gristmill.io.chat import ChatTemplate
    from gristmill.io.checkpoint import Progress
    from gristmill.io.lora import Adapters, Strengths
    from gristmill.io.tokenizer import Tokenizer

__all__ = ["LEAST_CONTEXT", "ChatSession", "Model", "load"]

LEAST_CONTEXT = 256
"""Where memory is short the context is chosen to fit, but not below this many tokens."""

Message = Mapping[str, Any]
"""A chat message: role and content."""


def load(
    model: str | Path,
    *,
    weights: str = "stored",
    activations: str | None = None,
    kv_dtype: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    lora: Adapters = (),
    lora_strength: Strengths = 1.0,
    progress: Progress | None = None,
) -> Model:
    """Loads a model; the first time it is also converted into the cache. Prints nothing.

    model: a GGUF file, a Hugging Face or checkpoint directory, a hub name, or the short name `smollm2`.
    weights: `stored`, `f32`, `bf16`, `int8` or `int4`. activations: `exact`, `bf16`, `fast`; None: what the
    model's recipe means, else `fast` for integer weights, as stored for float ones. kv_dtype: `f32`, `bf16`,
    `int4` or `int4-channel`; None: what the model says, else `bf16`. threads: None for all this process may
    use. context: most tokens of a sequence, prompt included; None: what the model was made for, or less if
    memory is short. lora: directories of LoRA adapters in PEFT's format, with a strength for all or each; the
    weights stay as they are. progress(label, done, total) is called now and then. Raises UsageError for wrong
    options, ModelError for a model that cannot be read, GristmillError if it does not fit the memory.
    """
    from gristmill.backends.native import NativeExecutor
    from gristmill.io.convert import prepare
    from gristmill.io.json_file import read_object
    from gristmill.io.lora import open_adapted
    from gristmill.io.memory import plan
    from gristmill.io.tokenizer import Tokenizer
    from gristmill.models import read_config

    started = time.perf_counter()
    path = prepare(model, weights, progress)
    checkpoint = open_adapted(path, lora, lora_strength)
    most = read_config(checkpoint.config).max_positions
    if context is not None and (
        isinstance(context, bool) or not isinstance(context, int) or not 1 <= context <= most
    ):
        raise UsageError(f"context must be between 1 and the model's {most}, not {context!r}")
    memory = plan(checkpoint.program(), checkpoint.weight_bytes, kv_dtype, context or most)
    if context is None and memory.largest_context >= LEAST_CONTEXT:
        context = memory.largest_context
    else:
        context = memory.check().context
    executor = NativeExecutor.load(checkpoint, activations=activations, kv_dtype=kv_dtype, threads=threads)
    tokenizer = Tokenizer.load(path)
    generation = path / "generation_config.json"
    defaults = SamplingParams.from_generation_config(read_object(generation) if generation.exists() else {})
    return Model(
        str(model),
        path,
        executor,
        tokenizer,
        context=context,
        defaults=defaults,
        weights=weights,
        load_s=time.perf_counter() - started,
    )


class Model:
    """A loaded model. Use as a context manager, or call `close`.

    Calls from several threads are safe; their steps take turns. Ctrl-C during a call in the main thread stops
    the step in progress within one node and raises KeyboardInterrupt, as Python's own SIGINT handler does; if
    the program has put a handler in its place that returns, the result's finish_reason is "cancelled". Either
    way all memory of the sequence is given back.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        executor: NativeExecutor,
        tokenizer: Tokenizer,
        *,
        context: int,
        defaults: SamplingParams,
        weights: str,
        load_s: float,
    ) -> None:
        """For `load`."""
        self.name = name
        """The model as it was asked for."""
        self.path = path
        """The checkpoint directory."""
        self.executor = executor
        self.tokenizer = tokenizer
        self.context = context
        """Most tokens of a sequence, prompt and completion together."""
        self.defaults = defaults
        """Sampling parameters where a call names none."""
        self.weights = weights
        self.activations = executor.activations
        self.kv_dtype = executor.kv_dtype
        self.load_s = load_s
        """Seconds that loading took."""
        self.runner = Runner(executor, tokenizer, context=context, pool=executor.pool, load_s=load_s)

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template; None if it has none. Raises TemplateError if it is not valid."""
        return self.tokenizer.chat_template

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        raw: bool = False,
        on_text: Callable[[str], None] | None = None,
        on_prompt: Callable[[int, int], None] | None = None,
        cancel: CancelFlag | None = None,
        **sampling: Any,
    ) -> Result:
        """Continues a prompt.

        A text becomes the user's message of the model's chat template, unless `raw` is set or there is no
        template; token ids are taken as they are. on_text gets the text piece by piece, and before it
        on_prompt(done, total) the count of prompt tokens computed. cancel.set(), from any thread, ends the
        call with what there is. `sampling` are fields of SamplingParams in place of the
        model's defaults. Raises UsageError for wrong values, and for a prompt that is longer than the
        context.
        """
        started = time.perf_counter()
        one = self._begin(prompt, raw, self.defaults.updated(sampling), started)
        one.on_text, one.on_prompt = on_text, on_prompt
        self.runner.run([one], cancel)
        return one.result()

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        raw: bool = False,
        cancel: CancelFlag | None = None,
        **sampling: Any,
    ) -> list[Result]:
        """Continues several prompts together: the results of `generate` for each, in their order.

        As many as memory allows, up to 64, run in one batch; others follow as they finish. With a seed, all
        use it.
        """
        if isinstance(prompts, (str, bytes)):
            raise UsageError("generate_batch takes a list of prompts")
        started = time.perf_counter()
        params = self.defaults.updated(sampling)
        several = [self._begin(prompt, raw, params, started) for prompt in prompts]
        self.runner.run(several, cancel, at_once=self._fitting(several))
        return [one.result() for one in several]

    def chat(
        self,
        messages: Sequence[Message],
        *,
        on_text: Callable[[str], None] | None = None,
        on_prompt: Callable[[int, int], None] | None = None,
        cancel: CancelFlag | None = None,
        **sampling: Any,
    ) -> Result:
        """Answers a conversation: a list of objects with `role` and `content`, through the model's chat
        template.

        Raises UsageError for a model without one and TemplateError for messages that it refuses.
        """
        started = time.perf_counter()
        one = self._begin_chat(messages, self.defaults.updated(sampling), started)
        one.on_text, one.on_prompt = on_text, on_prompt
        self.runner.run([one], cancel)
        return one.result()

    def stream(
        self,
        prompt_or_messages: str | Sequence[int] | Sequence[Message],
        *,
        raw: bool = False,
        cancel: CancelFlag | None = None,
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """`generate`, or `chat` for a list of messages, as an iterator of chunks; the last one holds the
        Result.

        Wrong values raise at once, not with the first chunk. Closing the iterator early ends the generation.
        """
        started = time.perf_counter()
        params = self.defaults.updated(sampling)
        given = prompt_or_messages
        if not isinstance(given, str) and len(given) > 0 and isinstance(given[0], Mapping):
            one = self._begin_chat(given, params, started)  # type: ignore[arg-type]
        else:
            one = self._begin(given, raw, params, started)  # type: ignore[arg-type]
        return self._chunks(one, cancel)

    def session(self, system: str | None = None) -> ChatSession:
        """A conversation that keeps the keys and values of earlier turns. Close it when done."""
        return ChatSession(self, system)

    def prompt_ids(self, prompt: str | Sequence[int], *, raw: bool = False) -> list[int]:
        """The token ids that `generate` would continue."""
        if not isinstance(prompt, str):
            return check_prompt(prompt, self.executor.vocab_size)
        if raw or self.chat_template is None:
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat([{"role": "user", "content": prompt}])

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The token ids that `chat` would continue."""
        if self.chat_template is None:
            raise UsageError(f"{self.name} has no chat template: use generate")
        return self.tokenizer.encode_chat(messages)

    def close(self) -> None:
        """Gives the memory back. Idempotent."""
        self.runner.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(
        self, prompt: str | Sequence[int], raw: bool, params: SamplingParams, started: float
    ) -> Generation:
        # Raw text is continued, so a space that the continuation begins with belongs to it.
        plain = raw or not isinstance(prompt, str) or self.chat_template is None
        return self.runner.begin(self.prompt_ids(prompt, raw=raw), params, started=started, continues=plain)

    def _fitting(self, several: Sequence[Generation]) -> int:
        """How many of the sequences can grow to their ends in the memory there is; at least one is tried."""
        from gristmill.io import memory

        longest = max((one.capacity for one in several), default=1)
        there_is = memory.available_memory()
        each = memory.plan(self.executor.program, 0, self.kv_dtype, longest, available=there_is).kv_bytes
        return max(1, (there_is[0] - memory.RESERVE) // each)

    def _begin_chat(self, messages: Sequence[Message], params: SamplingParams, started: float) -> Generation:
        return self.runner.begin(self.chat_ids(messages), params, started=started)

    def _chunks(self, one: Generation, cancel: CancelFlag | None) -> Iterator[Chunk]:
        sent = 0
        pieces: list[str] = []
        one.on_text = pieces.append
        steps = self.runner.steps([one], cancel)
        try:
            for _ in steps:
                if pieces and not one.finished:
                    ids, sent = one.token_ids[sent:], len(one.token_ids)
                    text = "".join(pieces)
                    pieces.clear()
                    yield Chunk(text, ids)
        finally:
            steps.close()
        result = one.result()
        yield Chunk("".join(pieces), one.token_ids[sent:], result.finish_reason, result)


class ChatSession:
    """A conversation whose keys and values are kept, so that a turn costs only its own tokens.

    When the history outgrows the context, the oldest turns are forgotten, the system message never. That
    happens as soon as the prompt and the answer to come (its max_tokens, but at most a quarter of the
    context) would not fit; then so many turns go that the prompt takes up half the context at most, because
    every time costs a full prefill. `Result.dropped_turns` says how many went.
    """

    def __init__(self, model: Model, system: str | None = None) -> None:
        """For `Model.session`."""
        if model.chat_template is None:
            raise UsageError(f"{model.name} has no chat template: use generate")
        self._model = model
        self._view: KVView | None = None
        self.messages: list[dict[str, Any]] = []
        """The conversation so far. May be changed; what then differs is computed anew."""
        self._system = system
        self.tokens: list[int] = []
        """The tokens whose keys and values are kept."""
        self.clear()

    def send(
        self,
        text: str,
        *,
        on_text: Callable[[str], None] | None = None,
        on_prompt: Callable[[int, int], None] | None = None,
        cancel: CancelFlag | None = None,
        **sampling: Any,
    ) -> Result:
        """Adds the user's message, and the answer, to the conversation.

        After an error or KeyboardInterrupt the conversation is as it was before; after a cancellation it
        holds what was generated until then.
        """
        started = time.perf_counter()
        model = self._model
        params = model.defaults.updated(sampling)
        messages = [*self.messages, {"role": "user", "content": text}]
        ids, dropped = self._fit(messages, params)
        one = model.runner.begin(ids, params, started=started)
        kept = self._reuse(ids)
        view = self._view
        if view is None:
            view = self._view = model.executor.allocate(model.context)
        one.keep(view, kept)
        one.on_text, one.on_prompt = on_text, on_prompt
        try:
            model.runner.run([one], cancel)
        finally:
            # Whatever happened, the view says how many of the tokens are in it.
            self.tokens = [*ids, *one.token_ids][: view.length]
        result = one.result(dropped_turns=dropped)
        self.messages = [*messages, {"role": "assistant", "content": result.text}]
        return result

    def clear(self) -> None:
        """Forgets the conversation, but not the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system is not None else []
        self.close()

    def close(self) -> None:
        """Gives the keys and values back; the next `send` computes them again. Idempotent."""
        view, self._view = self._view, None
        self.tokens = []
        if view is not None:
            view.close()

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fit(self, messages: list[dict[str, Any]], params: SamplingParams) -> tuple[list[int], int]:
        """The prompt of the messages, and how many turns were removed from them for it."""
        context = self._model.context
        reserve = max(1, min(params.max_tokens or context, context // 4))
        ids = self._model.chat_ids(messages)
        dropped = 0
        if len(ids) + reserve <= context:
            return ids, 0
        while len(ids) > context // 2:
            users = [i for i, message in enumerate(messages) if message["role"] == "user"]
            if len(users) < 2:
                break
            del messages[users[0] : users[1]]
            dropped += 1
            ids = self._model.chat_ids(messages)
        return ids, dropped

    def _reuse(self, ids: list[int]) -> int:
        """Truncates the kept view to what the new prompt shares with it; the number of tokens that stay."""
        if self._view is None:
            return 0
        shared = 0
        # The last prompt token is computed in any case: its logits are wanted.
        for old, new in zip(self.tokens, ids[:-1], strict=False):
            if old != new:
                break
            shared += 1
        try:
            self._view.truncate(shared)
        except GristmillError:
            # A sliding window has moved past the place.
            self.close()
            return 0
        return shared
