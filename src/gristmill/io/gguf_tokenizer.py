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

from gristmill.errors import TokenizerError

__all__ = [
    "END_OF_TURN_TEXTS",
    "TokenizerFiles",
    "convert_tokenizer",
    "end_of_turn_texts",
    "supported_pre_tokenizers",
]

Json = dict[str, object]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

MAX_TOKENS = 1 << 22
MAX_MERGES = 1 << 23
MAX_TOKEN_CHARS = 1 << 14

# Texts that end a turn or a document in published models; a model's own ids always count as well.
END_OF_TURN_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<eos>",
        "</s>",
        "<｜end▁of▁sentence｜>",
    }
)


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


def _plain(value: object) -> object:
    """NumPy arrays and scalars as Python lists and scalars, anything else unchanged."""
    convert = getattr(value, "tolist", None)
    return convert() if callable(convert) else value


class _Metadata:
    """Typed, checked access to the metadata mapping; every failure names the key."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def _get(self, key: str) -> object:
        return _plain(self._values.get(key))

    def text(self, key: str) -> str | None:
        value = self._get(key)
        if value is not None and not isinstance(value, str):
            raise TokenizerError(f"GGUF key {key} should be a string, not {type(value).__name__}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise TokenizerError(f"GGUF key {key} should be true or false, not {type(value).__name__}")
        return value

    def token_id(self, key: str, count: int) -> int | None:
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise TokenizerError(f"GGUF key {key} should be a token id, not {type(value).__name__}")
        if not 0 <= value < count:
            raise TokenizerError(f"GGUF key {key} is {value}, but the vocabulary has {count} tokens")
        return value

    def array(
        self, key: str, kinds: tuple[type, ...], limit: int, count: int | None = None
    ) -> list[object] | None:
        """A list with elements of exactly these kinds (a bool is no int); None if the key is absent."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)):
            raise TokenizerError(f"GGUF key {key} should be an array, not {type(value).__name__}")
        if count is not None and len(value) != count:
            raise TokenizerError(f"GGUF key {key} has {len(value)} entries for {count} tokens")
        if len(value) > limit:
            raise TokenizerError(f"GGUF key {key} has {len(value)} entries; at most {limit} are accepted")
        wrong = {type(item) for item in value} - set(kinds)
        if wrong:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise TokenizerError(f"GGUF key {key} should hold {names}, found {wrong.pop().__name__}")
        return list(value)

    def texts(self, key: str, limit: int) -> list[str] | None:
        items = self.array(key, (str,), limit)
        if items is None:
            return None
        texts = [item for item in items if isinstance(item, str)]
        for index, item in enumerate(texts):
            if len(item) > MAX_TOKEN_CHARS:
                raise TokenizerError(f"GGUF key {key}, entry {index}: {len(item)} characters are too long")
        try:
            "".join(texts).encode("utf-8")
        except UnicodeEncodeError:
            raise TokenizerError(f"GGUF key {key} holds text that is not UTF-8") from None
        return texts


@dataclass(frozen=True)
class _Vocabulary:
    texts: list[str]
    types: list[int]
    ids: dict[str, int]


def _read_vocabulary(metadata: _Metadata) -> _Vocabulary:
    texts = metadata.texts("tokenizer.ggml.tokens", MAX_TOKENS)
    if not texts:
        raise TokenizerError("the GGUF file has no tokenizer.ggml.tokens")
    # An empty text cannot be produced by any input; the name keeps ids aligned with the embedding rows.
    texts = [text or f"[EMPTY_{index}]" for index, text in enumerate(texts)]
    ids = {text: index for index, text in enumerate(texts)}
    if len(ids) != len(texts):
        index = next(i for i, text in enumerate(texts) if ids[text] != i)
        raise TokenizerError(f"token {texts[index]!r} occurs twice, as ids {index} and {ids[texts[index]]}")
    types = metadata.array("tokenizer.ggml.token_type", (int,), MAX_TOKENS, len(texts))
    kinds = [kind for kind in types if isinstance(kind, int)] if types is not None else [NORMAL] * len(texts)
    return _Vocabulary(texts, kinds, ids)


# ---- the two kinds -----------------------------------------------------------------------------------------


