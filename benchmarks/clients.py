"""Lets clients that people use talk to gristmill's server, unchanged, and tells what worked.

Each client has a virtual environment of its own, made from a pinned list the first time. Prints a table and
writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import load, servers
from harness.environments import ENVIRONMENT, HERE, Environment, Say, SetupError, ensure
from harness.files import ensure_file, path_of, variables
from harness.load import Address
from harness.remote import end_on_sigterm
from harness.revision import commit

OUT = HERE / "results" / "clients.json"
FOLDER = HERE / "clients"
KEY = "sk-clients-0123456789"
TIMEOUT_S = 600.0
LOAD_S = 20
"""Seconds of guidellm's run."""

Row = dict[str, Any]


def main() -> int:
    """Runs the command line; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", default=[], choices=sorted(CLIENTS), help="this client; may be repeated"
    )
    parser.add_argument("--weights", default="int4", help="the server's weights (default int4)")
    parser.add_argument("--json", type=Path, default=OUT, metavar="PATH", help="the result")
    arguments = parser.parse_args()
    end_on_sigterm()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.0f} s] {text}", file=sys.stderr, flush=True)

    revision = commit(HERE.parent)
    try:
        clients = asyncio.run(talk(arguments.only or list(CLIENTS), arguments.weights, say))
    except SetupError as error:
        print(f"clients: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    document = {"version": 1, "date": time.strftime("%Y-%m-%d"), **revision}
    document |= {"weights": arguments.weights, "clients": clients}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    say(f"wrote {arguments.json}")
    print("\n".join(table(document)))
    return 0 if all(check["passed"] for client in clients for check in client["checks"]) else 1


async def talk(names: list[str], weights: str, say: Say) -> list[Row]:
    """Starts a server and lets every client talk to it; a client that cannot even start has failed."""
    for name in ("openai", "litellm", "lmeval", "guidellm"):
        # They are no peers: the other scripts need not know them.
        ENVIRONMENT[f"client-{name}"] = Environment(f"clients/{name}")
    kind = servers.gristmill(weights, "--api-key", KEY)
    kind.prepare(say)
    ensure_file("smollm2/hf", say)
    for name in names:
        if environment := CLIENTS[name][0]:
            ensure(environment, say)
    server = servers.Server(kind, 2)
    address = replace(server.address, key=KEY)
    rows = []
    try:
        await server.wait_ready()
        for name in names:
            say(f"{name}")
            try:
                row = await asyncio.to_thread(CLIENTS[name][1], address)
            except (OSError, ValueError, KeyError, StopIteration, subprocess.SubprocessError) as error:
                detail = f"{type(error).__name__}: {error}"[-300:]
                row = {"version": "", "checks": [{"what": "runs", "passed": False, "detail": detail}]}
            rows.append({"client": name, **row})
            if not server.alive():
                raise SetupError(f"the server ended while {name} talked to it; its log: {server.log}")
        left = await servers.metrics(address)
        busy = left["gristmill:num_requests_running"] + left["gristmill:num_requests_waiting"]
        rows.append(
            {
                "client": "afterwards",
                "version": "",
                "checks": [{"what": "nothing runs or waits", "passed": busy == 0, "detail": f"{busy:.0f}"}],
            }
        )
    finally:
        server.close()
    return rows


def _run(environment: str, command: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A client's command with its environment's Python."""
    binaries = ensure(environment, print).parent
    return subprocess.run(
        [str(binaries / command[0]), *command[1:]],
        env={**variables(), "OPENAI_API_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True", **more},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def _url(address: Address) -> str:
    return f"http://{address.host}:{address.port}"


def _checks(environment: str, script: str) -> Callable[[Address], Row]:
    """A script of `clients/` that prints its checks as JSON."""

    def run(address: Address) -> Row:
        done = _run(environment, ["python", str(FOLDER / script), _url(address), KEY], FOLDER)
        if done.returncode:
            raise ValueError(_last(done.stderr))
        print(done.stderr, file=sys.stderr, end="")
        return dict(json.loads(done.stdout[done.stdout.index("{") :]))

    return run


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def _version(environment: str, package: str, folder: Path) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return _run(environment, ["python", "-c", code], folder).stdout.strip()


def _lmeval(address: Address) -> Row:
    """Loglikelihoods of our own task, with the server's tokenizer, and with prompts in batches."""
    checks = []
    accuracies = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task = (FOLDER / "opposites.yaml").read_text().replace("@FOLDER@", str(FOLDER))
        (folder / "gristmill_opposites.yaml").write_text(task)
        for label, batch in (("one at a time", "1"), ("batches of 4", "4")):
            settings = {
                "model": address.model,
                "base_url": f"{_url(address)}/v1/completions",
                "tokenizer_backend": "remote",
                "auth_token": KEY,
                "max_length": "2048",
            }
            done = _run(
                "client-lmeval",
                [
                    *("python", "-m", "lm_eval", "--model", "local-completions", "--model_args"),
                    ",".join(f"{key}={value}" for key, value in settings.items()),
                    *("--batch_size", batch, "--tasks", "gristmill_opposites", "--include_path", str(folder)),
                    *("--output_path", str(folder / label.replace(" ", "-"))),
                ],
                folder,
                HF_HOME=str(folder / "hf"),
                HF_DATASETS_OFFLINE="1",
            )
            found = list((folder / label.replace(" ", "-")).rglob("results*.json"))
            accuracy = None
            if found:
                accuracy = json.loads(found[0].read_text())["results"]["gristmill_opposites"]["acc,none"]
                accuracies.append(accuracy)
            checks.append(
                {
                    "what": f"local-completions, echo and logprobs, {label}",
                    # Chance is one half; a server whose logprobs are shifted by a token is near it.
                    "passed": accuracy is not None and accuracy >= 0.75,
                    "detail": _last(done.stderr)[:300] if accuracy is None else f"accuracy {accuracy:.2f}",
                }
            )
        same = len(accuracies) == 2 and accuracies[0] == accuracies[1]
        checks.append({"what": "the same in batches", "passed": same, "detail": str(accuracies)})
        return {"version": _version("client-lmeval", "lm_eval", folder), "checks": checks}


def _guidellm(address: Address) -> Row:
    """A run of some seconds; no request may fail."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = folder / "report.json"
        done = _run(
            "client-guidellm",
            [
                *("guidellm", "run", "--disable-console-interactive"),
                *("--backend", f"kind=openai_http,target={_url(address)},api_key={KEY}"),
                *("--profile", "kind=concurrent,streams=4"),
                *("--constraint", f"kind=max_duration,seconds={LOAD_S}"),
                *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=32"),
                *("--tokenizer", f"kind=huggingface_auto,model={path_of('smollm2/hf')}"),
                *("--output", f"kind=json,path={out}"),
            ],
            folder,
        )
        version = _version("client-guidellm", "guidellm", folder)
        what = f"4 streams for {LOAD_S} s"
        if not out.exists():
            detail = _last(done.stderr or done.stdout)[:300]
            return {"version": version, "checks": [{"what": what, "passed": False, "detail": detail}]}
        totals = json.loads(out.read_text())["benchmarks"][0]["metrics"]["request_totals"]
        passed = totals["successful"] > 0 and totals["errored"] == 0
        detail = f"{totals['successful']} answered, {totals['errored']} failed"
        return {"version": version, "checks": [{"what": what, "passed": passed, "detail": detail}]}


def _webui(address: Address) -> Row:
    """Requests of the shapes that Open WebUI sends."""

    async def ask(path: str, body: Row | None = None) -> tuple[int, Any]:
        method = "GET" if body is None else "POST"
        async with load.request(address, method, path, body) as response:
            return response.status, json.loads(await response.body())

    def title(text: str) -> Row:
        return {
            "model": address.model,
            "messages": [{"role": "user", "content": text}],
            "stream": False,
            "max_completion_tokens": 24,
            "metadata": {"task": "title_generation", "chat_id": "1"},
        }

    async def doubled() -> str:
        seen = []
        for path in ("/v1/models", "/v1//models", "//v1/models", "/v1/models/"):
            status, body = await ask(path)
            if status != 200 or body["object"] != "list" or not body["data"][0]["id"]:
                raise ValueError(f"{path} said {status}")
            seen.append(path)
        status, _ = await ask("/v1//chat/completions", title("Name a color."))
        if status != 200:
            raise ValueError(f"/v1//chat/completions said {status}")
        return f"{len(seen)} spellings"

    async def parallel() -> str:
        body = {
            "model": address.model,
            "messages": [
                {"role": "system", "content": "You are helpful."},
                {"role": "user", "content": [{"type": "text", "text": "What is a mill?"}]},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 64,
        }

        async def chat() -> int:
            count, done = 0, False
            async with load.request(address, "POST", "/v1/chat/completions", body) as response:
                async for data in response.events():
                    done = data == b"[DONE]"
                    count += not done
            if response.status != 200 or not done:
                raise ValueError(f"the chat was answered {response.status}, whole: {done}")
            return count

        events, *others = await asyncio.gather(
            chat(),
            *(ask("/v1/chat/completions", title(f"Give {what} for: mills")) for what in ("a title", "tags")),
            ask("/v1/chat/completions", title("Suggest a question.")),
        )
        if any(status != 200 for status, _ in others):
            raise ValueError(f"a task was answered {[status for status, _ in others]}")
        return f"{events} events beside {len(others)} tasks"

    checks = []
    for what, check in (("slashes, GET /models", doubled), ("chat with title and tags", parallel)):
        try:
            checks.append({"what": what, "passed": True, "detail": asyncio.run(check())})
        except (load.HttpError, OSError, ValueError, KeyError) as error:
            checks.append({"what": what, "passed": False, "detail": f"{type(error).__name__}: {error}"[:300]})
    return {"version": "request shapes", "checks": checks}


CLIENTS: dict[str, tuple[str, Callable[[Address], Row]]] = {
    "openai": ("client-openai", _checks("client-openai", "openai_checks.py")),
    "litellm": ("client-litellm", _checks("client-litellm", "litellm_checks.py")),
    "lm-eval": ("client-lmeval", _lmeval),
    "guidellm": ("client-guidellm", _guidellm),
    "Open WebUI": ("", _webui),
}
"""Environment and conversation of every client."""


def table(document: Row) -> list[str]:
    """What was done with which client, as a Markdown table."""
    lines = ["| client | version | what | | |", "| --- | --- | --- | --- | --- |"]
    for client in document["clients"]:
        for check in client["checks"]:
            word = "passed" if check["passed"] else "**failed**"
            detail = check["detail"].replace("|", "\\|").replace("\n", " ")[:100]
            lines.append(
                f"| {client['client']} | {client['version']} | {check['what']} | {word} | {detail} |"
            )
    return lines


if __name__ == "__main__":
    sys.exit(main())
