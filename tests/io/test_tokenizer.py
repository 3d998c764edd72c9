"""Tokenizers read from Hugging Face files, in the styles of published models, against Transformers."""

from __future__ import annotations

import copy
import functools
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from gristmill.engine.detokenizer import Detokenizer
from gristmill.errors import ModelError, TokenizerError
from gristmill.io.tokenizer import Tokenizer
from tests.kits.hostile import assert_one_line

TEXTS = [
    "",
    " ",
    "Hello, world! It's 12345 o'clock.",
    "  two  leading\n\n and trailing \t ",
    "漢字 🙂👩‍👩‍👧‍👦 cafe\u0301 Å \u212b",
    "▁ ▁▁x <0x41>\x00\ufffd",
    "a" * 50 + " " * 30 + "\n" * 10,
]
CORPUS = [
    "the quick brown fox jumps over the lazy dog, it's the 1234th time",
    "Hello world, hello there; what's the weather like over there?",
    "  def f(x):\n        return x\n",
    "cafe\u0301 漢字 漢字",
] * 4
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
REPLACE = decoders.Replace("▁", " ")


def byte_level(pattern: str | None = None, nfc: bool = False) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    if nfc:
        backend.normalizer = normalizers.NFC()
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = pre_tokenizers.Split(tokenizers.Regex(pattern or "."), "isolated")
    backend.pre_tokenizer = letters if pattern is None else pre_tokenizers.Sequence([split, letters])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return backend


def sentencepiece(normalizer: Any, pre_tokenizer: Any, decoder: Any) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizer or spaces
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *BYTE_TOKENS], show_progress=False
    )
    backend.train_from_iterator([text for text in CORPUS if text.isascii()], trainer)
    # The trainer made the byte tokens special, which they are not in published files.
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    return backend


def around(begin: str, index: int) -> Any:
    return processors.TemplateProcessing(
        single=[begin, "$A"], pair=[begin, "$A", begin, "$B"], special_tokens=[(begin, index)]
    )


def gpt2() -> tokenizers.Tokenizer:
    return byte_level()


def qwen() -> tokenizers.Tokenizer:
    return byte_level(LLAMA3.replace("{1,3}", ""), nfc=True)


def llama3() -> tokenizers.Tokenizer:
    backend = byte_level(LLAMA3)
    backend.add_special_tokens(SPECIAL)
    letters = processors.ByteLevel(trim_offsets=True)
    begin = around("<|begin|>", backend.token_to_id("<|begin|>"))
    backend.post_processor = processors.Sequence([letters, begin])
    return backend


def llama2() -> tokenizers.Tokenizer:
    prefix = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    backend = sentencepiece(
        prefix, None, decoders.Sequence([REPLACE, decoders.ByteFallback(), decoders.Fuse(), strip])
    )
    backend.post_processor = around("<s>", 1)
    return backend


def mistral() -> tokenizers.Tokenizer:
    space = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    strip = decoders.Strip(" ", 1, 0)
    backend = sentencepiece(
        None, space, decoders.Sequence([REPLACE, decoders.ByteFallback(), decoders.Fuse(), strip])
    )
    backend.post_processor = around("<s>", 1)
    return backend


def gemma() -> tokenizers.Tokenizer:
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    backend = sentencepiece(
        normalizers.Replace(" ", "▁"),
        split,
        decoders.Sequence([REPLACE, decoders.ByteFallback(), decoders.Fuse()]),
    )
    backend.post_processor = around("<s>", 1)
    return backend


STYLES = {style.__name__: style for style in (gpt2, qwen, llama3, llama2, mistral, gemma)}


@functools.cache
def built(style: str) -> str:
    """tokenizer.json of a style, with special tokens, one that swallows spaces, and ordinary added ones."""
    backend = STYLES[style]()
    backend.add_special_tokens([*SPECIAL, AddedToken("<|strip|>", lstrip=True, rstrip=True, special=True)])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return backend.to_str()


def write(directory: Path, content: str, **files: Any) -> Path:
    (directory / "tokenizer.json").write_text(content, encoding="utf-8")
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return directory


