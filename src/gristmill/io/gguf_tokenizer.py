"""Tokenizers stored in GGUF metadata, translated to Hugging Face files.

A GGUF file holds the vocabulary, merges or scores, token types and ids of special tokens under `tokenizer.*`.
`convert_tokenizer` turns them into the contents of `tokenizer.json` and `tokenizer_config.json`, so that the
rest of gristmill, and any Hugging Face tool, reads one kind of tokenizer.

Two vocabulary kinds exist here: byte-level BPE (`gpt2`) and SentencePiece BPE with byte fallback (`llama`).
Key names and defaults follow the GGUF specification and what llama.cpp does with the same keys; the splitting
of text before BPE follows the tokenizer.json files that the models were published with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gristmill.errors import TokenizerError

__all__ = [
    "END_OF_TURN_TEXTS",
    "TokenizerFiles",
    "convert_tokenizer",
    "end_of_turn_texts",
    "supported_pre_tokenizers",
]

Json = dict[str, object]
T = TypeVar("T")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

MAX_TOKENS = 1 << 22
MAX_MERGES = 1 << 23
MAX_TOKEN_CHARS = 1 << 14

# Texts that end a turn or a document in published models; a model's own ids always count as well.
END_OF_TURN_TEXTS = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>",
    "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>",
    "</s>", "<｜end▁of▁sentence｜>",
})  # fmt: skip


def end_of_turn_texts(texts: frozenset[str] | set[str]) -> frozenset[str]:
    """The texts among `texts` that end a turn by convention.

    `<|end|>` is left out where `<|return|>` and `<|call|>` exist: there it closes one message of several.
    """
    found = END_OF_TURN_TEXTS & texts
    if {"<|return|>", "<|call|>"} <= found:
        found -= {"<|end|>"}
    return frozenset(found)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer in Hugging Face form.

    tokenizer: contents of tokenizer.json. config: contents of tokenizer_config.json (special token texts,
    add_bos_token, add_eos_token, chat_template). eos_token_ids: every id that ends a generation, ascending;
    meant for generation_config.json.
    """

    tokenizer: Json
    config: Json
    eos_token_ids: tuple[int, ...]

    def write(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into an existing directory.

        The JSON has no optional spaces: a 49 k vocabulary then loads about twice as fast.
        """
        compact = json.dumps(self.tokenizer, ensure_ascii=False, separators=(",", ":"))
        (directory / "tokenizer.json").write_text(compact, encoding="utf-8")
        config = json.dumps(self.config, ensure_ascii=False, indent=1)
        (directory / "tokenizer_config.json").write_text(config, encoding="utf-8")


# ---- pre-tokenizers ----------------------------------------------------------------------------------------

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MARK = r"[^\r\n\p{L}\p{N}]?"


def _words(digits: str) -> str:
    """The split of the Llama 3 and Qwen families, which differ in how many digits stay together."""
    return rf"{_CONTRACTION}|{_MARK}\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"


def _cased(digits: str, suffix: str) -> str:
    """The split of GPT-4o and Tekken: a word ends where lower case turns into upper case."""
    return (
        rf"{_MARK}{_UPPER}*{_LOWER}+{suffix}|{_MARK}{_UPPER}+{_LOWER}*{suffix}|\p{{N}}{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
    )


_QWEN35 = rf"{_CONTRACTION}|{_MARK}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}"
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3 = (
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}"
)


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _splits(*patterns: str) -> list[Json]:
    return [*map(_split, patterns), _byte_level(False)]


_DIGITS: Json = {"type": "Digits", "individual_digits": True}
_FALCON: list[Json] = [
    {"type": "Punctuation", "behavior": "Contiguous"},
    _byte_level(True),
    {"type": "Digits", "individual_digits": False},
    _split("[0-9][0-9][0-9]"),
]


@dataclass(frozen=True)
class _Pre:
    """What one name of `tokenizer.ggml.pre` stands for."""

    steps: Sequence[Json]
    nfc: bool = False  # the published tokenizer normalises to NFC first
    ignore_merges: bool = False  # a whole word that is a token is taken without merging
    add_bos: bool = False  # what an absent add_bos_token means


_GPT2_STEPS = [_byte_level(True)]
_DIGIT_STEPS = [_DIGITS, _byte_level(True)]
_LLAMA3_STEPS = _splits(_words("{1,3}"))
_QWEN2_STEPS = _splits(_words(""))
_LLAMA3 = _Pre(_LLAMA3_STEPS, ignore_merges=True, add_bos=True)

_PRE: dict[str, _Pre] = {
    "default": _Pre(_splits(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "gigachat", "exaone4", "trillion", "granite-docling"), _Pre(_GPT2_STEPS)
    ),
    **dict.fromkeys(("mpt", "olmo"), _Pre(_GPT2_STEPS, nfc=True)),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), _Pre(_LLAMA3_STEPS)),
    "qwen2": _Pre(_QWEN2_STEPS, nfc=True),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "kormo", "stablelm2"), _Pre(_QWEN2_STEPS)),
    "qwen35": _Pre(_splits(_QWEN35), nfc=True),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), _Pre(_DIGIT_STEPS)
    ),
    "command-r": _Pre(_DIGIT_STEPS, nfc=True),
    "falcon": _Pre(_FALCON),
    "tekken": _Pre(_splits(_cased("", "")), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _Pre(_splits(_cased("{1,3}", _CONTRACTION + "?")))),
    "deepseek-coder": _Pre(
        [
            *map(
                _split, (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")
            ),
            _DIGITS,
            _byte_level(False),
        ]
    ),
    "deepseek-v3": _Pre(_splits(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3)),
}


def supported_pre_tokenizers() -> tuple[str, ...]:
    """The names of `tokenizer.ggml.pre` that can be read, sorted."""
    return tuple(sorted(_PRE))


# ---- reading the metadata ----------------------------------------------------------------------------------


class _Metadata:
    """Typed, checked access to the metadata; every failure names the key."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def get(self, key: str, kind: type[T], what: str) -> T | None:
        """A value of exactly this type (a bool is no int), None if the key is absent."""
        value = self._values.get(key)
        if value is None or type(value) is kind:
            return value
        raise TokenizerError(f"GGUF key {key} should be {what}, not {type(value).__name__}")

    def text(self, key: str) -> str | None:
        return self.get(key, str, "a string")

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, bool, "true or false")
        return default if value is None else value

    def token_id(self, key: str, count: int) -> int | None:
        value = self.get(key, int, "a token id")
        if value is not None and not 0 <= value < count:
            raise TokenizerError(f"GGUF key {key} is {value}, but the vocabulary has {count} tokens")
        return value

    def array(
        self, key: str, kinds: tuple[type, ...], limit: int, count: int | None = None
    ) -> list[Any] | None:
        """A list with elements of exactly these types."""
        value = self.get(key, list, "an array")
        if value is None:
            return None
        if count is not None and len(value) != count:
            raise TokenizerError(f"GGUF key {key} has {len(value)} entries for {count} tokens")
        if len(value) > limit:
            raise TokenizerError(f"GGUF key {key} has {len(value)} entries; at most {limit} are accepted")
        if wrong := set(map(type, value)) - set(kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise TokenizerError(f"GGUF key {key} should hold {names}, found {wrong.pop().__name__}")
        return value

    def texts(self, key: str, limit: int) -> list[str] | None:
        texts = self.array(key, (str,), limit)
        for index, text in enumerate(texts or ()):
            if len(text) > MAX_TOKEN_CHARS:
                raise TokenizerError(f"GGUF key {key}, entry {index}: {len(text)} characters are too long")
        try:
            "".join(texts or ()).encode("utf-8")
        except UnicodeEncodeError:
            raise TokenizerError(f"GGUF key {key} holds text that is not UTF-8") from None
        return texts


@dataclass(frozen=True)
class _Vocabulary:
    """texts and types by id, ids by text, ids by role; ends: the ids that end a generation; special: the ids
    that text cannot write."""

    texts: list[str]
    types: list[int]
    ids: dict[str, int]
    roles: dict[str, int]
    ends: frozenset[int]
    special: frozenset[int]


_ID_KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
}


