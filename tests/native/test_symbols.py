"""What is inside the object files of every instruction-set level.

Two dangers, each silent until an older processor meets an unknown instruction. A function with an ordinary
name (an inline one of the standard library, say) that a kernel's object emits may be the copy that the linker
keeps for everybody; and a level's objects may hold instructions that its processors lack.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from gristmill.backends.native import _native

ROOT = Path(__file__).resolve().parents[2]
LEVELS = [*_native.compiled_levels(), *(["amx_emulated"] if "amx" in _native.compiled_levels() else [])]

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
needs_objdump = pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
needs_x86 = pytest.mark.skipif("avx2" not in LEVELS, reason="not an x86 build")

# What kernels may call: memory functions that the compiler itself makes up, the guard of a table's first use,
# and mathematical functions that have one right result, by IEEE 754 (the square root is called only for
# negative arguments, to set errno; the others at the portable level).
CALLED = {"memcpy", "memset", "memmove", "memcmp", "__cxa_guard_acquire", "__cxa_guard_release"}
CALLED |= {"sqrtf", "fmaf", "nearbyintf"}
LINKAGE = {"_GLOBAL_OFFSET_TABLE_", "__stack_chk_fail", "_Unwind_Resume"}

# Disassembly that a level must not hold. Each pattern is searched in "mnemonic operands".
VEX = r"^v(?!er[rw]\b|mcall|mmcall|mrun)"
WIDE = r"%[xyz]mm(?:1[6-9]|2\d|3[01])|%zmm|%k[0-7]\b"
BF16 = r"^vdpbf16ps|^vcvtne2?ps2bf16|^vcvtneps2bf16"
VBMI = r"^vperm(?:i2|t2)?b\b|^vpmultishiftqb"
BEYOND = (  # AVX-512 VBMI2, BITALG, IFMA, GFNI, FP16: no level has them
    r"^vpopcnt|^vpsh[lr]d|^vp(?:compress|expand)[bw]\b|^vpmadd52|^vgf2p8|^v\w+[ps]h\b(?<!^vcvtps2ph)"
)
TILES = r"%tmm"
FORBIDDEN = {
    "portable": [VEX, TILES],
    "avx2": [WIDE, r"^vpdp", BF16, TILES],
    "avx512": [BF16, VBMI, BEYOND, TILES],
    "avx512bf16": [VBMI, BEYOND, TILES],
    "amx_emulated": [BEYOND, TILES],
    "amx": [BEYOND],
}


@cache
def objects(target: str) -> list[Path]:
    """The object files of one build target, by the newest build's own record of its commands."""
    records = sorted(ROOT.glob("build/*/compile_commands.json"), key=lambda p: p.stat().st_mtime)
    assert records, "no build directory: run `make native`"
    found = []
    for entry in json.loads(records[-1].read_text()):
        output = entry.get("output") or re.search(r"-o (\S+)", entry["command"])[1]
        if f"/{target}.dir/" in output:
            found.append(Path(entry["directory"], output))
    assert found, f"the build has no target {target}"
    missing = [str(p) for p in found if not p.exists()]
    assert not missing, f"not built: {missing}"
    return found


def lines(*command: str | Path) -> list[str]:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def shared_symbols(path: Path) -> list[str]:
    """Defined symbols that the linker sees: everything but local ones."""
    fields = [line.split() for line in lines("nm", "--defined-only", path)]
    return [f[-1] for f in fields if len(f) == 3 and (f[1].isupper() or f[1] in "uvw")]


def strangers(level: str, symbols: list[str]) -> list[str]:
    """Those that belong neither to the level's namespace nor are its one table."""
    own = re.compile(rf"_Z(?:GV|TV|TS|TI)?Z?N[KVRO]*2gm{len(level)}{level}(?=\d|[A-Z])")
    table = f"_ZN2gm{len('kernel_table_' + level)}kernel_table_{level}Ev"
    return [s for s in symbols if s != table and not own.match(s)]


