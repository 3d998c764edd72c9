"""FireQ: its numbers against the definitions, its scales against the function they must not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gristmill.backends.native import NativeExecutor, _native
from gristmill.backends.reference import ReferenceExecutor
from gristmill.calibrate.planted import plant
from gristmill.calibrate.sites import KEYS, find_sites, fold
from gristmill.calibrate.stream import Stream
from gristmill.errors import ModelError, UsageError
from gristmill.formats.packed import decode
from gristmill.io.checkpoint import Checkpoint
from gristmill.io.json_file import read_object
from gristmill.methods.compress import compress
from gristmill.methods.recipe import Recipe
from gristmill.methods.weights.fireq import (
    METHOD,
    FireqOptions,
    channel_means,
    places,
    quantise,
    scale_keys,
    tau_exponent,
)
from gristmill.models import build_program
from gristmill.program.edits import keep_keys
from gristmill.program.nodes import Program
from tests.formats.test_fp8 import nearest
from tests.kits import files, levels, models
from tests.kits.executor import check_threads

CASES = ["llama-smollm2", "llama-biases", "mistral", "qwen2", "qwen3", "gemma3-linear"]
Tensors = dict[str, NDArray[Any]]


# Weights ------------------------------------------------------------------------------------------------


def plainly(w: NDArray[np.float32], group: int, *, rounded: bool, entry: bool) -> NDArray[np.float64]:
    """What the method makes of a matrix, number by number; tau found by looking at all of its powers."""
    starts = range(0, w.shape[1], group)
    maxima = [float(np.abs(row[g : g + group]).max()) for row in w for g in starts]
    slack = {}
    for i in range(15):
        if max(maxima) * 2**i > 448:
            break
        slack[i] = sum(max(0.0, 7 * 2.0**-9 - m * 2**i) for m in maxima)
    tau = 2.0 ** (min(slack, key=lambda i: (slack[i], i)) if slack else 0)
    out = np.zeros(w.shape)
    for r, row in enumerate(w):
        for g in starts:
            part = row[g : g + group]
            top = np.float32(max(np.float32(np.abs(part).max() * np.float32(tau)), np.float32(1e-5)))
            sigma = max(nearest(float(top / np.float32(7))), 2.0**-9)
            table = {q: nearest(q * sigma) if rounded else q * sigma for q in range(-8, 8)}
            for c, value in enumerate(part):
                x = float(np.float32(value * np.float32(tau)))
                q = int(np.clip(np.rint(np.float32(x) / np.float32(sigma)), -8, 7))
                if entry:
                    q = min(range(-8, 8), key=lambda p: (abs(np.float32(x - table[p])), abs(p - q)))
                out[r, g + c] = table[q] / tau
    return out


@pytest.mark.parametrize(("rounded", "entry"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("shape", [(1, 1, 8), (5, 100, 64), (17, 72, 32), (3, 40, 128)])
@pytest.mark.parametrize("size", [1e-4, 0.02, 3.0])
def test_against_the_definition(rounded: bool, entry: bool, shape: tuple[int, int, int], size: float) -> None:
    n, k, group = shape
    w = (np.random.default_rng([n, k]).standard_normal((n, k)) * size).astype(np.float32)
    w[:, : k // 3] *= np.float32(0.05)
    options = FireqOptions(group=group, lut_round=rounded, codes="entry" if entry else "multiple")
    found = decode(quantise(w, options))
    assert np.array_equal(found, plainly(w, group, rounded=rounded, entry=entry and rounded))


def test_nearest_entries_are_nearer() -> None:
    w = np.random.default_rng(2).standard_normal((64, 256)).astype(np.float32)
    error = {
        codes: np.abs(decode(quantise(w, FireqOptions(codes=codes))) - w) for codes in ("entry", "multiple")
    }
    assert (error["entry"] <= error["multiple"]).all()
    assert error["entry"].mean() < 0.998 * error["multiple"].mean()


def test_tau_saves_tiny_weights() -> None:
    w = (np.random.default_rng(3).standard_normal((32, 128)) * 1e-4).astype(np.float32)
    packed = quantise(w, FireqOptions())
    assert packed.spec.exponent >= 6
    with_tau = np.linalg.norm(decode(packed) - w)
    # Without it every scale is 2^-9, and every weight 0.
    without = np.linalg.norm(w)
    assert with_tau < without / 5


def test_tau() -> None:
    groups = np.array([[0.5, 0.01], [0.02, 0.001]], np.float32)
    assert tau_exponent(groups) == 4  # 0.001 * 2^4 is above 7 * 2^-9 = 0.0137, * 2^3 is not
    assert tau_exponent(np.array([[400.0, 1e-6]], np.float32)) == 0
    assert tau_exponent(np.array([[100.0, 1e-6]], np.float32)) == 2
    assert tau_exponent(np.array([[1e4]], np.float32)) == 0
    assert tau_exponent(np.full((3, 3), 1e-9, np.float32)) == 14
    assert tau_exponent(np.ones((3, 3), np.float32)) == 0


def test_hard_tensors() -> None:
    zeros = quantise(np.zeros((20, 72), np.float32), FireqOptions())
    assert not decode(zeros).any()
    one = np.full((4, 64), 1e-3, np.float32)
    one[0, 0] = 400
    found = decode(quantise(one, FireqOptions()))
    assert abs(found[0, 0] / 400 - 1) < 0.07  # E4M3 has sixteenths
    assert found[0, 1:].max() == 0
    huge = one * np.float32(3)
    with pytest.raises(ModelError, match="448"):
        quantise(huge, FireqOptions())
    assert abs(decode(quantise(huge, FireqOptions(lut_round=False)))[0, 0] / 1200 - 1) < 0.07
    with pytest.raises(ModelError, match="finite"):
        quantise(np.full((1, 8), np.nan, np.float32), FireqOptions())


def test_true_bits() -> None:
    w = np.ones((64, 1024), np.float32)
    assert quantise(w, FireqOptions(group=128)).bits_per_weight == 4 + 8 / 128
    assert quantise(w, FireqOptions(group=64, scales="f16")).bits_per_weight == 4 + 16 / 64


# Scales -------------------------------------------------------------------------------------------------


def small(case: str, *, keys: bool = False) -> tuple[Program, Tensors]:
    of = models.configs()[case]
    program = build_program(of)
    tensors = {name: v.astype(np.float64) for name, v in files.weights(of).items()}
    tensors = {name: tensors[name] for name in program.weights}
    return program, plant(program, tensors, (KEYS,), share=0.1, factor=20) if keys else tensors


def scaled(
    program: Program, tensors: Tensors, options: FireqOptions
) -> tuple[Program, Tensors, Mapping[str, NDArray[np.float32]]]:
    """A model with its keys scaled."""
    ids = models.tokens(24, program.vocab_size).tolist()
    stream = Stream(ReferenceExecutor(program, tensors), [ids, ids[:7]])
    sites = (
        {site.buffer: site for site in find_sites(program, (KEYS,))} if options.keys in ("n", "ns") else {}
    )
    result, scales = dict(tensors), {}
    attention = [node.name for node in program.nodes if node.op == "attention"]
    for node in stream:
        if node.op != "attention":
            continue
        site = sites.get(node.inputs[1])
        found = scale_keys(node, [stream.inputs(node, i) for i in range(3)], options, site)
        if site is not None:
            result |= fold({part.weight: result[part.weight] for part in site.parts}, site, found["factors"])
        scales[node.name] = found["key_scale"]
    if options.keys in ("s", "ns"):
        program = keep_keys(program, attention, scaled=True)
        result |= {f"{name}.key_scale": s for name, s in scales.items()}
    return program, result, scales


@pytest.mark.parametrize("keys", ["n", "s", "ns"])
@pytest.mark.parametrize("top_k", [None, 1, 5])
@pytest.mark.parametrize("case", CASES)
def test_logits_do_not_change(case: str, keys: str, top_k: int | None) -> None:
    """Before and after the rotation, heads that share keys, any position, partners both chosen."""
    program, tensors = small(case, keys=True)
    options = FireqOptions(keys=keys, top_k=top_k if "s" in keys else None)
    changed, others, scales = scaled(program, tensors, options)
    ids = models.tokens(40, program.vocab_size)
    expected = models.logits(ReferenceExecutor(program, tensors, dtype="float64"), ids, [40])
    got = models.logits(ReferenceExecutor(changed, others, dtype="float64"), ids, [1, 8, 31])
    assert models.relative_error(got, expected) < 1e-9
    moved = [name for name, value in tensors.items() if not np.array_equal(value, others[name])]
    assert bool(moved) == ("n" in keys)
    if top_k is not None and "s" in keys:
        assert all((s != 1).any() for s in scales.values())


def keys_of(program: Program, tensors: Tensors) -> list[NDArray[np.float64]]:
    """Of every layer the keys as they are kept: [tokens, kv_heads, head_dim]."""
    executor = ReferenceExecutor(program, tensors, dtype="float64")
    view = executor.allocate(24)
    ids = models.tokens(24, program.vocab_size)
    every = np.arange(24, dtype=np.int32)
    from gristmill.program.batch import Batch

    executor.step(Batch(ids, np.array([24], np.int32), (view,), every, np.zeros(24, np.uint8)))
    return [keys.numpy() for keys, _ in view.held.values()]


@pytest.mark.parametrize("case", ["llama-smollm2", "qwen3"])
def test_outliers_fall(case: str) -> None:
    program, tensors = small(case, keys=True)

    def spread(keys: str) -> float:
        searched = {"top_k": 16, "level": 1.0} if "s" in keys else {}
        changed, others, _ = scaled(program, tensors, FireqOptions(keys=keys, **searched))
        peaks = [np.abs(k).max(axis=0) for k in keys_of(changed, others)]
        return max(float((p.max(axis=1) / np.median(p, axis=1)).max()) for p in peaks)

    plain = spread("none")
    assert plain > 8
    for keys in ("n", "s", "ns"):
        assert spread(keys) < plain / 3, keys


@pytest.mark.parametrize("case", ["llama-smollm2", "qwen3"])
def test_the_search_finds_what_an_int4_cache_needs(case: str) -> None:
    """Before the rotation or after it, keys with outliers lose less; both together least, or nearly so."""
    program, tensors = small(case, keys=True)
    ids = models.tokens(60, program.vocab_size)
    exact = models.logits(ReferenceExecutor(program, tensors), ids, [60])

    def error(keys: str) -> float:
        changed, others, _ = scaled(program, tensors, FireqOptions(keys=keys))
        executor = ReferenceExecutor(changed, others, kv_dtype="int4")
        return float(np.square(models.logits(executor, ids, [60]) - exact).mean())

    none, before, after, both = map(error, ("none", "n", "s", "ns"))
    assert before < none / 2
    assert after < none / 2
    assert both < 1.1 * min(before, after)


def test_scaled_once_where_both_partners_are_chosen() -> None:
    """With every channel chosen each is scaled by its own largest key, once, and nothing beforehand."""
    program, tensors = small("llama-smollm2")
    options = FireqOptions(keys="ns", top_k=64, level=2.0)
    changed, others, _ = scaled(program, tensors, options)
    assert all(np.array_equal(tensors[name], others[name]) for name in tensors)
    for keys in keys_of(changed, others):
        # The keys were measured in float32.
        np.testing.assert_allclose(np.abs(keys).max(axis=0), 2, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_channel_scales_change_no_logits(case: str) -> None:
    program, tensors = small(case)
    matrices = {name for name, weight in program.weights.items() if len(weight.shape) == 2}
    found = places(program, matrices)
    assert found["gate_up"]
    assert found["down"]
    others = dict(tensors)
    for site in [site for one in found.values() for site in one]:
        others |= fold(
            {p.weight: others[p.weight] for p in site.parts}, site, 1 / channel_means(site, others)
        )
        # Every channel of the consumers is now as large as any other.
        np.testing.assert_allclose(channel_means(site, others), 1)
    ids = models.tokens(20, program.vocab_size)
    expected = models.logits(ReferenceExecutor(program, tensors, dtype="float64"), ids, [20])
    got = models.logits(ReferenceExecutor(program, others, dtype="float64"), ids, [20])
    assert models.relative_error(got, expected) < 1e-9


def test_shared_value_channels() -> None:
    """Under grouped queries a channel of v meets the columns of all heads of its group in o."""
    program, tensors = small("llama-smollm2")
    site = places(program, set(program.weights))["o"][0]
    o = np.abs(tensors["model.layers.0.self_attn.o_proj.weight"])
    heads = o.mean(axis=0).reshape(3, 3, 64)  # [kv head, its heads, channel]
    np.testing.assert_allclose(channel_means(site, tensors), heads.mean(axis=1).reshape(-1))


# The method ---------------------------------------------------------------------------------------------

RECIPE = "calibration: {{tokens: 96, sequence: 32}}\nmethods: [{{method: fireq{}}}]"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRISTMILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def model(directory: Path, case: str) -> Path:
    """A small random model with a tokenizer."""
    of = models.configs()[case] | {"vocab_size": 272}
    return files.write_gguf(directory / "model.gguf", of, files.weights(of), {})[0]


def recipe(options: str = "") -> Recipe:
    group = "" if "weights: false" in options or "group" in options else ", group: 32"
    return Recipe.from_yaml(RECIPE.format(group + options), "fireq")


@pytest.mark.parametrize("case", ["llama-smollm2", "llama-biases", "qwen2", "qwen3", "gemma3-linear"])
@pytest.mark.parametrize(
    "options",
    [
        ", smooth: [qkv, o, gate_up, down]",
        ", scales: f16, keys: s, smooth: []",
        ", lut_round: false, activations: false, keys: n, kv: false",
        ", weights: false, activations: false",
    ],
)
def test_native_agrees_with_reference(case: str, options: str, tmp_path: Path) -> None:
    compress(model(tmp_path, case), recipe(options), tmp_path / "out", evaluate=False)
    made = Checkpoint.open(tmp_path / "out")
    assert made.edited == ("keys: n" not in options)
    ids = models.tokens(40, made.program().vocab_size)
    expected = models.logits(ReferenceExecutor.load(made, dtype="float64", kv_dtype="f32"), ids, [40])
    for activations in ("exact", "fast"):
        with closing(NativeExecutor.load(made, activations=activations, kv_dtype="f32")) as executor:
            error = np.abs(models.logits(executor, ids, [40]) - expected) / np.abs(expected).max()
        # Where inputs are rounded, a last bit becomes a step of E4M3 now and then.
        plain = activations == "exact" and "activations: false" in options
        assert np.median(error) < (1e-6 if plain else 0.02), activations
        assert error.max() < (1e-4 if plain else 0.15), activations
    with closing(NativeExecutor.load(made)) as executor:
        assert executor.kv_dtype == ("bf16" if "kv: false" in options else "int4")


LEVELS = _native.available_levels() + levels.emulated()


@pytest.mark.parametrize(
    ("level", "activations"),
    [*((level, "fast") for level in LEVELS), (LEVELS[0], "exact"), (LEVELS[-1], "bf16")],
)
def test_contract(level: str, activations: str, small_fireq: Path) -> None:
    check_threads(
        lambda threads: NativeExecutor.load(
            small_fireq, activations=activations, threads=threads, level=level
        )
    )


@pytest.fixture(scope="module")
def small_fireq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fireq")
    compress(model(root, "llama"), recipe(), root / "out", evaluate=False)
    return root / "out"


def test_resumes_with_the_same_bytes(small_fireq: Path, tmp_path: Path) -> None:
    def stop(label: str, done: int, total: int) -> None:
        if label == "rounding" and done == 3:
            raise KeyboardInterrupt

    source = small_fireq.parent / "model.gguf"
    with pytest.raises(KeyboardInterrupt):
        compress(source, recipe(), tmp_path / "out", evaluate=False, progress=stop)
    assert list((tmp_path / ".out.partial" / "steps").glob("*/*.safetensors"))
    compress(source, recipe(), tmp_path / "out", evaluate=False)
    for path in small_fireq.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_slots_follow_the_options() -> None:
    assert METHOD.slots(FireqOptions(weights=False, activations=False, keys="none")) == ("kv_format",)
    assert set(METHOD.slots(FireqOptions(kv=False, smooth=()))) == {
        "key_scaling",
        "rounding",
        "weight_format",
        "activation_encoding",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("scales: f16, lut_round: true", "lut_round is of products with E4M3 scales"),
        ("scales: f16, codes: entry", "codes: entry are of rounded products"),
        ("lut_round: false, codes: entry", "codes: entry are of rounded products"),
        ("weights: false, group: 128", "group says how weights are rounded"),
        ("weights: false, scales: f16", "scales says how weights are rounded"),
        ("weights: false, codes: entry", "codes says how weights are rounded"),
        ("weights: false, strength: 0.5", "strength says how weights are rounded"),
        ("weights: false, smooth: [down]", "smooth scales channels for the rounding of weights"),
        ("smooth: [], strength: 0.5", "strength is of the places of smooth"),
        ("keys: n, top_k: 3", "top_k and level are of scales after the rotation"),
        ("keys: none, level: 2", "top_k and level are of scales after the rotation"),
    ],
)
def test_options_in_vain_are_refused(options: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"line 2: fireq: {message}"):
        recipe(f", {options}")


@pytest.mark.parametrize("options", ["", ", scales: f16", ", weights: false", ", keys: n", ", smooth: []"])
def test_a_recipe_spelled_out_is_the_same_recipe(options: str) -> None:
    one = recipe(options)
    assert Recipe.from_yaml(one.to_yaml()).to_yaml() == one.to_yaml()


def test_more_channels_than_there_are(small_fireq: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"top_k 200 is more than the \d+ channels of "):
        compress(small_fireq.parent / "model.gguf", recipe(", top_k: 200"), tmp_path / "out", evaluate=False)


def test_reads_text_only_to_scale() -> None:
    assert not recipe(", smooth: [], keys: none").calibrated
    assert not recipe(", weights: false, keys: none").calibrated
    assert recipe(", smooth: []").calibrated
    assert recipe(", keys: none").calibrated


def test_only_the_chosen_tensors(small_fireq: Path, tmp_path: Path) -> None:
    text = RECIPE.format(", group: 32, tensors: '*down_proj*'")
    compress(
        small_fireq.parent / "model.gguf", Recipe.from_yaml(text, "part"), tmp_path / "out", evaluate=False
    )
    made = Checkpoint.open(tmp_path / "out")
    assert {n for n, s in made.specs.items() if s.scales == "e4m3"} == {
        n for n in made.specs if "down_proj" in n
    }
    assert all(not n.attributes.get("kv_format") for n in made.program().nodes)
    # Of what the options ask for, this much was not to be done.
    notes = read_object(made.directory / "report.json")["notes"]
    assert notes[0] == "fireq: no layer's k_proj is among the tensors: keys stay as they are"
    assert notes[1].startswith("fireq: no channels can be scaled in front of gate_up")
