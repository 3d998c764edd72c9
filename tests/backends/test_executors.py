"""The executors against the kit; the native one in every mode, thread count and instruction set."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from gristmill.backends.native import NativeExecutor, _native
from gristmill.engine.loop import Runner
from gristmill.engine.sampling import SamplingParams
from gristmill.errors import UsageError
from gristmill.evaluate.measure import compare
from gristmill.formats import dense, group_int
from gristmill.formats.packed import Packed, decode_f32
from gristmill.io import convert
from gristmill.program.builder import Builder
from tests.engine.fakes import FakeTokenizer
from tests.kits import files, levels, models
from tests.kits.executor import (
    Subject,
    check_cancellation,
    check_chunks,
    check_compositions,
    check_empty_sequences,
    check_errors,
    check_executor,
    check_selected_rows,
    check_shapes,
    same,
)

MODES = [
    (weights, activations, kv)
    for weights in ("stored", "f32", "bf16", "int8", "int4")
    for activations in ("exact", "bf16", "fast")
    for kv in ("f32", "bf16")
] + [("mixed", activations, "bf16") for activations in ("exact", "bf16", "fast")]
MODES += [("stored", "fast", "int4"), ("f32", "exact", "int4")]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Gemma 3, which has every op, in all weight modes: a Q4_1 body with a Q8_0 embedding when stored."""
    root = tmp_path_factory.mktemp("modes")
    of = models.configs()["gemma3-linear"] | {"sliding_window": 24}
    tensors = files.weights(of)
    kinds = {n: "Q8_0" if "embed" in n else "Q4_1" for n, v in tensors.items() if v.ndim == 2}
    paths = files.write_gguf(root / "x.gguf", of, tensors, kinds)
    result = {"stored": root / "stored"}
    result["stored"].mkdir()
    convert.import_gguf(paths, result["stored"])
    for weights in ("f32", "bf16", "int8", "int4"):
        result[weights] = root / weights
        result[weights].mkdir()
        convert._requantise(result["stored"], result[weights], weights, None)
    result["mixed"] = root / "mixed"
    files.write_mixed(result["stored"], result["mixed"])
    return result


@pytest.mark.parametrize(("weights", "activations", "kv"), MODES, ids=["-".join(mode) for mode in MODES])
def test_native(checkpoints: dict[str, Path], weights: str, activations: str, kv: str) -> None:
    path = checkpoints[weights]
    with closing(NativeExecutor.load(path, activations=activations, kv_dtype=kv, threads=2)) as executor:
        two = check_executor(executor)
    for threads in (1, 3):
        with closing(
            NativeExecutor.load(path, activations=activations, kv_dtype=kv, threads=threads)
        ) as executor:
            subject = Subject(executor)
            for i, logits in enumerate(subject.alone):
                same(logits, two.alone[i], f"sequence {i} with {threads} threads instead of 2")


@pytest.mark.parametrize("activations", ["exact", "fast"])
def test_groups_of_tokens(tmp_path: Path, activations: str) -> None:
    """`int4-channel`, which refuses sliding windows, over sequences that begin, fill and leave groups."""
    source, _ = models.save(tmp_path / "hf", models.configs()["llama-smollm2"])
    path = tmp_path / "checkpoint"
    path.mkdir()
    convert.import_huggingface(source, path)
    found = []
    for threads in (2, 1, 3):
        with closing(
            NativeExecutor.load(path, activations=activations, kv_dtype="int4-channel", threads=threads)
        ) as executor:
            subject = Subject(executor, 210, 150)
            found.append(subject.alone)
            if threads != 2:
                continue
            check_shapes(subject)
            check_chunks(subject)
            check_compositions(subject)
            check_selected_rows(subject)
            check_empty_sequences(subject)
            check_cancellation(subject)
            check_errors(subject)
    for i, logits in enumerate(found[0]):
        same(found[1][i], logits, f"sequence {i} with 1 thread")
        same(found[2][i], logits, f"sequence {i} with 3 threads")


def test_groups_of_tokens_refuse_windows(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"layers\.0\.self_attn\.attention.*int4-channel.*window"):
        NativeExecutor.load(checkpoints["f32"], kv_dtype="int4-channel")


LEVELS = _native.available_levels()
# Prompts take another arithmetic there.
TILES = levels.emulated()


LEVEL_MODES = [
    *(("stored", "fast", "bf16"), ("int4", "fast", "bf16"), ("f32", "exact", "f32")),
    *(("mixed", "fast", "bf16"), ("mixed", "exact", "f32")),
    *(("f32", "fast", "int4"), ("f32", "exact", "int4")),
]


