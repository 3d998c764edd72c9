"""Conversion: every source and weight mode, against the dequantisation of the gguf package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from gristmill.errors import ModelError, UsageError
from gristmill.formats import dense
from gristmill.formats.packed import decode, decode_f32
from gristmill.io import cache, convert
from gristmill.io.checkpoint import Checkpoint
from gristmill.io.convert import import_gguf, import_huggingface, prepare
from tests.kits.files import (
    FLOATS,
    QUANTISED,
    Tensors,
    config,
    dequantised,
    encode,
    rotation_pairs,
    weights,
    write_gguf,
    write_huggingface,
    write_safetensors,
)
from tests.kits.hostile import assert_refused

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def expected_matrix(kind: str, values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """What a GGUF file of this type says about values: the package's own reading of the package's own
    writing."""
    written = rotation_pairs(values, heads) if heads else values
    encoded = encode(kind, written)
    if kind == "F32":
        read = encoded
    else:
        read = dequantised(kind, np.ascontiguousarray(encoded).view(np.uint8).reshape(len(written), -1))
    if not heads:
        return read
    # Back from adjacent pairs into half-split order.
    half = read.shape[0] // heads // 2
    return read.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(read.shape)


def heads_of(of: dict[str, Any], name: str) -> int:
    if of["model_type"] not in ("llama", "mistral"):
        return 0
    if name.endswith("q_proj.weight"):
        return of["num_attention_heads"]
    return of["num_key_value_heads"] if name.endswith("k_proj.weight") else 0


def check_gguf(checkpoint: Checkpoint, of: dict[str, Any], tensors: Tensors, kind: str) -> None:
    assert list(checkpoint.names()) == list(tensors)
    for name, values in tensors.items():
        if values.ndim == 1:
            one = np.float32(of["model_type"] == "gemma3_text")
            assert np.array_equal(checkpoint.vector(name), (values + one) - one)
            continue
        packed = checkpoint.packed(name)
        assert packed.format == ("group_int" if kind in QUANTISED else kind.lower())
        expected = expected_matrix(kind, values, heads_of(of, name))
        assert np.array_equal(decode_f32(packed).view(np.uint32), expected.view(np.uint32)), name


@pytest.mark.parametrize("kind", [*FLOATS, *QUANTISED])
def test_gguf_stored_is_its_dequantisation_bit_for_bit(tmp_path: Path, kind: str) -> None:
    of = config(num_hidden_layers=1)
    tensors = weights(of)
    path = write_gguf(tmp_path / "x.gguf", of, tensors, kind)[0]
    checkpoint = Checkpoint.open(prepare(path))
    check_gguf(checkpoint, of, tensors, kind)
    assert checkpoint.verify() > 0


@pytest.mark.parametrize("architecture", KINDS)
def test_gguf_of_every_architecture(tmp_path: Path, architecture: str) -> None:
    of = config(architecture)
    tensors = weights(of)
    path = write_gguf(tmp_path / "x.gguf", of, tensors, "Q5_1")[0]
    check_gguf(Checkpoint.open(prepare(path)), of, tensors, "Q5_1")


def test_split_gguf_gives_the_same_checkpoint(tmp_path: Path) -> None:
    of = config(num_hidden_layers=1)
    tensors = weights(of)
    files = write_gguf(tmp_path / "x.gguf", of, tensors, "Q4_0", parts=3)
    for file in (files[0], files[2]):
        check_gguf(Checkpoint.open(prepare(file)), of, tensors, "Q4_0")
    check_gguf(Checkpoint.open(prepare(tmp_path)), of, tensors, "Q4_0")


def test_mixed_types_are_kept_apart(tmp_path: Path) -> None:
    """As the demo model has it: another type for the embedding than for the body."""
    of = config(num_hidden_layers=1, tie_word_embeddings=True)
    tensors = weights(of)
    kinds = dict.fromkeys(tensors, "Q4_1") | {"model.embed_tokens.weight": "Q8_0"}
    checkpoint = Checkpoint.open(prepare(write_gguf(tmp_path / "x.gguf", of, tensors, kinds)[0]))
    assert checkpoint.specs["model.embed_tokens.weight"].bits == 8
    assert checkpoint.specs["model.layers.0.mlp.up_proj.weight"].bits == 4
    assert "lm_head.weight" not in checkpoint.names()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_huggingface_directories(tmp_path: Path, dtype: str, shards: int) -> None:
    of = config(num_hidden_layers=1)
    tensors = weights(of)
    model = write_huggingface(tmp_path / "model", of, tensors, dtype, shards=shards)
    (model / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    path = prepare(model)
    checkpoint = Checkpoint.open(path)
    for name, values in tensors.items():
        expected = values.astype(np.float16).astype(np.float32) if dtype == "F16" else values
        if dtype == "BF16":
            expected = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        if values.ndim == 2:
            assert checkpoint.packed(name).format == dtype.lower()
            assert np.array_equal(decode_f32(checkpoint.packed(name)), expected)
        else:
            assert np.array_equal(checkpoint.vector(name), expected)
    assert json.loads((path / "tokenizer_config.json").read_text()) == {"add_bos_token": True}
    assert {key: checkpoint.config[key] for key in of} == of


@pytest.mark.parametrize("architecture", KINDS)
def test_huggingface_of_every_architecture(tmp_path: Path, architecture: str) -> None:
    of = config(architecture)
    tensors = weights(of)
    checkpoint = Checkpoint.open(prepare(write_huggingface(tmp_path / "m", of, tensors)))
    for name, values in tensors.items():
        got = decode_f32(checkpoint.packed(name)) if values.ndim == 2 else checkpoint.vector(name)
        assert np.array_equal(got, values)


def test_text_part_of_a_multimodal_gemma(tmp_path: Path) -> None:
    text = config("gemma3_text")
    tensors = weights(text)
    for prefix, head in (
        ("language_model.model.", "language_model.lm_head."),
        ("model.language_model.", "lm_head."),
    ):
        stored = {name.replace("model.", prefix, 1): values for name, values in tensors.items()}
        stored |= {"vision_tower.x.weight": np.zeros((4, 4), np.float32)}
        stored |= {f"{head}weight": tensors["model.embed_tokens.weight"]}
        whole = {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": text,
        }
        directory = tmp_path / prefix
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(whole))
        write_safetensors(directory / "model.safetensors", stored, "F32")
        checkpoint = Checkpoint.open(prepare(directory))
        assert list(checkpoint.names()) == list(tensors)
        assert checkpoint.config["architectures"] == ["Gemma3ForCausalLM"]


# ---- weight modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_mode", ["f32", "bf16", "int8", "int4"])
def test_weight_modes(tmp_path: Path, weights_mode: str) -> None:
    of = config(num_hidden_layers=1)
    tensors = weights(of)
    source = write_gguf(tmp_path / "x.gguf", of, tensors, "Q5_K")[0]
    stored, path = Checkpoint.open(prepare(source)), prepare(source, weights_mode)
    made = Checkpoint.open(path)
    assert made.verify() > 0
    bits = {"f32": 32, "bf16": 16, "int8": 8.25, "int4": 4.5}[weights_mode]
    assert made.bits_per_weight == pytest.approx(bits, rel=1e-9)
    report = json.loads((path / "report.json").read_text())
    assert report["weights"] == weights_mode
    assert report["bits_per_weight"] == made.bits_per_weight
    assert report["weight_bytes"] == made.weight_bytes
    assert report["model"] == "tiny"
    assert yaml.safe_load((path / "recipe.yaml").read_text())["methods"]
    for name in made.names():
        if name not in made.specs:
            assert np.array_equal(made.vector(name), stored.vector(name))
            continue
        base, got = decode(stored.packed(name)), decode(made.packed(name))
        if weights_mode == "f32":
            assert np.array_equal(got, base.astype(np.float32))
        elif weights_mode == "bf16":
            assert np.array_equal(got, dense.from_bf16(dense.to_bf16(base.astype(np.float32))))
        else:
            spec = made.specs[name]
            assert (spec.format, spec.bits, spec.scales, spec.mins) == (
                "group_int",
                int(weights_mode[3:]),
                "f16",
                False,
            )
            assert (spec.group, spec.offset) == ((64, 128) if spec.bits == 8 else (32, 8))
            error = np.sqrt(np.mean(np.square(got - base)) / np.mean(np.square(base)))
            assert error < (0.01 if spec.bits == 8 else 0.12)
    # The head counts: nothing is left in another format.
    assert {spec.format for spec in made.specs.values()} == {
        "group_int" if "int" in weights_mode else weights_mode
    }


def test_pieces_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes do not depend on how a matrix is cut for conversion, nor on the number of threads."""
    of = config(num_hidden_layers=1)
    source = write_gguf(tmp_path / "x.gguf", of, weights(of), "Q4_K")[0]
    contents = []
    for chunk, workers in ((1 << 20, 8), (1, 1), (256 * 48, 3)):
        monkeypatch.setattr("gristmill.io.checkpoint._CHUNK", chunk)
        monkeypatch.setattr("gristmill.io.checkpoint._WORKERS", workers)
        monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / f"cache{chunk}"))
        files = [prepare(source, mode) / "model.safetensors" for mode in ("stored", "int4")]
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1] == contents[2]


