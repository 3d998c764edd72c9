"""The layer between HTTP and the engine, with an engine whose every move is written down."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn

from gristmill.engine.request import ContextLengthExceeded, EngineDead, QueueFull, RequestFailed
from gristmill.errors import GristmillError, TemplateError
from gristmill.serve import logs
from gristmill.serve.app import make_app
from gristmill.serve.errors import ApiError
from gristmill.serve.settings import Settings
from gristmill.serve.strict_json import parse_object
from gristmill.serve.worker import Rendered
from tests.serve.scripted import CONTEXT, HANG, Engine, Run, Texts, serve

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def no_tracebacks(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test does, the server logs no error that nobody expected."""
    for name in ("uvicorn", "uvicorn.error", "gristmill"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    yield
    told = [one for one in caplog.get_records("call") if one.levelno >= logging.ERROR]
    assert not [one for one in told if one.exc_info or "ASGI callable" in one.getMessage()]


def chat(run: Run, **fields: Any) -> httpx.Response:
    body = {"messages": MESSAGES, **fields}
    return httpx.post(f"{run.url}/v1/chat/completions", json=body, timeout=20)


def complete(run: Run, **fields: Any) -> httpx.Response:
    return httpx.post(f"{run.url}/v1/completions", json={"prompt": "abc", **fields}, timeout=20)


def events(text: str) -> list[Any]:
    lines = [line for line in text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert text.endswith("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def until(true: Callable[[], object], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def connect(run: Run, data: bytes, receive_buffer: int | None = None) -> socket.socket:
    parts = urlsplit(run.url)
    made = socket.socket()
    if receive_buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.connect((parts.hostname, parts.port))
    made.settimeout(20)
    made.sendall(data)
    return made


def post(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def metric(run: Run, name: str) -> list[str]:
    lines = httpx.get(f"{run.url}/metrics").text.splitlines()
    return [line for line in lines if line.startswith(name)]


# ---- streams -----------------------------------------------------------------------------------------------


def test_the_form_of_a_chat_stream() -> None:
    def test(run: Run) -> None:
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = events(chat(run, n=2, stream=True, stream_options=options).text)
        same = {(c["id"], c["object"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}
        assert len(same) == 1
        assert next(iter(same))[1] == "chat.completion.chunk"
        for index in (0, 1):
            mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            assert mine[0]["delta"]["role"] == "assistant"
            assert "".join(c["delta"].get("content", "") for c in mine) == "hello you"
            assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == {
            "prompt_tokens": 2,
            "completion_tokens": 18,
            "total_tokens": 20,
            "prompt_tokens_details": {"cached_tokens": 2},
        }
        plain = events(chat(run, stream=True).text)
        assert all(chunk["choices"] and "usage" not in chunk for chunk in plain)

    assert serve(test, Engine(["hello", " ", 0.05, "you"])) == 0


def test_several_tokens_in_one_piece_keep_their_scores() -> None:
    def test(run: Run) -> None:
        chunks = events(chat(run, stream=True, logprobs=True, top_logprobs=1).text)
        scores = [s for c in chunks for x in c["choices"] if x["logprobs"] for s in x["logprobs"]["content"]]
        assert [one["token"] for one in scores] == list("hello")
        assert scores == chat(run, logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]

    assert serve(test, Engine(["hello"])) == 0


def test_echo_of_a_prompt_that_was_cut_is_what_was_scored() -> None:
    def test(run: Run) -> None:
        for prompt in ("abcdef", [ord(one) for one in "abcdef"]):
            fields = {"prompt": prompt, "echo": True, "logprobs": 0, "truncate_prompt_tokens": 2}
            choice = complete(run, **fields).json()["choices"][0]
            assert choice["text"] == "efhello"
            assert choice["logprobs"]["tokens"] == list("efhello")
            assert choice["logprobs"]["token_logprobs"] == [None, -2.0] + [-0.5] * 5

    assert serve(test) == 0


@pytest.mark.parametrize("opened", [False, True])
def test_reasoning_that_the_prompt_begins(opened: bool) -> None:
    texts = Texts()
    texts.in_reasoning = opened

    def told(answer: httpx.Response, stream: bool) -> tuple[str, str]:
        if not stream:
            message = answer.json()["choices"][0]["message"]
            return message.get("reasoning_content", ""), message["content"]
        deltas = [chunk["choices"][0]["delta"] for chunk in events(answer.text)]
        assert not any("content" in one and "reasoning_content" in one for one in deltas)
        return tuple(  # type: ignore[return-value]
            "".join(one.get(name, "") for one in deltas) for name in ("reasoning_content", "content")
        )

    def test(run: Run) -> None:
        run.server.reasoning = True
        for stream in (False, True):
            expected = ("hm, so", "Yes.") if opened else ("", "hm, so</think>\n\nYes.")
            assert told(chat(run, stream=stream), stream) == expected
            # What must have a form is the answer from its first character on.
            form = {"type": "json_object"}
            assert told(chat(run, stream=stream, response_format=form), stream)[0] == ""
        run.server.reasoning = False  # --reasoning-parser none
        assert told(chat(run), False)[0] == ""

    assert serve(test, Engine(["hm,", 0.05, " so</th", 0.05, "ink>\n", 0.05, "\nYes."]), texts) == 0


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull("7 requests are waiting", 3.4), 429, "queue_full"),
        (EngineDead("the engine is closed"), 503, "unavailable"),
        (ContextLengthExceeded(5, 5), 400, "context_length_exceeded"),
        (RequestFailed("a step failed"), 500, "request_failed"),
    ],
)
def test_refusals(error: Exception, status: int, code: str) -> None:
    def test(run: Run) -> None:
        for stream in (False, True):
            run.engine.refusals = [error]
            answer = chat(run, stream=stream)
            assert answer.status_code == status
            assert answer.json()["error"]["code"] == code
            if status == 429:
                assert answer.headers["retry-after"] == "3"
        assert metric(run, "gristmill:e2e_request_latency_seconds_count")[0].endswith(" 0.0")
        run.engine.refusals = []
        assert chat(run).status_code == 200
        assert metric(run, "gristmill:e2e_request_latency_seconds_count")[0].endswith(" 1.0")

    assert serve(test) == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_full_queue_refuses_before_it_reads(path: str) -> None:
    def test(run: Run) -> None:
        run.engine.full = True
        answer = httpx.post(run.url + path, content=b"{ no JSON", timeout=20)
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert answer.headers["retry-after"] == "3"
        # What could cut off its own answer is read first.
        large = b"{ no JSON" + b" " * (3 << 20)
        assert httpx.post(run.url + path, content=large, timeout=20).status_code == 400
        waits = httpx.post(
            run.url + path, content=b"{ no JSON", headers={"Expect": "100-continue"}, timeout=20
        )
        assert waits.status_code == 400
        run.engine.full = False
        assert httpx.post(run.url + path, content=b"{ no JSON", timeout=20).status_code == 400

    assert serve(test) == 0


def exchange(run: Run, *pieces: bytes) -> tuple[bytes, dict[str, str], bytes]:
    """First line, headers and body of the answer to pieces that are sent apart."""
    parts = urlsplit(run.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
            if piece is not pieces[-1]:  # the server has it before the next
                until(lambda: run._http is not None and run._http.server_state.connections)
        connection.recv(1, socket.MSG_PEEK)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    line, *fields = head.split(b"\r\n")
    pairs = (one.decode().split(": ", 1) for one in fields)
    return line, {name.lower(): value for name, value in pairs}, body


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_full_queue_refuses_a_whole_request_as_it_comes(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short way says what the long way does, and counts it."""

    def test(run: Run) -> None:
        run.engine.full = True
        body = b'{"prompt": "abc"}'
        fields = [b"Host: localhost", b"X-Request-Id: mine", b"Content-Length: %d" % len(body)]

        def head(*more: bytes) -> bytes:
            return b"\r\n".join([b"POST %b HTTP/1.1" % path.encode(), *fields, *more, b"", b""])

        line, short, text = exchange(run, head() + body)
        assert line == b"HTTP/1.1 429 Too Many Requests"
        assert short.pop("connection") == "close"
        other, long, same = exchange(run, head(), body)
        assert (other.split(b" ")[1], json.loads(same)) == (b"429", json.loads(text))
        assert {**long, "date": ""} == {**short, "date": ""}
        assert short["retry-after"] == "3"
        assert short["x-request-id"] == "mine"
        [count] = [one for one in metric(run, "http_requests_total{") if 'status="429"' in one]
        assert f'"{path}"' in count
        assert count.endswith(" 2.0")

        # Whatever is not plainly such a request goes the long way.
        assert "connection" not in exchange(run, head(b"Expect: 100-continue") + body)[1]
        for more, status in (
            (b"Origin: http://elsewhere", b"403"),
            (b"Host: localhost", b"400"),
            (b"Transfer-Encoding: chunked", b"400"),
            (b"no header", b"400"),
        ):
            assert exchange(run, head(more) + body)[0].split(b" ")[1] == status, more
        assert exchange(run, (head() + body).replace(b"localhost", b"elsewhere"))[0].split()[1] == b"403"
        assert exchange(run, (head() + body).replace(b"Host: localhost\r\n", b""))[0].split()[1] == b"400"
        # More may follow on what is looked at.
        for more, short_way in ((1, True), (0, False)):
            monkeypatch.setattr("gristmill.serve.server._FIRST_BYTES", len(head() + body) + more)
            assert ("connection" in exchange(run, head() + body)[1]) == short_way
        run.engine.full = False
        assert exchange(run, head() + body)[0].split()[1] != b"429"

    assert serve(test) == 0


def test_one_free_place_is_for_one_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come together are let in as far as there is room, and the rest refused the short way."""

    def test(run: Run) -> None:
        run.engine.full = True
        whole = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
        assert exchange(run, whole)[0].split()[1] == b"429"  # the next ones gather
        run.engine.full, run.engine.room = False, 2
        parts = urlsplit(run.url)
        made = [socket.create_connection((parts.hostname, parts.port), timeout=10) for _ in range(6)]
        for one in made:
            one.sendall(whole)
        answers = sorted(one.recv(65536).split(b" ", 2)[1] for one in made)
        for one in made:
            one.close()
        assert answers == [b"400"] * 2 + [b"429"] * 4  # `{}` has no prompt

    monkeypatch.setattr("gristmill.serve.server._GATHER_SECONDS", 1.0)
    assert serve(test) == 0


def test_a_proxy_tells_the_client_of_what_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    def test(run: Run) -> None:
        run.engine.full = True
        whole = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n%b\r\n{}"
        for more in (b"", b"X-Forwarded-For: 203.0.113.9\r\n"):
            assert exchange(run, whole % more)[0].split()[1] == b"429"

    with caplog.at_level(logging.INFO, "gristmill"):
        assert serve(test) == 0
    told = [one.fields["client"] for one in caplog.records if one.getMessage() == "request"]  # type: ignore[attr-defined]
    assert told == ["127.0.0.1", "203.0.113.9"]


def test_a_logged_field_is_one_field(caplog: pytest.LogCaptureFixture) -> None:
    def test(run: Run) -> None:
        httpx.get(f"{run.url}/v1/models", headers={"X-Forwarded-For": 'a b=1 path="/x"' + "y" * 100})

    with caplog.at_level(logging.INFO, "gristmill"):
        assert serve(test) == 0
    [record] = [one for one in caplog.records if one.getMessage() == "request"]
    text = logs._Text().format(record)
    assert r' client="a b=1 path=\"/x\"yyy' in text
    assert "y" * 64 not in text
    assert " path=/v1/models status=200 " in text


def test_a_full_queue_does_not_answer_without_a_key() -> None:
    def test(run: Run) -> None:
        run.engine.full = True
        whole = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n%b\r\n{}"
        assert exchange(run, whole % b"")[0].split()[1] == b"401"
        assert exchange(run, whole % b"Authorization: Bearer s3cret\r\n")[0].split()[1] == b"429"

    assert serve(test, api_key=["s3cret"]) == 0


def test_what_is_refused_takes_the_prompts_before_it_along() -> None:
    def test(run: Run) -> None:
        run.engine.refusals = [None, None, QueueFull("full", 1)]
        assert complete(run, prompt=["a", "b", "c"]).status_code == 429
        assert [one.closed for one in run.engine.asked] == [True, True]
        assert not run.engine.streams

    assert serve(test, Engine([HANG])) == 0


def test_a_failure_before_and_after_the_first_word() -> None:
    def test(run: Run) -> None:
        run.engine.script = [RequestFailed("a step failed")]
        for stream in (False, True):
            answer = chat(run, stream=stream)
            assert answer.status_code == 500
            assert answer.json()["error"]["message"] == "a step failed"
        run.engine.script = ["hel", 0.05, RequestFailed("a step failed")]
        assert chat(run).status_code == 500
        streamed = chat(run, stream=True)
        assert streamed.status_code == 200
        *chunks, last = events(streamed.text)
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "hel"
        assert last["error"]["code"] == "request_failed"
        assert all(c["choices"][0]["finish_reason"] is None for c in chunks)

    assert serve(test) == 0


def test_a_prompt_that_fits_no_context_gets_no_further() -> None:
    def test(run: Run) -> None:
        ids = [5] * (CONTEXT + 1)
        for answer, param in (
            (complete(run, prompt=ids), "prompt"),
            (complete(run, prompt=ids, echo=True, logprobs=1), "prompt"),
            (chat(run, messages=[{"role": "user", "content": "x" * (CONTEXT + 1)}]), "messages"),
        ):
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param)
            assert error["code"] == "context_length_exceeded"
            assert "maximum context length" in error["message"]
            assert str(CONTEXT) in error["message"]
            assert str(CONTEXT + 1) in error["message"]
        assert not run.engine.asked

    assert serve(test) == 0


# ---- time, and clients that leave --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [[HANG], ["hello", HANG]])
def test_a_client_that_leaves_takes_its_request_along(stream: bool, script: list[Any]) -> None:
    def test(run: Run) -> None:
        for path, what in (("chat/completions", {"messages": MESSAGES}), ("completions", {"prompt": "abc"})):
            with connect(run, post(f"/v1/{path}", {**what, "stream": stream})):
                until(lambda: run.engine.streams)
                time.sleep(0.05)
            until(lambda: not run.engine.streams, 1)
            assert run.engine.asked[-1].closed
        until(lambda: [line for line in metric(run, "http_requests_total") if 'status="499"' in line])

    assert serve(test, Engine(script)) == 0


def test_a_client_that_leaves_while_its_text_is_prepared() -> None:
    texts = Texts()
    texts.seconds = 30

    def test(run: Run) -> None:
        form = {"type": "json_object"}
        for number, (path, what) in enumerate(
            (
                ("chat/completions", {"messages": MESSAGES}),
                ("completions", {"prompt": "abc"}),
                ("completions", {"prompt": [5, 6], "response_format": form}),
            ),
            1,
        ):
            with connect(run, post(f"/v1/{path}", what)):
                time.sleep(0.1)
            until(lambda number=number: texts.cancelled == number, 1)  # type: ignore[misc]
        assert not run.engine.asked

    assert serve(test, texts=texts) == 0


def test_the_time_of_a_request_begins_before_its_text_is_prepared() -> None:
    texts = Texts()
    texts.seconds = 30

    def test(run: Run) -> None:
        began = time.monotonic()
        assert chat(run).status_code == 408
        assert complete(run, timeout=0.1).status_code == 408
        assert time.monotonic() - began < 2

    assert serve(test, texts=texts, request_timeout=0.5) == 0


def test_a_template_that_fails_is_the_clients_error() -> None:
    class Broken(Texts):
        async def render(self, messages: Any, *, tools: Any = None, variables: Any = None) -> Rendered:
            raise TemplateError("the chat template takes too long")

    def test(run: Run) -> None:
        answer = chat(run)
        assert answer.status_code == 400
        assert "takes too long" in answer.json()["error"]["message"]

    assert serve(test, texts=Broken()) == 0


def test_who_does_not_read_is_cut_off_and_leaves_nothing() -> None:
    """In the middle of a stream; and after an answer that was complete before it was read."""

    def test(run: Run) -> None:
        for script, stream in ((["x" * 50_000] * 2000, True), (["x" * 10_000_000], False)):
            run.engine.script = script
            with connect(run, post("/v1/completions", {"prompt": "abc", "stream": stream}), 4096):
                until(lambda: run.engine.asked)
                time.sleep(0.2)
                assert connections(run) == 1
                until(lambda: not connections(run), 6)
            assert not run.engine.streams
            run.engine.asked.clear()

    def connections(run: Run) -> int:
        assert run._http is not None
        return len(run._http.server_state.connections)

    assert serve(test, write_timeout=1) == 0


def test_who_reads_a_stream_too_slowly_is_cut_off() -> None:
    def test(run: Run) -> None:
        with connect(run, post("/v1/completions", {"prompt": "abc", "stream": True}), 65536) as connection:
            began, got = time.monotonic(), 0
            while not (cut := run.engine.asked and not run.engine.streams) and time.monotonic() - began < 15:
                got += len(connection.recv(200_000))
                time.sleep(0.02)
            assert cut
            assert time.monotonic() - began > 4
            assert got < 70_000_000  # it had not come to its end
        assert not run.server.writing

    assert serve(test, Engine(["x" * 80_000_000, "x"]), write_timeout=2) == 0


def test_who_reads_slowly_is_not() -> None:
    def test(run: Run) -> None:
        got = 0
        with connect(run, post("/v1/completions", {"prompt": "abc"}), 65536) as connection:
            began = time.monotonic()
            while got < 4_000_000:
                piece = connection.recv(100_000)
                assert piece, got
                got += len(piece)
                time.sleep(0.05)
        assert time.monotonic() - began > 1.5

    assert serve(test, Engine(["x" * 4_000_000]), write_timeout=0.7) == 0


# ---- bodies and headers ------------------------------------------------------------------------------------


def test_a_body_that_nobody_asked_for_is_not_read_for_ever() -> None:
    """The answer, 404 or 401, is there; what still comes is counted, and cut off."""

    def test(run: Run) -> None:
        head = b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        with connect(run, head + b"5\r\nhello\r\n") as connection:
            until(lambda: connection.recv(65536))
            sent = 0
            try:
                while sent < 100_000_000:
                    connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                    sent += 65536
            except OSError:
                pass
            assert sent < 50_000_000
        with connect(run, head + b"5\r\nhello\r\n") as connection:
            assert b"404" in connection.recv(65536)
            began = time.monotonic()
            connection.settimeout(0.3)
            try:
                while time.monotonic() - began < 10:
                    connection.sendall(b"1\r\nx\r\n")
                    try:
                        if connection.recv(100) == b"":
                            break
                    except TimeoutError:
                        pass
            except ConnectionError:
                pass
            assert time.monotonic() - began < 5

    assert serve(test, header_timeout=1) == 0


def test_connections_over_the_limit() -> None:
    def test(run: Run) -> None:
        parts = urlsplit(run.url)
        made = [socket.create_connection((parts.hostname, parts.port)) for _ in range(100)]
        try:
            until(lambda: run._http is not None and len(run._http.server_state.connections) == 4 + 64)
            left = []
            for one in made:
                one.settimeout(0.01)
                try:
                    assert one.recv(1) == b""
                except TimeoutError:
                    left.append(one)
                except ConnectionError:
                    pass
            assert len(left) == 68
            left[0].settimeout(5)
            left[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = left[0].recv(4096)
            assert b" 503 " in answer.split(b"\r\n")[0]
            assert b"connection: close" in answer.lower()
        finally:
            for one in made:
                one.close()
        until(lambda: httpx.get(f"{run.url}/health").status_code == 200)

    assert serve(test, max_connections=4) == 0


def proxied(**values: str) -> dict[str, str]:
    """The headers that the guide's nginx sends on, with its variables replaced."""
    guide = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    block = guide.split("```nginx\n")[1].split("```")[0]
    found = dict(re.findall(r"proxy_set_header (\S+) \$(\w+);", block))
    assert found.keys() == {"Host", "X-Forwarded-Proto", "X-Forwarded-For"}
    return {name: values[variable] for name, variable in found.items()}


@pytest.mark.parametrize("host", ["llm.example", "llm.example:8443"])
def test_behind_a_proxy_that_tells(host: str, caplog: pytest.LogCaptureFixture) -> None:
    headers = proxied(http_host=host, scheme="https", remote_addr="203.0.113.7")

    def status(run: Run, origin: str | None = f"https://{host}", **others: str) -> int:
        sent = headers | {name.replace("_", "-"): value for name, value in others.items()}
        sent |= {} if origin is None else {"Origin": origin}
        answer = httpx.post(f"{run.url}/v1/completions", json={"prompt": "abc"}, headers=sent)
        assert not any(name.startswith("access-control") for name in answer.headers)
        return answer.status_code

    def test(run: Run) -> None:
        caplog.set_level(logging.INFO, "gristmill")
        assert status(run) == status(run, None) == 200
        assert status(run, Sec_Fetch_Site="same-origin") == 200
        assert {one.fields["client"] for one in caplog.records if hasattr(one, "fields")} == {"203.0.113.7"}
        assert httpx.get(run.url, headers=headers).status_code == 200
        for origin in ("https://evil.example", f"http://{host}", "https://llm.example:444", "null"):
            assert status(run, origin) == 403
        assert status(run, X_Forwarded_Proto="http") == 403
        assert status(run, Host="127.0.0.1:8000") == 403  # as nginx does without being told
        assert status(run, None, Sec_Fetch_Site="cross-site") == 403
        for name in ("evil.example", "llm.example.evil.example"):
            assert status(run, Host=name) == status(run, f"https://{name}", Host=name) == 403

    assert serve(test, allowed_hosts=("llm.example",)) == 0


def test_behind_a_proxy_that_tells_nothing() -> None:
    def test(run: Run) -> None:
        for origin, status in (("https://llm.example", 200), ("https://evil.example", 403)):
            answer = httpx.post(
                f"{run.url}/v1/completions", json={"prompt": "abc"}, headers={"Origin": origin}
            )
            assert answer.status_code == status
            shared = answer.headers.get("access-control-allow-origin")
            assert shared == (origin if status == 200 else None)

    assert serve(test, allowed_origins=("https://llm.example",)) == 0


@pytest.mark.parametrize(("client", "believed"), [("127.0.0.1", True), ("192.0.2.1", False)])
def test_who_is_believed_about_the_scheme(client: str, believed: bool) -> None:
    sent = proxied(http_host="llm.example", scheme="https", remote_addr="203.0.113.7")
    run = Run(Engine(), Texts(), Settings(port=0, allowed_hosts=("llm.example",)))
    run.listener.close()

    async def main() -> int:
        await run._load()
        config = uvicorn.Config(cast("Any", make_app(run.server)), log_config=None)
        config.load()
        transport = httpx.ASGITransport(config.loaded_app, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://llm.example") as http:
            headers = {**sent, "Origin": "https://llm.example"}
            return (await http.post("/v1/completions", json={"prompt": "abc"}, headers=headers)).status_code

    assert asyncio.run(main()) == (200 if believed else 403)


def test_made_up_methods_and_paths_do_not_fill_the_metrics() -> None:
    def test(run: Run) -> None:
        for i in range(30):
            httpx.request(f"M{i}", f"{run.url}/v1/x{i}")
            httpx.get(f"{run.url}/v1/models/m{i}")
        found = [line for line in metric(run, "http_requests_total") if not line.endswith(" 0.0")]
        assert len(found) < 10, found
        assert any('method="other"' in line and line.endswith(" 30.0") for line in found)

    assert serve(test) == 0


def test_logs_cannot_be_written_by_strangers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gristmill.serve import logs

    handlers = {name: logging.getLogger(name).handlers for name in ("gristmill", "uvicorn", "uvicorn.error")}
    for form in ("text", "json"):
        logs.set_up(form, "info")
        logs.event("request", path="/\n\x1b[31mERROR 2026 gristmill owned\x7f\u202e")
    for name, handler in handlers.items():
        monkeypatch.setattr(logging.getLogger(name), "handlers", handler)
    text, line = capsys.readouterr().err.splitlines()
    assert text.isprintable()
    assert json.loads(line)["path"].startswith("/\n")
    assert "\x1b" not in line


def test_hosts_are_told_apart_without_regard_to_case() -> None:
    def test(run: Run) -> None:
        for host, status in (("BOX.example", 200), ("box.EXAMPLE:80", 200), ("fox.example", 403)):
            answer = httpx.get(f"{run.url}/health", headers={"Host": host})
            assert answer.status_code == status

    assert serve(test, allowed_hosts=("Box.example",)) == 0


BIG: dict[str, bytes] = {
    "the last key twice": b"{" + b"".join(b'"a%d":1,' % i for i in range(400_000)) + b'"a399999":1}',
    "messages that are numbers": b'{"messages":[' + b"1," * 2_000_000 + b"1]}",
    "messages that are lists": b'{"messages":[' + b"[]," * 1_000_000 + b"[]]}",
    "biases that are texts": b'{"messages":[],"logit_bias":{'
    + b",".join(b'"%d":"x"' % i for i in range(300_000))
    + b"}}",
    "stops that are numbers": b'{"messages":[{}],"stop":[' + b"1," * 1_000_000 + b"1]}",
    "a prompt of numbers and a text": b'{"prompt":[' + b"1," * 1_000_000 + b'"x"]}',
    "a prompt of lists": b'{"prompt":[' + b"[1]," * 1_000_000 + b"[1]]}",
    "fields nobody knows": b"{" + b"".join(b'"b%d":1,' % i for i in range(400_000)) + b'"messages":3}',
}


@pytest.mark.parametrize("name", list(BIG))
def test_big_bodies_that_are_wrong(name: str) -> None:
    """Reading it takes no more than a few times what its JSON takes."""

    def test(run: Run) -> None:
        path = "/v1/completions" if b'"prompt"' in BIG[name][:20] else "/v1/chat/completions"
        json.loads(BIG[name])
        began = time.process_time()
        json.loads(BIG[name])
        alone = time.process_time() - began
        began = time.process_time()
        answer = httpx.post(run.url + path, content=BIG[name], timeout=60)
        assert time.process_time() - began < 10 * alone + 1
        assert answer.status_code == 400, answer.text
        assert len(answer.text) < 1000

    assert serve(test) == 0


def test_a_key_given_twice_is_found_in_linear_time() -> None:
    def seconds(count: int) -> float:
        body = b"{" + b"".join(b'"a%d":1,' % i for i in range(count)) + b'"a%d":1}' % (count - 1)
        began = time.process_time()
        with pytest.raises(ApiError, match="given twice"):
            parse_object(body)
        return time.process_time() - began

    seconds(1000)
    assert seconds(100_000) < 1000 * max(1e-3, seconds(1000))


# ---- the end -----------------------------------------------------------------------------------------------


def test_what_runs_may_finish_and_what_does_not_is_cut_off() -> None:
    def test(run: Run) -> None:
        answers: list[str] = []
        thread = threading.Thread(target=lambda: answers.append(chat(run, stream=True).text))
        thread.start()
        until(lambda: run.engine.streams)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: run.server.draining)
        assert chat(run).status_code == 503
        thread.join()
        assert events(answers[0])[-1]["choices"][0]["finish_reason"] == "stop"

    assert serve(test, Engine(["a", 0.5, "b"])) == 0

    def hangs(run: Run) -> None:
        answers: list[str] = []
        thread = threading.Thread(target=lambda: answers.append(complete(run, stream=True).text))
        thread.start()
        until(lambda: run.engine.streams)
        os.kill(os.getpid(), signal.SIGTERM)
        thread.join(3)
        assert events(answers[0])[-1]["error"]["code"] == "unavailable"

    assert serve(hangs, Engine(["a", HANG]), drain_timeout=0.2) == 0


def test_an_http_server_that_ends_unasked_is_a_failure() -> None:
    def test(run: Run) -> None:
        assert run._http is not None
        run._http.should_exit = True
        until(lambda: not run.engine.running)

    assert serve(test) == 1


def test_an_engine_that_is_dead_shows_at_once() -> None:
    def test(run: Run) -> None:
        run.engine.alive = False
        for path in ("/health", "/ready"):
            assert httpx.get(run.url + path).status_code == 503
        assert chat(run).status_code == 503
        run.engine.alive = True
        assert httpx.get(f"{run.url}/health").status_code == 200

    assert serve(test) == 0


def test_a_certificate_that_is_none(tmp_path: Any) -> None:
    (tmp_path / "key").write_text("no key")
    (tmp_path / "cert").write_text("no certificate")
    for name in (tmp_path / "key", tmp_path / "nothing"):
        with pytest.raises(GristmillError, match="TLS") as caught:
            serve(lambda run: None, ssl_keyfile=str(name), ssl_certfile=str(tmp_path / "cert"))
        assert "\n" not in str(caught.value)


def test_as_many_files_as_connections_may_be_open() -> None:
    program = (
        "import resource\n"
        "from gristmill.serve.server import _allow_files\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 1000))\n"
        "_allow_files(500)\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (500, 1000)\n"
        "_allow_files(2000)\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1000, 1000)\n"
        "_allow_files(200)\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1000, 1000)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
