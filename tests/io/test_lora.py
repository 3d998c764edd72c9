"""LoRA adapters: against merged weights, with smoothed and rounded models, and files that lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from gristmill.backends.native import NativeExecutor
from gristmill.backends.reference import ReferenceExecutor
from gristmill.calibrate.sites import KEYS, SMOOTHING, find_sites
from gristmill.errors import ModelError, UsageError
from gristmill.io.checkpoint import Checkpoint
from gristmill.io.convert import prepare
from gristmill.io.lora import open_adapted, read_adapter
from gristmill.methods.compress import compress, write
from gristmill.methods.draft import Draft
from gristmill.methods.recipe import Recipe
from tests.kits import files, models
from tests.kits.hostile import MEMORY_LIMIT, assert_refused, traced_peak

OF = files.config("llama", hidden_size=96, intermediate_size=104)
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
ROOT = "base_model.model."


def adapter(
    directory: Path, rank: int, *, seed: int = 0, modules: tuple[str, ...] = MODULES, **changes: Any
) -> tuple[Path, dict[str, np.ndarray]]:
    """An adapter directory and its tensors."""
    rng = np.random.default_rng([seed, rank])
    shapes = {name: shape for name, shape in files.expected_tensors(OF).items() if len(shape) == 2}
    tensors: dict[str, np.ndarray] = {}
    for name, (n, k) in shapes.items():
        module = name.removesuffix(".weight")
        if module.endswith(modules):
            tensors[f"{ROOT}{module}.lora_A.weight"] = rng.normal(0, 0.2, (rank, k)).astype(np.float32)
            tensors[f"{ROOT}{module}.lora_B.weight"] = rng.normal(0, 0.2, (n, rank)).astype(np.float32)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": [m.split(".")[-1] for m in modules],
        "bias": "none",
        "use_dora": False,
    }
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config | changes))
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    return directory, tensors


def merged(weights: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray], scale: float) -> Any:
    """The weights with scale * B A added: what an adapter means."""
    result = dict(weights)
    for name, a in tensors.items():
        if ".lora_A." in name:
            target = name.removeprefix(ROOT).replace(".lora_A.", ".")
            b = tensors[name.replace("lora_A", "lora_B")]
            result[target] = result[target] + scale * b.astype(np.float64) @ a
    return result


def native(checkpoint: Checkpoint, activations: str = "exact") -> np.ndarray:
    with closing(NativeExecutor.load(checkpoint, activations=activations, kv_dtype="f32")) as executor:
        return models.logits(executor, models.tokens(30, executor.vocab_size), [30])


def reference(checkpoint: Checkpoint, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    executor = ReferenceExecutor(checkpoint.program(), weights, dtype="float64")
    return models.logits(executor, models.tokens(30, executor.vocab_size), [30])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, files.Tensors]:
    path, tensors = models.save(tmp_path_factory.mktemp("lora") / "small", OF)
    return prepare(path), tensors


@pytest.mark.parametrize("rank", [1, 17, 200])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_equals_merged_weights(
    rank: int, strength: float, base: tuple[Path, files.Tensors], tmp_path: Path
) -> None:
    path, tensors = base
    found = adapter(tmp_path / "a", rank)
    checkpoint = open_adapted(path, found[0], strength)
    expected = reference(Checkpoint.open(path), merged(tensors, found[1], strength * 8 / rank))
    assert models.relative_error(native(checkpoint), expected) < 1e-4
    if strength:
        assert models.relative_error(native(Checkpoint.open(path)), expected) > 1e-2
    executor = ReferenceExecutor.load(checkpoint, dtype="float64")
    ids = models.tokens(30, executor.vocab_size)
    assert models.relative_error(models.logits(executor, ids, [30]), expected) < 1e-5
    assert checkpoint.weight_bytes > Checkpoint.open(path).weight_bytes
    assert checkpoint.bits_per_weight > Checkpoint.open(path).bits_per_weight


def test_two_adapters_and_root_scaling(base: tuple[Path, files.Tensors], tmp_path: Path) -> None:
    path, tensors = base
    first = adapter(tmp_path / "a", 5)
    second = adapter(tmp_path / "b", 9, seed=1, modules=("q_proj", "lm_head"), use_rslora=True)
    checkpoint = open_adapted(path, [first[0], second[0]], [0.5, -1.0])
    weights = merged(merged(tensors, first[1], 0.5 * 8 / 5), second[1], -8 / 3)
    expected = reference(Checkpoint.open(path), weights)
    assert models.relative_error(native(checkpoint), expected) < 1e-4
    assert models.relative_error(native(checkpoint, "bf16"), expected) < 0.1
    with pytest.raises(UsageError, match="2 adapters cannot have 3 strengths"):
        open_adapted(path, [first[0], second[0]], [1, 2, 3])
    with pytest.raises(UsageError, match="strength"):
        open_adapted(path, first[0], float("nan"))


def test_no_adapter_is_the_plain_checkpoint(base: tuple[Path, files.Tensors]) -> None:
    assert type(open_adapted(base[0])) is Checkpoint


def test_a_scaled_model_takes_it(tmp_path: Path) -> None:
    """Scales moved at every site, of keys, too: the adapter means what it meant before."""
    source, tensors = models.save(tmp_path / "small", OF)
    draft = Draft(Checkpoint.open(prepare(source)))
    rng = np.random.default_rng(4)
    for site in find_sites(draft.program, (*SMOOTHING, KEYS)):
        draft.fold(site, np.exp(rng.normal(0, 1, site.width)))
    (tmp_path / "out").mkdir()
    recipe = Recipe.from_yaml("methods: [{method: rtn}]")
    write(draft, recipe, tmp_path / "out", floats="f32")
    scaled = Checkpoint.open(tmp_path / "out")
    scaled.verify()
    modules = (*MODULES, "self_attn.k_proj", "mlp.gate_proj", "lm_head")
    path, added = adapter(tmp_path / "a", 3, modules=modules)
    expected = reference(Checkpoint.open(prepare(source)), merged(tensors, added, 8 / 3))
    assert models.relative_error(native(open_adapted(tmp_path / "out", path)), expected) < 1e-4
    # Without the scales it would be another model.
    (tmp_path / "out" / "smoothing.safetensors").unlink()
    assert models.relative_error(native(open_adapted(tmp_path / "out", path)), expected) > 0.1
    with pytest.raises(ModelError, match="cannot read"):
        scaled.verify()


def test_a_rounded_model_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides a branch and rounded inputs; nothing is rounded anew."""
    source, _ = models.save(tmp_path / "small", OF)
    monkeypatch.setattr(Draft, "sequences", [models.tokens(n, 250, seed=n).tolist() for n in (40, 33)])
    text = "methods: [{method: svdquant, rank: 4, grid: 2, iterations: 2, activation_bits: 8}]"
    compress(source, Recipe.from_yaml(text), tmp_path / "out", evaluate=False)
    plain = Checkpoint.open(tmp_path / "out")
    path = adapter(tmp_path / "a", 3)[0]
    checkpoint = open_adapted(tmp_path / "out", path)
    for name in plain.specs:
        for part, array in plain.packed(name).arrays.items():
            assert np.array_equal(checkpoint.packed(name).arrays[part], array)
    executor = ReferenceExecutor.load(checkpoint, dtype="float64")
    expected = models.logits(executor, models.tokens(30, executor.vocab_size), [30])
    assert models.relative_error(native(checkpoint), expected) < 0.05
    assert models.relative_error(native(checkpoint, "fast"), expected) < 0.1
    assert models.relative_error(native(plain), expected) > 0.2