@cache
def instructions(path: Path) -> tuple[str, ...]:
    """The different (mnemonic operands) of an object."""
    found = set()
    for line in lines("objdump", "--disassemble", "--no-show-raw-insn", path):
        parts = line.split("\t")
        if len(parts) > 1:
            text = re.sub(r"\s+", " ", parts[1].split("#")[0]).strip()
            found.add(re.sub(r"(?<![a-z])-?0x[0-9a-f]+|<[^>]*>", "", text))
    return tuple(sorted(found))


def beyond(level: str, path: Path) -> list[str]:
    pattern = re.compile("|".join(FORBIDDEN[level]))
    return [text for text in instructions(path) if pattern.search(text)]


@needs_nm
@pytest.mark.parametrize("level", LEVELS)
def test_kernels_export_only_their_namespace(level: str) -> None:
    tables = 0
    for path in objects(f"gm_kernels_{level}"):
        symbols = shared_symbols(path)
        assert strangers(level, symbols) == [], path.name
        tables += sum("kernel_table_" in s for s in symbols)
    assert tables == 1


@needs_nm
@pytest.mark.parametrize("level", LEVELS)
def test_kernels_call_only_each_other(level: str) -> None:
    for path in objects(f"gm_kernels_{level}"):
        called = {line.split()[-1] for line in lines("nm", "--undefined-only", path)}
        theirs = [s for s in called - CALLED - LINKAGE if not s.startswith("_ZN2gm")]
        # Nothing of the standard library, and no exponential, whose bits differ between versions of libm.
        assert theirs == [], path.name


@needs_nm
def test_the_symbol_check_can_fail() -> None:
    level = "portable"
    own = ["_ZN2gm8portable10encode_int8EPKf", "_ZN2gm21kernel_table_portableEv"]
    assert strangers(level, own) == []
    others = [
        "_ZNSt6vectorIfE4sizeEv",
        "_ZN2gm6avx5123addEv",
        "_ZN2gm9portable23addEv",
        "_ZN2gm4PoolC1Ei",
        "expf",
    ]
    assert strangers(level, [*own, *others]) == others


@needs_x86
@needs_objdump
@pytest.mark.parametrize("level", LEVELS)
def test_no_instruction_beyond_the_level(level: str) -> None:
    for path in objects(f"gm_kernels_{level}"):
        assert beyond(level, path) == [], path.name


@needs_x86
@needs_objdump
def test_the_runtime_runs_anywhere() -> None:
    for target in ("gm_runtime", "_native"):
        for path in objects(target):
            assert beyond("portable", path) == [], path.name


@needs_x86
@needs_objdump
def test_the_instruction_check_can_fail() -> None:
    # Each level does use what the level below must not.
    for lower, upper in [
        ("portable", "avx2"),
        ("avx2", "avx512"),
        ("avx512", "avx512bf16"),
        ("avx512bf16", "amx"),
    ]:
        assert any(beyond(lower, path) for path in objects(f"gm_kernels_{upper}")), (lower, upper)


@needs_x86
@needs_objdump
def test_tiles_are_used_and_released() -> None:
    found = {path.name.partition(".")[0]: instructions(path) for path in objects("gm_kernels_amx")}
    assert set(found) == {
        "linear_amx",
        "linear_amx_codes",
        "linear_amx_few",
        "linear_amx_row",
        "attention",
    }
    row = found.pop("linear_amx_row")
    assert not any(re.search(TILES, text) for text in row)
    assert {"vpermps", "vfmadd231ps"} <= {text.split(" ")[0] for text in row}
    assert any(re.match(r"vperm[it]2b ", text) for text in row)
    few = {text.split(" ")[0] for text in found.pop("linear_amx_few")}
    assert {"ldtilecfg", "tdpbssd", "tdpbsud", "tilerelease"} <= few
    for name, texts in found.items():
        assert {"ldtilecfg", "tdpbf16ps", "tilerelease"} <= {text.split(" ")[0] for text in texts}, name
    mnemonics = {text.split(" ")[0] for text in found["linear_amx"]}
    assert {
        "ldtilecfg",
        "tileloadd",
        "tilezero",
        "tdpbssd",
        "tdpbsud",
        "tilestored",
        "tilerelease",
    } <= mnemonics
    # Destination, rows, codes: AT&T order is reversed.
    assert "tdpbsud %tmm6,%tmm4,%tmm0" in found["linear_amx"]
