"""llama.cpp through the C interface that llama-cpp-python binds, as its own benchmark tool drives it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from worker import Worker, package_versions, serve

MICRO_BATCH = 512


class LlamaWorker(Worker):
    """One GGUF file; a context is made for each shape of request and kept."""

    def load(self, model: Path, mode: str, threads: int, options: dict[str, Any]) -> int:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(model).encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {model.name}")
        self.threads = threads
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.contexts: dict[tuple[int, int], Any] = {}
        features = llama_cpp.llama_print_system_info().decode()
        if "AMX" in features:
            raise RuntimeError("this build of llama.cpp has AMX on; rebuild the environment")
        expected = options.get("isa")
        if expected == "avx2" and "AVX512" in features:
            raise RuntimeError("this build of llama.cpp has AVX-512 on; rebuild the environment")
        self.notes = ["built without AMX", f"KV f16, flash attention auto; {features.strip(' |')}"]
        return model.stat().st_size

    def versions(self) -> dict[str, str]:
        return package_versions("llama-cpp-python")

    def _open(self, tokens: int, sequences: int) -> Any:
        """The context with room for ``tokens`` tokens in all, emptied."""
        context = self.contexts.get((tokens, sequences))
        if context is None:
            settings = llama_cpp.llama_context_default_params()
            settings.n_ctx = tokens
            settings.n_batch = max(2048, MICRO_BATCH)
            settings.n_ubatch = MICRO_BATCH
            settings.n_seq_max = sequences
            settings.n_threads = self.threads
            settings.n_threads_batch = self.threads
            settings.no_perf = True
            context = llama_cpp.llama_init_from_model(self.model, settings)
            if not context:
                raise RuntimeError("llama.cpp could not make a context")
            self.contexts[tokens, sequences] = context
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        return context

    def _step(self, context: Any, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """One ``llama_decode`` of rows (token, position, sequence, wants logits)."""
        batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for index, (token, position, sequence, wanted) in enumerate(rows):
                batch.token[index] = token
                batch.pos[index] = position
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = int(wanted)
            status = llama_cpp.llama_decode(context, batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            llama_cpp.llama_synchronize(context)
        finally:
            llama_cpp.llama_batch_free(batch)

    def _rows(self, context: Any, count: int) -> np.ndarray:
        """The last step's logits, float32 [count, vocab], as a view."""
        pointer = llama_cpp.llama_get_logits(context)
        address = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(address, shape=(count, self.vocab))

    def prefill(self, prompt: Sequence[int]) -> float:
        context = self._open(_room(len(prompt)), 1)
        start = time.perf_counter()
        self._step(context, [(t, i, 0, i + 1 == len(prompt)) for i, t in enumerate(prompt)])
        self._rows(context, 1).argmax(-1)
        return time.perf_counter() - start

    def decode(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float, int]:
        count = len(prompts)
        context = self._open(_room(len(prompts[0]) + new_tokens) * count, count)
        current = np.zeros(count, np.int64)
        start = time.perf_counter()
        per_step = max(1, 2048 // len(prompts[0]))
        for base in range(0, count, per_step):
            chunk = range(base, min(base + per_step, count))
            rows = [(t, i, s, i + 1 == len(prompts[s])) for s in chunk for i, t in enumerate(prompts[s])]
            self._step(context, rows)
            current[chunk.start : chunk.stop] = self._rows(context, len(chunk)).argmax(-1)
        middle = time.perf_counter()
        for step in range(new_tokens - 1):
            self._step(context, [(int(current[s]), len(prompts[s]) + step, s, True) for s in range(count)])
            current = self._rows(context, count).argmax(-1)
        end = time.perf_counter()
        return middle - start, end - middle, (new_tokens - 1) * count

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        context = self._open(_room(len(tokens)), 1)
        parts = []
        for base in range(0, len(tokens), MICRO_BATCH):
            chunk = tokens[base : base + MICRO_BATCH]
            self._step(context, [(t, base + i, 0, True) for i, t in enumerate(chunk)])
            parts.append(self._rows(context, len(chunk)).copy())
        return np.concatenate(parts)


def _room(tokens: int) -> int:
    return (tokens + 255) // 256 * 256


if __name__ == "__main__":
    serve(LlamaWorker)