def _byte_level_model(metadata: _Metadata, vocabulary: _Vocabulary, pre: _Pre) -> Json:
    merges = metadata.texts("tokenizer.ggml.merges", MAX_MERGES)
    if merges is None:
        raise TokenizerError("the GGUF file has no tokenizer.ggml.merges, which a gpt2 tokenizer needs")
    ids = vocabulary.ids
    for index, merge in enumerate(merges):
        # The first part may itself begin with a space, so the separator is looked for from the second
        # character.
        cut = merge.find(" ", 1)
        left, right = merge[: max(cut, 0)], merge[cut + 1 :]
        if (
            cut < 0
            or " " in left
            or " " in right
            or left not in ids
            or right not in ids
            or left + right not in ids
        ):
            raise TokenizerError(
                f"tokenizer.ggml.merges, entry {index}: {merge[:80]!r} does not join two tokens"
            )
    normalizer = {"type": "NFC"} if pre.nfc else None
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre.steps[0]
        if len(pre.steps) == 1
        else {"type": "Sequence", "pretokenizers": list(pre.steps)},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(ids, merges, unk=None, byte_fallback=False, ignore_merges=pre.ignore_merges),
    }


def _bpe(
    vocab: dict[str, int],
    merges: Sequence[object],
    *,
    unk: str | None,
    byte_fallback: bool,
    ignore_merges: bool,
) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
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


def _sentencepiece_model(metadata: _Metadata, vocabulary: _Vocabulary, unk: int | None) -> Json:
    count = len(vocabulary.texts)
    scores = metadata.array("tokenizer.ggml.scores", (float, int), MAX_TOKENS, count)
    if scores is None:
        raise TokenizerError("the GGUF file has no tokenizer.ggml.scores, which a llama tokenizer needs")
    values = [float(score) if isinstance(score, (int, float)) else 0.0 for score in scores]
    if not all(map(math.isfinite, values)):
        raise TokenizerError("tokenizer.ggml.scores holds a value that is not a finite number")
    vocab = dict(vocabulary.ids)
    normal = [index for index, kind in enumerate(vocabulary.types) if kind == NORMAL]
    pieces = {vocabulary.texts[index]: values[index] for index in normal if len(vocabulary.texts[index]) > 1}
    parts = {vocabulary.texts[index]: index for index in normal}
    characters = set("".join(pieces))
    for index in range(256):
        if (name := f"<0x{index:02X}>") not in vocab:
            raise TokenizerError(f"the llama tokenizer of the GGUF file lacks the byte token {name}")
        if index < 128 and chr(index) in characters and chr(index) not in vocab:
            # A piece such as two tabs is merged from a character that exists only as a byte token.
            vocab[chr(index)] = parts[chr(index)] = vocab[name]
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    spaces: Json = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizers = [spaces]
    if prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": "▁"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            vocab,
            _score_merges(parts, pieces),
            unk=None if unk is None else vocabulary.texts[unk],
            byte_fallback=True,
            ignore_merges=False,
        ),
    }


# ---- special tokens ----------------------------------------------------------------------------------------


def _added_tokens(vocabulary: _Vocabulary, special: frozenset[int]) -> list[Json]:
    return [
        {
            "id": index,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": index in special,
        }
        for index, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.types, strict=True))
        if index in special or kind == USER_DEFINED
    ]


def _post_processor(vocabulary: _Vocabulary, bos: int | None, eos: int | None) -> Json:
    """Adds the begin and end tokens that are not None around a text."""

    def single(kind: str) -> Json:
        return {"Sequence": {"id": kind, "type_id": 0}}

    def token(index: int | None) -> list[Json]:
        return [] if index is None else [{"SpecialToken": {"id": vocabulary.texts[index], "type_id": 0}}]

    return {
        "type": "TemplateProcessing",
        "single": [*token(bos), single("A"), *token(eos)],
        "pair": [*token(bos), single("A"), *token(eos), *token(bos), single("B"), *token(eos)],
        "special_tokens": {
            vocabulary.texts[index]: {
                "id": vocabulary.texts[index],
                "ids": [index],
                "tokens": [vocabulary.texts[index]],
            }
            for index in (bos, eos)
            if index is not None
        },
    }


def _chat_template(metadata: _Metadata) -> object:
    """The template, or Hugging Face's list of named templates if the file has several; None without any."""
    default = metadata.text("tokenizer.chat_template")
    names = metadata.texts("tokenizer.chat_templates", 64) or []
    named: list[Json] = []
    for name in names:
        template = metadata.text(f"tokenizer.chat_template.{name}")
        if template is None:
            raise TokenizerError(f"tokenizer.chat_templates names {name!r}, but there is no such template")
        named.append({"name": name, "template": template})
    if not named:
        return default
    if default is not None:
        named.insert(0, {"name": "default", "template": default})
    return named


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


