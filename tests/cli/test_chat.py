"""`gristmill chat`: over pipes and at a terminal."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gristmill.engine.result import Result, Timings
from gristmill.terminal.chat import Chat, parse_value
from tests.cli.conftest import PROGRAM, Gristmill, matches
from tests.cli.terminal import Terminal
from tests.cli.test_generate import GENERATED

ANSWER = GENERATED | {"role": str, "cached_tokens": int, "dropped_turns": int}
NOTE = r"\[\d+ tokens, \d+ tokens/s; first token after \d+ ms\]\n> "


def answers(gristmill: Gristmill, *arguments: str, stdin: str) -> tuple[list[Any], str]:
    done = gristmill.run("chat", *arguments, "--json", stdin=stdin.encode())
    assert done.returncode == 0, done.stderr.decode()
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for one in found:
        matches(one, ANSWER)
        assert one["role"] == "assistant"
    return found, done.stderr.decode()


def test_every_line_of_piped_input_is_a_turn(gristmill: Gristmill) -> None:
    found, errors = answers(gristmill, "smollm2", "-n", "12", stdin="Hello\n\nWhat is a mill?\n")
    assert errors == ""
    assert len(found) == 2
    assert found[0]["text"] == gristmill.json("generate", "smollm2", "Hello", "-n", "12")["text"]
    # The second prompt is the first one, its answer, and more.
    assert found[1]["usage"]["prompt_tokens"] > sum(found[0]["usage"].values())
    # The last token of an answer that was cut off has no keys and values yet.
    assert found[0]["cached_tokens"] == 0
    assert found[1]["cached_tokens"] >= sum(found[0]["usage"].values()) - 1


def test_without_json_only_the_answers_are_printed(gristmill: Gristmill) -> None:
    found, _ = answers(gristmill, "smollm2", "-n", "12", stdin="Hello\nWhat is a mill?\n")
    text = gristmill.text("chat", "smollm2", "-n", "12", stdin=b"Hello\nWhat is a mill?")
    assert text == "".join(one["text"].rstrip("\n") + "\n" for one in found)


def test_old_turns_are_forgotten_and_said_to_be(gristmill: Gristmill) -> None:
    turns = "".join(f"Tell me about the number {n}.\n" for n in range(6))
    found, errors = answers(gristmill, "smollm2", "-c", "192", "-n", "20", stdin=turns)
    assert len(found) == 6
    assert sum(one["dropped_turns"] for one in found) > 0
    assert "[the context of 192 tokens is full: the oldest" in errors
    assert all(sum(one["usage"].values()) <= 192 for one in found)


def test_a_message_longer_than_the_context(gristmill: Gristmill) -> None:
    message = gristmill.refused(2, "chat", "smollm2", "-c", "64", stdin=b"word " * 80 + b"\n")
    assert "the context holds 64" in message


def test_a_system_message(gristmill: Gristmill) -> None:
    plain, _ = answers(gristmill, "smollm2", "-n", "1", stdin="Hello\n")
    told, _ = answers(gristmill, "smollm2", "-n", "1", "--system", "Be brief.", stdin="Hello\n")
    assert told[0]["usage"]["prompt_tokens"] != plain[0]["usage"]["prompt_tokens"]
    set_later, _ = answers(gristmill, "smollm2", "-n", "1", stdin="/system Be brief.\nHello\n")
    assert set_later[0]["usage"]["prompt_tokens"] == told[0]["usage"]["prompt_tokens"]
    removed, _ = answers(gristmill, "smollm2", "-n", "1", "--system", "Be brief.", stdin="/system -\nHello\n")
    assert removed[0]["usage"]["prompt_tokens"] == plain[0]["usage"]["prompt_tokens"]


def test_clear_forgets_and_save_writes(gristmill: Gristmill, tmp_path: Path) -> None:
    file = tmp_path / "conversation.json"
    text = f"Hello\n/clear\nHello\n/save {file}\n/exit\nnever read\n"
    found, errors = answers(gristmill, "smollm2", "-n", "8", "--system", "Be brief.", stdin=text)
    assert len(found) == 2
    assert [found[0][key] for key in ("text", "usage")] == [found[1][key] for key in ("text", "usage")]
    assert json.loads(file.read_text()) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": found[1]["text"]},
    ]
    assert "3 messages written" in errors


def test_parameters_can_be_set(gristmill: Gristmill) -> None:
    text = "/set max_tokens 3\n/set seed 5\n/set temperature 1.5\nHello\n/set\n"
    found, errors = answers(gristmill, "smollm2", stdin=text)
    assert found[0]["usage"]["completion_tokens"] == 3
    assert "temperature = 1.5\n" in errors
    expected = gristmill.json(
        "generate", "smollm2", "Hello", "-n", "3", "--seed", "5", "--temperature", "1.5"
    )
    assert found[0]["text"] == expected["text"]


@pytest.mark.parametrize("line", ["/grind", "/set nothing 3", "/set top_p 9", "/save", "/save /nowhere/x"])
def test_wrong_commands_end_piped_input(gristmill: Gristmill, line: str) -> None:
    code = 1 if "nowhere" in line else 2
    gristmill.refused(code, "chat", "smollm2", stdin=f"{line}\nHello\n".encode())


def test_quotes_and_slashes(gristmill: Gristmill) -> None:
    block, _ = answers(gristmill, "smollm2", "-n", "1", stdin='"""one\ntwo"""\n')
    same = gristmill.json("generate", "smollm2", "one\ntwo", "-n", "1")
    assert block[0]["usage"] == same["usage"]
    slash, _ = answers(gristmill, "smollm2", "-n", "1", stdin="//help\n")
    assert slash[0]["usage"] == gristmill.json("generate", "smollm2", "/help", "-n", "1")["usage"]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("top_k", "40", 40),
        ("seed", "none", None),
        ("ignore_eos", "true", True),
        ("temperature", "warm", "warm"),
        ("stop", "the end", ("the end",)),
        ("stop", '"\\n"', ("\n",)),
        ("stop", "", ()),
    ],
)
def test_typed_values(name: str, text: str, value: Any) -> None:
    found = parse_value(name, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(("tokens", "left"), [([], 0), ([5], 2)])
def test_a_turn_stopped_before_its_answer_began_is_forgotten(tokens: list[int], left: int) -> None:
    class Session:
        messages: list[Any] = []  # noqa: RUF012

        def send(self, text: str, **options: Any) -> Result:
            self.messages = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
            return Result("", tokens, "cancelled", 9, len(tokens), Timings())

    model: Any = SimpleNamespace(session=lambda system: Session())
    chat = Chat(model, system=None, sampling={}, as_json=True, history=False)
    chat._answer("Hello")
    assert len(chat.session.messages) == left


def test_at_a_terminal(gristmill: Gristmill) -> None:
    command = [*PROGRAM, "chat", "smollm2", "-n", "12"]
    with Terminal(command, gristmill.environment) as screen:
        assert "/help lists the commands" in screen.wait("> ")
        screen.type("Hello\n")
        screen.wait(NOTE)
        # An endless answer, stopped: back at the prompt, and what was said is remembered.
        screen.type("/set ignore_eos true\n")
        screen.wait("true]\n> ")
        screen.type("/set max_tokens 7000\n")
        screen.wait("7000]\n> ")
        screen.type("Write a long story.\n")
        screen.wait("story.\n.*\\S")
        screen.type("\x03")
        screen.wait(r"\[stopped; ")
        screen.wait("> ")
        screen.type("/set max_tokens 4\n")
        screen.wait("4]\n> ")
        screen.type("/stats\n")
        assert "4 messages remembered" in screen.wait("MB at most\n> ")
        screen.type("/help\n")
        assert "oldest turns are forgotten" in screen.wait("happens.\n> ")
        # Mistakes are told and forgiven.
        screen.type("/grind\n")
        assert "error: there is no command /grind" in screen.wait("\n> ")
        screen.type(b"\xff\xfe\n")
        assert "error: the input is not UTF-8" in screen.wait("UTF-8\n> ")
        screen.type("More\n")
        screen.wait(r"\[cut off at --max-tokens; 4 tokens")
        screen.wait("> ")
        screen.type("\x04")
        code, _ = screen.end()
        assert code == 0
    history = Path(gristmill.environment["GRISTMILL_CACHE"]) / "chat_history"
    assert b"Write a long story." in history.read_bytes().splitlines()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    # The next chat can call the lines back: up and return.
    with Terminal([*command, "--no-history"], gristmill.environment) as screen:
        screen.wait("> ")
        screen.type("secret\x15/stats\n")
        screen.wait("at most\n> ")
        code, shown = screen.end(keys="\x03")
        assert code == 130
        assert "Traceback" not in shown
    with Terminal(command, gristmill.environment) as screen:
        screen.wait("> ")
        screen.type("\x1b[A\n")
        screen.wait("More\n.*\n")
        screen.wait("> ")
        screen.type("/exit\n")
        assert screen.end()[0] == 0
