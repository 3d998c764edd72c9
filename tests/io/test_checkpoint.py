"""Checkpoint directories: what is written is opened, what does not agree is refused, hashes are verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gristmill import inspect
from gristmill.errors import ModelError
from gristmill.formats import group_int
from gristmill.formats.packed import decode
from gristmill.io import checkpoint, safetensors
from gristmill.io.checkpoint import Checkpoint, Matrix, Vector, is_checkpoint
from gristmill.io.convert import import_gguf
from gristmill.io.expected import bits_per_weight
from tests.kits.files import config, weights, write_gguf
from tests.kits.hostile import MEMORY_LIMIT, assert_refused, traced_peak

OF = config(num_hidden_layers=1, tie_word_embeddings=True)
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("checkpoint")
    files = write_gguf(base / "x.gguf", OF, weights(OF), {UP: "Q4_1", "model.embed_tokens.weight": "Q8_0"})
    (base / "c").mkdir()
    import_gguf(files, base / "c")
    return base / "c"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "c"))


def test_a_directory_holds_what_it_should(made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    assert {"config.json", "model.safetensors", "recipe.yaml", "report.json", "tokenizer.json"} <= names
    opened = Checkpoint.open(made)
    quantization = opened.config["quantization_config"]
    assert (quantization["quant_method"], quantization["version"]) == ("gristmill", 1)
    assert is_checkpoint(opened.config)
    assert not is_checkpoint({**opened.config, "quantization_config": {"quant_method": "gptq"}})
    assert not is_checkpoint(OF)
    assert set(quantization["tensors"]) == {name for name in opened.names() if name in opened.specs}
    report = json.loads((made / "report.json").read_text())
    assert report["source"]["types"] == {"F32": 9, "Q4_1": 1, "Q8_0": 1}
    assert report["weight_bytes"] == opened.weight_bytes
    assert opened.weight_bytes <= (made / "model.safetensors").stat().st_size


def test_bits_per_weight_counts_everything(made: Path) -> None:
    opened = Checkpoint.open(made)
    stored = sum(opened.packed(name).nbytes for name in opened.specs)
    count = sum(spec.shape[0] * spec.shape[1] for spec in opened.specs.values())
    assert opened.bits_per_weight == 8 * stored / count
    assert opened.specs[UP].bits_per_weight == 5.0
    assert opened.specs["model.embed_tokens.weight"].bits_per_weight == 8.5


def test_bits_per_weight_by_hand(made: Path) -> None:
    """The GGUF file, its checkpoint and the report agree; norms do not count."""
    rest = 2 * 256 * 256 + 2 * 128 * 256 + 2 * 256 * 512  # q and o, k and v, gate and down in f32
    up, head = 256 * 512, 272 * 256  # Q4_1: 5 bits; Q8_0: 8.5 bits
    bits = (32 * rest + 5 * up + 8.5 * head) / (rest + up + head)
    assert Checkpoint.open(made).bits_per_weight == bits
    assert json.loads((made / "report.json").read_text())["bits_per_weight"] == bits
    assert inspect.run(made)["bits_per_weight"] == bits
    assert inspect.run(made.parent / "x.gguf")["bits_per_weight"] == bits


def test_what_is_added_counts_as_bits_alone() -> None:
    base = {"m": (16, 32), "n": (32,)}
    assert bits_per_weight(base, {"m": 256, "n": 128}) == 4
    assert bits_per_weight(base, {"m.codes": 256, "m.scales": 32, "n": 128}) == 4.5
    added = {"m.down": 64, "m.up": 32, "m.order": 128, "a.key_scale": 32}
    assert bits_per_weight(base, {"m": 256, "n": 128, **added}) == 8


def test_extents_are_where_the_arrays_are(made: Path) -> None:
    opened = Checkpoint.open(made)
    for name in opened.names():
        extents = opened.extents(name)
        arrays = opened.packed(name).arrays if name in opened.specs else {"values": opened.vector(name)}
        assert set(extents) == set(arrays)
        for part, extent in extents.items():
            raw = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
            assert raw == arrays[part].tobytes()
            assert extent.offset % 32 == 0


def test_arrays_are_read_only_views(made: Path) -> None:
    opened = Checkpoint.open(made)
    packed = opened.packed(UP)
    assert not any(array.flags.owndata or array.flags.writeable for array in packed.arrays.values())
    assert traced_peak(lambda: Checkpoint.open(made)) < 1 << 20
    for call in (opened.packed, opened.vector, opened.extents):
        assert_refused(lambda call=call: call("model.nothing"), "has no")
    assert_refused(lambda: opened.vector(UP), "has no vector")
    assert_refused(lambda: opened.packed(NORM), "has no matrix")


def test_verify(copy: Path) -> None:
    opened = Checkpoint.open(copy)
    count = sum(len(opened.extents(name)) for name in opened.names())
    assert opened.verify() == count
    # One bit anywhere.
    for name, part in (
        (UP, "codes"),
        (UP, "mins"),
        (NORM, "values"),
        ("model.embed_tokens.weight", "scales"),
    ):
        extent = opened.extents(name)[part]
        with open(extent.path, "r+b") as file:
            file.seek(extent.offset + extent.nbytes - 1)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))
        assert_refused(Checkpoint.open(copy).verify, rf"the tensor {name}.* is not what was written")
        with open(extent.path, "r+b") as file:
            file.seek(extent.offset + extent.nbytes - 1)
            file.write(bytes([byte]))
    assert Checkpoint.open(copy).verify() == count


OTHER_FILES: dict[str, Callable[[str], str]] = {
    "config.json": lambda text: text.replace('"rope_theta": 1', '"rope_theta": 2'),
    "recipe.yaml": lambda text: text.replace("methods: []", "methods: [{method: rtn}]"),
    "tokenizer.json": lambda text: text + " ",
    "tokenizer_config.json": lambda text: "{}",
    "generation_config.json": lambda text: '{"temperature": 5}',
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_verify_finds_a_change_in_a_file(copy: Path, name: str) -> None:
    before = (copy / name).read_text()
    after = OTHER_FILES[name](before)
    assert after != before
    (copy / name).write_text(after)
    assert_refused(Checkpoint.open(copy).verify, rf"{name} is not what was written \(SHA-256 differs\)")
    assert_refused(lambda: inspect.run(copy, verify=True), rf"{name} is not what was written")
    (copy / name).write_text(before)
    assert Checkpoint.open(copy).verify() > 0
    if name != "config.json":
        opened = Checkpoint.open(copy)
        (copy / name).unlink()
        assert_refused(opened.verify, rf"{name} is missing")


@pytest.mark.parametrize("change", [{"offset": 1}, {"activations": "fast"}])
def test_verify_finds_a_change_in_the_formats(copy: Path, change: dict[str, Any]) -> None:
    def changed(value: dict[str, Any]) -> None:
        (tensors(value)[UP] if "offset" in change else value["quantization_config"]).update(change)

    rewrite(copy, changed)
    assert_refused(Checkpoint.open(copy).verify, r"config\.json is not what was written")


def test_verify_finds_a_file_that_was_added(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("x")
    assert_refused(Checkpoint.open(copy).verify, r"chat_template\.jinja was not there when")


def test_verify_takes_older_checkpoints(copy: Path) -> None:
    """Their reports have hashes of arrays alone, which still count."""
    report = json.loads((copy / "report.json").read_text())
    report["sha256"] = {k: v for k, v in report["sha256"].items() if "." in k and k.startswith("model.")}
    (copy / "report.json").write_text(json.dumps(report))
    rewrite(copy, lambda value: value.update(rope_theta=20000.0))
    assert Checkpoint.open(copy).verify() == len(report["sha256"])
    report["sha256"][NORM] = "0"
    (copy / "report.json").write_text(json.dumps(report))
    assert_refused(Checkpoint.open(copy).verify, f"{NORM} is not what was written")


def test_verify_needs_hashes(copy: Path) -> None:
    opened, report = Checkpoint.open(copy), json.loads((copy / "report.json").read_text())
    for hashes, message in (
        (None, "holds no hashes"),
        ([], "holds no hashes"),
        ({}, "SHA-256 differs"),
        ({key: value for key, value in report["sha256"].items() if key != NORM}, f"{NORM} is not what"),
        (report["sha256"] | {NORM: 5}, f"{NORM} is not what"),
    ):
        (copy / "report.json").write_text(json.dumps({**report, "sha256": hashes}))
        assert_refused(opened.verify, message)
    (copy / "report.json").unlink()
    assert_refused(opened.verify, "No such file")


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "config.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def tensors(value: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = value["quantization_config"]["tensors"]
    return result


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no quantization": (lambda c: c.pop("quantization_config"), "not a gristmill checkpoint"),
    "another method": (
        lambda c: c["quantization_config"].update(quant_method="awq"),
        "not a gristmill checkpoint",
    ),
    "no version": (
        lambda c: c["quantization_config"].pop("version"),
        "version None of the checkpoint format",
    ),
    "next version": (
        lambda c: c["quantization_config"].update(version=2),
        "version 2 of the checkpoint format",
    ),
    "no tensors": (lambda c: c["quantization_config"].update(tensors={}), "lists no tensor formats"),
    "tensors as list": (lambda c: c["quantization_config"].update(tensors=[1]), "lists no tensor formats"),
    "format missing": (lambda c: tensors(c).pop(UP), "neither a float32 vector nor part of a matrix"),
    "format for nothing": (lambda c: tensors(c).update(x=tensors(c)[UP]), "lacks the tensor 'x.codes'"),
    "format for a norm": (lambda c: tensors(c).update({NORM: tensors(c)[UP]}), "lacks the tensor"),
    "wrong bits": (lambda c: tensors(c)[UP].update(bits=8, offset=0), "its format calls for U8"),
    "wrong group": (lambda c: tensors(c)[UP].update(group=64), "its format calls for"),
    "wrong scales": (lambda c: tensors(c)[UP].update(scales="f32"), "its format calls for F32"),
    "no mins": (lambda c: tensors(c)[UP].update(mins=False), "neither a float32 vector nor part of a matrix"),
    "too many rows": (lambda c: tensors(c)[UP].update(shape=[528, 256]), "its format calls for"),
    "terabytes": (lambda c: tensors(c)[UP].update(shape=[1 << 30, 1 << 20]), "its format calls for"),
    "rows of the padding": (lambda c: tensors(c)[UP].update(shape=[511, 256]), "has the shape .511, 256."),
    "entry is text": (lambda c: tensors(c).update({UP: "int4"}), "is not an object"),
    "sizes of another model": (lambda c: c.update(intermediate_size=256), "has the shape"),
    "more layers": (lambda c: c.update(num_hidden_layers=2), "lacks the tensor model.layers.1"),
    "untied": (lambda c: c.update(tie_word_embeddings=False), "lacks the tensor lm_head.weight"),
    "unknown model": (lambda c: c.update(model_type="bert"), "architecture 'bert' is not supported"),
    "billions of layers": (lambda c: c.update(num_hidden_layers=1 << 40), "num_hidden_layers"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_configs_that_do_not_agree(copy: Path, name: str) -> None:
    change, message = CHANGES[name]
    rewrite(copy, change)
    assert_refused(lambda: Checkpoint.open(copy), message)
    assert traced_peak(lambda: Checkpoint.open(copy)) < MEMORY_LIMIT


def test_weights_that_do_not_agree(copy: Path) -> None:
    path = copy / "model.safetensors"
    file = safetensors.SafetensorsFile(path)
    arrays = {name: file.array(name).copy() for name in file.entries}
    del file

    def with_arrays(changed: dict[str, Any], message: str) -> None:
        safetensors.write(path, {name: value for name, value in changed.items() if value is not None})
        assert_refused(lambda: Checkpoint.open(copy), message)

    with_arrays(arrays | {NORM: None}, f"lacks the tensor {NORM}")
    with_arrays(arrays | {f"{UP}.mins": None}, f"lacks the tensor '{UP}.mins'")
    with_arrays(arrays | {"extra": np.zeros(3, np.float32)}, "'extra', which its architecture does not know")
    with_arrays(arrays | {UP: np.zeros(3, np.float32)}, "has the shape")
    with_arrays(arrays | {NORM: np.zeros(256, np.float16)}, "neither a float32 vector")
    with_arrays(arrays | {NORM: np.zeros((256, 1), np.float32)}, "neither a float32 vector")
    with_arrays(arrays | {NORM: np.zeros(255, np.float32)}, r"has the shape \[255\]")
    with_arrays(arrays | {f"{UP}.codes": arrays[f"{UP}.codes"][:-1]}, "its format calls for")
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(lambda: Checkpoint.open(copy), "truncated")
    path.unlink()
    assert_refused(lambda: Checkpoint.open(copy), "No such file")
    (copy / "config.json").write_bytes(b"\xff\xfe{}")
    assert_refused(lambda: Checkpoint.open(copy), "not valid JSON")
    assert_refused(lambda: Checkpoint.open(copy / "absent"), "No such file")


def test_damaged_payload_loads_and_decodes(copy: Path) -> None:
    opened = Checkpoint.open(copy)
    for part in ("codes", "scales", "mins"):
        extent = opened.extents(UP)[part]
        with open(extent.path, "r+b") as file:
            file.seek(extent.offset)
            file.write(b"\xff" * extent.nbytes)
    assert decode(Checkpoint.open(copy).packed(UP)).shape == (512, 256)


def test_errors_of_pieces_come_out_as_they_are(tmp_path: Path) -> None:
    """An error in the making of one piece ends the writing, with that error."""

    def fail(start: int, stop: int) -> Any:
        raise ModelError("this piece cannot be made")

    good = group_int.quantise(np.ones((64, 256), np.float32), 8)
    items = {
        "a": Matrix(good.spec, good.rows),
        "n": Vector(3, lambda: np.ones(3)),
        "b": Matrix(good.spec, fail),
    }
    with pytest.raises(ModelError, match="this piece cannot be made"):
        checkpoint.write(tmp_path, {}, items, report={}, recipe="")
    assert not (tmp_path / "config.json").exists()