def _read_vocabulary(metadata: _Metadata, sentencepiece: bool) -> _Vocabulary:
    texts = metadata.texts("tokenizer.ggml.tokens", MAX_TOKENS)
    if not texts:
        raise TokenizerError("the GGUF file has no tokenizer.ggml.tokens")
    # An empty text cannot be produced by any input; the name keeps ids aligned with the embedding rows.
    texts = [text or f"[EMPTY_{index}]" for index, text in enumerate(texts)]
    ids = {text: index for index, text in enumerate(texts)}
    if len(ids) != len(texts):
        index = next(i for i, text in enumerate(texts) if ids[text] != i)
        raise TokenizerError(
            f"token {texts[index][:80]!r} occurs twice, as ids {index} and {ids[texts[index]]}"
        )
    types = metadata.array("tokenizer.ggml.token_type", (int,), MAX_TOKENS, len(texts)) or [NORMAL] * len(
        texts
    )
    roles = {
        role: found
        for role, key in _ID_KEYS.items()
        if (found := metadata.token_id(key, len(texts))) is not None
    }
    if sentencepiece:
        # SentencePiece's own numbering, for older files that do not give the ids.
        for index, (role, wanted) in enumerate((("unk", UNKNOWN), ("bos", CONTROL), ("eos", CONTROL))):
            if index < len(types) and types[index] == wanted:
                roles.setdefault(role, index)
    ends = {roles[role] for role in ("eos", "eot", "eom") if role in roles}
    ends |= {ids[text] for text in end_of_turn_texts(ids.keys() & END_OF_TURN_TEXTS)}
    # A token that ends a turn is a control token even where the file calls it ordinary.
    special = ends | {index for index, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)}
    if "bos" in roles:
        special.add(roles["bos"])
    return _Vocabulary(texts, types, ids, roles, frozenset(ends), frozenset(special))


