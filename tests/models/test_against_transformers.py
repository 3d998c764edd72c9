"""Every architecture against Transformers, in float32: prefill, chunks, decode; from safetensors and GGUF."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gristmill.backends.native import NativeExecutor
from gristmill.backends.reference import ReferenceExecutor
from gristmill.io import convert
from tests.kits import files, models

LENGTH = 70  # nearly three windows of 24
TOLERANCE = 1e-4
SCHEDULES = {
    "prefill": ([LENGTH], None),
    "chunks": ([16, 16, 1, 5, 32], None),
    "decode": ([30] + [1] * (LENGTH - 30), 30),
}
NAMES = list(models.configs())


class Case:
    """One model on disk with the logits that are expected of it."""

    def __init__(self, name: str, directory: Path) -> None:
        self.config = models.configs()[name]
        source, self.tensors = models.save(directory / "hf", self.config)
        self.checkpoint = directory / "checkpoint"
        self.checkpoint.mkdir()
        convert.import_huggingface(source, self.checkpoint)
        self.ids = models.tokens(LENGTH, self.config["vocab_size"])
        self.expected = models.logits_by_transformers(self.config, self.tensors, self.ids)

    def check(self, executor: Any, schedule: str) -> None:
        chunks, prompt = SCHEDULES[schedule]
        found = models.logits(executor, self.ids, chunks, prompt)
        assert models.relative_error(found, self.expected) <= TOLERANCE


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def native(case: Case) -> Iterator[NativeExecutor]:
    executor = NativeExecutor.load(case.checkpoint, activations="exact", kv_dtype="f32", threads=2)
    yield executor
    executor.close()


@pytest.fixture(scope="module")
def reference(case: Case) -> ReferenceExecutor:
    return ReferenceExecutor.load(case.checkpoint)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_native(case: Case, native: NativeExecutor, schedule: str) -> None:
    case.check(native, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reference(case: Case, reference: ReferenceExecutor, schedule: str) -> None:
    case.check(reference, schedule)


def test_reference_in_float64_is_nearer(case: Case, native: NativeExecutor) -> None:
    """The native float32 agrees with float64 to rounding: far within what the architectures may differ by."""
    exact = models.logits(ReferenceExecutor.load(case.checkpoint, dtype="float64"), case.ids, [LENGTH])
    assert models.relative_error(models.logits(native, case.ids, [LENGTH]), exact) <= 1e-5


@pytest.mark.parametrize(
    "case", [n for n, c in models.configs().items() if c.get("sliding_window")], indirect=True, scope="module"
)
def test_the_window_matters(case: Case) -> None:
    """The comparison can fail: a window wider by one gives other logits."""
    wider = case.config | {"sliding_window": case.config["sliding_window"] + 1}
    other = models.logits_by_transformers(wider, case.tensors, case.ids)
    assert models.relative_error(other, case.expected) > 10 * TOLERANCE


GGUF_METADATA: dict[str, dict[str, Any]] = {
    "llama-linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "gemma3-linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
}


def llama3_factors(rope: dict[str, Any], theta: float, head_dim: int) -> NDArray[np.float32]:
    """What a converter writes as rope_freqs.weight: by how much each frequency is divided."""
    low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


# What a GGUF file cannot say: feed-forward biases, a Mistral without a window (it is a llama there), and a
# Gemma 3 whose query_pre_attn_scalar is not its head_dim.
GGUF_NAMES = [n for n in NAMES if n not in ("llama-biases", "mistral-global", "gemma3")]


@pytest.mark.parametrize("case", GGUF_NAMES, indirect=True, scope="module")
def test_gguf(case: Case, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    name = request.node.callspec.params["case"]
    extra = {}
    if name == "llama-llama3":
        extra["rope_freqs.weight"] = llama3_factors(models.LLAMA3_ROPE, 10000.0, case.config["head_dim"])
    paths = files.write_gguf(
        tmp_path / "x.gguf", case.config, case.tensors, metadata=GGUF_METADATA.get(name), extra=extra
    )
    out = tmp_path / "checkpoint"
    out.mkdir()
    convert.import_gguf(paths, out)
    executor = NativeExecutor.load(out, activations="exact", kv_dtype="f32", threads=1)
    found = models.logits(executor, case.ids, [40] + [1] * 30, 40)
    executor.close()
    assert models.relative_error(found, case.expected) <= TOLERANCE
