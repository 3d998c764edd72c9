"""Writes a GGUF file in another type with llama.cpp's own quantiser: ``SOURCE OUT TYPE [--threads N]``."""

from __future__ import annotations

import argparse
from pathlib import Path

import llama_cpp

TYPES = {
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}


def main() -> None:
    """Quantise one file; already quantised tensors are dequantised first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("type", choices=sorted(TYPES))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = TYPES[arguments.type]
    settings.nthread = arguments.threads
    settings.allow_requantize = True
    status = llama_cpp.llama_model_quantize(
        str(arguments.source).encode(), str(arguments.out).encode(), settings
    )
    if status:
        raise SystemExit(f"llama_model_quantize returned {status}")


if __name__ == "__main__":
    main()
