"""A model loaded in one mode, to be measured: what bench and evaluate run on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gristmill.io.expected import bits_per_weight, expected_tensors
from gristmill.program.costs import parameters, weight_total

if TYPE_CHECKING:
    from gristmill.api import Model
    from gristmill.backends.native.executor import NativeExecutor
    from gristmill.io.checkpoint import Progress
    from gristmill.io.lora import Adapters, Strengths
    from gristmill.io.tokenizer import Tokenizer


@dataclass
class Subject:
    """A context manager around a native executor that knows what it was loaded from."""

    name: str
    path: Path
    weights: str
    executor: NativeExecutor
    context: int
    """Longest sequence the model was made for."""
    load_s: float
    """Seconds to open the converted checkpoint and to have its weights ready."""

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        weights: str = "stored",
        activations: str | None = None,
        kv_dtype: str | None = None,
        threads: int | None = None,
        lora: Adapters = (),
        lora_strength: Strengths = 1.0,
        progress: Progress | None = None,
    ) -> Subject:
        """Converts the model if it is not in the cache yet (not part of `load_s`) and loads it.

        Raises ModelError and UsageError as loading does everywhere.
        """
        from gristmill.backends.native.executor import NativeExecutor
        from gristmill.io.convert import prepare
        from gristmill.io.lora import open_adapted
        from gristmill.models import read_config

        prepare(model, weights, progress)
        begin = time.perf_counter()
        path = prepare(model, weights)
        checkpoint = open_adapted(path, lora, lora_strength)
        executor = NativeExecutor.load(
            checkpoint, activations=activations, kv_dtype=kv_dtype, threads=threads
        )
        load_s = time.perf_counter() - begin
        context = read_config(_config(path)).max_positions
        # A path would tell about the machine; its last part names the model.
        name = Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else str(model)
        return cls(name, path, weights, executor, context, load_s)

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *exc: object) -> None:
        self.executor.close()

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, read anew."""
        from gristmill.io.tokenizer import Tokenizer

        return Tokenizer.load(self.path)

    def model(self) -> Model:
        """The executor behind the public interface. Not to be closed: the executor stays this object's."""
        from gristmill.api import Model
        from gristmill.engine.sampling import SamplingParams

        return Model(
            self.name,
            self.path,
            self.executor,
            self.tokenizer(),
            context=self.context,
            defaults=SamplingParams(),
            weights=self.weights,
            load_s=self.load_s,
        )

    def stored_bytes(self, name: str) -> float:
        """Bytes of a tensor as it lies in memory, padding included."""
        weight = self.executor.weights.get(name)
        return weight.nbytes if weight else 4 * prod(self.executor.program.weights[name].shape)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, each once however many nodes read it."""
        return int(weight_total(self.executor.program, self.stored_bytes))

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return parameters(self.executor.program)

    @property
    def bits_per_weight(self) -> float:
        """Bits in memory for the matrices per weight of the config's model, adapters included."""
        stored = {name: self.stored_bytes(name) for name in self.executor.program.weights}
        return bits_per_weight(expected_tensors(_config(self.path)), stored)

    def head(self) -> str:
        """How the matrix of the output head is stored: f32, bf16, f16, int8 or int4."""
        program = self.executor.program
        last = next(node for node in program.nodes if program.output in node.outputs)
        return self.executor.weights[last.weights[0]].storage

    def arithmetic(self) -> str:
        """What the activations of the linear layers are encoded as: f32, bf16, int8, or several of them."""
        executor = self.executor
        if executor.activations != "fast":
            return {"exact": "f32", "bf16": "bf16"}[executor.activations]
        kinds = {
            "int8" if w.integer else "f32" if w.storage == "f32" else "bf16"
            for w in executor.weights.values()
        }
        prompts = executor.prompt_activations
        return "+".join(sorted(kinds)) + ("" if prompts == "fast" else f" (prompts {prompts})")

    def modes(self) -> dict[str, Any]:
        """What every figure names: weights, activations, KV, head, bits, threads, kernels, where they lie."""
        return {
            "weights": self.weights,
            "activations": self.executor.activations,
            "prompt_activations": self.executor.prompt_activations,
            "arithmetic": self.arithmetic(),
            "kv_dtype": self.executor.kv_dtype,
            "head": self.head(),
            "bits_per_weight": self.bits_per_weight,
            "threads": self.executor.threads,
            "level": self.executor.level,
            "weights_in": "arena" if self.executor.weights_in_arena else "mapped file",
        }


def _config(path: Path) -> dict[str, Any]:
    from gristmill.io.json_file import read_object

    return read_object(path / "config.json")
