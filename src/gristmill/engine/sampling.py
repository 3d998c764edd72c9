"""What decides the next token: parameters, their ranges, and the defaults of a model.

The order is that of the field (Transformers): penalties, temperature, top-k, top-p, min-p, then one draw.

1. `repetition_penalty` r divides the positive and multiplies the other logits of every token in prompt or
   completion; then `presence_penalty` is subtracted once, and `frequency_penalty` per occurrence, for tokens
   of the completion; then `logit_bias` is added, and tokens that a constraint or `min_tokens` forbids get
   minus infinity.
2. The logits are divided by `temperature`. 0 (and anything below 1e-5) means greedy: the highest logit after
   the penalties, the lowest id among equals; nothing is drawn and the filters do not matter.
3. `top_k` keeps the k highest (the lowest ids among equals), 0 all.
4. `top_p` keeps the most probable of those, up to and with the one that brings their share to top_p.
5. `min_p` drops what is less probable than min_p times the most probable.
6. One uniform number from Philox4x32-10, keyed by `seed` with the token's position as counter, picks one. The
   same prompt, seed and parameters thus give the same text in any batch and with any number of threads.

Log probabilities are those of the model's own logits, before all of this.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from gristmill.errors import ModelError, UsageError

__all__ = ["MAX_LOGPROBS", "MAX_STOPS", "MAX_STOP_CHARS", "SamplingParams"]

MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 64
MAX_STOPS = 16
MAX_STOP_CHARS = 256


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence is continued. A wrong value raises UsageError, in one line that names the field."""

    max_tokens: int | None = None
    """Most tokens to generate, from 1; None: as many as the context holds. 0 where log probabilities of the
    prompt are all that is wanted."""
    temperature: float = 0.0
    """0 to 100; 0 is greedy."""
    top_k: int = 0
    """From 0; 0 keeps all."""
    top_p: float = 1.0
    """Above 0, up to 1; 1 keeps all."""
    min_p: float = 0.0
    """0 to 1; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Above 0, up to 100; 1 is none."""
    presence_penalty: float = 0.0
    """-2 to 2."""
    frequency_penalty: float = 0.0
    """-2 to 2."""
    stop: tuple[str, ...] = ()
    """Texts that end the generation and are not part of it: one, or up to 16, of up to 256 characters."""
    seed: int | None = None
    """0 to 2**64 - 1; None: a new one for every sequence, told in the result."""
    logprobs: int | None = None
    """None: no log probabilities; 0 to 20: the token's own and those of that many of the most probable."""
    ignore_eos: bool = False
    """Goes on after end tokens (for benchmarks)."""
    min_tokens: int = 0
    """Tokens before which no end token and none of stop_token_ids may come; at most max_tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Up to 64 further tokens that end the generation as an end token does."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> -100 to 100, added to its logit; up to 1,024."""

    def __post_init__(self) -> None:
        def store(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.max_tokens is not None:
            store("max_tokens", _integer("max_tokens", self.max_tokens, 0, 2**31 - 1))
        store("temperature", _number("temperature", self.temperature, 0, 100))
        store("top_k", _integer("top_k", self.top_k, 0, 2**31 - 1))
        store("top_p", _number("top_p", self.top_p, 0, 1, above=True))
        store("min_p", _number("min_p", self.min_p, 0, 1))
        store(
            "repetition_penalty", _number("repetition_penalty", self.repetition_penalty, 0, 100, above=True)
        )
        store("presence_penalty", _number("presence_penalty", self.presence_penalty, -2, 2))
        store("frequency_penalty", _number("frequency_penalty", self.frequency_penalty, -2, 2))
        store("stop", _stops(self.stop))
        if self.seed is not None:
            store("seed", _integer("seed", self.seed, 0, 2**64 - 1))
        if self.logprobs is not None:
            store("logprobs", _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS))
        if not isinstance(self.ignore_eos, bool):
            raise UsageError(f"ignore_eos must be true or false, not {_shown(self.ignore_eos)}")
        store("min_tokens", _integer("min_tokens", self.min_tokens, 0, 2**31 - 1))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        store("stop_token_ids", _token_ids(self.stop_token_ids))
        store("logit_bias", _bias(self.logit_bias))

    @property
    def penalised(self) -> bool:
        """Whether any penalty changes logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def updated(self, changes: Mapping[str, Any]) -> SamplingParams:
        """A copy with some fields changed. UsageError for a name that is not a field."""
        if not changes:
            return self
        known = [one.name for one in fields(self)]
        for name in changes:
            if name not in known:
                raise UsageError(f"unknown sampling parameter {name!r}: there are {', '.join(known)}")
        return replace(self, **changes)

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """The defaults that a model's generation_config.json names; what it leaves out stays off.

        `do_sample: false` means greedy, and its filters apply only once a temperature is asked for. Without
        `do_sample` a temperature in the file counts. Where the file has no temperature, it is 1 if
        `do_sample` is true and greedy otherwise. `max_new_tokens` is taken, `max_length` is not: it is
        Transformers' own default. Raises ModelError for values out of range.
        """
        values: dict[str, Any] = {}
        if config.get("top_k") == -1:  # some files say "off" this way
            config = {**config, "top_k": 0}
        names = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        for name in names:
            if config.get(name) is not None:
                values[name] = config[name]
        if config.get("max_new_tokens") is not None:
            values["max_tokens"] = config["max_new_tokens"]
        sample = config.get("do_sample")
        if sample is False:
            values["temperature"] = 0.0
        elif config.get("temperature") is not None:
            values["temperature"] = config["temperature"]
        else:
            values["temperature"] = 1.0 if sample else 0.0
        try:
            return cls(**values)
        except UsageError as error:
            raise ModelError(f"generation_config.json: {error}") from None


def _shown(value: object) -> str:
    return repr(value)[:40]


def _integer(name: str, value: object, low: int, high: int) -> int:
    try:
        number = operator.index(value) if not isinstance(value, bool) else None  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        bounds = f"from {low}" if high == 2**31 - 1 else f"between {low} and {high}"
        raise UsageError(f"{name} must be a whole number {bounds}, not {_shown(value)}")
    return number


def _number(name: str, value: object, low: float, high: float, above: bool = False) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high or (above and number == low):
        bounds = f"above {low:g} and at most {high:g}" if above else f"between {low:g} and {high:g}"
        raise UsageError(f"{name} must be a number {bounds}, not {_shown(value)}")
    return number


def _token_ids(value: object) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise UsageError(f"stop_token_ids must be a list of token ids, not {_shown(value)}")
    ids = tuple(_integer("stop_token_ids", one, 0, 2**31 - 1) for one in value)
    if len(ids) > MAX_STOP_TOKENS:
        raise UsageError(f"stop_token_ids may hold at most {MAX_STOP_TOKENS} ids, not {len(ids)}")
    return ids


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise UsageError(f"logit_bias must map token ids to numbers, not {_shown(value)}")
    if len(value) > MAX_BIASES:
        raise UsageError(f"logit_bias may hold at most {MAX_BIASES} tokens, not {len(value)}")
    return {
        _integer("logit_bias", token, 0, 2**31 - 1): _number("logit_bias", bias, -100, 100)
        for token, bias in value.items()
    }


def _stops(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    items = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else None
    if items is None or not all(isinstance(item, str) for item in items):
        raise UsageError(f"stop must be a string or several, not {_shown(value)}")
    stops = tuple(dict.fromkeys(items))
    if len(stops) > MAX_STOPS:
        raise UsageError(f"stop may hold at most {MAX_STOPS} strings, not {len(stops)}")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise UsageError(f"a stop string must have 1 to {MAX_STOP_CHARS} characters, not {len(stop)}")
    return stops
