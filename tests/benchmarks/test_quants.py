"""The comparison at equal bits: what is counted, what is compared, what is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quants
from harness import files
from harness.environments import ENVIRONMENT, HERE

from gristmill.errors import UsageError
from gristmill.io.convert import import_gguf, import_huggingface
from gristmill.methods.recipe import Recipe
from tests.kits import files as kit
from tests.kits import quantised


def test_every_peer_has_a_worker_an_environment_and_a_recipe():
    for quant in quants.theirs():
        assert quant.tool in quants.TOOLS
        for entry in (quant.alone, quant.own):
            assert (HERE / "workers" / entry.script).exists()
            assert entry.environment == "" or entry.environment in ENVIRONMENT
            assert callable(files._recipe(f"{entry.model}/{entry.file}"))


def test_options_are_changed_where_there_are_any():
    text = "methods:\n- {method: smoothquant_plus, group: 64, quantise: false}\n- {method: gptq, group: 64}\n"
    changed = quants.changed(Recipe.from_yaml(f"name: x\n{text}"), "g128", group=128)
    assert changed.name == "x-g128"
    assert [entry.options.group for entry in changed.entries] == [128, 128]
    assert Recipe.from_yaml(changed.to_yaml()).to_yaml() == changed.to_yaml()


def test_new_rows_take_the_place_of_old_ones():
    head = {"text": "t", "text_sha256": "0", "tokens": 8, "window": 4, "base": "b"}
    old = {**head, "quants": [row("a", "gristmill", 4, 1), row("b", "llamacpp", 4, 1)]}
    new = {**head, "quants": [row("b", "llamacpp", 4, 2), row("c", "gristmill", 5, 3)]}
    merged = quants.merged(old, new)
    assert [r["name"] for r in merged["quants"]] == ["a", "b", "c"]
    assert merged["quants"][1] == new["quants"][0]
    with pytest.raises(UsageError, match="tokens"):
        quants.merged({**old, "tokens": 16}, new)


def test_bits_are_those_of_the_layers_alone(tmp_path: Path):
    of = kit.config(hidden_size=256, intermediate_size=512, head_dim=64)
    path = kit.write_gguf(tmp_path / "x.gguf", of, kit.weights(of), "Q4_1")[0]
    assert quants.gguf_bits(path) == 5
    (tmp_path / "c").mkdir()
    import_gguf([path], tmp_path / "c")
    assert quants.directory_bits(tmp_path / "c") == pytest.approx(5, rel=1e-6)


def test_bits_count_zeros_and_shapes(tmp_path: Path):
    of = quantised.small(hidden_size=128, intermediate_size=256, num_attention_heads=4)
    made = {name: quantised.layer(shape, 4, 32) for name, shape in quantised.linears(of).items()}
    tensors = quantised.stored(of, made, lambda one: quantised.packed(one, False))
    config = quantised.scheme(num_bits=4, symmetric=False, strategy="group", group_size=32)
    source = quantised.write(tmp_path / "m", of, config, tensors)
    weights = sum(one.codes.size for one in made.values())
    # Codes, a float16 scale and a 4-bit zero per group, and 16 bytes of shape per matrix.
    assert quants.directory_bits(source) == pytest.approx(4 + 20 / 32 + len(made) * 128 / weights)
    (tmp_path / "c").mkdir()
    import_huggingface(source, tmp_path / "c")
    # Here the zeros are float32 minimums beside float32 scales.
    assert quants.directory_bits(tmp_path / "c") == pytest.approx(4 + 64 / 32)


def row(name: str, tool: str, bits: float, kl: float, *, on_grid: bool = False) -> dict[str, Any]:
    figures = {"kl_mean": kl, "top1_agreement": 0.9, "perplexity": 10.0}
    part = {"figures": figures, "failure": None}
    return {"name": name, "tool": tool, "bits": bits, "on_grid": on_grid, "weights": part, "own": part}


def test_a_peer_meets_the_best_of_ours_with_no_more_bits():
    failed = {"figures": None, "failure": {"kind": "setup", "reason": "no compiler"}}
    result = {
        "text": "a text", "tokens": 9, "window": 3,
        "quants": [
            row("a", "gristmill", 4.25, 0.3), row("b", "gristmill", 4.5, 0.2), row("c", "gristmill", 5, 0.1),
            row("d", "gristmill", 4.4, 0.01, on_grid=True),
            row("Q4_0", "llamacpp", 4.5, 0.25), row("gptq", "llmcompressor", 4.25, 0.25),
            row("Q4_1", "llamacpp", 5, 0.0, on_grid=True), row("tiny", "llamacpp", 2, 2.0),
            {**row("awq", "llmcompressor", 4.5, 0), "bits": None, "weights": failed, "own": failed},
        ],
    }  # fmt: skip
    found = {verdict["peer"]: (verdict["ours"], verdict["lower"]) for verdict in quants.against(result)}
    assert found == {
        "llama.cpp Q4_0": ("b", True),
        "llm-compressor gptq": ("a", False),
        "llama.cpp tiny": (None, False),
    }
    result["quants"][1]["own"] = row("b", "gristmill", 4.5, 0.3)["own"]  # int8 activations may cost more
    assert [v["lower"] for v in quants.against(result, "own")] == [False, False, False]
    text = "\n".join(quants.table(result))
    assert "| llama.cpp Q4_0 | 4.50 | 0.2500 | a | 4.25 | 0.3000 | no |" in text
    assert "| 5.00 | llama.cpp | Q4_1 = | 0.0000 | 90.0 | 10.000 | 0.0000 |" in text
    assert "| llama.cpp Q4_0 | 4.50 | 0.2500 | b | 4.50 | 0.2000 | yes |" in text
    assert "- llm-compressor awq: setup: no compiler" in text
