"""Keeps gristmill's server busy with clients that behave badly, or with ten times what it can do.

`soak` (the default): users who cancel, vanish, read slowly or send nonsense, for minutes. Memory, files,
threads and KV memory are sampled, and some answers are compared with those given before the load. `burst`:
far more requests than can be served; what is not served must be refused. Writes JSON and a plot.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from harness import load, servers
from harness.environments import HERE, Say, SetupError
from harness.load import Address, Ask, HttpError, Outcome
from harness.remote import end_on_sigterm
from harness.revision import commit

OUT = HERE / "results" / "soak.json"
PLOT = HERE.parent / "docs" / "soak.png"
SAMPLE_S = 5.0
CANARY_S = 30.0
CANARIES = 6
SETTLE_S = 300.0
"""Memory counts after this long, or after a third of a shorter run."""
IDLE_S = 90.0
SLOPE_MB_PER_HOUR = 20.0
"""More growth than this is a leak."""
WRITE_TIMEOUT_S = 10.0
"""The server's --write-timeout in a soak, so that slow readers meet it."""
KV_MIB = 512
"""Little, so that cached prefixes fill it in the first minutes and memory can be seen to stay flat."""
SEED = 28
SHARES = {"vanish": 0.10, "cancel": 0.05, "malformed": 0.01, "slow": 0.01, "whole": 0.08, "forked": 0.05}
"""How requests behave; the others stream to their end."""
MALFORMED = (
    b"{",
    b"[]",
    b'"prompt"',
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": 1e400}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "max_tokens": 9223372036854775808}',
    b'{"prompt": "a", "n": 1000000}',
    b'{"prompt": "a", "logprobs": 1000000}',
    b'{"prompt": "a", "stop": [""]}',
    b'{"prompt": [-1]}',
    b'{"prompt": [99999999]}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": 7}}}',
    b'{"prompt": "a", "guided_regex": "(("}',
    b'{"a":' * 5000,
    b"\xff\xfe",
)


