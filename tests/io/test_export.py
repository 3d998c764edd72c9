"""Export: what is written reads back as it was, code for code, here and elsewhere."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from gristmill.backends.reference import ReferenceExecutor
from gristmill.errors import GristmillError, ModelError, UsageError
from gristmill.formats import dense, group_int
from gristmill.formats.packed import Packed, decode, decode_f32
from gristmill.io import checkpoint, convert
from gristmill.io.checkpoint import Checkpoint, Item, Matrix, Vector
from gristmill.io.convert import import_gguf, import_huggingface
from gristmill.io.export import FORMS, export, export_compressed_tensors, export_dense
from gristmill.io.safetensors import SafetensorsFile
from gristmill.methods.compress import compress
from gristmill.methods.recipe import Recipe
from gristmill.models import build_program
from gristmill.program.edits import add_branch, foldable_edits, keep_keys, round_inputs
from gristmill.program.nodes import Program
from tests.kits import files, models, quantised
from tests.kits import recipes as kit
from tests.kits.hostile import assert_one_line, assert_refused


def written(
    directory: Path,
    of: dict[str, Any],
    packed: dict[str, Packed],
    program: Program | None = None,
    more: dict[str, NDArray[np.float32]] | None = None,
) -> Path:
    """A checkpoint with these matrices; all others, `more` for the program among them, are bf16."""
    items: dict[str, Item] = {}
    for name, values in {**files.weights(of), **(more or {})}.items():
        if values.ndim == 1:
            items[name] = Vector(len(values), lambda v=values: v)
        else:
            matrix = packed.get(name) or dense.pack(values, "bf16")
            items[name] = Matrix(matrix.spec, matrix.rows)
    directory.mkdir()
    checkpoint.write(directory, of, items, report={}, recipe="", program=program)
    return directory


def integers(one: quantised.Layer, *, mins: bool, offset: int, half: bool = False) -> Packed:
    """A layer of the kit as a packed matrix, with its zeros as minimums or as the offset."""
    scales = one.scales.astype(np.float16 if half else np.float32)
    low = (one.scales * (offset - one.zeros)).astype(np.float32) if mins else None
    return group_int.pack(
        one.codes.astype(np.uint8), scales, low, bits=one.bits, group=one.group, offset=offset
    )


def back(exported: Path, directory: Path) -> Checkpoint:
    directory.mkdir()
    import_huggingface(exported, directory)
    return Checkpoint.open(directory)


@pytest.mark.parametrize("mode", ["int4", "int8"])
@pytest.mark.parametrize("tie", [True, False])
def test_converted_models_come_back_code_for_code(tmp_path: Path, mode: str, tie: bool) -> None:
    of = models.configs()["llama-smollm2"] | {"tie_word_embeddings": tie, "intermediate_size": 320}
    source, _ = models.save(tmp_path / "hf", of)
    (source / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    for name in ("stored", mode):
        (tmp_path / name).mkdir()
    import_huggingface(source, tmp_path / "stored")
    convert._requantise(tmp_path / "stored", tmp_path / mode, mode, None)
    steps: list[tuple[int, int]] = []
    export_compressed_tensors(
        tmp_path / mode, tmp_path / "out", lambda _, done, total: steps.append((done, total))
    )
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] > 0
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"add_bos_token": True}
    first, second = Checkpoint.open(tmp_path / mode), back(tmp_path / "out", tmp_path / "back")
    assert {key: second.config[key] for key in of} == of
    for name in first.names():
        if name not in first.specs:
            assert np.array_equal(first.vector(name), second.vector(name))
        elif name == "model.embed_tokens.weight":
            assert np.array_equal(decode_f32(first.packed(name)), decode_f32(second.packed(name)))
        else:
            assert first.specs[name] == second.specs[name]
            for part, array in first.packed(name).arrays.items():
                assert np.array_equal(array, second.packed(name).arrays[part]), (name, part)
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert found["ignore"] == (["lm_head"] if tie else [])
    assert [group["targets"] for group in found["config_groups"].values()] == [["Linear"]]


def test_mixed_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scheme at once, float layers among them, in the smallest pieces."""
    monkeypatch.setattr("gristmill.io.export._PIECE", 1)
    of = quantised.small(vocab_size=275)
    names = list(quantised.linears(of))
    shapes = quantised.linears(of)

    def layer(index: int, *args: Any, **options: Any) -> quantised.Layer:
        return quantised.layer(shapes[names[index]], *args, **options)

    packed = {
        names[0]: integers(layer(0, 4, 32, zero=8), mins=False, offset=8, half=True),
        names[1]: integers(layer(1, 4, 32), mins=True, offset=0),
        names[2]: integers(layer(2, 8, 96, zero=128), mins=False, offset=128),
        names[3]: integers(layer(3, 8, 16), mins=True, offset=128),
        names[4]: integers(layer(4, 4, 96, zero=3), mins=False, offset=3, half=True),
        "lm_head.weight": integers(quantised.layer((275, 96), 4, 32), mins=True, offset=0),
        "model.embed_tokens.weight": integers(quantised.layer((275, 96), 4, 64), mins=True, offset=0),
    }
    export_compressed_tensors(written(tmp_path / "c", of, packed), tmp_path / "out")
    second = back(tmp_path / "out", tmp_path / "back")
    for name, matrix in packed.items():
        assert np.array_equal(decode(second.packed(name)), decode(matrix)), name
        if name != "model.embed_tokens.weight":
            assert np.array_equal(group_int.unpack(second.packed(name))[0], group_int.unpack(matrix)[0])
    assert second.specs[names[5]].format == "bf16"
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["ignore"] == [name.removesuffix(".weight") for name in names[5:]]
    targets = [target for group in quantization["config_groups"].values() for target in group["targets"]]
    linear = set(packed) - {"model.embed_tokens.weight"}
    assert sorted(targets) == sorted(name.removesuffix(".weight") for name in linear)


