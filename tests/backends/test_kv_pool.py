"""The KV memory under random traces: what views hold, what is shared, what is given back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gristmill.backends.native import NativeExecutor, _native
from gristmill.backends.native.executor import NativeKVView
from gristmill.errors import GristmillError, KVExhausted, UsageError
from gristmill.io import convert
from gristmill.program.batch import GENERATED, Batch
from tests.kits import files, models

PLACEMENTS = ["mapped", "table"]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pool")
    result = {}
    for name in ("llama", "gemma3-linear"):
        of = models.configs()[name] | {"intermediate_size": 64, "num_hidden_layers": 3}
        if name == "gemma3-linear":
            of |= {"sliding_window": 90}
        of |= {"max_position_embeddings": 4096}
        tensors = files.weights(of)
        paths = files.write_gguf(root / f"{name}.gguf", of, tensors, {})
        result[name] = root / name
        result[name].mkdir()
        convert.import_gguf(paths, result[name])
    return result


@pytest.fixture(params=["llama", "gemma3-linear", "llama-int4", "llama-int4-channel"])
def executor(directories: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[NativeExecutor]:
    name, _, kv = request.param.partition("-int4")
    kv_dtype = f"int4{kv}" if "int4" in request.param else None
    if name not in directories:
        name = request.param
    with closing(NativeExecutor.load(directories[name], kv_dtype=kv_dtype, threads=2)) as made:
        yield made


def batch(views: list[NativeKVView], pieces: list[np.ndarray]) -> Batch:
    lengths = np.array([len(piece) for piece in pieces], np.int32)
    return Batch(
        tokens=np.concatenate(pieces).astype(np.int32),
        lengths=lengths,
        views=tuple(views),
        logit_rows=(np.cumsum(lengths) - 1).astype(np.int32),
        phases=np.full(int(lengths.sum()), GENERATED, np.uint8),
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("seed", range(3))
def test_random_traces(executor: NativeExecutor, placement: str, seed: int) -> None:
    """Views grow, fork, shrink, begin with others' memory and go; each always says what it says alone."""
    rng = np.random.default_rng(seed)
    span = executor.kv_pool.span_bytes
    executor.limit_kv(14 * span, placement)
    pool = executor.kv_pool
    live: list[tuple[NativeKVView, list[int]]] = []
    ended = exhausted = shared = 0
    for _ in range(150):
        what = rng.choice(["new", "grow", "grow", "grow", "fork", "cut", "close", "adopt"])
        if what == "new" or not live:
            live.append((executor.allocate(1500), []))
            continue
        view, tokens = live[int(rng.integers(len(live)))]
        try:
            if what == "grow":
                some = [live[i] for i in rng.permutation(len(live))[: int(rng.integers(1, 4))]]
                pieces = [rng.integers(0, executor.vocab_size, int(rng.integers(1, 80))) for _ in some]
                some = [one for one in some if len(one[1]) < 1300]
                pieces = pieces[: len(some)]
                if some:
                    for (one, _), piece in zip(some, pieces, strict=True):
                        one.reserve(len(piece))
                    executor.step(batch([one for one, _ in some], pieces))
                    for (_, ids), piece in zip(some, pieces, strict=True):
                        ids.extend(piece.tolist())
            elif what == "fork" and tokens:
                length = int(rng.integers(0, len(tokens) + 1))
                live.append((view.fork(length, 1500), tokens[:length]))
                shared += 1
            elif what == "cut" and tokens:
                length = int(rng.integers(0, len(tokens) + 1))
                view.truncate(length)
                del tokens[length:]
            elif what == "adopt" and len(tokens) >= 64:
                length = int(rng.integers(1, len(tokens) + 1)) // pool.share_tokens * pool.share_tokens
                other = executor.allocate(1500)
                other.adopt([view.span(i) for i in range(-(-length // 256))], length)
                live.append((other, tokens[:length]))
                shared += 1
            elif what == "close":
                view.close()
                live = [one for one in live if one[0] is not view]
        except UsageError:
            ended += 1  # a window that has moved on, or a group of tokens
        except KVExhausted:
            exhausted += 1
            live[0][0].close()
            del live[0]
        assert pool.used <= pool.limit
        assert [one.length for one, _ in live] == [len(ids) for _, ids in live]
    assert shared > 5
    # Every view goes on as one of its own would.
    for view, ids in live:
        view.fork(view.length, 1500).close()
        piece = rng.integers(0, executor.vocab_size, 1)
        try:
            got = executor.step(batch([view], [piece]))
        except KVExhausted:
            view.close()
            continue
        tokens = np.array([*ids, *piece], np.int32)
        view.close()
        try:
            fresh = executor.allocate(1500)
            for begin in range(0, len(tokens), 200):
                expected = executor.step(batch([fresh], [tokens[begin : begin + 200]]))
        except KVExhausted:
            continue
        finally:
            fresh.close()
        np.testing.assert_array_equal(got, expected)
    live.clear()
    del view
    pool.trim()
    stats = pool.stats()
    assert (stats["used"], stats["frames"], stats["committed"]) == (0, 0, 0)
    windows = len(pool.windows)
    assert stats["mappings"] == (windows if placement == "mapped" else 0)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_memory_is_committed_as_it_is_written(directories: dict[str, Path], placement: str) -> None:
    with closing(NativeExecutor.load(directories["llama"], threads=1)) as executor:
        executor.limit_kv(64 * executor.kv_pool.span_bytes, placement)
        pool = executor.kv_pool
        views = [executor.allocate(4000) for _ in range(8)]
        assert pool.stats()["committed"] == pool.stats()["used"] == 0
        for view in views:
            executor.step(batch([view], [np.arange(10)]))
        stats = pool.stats()
        assert stats["used"] == 8 * pool.span_bytes
        assert 0 < stats["committed"] <= 8 * (pool.span_bytes + (2 << 20))
        if placement == "mapped":
            assert stats["reserved"] == 8 * 16 * pool.span_bytes
        forks = [views[0].fork(10, 4000) for _ in range(50)]
        assert pool.stats()["committed"] == stats["committed"], "a fork commits nothing until it writes"
        assert pool.used == stats["used"]
        executor.step(batch([forks[0]], [np.arange(1)]))  # at the end of the common part: in place
        executor.step(batch([forks[1]], [np.arange(1)]))
        assert pool.used == stats["used"] + pool.span_bytes
        for view in [*views, *forks]:
            view.close()
        pool.trim()
        assert pool.stats()["committed"] == 0


def test_a_limit_is_kept_and_nothing_changes_by_failing(directories: dict[str, Path]) -> None:
    with closing(NativeExecutor.load(directories["llama"], threads=1)) as executor:
        executor.limit_kv(3 * executor.kv_pool.span_bytes)
        a, b = executor.allocate(4000), executor.allocate(4000)
        executor.step(batch([a], [np.arange(200)]))
        with pytest.raises(KVExhausted):
            b.reserve(4 * 256)
        with pytest.raises(KVExhausted):
            executor.step(batch([a, b], [np.arange(200), np.arange(600) % 250]))
        assert (a.length, b.length) == (200, 0)
        b.reserve(1)
        executor.step(batch([a, b], [np.arange(50), np.arange(1)]))
        assert (a.length, b.length) == (250, 1)


FAULT = """
import ctypes, numpy as np, sys
from pathlib import Path
from gristmill.backends.native import NativeExecutor, _native
KV, none = _native.KvFormat.BF16, np.zeros(0, np.float32)
layer = _native.AttentionLayer("portable", 2, 1, 16, 0.25, 0, KV, True, none)
maps = lambda: {line.split()[0]: line for line in open("/proc/self/maps")}
before = maps()
view = layer.allocate(4096, 0, True)
reserved = [line for key, line in maps().items() if key not in before and "---p" in line]
assert reserved, "no addresses are reserved"
low = int(reserved[0].split("-")[0], 16)
print("reserved", flush=True)
ctypes.string_at(low, 1)
"""


def test_what_is_not_committed_is_not_there() -> None:
    """A token without memory faults when touched: nothing pretends to be its keys."""
    done = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, check=False)
    assert "reserved" in done.stdout, done.stderr
    assert done.returncode == -11


LIMITED = """
import resource, sys
from gristmill.backends.native import NativeExecutor, _native
from gristmill.errors import GristmillError
from pathlib import Path
executor = NativeExecutor.load(Path(sys.argv[1]), threads=1)
size = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)
for placement in ("mapped", "table"):
    try:
        executor.limit_kv(1 << 36, placement)
    except GristmillError as error:
        print(error)
executor.limit_kv(1 << 24, "mapped")
view = executor.allocate(256)
try:
    executor.kv_pool.allocate(10**8)
except MemoryError:
    print("no memory")
"""


def test_addresses_that_cannot_be_reserved_are_an_error(directories: dict[str, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(directories["llama"])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0] == lines[1]
    assert "ulimit -v" in lines[0]
    assert lines[2] == "no memory"


def test_wrong_placements_are_refused(directories: dict[str, Path]) -> None:
    with (
        closing(NativeExecutor.load(directories["llama"], threads=1)) as executor,
        pytest.raises(UsageError, match="mapped"),
    ):
        executor.limit_kv(0, "elsewhere")
    assert issubclass(KVExhausted, GristmillError)


def test_without_memfd_a_shared_memory_object_takes_its_place(directories: dict[str, Path]) -> None:
    with closing(NativeExecutor.load(directories["llama"], threads=1)) as executor:
        executor.limit_kv(8 * executor.kv_pool.span_bytes, "mapped")
        expected = executor.step(batch([executor.allocate(600)], [np.arange(200)]))
        native = executor._native.kv_pool(8 * executor.kv_pool.span_bytes, _native.KvPlacement.MAPPED, False)
        assert native.backing == "shm"
        view = NativeKVView(native.allocate(600))
        np.testing.assert_array_equal(executor.step(batch([view], [np.arange(200)])), expected)
        fork = view.fork(150, 600)
        executor.step(batch([fork], [np.arange(3)]))
        assert native.stats()["frames"] == 2
        assert not list(Path("/dev/shm").glob("gristmill-kv-*")), "it has no name any longer"


def test_the_limit_on_mappings_is_told(directories: dict[str, Path]) -> None:
    """Views of one frame, until the system grants no more; giving some back helps."""
    with closing(NativeExecutor.load(directories["llama"], threads=1)) as executor:
        executor.limit_kv(8 * executor.kv_pool.span_bytes, "mapped")
        limit = executor.kv_pool.stats()["mapping_limit"]
        if limit > 200_000:
            pytest.skip(f"vm.max_map_count is {limit}: it would take too long")
        view = executor.allocate(4000)
        executor.step(batch([view], [np.arange(10)]))
        forks: list[NativeKVView] = []
        with pytest.raises(KVExhausted, match=r"vm\.max_map_count"):  # noqa: PT012
            while True:
                forks.append(view.fork(10, 4000))
        assert len(forks) > limit // 8
        for fork in forks[-100:]:
            fork.close()
        executor.step(batch([view], [np.arange(10)]))
        forks.append(view.fork(20, 4000))
        for fork in forks:
            fork.close()
        assert executor.kv_pool.stats()["mappings"] <= 5