def convert_tokenizer(metadata: Mapping[str, object]) -> TokenizerFiles:
    """Translate the `tokenizer.*` keys of a GGUF file.

    metadata maps full key names to Python or NumPy values; keys that are not about the tokenizer are ignored.
    Raises TokenizerError for a kind of tokenizer or a pre-tokenizer that is not known, and for entries of a
    wrong type, count or range. A damaged vocabulary never takes more memory than a few times its own size.
    """
    data = _Metadata(metadata)
    kind = data.text("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        problem = f"the kind {kind[:80]!r}, which is not supported" if kind else "no tokenizer.ggml.model"
        raise TokenizerError(f"the tokenizer of the GGUF file has {problem} (supported: gpt2, llama)")
    vocabulary = _read_vocabulary(data)
    ids = _special_ids(data, vocabulary, sentencepiece=kind == "llama")
    if kind == "llama":
        parts, bos_default = _sentencepiece_model(data, vocabulary, ids.get("unk")), True
    else:
        pre = _pre_tokenizer(data)
        parts, bos_default = _byte_level_model(data, vocabulary, pre), pre.add_bos
    around = {
        "bos": _added(data, "bos", ids, bos_default and "bos" in ids),
        "eos": _added(data, "eos", ids, False),
    }

    ends = {ids[name] for name in ("eos", "eot", "eom") if name in ids}
    # A token that ends a turn is a control token even where the file calls it ordinary.
    ends |= {vocabulary.ids[text] for text in end_of_turn_texts(vocabulary.ids.keys() & END_OF_TURN_TEXTS)}
    control = {index for index, sort in enumerate(vocabulary.types) if sort in (CONTROL, UNKNOWN)}
    special = frozenset(control | ends | ({ids["bos"]} if "bos" in ids else set()))

    tokenizer: Json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary, special),
        "normalizer": parts["normalizer"],
        "pre_tokenizer": parts["pre_tokenizer"],
        "post_processor": _post_processor(vocabulary, around["bos"], around["eos"]),
        "decoder": parts["decoder"],
        "model": parts["model"],
    }
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": around["bos"] is not None,
        "add_eos_token": around["eos"] is not None,
        "clean_up_tokenization_spaces": False,
    }
    for name in ("bos", "eos", "unk", "pad", "sep", "mask"):
        # Only tokens that text cannot produce: some files pad with "!", which must stay an ordinary token.
        if name in ids and (ids[name] in special or vocabulary.types[ids[name]] == USER_DEFINED):
            config[f"{name}_token"] = vocabulary.texts[ids[name]]
    template = _chat_template(data)
    if template is not None:
        config["chat_template"] = template
    return TokenizerFiles(tokenizer, config, tuple(sorted(ends)))


def _special_ids(metadata: _Metadata, vocabulary: _Vocabulary, sentencepiece: bool) -> dict[str, int]:
    """Ids by role, where the file gives them; SentencePiece's own numbering where older files do not."""
    ids = {
        name: index
        for name, key in _ID_KEYS.items()
        if (index := metadata.token_id(key, len(vocabulary.texts))) is not None
    }
    if sentencepiece:
        for index, (name, wanted) in enumerate((("unk", UNKNOWN), ("bos", CONTROL), ("eos", CONTROL))):
            if index < len(vocabulary.types) and vocabulary.types[index] == wanted:
                ids.setdefault(name, index)
    return ids


def _added(metadata: _Metadata, name: str, ids: Mapping[str, int], default: bool) -> int | None:
    """The id to put at the begin or end of every text, None for none."""
    key = f"tokenizer.ggml.add_{name}_token"
    if not metadata.flag(key, default):
        return None
    if name not in ids:
        raise TokenizerError(f"{key} is true, but {_ID_KEYS[name]} is not set")
    return ids[name]


def _pre_tokenizer(metadata: _Metadata) -> _Pre:
    name = metadata.text("tokenizer.ggml.pre")
    pre = _PRE.get("default" if name is None else name)
    if pre is None:
        raise TokenizerError(f"the GGUF pre-tokenizer {str(name)[:80]!r} is not supported")
    return pre
