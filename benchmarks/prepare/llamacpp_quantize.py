"""Writes a GGUF file in another type with llama.cpp's own quantiser: ``SOURCE OUT TYPE [--threads N]``.

``--keep-embedding`` leaves embedding and head as floats, so that files differ in their layers alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import llama_cpp

TYPES = {
    "f32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "iq4_nl": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "q4_k_s": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
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
    parser.add_argument("--keep-embedding", action="store_true")
    arguments = parser.parse_args()
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = TYPES[arguments.type]
    settings.nthread = arguments.threads
    settings.allow_requantize = True
    if arguments.keep_embedding:
        settings.token_embedding_type = settings.output_tensor_type = llama_cpp.GGML_TYPE_F32
    status = llama_cpp.llama_model_quantize(
        str(arguments.source).encode(), str(arguments.out).encode(), settings
    )
    if status:
        raise SystemExit(f"llama_model_quantize returned {status}")


if __name__ == "__main__":
    main()