def damaged_config(**changes: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | changes))

    return damage


def damaged_tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
        change(tensors)
        safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")

    return damage


Q = f"{ROOT}model.layers.0.self_attn.q_proj"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "kind": (damaged_config(peft_type="LOHA"), "type 'LOHA' are not supported"),
    "no kind": (damaged_config(peft_type=None), "type None"),
    "dora": (damaged_config(use_dora=True), "use_dora True is not supported"),
    "bias": (damaged_config(bias="lora_only"), "bias 'lora_only'"),
    "saved": (damaged_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "alphas": (damaged_config(alpha_pattern={"(a+)+$": 3}), "alpha_pattern"),
    "pissa": (damaged_config(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
    "rank": (damaged_config(r=10**30), "not a rank"),
    "rank true": (damaged_config(r=True), "not a rank"),
    "other rank": (damaged_config(r=4), "do not fit r = 4"),
    "alpha": (damaged_config(lora_alpha=float("nan")), "lora_alpha"),
    "alpha text": (damaged_config(lora_alpha="8"), "lora_alpha"),
    "targets": (damaged_config(target_modules=["v_proj"]), "not among the target_modules"),
    "not json": (lambda path: (path / "adapter_config.json").write_text("[") and None, "not valid JSON"),
    "cut": (
        lambda path: (path / "adapter_model.safetensors").write_bytes(b"\xff" * 7) and None,
        "safetensors",
    ),
    "no weights": (lambda path: (path / "adapter_model.safetensors").unlink(), "cannot read"),
    "half": (damaged_tensors(lambda t: t.__delitem__(f"{Q}.lora_B.weight")), "lacks one of"),
    "vector": (
        damaged_tensors(lambda t: t.update({f"{Q}.lora_B.weight": np.ones(3, np.float32)})),
        "no matrix of",
    ),
    "integers": (
        damaged_tensors(lambda t: t.update({f"{Q}.lora_B.weight": np.ones((3, 3), np.int8)})),
        "no matrix of",
    ),
    "infinite": (
        damaged_tensors(lambda t: t[f"{Q}.lora_B.weight"].__setitem__((0, 0), np.inf)),
        "not finite",
    ),
    "magnitude": (
        damaged_tensors(lambda t: t.update({f"{Q}.lora_magnitude_vector": np.ones(3, np.float32)})),
        "no matrix of a plain LoRA adapter",
    ),
    "twice": (
        damaged_tensors(lambda t: t.update({f"{Q}.lora_A.other.weight": np.ones((3, 96), np.float32)})),
        "twice",
    ),
    "none": (damaged_tensors(dict.clear), "no tensors"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_adapter_is_refused(name: str, tmp_path: Path) -> None:
    path, _ = adapter(tmp_path / "a", 3)
    damage, message = DAMAGES[name]
    damage(path)
    assert_refused(lambda: read_adapter(path), message)
    assert traced_peak(lambda: read_adapter(path)) < MEMORY_LIMIT


def test_an_adapter_of_another_model_is_refused(base: tuple[Path, files.Tensors], tmp_path: Path) -> None:
    def foreign(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{ROOT}model.layers.9.self_attn.q_proj.lora_A.weight"] = np.ones((3, 96), np.float32)
        tensors[f"{ROOT}model.layers.9.self_attn.q_proj.lora_B.weight"] = np.ones((256, 3), np.float32)

    def wide(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{Q}.lora_A.weight"] = np.ones((3, 97), np.float32)

    for number, (change, message) in enumerate(((foreign, "has no linear"), (wide, "is for a matrix"))):
        path, _ = adapter(tmp_path / str(number), 3)
        damaged_tensors(change)(path)
        assert_refused(lambda path=path: open_adapted(base[0], path), message)  # type: ignore[misc]
    assert_refused(lambda: open_adapted(base[0], tmp_path / "nowhere"), "cannot read")


def test_damaged_factors_are_refused(base: tuple[Path, files.Tensors], tmp_path: Path) -> None:
    path = tmp_path / "copy"
    path.mkdir()
    for file in base[0].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    name = "model.layers.0.self_attn.q_proj.weight"
    good = {f"{name}.rows": np.ones(256, np.float32), f"{name}.columns": np.ones(96, np.float32)}
    for change in (
        {f"{name}.rows": np.ones(255, np.float32)},
        {f"{name}.columns": np.zeros(96, np.float32)},
        {f"{name}.columns": np.ones(96, np.float64)},
        {"nothing.rows": np.ones(3, np.float32), "nothing.columns": np.ones(3, np.float32)},
        {"nothing.rows": np.ones(3, np.float32)},
    ):
        safetensors.numpy.save_file(good | change, path / "smoothing.safetensors")
        assert_refused(lambda: Checkpoint.open(path).factors, "smoothing")
        assert_refused(lambda: Checkpoint.open(path).verify(), "smoothing")