def test_the_words_are_those_of_the_encoder(tmp_path: Path) -> None:
    of = quantised.small()
    for at, symmetric in enumerate((True, False)):
        layers = {
            name: quantised.layer(shape, 4, 32, zero=8 if symmetric else None, dtype="F32")
            for name, shape in quantised.linears(of).items()
        }
        packed = {
            n: integers(one, mins=not symmetric, offset=8 if symmetric else 0) for n, one in layers.items()
        }
        export_compressed_tensors(written(tmp_path / f"c{at}", of, packed), tmp_path / f"out{at}")
        file = SafetensorsFile(tmp_path / f"out{at}" / "model.safetensors")
        for name, one in layers.items():
            parts = quantised.packed(one, symmetric)
            stem = name.removesuffix(".weight")
            assert {f"{stem}.{part}" for part in parts} == {
                n for n in file.entries if n.startswith(f"{stem}.")
            }
            for part, (dtype, values) in parts.items():
                assert file.entries[f"{stem}.{part}"].dtype == dtype
                assert np.array_equal(file.array(f"{stem}.{part}"), values)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_plain_floats(tmp_path: Path, dtype: str) -> None:
    of = files.config(torch_dtype="bfloat16")
    (tmp_path / "c").mkdir()
    import_gguf(files.write_gguf(tmp_path / "x.gguf", of, files.weights(of), "Q4_1"), tmp_path / "c")
    export_dense(tmp_path / "c", tmp_path / "out", dtype)
    source = Checkpoint.open(tmp_path / "c")
    known = json.loads((tmp_path / "out" / "config.json").read_text())
    assert known["dtype"] == {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[dtype]
    assert "torch_dtype" not in known
    assert "quantization_config" not in known
    file = SafetensorsFile(tmp_path / "out" / "model.safetensors")
    assert set(file.entries) == set(source.names())
    for name in source.names():
        values = decode_f32(source.packed(name)) if name in source.specs else source.vector(name)
        found = file.array(name)
        if dtype == "bf16":
            assert np.array_equal(found, dense.to_bf16(values))
        else:
            assert np.array_equal(found, values.astype(np.float16 if dtype == "f16" else np.float32))


# ---- programs that a recipe has changed --------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, -1])
def test_orders_of_columns_are_put_back(tmp_path: Path, group: int) -> None:
    """Integers with the group of each column, or without where there is one group; floats plainly."""
    of = quantised.small()
    program, more, made, orders = build_program(of), {}, {}, {}
    names = list(quantised.linears(of))
    for seed, name in enumerate(names):
        n, k = quantised.linears(of)[name]
        node = name.removeprefix("model.").removesuffix(".weight")
        program = round_inputs(program, [node], order=f"{node}.order")
        orders[name] = np.random.default_rng(seed).permutation(k)
        more[f"{node}.order"] = orders[name].astype(np.float32)
        if name != names[-1]:
            made[name] = integers(
                quantised.layer((n, k), 4, k if group == -1 else group), mins=True, offset=0
            )
    path = written(tmp_path / "c", of, made, program, more)
    source = Checkpoint.open(path)
    values = {
        name: decode_f32(source.packed(name))[:, np.argsort(orders[name])] if name in orders
        else decode_f32(source.packed(name)) for name in source.specs
    }  # fmt: skip
    export_dense(path, tmp_path / "floats", "f32")
    file = SafetensorsFile(tmp_path / "floats" / "model.safetensors")
    assert set(file.entries) == set(files.weights(of))
    assert all(np.array_equal(file.array(name), array) for name, array in values.items())

    export_compressed_tensors(path, tmp_path / "out")
    second = back(tmp_path / "out", tmp_path / "back")
    assert second.edited == (group == 32)
    found = foldable_edits(second.program(), build_program(of)).orders
    for name, matrix in made.items():
        kept = second.packed(name)
        order = np.arange(matrix.shape[1])
        if group == 32:
            # The columns of a group come back in the model's order.
            order = second.vector(found[name].weights[0]).astype(int)
            assert np.array_equal(order.reshape(-1, 32), np.sort(orders[name].reshape(-1, 32)))
        assert np.array_equal(decode_f32(kept)[:, np.argsort(order)], values[name])
        assert np.array_equal(kept.arrays["scales"], matrix.arrays["scales"])
    assert np.array_equal(decode_f32(second.packed(names[-1])), values[names[-1]])


def test_low_rank_branches(tmp_path: Path) -> None:
    """Two branches, also where the input has an order: added to floats, refused for integers."""
    of = quantised.small()
    rng = np.random.default_rng(3)
    gate, up = "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"
    program = round_inputs(build_program(of), [gate], order="order")
    program = add_branch(program, [gate, up], 8, name="svd")
    program = add_branch(program, [gate], 4, name="lora")
    plain = files.weights(of)
    more = {
        name: rng.normal(0, 0.1, weight.shape).astype(np.float32)
        for name, weight in program.weights.items()
        if name not in plain
    }
    order = rng.permutation(of["hidden_size"])
    more["order"] = order.astype(np.float32)
    name = f"model.{gate}.weight"
    made = {name: integers(quantised.layer(plain[name].shape, 4, 32), mins=True, offset=0)}
    path = written(tmp_path / "c", of, made, program, more)
    export_dense(path, tmp_path / "out", "f32")
    source = Checkpoint.open(path)
    value = {name: decode(source.packed(name)) for name in source.specs}
    down = value[f"model.{gate}.svd_down.weight"]
    expected = {
        f"model.{gate}.weight": value[name][:, np.argsort(order)]
        + value[f"model.{gate}.svd_up.weight"] @ down
        + value[f"model.{gate}.lora_up.weight"] @ value[f"model.{gate}.lora_down.weight"],
        f"model.{up}.weight": value[f"model.{up}.weight"] + value[f"model.{up}.svd_up.weight"] @ down,
    }
    file = SafetensorsFile(tmp_path / "out" / "model.safetensors")
    assert set(file.entries) == set(plain)
    for name in file.entries:
        if name in expected:
            assert np.abs(file.array(name) - expected[name]).max() < 1e-6
        elif name in value:
            assert np.array_equal(file.array(name), value[name])
    assert_refused(
        lambda: export_compressed_tensors(path, tmp_path / "ct"), f"low-rank branch at the node '{gate}"
    )


def test_other_changes_are_refused_by_the_name_of_the_node(tmp_path: Path) -> None:
    of = quantised.small()
    plain = build_program(of)
    q, attention = "layers.0.self_attn.q_proj", "layers.0.self_attn.attention"
    ones = np.ones(of["num_key_value_heads"] * of["head_dim"], np.float32)
    branched = add_branch(plain, [q], 4, name="b")
    more = {n: np.ones(w.shape, np.float32) for n, w in branched.weights.items() if n not in plain.weights}
    # The branch reads what is not the input of its linear.
    crossed = branched.with_nodes(
        tuple(replace(n, inputs=("embed_tokens",)) if n.name == f"{q}.b_down" else n for n in branched.nodes)
    )
    for at, (program, extra, node) in enumerate((
        (round_inputs(plain, [q], group=32, bits=[8]), {}, f"{q}.input"),
        (keep_keys(plain, [attention], scaled=True), {f"{attention}.key_scale": ones}, attention),
        (keep_keys(plain, [attention], kv_format="int4"), {}, attention),
        (crossed, more, f"{q}.b_sum"),
    )):  # fmt: skip
        path = written(tmp_path / str(at), of, {}, program, extra)
        for form in FORMS:
            text = assert_refused(lambda p=path, f=form: export(p, tmp_path / "out", f), "at the node")
            assert repr(node) in text
    order = round_inputs(plain, [q], order="order")
    path = written(tmp_path / "order", of, {}, order, {"order": np.zeros(of["hidden_size"], np.float32)})
    assert_refused(lambda: export(path, tmp_path / "out", "f32"), "order is no order of columns")


# ---- what is refused ---------------------------------------------------------------------------------------


def test_what_cannot_be_expressed_is_named(tmp_path: Path) -> None:
    of = quantised.small()
    name, shape = next(iter(quantised.linears(of).items()))
    sound = quantised.layer(shape, 4, 32)
    packed = integers(sound, mins=True, offset=0)

    def changed(at: int, value: float) -> Packed:
        mins = packed.arrays["mins"].copy()
        mins.flat[at] = value
        return Packed(packed.spec, {**packed.arrays, "mins": mins})

    scale = np.zeros_like(packed.arrays["scales"])
    cases = [
        (integers(quantised.layer(shape, 4, 64), mins=True, offset=0), "groups of 64 do not divide"),
        (changed(0, 0.123), "no whole multiples"),
        (changed(5, np.nan), "no whole multiples"),
        (changed(5, -1000 * sound.scales.max()), "no whole multiples"),
        (Packed(packed.spec, {**packed.arrays, "scales": scale}), "no whole multiples"),
    ]
    for at, (matrix, message) in enumerate(cases):
        path = written(tmp_path / str(at), of, {name: matrix})
        text = assert_refused(lambda path=path: export_compressed_tensors(path, tmp_path / "out"), message)
        assert name in text
    path = written(tmp_path / "floats", of, {})
    assert_refused(lambda: export_compressed_tensors(path, tmp_path / "out"), "no linear layer of integers")
    assert not (tmp_path / "out").exists()


def test_values_beyond_float16(tmp_path: Path) -> None:
    of = quantised.small()
    name, shape = next(iter(quantised.linears(of).items()))
    values = np.zeros(shape, np.float32)
    values[17, 3] = 70000
    path = written(tmp_path / "c", of, {name: dense.pack(values, "f32")})
    assert name in assert_refused(lambda: export_dense(path, tmp_path / "out", "f16"), "beyond float16")
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]
    export_dense(path, tmp_path / "out", "bf16")