def load(style: str, directory: Path, **files: Any) -> Tokenizer:
    return Tokenizer.load(write(directory, built(style), **files))


@functools.cache
def pair(style: str) -> tuple[Tokenizer, Any]:
    """Ours and Transformers' tokenizer of a style."""
    other = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(built(style)),
        clean_up_tokenization_spaces=False,
        eos_token="<|end|>",
    )
    ours = Tokenizer(tokenizers.Tokenizer.from_str(built(style)), config={"eos_token": "<|end|>"})
    return ours, other


def plain_text(style: str, text: str) -> str:
    """What a text looks like after encoding and decoding."""
    if style == "qwen":
        return unicodedata.normalize("NFC", text)
    if style in ("llama2", "mistral", "gemma"):
        text = text.replace("▁", " ")
    # This one adds no space to a text that has one, and yet drops one when decoding.
    return text[1:] if style == "mistral" and text.startswith(" ") else text


# ---- against Transformers


@pytest.mark.parametrize("style", STYLES)
def test_texts_without_special_tokens(style):
    ours, other = pair(style)
    for text in TEXTS:
        want = other.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special=False) == want, text
        assert ours.encode(text) == other.encode(text), text
        assert ours.decode(want) == other.decode(want) == plain_text(style, text)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\nHello <think>there<|im_end|>\n",
        "<|im_end|><|im_end|> x <|im_start|>",
        "a <|strip|> b<|strip|>\n\nc  <|strip|>",
        "<|im_start|> hello world<|im_end|> hello world",
        "<|im_start <|im_start|><think> it's<|im_end|",
    ],
)
def test_templates_with_special_tokens(style, text):
    ours, other = pair(style)
    want = other.encode(text, add_special_tokens=False)
    assert ours.encode(text, add_special=False, parse_special=True) == want
    assert ours.encode_template(text) == want
    for skip in (True, False):
        assert ours.decode(want, skip_special=skip) == other.decode(want, skip_special_tokens=skip)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60)
@given(
    text=st.text(
        st.one_of(st.sampled_from("the is'\n\t 12<|>▁é漢🙂"), st.characters(codec="utf-8")), max_size=24
    )
)
def test_any_text(style, text):
    ours, other = pair(style)
    ids = ours.encode(text, add_special=False)
    if not any(token.content in text for token in other.added_tokens_decoder.values() if token.special):
        assert ids == other.encode(text, add_special_tokens=False)
    assert not set(ids) & ours.special_ids
    assert ours.decode(ids) == plain_text(style, text)
    detokenizer = Detokenizer(ours)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == ours.decode(ids)


# ---- special tokens are not text


@pytest.mark.parametrize("style", STYLES)
def test_user_text_never_holds_special_tokens(style):
    ours, _ = pair(style)
    for text in [*SPECIAL, "a<|im_end|>b", "<|im_end|>" * 3, " <|strip|> ", "<s></s><unk>"]:
        ids = ours.encode(text, add_special=False)
        assert not set(ids) & ours.special_ids, text
        assert ours.decode(ids) == plain_text(style, text)


def test_special_tokens_that_only_the_configuration_names(tmp_path):
    config = {
        "bos_token": "<think>",
        "eos_token": {"content": "the", "lstrip": False},
        "additional_special_tokens": ["<|im_end|>", "no such token"],
    }
    ours = load("gpt2", tmp_path, tokenizer_config=config)
    assert ours.token_id("<think>") in ours.special_ids
    assert ours.bos_token_id == ours.token_id("<think>")
    assert ours.token_id("<think>") not in ours.encode("<think>")
    assert ours.token_id("no such token") is None
    # An ordinary word stays one, but still ends a generation.
    assert ours.encode("the") == [ours.token_id("the")]
    assert ours.token_id("the") in ours.eos_token_ids


def test_tokens_that_the_template_writes_are_controls(tmp_path):
    plain = load("gpt2", tmp_path)
    assert plain.encode("<think>") == [plain.token_id("<think>")]
    (tmp_path / "chat_template.jinja").write_text("<think>{{ messages[0].content }}")
    ours = Tokenizer.load(tmp_path)
    ids = ours.encode_chat([{"role": "user", "content": "a<think>b"}])
    assert ids.count(ours.token_id("<think>")) == 1
    assert ours.decode(ids, skip_special=False) == "<think>a<think>b"
    # The model's own is shown to the user all the same.
    assert "<think>" in ours.decode(ids)
    assert ours.encode("<think>") == [ours.token_id("<think>")]


