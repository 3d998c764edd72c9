"""Transformers: the model class called directly with its own cache, its fastest plain path on a CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from worker import Worker, package_versions, serve, tree_bytes

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class TransformersWorker(Worker):
    """A Hugging Face directory in float32 or bfloat16, attention by SDPA."""

    def load(self, model: Path, mode: str, threads: int, options: dict[str, Any]) -> int:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=TYPES[mode], attn_implementation="sdpa", local_files_only=True
        ).eval()
        self.folder = model
        self.notes = [f"KV {mode}, sdpa attention, eager (no torch.compile)"]
        return tree_bytes(model, ".safetensors")

    def versions(self) -> dict[str, str]:
        return package_versions("transformers", "torch")

    def _forward(self, ids: torch.Tensor, cache: DynamicCache, keep: int) -> torch.Tensor:
        result = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        return result.logits

    def prefill(self, prompt: Sequence[int]) -> float:
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        self._forward(ids, DynamicCache(config=self.model.config), 1).argmax(-1)
        return time.perf_counter() - start

    def decode(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, float, int]:
        cache = DynamicCache(config=self.model.config)
        start = time.perf_counter()
        current = self._forward(torch.tensor(prompts), cache, 1).argmax(-1)
        middle = time.perf_counter()
        for _ in range(new_tokens - 1):
            current = self._forward(current, cache, 1).argmax(-1)
        end = time.perf_counter()
        return middle - start, end - middle, (new_tokens - 1) * len(prompts)

    def continuations(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[tuple[list[int], str]]:
        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        found = []
        for prompt in prompts:
            cache = DynamicCache(config=self.model.config)
            current = self._forward(torch.tensor([prompt]), cache, 1).argmax(-1)
            ids = [int(current)]
            while len(ids) < new_tokens:
                current = self._forward(current, cache, 1).argmax(-1)
                ids.append(int(current))
            found.append((ids, tokenizer.decode(ids, skip_special_tokens=True)))
        return found

    def logits(self, tokens: Sequence[int]) -> Any:
        cache = DynamicCache(config=self.model.config)
        return self._forward(torch.tensor([tokens]), cache, 0)[0].float().numpy()


if __name__ == "__main__":
    serve(TransformersWorker)
