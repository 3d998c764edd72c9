"""Quantises the linear layers of a Hugging Face directory with llm-compressor: ``SOURCE OUT MODE``.

MODE is ``gptq`` or ``awq``, ``sym`` or ``asym``, and the group, as ``gptq-asym-g64``. It is calibrated on the
token ids in ``calibration.json`` beside SOURCE, and written as compressed-tensors with 16-bit scales, as the
models are that people pass on; everything else stays float32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Quantise one directory."""
    if not torch.accelerator.is_available():
        # AWQ pins what it keeps, which fails where there is nothing to copy it to.
        torch.Tensor.pin_memory = lambda self: self
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("mode")
    arguments = parser.parse_args()
    method, kind, group = arguments.mode.split("-")
    scheme = {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 4,
            "type": "int",
            "strategy": "group",
            "group_size": int(group.removeprefix("g")),
            "symmetric": {"sym": True, "asym": False}[kind],
        },
    }
    # Rows of 576 are no multiple of 128: the last group is short.
    options = {
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "bypass_divisibility_checks": True,
    }
    recipes = {
        "gptq": lambda: [GPTQModifier(**options)],
        "awq": lambda: [AWQModifier(duo_scaling="both"), QuantizationModifier(**options)],
    }
    ids = json.loads((arguments.source.parent / "calibration.json").read_text())["ids"]
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    model = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.source, local_files_only=True)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=data,
        recipe=recipes[method](),
        num_calibration_samples=len(ids),
        max_seq_length=max(map(len, ids)),
        shuffle_calibration_samples=False,
    )
    for module in model.modules():
        if getattr(module, "weight_scale", None) is not None:
            module.weight_scale.data = module.weight_scale.data.half()
    model.save_pretrained(arguments.out, save_compressed=True)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
