"""What strangers send. After each of it another client's stream is undisturbed and the server is healthy."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serve.conftest import ServerProcess

USER = [{"role": "user", "content": "Count to ten."}]


class Bystander:
    """Another client, which says the same over and over."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._alone = self._say()
        self._stop = False
        self.quiet = threading.Lock()
        """Whoever holds it is not disturbed."""
        self.said = 0
        self.wrong: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _say(self) -> str:
        body = {"messages": USER, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
        answer = httpx.post(f"{self._url}/v1/chat/completions", json=body, timeout=60)
        return str(answer.json()["choices"][0]["message"]["content"])

    def _run(self) -> None:
        while not self._stop:
            with self.quiet:
                try:
                    text = self._say()
                except Exception as error:
                    text = repr(error)
                if text != self._alone:
                    self.wrong.append(text)
                self.said += 1
            time.sleep(0.001)  # a lock is not fair

    def stop(self) -> None:
        self._stop = True
        self._thread.join()


@pytest.fixture(scope="module")
def bystander(server: ServerProcess) -> Iterator[Bystander]:
    made = Bystander(server.url)
    yield made
    made.stop()
    assert made.said
    assert not made.wrong


@pytest.fixture(autouse=True)
def undisturbed(server: ServerProcess, bystander: Bystander) -> Iterator[None]:
    """The bystander streams beside every test, and says what it says alone."""
    yield
    assert not bystander.wrong
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/ready").status_code == 200


def refused(answer: httpx.Response, status: int = 400, param: str | None = None) -> str:
    assert answer.status_code == status, answer.text[:300]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    if param is not None:
        assert error["param"] == param, error
    return str(error["message"])


def post(server: ServerProcess, body: bytes | Any, path: str = "/v1/chat/completions") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(server.url + path, content=content, timeout=60)


CHAT = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, %s}'


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"messages": [], "messages": []}',
        b"[" * 10_000,
        b'{"a":' * 10_000,
        b'{"messages": ' + b"[" * 70 + b"]" * 70 + b"}",
        CHAT % b'"temperature": NaN',
        CHAT % b'"temperature": Infinity',
        CHAT % b'"temperature": 1e400',
        CHAT % (b'"seed": ' + b"9" * 5000),
        CHAT % rb'"user": "\ud800"',
        CHAT % rb'"user": "a\u0000b"',
        b'{"messages": "x"}',
        b'{"messages": []}',
        b'{"messages": [3]}',
        b'{"messages": [{"role": "wizard", "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": null}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}',
        b'{"messages": [{"role": "user", "content": [null]}]}',
        b"{}",
    ],
)
def test_bodies(server: ServerProcess, body: bytes) -> None:
    began = time.monotonic()
    refused(post(server, body))
    assert time.monotonic() - began < 2


BAD: dict[str, list[Any]] = {
    "n": [10**6, 0, -1, True, "2", 1.5],
    "max_tokens": [0, -1, 2**63, 1.5, "7"],
    "temperature": [-1, 1e30, "hot", True],
    "top_p": [0, 1.1, -1],
    "top_k": [-2, 1.5],
    "min_p": [2, -0.1],
    "presence_penalty": [1e9, -1e9],
    "frequency_penalty": [3],
    "repetition_penalty": [0, -1],
    "seed": ["x", 1.5],
    "stop": [[""], "", ["x"] * 10_000, 3, ["y" * 1000]],
    "logit_bias": [{"x": 1}, {"999999": 1}, {"-1": 1}, {"5": 1000}, {str(i): 1 for i in range(5000)}, [1]],
    "min_tokens": [50, -1],
    "stop_token_ids": [[-1], list(range(1000)), "x"],
    "top_logprobs": [21, 10**6, -1, 5],
    "response_format": [{"type": "xml"}, {"type": "json_schema"}, "json"],
    "tools": [[{}], [{"type": "x"}], [{"type": "function", "function": {"name": "a b"}}], ["x"]],
    "tool_choice": ["perhaps", {"type": "function", "function": {"name": "none such"}}, "required"],
    "stream": ["yes"],
    "functions": [[{"name": "x"}]],
    "modalities": [["audio"]],
    "timeout": [0, -3],
    "truncate_prompt_tokens": [0, -1],
    "chat_template_kwargs": [{"messages": []}, {"__class__": 1}, {"add_generation_prompt": 0}, 3],
}


