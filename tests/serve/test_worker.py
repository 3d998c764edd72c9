"""Helper processes when things go wrong; tests/serve/test_text.py has what they answer."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gristmill.engine.request import QueueFull
from gristmill.errors import GristmillError, TemplateError, UsageError
from gristmill.io.convert import prepare
from gristmill.serve import worker
from gristmill.serve.constraints import ConstraintSpec
from gristmill.serve.worker import HelperPool, Rendered

MESSAGES = [{"role": "user", "content": "Hello, helper."}]
SLOW = "{% for i in range(1000) %}" * 3 + "{% endfor %}" * 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRISTMILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield prepare("smollm2", "stored", None)


def with_template(directory: Path, target: Path, template: str) -> Path:
    """The model's tokenizer with another chat template."""
    target.mkdir()
    for path in directory.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, target / path.name)
    (target / "chat_template.jinja").write_text(template)
    return target


def with_pool(directory: Path, use: Callable[[HelperPool], Awaitable[None]], workers: int = 1) -> None:
    async def main() -> None:
        pool = HelperPool(directory, 49152, workers)
        await pool.start()
        try:
            await use(pool)
        finally:
            await pool.close()

    asyncio.run(main())


def pid(pool: HelperPool, number: int = 0) -> int:
    process = pool._helpers[number]._process
    assert process is not None
    return process.pid


def ended(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize(
    "template",
    [
        SLOW,
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% set x = 'a' * 10000000000 %}{{ x }}",
        "{% for",
    ],
)
def test_hostile_templates_are_errors(directory: Path, tmp_path: Path, template: str) -> None:
    async def use(pool: HelperPool) -> None:
        before = pid(pool)
        began = time.monotonic()
        with pytest.raises(TemplateError):
            await pool.render(MESSAGES)
        assert time.monotonic() - began < worker.SECONDS["render"] + 5
        assert pid(pool) == before, "the template's own limits end it, not the helper's"
        assert await pool.tokenize("still here " * 1000)

    with_pool(with_template(directory, tmp_path / "hostile", template), use)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_end|><think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n", False),
        ("", False),
    ],
)
def test_reasoning_that_the_template_opens_is_told(
    directory: Path, tmp_path: Path, end: str, expected: bool
) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + end

    async def use(pool: HelperPool) -> None:
        for content in ("Hello.", "What does this do: <think>", "<think>\n"):
            rendered = await pool.render([{"role": "user", "content": content}])
            assert rendered.in_reasoning is expected
            assert rendered.ids

    with_pool(with_template(directory, tmp_path / "thinking", template), use)


