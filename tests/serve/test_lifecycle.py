"""Starting, stopping, keys, settings, and an engine that fails."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from gristmill.errors import UsageError
from gristmill.serve.app import Server, make_app
from gristmill.serve.guard import OPEN_ROUTES
from gristmill.serve.page_files import page
from gristmill.serve.settings import Settings, load_settings, option_names
from tests.serve.conftest import ServerProcess

Start = Callable[..., ServerProcess]
LONG = {"prompt": "Once", "max_tokens": 300, "ignore_eos": True, "temperature": 0}


# ---- settings ----------------------------------------------------------------------------------------------

SAMPLES: dict[str, Any] = {
    "host": "127.0.0.2",
    "api_key": ("a", "b"),
    "allowed_origins": ("http://x",),
    "allowed_hosts": ("box",),
    "served_model_name": "name",
    "ssl_keyfile": "k",
    "ssl_certfile": "c",
    "weights": "int8",
    "activations": "exact",
    "kv_dtype": "int4",
    "kv_placement": "table",
    "tool_parser": "none",
    "reasoning_parser": "none",
    "log_format": "json",
    "log_level": "debug",
    "helpers": 3,
}


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_flags_environment_and_file_agree(name: str, tmp_path: Path) -> None:
    default = Settings.model_fields[name].default
    kind = option_names()[name][1]
    value = SAMPLES.get(name, not default if kind == "flag" else 100)
    both = {"ssl_keyfile": "k", "ssl_certfile": "c"} if name.startswith("ssl") else {}
    text = (
        ",".join(value) if isinstance(value, tuple) else str(value).lower() if kind == "flag" else str(value)
    )
    plain = list(value) if isinstance(value, tuple) else value
    flagged = value if kind in ("flag", "many") else str(value)
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**both, name.replace("_", "-"): plain}))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({**both, name: plain}))
    variables = {f"GRISTMILL_{key.upper()}": other for key, other in {**both, name: text}.items()}
    results = [
        load_settings({**both, name: flagged}, None, {})[0],
        load_settings({}, None, variables)[0],
        load_settings({}, tmp_path / "a.yaml", {})[0],
        load_settings({}, tmp_path / "b.yaml", {})[0],
    ]
    assert all(getattr(one, name) == value for one in results), results
    assert all(one == results[0] for one in results)
    assert getattr(results[0], name) != default


def test_flags_go_before_variables_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: smollm2\nport: 1\nmax-queue: 1\nthreads: 1\n")
    settings, rest = load_settings({"port": "3"}, path, {"GRISTMILL_PORT": "2", "GRISTMILL_MAX_QUEUE": "2"})
    assert (settings.port, settings.max_queue, settings.threads) == (3, 2, 1)
    assert rest == {"model": "smollm2"}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"port": "x"}, "--port"),
        ({"port": "70000"}, "--port"),
        ({"max_num_seqs": "0"}, "--max-num-seqs"),
        ({"host": "0.0.0.0"}, "allow-no-key"),
        ({"api_key": ("a b",)}, "key"),
        ({"api_key": ""}, "empty"),
        ({"ssl_keyfile": "x"}, "go together"),
    ],
)
def test_wrong_settings(flags: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        load_settings(flags, None, {})
    assert "\n" not in str(caught.value)


def test_several_in_one_flag() -> None:
    flags = {"api_key": ("a,b", "c")}
    assert load_settings(flags, None, {})[0].api_key == ("a", "b", "c")
    assert load_settings({}, None, {"GRISTMILL_API_KEY": "a,b,c"})[0].api_key == ("a", "b", "c")


def test_wrong_files(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for text in ("a: [", "- 1", "prot: 3", "3: 4", "\0"):
        path.write_text(text)
        with pytest.raises(UsageError):
            load_settings({}, path, {})
    with pytest.raises(UsageError, match="cannot read"):
        load_settings({}, tmp_path / "none.yaml", {})


# ---- keys --------------------------------------------------------------------------------------------------


def test_every_route_but_health_needs_the_key() -> None:
    """The table of routes is the application's own."""
    settings = Settings(api_key=("sesame", "other"))
    files, paths = page()
    app: Any = make_app(Server(settings, "m"), files, paths)
    routes = [route for route in app._app.routes if route.path not in paths]
    assert len(routes) > 15

    async def main() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for route in routes:
                path = route.path.replace("{id:path}", "m")
                for method in route.methods - {"HEAD"}:
                    for headers in (
                        {},
                        {"Authorization": "Bearer wrong"},
                        {"Authorization": "Bearer sesam"},
                        {"Authorization": "Basic sesame"},
                    ):
                        answer = await client.request(method, path, headers=headers)
                        if path in OPEN_ROUTES:
                            assert answer.status_code != 401
                        else:
                            assert answer.status_code == 401, path
                            assert answer.json()["error"]["code"] == "invalid_api_key"
                    for headers in ({"Authorization": "Bearer other"}, {"X-Api-Key": "sesame"}):
                        assert (await client.request(method, path, headers=headers)).status_code != 401
                answer = await client.get(f"{path}?api_key=sesame")
                assert path in OPEN_ROUTES or answer.status_code in (401, 405)
            for path in paths:
                assert (await client.get(path)).status_code == 200

    asyncio.run(main())