def test_directories_that_exist_or_cannot_be_made(tmp_path: Path) -> None:
    of = quantised.small()
    path = written(tmp_path / "c", of, {})
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path, tmp_path / "c", tmp_path / "c" / "config.json", tmp_path / "link"):
        for form in FORMS[1:]:
            with pytest.raises(UsageError, match="exists already"):
                export(path, out, form)
    with pytest.raises(GristmillError, match="No such file or directory") as raised:
        export_dense(path, tmp_path / "absent" / "out", "bf16")
    assert_one_line(str(raised.value))
    with pytest.raises(UsageError, match="unknown dtype 'f8'"):
        export_dense(path, tmp_path / "out", "f8")
    with pytest.raises(ModelError):
        export(tmp_path / "absent", tmp_path / "out", FORMS[0])


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = quantised.small()
    path = written(tmp_path / "c", of, {})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gristmill.io.safetensors.Writer.write", full)
    with pytest.raises(GristmillError, match="No space left on device") as raised:
        export_dense(path, tmp_path / "out", "f32")
    assert_one_line(str(raised.value))
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


# ---- elsewhere ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_transformers_loads_plain_floats(tmp_path: Path, dtype: str) -> None:
    import torch
    import transformers

    of = quantised.small(tie_word_embeddings=True)
    made = {
        n: integers(quantised.layer(s, 4, 32), mins=True, offset=0) for n, s in quantised.linears(of).items()
    }
    path = written(tmp_path / "c", of, made)
    export_dense(path, tmp_path / "out", dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == {"bf16": torch.bfloat16, "f32": torch.float32}[dtype]
    state = model.state_dict()
    for name, matrix in made.items():
        expected = torch.from_numpy(decode_f32(matrix)).to(model.dtype)
        assert torch.equal(state[name], expected)


def test_transformers_loads_compressed_tensors(tmp_path: Path) -> None:
    """The values that the package gives the codes; benchmarks/export_check.py compares whole logits."""
    import torch
    import transformers

    of = quantised.small()
    made = {
        n: integers(quantised.layer(s, 4, 32), mins=True, offset=0) for n, s in quantised.linears(of).items()
    }
    export_compressed_tensors(written(tmp_path / "c", of, made), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64))  # decompresses
    for name, matrix in made.items():
        assert torch.equal(model.get_parameter(name), torch.from_numpy(decode_f32(matrix)))


