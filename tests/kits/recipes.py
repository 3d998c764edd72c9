"""Small models that calibrated methods are applied to, and what such methods have in common."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gristmill import inspect
from gristmill.backends.native import NativeExecutor
from gristmill.backends.reference import ReferenceExecutor
from gristmill.bench.subject import Subject
from gristmill.calibrate.planted import plant
from gristmill.calibrate.stream import Stream
from gristmill.io.checkpoint import Checkpoint
from gristmill.io.convert import prepare
from gristmill.io.json_file import read_object
from gristmill.methods.compress import compress
from gristmill.methods.draft import Draft
from gristmill.methods.recipe import Recipe
from gristmill.models import build_program
from tests.kits import files, models

CALIBRATION = "calibration: {tokens: 128, sequence: 64}\n"
ARCHITECTURES = ("llama-smollm2", "mistral", "qwen2", "qwen3", "gemma3")


def speaking(directory: Path, name: str = "llama-smollm2", planted: float = 0.0) -> Path:
    """A small random model as GGUF, with a tokenizer; with outliers of that factor if `planted`."""
    of = models.configs()[name] | {"vocab_size": 272}
    tensors: Mapping[str, Any] = files.weights(of)
    if planted:
        tensors = plant(build_program(of), tensors, factor=planted)
    return files.write_gguf(directory / f"{name}.gguf", of, dict(tensors))[0]


def draft_of(path: Path, count: int = 3) -> Draft:
    """A draft whose calibration text is random tokens."""
    draft = Draft(Checkpoint.open(prepare(path)))
    vocab = draft.program.vocab_size
    draft.sequences = [models.tokens(40, vocab, seed=i).tolist() for i in range(count)]
    return draft


def applied(draft: Draft, entry: str) -> Draft:
    """The draft after one method of a recipe, written as a flow mapping."""
    recipe = Recipe.from_yaml(f"methods: [{entry}]")
    for one, tensors in zip(recipe.entries, recipe.plan(draft.program), strict=True):
        one.method.apply(draft, one.options, tensors)
    return draft


def hidden(draft: Draft) -> NDArray[np.float32]:
    """What the head reads, for all calibration tokens, of the model as it stands: [tokens, width]."""
    program = draft.program
    weights = {name: draft.weight(name) for name in program.weights}
    stream = Stream(ReferenceExecutor(program, weights), draft.sequences)
    for node in stream:
        if program.output in node.outputs:
            break
    return np.concatenate([rows.numpy() for rows in stream.inputs(node)])


def distance(found: NDArray[np.float32], base: NDArray[np.float32]) -> float:
    """The squared error relative to the squares of the base."""
    return float(np.square(found.astype(float) - base).sum() / np.square(base.astype(float)).sum())


def check_compressed(path: Path, entry: str, directory: Path) -> Checkpoint:
    """Compresses twice, the second time interrupted and resumed: same bytes, and native runs as reference."""
    recipe = Recipe.from_yaml(f"{CALIBRATION}methods: [{entry}]")
    computed: list[int] = []
    steps = 0
    once = Draft.once

    def counting(draft: Draft, key: str, compute: Any) -> Any:
        return once(draft, key, partial(_counted, computed, compute))

    def interrupted(draft: Draft, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return once(draft, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draft, "once", counting)
        compress(path, recipe, directory / "whole", evaluate=False)
        all_steps = len(computed)
        computed.clear()
        patch.setattr(Draft, "once", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(path, recipe, directory / "resumed", evaluate=False)
        patch.setattr(Draft, "once", counting)
        compress(path, recipe, directory / "resumed", evaluate=False)
    assert len(computed) == all_steps - 2
    for file in (directory / "whole").iterdir():
        assert (directory / "resumed" / file.name).read_bytes() == file.read_bytes(), file.name
    made = Checkpoint.open(directory / "whole")
    ids = models.tokens(20, made.program().vocab_size)
    expected = models.logits(ReferenceExecutor.load(made), ids, [20])
    with closing(NativeExecutor.load(directory / "whole", activations="exact", kv_dtype="f32")) as executor:
        assert models.relative_error(models.logits(executor, ids, [20]), expected) < 1e-4
    return made


def _counted(computed: list[int], compute: Any) -> Any:
    computed.append(1)
    return compute()


def one_layer(directory: Path) -> Path:
    """A model of one layer, whose bytes are easily counted: see `check_bits`."""
    of = files.config(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return models.save(directory / "one_layer", of)[0]


def check_bits(made: Path, added: int) -> None:
    """Holds what is told of a checkpoint made of `one_layer` against bytes counted by hand.

    Its linears have 4 bits in groups of 64; added: bytes of what the recipe has put beside them.
    """
    linears = (128 + 64 + 64 + 128 + 256 + 256) * 128 + 128 * 256  # q, k, v, o, gate, up, down
    embedding = 272 * 128
    stored = linears // 2 + linears // 64 * 2 + 4 * embedding + added
    assert (stored, linears + embedding) == (217_600 + added, 182_272)
    bits = 8 * stored / (linears + embedding)
    checkpoint = Checkpoint.open(made)
    assert checkpoint.bits_per_weight == bits
    assert checkpoint.weight_bytes == stored + 4 * 3 * 128  # three norms
    assert read_object(made / "report.json")["bits_per_weight"] == bits
    assert inspect.run(made)["bits_per_weight"] == bits
    with Subject.load(made, threads=1) as subject:
        assert subject.bits_per_weight == bits
        assert subject.weight_bytes == checkpoint.weight_bytes
