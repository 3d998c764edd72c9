"""Streaming text: whole characters only, whatever the tokens' borders; stop strings wherever they are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gristmill.engine.detokenizer import Detokenizer, StopMatcher, TextStream
from gristmill.errors import UsageError

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
AWKWARD = ["", "a", "é", "é", "漢字", "🙂👩‍👩‍👧‍👦", "\x00\n\t", "�", " x", "\U0010ffff"]


class Tokens:
    """A vocabulary made of the given pieces; ids are their places."""

    def __init__(self, pieces: list[bytes], special: frozenset[int] = frozenset(), strip: int = 0) -> None:
        self.pieces, self.special_ids, self.strip_leading = pieces, special, strip

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(place % (len(data) + 1) for place in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


def stream(tokens: Tokens, **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokens, **options)
    return [*map(detokenizer.push, range(len(tokens.pieces))), detokenizer.finish()]


# ---- bytes to text


@given(TEXTS, st.lists(st.integers(0, 99), max_size=12))
def test_any_split_of_a_text_gives_the_text(text, cuts):
    pieces = cut(text.encode(), cuts)
    shown = stream(Tokens(pieces))
    assert "".join(shown) == text
    # After each token exactly the characters that are complete are out, so nothing waits for no reason.
    for count in range(len(pieces) + 1):
        complete = b"".join(pieces[:count]).decode("utf-8", "ignore")
        assert "".join(shown[:count]) == complete
    assert shown[-1] == ""


@pytest.mark.parametrize("text", AWKWARD)
def test_every_single_and_double_cut_and_every_byte_alone(text):
    data = text.encode()
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1):
            pieces = [data[:first], data[first:second], data[second:]]
            assert "".join(stream(Tokens(pieces))) == text
    assert "".join(stream(Tokens([bytes([byte]) for byte in data]))) == text


@given(st.binary(max_size=12), st.lists(st.integers(0, 99), max_size=12))
@example(b"\xf0\x9f\x99", [1, 2])
@example(b"\xc3", [])
@example(b"\xed\xa0\x80\xe2\x82", [1, 2, 3])
def test_bytes_that_are_no_text_become_replacement_characters(data, cuts):
    shown = "".join(stream(Tokens(cut(data, cuts))))
    assert shown == data.decode("utf-8", "replace")
    shown.encode()


def test_a_bad_byte_is_shown_at_once_and_an_unfinished_character_at_the_end():
    tokens = Tokens([b"\xe6", b"x", b"\xe6\xbc"])
    assert stream(tokens) == ["", "�x", "", "�"]


@given(st.lists(st.sampled_from([b" ", b"  ", b"a", b"", b" b", b"\xc3", b"\xa9"])), st.integers(0, 3))
def test_leading_spaces_are_dropped_as_a_whole_decode_does(pieces, strip):
    whole = b"".join(pieces).decode("utf-8", "replace")
    spaces = len(whole) - len(whole.lstrip(" "))
    assert "".join(stream(Tokens(pieces, strip=strip))) == whole[min(spaces, strip) :]
    assert "".join(stream(Tokens(pieces, strip=strip), continues=True)) == whole


def test_special_tokens_are_skipped_unless_wanted():
    tokens = Tokens([b"a", b"<end>", b"b"], frozenset({1}))
    assert "".join(stream(tokens)) == "ab"
    assert "".join(stream(tokens, skip_special=False)) == "a<end>b"


# ---- stop strings


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Grow the text by one character at a time until it ends with a stop string."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.text("ab.", max_size=14),
    st.lists(st.text("ab.", min_size=1, max_size=5), max_size=3),
    st.lists(st.integers(0, 99), max_size=8),
)
@example("aab", ["ab"], [1, 2])
@example("abab.", ["ababa", "ab."], [1, 2, 3])
@example("aaab", ["aab", "b"], [2])
def test_stop_strings_are_found_in_every_split(text, stops, cuts):
    places = [0, *sorted(place % (len(text) + 1) for place in cuts), len(text)]
    matcher = StopMatcher(stops)
    want, stopped_by = first_stop(text, stops)
    shown = ""
    for start, end in pairwise(places):
        shown += matcher.push(text[start:end])
        seen, matched = first_stop(text[:end], stops)
        assert matcher.matched == matched
        if matched is None:
            # Only what may still become a stop string is held back.
            held = seen[len(shown) :]
            assert seen.startswith(shown)
            assert not held or any(stop.startswith(held) for stop in stops)
            assert not any(stop.startswith(seen[at:]) for at in range(len(shown)) for stop in stops)
    assert shown + matcher.finish() == want
    assert matcher.matched == stopped_by
    assert matcher.push("more") + matcher.finish() == ("" if stopped_by else "more")


@pytest.mark.parametrize("stops", [[""], ["a", ""], [b"a"], [7]])
def test_a_stop_string_must_be_text(stops):
    with pytest.raises(UsageError, match="stop string"):
        StopMatcher(stops)


# ---- both together


@given(
    st.text("aé漢🙂 ", max_size=10),
    st.lists(st.text("aé漢🙂 ", min_size=1, max_size=3), max_size=3),
    st.lists(st.integers(0, 99), max_size=12),
)
def test_stops_inside_characters_and_across_tokens(text, stops, cuts):
    tokens = Tokens(cut(text.encode(), cuts))
    out = TextStream(tokens, stops)
    shown = "".join(map(out.push, range(len(tokens.pieces)))) + out.finish()
    want, stopped_by = first_stop(text, stops)
    assert (shown, out.stopped_by) == (want, stopped_by)


def test_the_end_completes_a_stop_string():
    out = TextStream(Tokens([b"a", b"\xe6"]), ["�"])
    assert out.push(0) + out.push(1) + out.finish() == "a"
    assert out.stopped_by == "�"
