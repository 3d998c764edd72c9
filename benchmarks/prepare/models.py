"""Makes the model files that the peers read; run by the helper environment's Python.

``from-gguf GGUF OUT``    OUT becomes a Hugging Face directory with the file's weights as float32
``random TOKENIZER OUT``  OUT gets ``hf/`` (bfloat16) and ``model.gguf`` (BF16): a Llama-shaped model of about
                          1 B parameters with random weights, the same in both; the tokenizer is the one of
                          the GGUF file TOKENIZER
``tokens HF OUT``         OUT (JSON) gets the token ids of a text that every Python carries
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# GGUF's name of a block's tensor -> Hugging Face's.
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
RANDOM_SHAPE = {"hidden": 2048, "layers": 16, "ffn": 8192, "heads": 32, "kv_heads": 8, "theta": 500000.0}
CONTROL_TOKEN = 3


def hugging_face_name(name: str) -> str:
    """The Hugging Face name of a Llama tensor that GGUF calls ``name``."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{BLOCK_TENSORS[parts[2]]}.{parts[3]}"
    return f"{OUTER_TENSORS[parts[0]]}.{parts[1]}"


def rows_from_gguf(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo GGUF's row order of q and k, which pairs neighbouring rows for the rotation; ours pairs halves."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def rows_to_gguf(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of ``rows_from_gguf``."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def metadata(reader: gguf.GGUFReader, key: str, default: Any = None) -> Any:
    """A metadata value of the file, or ``default``."""
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def write_tokenizer(reader: gguf.GGUFReader, out: Path) -> None:
    """Write ``tokenizer.json`` and its config for a byte-level BPE vocabulary (digits one by one)."""
    if metadata(reader, "tokenizer.ggml.model") != "gpt2":
        raise SystemExit("only byte-level BPE tokenizers can be written for the peers")
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    kinds = metadata(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[metadata(reader, "tokenizer.ggml.eos_token_id")],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    template = metadata(reader, "tokenizer.chat_template")
    if template:
        config["chat_template"] = template
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def write_config(reader: gguf.GGUFReader, out: Path, dtype: str, shape: dict[str, Any]) -> None:
    """Write ``config.json`` and ``generation_config.json`` of a Llama with this ``shape``."""
    ends = {
        "bos_token_id": metadata(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata(reader, "tokenizer.ggml.eos_token_id"),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape["rope_theta"]},
        **shape,
        **ends,
    }
    (out / "config.json").write_text(json.dumps(config, indent=1))
    (out / "generation_config.json").write_text(json.dumps(ends))


def from_gguf(source: Path, out: Path) -> None:
    """Write the Hugging Face directory of a Llama GGUF file, weights dequantised to float32."""
    reader = gguf.GGUFReader(source)
    architecture = metadata(reader, "general.architecture")
    if architecture != "llama":
        raise SystemExit(f"only 'llama' GGUF files can be converted for the peers, not '{architecture}'")
    heads = metadata(reader, "llama.attention.head_count")
    kv_heads = metadata(reader, "llama.attention.head_count_kv", heads)
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            raise SystemExit("GGUF files with rope_freqs cannot be converted for the peers")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name.endswith("attn_q.weight"):
            values = rows_from_gguf(values, heads)
        elif tensor.name.endswith("attn_k.weight"):
            values = rows_from_gguf(values, kv_heads)
        tensors[hugging_face_name(tensor.name)] = torch.from_numpy(np.ascontiguousarray(values))
    vocabulary, hidden = tensors["model.embed_tokens.weight"].shape
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": metadata(reader, "llama.feed_forward_length"),
        "num_hidden_layers": metadata(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": metadata(reader, "llama.context_length"),
        "rms_norm_eps": metadata(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata(reader, "llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    out.mkdir(parents=True)
    write_config(reader, out, "float32", shape)
    write_tokenizer(reader, out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def random_weights(vocabulary: int, seed: int) -> dict[str, torch.Tensor]:
    """bfloat16 weights of the random model by Hugging Face name; drawn in a fixed order from ``seed``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns).normal_(0.0, columns**-0.5, generator=generator).bfloat16()

    hidden, ffn = RANDOM_SHAPE["hidden"], RANDOM_SHAPE["ffn"]
    kv = hidden * RANDOM_SHAPE["kv_heads"] // RANDOM_SHAPE["heads"]
    tensors = {"model.embed_tokens.weight": draw(vocabulary, hidden), "model.norm.weight": torch.ones(hidden)}
    for layer in range(int(RANDOM_SHAPE["layers"])):
        shapes = {
            "attn_q": (hidden, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, hidden),
            "ffn_gate": (ffn, hidden),
            "ffn_up": (ffn, hidden),
            "ffn_down": (hidden, ffn),
        }
        for name, (rows, columns) in shapes.items():
            tensors[f"model.layers.{layer}.{BLOCK_TENSORS[name]}.weight"] = draw(int(rows), int(columns))
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"model.layers.{layer}.{BLOCK_TENSORS[name]}.weight"] = torch.ones(int(hidden))
    return tensors


def random_model(tokenizer: Path, out: Path, seed: int) -> None:
    """Write the random model as ``out/hf`` and ``out/model.gguf``."""
    reader = gguf.GGUFReader(tokenizer)
    tokens = metadata(reader, "tokenizer.ggml.tokens")
    shape = {
        "vocab_size": len(tokens),
        "hidden_size": RANDOM_SHAPE["hidden"],
        "intermediate_size": RANDOM_SHAPE["ffn"],
        "num_hidden_layers": RANDOM_SHAPE["layers"],
        "num_attention_heads": RANDOM_SHAPE["heads"],
        "num_key_value_heads": RANDOM_SHAPE["kv_heads"],
        "head_dim": RANDOM_SHAPE["hidden"] // RANDOM_SHAPE["heads"],
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": RANDOM_SHAPE["theta"],
        "tie_word_embeddings": True,
    }
    tensors = random_weights(len(tokens), seed)
    folder = out / "hf"
    folder.mkdir(parents=True)
    write_config(reader, folder, "bfloat16", shape)
    write_tokenizer(reader, folder)
    save_file(
        {k: v.bfloat16() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    write_random_gguf(reader, tensors, out / "model.gguf")


def write_random_gguf(reader: gguf.GGUFReader, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write the random model as a BF16 GGUF file with ``reader``'s tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random 1B")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(RANDOM_SHAPE["layers"])
    writer.add_context_length(8192)
    writer.add_embedding_length(RANDOM_SHAPE["hidden"])
    writer.add_feed_forward_length(RANDOM_SHAPE["ffn"])
    writer.add_head_count(RANDOM_SHAPE["heads"])
    writer.add_head_count_kv(RANDOM_SHAPE["kv_heads"])
    writer.add_rope_freq_base(RANDOM_SHAPE["theta"])
    writer.add_rope_dimension_count(RANDOM_SHAPE["hidden"] // RANDOM_SHAPE["heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(metadata(reader, "tokenizer.ggml.tokens")))
    writer.add_tokenizer_model(metadata(reader, "tokenizer.ggml.model"))
    writer.add_tokenizer_pre(metadata(reader, "tokenizer.ggml.pre"))
    writer.add_token_list(metadata(reader, "tokenizer.ggml.tokens"))
    writer.add_token_types(metadata(reader, "tokenizer.ggml.token_type"))
    writer.add_token_merges(metadata(reader, "tokenizer.ggml.merges"))
    writer.add_bos_token_id(metadata(reader, "tokenizer.ggml.bos_token_id"))
    writer.add_eos_token_id(metadata(reader, "tokenizer.ggml.eos_token_id"))
    writer.add_add_bos_token(False)
    ours = {BLOCK_TENSORS[name]: name for name in BLOCK_TENSORS}
    outer = {theirs: name for name, theirs in OUTER_TENSORS.items()}
    for name, original in tensors.items():
        tensor = original
        parts = name.removesuffix(".weight").split(".")
        if parts[1] == "layers":
            target = f"blk.{parts[2]}.{ours['.'.join(parts[3:])]}.weight"
        else:
            target = f"{outer['.'.join(parts)]}.weight"
        if target.endswith("attn_q.weight"):
            tensor = rows_to_gguf(tensor, int(RANDOM_SHAPE["heads"]))
        elif target.endswith("attn_k.weight"):
            tensor = rows_to_gguf(tensor, int(RANDOM_SHAPE["kv_heads"]))
        if tensor.dim() == 1:
            writer.add_tensor(target, tensor.float().numpy())
        else:
            raw = tensor.contiguous().view(torch.int16).numpy().view(np.uint8)
            writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def text_tokens(folder: Path, out: Path, count: int) -> None:
    """Write the first ``count`` token ids of CPython's own help topics, in alphabetical order."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    topics = pydoc_data.topics.topics
    ids: list[int] = []
    for name in sorted(topics):
        ids += tokenizer.encode(topics[name], add_special_tokens=False).ids
        if len(ids) >= count:
            break
    if len(ids) < count:
        raise SystemExit(f"the text has only {len(ids)} tokens, {count} are wanted")
    out.write_text(json.dumps({"text": "pydoc_data.topics", "ids": ids[:count]}))


def main() -> None:
    """Parse the command line and run one step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True)
    for name in ("from-gguf", "random", "tokens"):
        step = steps.add_parser(name)
        step.add_argument("source", type=Path)
        step.add_argument("out", type=Path)
    steps.choices["random"].add_argument("--seed", type=int, default=1)
    steps.choices["tokens"].add_argument("--count", type=int, default=16384)
    arguments = parser.parse_args()
    if arguments.step == "from-gguf":
        from_gguf(arguments.source, arguments.out)
    elif arguments.step == "random":
        random_model(arguments.source, arguments.out, arguments.seed)
    else:
        text_tokens(arguments.source, arguments.out, arguments.count)


if __name__ == "__main__":
    main()
