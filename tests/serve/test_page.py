"""The page at `/`, in a headless Chromium against a server whose answers are scripted by what is asked.

The browser tests are skipped where no Chromium is found: Debian's package is `chromium`; `playwright install
chromium` brings one too, and GRISTMILL_CHROMIUM names any other.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from gristmill.serve.page_files import page as page_files

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

HOSTILE = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>\n\n'
    "![x](http://evil.test/pixel.png) [click](javascript:window.hacked=3) "
    '[really](https://example.org/a"onclick="x) `<b>` **<i>bold</i>**\n\n'
    "```html\n<script>window.hacked=4</script>\n```\n\n| <u>a</u> | b |\n|---|---|\n| <s>1</s> | 2 |"
)
WORDS = [f"word{i} " for i in range(400)]


class FakeServer:
    """An OpenAI-compatible server with the page; the last message says how it answers."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.polls = 0
        self.disconnected = threading.Event()
        self.key: str | None = None
        self.failures = 0
        files, paths = page_files()
        self.paths = paths
        app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/ready", lambda _: JSONResponse({"status": "ready"})),
                Route("/metrics", self._metrics),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Mount("/", files),
            ]
        )
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "an API key is needed", "code": "invalid_api_key"}}, 401)

    async def _models(self, request: Request) -> Response:
        return self._refused(request) or JSONResponse({"object": "list", "data": [{"id": "fake-model"}]})

    async def _metrics(self, request: Request) -> Response:
        self.polls += 1
        return self._refused(request) or PlainTextResponse(
            "# TYPE gristmill:kv_cache_usage_perc gauge\n"
            'gristmill:kv_cache_usage_perc{model_name="fake } model"} 0.25\n'
            'gristmill:num_requests_running{model_name="fake } model"} 3.0\n'
            'gristmill:num_requests_waiting{model_name="fake } model"} 7.0\n'
            "gristmill:num_requests_waiting_more 100.0\n"
        )

    async def _chat(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        body = await request.json()
        self.requests.append(body)
        asked = body["messages"][-1]["content"]
        if asked == "fail" and self.failures:
            self.failures -= 1
            error = {"message": "the queue is <b>full</b>", "type": "rate_limit_error"}
            return JSONResponse({"error": error}, 429, {"retry-after": "4"})
        return StreamingResponse(self._events(asked), media_type="text/event-stream")

    async def _events(self, asked: str) -> AsyncIterator[bytes]:
        pieces: list[dict[str, Any]] = [{"content": "Good, "}, {"content": "it works."}]
        pause = 0.01
        if asked == "slow":
            pieces, pause = [{"content": word} for word in WORDS], 0.05
        elif asked == "long":
            pieces, pause = [{"content": f"line {i}\n\n"} for i in range(100)], 0
        elif asked == "hostile":
            pieces, pause = [{"content": HOSTILE[i : i + 7]} for i in range(0, len(HOSTILE), 7)], 0
        elif asked == "think":
            pieces = [{"reasoning_content": "Let me "}, {"reasoning_content": "see."}, {"content": "Yes."}]
        count = 0

        def event(choices: list[dict[str, Any]]) -> bytes:
            usage = {"prompt_tokens": 9, "completion_tokens": count, "total_tokens": 9 + count}
            return f"data: {json.dumps({'id': 'c', 'choices': choices, 'usage': usage})}\r\n\r\n".encode()

        try:
            yield b": a comment\n\n" + event([{"index": 0, "delta": {"role": "assistant", "content": ""}}])
            for piece in pieces:
                await asyncio.sleep(pause)
                count += 1
                yield event([{"index": 0, "delta": piece, "finish_reason": None}])
                if asked == "break" and count == 1:
                    yield b'data: {"error": {"message": "the engine has failed"}}\n\n'
                    yield b"data: [DONE]\n\n"
                    return
                if asked == "cut" and count == 1:
                    return
            yield event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
            yield event([])
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.disconnected.set()
            raise


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.stop()


# ---- the files ---------------------------------------------------------------------------------------------


def test_files_and_headers(fake: FakeServer) -> None:
    assert "/" in fake.paths
    texts = {}
    for path in fake.paths:
        response = httpx.get(fake.url + path)
        assert response.status_code == 200, path
        texts[path] = response.text
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy or "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        again = httpx.get(fake.url + path, headers={"if-none-match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        head = httpx.head(fake.url + path)
        assert (head.status_code, head.content) == (200, b"")
        posted = httpx.post(fake.url + path)
        assert (posted.status_code, posted.headers["allow"]) == (405, "GET, HEAD")
    assert httpx.get(f"{fake.url}/page/../page_files.py").status_code == 404
    assert httpx.get(f"{fake.url}/page/").status_code == 404
    # Everything that is referred to is there, and nothing of another host is.
    used = set(re.findall(r'(?:src|href)="(page/[^"]+)"', texts["/"]))
    for path, text in texts.items():
        used |= {f"page/{name}" for name in re.findall(r'from "\./([^"]+)"', text)}
        own = text.replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(r"(?:https?:)?//[a-z][\w-]*\.[a-z]+", own), path
        assert "innerHTML" not in text
        assert "insertAdjacentHTML" not in text
    assert {f"/{one}" for one in used} | {"/"} == set(fake.paths)


# ---- in a browser ------------------------------------------------------------------------------------------


def chromium_path(own: str) -> str | None:
    """A Chromium of this machine. own: where Playwright would have put one."""
    given = os.environ.get("GRISTMILL_CHROMIUM")
    if given:
        return given
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
    return next(filter(None, map(shutil.which, names)), own if Path(own).exists() else None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        path = chromium_path(playwright.chromium.executable_path)
        if path is None:
            pytest.skip("no Chromium: install Debian's `chromium`, or name one in GRISTMILL_CHROMIUM")
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=path, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any, fake: FakeServer) -> Iterator[Callable[..., Any]]:
    """Opens pages; afterwards nothing may have gone wrong in them, nor gone to another host."""
    contexts: list[Any] = []
    hosts: set[str] = set()
    wrong: list[str] = []

    def run(**options: Any) -> Any:
        options = {"viewport": {"width": 1280, "height": 800}, **options}
        context = browser.new_context(**options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        made = context.new_page()
        made.on("request", lambda one: hosts.add(re.sub(r"(?<=[^/])/(?!/).*", "", one.url)))
        made.on("pageerror", lambda one: wrong.append(str(one)))
        # Chromium logs every answer above 399 itself.
        made.on(
            "console",
            lambda one: (
                wrong.append(one.text)
                if one.type in ("error", "warning") and "Failed to load resource" not in one.text
                else None
            ),
        )
        made.goto(fake.url)
        if not fake.key:
            expect(made.locator("#model")).to_have_text("fake-model")
        return made

    yield run
    for context in contexts:
        context.close()
    assert wrong == []
    assert hosts == {fake.url}


def ask(page: Any, text: str) -> None:
    """By keyboard: the field has the focus from the start."""
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def answer(page: Any) -> Any:
    return page.locator("article.assistant").last


def done(page: Any) -> None:
    expect(page.locator("#send")).to_be_visible()
    expect(answer(page)).to_have_attribute("aria-busy", "false")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_answer_streams_is_stopped_and_outlives_a_reload(open_page: Any, fake: FakeServer) -> None:
    page = open_page()
    expect(page.locator("#model")).to_have_text("fake-model")
    ask(page, "slow")
    expect(answer(page)).to_contain_text("word2")
    first = len(answer(page).locator(".body").inner_text())
    expect(answer(page)).to_contain_text("word9")
    assert len(answer(page).locator(".body").inner_text()) > first
    expect(answer(page).locator(".stats")).to_have_text(
        re.compile(r"^\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s · prompt 9$")
    )
    expect(page.locator("#status")).to_have_text("The answer is being written.")
    assert not fake.disconnected.is_set()
    page.keyboard.press("Escape")
    wait_until(fake.disconnected.is_set)
    done(page)
    expect(answer(page)).to_contain_text("stopped")
    kept = answer(page).locator(".body").inner_text()
    assert "word9" in kept
    assert "word399" not in kept
    page.reload()
    expect(page.locator("article.user .body")).to_have_text("slow")
    assert answer(page).locator(".body").inner_text() == kept
    # It goes on from there, with the text so far.
    ask(page, "more")
    done(page)
    expect(answer(page).locator(".body")).to_have_text("Good, it works.")
    roles = [one["role"] for one in fake.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert fake.requests[-1]["messages"][1]["content"].strip() == kept.strip()


def test_the_stop_button_and_a_reload_in_the_middle(open_page: Any, fake: FakeServer) -> None:
    page = open_page()
    ask(page, "slow")
    expect(answer(page)).to_contain_text("word3")
    page.keyboard.press("Tab")
    expect(page.locator("#stop")).to_be_focused()
    page.keyboard.press("Space")
    wait_until(fake.disconnected.is_set)
    done(page)
    expect(page.locator("#input")).to_be_focused()
    fake.disconnected.clear()
    ask(page, "slow")
    expect(answer(page)).to_contain_text("word3")
    page.reload()
    wait_until(fake.disconnected.is_set)
    expect(page.locator("article.user")).to_have_count(2)
    expect(answer(page)).to_contain_text("word3")
    expect(answer(page).locator(".stats")).to_contain_text("stopped")
    expect(answer(page).locator(".error")).to_be_hidden()


def test_shift_enter_makes_a_line_and_blank_is_not_sent(open_page: Any, fake: FakeServer) -> None:
    page = open_page()
    page.keyboard.press("Enter")
    page.keyboard.type("  ")
    page.keyboard.press("Enter")
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    page.keyboard.press("Enter")
    done(page)
    assert [one["messages"][-1]["content"] for one in fake.requests] == ["  a\nb"]


def test_an_error_is_shown_in_line_and_tried_again(open_page: Any, fake: FakeServer) -> None:
    fake.failures = 1
    page = open_page()
    ask(page, "fail")
    error = answer(page).locator(".error")
    expect(error).to_contain_text("the queue is <b>full</b>. The server says to wait 4 s.")
    expect(page.locator("#status")).to_contain_text("the queue is")
    page.reload()
    expect(error).to_contain_text("the queue is")
    error.get_by_role("button", name="Try again").press("Enter")
    expect(answer(page).locator(".body")).to_have_text("Good, it works.")
    expect(page.locator("article")).to_have_count(2)
    assert fake.requests[0]["messages"] == fake.requests[1]["messages"]


@pytest.mark.parametrize(
    ("asked", "shown"), [("break", "the engine has failed"), ("cut", "The answer ended early.")]
)
def test_an_answer_that_breaks_off_keeps_its_text(open_page: Any, asked: str, shown: str) -> None:
    page = open_page()
    ask(page, asked)
    expect(answer(page).locator(".error p")).to_have_text(shown)
    expect(answer(page).locator(".body")).to_have_text("Good,")


def test_an_unreachable_server_is_said(open_page: Any, fake: FakeServer) -> None:
    page = open_page()
    fake.stop()
    ask(page, "hello")
    expect(answer(page).locator(".error p")).to_have_text("The server cannot be reached.")
    expect(page.locator("#server-state")).to_have_text("Unreachable")


def test_a_hostile_answer_is_text(open_page: Any) -> None:
    page = open_page()
    ask(page, "hostile")
    done(page)
    body = answer(page).locator(".body")
    expect(body).to_contain_text('<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>')
    expect(body).to_contain_text("[click](javascript:window.hacked=3)")
    expect(body.locator("pre")).to_have_text("<script>window.hacked=4</script>")
    expect(body.locator("td").first).to_have_text("<s>1</s>")
    assert body.locator("img, script, i, b, u, s").count() == 0
    assert page.evaluate("window.hacked") is None
    links = body.locator("a")
    expect(links).to_have_count(1)
    assert links.get_attribute("href") == 'https://example.org/a"onclick="x'
    assert links.get_attribute("onclick") is None
    assert links.get_attribute("rel") == "noopener noreferrer"
    page.reload()
    expect(body).to_contain_text("onerror")
    assert page.evaluate("window.hacked") is None


def test_hostile_text_of_ones_own_and_in_the_chat_list(open_page: Any) -> None:
    page = open_page()
    ask(page, "<img src=x onerror='window.hacked=1'>")
    done(page)
    expect(page.locator("article.user .body")).to_have_text("<img src=x onerror='window.hacked=1'>")
    expect(page.locator(".chat-name")).to_have_text("<img src=x onerror='window.hacked=1'>")
    assert page.evaluate("window.hacked") is None


def test_a_key_is_asked_for_and_kept_for_the_tab_only(open_page: Any, fake: FakeServer) -> None:
    fake.key = "sesame"
    page = open_page()
    expect(page.locator("#key")).to_be_focused()
    expect(page.locator("#key-text")).to_contain_text("This server wants an API key.")
    polls = fake.polls
    page.wait_for_timeout(2500)
    assert fake.polls == polls  # without a key it is not asked in vain
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-text")).to_contain_text("The server does not take this API key.")
    page.locator("#input").focus()
    ask(page, "hello")
    expect(answer(page).locator(".error p")).to_have_text("an API key is needed")
    page.locator("#key").focus()
    page.keyboard.type("sesame")
    page.keyboard.press("Enter")
    # The message that was refused is asked again.
    expect(answer(page).locator(".body")).to_have_text("Good, it works.")
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#model")).to_have_text("fake-model")
    assert len(fake.requests) == 1
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    expect(page.locator("#model")).to_have_text("fake-model")


def test_settings_are_sent_kept_and_checked(open_page: Any, fake: FakeServer) -> None:
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    values = {
        "System prompt": "Be brief.",
        "Temperature": "0.7",
        "Top p": "0.9",
        "Top k": "40",
        "Min p": "0.05",
        "Repetition penalty": "1.1",
        "Presence penalty": "-0.5",
        "Frequency penalty": "0.25",
        "Most tokens": "64",
        "Seed": "12",
        "Stop texts": "END\n\\n\\n",
    }
    for label, value in values.items():
        page.get_by_label(label, exact=True).fill(value)
    page.reload()
    ask(page, "hello")
    done(page)
    assert fake.requests[-1] == {
        "model": "fake-model",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "max_tokens": 64,
        "seed": 12,
        "stop": ["END", "\n\n"],
    }
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Top p", exact=True).fill("1.5")
    page.get_by_label("Top k", exact=True).fill("2.5")
    expect(page.locator("#about-top_p")).to_have_text("Must be a number from 0 to 1.")
    expect(page.locator("#about-top_k")).to_have_text("Must be a whole number from 0.")
    page.locator("#input").focus()
    ask(page, "again")
    expect(page.get_by_label("Top p", exact=True)).to_be_focused()
    assert len(fake.requests) == 1
    expect(page.locator("#input")).to_have_value("again")
    page.get_by_role("button", name="Clear all settings").click()
    page.locator("#input").focus()
    page.keyboard.press("Enter")
    done(page)
    assert set(fake.requests[-1]) == {"model", "messages", "stream", "stream_options"}


def test_reasoning_is_folded(open_page: Any, fake: FakeServer) -> None:
    page = open_page()
    ask(page, "think")
    done(page)
    expect(answer(page).locator(".body")).to_have_text("Yes.")
    thought = answer(page).locator(".reasoning-text")
    expect(thought).to_be_hidden()
    answer(page).locator("summary").press("Enter")
    expect(thought).to_have_text("Let me see.")
    page.locator("#input").focus()
    ask(page, "and")
    done(page)
    assert fake.requests[-1]["messages"][1] == {"role": "assistant", "content": "Yes."}


def test_regenerate_and_copy(open_page: Any, fake: FakeServer) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "hello")
    done(page)
    answer(page).get_by_role("button", name="Copy").press("Enter")
    expect(answer(page).get_by_text("Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "Good, it works."
    answer(page).get_by_role("button", name="Regenerate").press("Enter")
    wait_until(lambda: len(fake.requests) == 2)
    done(page)
    expect(page.locator("article")).to_have_count(2)
    assert fake.requests[0]["messages"] == fake.requests[1]["messages"]


def test_chats_are_listed_opened_deleted_and_bounded(open_page: Any, fake: FakeServer) -> None:
    page = open_page()
    ask(page, "first")
    done(page)
    page.get_by_role("button", name="New chat").press("Enter")
    expect(page.locator("article")).to_have_count(0)
    ask(page, "slow")
    expect(answer(page)).to_contain_text("word1")
    # An answer goes on while another chat is open.
    page.get_by_role("button", name="first", exact=True).click()
    expect(page.locator("article.user .body")).to_have_text("first")
    expect(page.locator("#send")).to_be_visible()
    assert not fake.disconnected.is_set()
    page.get_by_role("button", name="slow", exact=True).click()
    expect(answer(page)).to_contain_text("word9")
    page.get_by_role("button", name="Delete the chat “slow”").press("Enter")
    wait_until(fake.disconnected.is_set)
    expect(page.locator(".chat-name")).to_have_text(["first"])
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".chat-name")).to_have_text(["slow", "first"])
    page.get_by_role("button", name="Delete the chat “first”").press("Enter")
    expect(page.locator(".chat-name")).to_have_text(["slow"])
    page.evaluate("""async () => {
        const { saveChat } = await import('/page/store.js');
        const text = 'x'.repeat(100000);
        for (let i = 0; i < 60; i += 1)
            saveChat({
                id: `c${i}`, updated: i, messages: [{ role: 'user', content: i < 30 ? 'small' : text }],
            });
    }""")
    page.reload()
    names = page.locator(".chat-name")
    kept = page.evaluate("Object.keys(localStorage).filter((one) => one.startsWith('gristmill.chat.'))")
    assert names.count() == len(kept)
    # 2 million characters: nineteen of the long ones, and the newer chat of this test.
    assert {f"gristmill.chat.c{i}" for i in range(41, 60)} < set(kept)
    assert len(kept) == 20
    assert page.evaluate("JSON.stringify(localStorage).length") < 2_100_000


def test_entries_of_others_in_the_storage_do_no_harm(open_page: Any) -> None:
    page = open_page()
    page.evaluate("""() => {
        localStorage.setItem('gristmill.chat.a', '{');
        localStorage.setItem('gristmill.chat.b', '{"id": "b", "messages": [{"content": 3}]}');
        localStorage.setItem('gristmill.chat.c', 'null');
        localStorage.setItem('gristmill.settings', '[1]');
    }""")
    page.reload()
    expect(page.locator(".chat-name")).to_have_count(0)
    ask(page, "hello")
    done(page)


def test_figures_of_the_server(open_page: Any, fake: FakeServer) -> None:
    page = open_page()
    expect(page.locator("#server-state")).to_have_text("Ready")
    expect(page.locator("#kv-text")).to_have_text("25 %")
    expect(page.locator("#running")).to_have_text("3")
    expect(page.locator("#waiting")).to_have_text("7")
    assert page.evaluate("document.querySelector('#kv').value") == 0.25
    polls = fake.polls
    wait_until(lambda: fake.polls >= polls + 2)


def test_focus_goes_in_reading_order_and_is_visible(open_page: Any) -> None:
    page = open_page()
    ask(page, "hello")
    done(page)
    page.locator(".skip").focus()
    seen = []
    for _ in range(12):
        label, outline = page.evaluate("""() => {
            const one = document.activeElement;
            const style = getComputedStyle(one.id === 'input' ? one.parentElement : one);
            const ring = one.id === 'input' ? style.boxShadow : style.outlineStyle;
            return [one.getAttribute('aria-label') || one.labels?.[0]?.textContent || one.textContent, ring];
        }""")
        seen.append(label)
        assert outline != "none", label
        if label == "Send":
            break
        page.keyboard.press("Tab")
    assert seen == [
        "Skip to the message field",
        "New chat",
        "hello",
        "Delete the chat “hello”",
        "Settings",
        "Copy",
        "Copy",
        "Regenerate",
        "Message",
        "Send",
    ]


def test_every_control_has_a_name(open_page: Any) -> None:
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    unnamed = page.evaluate("""() => [...document.querySelectorAll('button, input, textarea, meter')]
        .filter((one) => !(one.textContent.trim() || one.labels?.length || one.getAttribute('aria-label')))
        .map((one) => one.outerHTML)""")
    assert unnamed == []


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_window(open_page: Any, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 640})
    ask(page, "hostile")
    done(page)
    page.locator("#input").focus()
    ask(page, "w" * 300)
    done(page)
    wide = """() => [...document.querySelectorAll('body *')]
        .filter((one) => one.clientWidth && one.getBoundingClientRect().right > innerWidth + 1)
        .filter((one) => !one.closest('pre, .table, .hidden, .skip'))
        .map((one) => one.tagName + one.className)"""
    assert page.evaluate(wide) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#settings")).to_be_visible()
    assert page.evaluate(wide) == []
    page.locator("#system").focus()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    if width < 900:
        expect(page.locator("#chats-panel")).to_be_hidden()
        page.get_by_role("button", name="Chats").press("Enter")
        expect(page.get_by_role("button", name="New chat")).to_be_focused()


def test_the_reader_is_taken_along_unless_away(open_page: Any) -> None:
    page = open_page(viewport={"width": 1000, "height": 500})
    ask(page, "long")
    done(page)
    near = "document.querySelector('#scroll').scrollHeight - document.querySelector('#scroll').scrollTop"
    assert page.evaluate(f"{near} - document.querySelector('#scroll').clientHeight") < 5
    page.locator("#input").focus()
    ask(page, "slow")
    expect(answer(page)).to_contain_text("word2")
    page.evaluate("document.querySelector('#scroll').scrollTop = 0")
    expect(page.locator("#to-end")).to_be_visible()
    expect(answer(page)).to_contain_text("word20")
    assert page.evaluate("document.querySelector('#scroll').scrollTop") == 0
    page.locator("#to-end").click()
    expect(page.locator("#to-end")).to_be_hidden()
    page.keyboard.press("Escape")


def test_events_are_read_wherever_they_are_cut(open_page: Any) -> None:
    page = open_page()
    text = "data: one\n\n: no\n\ndata:two\r\ndata: 2\r\n\r\nid: 3\rdata: é\r\r\n"
    text += "event: x\n\ndata: five\n\ndata: half"
    found = page.evaluate(
        """async (text) => {
        const { EventParser } = await import('/page/events.js');
        const all = [];
        for (let first = 0; first <= text.length; first += 1)
            for (let second = first; second <= text.length; second += 1) {
                const parser = new EventParser();
                const pieces = [text.slice(0, first), text.slice(first, second), text.slice(second)];
                all.push(JSON.stringify(pieces.flatMap((piece) => parser.push(piece))));
            }
        return [...new Set(all)];
    }""",
        text,
    )
    assert [json.loads(one) for one in found] == [["one", "two\n2", "é", "five"]]


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a **b *c* d** `e*` \\*f\\*", "<p>a <strong>b <em>c</em> d</strong> <code>e*</code> *f*</p>"),
        ("2 * 3 * 4 and ** no **", "<p>2 * 3 * 4 and ** no **</p>"),
        ("snake_case_name ***x***", "<p>snake_case_name <em><strong>x</strong></em></p>"),
        ("``a`b`` `open", "<p><code>a`b</code> `open</p>"),
        ("# One\ntext\n---", "<h3>One</h3><p>text</p><hr>"),
        ("- a\n- b\n  1. c\n\n- d", '<ul><li>a</li><li>b<ol start="1"><li>c</li></ol></li><li>d</li></ul>'),
        ("- a\n\n1. x\n2. y", '<ul><li>a</li></ul><ol start="1"><li>x</li><li>y</li></ol>'),
        ("3. x\n   more\n4. y", '<ol start="3"><li>x\nmore</li><li>y</li></ol>'),
        ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
        (
            "| a | b\\|c |\n|:--|--:|\n| 1 | 2 |",
            '<div class="table" tabindex="0"><table><thead><tr><th>a</th><th>b|c</th></tr></thead>'
            "<tbody><tr><td>1</td><td>2</td></tr></tbody></table></div>",
        ),
        ("a | b\nc", "<p>a | b\nc</p>"),
    ],
)
def test_markdown(open_page: Any, text: str, html: str) -> None:
    page = open_page()
    shown = """async ([text, step]) => {
        const { Markdown } = await import('/page/markdown.js');
        const container = document.createElement('div');
        const markdown = new Markdown(container);
        for (let end = step; end < text.length; end += step) markdown.show(text.slice(0, end));
        markdown.show(text);
        return container.innerHTML;
    }"""
    assert page.evaluate(shown, [text, 1000]) == html
    assert page.evaluate(shown, [text, 1]) == html  # as it grows