# ---- the two kinds -----------------------------------------------------------------------------------------


def _sequence(kind: str, parts: str, steps: Sequence[Json]) -> Json:
    return steps[0] if len(steps) == 1 else {"type": kind, parts: list(steps)}


def _bpe(vocab: dict[str, int], merges: Sequence[object], unk: str | None = None, **options: bool) -> Json:
    return {"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": unk, **options}


def _byte_level_parts(metadata: _Metadata, vocabulary: _Vocabulary, pre: _Pre) -> Json:
    merges = metadata.texts("tokenizer.ggml.merges", MAX_MERGES)
    if merges is None:
        raise TokenizerError("the GGUF file has no tokenizer.ggml.merges, which a gpt2 tokenizer needs")
    ids = vocabulary.ids
    for index, merge in enumerate(merges):
        # The first part may itself begin with a space, so the separator is looked for from the second
        # character.
        cut = merge.find(" ", 1)
        left, right = merge[: max(cut, 0)], merge[cut + 1 :]
        joins = left in ids and right in ids and left + right in ids
        if not joins or " " in left or " " in right:
            raise TokenizerError(
                f"tokenizer.ggml.merges, entry {index}: {merge[:80]!r} does not join two tokens"
            )
    return {
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": _sequence("Sequence", "pretokenizers", pre.steps),
        "decoder": _byte_level(True),
        "model": _bpe(ids, merges, ignore_merges=pre.ignore_merges),
    }


def _score_merges(vocab: Mapping[str, int], pieces: Mapping[str, float]) -> list[tuple[str, str]]:
    """Merges that make BPE choose as SentencePiece does: always the pair whose union has the best score.

    vocab holds every text that may stand on one side of a merge, pieces the texts that a merge may form, with
    their scores. Pairs that form the same piece have equal rank in SentencePiece; here the longer left part
    goes first.
    """
    ranked = sorted(pieces.items(), key=lambda item: (-item[1], vocab[item[0]]))
    return [
        (piece[:cut], piece[cut:])
        for piece, _ in ranked
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]


def _sentencepiece_parts(metadata: _Metadata, vocabulary: _Vocabulary) -> Json:
    texts = vocabulary.texts
    scores = metadata.array("tokenizer.ggml.scores", (float, int), MAX_TOKENS, len(texts))
    if scores is None:
        raise TokenizerError("the GGUF file has no tokenizer.ggml.scores, which a llama tokenizer needs")
    if not all(map(math.isfinite, scores)):
        raise TokenizerError("tokenizer.ggml.scores holds a value that is not a finite number")
    normal = [
        index
        for index, kind in enumerate(vocabulary.types)
        if kind == NORMAL and index not in vocabulary.special
    ]
    parts = {texts[index]: index for index in normal}
    pieces = {texts[index]: scores[index] for index in normal if len(texts[index]) > 1}
    vocab = dict(vocabulary.ids)
    characters = set("".join(pieces))
    for index in range(256):
        if (name := f"<0x{index:02X}>") not in vocab:
            raise TokenizerError(f"the llama tokenizer of the GGUF file lacks the byte token {name}")
        if index < 128 and chr(index) in characters and chr(index) not in vocab:
            # A piece such as two tabs is merged from a character that exists only as a byte token.
            vocab[chr(index)] = parts[chr(index)] = vocab[name]
    normalizers: list[Json] = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if metadata.flag("tokenizer.ggml.add_space_prefix", True):
        normalizers.insert(0, {"type": "Prepend", "prepend": "▁"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = vocabulary.roles.get("unk")
    unk = None if unknown is None else texts[unknown]
    return {
        "normalizer": _sequence("Sequence", "normalizers", normalizers),
        "pre_tokenizer": None,
        "decoder": _sequence("Sequence", "decoders", decoders),
        "model": _bpe(vocab, _score_merges(parts, pieces), unk, fuse_unk=True, byte_fallback=True),
    }


# ---- special tokens ----------------------------------------------------------------------------------------


def _added_token(index: int, text: str, special: bool) -> Json:
    no = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, "special": special, **no}


def _post_processor(begin: list[str], end: list[str], ids: Mapping[str, int]) -> Json:
    """Puts begin and end tokens around every text."""

    def token(text: str) -> Json:
        return {"SpecialToken": {"id": text, "type_id": 0}}

    def around(sequence: str) -> list[Json]:
        return [*map(token, begin), {"Sequence": {"id": sequence, "type_id": 0}}, *map(token, end)]

    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": around("A") + around("B"),
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in begin + end},
    }