@pytest.mark.parametrize(
    ("level", "weights", "activations", "kv"),
    # Of these modes, the tiles' level is the vectors' where neither rows nor keys are bf16.
    [(level, *mode) for level in LEVELS for mode in LEVEL_MODES]
    + [(level, *mode) for level in TILES for mode in LEVEL_MODES if mode[2] == "bf16"],
)
def test_native_levels(
    checkpoints: dict[str, Path], level: str, weights: str, activations: str, kv: str
) -> None:
    """Every instruction set keeps the contract by itself."""
    with closing(
        NativeExecutor.load(
            checkpoints[weights], activations=activations, kv_dtype=kv, threads=2, level=level
        )
    ) as executor:
        subject = Subject(executor)
        check_chunks(subject)
        check_compositions(subject)


@pytest.mark.parametrize("level", TILES)
def test_tiles_tell_prompts_from_generated_tokens(checkpoints: dict[str, Path], level: str) -> None:
    for weights, activations, kind in [
        ("int4", "fast", "bf16"),
        ("int8", "fast", "fast"),
        ("int4", "exact", "exact"),
        ("f32", "fast", "fast"),
    ]:
        with closing(
            NativeExecutor.load(checkpoints[weights], activations=activations, level=level)
        ) as executor:
            assert executor.prompt_activations == kind
            ids = models.tokens(40, executor.vocab_size)
            as_prompt = models.logits(executor, ids, [40])
            as_generated = models.logits(executor, ids, [40], prompt=0)
            assert np.array_equal(as_prompt, as_generated) == (kind == activations)
            assert models.relative_error(as_prompt, as_generated) < 0.05
    with closing(NativeExecutor.load(checkpoints["int4"], level="avx512bf16")) as executor:
        assert executor.prompt_activations == "fast"


def test_loop_and_evaluation_take_the_steps_that_rings_of_windows_allow(checkpoints: dict[str, Path]) -> None:
    with closing(NativeExecutor.load(checkpoints["int8"], threads=2)) as executor:
        ids = models.tokens(700, executor.vocab_size)
        engine = Runner(executor, FakeTokenizer(), context=800)
        one = engine.begin(ids.tolist(), SamplingParams(max_tokens=3, temperature=0.0))
        engine.run([one])
        whole = models.logits(executor, ids, [16] * 43 + [12])
        assert one.result().token_ids[0] == whole[-1].argmax()
        assert compare(executor, executor, [ids])["kl_mean"] == 0


@pytest.mark.parametrize("level", TILES + [level for level in LEVELS if level == "amx"])
@pytest.mark.parametrize(
    ("bits", "group", "values"),
    [(4, 64, True), (3, 64, True), (8, 32, True), (5, 64, False), (4, 128, False)],
)
def test_prompts_meet_values_rounded_to_bf16_where_groups_are_small(
    level: str, bits: int, group: int, values: bool
) -> None:
    rng = np.random.default_rng(3)
    b = Builder("layers")
    x = b.embedding("table.weight", 64, 192)
    for i in range(2):
        x = b.linear(x, f"layers.{i}", 192)
    program = b.build(b.linear(b.select_rows(x), "head", 64))
    table = dense.pack(rng.standard_normal((64, 192)).astype(np.float32), "bf16")
    packed: dict[str, Packed] = {"table.weight": table, "head.weight": table}
    for i in range(2):
        matrix = rng.standard_normal((192, 192)).astype(np.float32) / 14
        packed[f"layers.{i}.weight"] = group_int.round_group_int(
            matrix, bits=bits, group=group, symmetric=False
        )
    plain = {name: dense.pack(decode_f32(p), "bf16") for name, p in packed.items()}
    ids = models.tokens(70, 64)
    with (
        closing(NativeExecutor(program, packed, {}, activations="fast", threads=2, level=level)) as codes,
        closing(NativeExecutor(program, plain, {}, activations="fast", threads=2, level=level)) as rounded,
    ):
        assert codes.prompt_activations == ("bf16" if values else "fast")
        for chunks in ([70], [48, 16, 6]):
            found = models.logits(codes, ids, chunks)
            assert np.array_equal(found, models.logits(rounded, ids, chunks)) == values
        assert not np.array_equal(
            models.logits(codes, ids, [70], prompt=0), models.logits(rounded, ids, [70])
        )