def test_a_model_without_a_template_says_so(directory: Path, tmp_path: Path) -> None:
    target = with_template(directory, tmp_path / "none", "x")
    (target / "chat_template.jinja").unlink()
    config = json.loads((target / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (target / "tokenizer_config.json").write_text(json.dumps(config))

    async def use(pool: HelperPool) -> None:
        with pytest.raises(TemplateError, match="no chat template"):
            await pool.render(MESSAGES)

    with_pool(target, use)


def test_hostile_constraints_leave_the_helper_alone(directory: Path) -> None:
    async def use(pool: HelperPool) -> None:
        before = pid(pool)
        for spec in (
            ConstraintSpec("regex", "(.{0,1000}){0,1000}x"),
            ConstraintSpec("json_schema", '{"items":' * 7000),
            ConstraintSpec("json_schema", json.dumps({"$ref": "#"})),
            ConstraintSpec("json_schema", json.dumps({"type": "object", "nullable": True})),
        ):
            with pytest.raises(UsageError):
                await pool.check_constraint(spec)
        await pool.check_constraint(ConstraintSpec("regex", "(a+)+$"))
        assert pid(pool) == before
        assert pool.restarts == 0

    with_pool(directory, use)


def test_a_kill_costs_one_request(directory: Path) -> None:
    async def use(pool: HelperPool) -> None:
        expected = await pool.render(MESSAGES)
        os.kill(pid(pool), signal.SIGSTOP)  # holds one question back
        tasks = [asyncio.create_task(pool.render(MESSAGES)) for _ in range(20)]
        await asyncio.sleep(0.1)
        os.kill(pid(pool), signal.SIGKILL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        lost = [result for result in results if isinstance(result, BaseException)]
        assert [type(error) for error in lost] == [TemplateError]
        assert sum(result == expected for result in results) == 19
        assert pool.restarts == 1

    with_pool(directory, use)


def test_one_that_hangs_holds_up_nobody_else(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worker.SECONDS, "constraint", 1.5)

    async def use(pool: HelperPool) -> None:
        os.kill(pid(pool, 0), signal.SIGSTOP)
        hung = asyncio.create_task(pool.check_constraint(ConstraintSpec("regex", "a")))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await pool.render(MESSAGES)
        assert not hung.done()
        assert time.monotonic() - began < 1.5
        with pytest.raises(UsageError, match="too long"):
            await hung

    with_pool(directory, use, workers=2)


def test_long_texts_make_no_short_one_wait(directory: Path) -> None:
    async def use(pool: HelperPool) -> None:
        text = "the miller and the cat " * 50_000
        long = [asyncio.create_task(pool.tokenize(text)) for _ in range(3)]
        long.append(asyncio.create_task(pool.render([{"role": "user", "content": text}])))
        await asyncio.sleep(0.05)
        for _ in range(5):
            assert (await pool.render(MESSAGES)).ids
        assert not any(one.done() for one in long)
        for one in long:
            one.cancel()
        await asyncio.gather(*long, return_exceptions=True)
        # They left nothing behind that makes later ones wait.
        assert await pool.tokenize(text[:40_000]) == await pool.tokenize(text[:40_000])
        assert pool._free.qsize() == 2

    with_pool(directory, use, workers=2)


def test_one_helper_answers_short_texts_first(directory: Path) -> None:
    async def use(pool: HelperPool) -> None:
        order: list[str] = []

        async def ask(name: str, text: str) -> None:
            await pool.render([{"role": "user", "content": text}])
            order.append(name)

        text = "the miller and the cat " * 2000
        names = ["long", "later", "last", "short", "shorter"]
        await asyncio.gather(*(ask(name, name if "short" in name else text) for name in names))
        assert order == ["long", "short", "shorter", "later", "last"]

    with_pool(directory, use)


def test_cancelled_questions_are_not_answered_to_others(directory: Path) -> None:
    async def use(pool: HelperPool) -> None:
        expected = await pool.render(MESSAGES)
        other = [{"role": "user", "content": "Another question."}]
        for delay in (0.0, 0.001, 0.01):
            tasks = [asyncio.create_task(pool.render(other)) for _ in range(5)]
            await asyncio.sleep(delay)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert await pool.render(MESSAGES) == expected
        assert pool._pending == 0
        assert pool._free.qsize() == 1

    with_pool(directory, use)


def test_too_many_questions_are_refused_at_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MAX_PENDING", 8)

    async def use(pool: HelperPool) -> None:
        results = await asyncio.gather(*(pool.render(MESSAGES) for _ in range(20)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, QueueFull)]
        assert len(refused) == 12
        assert refused[0].retry_after > 0
        assert sum(isinstance(result, Rendered) for result in results) == 8
        assert await pool.render(MESSAGES)

    with_pool(directory, use)


def test_closing_leaves_no_process(directory: Path) -> None:
    async def main() -> None:
        pool = HelperPool(directory, 49152)
        await pool.start()
        first = pid(pool)
        tasks = [asyncio.create_task(pool.render(MESSAGES)) for _ in range(5)]
        await asyncio.sleep(0)
        await pool.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {GristmillError}
        assert pool._helpers[0]._process is None
        assert ended(first)
        with pytest.raises(GristmillError, match="closed"):
            await pool.render(MESSAGES)
        await pool.close()

        starting = HelperPool(directory, 49152)
        task = asyncio.create_task(starting.start())
        await asyncio.sleep(0)
        await starting.close()
        with pytest.raises(GristmillError):
            await task
        assert starting._helpers[0]._process is None

    asyncio.run(main())


def test_helpers_end_with_their_server(directory: Path) -> None:
    program = f"""
import asyncio
from pathlib import Path
from gristmill.serve.worker import HelperPool
async def main():
    pool = HelperPool(Path({str(directory)!r}), 49152, 2)
    await pool.start()
    print(*(helper._process.pid for helper in pool._helpers), flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    helpers = [int(text) for text in server.stdout.readline().split()]
    assert len(helpers) == 2
    os.kill(helpers[0], signal.SIGSTOP)  # one that cannot notice by itself
    server.kill()
    server.wait()
    server.stdout.close()
    assert within(10, lambda: all(map(ended, helpers)))


def test_helpers_are_bounded_and_light(directory: Path) -> None:
    async def use(pool: HelperPool) -> None:
        limits = Path(f"/proc/{pid(pool)}/limits").read_text()
        assert "unlimited" not in next(line for line in limits.splitlines() if line.startswith("Max address"))
        loaded = Path(f"/proc/{pid(pool)}/maps").read_text()
        assert "tokenizers" in loaded
        assert not any(name in loaded for name in ("torch", "pydantic", "gristmill/backends"))

    with_pool(directory, use)


def test_a_directory_without_a_tokenizer_is_an_error(directory: Path, tmp_path: Path) -> None:
    target = with_template(directory, tmp_path / "gone", "x")

    async def main() -> Any:
        pool = HelperPool(target, 49152)
        (target / "tokenizer.json").unlink()
        with pytest.raises(GristmillError, match="does not start"):
            await pool.start()
        await pool.close()

    asyncio.run(main())
