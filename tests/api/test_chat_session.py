"""Conversations that keep their keys and values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gristmill.api import ChatSession, Model, load
from gristmill.errors import UsageError
from gristmill.program.batch import CancelFlag
from tests.api.conftest import ONE_ARITHMETIC

QUESTIONS = ["My name is Ada. What is a mill?", "And what does grist mean?", "What is my name?"]


@pytest.fixture(scope="module")
def small(cache: None) -> Iterator[Model]:
    with load("smollm2", threads=2, context=256, activations=ONE_ARITHMETIC) as loaded:
        yield loaded


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}])
def test_turns_equal_fresh_runs(model: Model, sampling: dict[str, float]) -> None:
    with model.session("Answer briefly.") as session:
        for turn, question in enumerate(QUESTIONS):
            result = session.send(question, max_tokens=40, **sampling)
            fresh = model.chat(session.messages[:-1], max_tokens=40, **sampling)
            assert result.token_ids == fresh.token_ids
            assert result.text == fresh.text
            assert result.prompt_tokens == fresh.prompt_tokens
            assert session.messages[-1] == {"role": "assistant", "content": result.text}
            # At least everything up to the question before is found in the cache.
            assert (result.cached_tokens > 0) == (turn > 0)
            assert result.dropped_turns == 0
            assert len(session.tokens) == result.prompt_tokens + result.completion_tokens - 1
        assert result.cached_tokens > fresh.prompt_tokens // 2


def test_changed_history_is_computed_anew(model: Model) -> None:
    session = model.session()
    session.send("Say yes.", max_tokens=10)
    session.messages[0]["content"] = "Say no."
    result = session.send("Again.", max_tokens=10)
    assert result.token_ids == model.chat(session.messages[:-1], max_tokens=10).token_ids
    session.close()


def test_clear_keeps_the_system_message(model: Model) -> None:
    session = model.session("You are a miller.")
    first = session.send("Hello", max_tokens=5)
    session.clear()
    assert session.messages == [{"role": "system", "content": "You are a miller."}]
    assert session.tokens == []
    again = session.send("Hello", max_tokens=5)
    assert (again.token_ids, again.cached_tokens) == (first.token_ids, 0)


def test_a_failed_turn_leaves_no_trace(model: Model) -> None:
    session = model.session()
    session.send("Hello", max_tokens=5)
    before = list(session.messages)

    def fail(_: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.send("More?", on_text=fail)
    with pytest.raises(UsageError, match="top_p"):
        session.send("More?", top_p=3)
    assert session.messages == before
    result = session.send("More?", max_tokens=10)
    assert result.token_ids == model.chat(session.messages[:-1], max_tokens=10).token_ids


def test_a_cancelled_answer_stays(model: Model) -> None:
    session, flag = model.session(), CancelFlag()
    pieces: list[str] = []

    def on_text(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            flag.set()

    result = session.send("Tell me a story.", on_text=on_text, cancel=flag)
    assert result.finish_reason == "cancelled"
    assert session.messages[-1]["content"] == result.text == "".join(pieces)
    after = session.send("Go on.", max_tokens=10)
    assert after.token_ids == model.chat(session.messages[:-1], max_tokens=10).token_ids
    assert after.cached_tokens > 0


def test_history_that_outgrows_the_context_loses_its_oldest_turns(small: Model) -> None:
    session = small.session("Answer briefly.")
    dropped = []
    for number in range(10):
        result = session.send(f"Tell me something about the number {number}.", max_tokens=40, ignore_eos=True)
        dropped.append(result.dropped_turns)
        assert result.completion_tokens == 40
        assert session.messages[0] == {"role": "system", "content": "Answer briefly."}
        assert [m["role"] for m in session.messages[1:]] == ["user", "assistant"] * (
            len(session.messages) // 2
        )
        assert session.messages[-2]["content"].endswith(f"{number}.")
        if result.dropped_turns:
            assert result.prompt_tokens <= small.context // 2
        fresh = small.chat(session.messages[:-1], max_tokens=40, ignore_eos=True)
        assert result.token_ids == fresh.token_ids
    turns = (len(session.messages) - 1) // 2
    assert sum(dropped) == 10 - turns > 0
    # Turns go several at a time, so that most turns need no prefill of everything.
    assert sum(1 for count in dropped if count) < sum(dropped)


def test_one_message_longer_than_the_context(small: Model) -> None:
    session = small.session()
    session.send("Hello", max_tokens=3)
    before = list(session.messages)
    with pytest.raises(UsageError, match=r"the prompt has \d+ tokens, but the context holds 256"):
        session.send("word " * 300)
    assert session.messages == before


def test_a_view_that_cannot_go_back_is_replaced(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = model.session()
    session.send("Hello", max_tokens=5)
    view = session._view
    assert view is not None

    def refuse(self: object, length: int) -> None:
        raise UsageError("the sliding window has moved on")

    monkeypatch.setattr(type(view), "truncate", refuse)
    result = session.send("And now?", max_tokens=10)
    assert result.cached_tokens == 0
    assert session._view is not view
    assert result.token_ids == model.chat(session.messages[:-1], max_tokens=10).token_ids


def test_a_session_needs_a_template(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(model.tokenizer), "chat_template", None)
    with pytest.raises(UsageError, match="no chat template"):
        ChatSession(model)
    with pytest.raises(UsageError, match="no chat template"):
        model.chat([{"role": "user", "content": "x"}])
    # Plain generation then takes the text as it is.
    assert model.prompt_ids("Hello") == model.tokenizer.encode("Hello")