def test_infinite_weights_cannot_be_rounded(tmp_path: Path) -> None:
    of = config(num_hidden_layers=1)
    tensors = weights(of)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.inf
    source = write_huggingface(tmp_path / "m", of, tensors)
    assert np.isinf(
        decode(Checkpoint.open(prepare(source)).packed("model.layers.0.mlp.up_proj.weight"))[3, 5]
    )
    assert_refused(lambda: prepare(source, "int4"), "mlp.up_proj.weight.*not finite")
    assert not [path for path in (tmp_path / "cache" / "checkpoints").iterdir() if "int4" in path.name]


# ---- the cache ---------------------------------------------------------------------------------------------


def test_second_time_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = config(num_hidden_layers=1)
    source = write_gguf(tmp_path / "x.gguf", of, weights(of), "Q4_0")[0]
    first = {mode: prepare(source, mode) for mode in ("stored", "int8")}

    def never(*_: object, **__: object) -> None:
        raise AssertionError("converted or read again")

    for name in ("_import", "_requantise"):
        monkeypatch.setattr(convert, name, never)
    monkeypatch.setattr(cache, "content_hash", never)
    assert {mode: prepare(source, mode) for mode in first} == first
    # A link to it, or the name of its directory, is another path but, hash read once more, the same content.
    monkeypatch.undo()
    monkeypatch.setenv("GRISTMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(convert, "_import", never)
    (tmp_path / "link.gguf").symlink_to(source)
    assert prepare(tmp_path / "link.gguf") == first["stored"]
    copy = shutil.copy(source, tmp_path / "copy.gguf")
    assert prepare(copy) == first["stored"]


def test_changed_source_is_converted_anew(tmp_path: Path) -> None:
    of = config(num_hidden_layers=1)
    source = write_gguf(tmp_path / "x.gguf", of, weights(of, seed=1), "Q4_0")[0]
    first = prepare(source)
    write_gguf(tmp_path / "x.gguf", of, weights(of, seed=2), "Q4_0")
    second = prepare(source)
    assert first != second
    assert first.is_dir()


def test_side_files_count_as_content(tmp_path: Path) -> None:
    of = config(num_hidden_layers=1)
    model = write_huggingface(tmp_path / "m", of, weights(of))
    first = prepare(model)
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    second = prepare(model)
    assert first != second
    assert json.loads((second / "generation_config.json").read_text()) == {"temperature": 0.5}


def test_checkpoint_directories_are_opened_as_they_are(tmp_path: Path, own_cache: Path) -> None:
    of = config(num_hidden_layers=1)
    made = prepare(write_gguf(tmp_path / "x.gguf", of, weights(of), "Q4_K")[0], "int8")
    own = Path(shutil.copytree(made, tmp_path / "own"))
    shutil.rmtree(own_cache)
    assert prepare(own) == own
    assert not own_cache.exists()
    assert Checkpoint.open(prepare(own, "bf16")).bits_per_weight == 16
    # recipe.yaml and report.json do not make a checkpoint, nor does their absence unmake one.
    (own / "recipe.yaml").unlink()
    (own / "report.json").unlink()
    assert prepare(own) == own
    assert Checkpoint.open(prepare(own, "f32")).bits_per_weight == 32
    foreign = write_huggingface(tmp_path / "foreign", of, weights(of))
    (foreign / "recipe.yaml").write_text("quant_stage: {}")
    assert prepare(foreign) != foreign


def test_progress_is_told(tmp_path: Path) -> None:
    of = config(num_hidden_layers=1)
    source = write_gguf(tmp_path / "x.gguf", of, weights(of), "Q4_0")[0]
    calls: list[tuple[str, int, int]] = []
    prepare(source, "int4", lambda label, done, total: calls.append((label, done, total)))
    labels = list(dict.fromkeys(label for label, _, _ in calls))
    assert labels == ["reading", "converting", "converting to int4"]
    for label in labels:
        steps = [(done, total) for name, done, total in calls if name == label]
        assert len({total for _, total in steps}) == 1
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1] > 0
    calls.clear()
    prepare(source, "int4", lambda label, done, total: calls.append((label, done, total)))
    assert not calls