@pytest.mark.parametrize("name", list(BAD))
def test_values(server: ServerProcess, name: str) -> None:
    for value in BAD[name]:
        body = {"messages": USER, "max_tokens": 2, name: value}
        message = refused(post(server, body))
        assert len(message) < 600


def test_values_that_are_allowed(server: ServerProcess) -> None:
    for fields in (
        {"temperature": 1e-30},
        {"temperature": 1e-30, "top_p": 1e-30, "top_k": 1},
        {"logit_bias": {str(i): -100 for i in range(1024)}},
        {"stop": None, "user": "x", "metadata": {"a": "b"}, "store": False, "nobody_knows_this": [1, 2]},
        {"chat_template_kwargs": {"tokenize": True, "enable_thinking": False}},
        {"max_completion_tokens": 2, "max_tokens": 5},
        {"top_k": -1, "seed": -1},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}], "name": "someone"}]},
    ):
        answer = post(server, {"messages": USER, "max_tokens": 2, **fields})
        assert answer.status_code == 200, (fields, answer.text)


def test_prompts(server: ServerProcess) -> None:
    path = "/v1/completions"
    for prompt in ("", [], [""], [[]], [-1], [10**9], [[1], [-1]], [True], 3, None, ["x"] * 100_000, [1.5]):
        refused(post(server, {"prompt": prompt, "max_tokens": 1}, path))
    refused(post(server, {"prompt": ["x"] * 40, "n": 4, "max_tokens": 1}, path))
    for fields in ({"best_of": 3}, {"suffix": "x"}, {"logprobs": 10**6}, {"max_tokens": 0}):
        refused(post(server, {"prompt": "x", **fields}, path))


def test_lengths(server: ServerProcess) -> None:
    path = "/v1/completions"
    message = refused(post(server, {"prompt": [5] * 8193, "max_tokens": 1}, path))
    assert "maximum context length" in message
    assert "8192" in message
    assert "8193" in message
    answer = post(server, {"prompt": [5] * 8192, "max_tokens": 1}, path)
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    cut = {"prompt": [5] * 9000, "max_tokens": 1, "truncate_prompt_tokens": 20}
    assert post(server, cut, path).json()["usage"]["prompt_tokens"] == 20


@pytest.mark.parametrize("text", ["a" * 7_000_000, "\u0301" * 500_000, "<|im_end|>" * 50_000])
def test_long_texts_do_not_block(server: ServerProcess, text: str) -> None:
    began = time.monotonic()
    done: list[httpx.Response] = []
    thread = threading.Thread(
        target=lambda: done.append(post(server, {"messages": [{"role": "user", "content": text}]}))
    )
    thread.start()
    slowest = 0.0
    while thread.is_alive() and time.monotonic() - began < 60:
        before = time.monotonic()
        assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
        slowest = max(slowest, time.monotonic() - before)
        time.sleep(0.02)
    thread.join()
    assert done[0].status_code == 400
    assert slowest < 1.5


SCHEMAS: list[Any] = [
    {"type": "nothing"},
    {"type": "object", "properties": 3},
    {"$ref": "#/$defs/missing"},
    {"$ref": "http://example.com/schema"},
    {"type": "string", "pattern": "("},
    {"type": "string", "x-guidance": {"lenient": True}},
    {"type": "object", "patternProperties": {"(": {}}},
    {"type": "integer", "minimum": 5, "maximum": 4},
    {"enum": ["x" * 1000] * 1000},
    {"type": "object", "unevaluatedProperties": False, "dependentSchemas": {"a": {}}},
    {"not": {}},
]


