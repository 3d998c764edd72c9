"""The memory plan: what is counted, what fits, what the error says, and where limits are read from."""

from __future__ import annotations

from pathlib import Path

import pytest

from gristmill.errors import GristmillError, ModelError, UsageError
from gristmill.io.memory import RESERVE, MemoryPlanError, available_memory, plan
from gristmill.models import build_program
from tests.kits.files import config
from tests.kits.hostile import assert_one_line

GB = 10**9
PLENTY = (1 << 50, "free memory")


@pytest.mark.parametrize(("kv_dtype", "size"), [("bf16", 2), ("f32", 4)])
@pytest.mark.parametrize(("context", "kept"), [(1, 16), (16, 16), (17, 32), (100, 112), (4096, 4096)])
def test_global_layers_keep_every_token(kv_dtype: str, size: int, context: int, kept: int) -> None:
    got = plan(config(), 1000, kv_dtype, context, 3, available=PLENTY)
    # Two layers of keys and values, two KV heads of 64.
    assert got.kv_bytes == 3 * 2 * 2 * 2 * 64 * kept * size
    assert got.need_bytes == got.kv_bytes + 1000 + RESERVE
    assert got.fits
    assert got.check() is got
    assert got.largest_context == context


def test_codes_count_with_their_scales() -> None:
    got = plan(config(), 0, "int4", 100, available=PLENTY)
    assert got.kv_bytes == 2 * 2 * 2 * 112 * (64 / 2 + 2)
    assert got.kv_dtype == "int4"