def _chat_template(metadata: _Metadata) -> object:
    """The template, or Hugging Face's list of named templates if the file has several; None without any."""
    named = {"default": metadata.text("tokenizer.chat_template")}
    for name in metadata.texts("tokenizer.chat_templates", 64) or []:
        named[name] = metadata.text(f"tokenizer.chat_template.{name}")
        if named[name] is None:
            raise TokenizerError(
                f"tokenizer.chat_templates names {name[:80]!r}, but there is no such template"
            )
    if len(named) == 1:
        return named["default"]
    return [{"name": name, "template": template} for name, template in named.items() if template is not None]


def convert_tokenizer(metadata: Mapping[str, object]) -> TokenizerFiles:
    """Translate the `tokenizer.*` keys of a GGUF file.

    metadata maps full key names to Python values; keys that are not about the tokenizer are ignored. Raises
    TokenizerError for a kind of tokenizer or a pre-tokenizer that is not known, and for entries of a wrong
    type, count or range. A damaged vocabulary never takes more memory than a few times its own size.
    """
    data = _Metadata(metadata)
    kind = data.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        problem = f"the kind {kind[:80]!r}, which is not supported" if kind else "no tokenizer.ggml.model"
        raise TokenizerError(f"the tokenizer of the GGUF file has {problem} (supported: gpt2, llama)")
    vocabulary = _read_vocabulary(data, sentencepiece=kind == "llama")
    texts, roles = vocabulary.texts, vocabulary.roles
    if kind == "llama":
        parts, adds_begin = _sentencepiece_parts(data, vocabulary), True
    else:
        pre = _pre_tokenizer(data)
        parts, adds_begin = _byte_level_parts(data, vocabulary, pre), pre.add_bos
    begin = _surrounding(data, "bos", vocabulary, adds_begin and "bos" in roles)
    end = _surrounding(data, "eos", vocabulary, False)
    tokenizer: Json = {
        "version": "1.0",
        "added_tokens": [
            _added_token(index, texts[index], index in vocabulary.special)
            for index, sort in enumerate(vocabulary.types)
            if index in vocabulary.special or sort == USER_DEFINED
        ],
        "post_processor": _post_processor(begin, end, vocabulary.ids),
        **parts,
    }
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(begin),
        "add_eos_token": bool(end),
        "clean_up_tokenization_spaces": False,
    }
    for role in ("bos", "eos", "unk", "pad", "sep", "mask"):
        token = roles.get(role)
        # Only tokens that text cannot produce: some files pad with "!", which must stay an ordinary token.
        if token is not None and (token in vocabulary.special or vocabulary.types[token] == USER_DEFINED):
            config[f"{role}_token"] = texts[token]
    if (template := _chat_template(data)) is not None:
        config["chat_template"] = template
    return TokenizerFiles(tokenizer, config, tuple(sorted(vocabulary.ends)))


def _surrounding(metadata: _Metadata, role: str, vocabulary: _Vocabulary, default: bool) -> list[str]:
    """The token to put at the begin or end of every text, if any."""
    key = f"tokenizer.ggml.add_{role}_token"
    if not metadata.flag(key, default):
        return []
    if role not in vocabulary.roles:
        raise TokenizerError(f"{key} is true, but {_ID_KEYS[role]} is not set")
    return [vocabulary.texts[vocabulary.roles[role]]]


def _pre_tokenizer(metadata: _Metadata) -> _Pre:
    name = metadata.text("tokenizer.ggml.pre")
    pre = _PRE.get("default" if name is None else name)
    if pre is None:
        raise TokenizerError(f"the GGUF pre-tokenizer {str(name)[:80]!r} is not supported")
    return pre
