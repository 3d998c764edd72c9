"""Constraints on the output: JSON, schemas, regular expressions, grammars and choices, through llguidance.

JSON comes compact, without free white space between its parts. What a schema says and llguidance does not
know is an error, never ignored. Words that only describe, and `x-` words, are free.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gristmill.engine.request import Constraint
from gristmill.errors import GristmillError, UsageError
from gristmill.serve import logs
from gristmill.serve.limits import LIMITS

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["ConstraintSpec", "ConstraintTokenizer", "Constraints", "Watched", "check_schema"]

_KEPT = 64
"""Compiled grammars that are kept."""
_STEP_FUEL = 400_000
_STEP_ITEMS = 10_000
"""They bound the work for one token, which the engine waits for. The worst found: 0.2 s, for a grammar of
many meanings; 20 ms are usual for literals of 60 KB, and 0.1 ms for schemas."""
_CHECKED_STEPS = 4
"""Tokens that a check goes on for: an object of too many optional properties fails after its brace."""

_ONE = frozenset({"additionalItems", "additionalProperties"})
_MANY = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_NAMED = frozenset({"$defs", "definitions", "patternProperties", "properties"})
_FOLLOWED = frozenset(
    {"$ref", "const", "enum", "exclusiveMaximum", "exclusiveMinimum", "format", "items", "maxItems"}
    | {"maxLength", "maxProperties", "maximum", "minItems", "minLength", "minProperties", "minimum"}
    | {"multipleOf", "pattern", "required", "type"}
)
_DESCRIBES = frozenset(
    {"$anchor", "$comment", "$id", "$schema", "contentEncoding", "contentMediaType", "contentSchema"}
    | {"default", "deprecated", "description", "discriminator", "example", "examples", "externalDocs", "id"}
    | {"readOnly", "title", "writeOnly"}
)
"""Annotations by the specifications of JSON schema and OpenAPI: they do not change what is valid."""
_KNOWN = _ONE | _MANY | _NAMED | _FOLLOWED | _DESCRIBES


class ConstraintTokenizer(Protocol):
    """What constraints need of a tokenizer."""

    def token_bytes(self, token_id: int) -> bytes: ...

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]: ...

    @property
    def special_ids(self) -> frozenset[int]: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...


@dataclass(frozen=True)
class ConstraintSpec:
    """What is asked: `text` is a schema, a regular expression, a grammar (Lark or GBNF), a JSON list of
    choices, or nothing (json_object)."""

    kind: Literal["json_object", "json_schema", "regex", "grammar", "choice"]
    text: str


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: ConstraintTokenizer, size: int) -> None:
        self.eos_token_id = min(tokenizer.eos_token_ids, default=0)
        self.bos_token_id = None
        self.special_token_ids = sorted(tokenizer.special_ids | tokenizer.eos_token_ids)
        special = frozenset(self.special_token_ids)
        self.tokens = [
            b"\xff<special_%d>" % token if token in special else _bytes(tokenizer, token)
            for token in range(size)
        ]
        self._encode = tokenizer.encode

    def __call__(self, data: bytes | str) -> list[int]:
        text = data.decode(errors="replace") if isinstance(data, bytes) else data
        return self._encode(text, add_special=False)


def _bytes(tokenizer: ConstraintTokenizer, token: int) -> bytes:
    try:
        return tokenizer.token_bytes(token)
    except (GristmillError, IndexError, KeyError):
        return b""  # the model has more rows than its tokenizer tokens


class _Compiled:
    """A grammar whose copies share what llguidance learns of it, limits on that included."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.failed = False
        """A copy could not be followed: later ones may fail for what that one did."""