def test_origins_that_are_allowed() -> None:
    app = make_app(Server(Settings(allowed_origins=("http://page",)), "m"))

    async def main() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            good = await client.get("/v1/models", headers={"Origin": "http://page"})
            assert good.headers["access-control-allow-origin"] == "http://page"
            assert "access-control-allow-credentials" not in good.headers
            bad = await client.get("/v1/models", headers={"Origin": "http://other"})
            assert "access-control-allow-origin" not in bad.headers
            preflight = await client.options("/v1/chat/completions", headers={"Origin": "http://page"})
            assert preflight.status_code == 204

    asyncio.run(main())


# ---- starting and stopping ---------------------------------------------------------------------------------


def test_loading_is_alive_but_not_ready(start: Start, tmp_path: Path) -> None:
    patch = f"""
import gristmill.api, pathlib, time
load = gristmill.api.load
def late(*arguments, **options):
    while not pathlib.Path({str(tmp_path)!r}, "go").exists():
        time.sleep(0.01)
    return load(*arguments, **options)
gristmill.api.load = late
"""
    server = start("smollm2", wait=False, patch=patch)
    assert server._found.wait(30)
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/ready").status_code == 503
    answer = httpx.post(f"{server.url}/v1/completions", json=LONG)
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    (tmp_path / "go").touch()
    while httpx.get(f"{server.url}/ready").status_code != 200:
        time.sleep(0.1)
    assert server.stop() == 0


def running_of(server: ServerProcess) -> float:
    """Sequences that run, by the metrics."""
    text = httpx.get(f"{server.url}/metrics").text
    line = next(one for one in text.splitlines() if one.startswith("gristmill:num_requests_running{"))
    return float(line.split()[-1])


def test_sigterm_loses_no_accepted_request(start: Start) -> None:
    server = start("smollm2", "-w", "int4")
    body = {**LONG, "max_tokens": 150}
    alone = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    got: list[str] = []

    def ask(stream: bool) -> None:
        answer = httpx.post(f"{server.url}/v1/completions", json={**body, "stream": stream}, timeout=60)
        if not stream:
            got.append(answer.json()["choices"][0]["text"])
            return
        lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        got.append("".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]))

    threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(6)]
    for thread in threads:
        thread.start()
    while running_of(server) < 6:
        assert all(thread.is_alive() for thread in threads)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    late = httpx.post(f"{server.url}/v1/completions", json=LONG)
    assert late.status_code == 503
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert httpx.get(f"{server.url}/health").status_code == 200
    for thread in threads:
        thread.join()
    assert server.process.wait(30) == 0
    assert got == [alone] * 6


def cut_off(server: ServerProcess, body: dict[str, Any]) -> threading.Thread:
    """Asks, and gets no answer: the connection is cut."""

    def ask() -> None:
        with pytest.raises(httpx.HTTPError):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_a_second_signal_ends_at_once(start: Start) -> None:
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        server = start("smollm2")
        thread = cut_off(server, {**LONG, "max_tokens": 8000})
        time.sleep(0.5)
        server.process.send_signal(number)
        time.sleep(0.3)
        assert server.process.poll() is None
        began = time.monotonic()
        assert server.stop(number) == code
        assert time.monotonic() - began < 1
        thread.join()


def test_sigint_ends_with_130(start: Start) -> None:
    assert start("smollm2").stop(signal.SIGINT) == 130


def test_what_cannot_be_served(server_cache: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, code, text in (
            (["no-such-model.gguf"], 1, "no-such-model"),
            ([], 2, "name a model"),
            (["smollm2", "--port", port], 1, "cannot listen"),
            (["smollm2", "--host", "0.0.0.0"], 2, "allow-no-key"),
            (["smollm2", "--kv-memory", "1"], 2, "KV memory"),
            (["smollm2", "--nonsense"], 2, "nonsense"),
        ):
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "gristmill",
                    "serve",
                    *(() if "--port" in arguments else ("--port", "0")),
                    *arguments,
                ],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
                env={"GRISTMILL_CACHE": str(server_cache), "PATH": "/usr/bin:/bin"},
            )
            lines = [line for line in done.stderr.splitlines() if "listening on http" not in line]
            assert done.returncode == code, done.stderr
            assert len(lines) == 1, (arguments, done.stderr)
            assert text in lines[0]