# ---- begin and end


@pytest.mark.parametrize("style", ["llama3", "llama2", "mistral", "gemma"])
def test_no_second_begin_token(style):
    ours, _ = pair(style)
    begin = "<|begin|>" if style == "llama3" else "<s>"
    want = ours.encode("hello")
    assert want[0] == ours.token_id(begin)
    assert want[1] != want[0]
    assert ours.encode(f"{begin}hello", parse_special=True).count(want[0]) == 1
    # A template writes its own or none.
    assert ours.encode_template(f"{begin}hello").count(want[0]) == 1
    assert ours.encode_template("hello").count(want[0]) == 0


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, {"<|im_end|>", "<|end|>"}),
        ({"generation_config": {"eos_token_id": 5}}, {5, "<|im_end|>", "<|end|>"}),
        (
            {"generation_config": {"eos_token_id": [5, 6]}, "config": {"eos_token_id": 7}},
            {5, 6, 7, "<|im_end|>", "<|end|>"},
        ),
        ({"config": {"text_config": {"eos_token_id": [8]}}}, {8, "<|im_end|>", "<|end|>"}),
        ({"tokenizer_config": {"eos_token": "the"}}, {"the", "<|im_end|>", "<|end|>"}),
        ({"special_tokens_map": {"eos_token": {"content": "the"}}}, {"the", "<|im_end|>", "<|end|>"}),
        (
            {"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": None}},
            {"<|im_end|>", "<|end|>"},
        ),
    ],
)
def test_every_end_of_a_turn_is_known(files, ends, tmp_path):
    ours = load("gpt2", tmp_path, **files)
    assert ours.eos_token_ids == {end if isinstance(end, int) else ours.token_id(end) for end in ends}


@pytest.mark.parametrize("value", ["5", [True], -1, [[1]], {"a": 1}, 1.5])
def test_wrong_end_ids_are_refused(value, tmp_path):
    with pytest.raises(TokenizerError, match=r"eos_token_id in generation_config.json") as raised:
        load("gpt2", tmp_path, generation_config={"eos_token_id": value})
    assert_one_line(str(raised.value))


def test_a_length_limit_of_the_file_does_not_cut_text(tmp_path):
    backend = tokenizers.Tokenizer.from_str(built("gpt2"))
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=16)
    ours = Tokenizer.load(write(tmp_path, backend.to_str()))
    text = "the quick brown fox jumps over"
    assert ours.encode(text) == pair("gpt2")[0].encode(text)
    assert ours.decode(ours.encode(text)) == text


# ---- ids to text


@pytest.mark.parametrize("style", STYLES)
def test_bytes_of_tokens_add_up(style):
    ours, _ = pair(style)
    for text in TEXTS:
        ids = ours.encode(text, add_special=False)
        data = b"".join(map(ours.token_bytes, ids)).decode()
        normal = unicodedata.normalize("NFC", text) if style == "qwen" else text
        # One space may be added in front; one is dropped when decoding.
        assert data in (normal, normal.replace("▁", " "), " " + normal.replace("▁", " "))
        assert ours.decode(ids) == (data[1:] if data.startswith(" ") and ours.strip_leading else data)


def test_ids_outside_the_vocabulary():
    ours, _ = pair("gpt2")
    assert ours.token_bytes(ours.vocab_size) == b""
    assert ours.decode([ours.vocab_size + 7]) == ""
    with pytest.raises(TokenizerError, match="-1 is not a token id"):
        ours.token_bytes(-1)


@settings(max_examples=100)
@given(st.sampled_from(list(STYLES)), st.data())
def test_any_ids_decode(style, data):
    ours, _ = pair(style)
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 2), max_size=12))
    for skip in (True, False):
        whole = ours.decode(ids, skip_special=skip)
        detokenizer = Detokenizer(ours, skip_special=skip)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == whole
        whole.encode()