class Constraints:
    """Compiles constraints for one tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: ConstraintTokenizer, vocab_size: int) -> None:
        """vocab_size: columns of the logits. The tables are made on first use: half a second."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = tokenizer.eos_token_ids
        self._lock = threading.Lock()
        self._made: Any = None
        self._kept: OrderedDict[ConstraintSpec, _Compiled] = OrderedDict()

    def factory(self, spec: ConstraintSpec) -> Callable[[], Constraint]:
        """Makes constraints that follow the spec. UsageError if it is not valid or takes too much."""
        with self._lock:
            kept = self._kept.get(spec)
            if kept is None or kept.failed:
                kept = self._kept[spec] = _Compiled(self._compile(spec))
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(spec)
        return lambda: _Follower(kept, self._ends, self._vocab_size)

    def warm(self) -> None:
        """Makes the tables that the first constraint would wait for."""
        self.factory(ConstraintSpec("json_object", ""))

    def check(self, spec: ConstraintSpec) -> None:
        """Compiles, and follows some text that is allowed for a few tokens. UsageError.

        Endless recursion and too much work show only there. What shows later fails in the engine.
        """
        words = np.zeros(-(-self._vocab_size // 32), np.int32)
        follower = self.factory(spec)()
        try:
            for _ in range(_CHECKED_STEPS):
                follower.mask(words)
                allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
                if not len(allowed):
                    raise UsageError("nothing satisfies the constraint on the output")
                follower.accept(next((int(one) for one in allowed if one not in self._ends), int(allowed[0])))
        except UsageError:
            raise
        except GristmillError as error:
            raise UsageError(str(error)) from None

    def _compile(self, spec: ConstraintSpec) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

        if self._made is None:
            vocabulary = TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size))
            ends = sorted(self._ends) or [0]
            self._made = LLTokenizer(vocabulary, n_vocab=self._vocab_size, eos_token=ends)
        limits = LLParserLimits(step_lexer_fuel=_STEP_FUEL, step_max_items=_STEP_ITEMS, verbose_errors=False)
        grammar = _grammar(spec)
        bad, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=limits)
        if bad:
            raise UsageError(_line(messages))
        matcher = LLMatcher(self._made, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise UsageError(_line([matcher.get_error()]))
        return matcher


def _line(messages: Iterable[str]) -> str:
    return f"the constraint on the output is not valid: {_reason(' '.join(messages))}"


def _reason(message: str) -> str:
    text = " ".join(message.replace("<non-verbose/>", "").split())
    return "nothing is allowed after the text so far" if text == "NoExtensionBias" else text[:300]


def check_schema(schema: object) -> None:
    """UsageError that names a word in a schema which would be ignored. llguidance refuses only those it knows
    to be missing, `not` and `contains` among them; it passes over all others."""
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if not isinstance(one, dict):
            continue
        for word, value in one.items():
            if word in _ONE or (word == "items" and isinstance(value, dict)):
                waiting.append(value)
            elif (word in _MANY or word == "items") and isinstance(value, list):
                waiting += value
            elif word in _NAMED and isinstance(value, dict):
                waiting += value.values()
            elif word == "x-guidance" or (word not in _KNOWN and not word.startswith("x-")):
                raise UsageError(f"the schema holds {word[:64]!r}, which is not supported")


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError("the constraint on the output is not valid JSON") from None


def _choices(text: str) -> str:
    """The choices in Lark's form. It reads JSON's strings, but for one character."""
    choices = _parsed(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise UsageError("a choice needs texts that are not empty")
    return " | ".join(json.dumps(one, ensure_ascii=False) for one in choices).replace("\x7f", "\\u007f")


def _grammar(spec: ConstraintSpec) -> str:
    """The spec in llguidance's own form."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if len(spec.text.encode()) > LIMITS["schema_bytes"]:
        raise UsageError(f"a constraint on the output may have {LIMITS['schema_bytes']} bytes at most")
    options: Any = {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
        "lenient": False,
    }
    if spec.kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=options)
    if spec.kind == "json_schema":
        schema = _parsed(spec.text)
        check_schema(schema)
        try:
            return LLMatcher.grammar_from_json_schema(schema, overrides=options)
        except ValueError as error:
            raise UsageError(_line([str(error)])) from None
    if spec.kind == "regex":
        return LLMatcher.grammar_from_regex(spec.text)
    if spec.kind == "choice":
        return LLMatcher.grammar_from_lark(f"start: {_choices(spec.text)}")
    text = spec.text
    if "::=" in text:
        try:
            text = gbnf_to_lark(text)
        except Exception as error:
            raise UsageError(_line([str(error)])) from None
    return LLMatcher.grammar_from_lark(text)


class _Follower:
    """One sequence's place in a grammar."""

    def __init__(self, compiled: _Compiled, ends: frozenset[int], vocab_size: int) -> None:
        self._compiled = compiled
        self._matcher = compiled.matcher.deep_copy()
        self._ends = ends
        self._vocab_size = vocab_size

    def mask(self, words: NDArray[np.int32]) -> bool:
        """See `Constraint`."""
        if self._matcher.is_stopped():
            words.fill(0)
            self._allow_ends(words)
            return True
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check()
        if self._matcher.is_accepting():
            self._allow_ends(words)
        return True

    def accept(self, token: int) -> None:
        """See `Constraint`."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self._check()

    def _allow_ends(self, words: NDArray[np.int32]) -> None:
        bits = words.view(np.uint32)
        for token in self._ends:
            if token < self._vocab_size:
                bits[token // 32] |= np.uint32(1 << token % 32)

    def _check(self) -> None:
        if self._matcher.is_error():
            self._compiled.failed = True
            raise GristmillError(
                f"the constraint on the output cannot be followed: {_reason(self._matcher.get_error())}"
            )


class Watched:
    """Makes the constraints of one request, and remembers why one of them could not be followed.

    That is the request's own fault, and the engine only tells that the request failed.
    """

    def __init__(self, make: Callable[[], Constraint], ends: frozenset[int], min_tokens: int) -> None:
        """ends: tokens that end the answer, which may not come before `min_tokens` others."""
        self._make = make
        self._ends = ends
        self._min_tokens = min_tokens
        self.failure: str | None = None

    def __call__(self) -> Constraint:
        """One for a continuation."""
        return _Watched(self, self._make(), self._ends, self._min_tokens)


class _Watched:
    def __init__(self, told: Watched, inner: Constraint, ends: frozenset[int], min_tokens: int) -> None:
        self._told = told
        self._inner = inner
        self._ends = ends
        self._early = min_tokens
        """Tokens before the answer may end."""

    def mask(self, words: NDArray[np.int32]) -> bool:
        """See `Constraint`."""
        with self._watch():
            masked = self._inner.mask(words)
            if masked and self._early > 0 and not self._without_ends(words).any():
                raise GristmillError("the constraint on the output allows no further token before min_tokens")
            if masked and not words.any():
                raise GristmillError("the constraint on the output allows no further token")
            return masked

    def accept(self, token: int) -> None:
        """See `Constraint`."""
        with self._watch():
            self._inner.accept(token)
        self._early -= 1

    def _without_ends(self, words: NDArray[np.int32]) -> NDArray[np.uint32]:
        bits = words.view(np.uint32).copy()
        for token in self._ends:
            if token < 32 * len(bits):
                bits[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
        return bits

    @contextmanager
    def _watch(self) -> Iterator[None]:
        try:
            yield
        except GristmillError as error:
            self._told.failure = str(error)
            raise
        except Exception as error:  # anything else would take the step along, and all who are in it
            logs.logger.exception("a constraint failed")
            raise GristmillError(f"the constraint on the output failed: {type(error).__name__}") from None