def test_json_logs_tell_no_texts(start: Start) -> None:
    server = start("smollm2", "--log-format", "json", "--api-key", "sesame")
    headers = {"Authorization": "Bearer sesame", "X-Request-Id": "abc"}
    body = {"prompt": "a most secret prompt", "max_tokens": 3}
    assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).status_code == 200
    assert httpx.get(f"{server.url}/metrics", headers=headers).status_code == 200
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.lines]
    assert any(line.get("request_id") == "abc" and line["status"] == 200 for line in lines)
    text = "\n".join(server.lines)
    assert "secret prompt" not in text
    assert "sesame" not in text
    assert "/metrics" not in text


# ---- an engine that fails ----------------------------------------------------------------------------------

FAULTY = """
import time
from gristmill.backends.native import NativeExecutor
step = NativeExecutor.step
def faulty(self, batch, cancel=None):
    if 666 in batch.tokens.tolist():
        {fault}
    return step(self, batch, cancel)
NativeExecutor.step = faulty
"""


def test_a_step_that_raises_fails_its_request_only(start: Start) -> None:
    server = start("smollm2", patch=FAULTY.format(fault="raise RuntimeError('injected')"))
    bad = httpx.post(f"{server.url}/v1/completions", json={"prompt": [1, 666], "max_tokens": 2}, timeout=30)
    assert bad.status_code == 500
    streamed = httpx.post(
        f"{server.url}/v1/completions", json={"prompt": [1, 666], "max_tokens": 2, "stream": True}, timeout=30
    )
    assert "injected" in streamed.text
    good = httpx.post(f"{server.url}/v1/completions", json={"prompt": [1, 2], "max_tokens": 2}, timeout=30)
    assert good.status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.stop() == 0


def test_an_engine_that_hangs_shows_within_two_seconds_and_ends_the_server(start: Start) -> None:
    server = start("smollm2", "--engine-timeout", "2", patch=FAULTY.format(fault="time.sleep(1000)"))
    thread = cut_off(server, {"prompt": [1, 666], "max_tokens": 2})
    time.sleep(0.3)
    began = time.monotonic()
    while httpx.get(f"{server.url}/ready").status_code == 200:
        assert time.monotonic() - began < 2.5
        time.sleep(0.1)
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert server.process.wait(20) == 1
    thread.join()


def test_an_engine_that_dies_ends_the_server(start: Start) -> None:
    server = start("smollm2", patch=FAULTY.format(fault="raise SystemExit"))
    answer = httpx.post(
        f"{server.url}/v1/completions", json={"prompt": [1, 666], "max_tokens": 2}, timeout=30
    )
    assert answer.status_code == 503
    assert httpx.get(f"{server.url}/health").status_code == 503
    assert server.process.wait(20) == 1


# ---- readers that do not read ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient(server_cache: Path) -> Iterator[ServerProcess]:
    made = ServerProcess(
        "smollm2", "-w", "int4", "--write-timeout", "1", "--header-timeout", "1", cache=server_cache
    )
    yield made
    assert made.stop() == 0


def test_a_reader_that_never_reads_is_given_up(impatient: ServerProcess) -> None:
    parts = urlsplit(impatient.url)
    fields = {"max_tokens": 8000, "ignore_eos": True, "stream": True, "n": 16}
    scores = {"logprobs": True, "top_logprobs": 20}  # many bytes
    messages = [{"role": "user", "content": "Once"}]
    body = json.dumps({"messages": messages, **fields, **scores}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((parts.hostname, parts.port))
        connection.sendall(head.encode() + body)
        began = time.monotonic()
        for running in (True, False):
            while running is (running_of(impatient) == 0):
                assert time.monotonic() - began < 60
                time.sleep(0.1)


def test_headers_that_dribble_are_cut_off(impatient: ServerProcess) -> None:
    parts = urlsplit(impatient.url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        began = time.monotonic()
        connection.settimeout(0.2)
        data = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: "
        closed = False
        while time.monotonic() - began < 5 and not closed:
            try:
                connection.send(data[:1] or b"y")
                data = data[1:]
                closed = connection.recv(1000) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                closed = True
        assert closed
        assert time.monotonic() - began < 3


def test_the_queue_is_bounded(start: Start) -> None:
    server = start("smollm2", "--max-queue", "2", "--max-num-seqs", "2")
    statuses: list[int] = []
    retries: list[str] = []

    def ask() -> None:
        answer = httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 60}, timeout=60)
        statuses.append(answer.status_code)
        if answer.status_code == 429:
            retries.append(answer.headers["retry-after"])

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 4
    assert all(int(one) >= 1 for one in retries)
    assert server.stop() == 0


def test_a_request_may_take_so_long_only(start: Start) -> None:
    server = start("smollm2", "--request-timeout", "0.5")
    answer = httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 8000}, timeout=30)
    assert answer.status_code == 408
    streamed = httpx.post(
        f"{server.url}/v1/completions", json={**LONG, "max_tokens": 8000, "stream": True}, timeout=30
    )
    assert streamed.status_code == 200
    assert '"code": "timeout"' in streamed.text
    assert streamed.text.rstrip().endswith("data: [DONE]")
    assert server.stop() == 0