def test_transformers_runs_an_exported_recipe(tmp_path: Path) -> None:
    """Scales moved, codes by two methods in two widths, logits compared with the checkpoint's own."""
    import torch
    import transformers

    entries = """
- {method: smoothquant_plus, group: 32, symmetric: true, quantise: false}
- {method: gptq, group: 32, symmetric: true, tensors: ["*.self_attn.*", "*.gate_proj.*", "*.up_proj.*"]}
- {method: rtn, bits: 8, group: 88, tensors: "*.down_proj.*"}
"""
    recipe = Recipe.from_yaml(f"{kit.CALIBRATION}methods: {entries}")
    compress(kit.speaking(tmp_path), recipe, tmp_path / "c", evaluate=False)
    export_compressed_tensors(tmp_path / "c", tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "c")
    ids = models.tokens(20, checkpoint.program().vocab_size)
    expected = models.logits(ReferenceExecutor.load(checkpoint), ids, [20])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found = model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].numpy()
    assert models.relative_error(found, expected) < 1e-4


def test_the_safetensors_package_reads_what_is_written(tmp_path: Path) -> None:
    of = quantised.small()
    made = {
        n: integers(quantised.layer(s, 8, 32), mins=True, offset=0) for n, s in quantised.linears(of).items()
    }
    path = written(tmp_path / "c", of, made)
    export_dense(path, tmp_path / "out", "f32")
    found = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(found[name], decode_f32(matrix)) for name, matrix in made.items())
