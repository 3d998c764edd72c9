"""ONNX Runtime GenAI: its generator loop, as its own benchmark drives it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
from worker import Worker, package_versions, serve, tree_bytes


class OrtWorker(Worker):
    """A directory made by the model builder for its CPU provider."""

    def load(self, model: Path, mode: str, threads: int, options: dict[str, Any]) -> int:
        config = genai.Config(str(model))
        session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.model = genai.Model(config)
        self.notes = [f"model builder -p {mode} -e cpu, all else its defaults"]
        return tree_bytes(model, ".onnx", ".data")

    def versions(self) -> dict[str, str]:
        return package_versions("onnxruntime-genai", "onnxruntime")

    def _generator(self, batch: int, room: int) -> Any:
        parameters = genai.GeneratorParams(self.model)
        # min_length keeps the end token from stopping a sequence.
        parameters.set_search_options(batch_size=batch, max_length=room, min_length=room, do_sample=False)
        return genai.Generator(self.model, parameters)

    def prefill(self, prompt: Sequence[int]) -> float:
        generator = self._generator(1, len(prompt) + 8)
        ids = np.asarray([prompt], np.int32)
        start = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        return time.perf_counter() - start

    def decode(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float, int]:
        count, length = len(prompts), len(prompts[0])
        generator = self._generator(count, length + new_tokens)
        ids = np.asarray(prompts, np.int32)
        start = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        middle = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        end = time.perf_counter()
        produced = generator.token_count() - length
        if produced != new_tokens:
            raise RuntimeError(f"wanted {new_tokens} tokens, got {produced}")
        return middle - start, end - middle, (new_tokens - 1) * count

    def logits(self, tokens: Sequence[int]) -> Any:
        generator = self._generator(1, len(tokens) + 8)
        generator.append_tokens(np.asarray([tokens], np.int32))
        return np.asarray(generator.get_output("logits"), np.float32)[0].copy()


if __name__ == "__main__":
    serve(OrtWorker)
