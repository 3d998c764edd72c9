"""`inspect`, `bench`, `evaluate` and `pull` from the outside: JSON, tables, options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Gristmill, matches
from tests.kits import files, quantised

NONE = type(None)

# ---- inspect -----------------------------------------------------------------------------------------------

CONFIG = {
    "layers": int,
    "hidden_size": int,
    "intermediate_size": int,
    "heads": int,
    "kv_heads": int,
    "head_dim": int,
    "vocab_size": int,
    "context": int,
    "activation": str,
    "norm_eps": float,
    "tied": bool,
    "windows": [{"window": int, "layers": int}],
    "ropes": list,
}
INSPECTED = {
    "model": str,
    "kind": str,
    "name": str,
    "architecture": str,
    "tokenizer": (dict, NONE),
    "files": [{"path": str, "bytes": int}],
    "supported": bool,
    "config": CONFIG,
    "parameters": int,
    "weight_bytes": int,
    "bits_per_weight": float,
    "formats": [{"format": str, "tensors": int, "parameters": int, "bytes": int, "bits_per_weight": float}],
    "kv_bytes_per_token": {"f32": int, "bf16": int, "int4": int, "int4-channel": int},
    "tensors": [{"name": str, "format": str, "shape": [int], "bytes": int}],
}


def test_inspect_a_gguf_file(gristmill: Gristmill) -> None:
    found = gristmill.json("inspect", "smollm2")
    matches(found, INSPECTED)
    assert found["kind"] == "gguf"
    assert found["parameters"] == 134_515_008
    assert {row["format"]: row["tensors"] for row in found["formats"]} == {"Q4_1": 210, "Q8_0": 1, "F32": 61}
    assert len(found["tensors"]) == 272
    assert sum(tensor["bytes"] for tensor in found["tensors"]) == found["weight_bytes"]
    assert found["tokenizer"]["vocabulary"] == 49_152
    assert found["tokenizer"]["eos"] == [{"id": 2, "text": "<|im_end|>"}]
    assert found["tokenizer"]["chat_template"] is True
    assert found["kv_bytes_per_token"] == {
        "f32": 46_080,
        "bf16": 23_040,
        "int4": 6_120,
        "int4-channel": 6_480,
    }
    text = gristmill.text("inspect", "smollm2", "--tensors")
    for fact in (
        "134,515,008 parameters",
        "30 of width 576",
        "8,192 tokens",
        "chat template",
        "blk.29.attn_q.weight",
    ):
        assert fact in text


def test_inspect_the_converted_form(gristmill: Gristmill) -> None:
    found = gristmill.json("inspect", "smollm2", "--weights", "stored")
    matches(found, {**INSPECTED, "recipe": str})
    assert found["kind"] == "checkpoint"
    assert found["architecture"] == "LlamaForCausalLM"
    assert [row["format"] for row in found["formats"]] == ["int4, group 32, min", "int8, group 32", "f32"]
    assert found["config"] == gristmill.json("inspect", "smollm2")["config"]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_inspect_a_hugging_face_directory(gristmill: Gristmill, tmp_path: Path, kind: str) -> None:
    of = files.config(kind)
    weights = files.weights(of)
    path = files.write_huggingface(tmp_path / "hf", of, weights, "BF16", shards=2)
    found = gristmill.json("inspect", str(path))
    matches(found, INSPECTED)
    assert found["tokenizer"] is None
    assert found["parameters"] == sum(values.size for values in weights.values())
    assert found["config"]["windows"] == {
        "mistral": [{"window": 24, "layers": 2}],
        "gemma3_text": [{"window": 24, "layers": 1}, {"window": 0, "layers": 1}],
    }.get(kind, [{"window": 0, "layers": 2}])
    assert gristmill.text("inspect", str(path))


def test_inspect_a_quantised_directory(gristmill: Gristmill, tmp_path: Path) -> None:
    """A matrix counts once, however many parts it is stored as."""
    of = quantised.small()
    config = quantised.scheme(num_bits=4, strategy="group", group_size=32)
    layers = {n: quantised.layer(s, 4, 32, zero=8) for n, s in quantised.linears(of).items()}
    tensors = quantised.stored(of, layers, lambda one: quantised.packed(one, True))
    found = gristmill.json("inspect", str(quantised.write(tmp_path / "hf", of, config, tensors)))
    assert found["supported"] is True
    assert found["parameters"] == sum(values.size for values in files.weights(of).values())
    assert found["weight_bytes"] == sum(values.nbytes for _, values in tensors.values())
    assert {t["format"] for t in found["tensors"] if t["name"] in layers} == {"compressed-tensors"}


def test_export(gristmill: Gristmill, tmp_path: Path, tiny: Path) -> None:
    out = tmp_path / "out"
    result = gristmill.json("export", str(tiny), "-w", "int4", "--as", "compressed-tensors", "-o", str(out))
    assert (result["model"], result["as"], result["path"]) == (str(tiny), "compressed-tensors", str(out))
    assert {file["name"]: file["bytes"] for file in result["files"]} == {
        file.name: file.stat().st_size for file in out.iterdir()
    }
    assert gristmill.json("inspect", str(out))["supported"] is True
    assert str(out) in gristmill.refused(2, "export", str(tiny), "--as", "bf16", "-o", str(out))
    assert "model.safetensors" in gristmill.text(
        "export", str(out), "--as", "f16", "-o", str(tmp_path / "f16")
    )
    assert "--as" in gristmill.refused(2, "export", str(tiny), "-o", str(tmp_path / "x"))
    message = gristmill.refused(
        1, "export", str(tmp_path / "f16"), "--as", "compressed-tensors", "-o", str(tmp_path / "x")
    )
    assert "no linear layer of integers" in message
    assert not (tmp_path / "x").exists()


def test_inspect_what_cannot_run(gristmill: Gristmill, tmp_path: Path) -> None:
    of = files.config()
    path = files.write_huggingface(tmp_path / "hf", of, files.weights(of))
    for changes, reason in (
        ({"architectures": ["QuetzalForCausalLM"]}, "architecture QuetzalForCausalLM is not supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised with 'bitsandbytes'"),
        ({"quantization_config": {"quant_method": "awq", "version": "gemv"}}, "AWQ version 'gemv'"),
    ):
        (path / "config.json").write_text(json.dumps(of | changes))
        found = gristmill.json("inspect", str(path))
        assert found["supported"] is False
        assert reason in found["reason"]
        assert found["parameters"] > 0
        assert "not supported" in gristmill.text("inspect", str(path))


def test_inspect_shows_no_control_characters_of_the_file(gristmill: Gristmill, tmp_path: Path) -> None:
    of = files.config()
    tensors = files.weights(of)
    path = files.write_gguf(tmp_path / "x.gguf", of, tensors, metadata={"general.basename": "x"})[0]
    content = path.read_bytes()
    assert content.count(b"tiny") == 1
    path.write_bytes(content.replace(b"tiny", b"\x1b[2J"))
    text = gristmill.text("inspect", str(path))
    assert "\x1b" not in text
    assert "\\x1b[2J" in text


NODE = {
    "name": str,
    "op": str,
    "count": int,
    "outputs": str,
    "weights": str,
    "formats": str,
    "details": str,
    "operations": (int, float),
    "weight_bytes": (int, float),
    "state_bytes": (int, float),
}


def test_inspect_the_program(gristmill: Gristmill) -> None:
    found = gristmill.json("inspect", "smollm2", "--program")
    total = dict.fromkeys(("operations", "weight_bytes", "state_bytes"), (int, float))
    matches(
        found,
        {
            "model": str,
            "weights": str,
            "kv_dtype": str,
            "step": str,
            "digest": str,
            "columns": [str],
            "nodes": [NODE],
            "total": total,
            "parameters": int,
            "stored_bytes": (int, float),
            "state_bytes_per_token": (int, float),
        },
    )
    assert {"embedding", "rmsnorm", "linear", "attention", "gated", "add", "select_rows"} == {
        node["op"] for node in found["nodes"]
    }
    for key in total:
        assert sum(node[key] for node in found["nodes"]) == pytest.approx(found["total"][key])
    stored = gristmill.json("inspect", "smollm2", "--weights", "stored")
    assert found["parameters"] == stored["parameters"]
    assert found["stored_bytes"] == stored["weight_bytes"]
    assert found["state_bytes_per_token"] == stored["kv_bytes_per_token"]["bf16"]
    formats = {row["format"] for row in stored["formats"]} - {"f32"}
    assert formats == {node["formats"] for node in found["nodes"]} - {""}
    # 30 layers read 512 and the new key and value, and write one: of 2 x 3 x 64 numbers in bf16.
    assert found["total"]["state_bytes"] == 30 * (513 + 1) * 384 * 2
    each = gristmill.json("inspect", "smollm2", "--program", "--layers")
    assert len(each["nodes"]) == sum(node["count"] for node in found["nodes"])
    assert each["total"] == found["total"]
    prompt = gristmill.json("inspect", "smollm2", "--program", "--prefill", "512")
    assert prompt["total"]["operations"] > 300 * found["total"]["operations"]
    batch = gristmill.json("inspect", "smollm2", "--program", "--decode", "16x512", "--kv-dtype", "f32")
    assert batch["total"]["state_bytes"] == 32 * found["total"]["state_bytes"]
    text = gristmill.text("inspect", "smollm2", "--program")
    assert "layers.0-29.mlp.down_proj" in text


def test_inspect_refuses_what_does_not_go_together(gristmill: Gristmill) -> None:
    assert "--program" in gristmill.refused(2, "inspect", "smollm2", "--prefill", "5")
    both = ("--program", "--prefill", "5", "--decode", "1x1")
    assert "one step" in gristmill.refused(2, "inspect", "smollm2", *both)
    assert "16x64" in gristmill.refused(2, "inspect", "smollm2", "--program", "--decode", "1,2")
    assert "at least one" in gristmill.refused(2, "inspect", "smollm2", "--program", "--prefill", "0")


# ---- bench -------------------------------------------------------------------------------------------------


def test_bench(gristmill: Gristmill) -> None:
    options = ("--prefill", "16,32", "--decode", "1x16,2x8", "--decode-steps", "4", "--repeats", "1")
    found = gristmill.json("bench", "smollm2", *options, "--activations", "exact")
    assert {"machine", "model", "modes", "prefill", "decode", "load_s", "first_token_s"} <= set(found)
    assert {"peak_rss_bytes", "weight_bytes"} <= set(found)
    assert [row["tokens"] for row in found["prefill"]] == [16, 32]
    assert [(row["batch"], row["context"]) for row in found["decode"]] == [(1, 16), (2, 8)]
    for row in (*found["prefill"], *found["decode"]):
        assert row["tokens_per_s"] > 0
    assert all(row["roofline_fraction"] > 0 for row in found["decode"])
    assert found["modes"]["activations"] == "exact"
    text = gristmill.text("bench", "smollm2", *options)
    assert "decode 2 x 8" in text


def test_bench_of_the_start(gristmill: Gristmill) -> None:
    found = gristmill.json("bench", "smollm2", "--startup", "--repeats", "1", "--threads", "2")
    assert found["first_token_s"] > 0
    # What the interpreter, its packages and the buffers may take beside the weights.
    weights = gristmill.json("inspect", "smollm2", "--weights", "stored")["weight_bytes"]
    assert weights < found["peak_rss_bytes"] < weights + 150e6
    names = {phase["name"] for phase in found["phases"]}
    assert {"interpreter", "imports", "tokenizer", "weights and kernels", "prefill", "other"} <= names


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prefill", "x"), "128,512"),
        (("--prefill", "0"), "at least 1"),
        (("--decode", "1"), "1x512"),
        (("--repeats", "0"), "repeat"),
        (("--prefill", "9000"), "8192"),
        (("--threads", "0"), "threads"),
    ],
)
def test_bench_refuses(gristmill: Gristmill, options: tuple[str, ...], says: str) -> None:
    assert says in gristmill.refused(2, "bench", "smollm2", *options)


# ---- evaluate ----------------------------------------------------------------------------------------------


def test_evaluate(gristmill: Gristmill, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The miller walked to the river, and the river walked to the mill. " * 20)
    base = ("--base", "smollm2", "--base-weights", "stored", "--text", str(text), "--tokens", "96")
    found = gristmill.json("evaluate", "smollm2", *base, "--window", "48")
    expected = {"tokens", "text", "kl_mean", "kl_p99", "top1_agreement", "perplexity", "base_perplexity"}
    assert expected <= set(found)
    assert found["tokens"] == 96
    assert found["text"] == "text.txt"
    assert 0 < found["kl_mean"] < 0.1
    assert found["top1_agreement"] > 0.8
    same = gristmill.json(
        "evaluate", "smollm2", *base, "--window", "48", "--activations", "exact", "--kv-dtype", "f32"
    )
    assert same["kl_mean"] == pytest.approx(0, abs=1e-9)
    table = gristmill.text("evaluate", "smollm2", *base)
    assert "perplexity" in table


def test_evaluate_refuses_another_tokenizer(gristmill: Gristmill, tiny: Path) -> None:
    options = ("--base", str(tiny), "--base-weights", "stored", "--tokens", "16")
    assert "tokenizer" in gristmill.refused(1, "evaluate", "smollm2", *options)


# ---- pull --------------------------------------------------------------------------------------------------

ENTRY = {"name": str, "model": str, "weights": str, "bytes": int, "source": [str], "stale": bool}


def test_pull_converts_lists_and_prunes(tmp_path: Path) -> None:
    program = Gristmill(tmp_path / "cache")
    of = files.config()
    paths = [
        files.write_gguf(tmp_path / f"{name}.gguf", of, files.weights(of, seed))[0]
        for seed, name in enumerate(("one", "two"))
    ]
    assert program.json("pull", "--list") == []
    assert "no converted models" in program.text("pull", "--list")
    found = program.json("pull", str(paths[0]), "--weights", "stored", "--weights", "int4")
    checkpoint: dict[str, Any] = {"weights": str, "path": str, "bytes": int}
    matches(found, {"model": str, "kind": str, "source": [str], "checkpoints": [checkpoint]})
    assert [made["weights"] for made in found["checkpoints"]] == ["stored", "int4"]
    for made in found["checkpoints"]:
        assert Path(made["path"], "model.safetensors").stat().st_size == made["bytes"]
    assert program.text("pull", str(paths[1]))
    entries = program.json("pull", "--list")
    matches(entries, [ENTRY])
    assert sorted(entry["weights"] for entry in entries) == ["int4", "stored", "stored"]
    assert not any(entry["stale"] for entry in entries)
    # What has lost its source goes; then one by its name; then the rest.
    paths[1].unlink()
    (removed,) = program.json("pull", "--prune")
    assert removed["source"] == [str(paths[1])]
    name = next(entry["name"] for entry in entries if entry["weights"] == "int4")
    assert name in program.text("pull", "--prune", name)
    assert "not a name in the cache" in program.refused(2, "pull", "--prune", name)
    assert len(program.json("pull", "--prune", "--all")) == 1
    assert program.json("pull", "--list") == []


@pytest.mark.parametrize(
    "arguments",
    [(), ("--all", "smollm2"), ("--list", "smollm2"), ("--list", "--prune"), ("--prune", "--all", "x")],
)
def test_pull_refuses_what_does_not_go_together(gristmill: Gristmill, arguments: tuple[str, ...]) -> None:
    gristmill.refused(2, "pull", *arguments)