@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_schemas_that_cannot_be_followed(server: ServerProcess, number: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[number]}}
    began = time.monotonic()
    refused(post(server, {"messages": USER, "max_tokens": 5, "response_format": form}))
    assert time.monotonic() - began < 6


LATE = "Once upon a time there was a miller who had three sons and one cat: "


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"grammar": f'start: "{LATE}" X\nX: /[a&&b]/'}, "nothing is allowed after the text so far"),
        (
            {
                "grammar": f'start: "{LATE}" X\nX: /(.{{0,900}}a.{{0,900}}){{4}}b/',
                "temperature": 2,
                "top_p": 1,
                "seed": 1,
            },
            "too many expressions constructed",
        ),
        ({"guided_choice": ["yes", "no"], "min_tokens": 20}, "allows no further token before min_tokens"),
    ],
)
def test_constraints_that_fail_in_the_middle_of_an_answer(
    server: ServerProcess, fields: dict[str, Any], why: str
) -> None:
    body = {"messages": USER, "temperature": 0, "max_tokens": 100, **fields}
    answer = post(server, body)
    assert why in refused(answer)
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "constraint_failed")
    *chunks, last = post(server, {**body, "stream": True}).text.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    *said, told = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    assert told == {"error": error}
    text = "".join(one["choices"][0]["delta"].get("content", "") for one in said)
    assert text.startswith(LATE[:40]) if "grammar" in fields else text in ("yes", "no")


def test_schemas_that_are_hard(server: ServerProcess) -> None:
    tree = {
        "$defs": {"t": {"type": "object", "properties": {"l": {"$ref": "#/$defs/t"}, "v": {"type": "null"}}}}
    }
    for schema in (
        {**tree, "$ref": "#/$defs/t"},
        {"type": "number", "maximum": 2e10, "minimum": -2e10},
        {"type": "string", "pattern": "^(a+)+$"},
        {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}}},
    ):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = post(server, {"messages": USER, "max_tokens": 20, "response_format": form})
        assert answer.status_code == 200, answer.text
    for fields in (
        {"guided_regex": "("},
        {"grammar": "start: %"},
    ):
        answer = post(server, {"messages": USER, "max_tokens": 5, **fields})
        assert answer.status_code == 400, answer.text


# ---- below HTTP ------------------------------------------------------------------------------------------


def raw(server: ServerProcess, data: bytes, seconds: float = 5) -> bytes:
    """Sends bytes; what comes back until the server closes, or nothing more does."""
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=seconds) as connection:
        got = b""
        try:
            connection.sendall(data)
            while piece := connection.recv(65536):
                got += piece
        except (TimeoutError, ConnectionError):
            pass
        return got


