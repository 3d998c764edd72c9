"""What is run: every engine in every mode, the shapes that are measured, and what a peer cannot do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .files import DEMO, LARGE

NEW_TOKENS = 64


@dataclass(frozen=True)
class Shape:
    """A figure: a prompt of `context` tokens for each of `batch` sequences, and what follows."""

    name: str
    kind: str
    """prefill, decode or generate."""
    batch: int
    context: int

    @property
    def title(self) -> str:
        """For people."""
        if self.kind == "prefill":
            return f"prefill {self.context}"
        through = " through the public interface" if self.kind == "generate" else ""
        return f"decode, batch {self.batch} at {self.context}{through}"


PREFILL = Shape("prefill_512", "prefill", 1, 512)
DECODE = Shape("decode_1x512", "decode", 1, 512)
BATCH = Shape("decode_16x64", "decode", 16, 64)
LONG_BATCH = Shape("decode_16x512", "decode", 16, 512)
GENERATE = Shape("generate_16x64", "generate", 16, 64)
SHAPES = (PREFILL, DECODE, BATCH, LONG_BATCH, GENERATE)


@dataclass(frozen=True)
class Entry:
    """One engine in one mode on one model."""

    engine: str
    mode: str
    environment: str
    model: str
    file: str
    """Below the model's folder."""
    shapes: tuple[Shape, ...]
    isa: str = ""
    """An instruction set that is forced; "" takes the machine's best."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique: model/engine/mode, and the instruction set where one is forced."""
        return "/".join(part for part in (self.model, self.engine, self.mode, self.isa) if part)

    @property
    def script(self) -> str:
        """The worker's file name."""
        return f"{self.engine}_worker.py"

    @property
    def group(self) -> str:
        """Entries of one group are loaded together and take turns."""
        return self.isa or self.model


TITLES = {
    "gristmill": "gristmill",
    "llamacpp": "llama.cpp",
    "openvino": "OpenVINO GenAI",
    "vllm": "vLLM",
    "ortgenai": "ONNX Runtime GenAI",
    "transformers": "Transformers",
}


def entries() -> list[Entry]:
    """Everything, in the order of the report."""
    peers = (PREFILL, DECODE, BATCH, LONG_BATCH)
    single = (PREFILL, DECODE)
    result = []

    def add(
        engine: str,
        mode: str,
        file: str,
        environment: str = "",
        *,
        model: str = DEMO,
        shapes: tuple[Shape, ...] = peers,
        isa: str = "",
    ) -> None:
        options: dict[str, Any] = {"isa": isa} if isa else {}
        if engine == "gristmill":
            # bf16 KV everywhere; integer products for integer weights.
            options |= {"kv_dtype": "bf16"}
        home = environment or ("" if engine == "gristmill" else engine)
        result.append(Entry(engine, mode, home, model, file, shapes, isa, options))

    for mode in ("stored", "int4", "int8", "bf16", "f32"):
        add("gristmill", mode, "model.gguf", shapes=(*peers, GENERATE))
    add("llamacpp", "q4_0", "q4_0.gguf")
    add("llamacpp", "q8_0", "q8_0.gguf")
    add("llamacpp", "q4_1", "model.gguf")
    add("openvino", "int4", "openvino-int4")
    add("openvino", "int8", "openvino-int8")
    add("vllm", "bf16", "hf")
    add("ortgenai", "int4", "ort-int4")
    add("ortgenai", "int8", "ort-int8")
    add("transformers", "bf16", "hf")
    add("transformers", "f32", "hf")

    for mode in ("stored", "int4"):
        add("gristmill", mode, "model.gguf", shapes=single, isa="avx2")
    add("llamacpp", "q4_1", "model.gguf", "llamacpp-avx2", shapes=single, isa="avx2")
    add("llamacpp", "q4_0", "q4_0.gguf", "llamacpp-avx2", shapes=single, isa="avx2")

    add("gristmill", "int4", "model.gguf", model=LARGE, shapes=single)
    add("llamacpp", "q4_0", "q4_0.gguf", model=LARGE, shapes=single)
    add("openvino", "int4", "openvino-int4", model=LARGE, shapes=single)
    add("vllm", "bf16", "hf", model=LARGE, shapes=single)
    add("ortgenai", "int4", "ort-int4", model=LARGE, shapes=single)
    add("transformers", "bf16", "hf", model=LARGE, shapes=single)
    return result


CANNOT = [
    ("llamacpp", "AMX", "its AMX build crashed on a machine that has AMX, so it is compiled without"),
    ("llamacpp", "KV cache", "f16, its default, which is as large as gristmill's bf16"),
    (
        "llamacpp",
        "head and embedding in Q4_0",
        "its quantiser keeps the tied matrix at a higher precision; gristmill's int4 has it at 4 bits, too",
    ),
    ("vllm", "GGUF", "it reads none without a plugin, so it runs the dequantised weights in bf16"),
    ("vllm", "int4", "it needs a checkpoint made by another tool (AWQ, GPTQ); only bf16 is measured"),
    (
        "openvino",
        "GGUF",
        "the model is exported from the dequantised weights and compressed again by nncf, the head at 8 bits",
    ),
    (
        "openvino",
        "logits of all positions",
        "its pipeline keeps the last one's, so quality is that of the same model compiled without it",
    ),
    ("ortgenai", "GGUF", "its model builder rounds the dequantised weights again"),
    ("transformers", "GGUF's codes", "it dequantises them at load; it runs bf16 and f32"),
]
"""(engine, what, why): what a peer cannot do, or does otherwise, whatever happens in a run."""