@pytest.mark.parametrize("context", [1, 24, 500, 560, 4096])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_windowed_layers_keep_a_ring(kind: str, context: int) -> None:
    of = config(kind)
    got = plan(of, 0, "bf16", context, available=PLENTY)
    whole = -(-context // 16) * 16
    # Window 24 and a step of 256 tokens, in spans of 256, and one span for where they begin.
    ring = min(whole, (-(-(24 + 256) // 256) + 1) * 256)
    kept = {"mistral": 2 * ring, "gemma3_text": ring + whole}.get(kind, 2 * whole)
    assert got.kv_bytes == kept * 2 * 2 * 64 * 2
    program = plan(build_program(of), 0, "bf16", context, available=PLENTY)
    assert program == got


def test_largest_context_is_the_largest() -> None:
    of = config()
    per_block = 2 * 2 * 2 * 64 * 16 * 2
    for blocks in (1, 5, 63, 64, 100, 1000):
        available = (RESERVE + 5000 + blocks * per_block + per_block // 2, "free memory")
        got = plan(of, 5000, "bf16", 1 << 17, available=available)
        tokens = blocks * 16
        assert got.largest_context == (tokens if tokens < 1024 else tokens // 256 * 256)
        assert plan(of, 5000, "bf16", got.largest_context, available=available).fits
        assert not plan(of, 5000, "bf16", tokens + 1, available=available).fits


def test_the_error_names_numbers_and_a_setting_that_fits() -> None:
    of = config()
    with pytest.raises(MemoryPlanError) as raised:
        plan(of, 3 * GB, "bf16", 1 << 20, 8, available=(7 * GB, "the container's memory limit")).check()
    text = str(raised.value)
    assert_one_line(text)
    assert isinstance(raised.value, GristmillError)
    need = 3 * GB + 8 * 1024 * (1 << 20) + RESERVE
    for part in (
        f"{need / GB:.2f} GB",
        "weights 3.00 GB",
        "8.59 GB for 8 sequences of 1048576 tokens in bf16",
        "7.00 GB are left (the container's memory limit)",
    ):
        assert part in text
    fits = plan(of, 3 * GB, "bf16", 1 << 20, 8, available=(7 * GB, "")).largest_context
    assert f"--context {fits}" in text
    assert plan(of, 3 * GB, "bf16", fits, 8, available=(7 * GB, "")).fits


def test_weights_that_do_not_fit() -> None:
    of = config("qwen3", hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, vocab_size=150_000)
    weights = 4 * 2_300_000_000
    with pytest.raises(MemoryPlanError, match=r"int8 weights fit \(--weights int8\)"):
        plan(of, weights, "bf16", 2048, available=(4 * GB, "free memory")).check()
    with pytest.raises(MemoryPlanError, match=r"int4 weights fit \(--weights int4\)"):
        plan(of, weights, "bf16", 2048, available=(2 * GB, "free memory")).check()
    with pytest.raises(MemoryPlanError, match="no context fits; free some memory or choose a smaller model"):
        plan(of, weights, "bf16", 2048, available=(GB // 2, "free memory")).check()
    # Weights that are small already are not told to become larger.
    assert plan(of, 100, "bf16", 2048, available=(RESERVE, "free memory")).smaller_weights is None


def test_bad_requests() -> None:
    with pytest.raises(UsageError, match="kv_dtype must be one of f32, bf16, int4, not 'int8'"):
        plan(config(), 0, "int8", 16)
    for context, sequences in ((0, 1), (-1, 1), (1, 0)):
        with pytest.raises(UsageError, match="cannot be planned"):
            plan(config(), 0, "bf16", context, sequences)
    with pytest.raises(ModelError):
        plan(config(hidden_size=-1), 0, "bf16", 16)


# ---- what there is -----------------------------------------------------------------------------------------


def machine(root: Path, free_kb: int = 8_000_000) -> None:
    (root / "proc/self").mkdir(parents=True)
    text = f"MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:   {free_kb} kB\n"
    (root / "proc/meminfo").write_text(text)


def files(directory: Path, **content: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (directory / name.replace("__", ".")).write_text(text)


V2 = "35 24 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "30 25 0:26 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"
    "31 25 0:27 / /sys/fs/cgroup/cpu rw,nosuid - cgroup cgroup rw,cpu\n"
)


def test_without_limits_memory_is_what_is_free(tmp_path: Path) -> None:
    machine(tmp_path)
    assert available_memory(tmp_path) == (8_000_000 << 10, "free memory")
    files(tmp_path / "proc/self", cgroup="0::/\n", mountinfo=V2)
    assert available_memory(tmp_path) == (8_000_000 << 10, "free memory")
    files(tmp_path / "sys/fs/cgroup", memory__max="max\n", memory__current="5000\n")
    assert available_memory(tmp_path) == (8_000_000 << 10, "free memory")


def test_cgroup_v2_limit_with_cache_given_back(tmp_path: Path) -> None:
    machine(tmp_path)
    files(tmp_path / "proc/self", cgroup="0::/a/b\n", mountinfo=V2)
    stat = "anon 700\nfile 400\ninactive_file 250\nactive_file 50\nslab 5\n"
    group = tmp_path / "sys/fs/cgroup/a/b"
    files(group, memory__max=f"{GB}\n", memory__current="1000\n", memory__stat=stat)
    assert available_memory(tmp_path) == (GB - 700, "the container's memory limit")
    # The tightest level counts, whichever it is.
    files(group.parent, memory__max="500000\n", memory__current="200000\n", memory__stat="")
    assert available_memory(tmp_path) == (300_000, "the container's memory limit")
    # More used than allowed is nothing left, not less than nothing.
    files(group, memory__max="600\n", memory__current="99999999\n", memory__stat=stat)
    assert available_memory(tmp_path) == (0, "the container's memory limit")
    # A limit above what is free is no limit.
    files(group, memory__max=f"{100 * GB}\n", memory__current="0\n")
    files(group.parent, memory__max="max\n")
    assert available_memory(tmp_path)[1] == "free memory"


def test_cgroup_v1_limit(tmp_path: Path) -> None:
    machine(tmp_path)
    files(tmp_path / "proc/self", cgroup="4:memory:/job\n3:cpu,cpuacct:/other\n0::/\n", mountinfo=V1)
    group = tmp_path / "sys/fs/cgroup/memory/job"
    stat = "inactive_file 1\ntotal_inactive_file 300\ntotal_active_file 100\n"
    files(group, memory__limit_in_bytes=f"{GB}\n", memory__usage_in_bytes="1400\n", memory__stat=stat)
    unlimited = "9223372036854771712\n"
    files(group.parent, memory__limit_in_bytes=unlimited, memory__usage_in_bytes="5\n", memory__stat="")
    assert available_memory(tmp_path) == (GB - 1000, "the container's memory limit")
    files(group, memory__limit_in_bytes=unlimited)
    assert available_memory(tmp_path)[1] == "free memory"


def test_a_container_that_sees_its_own_group_as_the_mount(tmp_path: Path) -> None:
    machine(tmp_path)
    mount = V2.replace(" / /sys", " /docker/ab /sys")
    files(tmp_path / "sys/fs/cgroup", memory__max="2000\n", memory__current="500\n")
    files(tmp_path / "sys/fs/cgroup/inner", memory__max="1500\n", memory__current="500\n")
    for path, left in (("/docker/ab", 1500), ("/docker/ab/inner", 1000), ("/docker/abc", 1500), ("/", 1500)):
        files(tmp_path / "proc/self", cgroup=f"0::{path}\n", mountinfo=mount)
        assert available_memory(tmp_path) == (left, "the container's memory limit"), path


def test_odd_files_are_passed_over(tmp_path: Path) -> None:
    machine(tmp_path)
    mounts = "garbage\n1 2 3\n - \n" + V2.replace("/sys/fs/cgroup", "/sys/fs/c\\040group") + "a b - cgroup2\n"
    files(tmp_path / "proc/self", cgroup="nonsense\n\n0::/../../x\n", mountinfo=mounts)
    files(tmp_path / "sys/fs/c group", memory__max="12x\n", memory__current="5\n")
    assert available_memory(tmp_path) == (8_000_000 << 10, "free memory")
    files(tmp_path / "sys/fs/c group", memory__max="3000\n")
    assert available_memory(tmp_path) == (2995, "the container's memory limit")


def test_this_machine() -> None:
    count, what = available_memory()
    assert 0 < count < 1 << 60
    assert what in ("free memory", "the container's memory limit")
    assert plan(config(), 1000, "bf16", 128).available_bytes > 0


def test_without_proc(tmp_path: Path) -> None:
    import psutil

    count, what = available_memory(tmp_path)
    assert what == "free memory"
    assert abs(count - psutil.virtual_memory().available) < 4 << 30