def test_unknown_weights_are_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown weights 'int5'"):
        prepare(tmp_path, "int5")


# ---- bad models --------------------------------------------------------------------------------------------


def converts_nothing(own_cache: Path) -> None:
    base = own_cache / "checkpoints"
    assert not base.exists() or not list(base.iterdir())


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "none of its tensors is quantised"),
        ({"quant_method": "bitsandbytes"}, "quantised with 'bitsandbytes'"),
        ({"quant_method": ["x"]}, "quantised with a list"),
        ({}, "quantised with None"),
        ("awq", "quantised with 'awq'"),
    ],
)
def test_quantised_directories_are_refused_by_name(
    tmp_path: Path, own_cache: Path, quantization: object, message: str
) -> None:
    of = config(num_hidden_layers=1)
    model = write_huggingface(tmp_path / "m", {**of, "quantization_config": quantization}, weights(of))
    assert_refused(lambda: prepare(model), message)
    converts_nothing(own_cache)


def edit(of: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**of, **changes}.items() if value is not ...}


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mamba"}, "architecture 'mamba' is not supported .supported: llama, mistral"),
    ({"model_type": ...}, "no model_type"),
    ({"model_type": ["llama"]}, "no model_type"),
    ({"architectures": ["BertModel"]}, "architecture BertModel is not supported"),
    ({"hidden_size": ...}, "hidden_size"),
    ({"hidden_size": "256"}, "hidden_size"),
    ({"hidden_size": 256.0}, "hidden_size"),
    ({"hidden_size": -1}, "hidden_size"),
    ({"hidden_size": 10**30}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 128}, "has the shape|calls for"),
    ({"num_hidden_layers": 3}, "lacks the tensor model.layers.1.self_attn.q_proj.weight and 17 more"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"num_attention_heads": 3}, "no multiple|is not a multiple"),
    ({"num_key_value_heads": 3}, "no multiple|is not a multiple"),
    ({"head_dim": 32}, "has the shape|calls for"),
    ({"vocab_size": 271}, "weight has the shape .272, 256.; its config calls for .271, 256."),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"attention_bias": True}, "lacks the tensor model.layers.0.self_attn.q_proj.bias"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"hidden_act": "relu"}, "hidden_act"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_theta": -5}, "rope_theta"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS)
