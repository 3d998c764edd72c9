"""Text to token ids and back, from the tokenizer files of a checkpoint directory.

A thin layer over the `tokenizers` library (imported on use) that adds what generation needs: text typed by a
user never becomes a special token, all tokens that end a generation are known, ids map to exact bytes for
streaming, and a rendered chat template is encoded so that only the template's own special tokens are special.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gristmill.errors import TokenizerError
from gristmill.io.gguf_tokenizer import end_of_turn_texts
from gristmill.io.json_file import read_object
from gristmill.io.mapped import read_small

if TYPE_CHECKING:
    from gristmill.io.chat import ChatTemplate, RenderedPrompt

__all__ = ["Tokenizer"]

_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_FILE_LIMIT = 512 << 20
_TEMPLATE_LIMIT = 4 << 20
_SUBWORD_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Character to byte in the alphabet of byte-level BPE, as GPT-2 introduced it.

    Printable bytes stand for themselves, the others are numbered from U+0100 in ascending order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update((chr(0x100 + index), byte) for index, byte in enumerate(others))
    return table


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty if there is no file."""
    return read_object(path) if path.exists() else {}


def _token_content(value: object) -> str | None:
    """The text of a special token as configuration files write it: a string, or an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _id_list(value: object, where: str) -> list[int]:
    """Token ids from a configuration value: absent, one id, or a list of ids."""
    ids: list[int] = []
    for item in [] if value is None else value if isinstance(value, list) else [value]:
        if not isinstance(item, int) or isinstance(item, bool) or item < 0:
            raise TokenizerError(f"eos_token_id in {where} should be token ids, not {str(item)[:40]!r}")
        ids.append(item)
    return ids


class _ByteDecoder:
    """How token texts become bytes, read from the `decoder` entry of tokenizer.json.

    Understands the byte-level decoder and chains of Replace, ByteFallback, Fuse, Strip and Metaspace, which
    are what byte-level BPE and SentencePiece models use; anything else is refused.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        self.byte_level = False
        self.byte_fallback = False
        self.replacements: list[tuple[str, str]] = []
        self.strip_leading = 0
        steps = description.get("decoders") if description.get("type") == "Sequence" else [description]
        for step in steps or []:
            kind = step.get("type")
            if kind == "ByteLevel":
                self.byte_level = True
            elif kind == "ByteFallback":
                self.byte_fallback = True
            elif kind == "Replace" and isinstance(step.get("pattern", {}).get("String"), str):
                self.replacements.append((step["pattern"]["String"], step["content"]))
            elif kind == "Strip" and step.get("content") == " " and not step.get("stop"):
                self.strip_leading += int(step.get("start", 0))
            elif kind == "Metaspace":
                self.replacements.append((step["replacement"], " "))
                self.strip_leading += step.get("prepend_scheme", "always") != "never"
            elif kind != "Fuse":
                raise TokenizerError(
                    f"tokenizer.json uses the decoder {kind!r} in a way that is not supported"
                )
        self._alphabet = _byte_alphabet() if self.byte_level else {}

    def to_bytes(self, text: str, added: bool) -> bytes:
        """The bytes of one token; `added` tokens are written as they are, not in the byte alphabet."""
        if self.byte_level:
            if not added and all(character in self._alphabet for character in text):
                return bytes(self._alphabet[character] for character in text)
            return text.encode("utf-8")
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(text)):
            return bytes((int(match[1], 16),))
        for old, new in self.replacements:
            text = text.replace(old, new)
        return text.encode("utf-8")