def main() -> int:
    """Runs the command line; the exit status."""
    arguments = _arguments()
    end_on_sigterm()
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.0f} s] {text}", file=sys.stderr, flush=True)

    if arguments.again:
        return again(arguments.json)
    revision = commit(HERE.parent)
    try:
        section = asyncio.run((soak if arguments.mode == "soak" else burst)(arguments, say))
    except (SetupError, HttpError, OSError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    from gristmill.bench import machine

    section |= {"date": time.strftime("%Y-%m-%d"), **revision, "machine": machine()}
    path = arguments.json
    document = json.loads(path.read_text()) if path.exists() else {"version": 1}
    document[arguments.mode] = section
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    say(f"wrote {path}")
    if arguments.plot and arguments.mode == "soak":
        plot(section, PLOT)
        say(f"wrote {PLOT}")
    for check in section["checks"]:
        print(f"{'met    ' if check['met'] else 'NOT MET'} {check['what']}: {check['value']}")
    return 0 if all(check["met"] for check in section["checks"]) else 1


def again(path: Path) -> int:
    """Judges the memory of a soak that was measured before anew, and writes that into its file."""
    document = json.loads(path.read_text())
    section = document["soak"]
    of_memory = [at for at, check in enumerate(section["checks"]) if "MB/h" in check["what"]]
    section["checks"][of_memory[0] : of_memory[-1] + 1] = memory_checks(
        [Sample(**one) for one in section["samples"]]
    )
    path.write_text(json.dumps(document, indent=1) + "\n")
    for check in section["checks"]:
        print(f"{'met    ' if check['met'] else 'NOT MET'} {check['what']}: {check['value']}")
    return 0 if all(check["met"] for check in section["checks"]) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mode", choices=("soak", "burst"), default="soak")
    parser.add_argument("--minutes", type=float, default=None, help="length (default 30, of a burst 5)")
    parser.add_argument("--users", type=int, default=16, help="users of a soak (default 16)")
    parser.add_argument("--weights", default="int4", help="the server's weights (default int4)")
    parser.add_argument("--threads", type=int, default=2, help="the server's threads (default 2)")
    parser.add_argument(
        "--running",
        metavar="HOST:PORT:PID",
        help="a soak of a server that runs already, started with --write-timeout 10 (default: start one)",
    )
    parser.add_argument(
        "--again", action="store_true", help="measure nothing; judge the last soak's memory by its samples"
    )
    parser.add_argument("--json", type=Path, default=OUT, metavar="PATH", help="the result")
    parser.add_argument(
        "--plot", action=argparse.BooleanOptionalAction, default=True, help="write docs/soak.png"
    )
    return parser.parse_args()


@dataclass
class Sample:
    """The server at a moment."""

    seconds: float
    """Since the load began."""
    rss: int
    """Bytes resident in its process."""
    anonymous: int
    """Those of them that are no file's: without KV memory."""
    helpers: int
    """Private bytes of its child processes."""
    files: int
    threads: int
    kv_committed: float
    kv_live: float
    kv_cached: float
    running: float
    waiting: float


async def sample(address: Address, pid: int, seconds: float) -> Sample:
    """Looks at the server. HttpError or OSError if it does not answer."""
    values = await asyncio.wait_for(servers.metrics(address), 10)
    process = psutil.Process(pid)
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    status = {name: value.split() for name, _, value in lines}

    def metric(name: str) -> float:
        # A name that is not there is a mistake of this script or the server, not a zero.
        return values[f"gristmill:{name}"]

    return Sample(
        seconds,
        int(status["VmRSS"][0]) * 1024,
        int(status["RssAnon"][0]) * 1024,
        sum(servers.private_bytes(child.pid) for child in process.children()),
        process.num_fds(),
        process.num_threads(),
        metric("kv_committed_bytes"),
        metric("kv_live_bytes"),
        metric("kv_cached_bytes"),
        metric("num_requests_running"),
        metric("num_requests_waiting"),
    )


class Soak:
    """The clients of a soak and what they saw."""

    def __init__(self, address: Address, prompts: load.Prompts) -> None:
        self.address = address
        self.prompts = prompts
        self.random = random.Random(SEED)
        self.done: Counter[str] = Counter()
        self.faults: list[dict[str, str]] = []
        """What went wrong without the client's doing."""
        self.tokens = 0
        self.ttft: list[float] = []

    def fault(self, kind: str, what: str) -> None:
        """Notes an error; the first hundred in words."""
        self.done[f"fault: {kind}"] += 1
        if len(self.faults) < 100:
            self.faults.append({"kind": kind, "what": what[:300]})

    async def user(self, until: float) -> None:
        """Sends one request after another until the loop's time `until`."""
        loop = asyncio.get_running_loop()
        while loop.time() < until:
            draw, kind = self.random.random(), "stream"
            for name, share in SHARES.items():
                draw -= share
                if draw < 0:
                    kind = name
                    break
            (ask,) = self.prompts.take(1)
            extra: dict[str, Any] = {}
            if self.random.random() < 0.5:
                extra = {"temperature": 0.8, "top_p": 0.95, "seed": self.random.getrandbits(31)}
            try:
                async with asyncio.timeout(300):
                    await getattr(self, f"_{kind}")(ask, extra)
            except TimeoutError:
                self.fault(kind, "no end within 300 s")
            except (HttpError, OSError, ValueError, KeyError) as error:
                self.fault(kind, f"{type(error).__name__}: {error}")
            self.done[kind] += 1

    def _whole_answer(self, kind: str, outcome: Outcome) -> None:
        self.tokens += outcome.tokens
        if outcome.error:
            self.fault(kind, outcome.error)
        elif outcome.tokens != outcome.ask.tokens or outcome.finish != "length":
            self.fault(kind, f"{outcome.tokens} of {outcome.ask.tokens} tokens, ended by {outcome.finish!r}")
        else:
            self.ttft.append(outcome.ttft)

    async def _stream(self, ask: Ask, extra: dict[str, Any]) -> None:
        self._whole_answer("stream", await load.complete(self.address, ask, extra=extra))

    async def _vanish(self, ask: Ask, extra: dict[str, Any]) -> None:
        """Leaves in the middle of the stream."""
        last = self.random.randint(1, ask.tokens - 1)
        outcome = await load.complete(
            self.address, ask, extra=extra, watch=lambda one: len(one.arrivals) < last
        )
        self.tokens += outcome.tokens
        if outcome.error not in ("", "left"):
            self.fault("vanish", outcome.error)

    async def _cancel(self, ask: Ask, extra: dict[str, Any]) -> None:
        """Leaves before or soon after the answer begins."""
        work = asyncio.create_task(load.complete(self.address, ask, extra=extra))
        finished, _ = await asyncio.wait({work}, timeout=self.random.expovariate(2.0))
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        if finished and work.result().error:
            self.fault("cancel", work.result().error)

    async def _malformed(self, ask: Ask, extra: dict[str, Any]) -> None:
        raw = self.random.choice(MALFORMED)
        async with load.request(self.address, "POST", "/v1/completions", raw=raw) as response:
            body = json.loads(await response.body())
        if response.status != 400 or not body["error"]["message"]:
            self.fault("malformed", f"{raw[:60]!r} was answered {response.status}")

    async def _slow(self, ask: Ask, extra: dict[str, Any]) -> None:
        """Reads now and then, or stops. It may be cut off, but not before the server's time for that."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        # Long and with much to tell: more than the system keeps for a connection.
        payload = load.payload_of(self.address, Ask(ask.prompt, 400), extra | {"logprobs": 20})
        stops = self.random.random() < 0.5
        done = False
        try:
            async with load.request(
                self.address, "POST", "/v1/completions", payload, limit=512, receive_buffer=2048
            ) as response:
                if response.status != 200:
                    raise ValueError(f"HTTP {response.status}")
                async for data in response.events():
                    done = data == b"[DONE]"
                    await asyncio.sleep(3 * WRITE_TIMEOUT_S if stops else 0.05)
                    stops = False
        except (HttpError, OSError):
            if loop.time() - begin < WRITE_TIMEOUT_S:
                raise
        self.done["slow, to the end" if done else "slow, cut off"] += 1

    async def _whole(self, ask: Ask, extra: dict[str, Any]) -> None:
        """An answer in one piece; half of those who ask leave before it."""
        payload = load.payload_of(self.address, ask, extra) | {"stream": False}
        del payload["stream_options"]
        patience = self.random.expovariate(1.0) if self.random.random() < 0.5 else 290.0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                answer = await post(self.address, payload)
                found = answer["usage"]["completion_tokens"]
                self.tokens += found
                if found != ask.tokens:
                    self.fault("whole", f"{found} of {ask.tokens} tokens")
            return
        if patience == 290.0:
            self.fault("whole", "no answer within 290 s")

    async def _forked(self, ask: Ask, extra: dict[str, Any]) -> None:
        """Two continuations of one prompt."""
        payload = load.payload_of(self.address, ask, extra) | {"stream": False, "n": 2}
        del payload["stream_options"]
        answer = await post(self.address, payload)
        self.tokens += answer["usage"]["completion_tokens"]
        if [choice["index"] for choice in answer["choices"]] != [0, 1]:
            self.fault("forked", f"{len(answer['choices'])} choices")
        if answer["usage"]["completion_tokens"] != 2 * ask.tokens:
            self.fault("forked", f"{answer['usage']['completion_tokens']} of {2 * ask.tokens} tokens")


async def post(address: Address, payload: dict[str, Any]) -> Any:
    """The JSON that answers a completion. HttpError unless the status is 200."""
    async with load.request(address, "POST", "/v1/completions", payload) as response:
        body = await response.body()
        if response.status != 200:
            raise HttpError(f"HTTP {response.status}: {body[:200].decode('utf-8', 'replace')}")
        return json.loads(body)


def canary(address: Address, ask: Ask) -> dict[str, Any]:
    """A greedy request whose answer tells every log probability."""
    payload = load.payload_of(address, ask, {"stream": False, "logprobs": 2})
    del payload["stream_options"]
    return payload


async def soak(arguments: argparse.Namespace, say: Say) -> dict[str, Any]:
    """A soak: its section of the JSON."""
    minutes = 30.0 if arguments.minutes is None else arguments.minutes
    server: servers.Server | None = None
    if arguments.running:
        host, port, process = arguments.running.rsplit(":", 2)
        models = await servers.get_json(Address(host, int(port)), "/v1/models")
        address, pid = Address(host, int(port), models["data"][0]["id"]), int(process)
    else:
        kind = servers.gristmill(
            arguments.weights, "--write-timeout", f"{WRITE_TIMEOUT_S:g}", "--kv-memory", str(KV_MIB)
        )
        kind.prepare(say)
        server = servers.Server(kind, arguments.threads)
        address, pid = server.address, server.pid
    try:
        if server is not None:
            await server.wait_ready()
        section = await _soaked(arguments, address, pid, minutes * 60, say)
        if server is not None:
            status: int | None
            try:
                status = server.terminate()
            except subprocess.TimeoutExpired:
                status = None
            section["checks"].append(_check("exit status after SIGTERM", status, status == 0))
        return section
    finally:
        if server is not None:
            server.close()


async def _soaked(
    arguments: argparse.Namespace, address: Address, pid: int, seconds: float, say: Say
) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    prompts = load.Prompts(load.demo_ids(), SEED)
    canaries = [canary(address, ask) for ask in prompts.take(CANARIES)]
    expected = [(await post(address, payload))["choices"] for payload in canaries]
    before = await sample(address, pid, 0.0)
    say(f"{arguments.users} users for {seconds / 60:g} minutes")
    began = loop.time()
    until = began + seconds
    clients = Soak(address, prompts)
    samples: list[Sample] = []
    compared: list[bool] = []

    async def every(period: float, work: Any) -> None:
        due = loop.time() + period
        while due < until:
            await asyncio.sleep(due - loop.time())
            due += period
            try:
                async with asyncio.timeout(120):
                    await work()
            except (HttpError, OSError, KeyError, ValueError, TimeoutError, psutil.Error) as error:
                clients.fault("watch", f"{type(error).__name__}: {error}")

    async def look() -> None:
        samples.append(await sample(address, pid, loop.time() - began))
        async with asyncio.timeout(5), load.request(address, "GET", "/health") as response:
            if response.status != 200:
                clients.fault("watch", f"/health said {response.status}")
        if len(samples) % 12 == 0:
            one = samples[-1]
            say(
                f"RSS {one.rss >> 20} MiB, {one.files} files, {one.threads} threads, KV "
                f"{int(one.kv_committed) >> 20} MiB, {one.running:.0f} run, {one.waiting:.0f} wait, "
                f"{clients.tokens} tokens, {len(clients.faults)} faults"
            )

    async def compare() -> None:
        which = len(compared) % CANARIES
        found = (await post(address, canaries[which]))["choices"]
        compared.append(found == expected[which])
        if not compared[-1]:
            clients.fault("canary", f"canary {which} was answered otherwise than before the load")

    await asyncio.gather(
        *(clients.user(until) for _ in range(arguments.users)),
        every(SAMPLE_S, look),
        every(CANARY_S, compare),
    )
    loaded = loop.time() - began
    idle: float | None = None
    while loop.time() < began + loaded + IDLE_S:
        last = await sample(address, pid, loop.time() - began)
        if last.running == last.waiting == last.kv_live == 0:
            idle = last.seconds - loaded
            break
        await asyncio.sleep(0.1)
    for payload, answer in zip(canaries, expected, strict=True):
        compared.append((await post(address, payload))["choices"] == answer)
    await asyncio.sleep(3)
    after = await sample(address, pid, loop.time() - began)
    slope, error = slope_mb_per_hour(samples, lambda one: one.rss)
    faults = sum(count for name, count in clients.done.items() if name.startswith("fault"))
    checks = [
        _check("errors that the client did not cause", faults, faults == 0),
        _check("answers unlike those before the load", compared.count(False), all(compared)),
        _check("canaries compared", len(compared), len(compared) > CANARIES),
        _check("seconds until nothing ran, waited or held KV memory", idle, idle is not None),
        _check("KV bytes held by sequences at the end", after.kv_live, after.kv_live == 0),
        _check(
            "KV bytes committed beyond cached prefixes",
            after.kv_committed - after.kv_cached,
            after.kv_committed <= after.kv_cached,
        ),
        *memory_checks(samples),
        _check("files more than before", after.files - before.files, after.files - before.files <= 2),
        _check(
            "threads more than before", after.threads - before.threads, after.threads <= before.threads + 2
        ),
    ]
    return {
        "users": arguments.users,
        "minutes": seconds / 60,
        "weights": arguments.weights,
        "shares": SHARES,
        "requests": dict(clients.done),
        "faults": clients.faults,
        "tokens": clients.tokens,
        "tokens_per_s": clients.tokens / loaded,
        "ttft_ms_p50": _percentile(clients.ttft, 50),
        "ttft_ms_p99": _percentile(clients.ttft, 99),
        "canaries": len(compared),
        "rss_slope_mb_per_hour": slope,
        "rss_slope_error": error,
        "before": asdict(before),
        "after": asdict(after),
        "samples": [asdict(one) for one in samples],
        "checks": checks,
    }


_MEMORY: dict[str, Callable[[Sample], float]] = {
    "RSS": lambda one: one.rss,
    "RSS without KV memory of running sequences": lambda one: one.rss - one.kv_live,
    "memory of no file, without KV memory": lambda one: one.anonymous,
}
"""What must not grow. RSS goes up and down with the lengths of the sequences that happen to run."""


def memory_checks(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Whether memory stays as it is. The bound must hold for what a slope may be: noise is not flatness."""
    checks = []
    for what, size in _MEMORY.items():
        slope, error = slope_mb_per_hour(samples, size)
        known = slope is not None and error is not None
        checks.append(
            _check(
                f"{what}: MB/h, with twice the error at most {SLOPE_MB_PER_HOUR:g}",
                f"{slope:.2f} ± {error:.2f}" if known else None,
                known and slope + 2 * error <= SLOPE_MB_PER_HOUR,
            )
        )
    return checks


def slope_mb_per_hour(
    samples: Sequence[Sample], size: Callable[[Sample], float]
) -> tuple[float | None, float | None]:
    """Growth of a number of bytes once settled, and its standard error in MB/h; None for too few samples.

    Fitted to the means of a minute, whose errors depend on one another less than those of single samples.
    """
    if not samples:
        return None, None
    settle = min(SETTLE_S, samples[-1].seconds / 3)
    minutes: dict[int, list[Sample]] = {}
    for one in samples:
        if one.seconds >= settle:
            minutes.setdefault(int((one.seconds - settle) // 60), []).append(one)
    if len(minutes) < 4:
        return None, None
    x = np.array([np.mean([one.seconds for one in group]) for group in minutes.values()]) / 3600
    y = np.array([np.mean([size(one) for one in group]) for group in minutes.values()]) / 1e6
    spread = x - x.mean()
    slope = float((spread * y).sum() / (spread**2).sum())
    rest = y - y.mean() - slope * spread
    return slope, math.sqrt(float((rest**2).sum()) / (len(x) - 2) / float((spread**2).sum()))


def _percentile(values: Sequence[float], which: float) -> float | None:
    return float(np.percentile(values, which)) * 1000 if values else None


def _check(what: str, value: Any, met: bool) -> dict[str, Any]:
    return {"what": what, "value": value, "met": bool(met)}


async def burst(arguments: argparse.Namespace, say: Say) -> dict[str, Any]:
    """What a server does, then Poisson arrivals at ten times that, then as many at one moment.

    What it does is measured before and after: the machine's pace changes within minutes.
    """
    minutes = 5.0 if arguments.minutes is None else arguments.minutes
    places, queue = 64, 64
    allow_files(2 * 10 * (places + queue))
    kind = servers.gristmill(arguments.weights, "--max-queue", str(queue))
    kind.prepare(say)
    prompts = load.Prompts(load.demo_ids(), SEED)
    lengths = ((32, 128), (16, 48))
    server = servers.Server(kind, arguments.threads)

    async def steady() -> float:
        """The most requests per second."""
        most = 0.0
        for users in (16, 64):
            run = await load.closed_loop(server.address, prompts.take(6 * users, *lengths), users)
            found = load.figures(run)
            say(f"{users} users: {found['requests_per_s']:.2f} requests/s, {found['failed']} failed")
            most = max(most, found["requests_per_s"])
        return most

    async def whole() -> float:
        """As many as are admitted at one moment, without the crowd: their beginning and end are no peak."""
        run = await load.closed_loop(server.address, prompts.take(places + queue, *lengths), places)
        found = len([one for one in run.outcomes if not one.error]) / run.seconds
        say(f"{places + queue} requests from beginning to end: {found:.2f} requests/s")
        return found

    try:
        await server.wait_ready()
        peaks, batches = [await steady()], [await whole()]
        rate = 10 * peaks[0]
        fill = (places + queue) / peaks[0]
        say(f"Poisson, {rate:.1f} requests/s for {minutes:g} minutes")
        run = await load.open_loop(
            server.address,
            prompts.take(math.ceil(rate * (fill + minutes * 60)), *lengths),
            rate,
            SEED,
            warm_s=fill,
        )
        peaks.append(await steady())
        peak = sum(peaks) / 2
        poisson = _overload(run, peak, say)
        say("all at one moment")
        began = asyncio.get_running_loop().time()
        asks = prompts.take(10 * (places + queue), *lengths)
        with load.patient():
            outcomes = await asyncio.gather(*(load.complete(server.address, ask) for ask in asks))
        good = [one for one in outcomes if not one.error]
        last = max((one.end for one in good), default=began)
        at_once = load.Run(list(outcomes), began, last, last - began, 0.0)
        batches.append(await whole())
        batch = sum(batches) / 2
        moment = _overload(at_once, batch, say)
        healthy: int | None = None
        with contextlib.suppress(HttpError, OSError):
            async with load.request(server.address, "GET", "/health") as response:
                healthy = response.status
        status: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = server.terminate()
    finally:
        server.close()
    checks = []
    for name, found in (("Poisson", poisson), ("at one moment", moment)):
        against = "the peak" if found is poisson else "a batch alone"
        checks += [
            _check(f"{name}: goodput against {against}", round(found["goodput"], 3), found["goodput"] >= 0.9),
            _check(f"{name}: errors other than 429", found["others"], not found["others"]),
            _check(f"{name}: 429 without Retry-After", found["without"], found["without"] == 0),
            _check(f"{name}: requests refused", found["refused"], found["refused"] > 0),
        ]
    # A request waits at most for those before it: the queue, and what ran when it came.
    bound = 1000 * 1.5 * (places + queue) / peak
    checks += [
        _check(
            f"p99 TTFT in ms of the admitted, at most {bound:.0f}",
            poisson["ttft_ms_p99"] and round(poisson["ttft_ms_p99"]),
            poisson["ttft_ms_p99"] is not None and poisson["ttft_ms_p99"] <= bound,
        ),
        _check("/health afterwards", healthy, healthy == 200),
        _check("exit status after SIGTERM", status, status == 0),
    ]
    return {
        "peak_requests_per_s": peaks,
        "batch_requests_per_s": batches,
        "offered_requests_per_s": rate,
        "minutes": minutes,
        "weights": arguments.weights,
        "max_queue": queue,
        "poisson": poisson,
        "at_one_moment": moment,
        "checks": checks,
    }


def allow_files(wanted: int) -> None:
    """Lets this process have so many open. SetupError if it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise SetupError(f"{wanted} files must be open at once, and {hard} may be (ulimit -n)")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _overload(run: load.Run, peak: float, say: Say) -> dict[str, Any]:
    try:
        found = load.figures(run)
    except ValueError:  # hardly anything was answered
        found = {"requests_per_s": 0.0, "ttft_ms_p99": None}
    refused = [one for one in run.outcomes if one.status == 429]
    others = Counter(one.error[:120] for one in run.outcomes if one.error and one.status != 429)
    result = {
        **found,
        "errors": {},
        "goodput": found["requests_per_s"] / peak,
        "refused": len(refused),
        "without": sum(not one.retry_after for one in refused),
        "others": dict(others),
    }
    say(
        f"goodput {result['goodput']:.0%} of the peak, {len(refused)} of {len(run.outcomes)} refused, "
        f"p99 TTFT {found['ttft_ms_p99'] or 0:.0f} ms, others {dict(others)}"
    )
    return result


def plot(section: dict[str, Any], path: Path) -> None:
    """Memory, KV memory and the rest over time, as a PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    samples = section["samples"]
    minutes = [one["seconds"] / 60 for one in samples]
    figure = Figure(figsize=(10, 7), layout="constrained")
    memory, held, counts = figure.subplots(3, 1, sharex=True)
    for name, label in (("rss", "RSS"), ("anonymous", "without files and KV"), ("helpers", "helpers")):
        memory.plot(minutes, [one[name] / 1e6 for one in samples], label=label)
    for name, label in (("kv_committed", "committed"), ("kv_cached", "cached prefixes"), ("kv_live", "live")):
        held.plot(minutes, [one[name] / 1e6 for one in samples], label=label)
    for name in ("running", "waiting", "files", "threads"):
        counts.plot(minutes, [one[name] for one in samples], label=name)
    for axis, label in ((memory, "memory, MB"), (held, "KV memory, MB"), (counts, "number")):
        axis.set_ylabel(label, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=8, loc="lower right")
        axis.grid(alpha=0.3)
    counts.set_xlabel("minutes", fontsize=8)
    slope, error = section["rss_slope_mb_per_hour"], section["rss_slope_error"]
    growth = "too short for a slope" if slope is None else f"{slope:.2f} ± {error:.2f} MB/h"
    figure.suptitle(
        f"{section['users']} users who cancel, vanish, read slowly and err; {section['weights']} weights, "
        f"{section['machine']['cpu']}, {section['date']}: {growth}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