def test_bad_configs(tmp_path: Path, own_cache: Path, changes: dict[str, Any], message: str) -> None:
    of = config(num_hidden_layers=1)
    model = write_huggingface(tmp_path / "m", edit(of, **changes), weights(of))
    assert_refused(lambda: prepare(model), message)
    converts_nothing(own_cache)


def test_bad_tensors(tmp_path: Path, own_cache: Path) -> None:
    of = config(num_hidden_layers=1)
    sound = weights(of)
    wrong: list[tuple[Tensors, str]] = [
        ({k: v for k, v in sound.items() if k != "model.norm.weight"}, "lacks the tensor model.norm.weight"),
        (
            sound | {"model.layers.0.extra": np.ones(3, np.float32)},
            "'model.layers.0.extra', which its architecture",
        ),
        (sound | {"model.norm.weight": np.ones((1, 256), np.float32)}, "model.norm.weight has the shape"),
        (sound | {"lm_head.weight": np.ones((256, 272), np.float32)}, "lm_head.weight has the shape"),
        (sound | {"lm_head.weight": np.ones(272 * 256, np.float32)}, "lm_head.weight has the shape"),
    ]
    for at, (tensors, message) in enumerate(wrong):
        assert_refused(
            lambda at=at, t=tensors: prepare(write_huggingface(tmp_path / f"h{at}", of, t)), message
        )
    model = write_huggingface(tmp_path / "f64", of, sound, "F64")
    assert_refused(lambda: prepare(model), "is F64; F32, BF16 and F16 can be read")
    for at, (tensors, message) in enumerate(wrong[:1]):
        path = write_gguf(tmp_path / f"{at}.gguf", of, tensors)[0]
        assert_refused(lambda path=path: prepare(path), message)
    converts_nothing(own_cache)


def test_quantised_norms_are_refused(tmp_path: Path) -> None:
    of = config(num_hidden_layers=1)
    tensors = weights(of)
    del tensors["model.norm.weight"]
    path = tmp_path / "x.gguf"
    half = np.ones(256, np.float16)
    write_gguf(path, of, tensors, extra={"output_norm.weight": half})
    assert np.array_equal(Checkpoint.open(prepare(path)).vector("model.norm.weight"), half)
    import gguf

    data = gguf.quants.quantize(np.ones((1, 256), np.float32), gguf.GGMLQuantizationType.Q8_0)
    raw = path.read_bytes()
    # The same tensor, declared as Q8_0: fewer bytes than there are.
    name = b"output_norm.weight"
    at = raw.index(name) + len(name) + 4 + 8
    assert raw[at : at + 4] == (1).to_bytes(4, "little")
    path.write_bytes(raw[:at] + (8).to_bytes(4, "little") + raw[at + 4 :])
    assert data.nbytes < half.nbytes
    assert_refused(lambda: prepare(path), "'output_norm.weight' has the type Q8_0; a float type is needed")