def test_code_blocks(open_page: Any) -> None:
    page = open_page()
    found = page.evaluate("""async () => {
        const { Markdown } = await import('/page/markdown.js');
        const show = (text) => {
            const container = document.createElement('div');
            new Markdown(container).show(text);
            return [...container.querySelectorAll('.code')].map(
                (one) => [one.querySelector('span').textContent, one.querySelector('code').textContent]);
        };
        return [show('x\\n```python\\na = "```"\\n\\n  b\\n```\\ny'), show('~~~\\n```\\n~~~'),
            show('```c\\nopen'), show('1. x\\n   ```sh\\n   ls\\n     -l\\n   ```\\n2. y'),
            show('```not code``` here')];
    }""")
    assert found == [
        [["python", 'a = "```"\n\n  b']],
        [["code", "```"]],
        [["c", "open"]],
        [["sh", "ls\n  -l"]],
        [],
    ]


def test_degenerate_texts_do_not_hang_the_page(open_page: Any) -> None:
    page = open_page()
    lengths = page.evaluate("""async () => {
        const { Markdown } = await import('/page/markdown.js');
        const n = 100000;
        const units = ['*', '`', '~', '#', '>', '> ', '- ', '[', '[a](', '**a ', '*a', '|', '|-', '\\\\',
            '1. ', '  ', '`a``b'];
        return units.map(
            (one) => {
                const container = document.createElement('div');
                new Markdown(container).show(one.repeat(n) + 'x');
                new Markdown(container).show((one + '\\n').repeat(n / 10) + 'x');
                return container.textContent.length;
            });
    }""")
    assert all(length > 0 for length in lengths)
