"""Small random models of every architecture: on disk, in Transformers, and through our executors.

`logits_by_transformers` is the witness; `logits` runs any of our executors over the same tokens with a given
schedule of chunks. Weights are made here, so that Transformers, GGUF and safetensors hold the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.program.batch import GENERATED, PROMPT, Batch, Executor
from tests.kits import files

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def configs() -> dict[str, dict[str, Any]]:
    """Config of every case by name. Widths are multiples of no power of two where the models allow it."""
    c = files.config
    return {
        "llama": c("llama", hidden_size=192, intermediate_size=328),
        # The shape of SmolLM2: 9 heads of 64 that share 3, tied.
        "llama-smollm2": c(
            "llama",
            hidden_size=576,
            intermediate_size=264,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        ),
        "llama-llama3": c("llama", hidden_size=128, head_dim=32, rope_scaling=LLAMA3_ROPE),
        "llama-linear": c(
            "llama", hidden_size=128, head_dim=32, rope_scaling={"rope_type": "linear", "factor": 4.0}
        ),
        "llama-biases": c("llama", hidden_size=96, head_dim=96, attention_bias=True, mlp_bias=True),
        "mistral": c("mistral", hidden_size=160, head_dim=80, intermediate_size=200),
        "mistral-global": c("mistral", hidden_size=160, sliding_window=None),
        "qwen2": c("qwen2", hidden_size=128, head_dim=32, vocab_size=277),
        "qwen2-tied": c("qwen2", hidden_size=128, head_dim=32, tie_word_embeddings=True),
        # Rows of whole kibibytes, which buffers spread apart.
        "qwen3-256": c("qwen3", hidden_size=256, head_dim=64, num_attention_heads=4, intermediate_size=512),
        "qwen3": c("qwen3", hidden_size=144, head_dim=48, attention_bias=False),
        "gemma3": c("gemma3_text", hidden_size=160, head_dim=96, query_pre_attn_scalar=40),
        "gemma3-linear": c(
            "gemma3_text",
            hidden_size=256,
            head_dim=128,
            query_pre_attn_scalar=128,
            num_key_value_heads=1,
            num_hidden_layers=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_theta=1000000.0,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
    }


def tokens(count: int, vocab: int, seed: int = 0) -> NDArray[np.int32]:
    """Random token ids."""
    return np.random.default_rng([seed, 5]).integers(0, vocab, count).astype(np.int32)


def logits_by_transformers(
    of: Mapping[str, Any], tensors: files.Tensors, ids: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Logits of every position by Transformers' eager attention in float32: [tokens, vocab]."""
    import torch
    import transformers

    keys = {k: v for k, v in of.items() if k not in ("architectures", "model_type", "dtype")}
    known = transformers.CONFIG_MAPPING[of["model_type"]](**keys, attn_implementation="eager")
    model_class = getattr(transformers, of["architectures"][0])
    model = model_class(known).to(torch.float32).eval()
    state = {name: torch.from_numpy(values) for name, values in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if of["tie_word_embeddings"] else set()
    assert set(missing) <= tied, missing
    assert not unexpected, unexpected
    model.tie_weights()
    with torch.no_grad():
        result = model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]
    return result.numpy()


def logits(
    executor: Executor, ids: NDArray[np.int32], chunks: Sequence[int], prompt: int | None = None
) -> NDArray[np.float32]:
    """Logits of every position [tokens, vocab], from one sequence fed in chunks of these sizes.

    Tokens from `prompt` on count as generated.
    """
    assert sum(chunks) == len(ids)
    view = executor.allocate(len(ids))
    phases = np.full(len(ids), PROMPT, np.uint8)
    phases[len(ids) if prompt is None else prompt :] = GENERATED
    parts, start = [], 0
    for size in chunks:
        part = slice(start, start + size)
        rows = np.arange(size, dtype=np.int32)
        batch = Batch(ids[part], np.array([size], np.int32), (view,), rows, phases[part])
        parts.append(executor.step(batch))
        start += size
    assert view.length == len(ids)
    view.close()
    return np.concatenate(parts)


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """max|a - b| / max|b|; infinite where something is not finite or of another shape."""
    if found.shape != expected.shape or not np.all(np.isfinite(found)):
        return float("inf")
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def save(directory: Path, of: Mapping[str, Any], seed: int = 0) -> tuple[Path, files.Tensors]:
    """Writes a Hugging Face directory with random weights; the directory and the weights."""
    tensors = files.weights(of, seed)
    return files.write_huggingface(directory, of, tensors), tensors


def check_rounded(found: NDArray[Any], expected: NDArray[Any], most: float = 0.1) -> None:
    """Holds logits [tokens, vocab] of a model whose inputs are rounded against an oracle's.

    A value next to a tie may take another code, and what follows then differs by as much as a code does; a
    row before any such place is the oracle's but for float32. most: bound of all rows' errors.
    """
    rows = np.abs(found - expected).max(-1) / np.abs(expected).max()
    assert np.all(np.isfinite(rows))
    assert rows.min() < 1e-5
    assert rows.max() < most
