"""What clients may send: the fields of OpenAI's API and of its extensions in the field.

A field that is known but cannot be honoured is refused by name unless it has the value that changes nothing.
What is not known at all is taken and counted: clients send extras.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from gristmill.engine.sampling import SamplingParams
from gristmill.errors import UsageError
from gristmill.serve.errors import ApiError
from gristmill.serve.limits import LIMITS

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "TokenizeRequest",
    "read",
    "sampling_of",
]


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Sampling(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | Annotated[list[str], Field(max_length=LIMITS["stop"])] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=64)] | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    timeout: float | None = Field(None, gt=0)
    truncate_prompt_tokens: int | None = Field(None, ge=1)
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(max_length=1024)] | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    regex: str | None = None
    structured_outputs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=LIMITS["messages"])]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=LIMITS["top_logprobs"])
    tools: Annotated[list[dict[str, Any]], Field(max_length=LIMITS["tools"])] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    include_reasoning: bool | None = None


_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}, "maxItems": 1 << 20}
_PROMPTS: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        _IDS,
        {"type": "array", "items": {"anyOf": [{"type": "string"}, _IDS]}, "maxItems": LIMITS["prompts"]},
    ]
}


def _ids(value: object) -> object:
    """Token ids, looked at up to the first thing that is none."""
    if isinstance(value, list) and len(value) <= 1 << 20 and all(type(one) is int for one in value):
        return value
    raise ValueError("it must be a list of token ids")


def _uniform(prompt: object) -> object:
    """A text, texts, token ids, or lists of those; looked at once, up to the first thing that is neither."""

    def ids(value: object) -> bool:
        return isinstance(value, list) and all(type(one) is int for one in value)

    if isinstance(prompt, str) or (isinstance(prompt, list) and (not prompt or ids(prompt))):
        return prompt
    if isinstance(prompt, list):
        if len(prompt) > LIMITS["prompts"]:
            raise ValueError(f"a prompt must be a text, token ids, or at most {LIMITS['prompts']} of those")
        if all(isinstance(one, str) for one in prompt) or all(ids(one) for one in prompt):
            return prompt
    raise ValueError("a prompt must be a text, token ids, or a list of either")


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: Annotated[Any, BeforeValidator(_uniform), WithJsonSchema(_PROMPTS)]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=LIMITS["top_logprobs"])
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(BaseModel):
    """POST /tokenize: a text, or messages."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(max_length=LIMITS["messages"])] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=LIMITS["tools"])] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    add_special: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    tokens: Annotated[Any, BeforeValidator(_ids), WithJsonSchema(_IDS)]


_HARMLESS: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "best_of": (None, 1),
    "functions": (None, []),
    "function_call": (None, "none"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1, 1.0),
    "prompt_logprobs": (None,),
    "prompt_embeds": (None,),
    "documents": (None, []),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "mm_processor_kwargs": (None,),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "mirostat": (None, 0),
    "dry_multiplier": (None, 0, 0.0),
    "xtc_probability": (None, 0, 0.0),
    "typical_p": (None, 1, 1.0),
    "lora_request": (None,),
    "cache_salt": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "logits_processors": (None, []),
    "skip_special_tokens": (None, True),
    "include_stop_str_in_output": (None, False),
    "spaces_between_special_tokens": (None, True, False),
    "return_tokens_as_token_ids": (None, False),
    "add_generation_prompt": (None, True),
}
"""Fields that change the answer and that we cannot honour, with the values that mean nothing."""

_IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Fields that are known and change nothing here."""


def read(kind: type[Any], value: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """A request of this kind, and the names of fields that nobody knows. ApiError 400 names what is wrong."""
    bias = value.get("logit_bias")
    if isinstance(bias, dict) and len(bias) > LIMITS["logit_bias"]:  # before each of them is looked at
        raise ApiError(400, f"logit_bias may hold at most {LIMITS['logit_bias']} tokens", param="logit_bias")
    try:
        request = kind.model_validate(value)
    except ValidationError as error:
        raise _wrong(error) from None
    for name, harmless in _HARMLESS.items():
        if name in value and not any(
            value[name] == one and type(value[name]) is type(one) for one in harmless
        ):
            raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")
    known = kind.model_fields.keys() | _HARMLESS.keys() | _IGNORED
    return request, [name for name in value if name not in known]


def _wrong(error: ValidationError) -> ApiError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    name = path[0] if path else None
    where = ".".join(part for part in path if part.isidentifier() or part.isdecimal())[:80]
    message = first["msg"]
    return ApiError(400, f"{where}: {message[:1].lower()}{message[1:]}", param=name)


_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
)


def sampling_of(request: Any, defaults: SamplingParams, vocab_size: int) -> SamplingParams:
    """The sampling parameters of a request. ApiError 400, UsageError."""
    changes: dict[str, Any] = {}
    for name in _SAME:
        value = getattr(request, name)
        if value is not None:
            changes[name] = value
    if changes.get("top_k") == -1:  # some clients say "off" this way
        changes["top_k"] = 0
    if request.seed is not None and request.seed < 0:
        if request.seed == -1:  # "a random one", in some clients
            del changes["seed"]
        else:
            changes["seed"] = request.seed % 2**64
    if request.stop is not None:
        changes["stop"] = request.stop
    if request.stop_token_ids is not None:
        changes["stop_token_ids"] = tuple(request.stop_token_ids)
    most = getattr(request, "max_completion_tokens", None)
    most = request.max_tokens if most is None else most
    if most is not None:
        changes["max_tokens"] = most
    elif request.min_tokens and defaults.max_tokens is not None and request.min_tokens > defaults.max_tokens:
        changes["max_tokens"] = None
    if request.logit_bias:
        changes["logit_bias"] = _bias(request.logit_bias, vocab_size)
    if isinstance(request, ChatRequest):
        if request.top_logprobs is not None and not request.logprobs and request.top_logprobs > 0:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        changes["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
    else:
        changes["logprobs"] = request.logprobs
    return defaults.updated(changes)


def _bias(value: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    result = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise ApiError(
                400, f"logit_bias: {key[:40]!r} is not a token id below {vocab_size}", param="logit_bias"
            )
        result[int(key)] = bias
    return result


def count_of(request: Any, prompts: int = 1) -> int:
    """n. UsageError out of bounds."""
    n = 1 if request.n is None else request.n
    if not 1 <= n <= LIMITS["n"]:
        raise UsageError(f"n must be between 1 and {LIMITS['n']}, not {n}"[:80])
    if n * prompts > LIMITS["prompts"]:
        raise UsageError(
            f"n times the number of prompts may be {LIMITS['prompts']} at most, not {n * prompts}"
        )
    return n


Kind = Literal["chat.completion", "text_completion"]