class Tokenizer:
    """The tokenizer of one model.

    Attributes: vocab_size (highest id + 1; the model's embedding may have more rows), bos_token_id,
    eos_token_ids (every id that ends a generation), special_ids, control_texts (texts that only a chat
    template may turn into their token), strip_leading (spaces that decoding drops from the start of a text, 1
    for SentencePiece models that add one), chat_template.

    Not safe for use from several threads while `chat_template` is first read; afterwards it is.
    """

    def __init__(
        self,
        backend: Any,
        *,
        config: Mapping[str, Any] | None = None,
        eos_token_ids: Iterable[int] = (),
        template_source: str | None = None,
    ) -> None:
        """Wrap a `tokenizers.Tokenizer`, which is then owned by this object and changed.

        config is the content of tokenizer_config.json, eos_token_ids are ids that the model's configuration
        names, template_source is the chat template in Jinja.
        """
        self._backend = backend
        # Some files ask for a fixed length, which is for training.
        backend.no_truncation()
        backend.no_padding()
        config = config or {}
        self._texts = {role: text for role in _SPECIAL_ROLES if (text := _token_content(config.get(role)))}
        self.template_source = template_source
        description = _component(backend.decoder)
        if description is None:
            raise TokenizerError("tokenizer.json has no decoder")
        self._decoder = _ByteDecoder(description)
        self.strip_leading = self._decoder.strip_leading
        self._prefix_first = _take_over_first_prefix(backend)

        self._mark_special([*self._texts.values(), *_listed_texts(config)])
        added: dict[int, Any] = backend.get_added_tokens_decoder()
        self._added = frozenset(added)
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        special = {token.content: index for index, token in added.items() if token.special}
        plain = {token.content: index for index, token in added.items() if not token.special}
        # Tokens such as <think> are not special in tokenizer.json, yet templates write them to give
        # structure.
        markup = [text for text in plain if template_source and text in template_source and _is_markup(text)]
        self._protect(markup)
        self._controls = special | {text: plain[text] for text in markup}
        self.control_texts = frozenset(self._controls)
        self._strips = {
            token.content: (token.lstrip, token.rstrip)
            for token in added.values()
            if token.lstrip or token.rstrip
        }
        self._special_pattern = _alternatives(self._controls)
        self._markup_pattern = _alternatives(markup)

        self._prefix, self._suffix = _surroundings(backend)

        size = int(backend.get_vocab_size())
        while size and backend.id_to_token(size - 1) is None:
            size -= 1
        self.vocab_size = max([size, *(index + 1 for index in added)])
        bos = self._texts.get("bos_token")
        self.bos_token_id: int | None = backend.token_to_id(bos) if bos else None
        ends = set(eos_token_ids)
        if (eos := self._texts.get("eos_token")) and (index := backend.token_to_id(eos)) is not None:
            ends.add(index)
        names = {token.content: index for index, token in added.items()}
        ends.update(names[text] for text in end_of_turn_texts(set(names)))
        self.eos_token_ids = frozenset(ends)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where present, tokenizer_config.json, special_tokens_map.json,
        generation_config.json, config.json and chat_template.jinja from a checkpoint directory.

        Raises TokenizerError when tokenizer.json is missing or damaged.
        """
        import tokenizers

        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            others = [name for name in ("tokenizer.model", "vocab.json") if (directory / name).exists()]
            hint = (
                f"; {others[0]} alone cannot be read, save the tokenizer with Transformers" if others else ""
            )
            raise TokenizerError(f"{directory} has no tokenizer.json{hint}")
        config = _read_json(directory / "special_tokens_map.json")
        config |= _read_json(directory / "tokenizer_config.json")
        ends: list[int] = []
        for name in ("generation_config.json", "config.json"):
            content = _read_json(directory / name)
            ends += _id_list(content.get("eos_token_id"), name)
            inner = content.get("text_config")
            if isinstance(inner, dict):
                ends += _id_list(inner.get("eos_token_id"), name)
        template = _template_source(directory, config)
        data = read_small(path, _FILE_LIMIT)
        if _SUBWORD_PREFIX.search(data):
            # Words in pieces of this kind are decoded otherwise; and a wrong prefix makes the library abort.
            raise TokenizerError(f"{path} uses continuing_subword_prefix, which is not supported")
        with _damage(str(path)):
            backend = tokenizers.Tokenizer.from_buffer(data)
            return cls(backend, config=config, eos_token_ids=ends, template_source=template)

    # ---- text to ids ---------------------------------------------------------------------------------------

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of a text.

        add_special puts the begin (and end) tokens around it that the model asks for. Texts of special tokens
        inside `text` are ordinary text unless parse_special; a begin token that the text then starts with is
        not doubled. Characters that neither a token nor byte tokens can write are dropped, as Transformers
        does.
        """
        pattern = self._special_pattern if parse_special else self._markup_pattern
        ids = self._encode_pieces(self._split(text, pattern))
        if not add_special:
            return ids
        prefix = [] if self._prefix and ids[: len(self._prefix)] == self._prefix else self._prefix
        return [*prefix, *ids, *self._suffix]

    def encode_template(self, prompt: RenderedPrompt | str) -> list[int]:
        """Token ids of a rendered chat template. Adds no begin token: the template writes its own.

        In a `RenderedPrompt` every place where the messages could start a special token carries a marker, so
        only the template's own texts become special tokens. A plain string is taken to be all template.
        """
        if isinstance(prompt, str):
            return self._encode_pieces(self._split(prompt, self._special_pattern))
        return self._encode_pieces(self._split(prompt.marked, self._special_pattern, prompt.marker))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Render messages with the model's chat template and encode the result.

        options go to `ChatTemplate.render`. Raises TemplateError; TokenizerError if the model has no
        template.
        """
        if self.chat_template is None:
            raise TokenizerError("the model has no chat template")
        return self.encode_template(self.chat_template.render(messages, **options))

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template; None if it has none. Raises TemplateError if it cannot be read."""
        if self.template_source is None:
            return None
        from gristmill.io.chat import ChatTemplate

        return ChatTemplate(self.template_source, variables=self._texts, control_texts=self.control_texts)

    def _split(self, text: str, pattern: str, marker: str = "") -> list[str | int]:
        """Cut a text at the tokens that the pattern names; the text between them is freed of the marker."""
        if not pattern:
            return [text.replace(marker, "")] if marker else [text]
        # A marked character is consumed together with its marker, so no token can be found to begin there.
        expression = f"{re.escape(marker)}(?s:.)?|({pattern})" if marker else f"({pattern})"
        pieces: list[str | int] = []
        start = 0
        eat_space = False

        def close(end: int, trim_end: bool) -> None:
            piece = text[start:end].replace(marker, "") if marker else text[start:end]
            piece = piece.lstrip() if eat_space else piece
            piece = piece.rstrip() if trim_end else piece
            if piece:
                pieces.append(piece)

        for match in re.finditer(expression, text):
            if match[1] is None:
                continue
            left, right = self._strips.get(match[1], (False, False))
            close(match.start(), left)
            pieces.append(self._controls[match[1]])
            start, eat_space = match.end(), right
        close(len(text), False)
        return pieces

    def _encode_pieces(self, pieces: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        for position, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            if self._prefix_first and position == 0 and piece and not piece.startswith((" ", "▁")):
                piece = " " + piece  # noqa: PLW2901
            try:
                with _damage("the tokenizer"):
                    ids += self._backend.encode(piece, add_special_tokens=False).ids
            except (UnicodeEncodeError, TypeError):
                message = "the text is not valid Unicode: it holds half of a surrogate pair"
                raise TokenizerError(message) from None
        return ids

    # ---- ids to text ---------------------------------------------------------------------------------------

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, which need not be whole characters; b"" for an id without a token."""
        found = self._bytes.get(token_id)
        if found is None:
            if token_id < 0:
                raise TokenizerError(f"{token_id} is not a token id")
            text = self._backend.id_to_token(token_id)
            found = b"" if text is None else self._decoder.to_bytes(text, token_id in self._added)
            self._bytes[token_id] = found
        return found

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids, without special tokens if asked; bytes that are not UTF-8 become U+FFFD."""
        kept = (index for index in ids if not (skip_special and index in self.special_ids))
        whole = b"".join(map(self.token_bytes, kept))
        spaces = len(whole) - len(whole.lstrip(b" "))
        return whole[min(spaces, self.strip_leading) :].decode("utf-8", "replace")

    def role_token(self, role: str) -> str | None:
        """The text of the token that the model's files call `eos_token`, `bos_token`, `pad_token`, ..."""
        return self._texts.get(role)

    def token_id(self, text: str) -> int | None:
        """The id of the token with exactly this text in the vocabulary, None if there is none."""
        found = self._backend.token_to_id(text)
        return None if found is None else int(found)

    # ---- set-up --------------------------------------------------------------------------------------------

    def _mark_special(self, texts: Iterable[str]) -> None:
        """Make existing tokens special that configuration names as such, and end the parsing of special
        tokens.

        Ordinary texts stay ordinary: some models pad with "!".
        """
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        self._protect(
            text
            for text in dict.fromkeys(texts)
            if self._backend.token_to_id(text) is not None and (text in added or _is_markup(text))
        )
        self._backend.encode_special_tokens = True

    def _protect(self, texts: Iterable[str]) -> None:
        """Let the backend treat these tokens as special, that is: never find them in text."""
        from tokenizers import AddedToken

        known = {token.content: token for token in self._backend.get_added_tokens_decoder().values()}
        changed = [
            AddedToken(
                text, lstrip=token.lstrip, rstrip=token.rstrip, normalized=token.normalized, special=True
            )
            if (token := known.get(text))
            else AddedToken(text, normalized=False, special=True)
            for text in texts
            if text not in known or not known[text].special
        ]
        if changed:
            self._backend.add_special_tokens(changed)


@contextmanager
def _damage(what: str) -> Iterator[None]:
    """Reports what goes wrong in the `tokenizers` library, for which a damaged tokenizer is the only cause.

    The library raises a bare Exception or ValueError, or a panic that is not even an Exception.
    """
    try:
        yield
    except BaseException as error:
        if type(error) not in (Exception, ValueError) and type(error).__name__ != "PanicException":
            raise
        reason = "".join(c if c.isprintable() else " " for c in str(error)[:200])
        raise TokenizerError(f"{what} is damaged: {reason}") from None


def _component(part: Any) -> dict[str, Any] | None:
    """The JSON description of a part of a `tokenizers.Tokenizer`, None if it has no such part."""
    if part is None:
        return None
    description = json.loads(part.__getstate__())
    assert isinstance(description, dict)
    return description


def _surroundings(backend: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text; the library shows them only around a text."""
    for probe in ("a", "0", " ", "\n"):
        bare, full = backend.encode(probe, add_special_tokens=False).ids, backend.encode(probe).ids
        for start in range(len(full) - len(bare) + 1 if bare else 0):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
    return [], []


def _take_over_first_prefix(backend: Any) -> bool:
    """Whether the first piece of a text, and only that, gets a space in front.

    The library adds it to the first piece of every call; a template is encoded in many calls, so the backend
    is told not to add it, and `_encode_pieces` does.
    """
    description = _component(backend.pre_tokenizer)
    if description is None:
        return False
    steps = description.get("pretokenizers", [description])
    metaspaces = [step for step in steps if step.get("type") == "Metaspace"]
    first = [step for step in metaspaces if step.get("prepend_scheme") == "first"]
    if not first:
        return False
    if len(steps) > 1:
        raise TokenizerError(
            "tokenizer.json combines Metaspace with other pre-tokenizers; that is not supported"
        )
    from tokenizers import pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=first[0]["replacement"], prepend_scheme="never", split=first[0].get("split", True)
    )
    return True


def _is_markup(text: str) -> bool:
    """Whether a token reads like a tag rather than like white space, a word or punctuation."""
    return len(text) > 2 and not (text[0].isalnum() or text[0].isspace()) and any(c.isalpha() for c in text)


def _alternatives(texts: Iterable[str]) -> str:
    """A regular expression for any of the texts, the longest first; empty without texts."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


def _listed_texts(config: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = config.get(key)
        items = values.values() if isinstance(values, Mapping) else values if isinstance(values, list) else ()
        found += [text for item in items if (text := _token_content(item))]
    return found


def _template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The default chat template: chat_template.jinja, or else the entry of tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return read_small(path, _TEMPLATE_LIMIT).decode("utf-8")
        except UnicodeDecodeError:
            raise TokenizerError(f"{path} is not UTF-8 text") from None
    entry = config.get("chat_template")
    if isinstance(entry, list):
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
        entry = named.get("default", next(iter(named.values()), None))
    if entry is not None and not isinstance(entry, str):
        raise TokenizerError("chat_template in tokenizer_config.json should be text or a list of templates")
    return entry
