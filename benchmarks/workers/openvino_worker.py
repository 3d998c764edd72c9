"""OpenVINO GenAI: its continuous-batching pipeline stepped by hand, so that each phase can be timed.

Logits come from the same model compiled without the pipeline, which keeps only the last position's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from worker import Worker, package_versions, serve

REPORTED = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")


class OpenVinoWorker(Worker):
    """An exported directory; all the plugin's settings but the number of threads are its defaults."""

    def load(self, model: Path, mode: str, threads: int, options: dict[str, Any]) -> int:
        self.folder = model
        self.settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = False
        scheduler.max_num_batched_tokens = 16 * 1024
        scheduler.max_num_seqs = 16
        scheduler.cache_size = 2
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", self.settings)
        self.plain: Any = None
        self.request = 0
        self.notes = ["continuous-batching pipeline, prefix cache off; embedding and head at 8 bits"]
        self.notes.append(", ".join(f"{k}={v}" for k, v in self._properties().items()))
        return (model / "openvino_model.bin").stat().st_size

    def versions(self) -> dict[str, str]:
        return package_versions("openvino-genai", "openvino", "nncf", "optimum-intel")

    def _compiled(self) -> Any:
        if self.plain is None:
            core = openvino.Core()
            network = core.read_model(self.folder / "openvino_model.xml")
            self.plain = core.compile_model(network, "CPU", self.settings)
        return self.plain

    def _properties(self) -> dict[str, str]:
        compiled = self._compiled()
        found = {name: str(compiled.get_property(name)) for name in REPORTED}
        self.plain = None
        return found

    def _submit(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Any]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        handles = []
        for prompt in prompts:
            self.request += 1
            ids = openvino.Tensor(np.asarray([prompt], np.int64))
            handles.append(self.pipeline.add_request(self.request, ids, config))
        return handles

    def prefill(self, prompt: Sequence[int]) -> float:
        first, _, _ = self.decode([prompt], 1)
        return first

    def decode(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float, int]:
        count = len(prompts)
        start = time.perf_counter()
        handles = self._submit(prompts, new_tokens)
        self.pipeline.step()
        middle = time.perf_counter()
        steps = 1
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            steps += 1
        end = time.perf_counter()
        produced = [len(output.generated_ids) for handle in handles for output in handle.read_all()]
        if produced != [new_tokens] * count or steps != new_tokens:
            raise RuntimeError(
                f"wanted {new_tokens} tokens for each of {count}, got {produced} in {steps} steps"
            )
        return middle - start, end - middle, (new_tokens - 1) * count

    def logits(self, tokens: Sequence[int]) -> Any:
        request = self._compiled().create_infer_request()
        ids = np.asarray([tokens], np.int64)
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(len(tokens), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        names = {name for port in self._compiled().inputs for name in port.names}
        request.infer({name: value for name, value in inputs.items() if name in names})
        result = request.get_tensor("logits").data[0].copy()
        self.plain = None
        return result


if __name__ == "__main__":
    serve(OpenVinoWorker)