def test_source_that_changes_meanwhile(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = config(num_hidden_layers=1)
    source = write_gguf(tmp_path / "x.gguf", of, weights(of), "Q4_0")[0]

    def touched(paths: list[Path], directory: Path, progress: object = None) -> None:
        import_gguf(paths, directory)
        with open(paths[0], "ab") as file:
            file.write(b"more")

    monkeypatch.setattr(convert, "import_gguf", touched)
    assert_refused(lambda: prepare(source), "changed while it was being read")
    converts_nothing(own_cache)


def test_side_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = config(num_hidden_layers=1)
    model = write_huggingface(tmp_path / "m", of, weights(of))
    (model / "merges.txt").write_bytes(b"x" * 2000)
    monkeypatch.setattr(convert, "_SIDE_LIMIT", 1000)
    (tmp_path / "out").mkdir()
    assert_refused(lambda: import_huggingface(model, tmp_path / "out"), "merges.txt is larger than")


def test_hostile_text_in_a_config_survives(tmp_path: Path) -> None:
    of = config(num_hidden_layers=1)
    model = write_huggingface(tmp_path / "m", of, weights(of))
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text[:-1] + ', "odd": "\\ud800 \\u0000 \\n", "big": 1e400}')
    checkpoint = Checkpoint.open(prepare(model))
    assert checkpoint.config["odd"] == "\ud800 \0 \n"


def test_shards(tmp_path: Path) -> None:
    of = config(num_hidden_layers=1)
    model = write_huggingface(tmp_path / "m", of, weights(of), shards=2)
    index = model / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    first = "model-00001-of-00002.safetensors"
    for name, message in (
        ("../model-00001-of-00002.safetensors", "not a safetensors file beside it"),
        ("/etc/passwd", "not a safetensors file beside it"),
        ("..", "not a safetensors file beside it"),
        ("a\\b.safetensors", "not a safetensors file beside it"),
        ("a\0.safetensors", "not a safetensors file beside it"),
        ("a\n.safetensors", "not a safetensors file beside it"),
        ("", "not a safetensors file beside it"),
        ("pytorch_model.bin", "not a safetensors file beside it"),
        ("model-00003-of-00002.safetensors", "a shard is missing"),
    ):
        changed = {key: name if value == first else value for key, value in table["weight_map"].items()}
        index.write_text(json.dumps({"weight_map": changed}))
        assert_refused(lambda: prepare(model), message)
    for text, message in (
        ("[]", "not a JSON object"),
        ("{}", "no valid weight_map"),
        ('{"weight_map": []}', "no valid weight_map"),
        ('{"weight_map": {"a": 5}}', "no valid weight_map"),
        ('{"weight_map": {}}', "lacks the tensor"),
        ("{", "not valid JSON"),
    ):
        index.write_text(text)
        assert_refused(lambda: prepare(model), message)
    index.write_text(json.dumps(table))
    shutil.copy(model / first, model / "model-00002-of-00002.safetensors")
    assert_refused(lambda: prepare(model), "occurs twice")
    (model / "model-00002-of-00002.safetensors").unlink()
    assert_refused(lambda: prepare(model), "a shard is missing")


def test_nothing_that_escapes_is_another_error(tmp_path: Path) -> None:
    """Directories of odd contents end in ModelError."""
    (tmp_path / "a").mkdir()
    assert_refused(lambda: prepare(tmp_path / "a"), "has no config.json")
    (tmp_path / "a" / "config.json").write_text("{}")
    assert_refused(lambda: prepare(tmp_path / "a"), "neither model.safetensors nor")
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(b"x")
    assert_refused(lambda: prepare(tmp_path / "a"), "a pickle, which is never loaded")
    (tmp_path / "a" / "model.safetensors").mkdir()
    assert_refused(lambda: prepare(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").mkdir()
    assert_refused(lambda: prepare(tmp_path / "b"), "has no config.json")
    with pytest.raises(ModelError):
        prepare(tmp_path / "b" / "config.json" / "more")