def request(method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode() + body


SMUGGLED = request("GET", "/v1/models")


@pytest.mark.parametrize(
    "data",
    [
        request(
            "POST",
            "/tokenize",
            "Content-Length: 5",
            "Transfer-Encoding: chunked",
            body=b"0\r\n\r\n" + SMUGGLED,
        ),
        request("POST", "/tokenize", "Content-Length: 5", "Content-Length: 6", body=b"hello" + SMUGGLED),
        request("POST", "/tokenize", "Content-Length: +5", body=b"hello" + SMUGGLED),
        request("POST", "/tokenize", "Content-Length: 0x5", body=b"hello" + SMUGGLED),
        request("POST", "/tokenize", "Transfer-Encoding: chunked", body=b"5;\nhello\n0\n\n" + SMUGGLED),
        request("POST", "/tokenize", "Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n" + SMUGGLED),
        request("GET", "/health", f"Content-Length: {len(SMUGGLED)}", body=SMUGGLED),
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nBad Header: x\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"\x16\x03\x01\x02\x00" * 100,
    ],
)
def test_what_is_smuggled_is_never_answered(server: ServerProcess, data: bytes) -> None:
    got = raw(server, data, 2)
    assert got.count(b"HTTP/1.1 ") <= 1
    assert b'"object": "list"' not in got
    assert got == b"" or b" 4" in got.split(b"\r\n", 1)[0], got[:200]


def test_headers_too_large_too_many_too_slow(server: ServerProcess) -> None:
    big = raw(server, request("GET", "/health", "X: " + "y" * 10_000_000))
    assert big == b"" or big.split(b"\r\n")[0].split()[1] in (b"400", b"431")
    many = raw(server, request("GET", "/health", *[f"x{i}: y" for i in range(10_000)]))
    assert many == b"" or many.split(b"\r\n")[0].split()[1] in (b"400", b"431")
    some = raw(server, request("GET", "/health", *[f"x{i}: y" for i in range(200)]), 2)
    assert b" 431 " in some.split(b"\r\n")[0]


def test_bodies_too_large(server: ServerProcess) -> None:
    told = raw(server, request("POST", "/tokenize", "Content-Length: 900000000", body=b"x" * 1000))
    assert b" 413 " in told.split(b"\r\n")[0]
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    endless = raw(server, request("POST", "/tokenize", "Transfer-Encoding: chunked", body=chunk * 200))
    assert endless == b"" or b" 413 " in endless.split(b"\r\n")[0]


def test_a_thousand_connections(server: ServerProcess) -> None:
    parts = urlsplit(server.url)
    open_ones = [socket.create_connection((parts.hostname, parts.port)) for _ in range(1000)]
    try:
        assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
    finally:
        for one in open_ones:
            one.close()


def test_bodies_that_are_slow_to_refuse(server: ServerProcess) -> None:
    """None of them may hold the event loop: another request is answered meanwhile."""
    keys = ", ".join(f'"k{i}": 0' for i in range(100_000))
    bodies: list[tuple[str, bytes | Any]] = [
        ("/v1/completions", ("{" + keys + ', "k5": 0}').encode()),
        ("/v1/completions", {"prompt": [1.5] * 400_000}),
        ("/v1/completions", {"prompt": [[1]] * 400_000}),
        ("/v1/completions", {"prompt": [5] * 900_000, "echo": True}),
        ("/v1/chat/completions", {"messages": [1] * 400_000}),
        ("/v1/chat/completions", {"messages": USER * 100_000}),
        ("/detokenize", {"tokens": [5.5] * 400_000}),
        ("/detokenize", {"tokens": [10**9] * 400_000}),
    ]

    def answer(path: str, body: bytes | Any, done: list[httpx.Response]) -> None:
        done.append(post(server, body, path))

    for path, body in bodies:
        done: list[httpx.Response] = []
        thread = threading.Thread(target=answer, args=(path, body, done))
        thread.start()
        while thread.is_alive():
            before = time.monotonic()
            assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
            assert time.monotonic() - before < 3, (path, str(body)[:40])
        refused(done[0])


def test_a_page_of_another_site_cannot_make_the_server_work(server: ServerProcess) -> None:
    body = json.dumps({"messages": USER, "max_tokens": 1})
    url = f"{server.url}/v1/chat/completions"
    host = server.url.removeprefix("http://")
    for headers in (
        {"Origin": "https://evil.example", "Content-Type": "text/plain"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": f"https://{host}"},
    ):
        refused(httpx.post(url, content=body, headers=headers), 403)
    for headers in ({"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}, {}):
        assert httpx.post(url, content=body, headers=headers, timeout=30).status_code == 200


def test_fields_that_exclude_each_other(server: ServerProcess) -> None:
    for fields in (
        {"guided_regex": "a", "regex": "b"},
        {"guided_regex": "a", "structured_outputs": {"regex": "b"}},
        {"guided_choice": ["a", ""]},
        {"stream_options": {"include_usage": True}},
        {"response_format": {"type": "json_object"}, "guided_json": {}},
    ):
        refused(post(server, {"messages": USER, "max_tokens": 2, **fields}))


def test_a_prompt_that_is_cut_is_echoed_as_it_is(server: ServerProcess) -> None:
    body = {
        "prompt": "one two three four five six",
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,
        "truncate_prompt_tokens": 3,
    }
    choice = post(server, body, "/v1/completions").json()["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert choice["text"].startswith(" four five six")


def test_series_of_metrics_are_bounded(server: ServerProcess) -> None:
    for method in ("AAA", "AAB"):
        httpx.request(method, f"{server.url}/version")
    httpx.get(f"{server.url}/%1b%5b2Jx")
    text = httpx.get(f"{server.url}/metrics").text
    assert "AAA" not in text
    assert 'method="other"' in text
    assert not any("\x1b" in line for line in server.lines)


def test_tools_count_when_messages_are_tokenized(server: ServerProcess) -> None:
    def count(**fields: Any) -> Any:
        return httpx.post(f"{server.url}/tokenize", json={"messages": USER, **fields})

    assert count(tools=[{"type": "function", "function": {"name": "f"}}]).status_code == 200
    refused(count(tools=[{"type": "x"}]))
    refused(httpx.post(f"{server.url}/tokenize", json={"prompt": "x", "tools": []} | {"tools": [{}]}))


def test_hosts_and_origins(server: ServerProcess) -> None:
    refused(httpx.get(f"{server.url}/v1/models", headers={"Host": "evil.example"}), 403)
    assert httpx.get(f"{server.url}/v1/models", headers={"Host": "localhost:1"}).status_code == 200
    page = httpx.get(f"{server.url}/v1/models", headers={"Origin": "http://evil.example"})
    assert not any(name.startswith("access-control") for name in page.headers)
    preflight = httpx.options(
        f"{server.url}/v1/models", headers={"Origin": "http://x", "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code in (404, 405)
    assert not any(name.startswith("access-control") for name in preflight.headers)


def test_routes_that_are_not_there(server: ServerProcess) -> None:
    refused(httpx.get(f"{server.url}/v1/nothing"), 404)
    refused(httpx.get(f"{server.url}/v1/chat/completions"), 405)
    refused(httpx.post(f"{server.url}/v1/embeddings", json={"input": "x"}), 404)
    refused(httpx.post(f"{server.url}/v1/responses", json={"input": "x"}), 404)
    refused(post(server, {"model": "other", "messages": USER}), 404, "model")
    refused(httpx.get(f"{server.url}/v1/models/other"), 404)
    refused(httpx.get(f"{server.url}/v1/models/../../etc/passwd"), 404)


def test_clients_that_vanish(server: ServerProcess, bystander: Bystander) -> None:
    """In the queue, in the prompt, in the middle of a stream: nothing of them is left."""
    parts = urlsplit(server.url)
    for stream in (True, False):
        for after in (0.0, 0.05, 0.4):
            for size in (5, 3000):
                body = json.dumps(
                    {"prompt": [7] * size, "max_tokens": 2000, "ignore_eos": True, "stream": stream, "n": 2}
                ).encode()
                with socket.create_connection((parts.hostname, parts.port)) as connection:
                    connection.sendall(
                        request("POST", "/v1/completions", f"Content-Length: {len(body)}", body=body)
                    )
                    time.sleep(after)
    with bystander.quiet:
        deadline = time.monotonic() + 5
        while True:
            text = httpx.get(f"{server.url}/metrics").text
            left = re.findall(r"^gristmill:num_requests_(?:running|waiting)\{.* (\S+)$", text, re.MULTILINE)
            assert len(left) == 2
            if left == ["0.0", "0.0"]:
                return
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


def test_errors_name_no_insides(server: ServerProcess) -> None:
    for answer in (
        post(server, b"{"),
        post(server, {"messages": USER, "n": 0}),
        httpx.get(server.url + "/x"),
    ):
        assert "Traceback" not in answer.text
        assert "/src/" not in answer.text
        assert "site-packages" not in answer.text
