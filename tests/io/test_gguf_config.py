"""GGUF metadata as a Hugging Face config: names, sizes, rope scalings, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill.io.expected import expected_tensors
from gristmill.io.gguf import GgufModel
from gristmill.io.gguf_config import half_split_order, llama3_scaling, translate
from gristmill.models import read_config
from gristmill.program.rope import rope_inverse_frequencies
from tests.kits.files import (
    GGUF_NUMBERS,
    config,
    gguf_bytes,
    gguf_info,
    gguf_pair,
    gguf_string,
    rotation_pairs,
    weights,
    write_gguf,
)
from tests.kits.hostile import assert_refused

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return translate(GgufModel([path]))


@pytest.mark.parametrize("kind", KINDS)
def test_config_comes_back(tmp_path: Path, kind: str) -> None:
    """What was written from a Hugging Face config is that config again, and runs as the same model."""
    original = config(kind)
    write_gguf(tmp_path / "x.gguf", original, weights(original))
    got, sources = read(tmp_path / "x.gguf")
    assert read_config(got) == read_config(original)
    assert expected_tensors(got) == expected_tensors(original)
    assert set(sources) == set(expected_tensors(original))
    for name, shape in expected_tensors(original).items():
        assert sources[name].tensor.shape == shape


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_head_is_an_absent_output(tmp_path: Path, kind: str, tied: bool) -> None:
    original = config(kind, tie_word_embeddings=tied)
    write_gguf(tmp_path / "x.gguf", original, weights(original))
    got, sources = read(tmp_path / "x.gguf")
    assert got["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in sources) is not tied


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 8), (9, 64)])
def test_half_split_order_undoes_the_converter(heads: int, size: int) -> None:
    rows = np.arange(heads * size * 5).reshape(heads * size, 5)
    order = half_split_order(heads * size, heads)
    assert np.array_equal(rotation_pairs(rows, heads)[order], rows)
    assert np.array_equal(np.sort(order), np.arange(heads * size))


def llama3_factors(
    theta: float,
    size: int,
    factor: float = 32.0,
    bounds: tuple[float, float] = (1.0, 4.0),
    original: int = 8192,
) -> np.ndarray:
    """The divisors of the frequencies, as the Llama-3 rule has them, one by one."""
    result = []
    low, high = bounds
    for at in range(size // 2):
        wavelength = 2 * math.pi * theta ** (2 * at / size)
        if wavelength < original / high:
            result.append(1.0)
        elif wavelength > original / low:
            result.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result)


@pytest.mark.parametrize(
    ("theta", "size", "factor", "bounds", "original"),
    [
        (500000.0, 64, 32.0, (1.0, 4.0), 8192),
        (500000.0, 128, 8.0, (1.0, 4.0), 8192),
        (10000.0, 64, 4.0, (1.0, 4.0), 2048),
        (500000.0, 128, 8.0, (2.0, 5.0), 8192),
    ],
)
def test_llama3_factors_become_a_scaling(
    theta: float, size: int, factor: float, bounds: tuple[float, float], original: int
) -> None:
    factors = llama3_factors(theta, size, factor, bounds, original)
    scaling = llama3_scaling(factors.astype(np.float32).astype(np.float64), theta, original)
    assert scaling["rope_type"] == "llama3"
    attribute = {"type": "llama3", "theta": theta, "dim": size, **scaling}
    del attribute["rope_type"]
    inverse, attention = rope_inverse_frequencies(attribute, size)
    plain = theta ** -(np.arange(0, size, 2) / size)
    assert attention == 1
    assert np.allclose(np.asarray(inverse, np.float64), plain / factors, rtol=2e-6)


@pytest.mark.parametrize(
    "factors",
    [
        np.full(32, np.nan),
        np.full(32, np.inf),
        np.full(32, 0.5),
        np.linspace(1, 8, 32),
        np.array([1.0] * 31 + [-8.0]),
        np.array([8.0, 1.0] * 16),
    ],
)
def test_other_factors_are_refused(factors: np.ndarray) -> None:
    assert_refused(lambda: llama3_scaling(factors, 500000.0, 8192), "do not follow the Llama-3 rule")


def with_table(tmp_path: Path, table: np.ndarray, **keys: Any) -> Path:
    original = config(rope_theta=500000.0)
    extra = {"rope_freqs.weight": table}
    return write_gguf(tmp_path / "x.gguf", original, weights(original), metadata=keys, extra=extra)[0]


def test_rope_freqs_tensor(tmp_path: Path) -> None:
    factors = llama3_factors(500000.0, 64).astype(np.float32)
    got, sources = read(with_table(tmp_path, factors))
    assert got["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in sources
    got, _ = read(with_table(tmp_path, np.ones(32, np.float32)))
    assert "rope_scaling" not in got
    assert_refused(lambda: read(with_table(tmp_path, np.ones(31, np.float32))), "wrong shape")
    assert_refused(
        lambda: read(with_table(tmp_path, np.linspace(1, 9, 32, dtype=np.float32))), "Llama-3 rule"
    )
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    assert_refused(lambda: read(with_table(tmp_path, factors, **linear)), "both linear rope scaling and")


# Metadata to add, and either the config keys that come of it or the error.
KEYS: list[tuple[str, dict[str, Any], dict[str, Any] | str]] = [
    ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
     {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_scaling": None}),
    ("llama", {"rope.scale_linear": 2.0}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("llama", {"rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
    ("llama", {"attention.sliding_window": 16}, {"model_type": "mistral", "sliding_window": 16}),
    ("qwen2", {"attention.sliding_window": 16}, "sliding window is not supported"),
    ("llama", {"expert_count": 8}, "llama.expert_count, which is not supported"),
    ("llama", {"logit_scale": 0.5}, "llama.logit_scale, which is not supported"),
    ("llama", {"attention.clamp_kqv": 8.0}, "attention.clamp_kqv, which is not supported"),
    ("llama", {"rope.dimension_count": 32}, "32 rotated of 64 head dimensions"),
    ("llama", {"rope.dimension_count": 64}, {"head_dim": 64}),
    ("gemma3", {"attention.sliding_window_pattern": 2},
     {"layer_types": ["sliding_attention", "full_attention"]}),
    ("gemma3", {"attention.sliding_window_pattern": [False, True]},
     {"layer_types": ["full_attention", "sliding_attention"]}),
    ("gemma3", {"attention.sliding_window_pattern": [True]}, "1 entries for 2 layers"),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "metadata", "expected"), KEYS)
def test_keys(tmp_path: Path, arch: str, metadata: dict[str, Any], expected: dict[str, Any] | str) -> None:
    original = config({"gemma3": "gemma3_text"}.get(arch, arch))
    write_gguf(tmp_path / "x.gguf", original, weights(original), metadata=metadata)
    if isinstance(expected, str):
        assert_refused(lambda: read(tmp_path / "x.gguf"), expected)
        return
    got, _ = read(tmp_path / "x.gguf")
    for key, value in expected.items():
        assert got.get(key) == value


# ---- damaged metadata --------------------------------------------------------------------------------------

SOUND: dict[str, tuple[str, bytes]] = {
    "block_count": ("u32", (1).to_bytes(4, "little")),
    "context_length": ("u32", (64).to_bytes(4, "little")),
    "embedding_length": ("u32", (32).to_bytes(4, "little")),
    "feed_forward_length": ("u32", (64).to_bytes(4, "little")),
    "attention.head_count": ("u32", (2).to_bytes(4, "little")),
    "attention.layer_norm_rms_epsilon": ("f32", np.float32(1e-5).tobytes()),
}


def model(
    tmp_path: Path,
    arch: str | None = "llama",
    tensor: bytes | None = None,
    **changes: tuple[str, bytes] | None,
) -> Path:
    """A GGUF file with an embedding only, and metadata with some keys replaced or (None) left out."""
    pairs = [] if arch is None else [gguf_pair("general.architecture", 8, gguf_string(arch))]
    table = {**SOUND, **{key.replace("__", "."): value for key, value in changes.items()}}
    for key, pair in table.items():
        if pair is not None:
            pairs.append(gguf_pair(f"llama.{key}", GGUF_NUMBERS[pair[0]], pair[1]))
    info = tensor or gguf_info("token_embd.weight", (32, 8), 0, 0)
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(pairs, [info], bytes(32 * 8 * 4)))
    return path


def test_sound_metadata_is_read(tmp_path: Path) -> None:
    got, _ = read(model(tmp_path))
    assert (got["vocab_size"], got["hidden_size"], got["head_dim"], got["rms_norm_eps"]) == (8, 32, 16, 1e-5)
    assert got["rope_theta"] == 10000.0


@pytest.mark.parametrize("key", list(SOUND))
def test_every_needed_key_is_missed_by_name(tmp_path: Path, key: str) -> None:
    path = model(tmp_path, **{key.replace(".", "__"): None})
    assert_refused(lambda: read(path), f"lacks llama.{key}")


@pytest.mark.parametrize("key", list(SOUND))
@pytest.mark.parametrize(
    "value",
    [
        ("u32", bytes(4)),
        ("i32", (-3).to_bytes(4, "little", signed=True)),
        ("u64", (1 << 63).to_bytes(8, "little")),
        ("string", gguf_string("x" * 5000)),
        ("bool", b"\x01"),
        ("f32", np.float32(np.nan).tobytes()),
        ("f32", np.float32(np.inf).tobytes()),
        ("f64", np.float64(-1e300).tobytes()),
        ("array", (4).to_bytes(4, "little") + bytes(8)),
        ("array", (4).to_bytes(4, "little") + (2).to_bytes(8, "little") + bytes([1, 0, 0, 0, 2, 0, 0, 0])),
    ],
    ids=["0", "-3", "2^63", "text", "true", "nan", "inf", "-1e300", "[]", "[1, 2]"],
)
def test_bad_values_are_refused(tmp_path: Path, key: str, value: tuple[str, bytes]) -> None:
    path = model(tmp_path, **{key.replace(".", "__"): value})
    assert_refused(lambda: read_config(read(path)[0]))


@pytest.mark.parametrize("arch", ["mamba", "gpt2", "", "x\n" * 300, "LLAMA"])
def test_unknown_architectures_are_named(tmp_path: Path, arch: str) -> None:
    assert_refused(
        lambda: read(model(tmp_path, arch)), "is not supported .supported: llama, qwen2, qwen3, gemma3"
    )


def test_architecture_must_be_there(tmp_path: Path) -> None:
    assert_refused(lambda: read(model(tmp_path, None)), "lacks general.architecture")


def test_tensors_that_do_not_belong(tmp_path: Path) -> None:
    other = gguf_info("blk.0.ssm_a", (32, 8), 0, 0)
    assert_refused(lambda: read(model(tmp_path, tensor=other)), "lacks the tensor token_embd.weight")
    original = config(num_hidden_layers=1)
    for name in ("blk.0.attn_q.scale", "blk.77777.attn_q.weight", "nothing", "blk.0.ffn_gate_exps.weight"):
        path = tmp_path / "y.gguf"
        write_gguf(path, original, weights(original), extra={name: np.zeros((4, 4), np.float32)})
        message = assert_refused(lambda: read(tmp_path / "y.gguf"), "which its architecture does not know")
        assert repr(name) in message
    write_gguf(path, original, weights(original), extra={"rope_factors_long.weight": np.ones(32, np.float32)})
    assert_refused(lambda: read(path), "LongRoPE scaling is not supported")


def test_query_rows_that_are_no_heads(tmp_path: Path) -> None:
    info = gguf_info("blk.0.attn_q.weight", (32, 8), 0, 0)
    pairs = [gguf_pair("general.architecture", 8, gguf_string("llama"))]
    pairs += [gguf_pair(f"llama.{key}", GGUF_NUMBERS[kind], value) for key, (kind, value) in SOUND.items()]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(pairs, [info, gguf_info("token_embd.weight", (32, 8), 0, 1024)], bytes(2048)))
    assert_refused(lambda: read(path), "'blk.0.attn_q.weight' does not have 2 heads' rows")