# ---- files that are missing or damaged


def refused(call: Any, match: str | None = None) -> None:
    with pytest.raises(ModelError, match=match) as raised:
        call()
    assert_one_line(str(raised.value))


def test_missing_files(tmp_path):
    refused(lambda: Tokenizer.load(tmp_path), "has no tokenizer.json$")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    refused(lambda: Tokenizer.load(tmp_path), "tokenizer.model alone cannot be read")


def test_a_prefix_of_word_pieces_is_refused(tmp_path):
    """A prefix that ends inside a character makes the library abort the process."""
    content = json.loads(built("gpt2"))
    content["model"]["continuing_subword_prefix"] = "â"
    refused(lambda: Tokenizer.load(write(tmp_path, json.dumps(content))), "continuing_subword_prefix")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model": 5}', "[" * 100_000, "\x00\ud7ff"])
def test_a_file_that_is_no_tokenizer(content, tmp_path):
    refused(lambda: Tokenizer.load(write(tmp_path, content)), "tokenizer.json is damaged")


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "generation_config", "config"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_damaged_companions(name, content, tmp_path):
    write(tmp_path, built("gpt2"))
    (tmp_path / f"{name}.json").write_bytes(content)
    refused(lambda: Tokenizer.load(tmp_path), f"{name}.json")


def test_a_template_that_is_no_text(tmp_path):
    write(tmp_path, built("gpt2"), tokenizer_config={"chat_template": 5})
    refused(lambda: Tokenizer.load(tmp_path), "chat_template")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    refused(lambda: Tokenizer.load(tmp_path), "chat_template.jinja")
    (tmp_path / "chat_template.jinja").unlink()
    os.mkfifo(tmp_path / "chat_template.jinja")
    refused(lambda: Tokenizer.load(tmp_path), "chat_template.jinja")


def test_no_template(tmp_path):
    ours = load("gpt2", tmp_path)
    assert ours.chat_template is None
    with pytest.raises(TokenizerError, match="no chat template"):
        ours.encode_chat([{"role": "user", "content": "x"}])


def test_half_of_a_surrogate_pair():
    refused(lambda: pair("gpt2")[0].encode("a\ud83d"), "not valid Unicode")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("decoder", None, "no decoder"),
        ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}, "decoder 'WordPiece'"),
        ("decoder", {"type": "Replace", "pattern": {"Regex": "a"}, "content": "b"}, "decoder 'Replace'"),
        ("decoder", {"type": "Strip", "content": "x", "start": 1, "stop": 1}, "decoder 'Strip'"),
    ],
)
def test_decoders_that_are_not_supported(key, value, match, tmp_path):
    content = json.loads(built("gpt2")) | {key: value}
    refused(lambda: Tokenizer.load(write(tmp_path, json.dumps(content))), match)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of a JSON value; of a long list or object only the first few."""
    found = [path] if path else []
    if isinstance(value, (dict, list)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        for key in keys[:12]:
            found += places(value[key], (*path, key))
    return found


WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 1 << 40),
    st.text(max_size=4),
    st.sampled_from([[], {}, [[]], "the", "<|end|>", {"type": "ByteLevel"}, {"String": "a"}, {"Regex": "("}]),
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(STYLES)), st.data())
def test_a_damaged_file_is_refused_or_works(style, data):
    content = json.loads(built(style))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(content)))
        target = functools.reduce(lambda value, key: value[key], path[:-1], content)
        if data.draw(st.booleans()):
            del target[path[-1]]
        else:
            target[path[-1]] = copy.deepcopy(data.draw(WRONG))
        if not places(content):
            break
    directory = Path(os.environ["GRISTMILL_TEST_DIRECTORY"])
    try:
        ours = Tokenizer.load(write(directory, json.dumps(content)))
        ids = ours.encode("the <|im_end|> it's 12")
        ours.decode(ids)
        ours.decode(range(min(ours.vocab_size, 1000)))
    except ModelError as error:
        assert_one_line(str(error))


@pytest.fixture(autouse=True)
def _directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRISTMILL_TEST_DIRECTORY", str(tmp_path_factory.getbasetemp()))
