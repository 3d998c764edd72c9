"""Sites of every architecture, and that folding leaves the function as it was."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gristmill.backends.reference import ReferenceExecutor
from gristmill.calibrate.sites import GATED, KEYS, NORM, SMOOTHING, VALUES, Site, find_sites, fold
from gristmill.errors import UsageError
from gristmill.models import build_program
from gristmill.program.nodes import Node, Program, ProgramError
from gristmill.program.passes import lower, rewrite
from gristmill.program.render import LOWERING
from tests.kits import files, models
from tests.kits.executor import PROMPT, batch_of

ALL = (*SMOOTHING, KEYS)
# 9 heads that share 3; windows; biases of q, k and v; head norms; offsets; biases everywhere.
NAMES = ["llama-smollm2", "mistral", "qwen2", "qwen3", "gemma3", "llama-biases"]
Weights = dict[str, NDArray[np.float64]]


def model(name: str) -> tuple[Program, Weights]:
    of = models.configs()[name]
    return build_program(of), {n: v.astype(np.float64) for n, v in files.weights(of).items()}


def logits(program: Program, weights: Weights) -> NDArray[np.float32]:
    executor = ReferenceExecutor(program, weights, dtype="float64")
    ids = models.tokens(40, executor.vocab_size)
    with torch.no_grad():
        return executor.forward(batch_of([(executor.allocate(40), ids, PROMPT)])).numpy()


def factors(site: Site, seed: int = 0) -> NDArray[np.float64]:
    return np.exp(np.random.default_rng([seed, site.width]).uniform(-3, 3, site.width))


@pytest.mark.parametrize("name", models.configs())
def test_every_architecture_has_all_its_sites(name: str) -> None:
    of = models.configs()[name]
    sites = find_sites(build_program(of), ALL)
    layers = of["num_hidden_layers"]
    assert Counter(site.kind for site in sites) == {
        NORM: 2 * layers,
        GATED: layers,
        VALUES: layers,
        KEYS: layers,
    }
    consumed = {name for site in sites if site.kind != KEYS for name in site.consumers}
    matrices = {n for n, v in files.weights(of).items() if v.ndim == 2}
    assert matrices - consumed == matrices & {"lm_head.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ALL)
def test_folding_at_each_site_changes_weights_but_not_the_function(name: str, kind: str) -> None:
    program, weights = model(name)
    before = logits(program, weights)
    sites = find_sites(program, [kind])
    for site in [sites[0], sites[-1]]:
        changed = fold(weights, site, factors(site))
        assert set(changed) == {*site.producers, *site.consumers}
        assert not any(np.array_equal(changed[n], weights[n]) for n in changed)
        assert models.relative_error(logits(program, weights | changed), before) < 1e-9
        # Each side alone is another function: the logits do see what was scaled.
        for part in (site.producers, site.consumers):
            halves = weights | {n: changed[n] for n in part}
            assert models.relative_error(logits(program, halves), before) > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_all_sites_together_and_back(name: str) -> None:
    program, weights = model(name)
    sites = find_sites(program, ALL)
    there = dict(weights)
    for site in sites:
        there |= fold(there, site, factors(site))
    assert models.relative_error(logits(program, there), logits(program, weights)) < 1e-9
    back = dict(there)
    for site in reversed(sites):
        back |= fold(back, site, 1 / factors(site))
    for tensor in weights:
        assert models.relative_error(back[tensor], weights[tensor]) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_factors_of_one_keep_the_bits_and_powers_of_two_come_back(name: str) -> None:
    program = build_program(models.configs()[name])
    weights = files.weights(models.configs()[name])
    for site in find_sites(program, ALL):
        weights[site.producers[0]].reshape(-1)[:3] = [-0.0, 1e-30, 0.0]
        same = fold(weights, site, np.ones(site.width))
        for tensor, value in same.items():
            assert value.dtype == np.float32
            assert value.tobytes() == weights[tensor].tobytes()
        two = 2.0 ** np.random.default_rng(1).integers(-3, 4, site.width)
        offset = any(part.offset for part in site.parts)
        twice = fold(fold(weights, site, two), site, 1 / two)
        for tensor, value in twice.items():
            assert models.relative_error(value, weights[tensor]) <= (1e-6 if offset else 0)


def test_tensors_stay_tensors_of_their_dtype() -> None:
    program, weights = model("gemma3")
    site = find_sites(program, [NORM])[0]
    arrays = fold({n: v.astype(np.float32) for n, v in weights.items()}, site, factors(site))
    tensors = fold(
        {n: torch.from_numpy(v).float() for n, v in weights.items()}, site, torch.from_numpy(factors(site))
    )
    for name, value in tensors.items():
        assert value.dtype == torch.float32
        assert np.array_equal(value.numpy(), arrays[name])
    halves = fold({n: torch.from_numpy(v).bfloat16() for n, v in weights.items()}, site, factors(site))
    assert {value.dtype for value in halves.values()} == {torch.bfloat16}


def test_a_value_channel_has_the_columns_of_its_whole_group() -> None:
    program, _ = model("llama-smollm2")
    site = find_sites(program, [VALUES])[0]
    assert (site.width, len(site.channels)) == (3 * 64, 9 * 64)
    assert site.buffer == "layers.0.self_attn.attention"
    for head in range(9):
        for d in (0, 63):
            assert site.channels[head * 64 + d] == head // 3 * 64 + d
    values = np.random.default_rng(0).standard_normal(9 * 64)
    assert np.array_equal(site.largest(values), values.reshape(3, 3, 64).max(1).reshape(-1))


def test_a_key_channel_is_a_rotary_pair() -> None:
    site = find_sites(model("llama-smollm2")[0], [KEYS])[0]
    assert site.width == 3 * 32
    assert [site.channels[i] for i in (0, 31, 32, 63, 64)] == [0, 31, 0, 31, 32]
    # With normed heads, one for all heads.
    assert find_sites(model("qwen3")[0], [KEYS])[0].width == 48 // 2


@pytest.mark.parametrize("dim", [None, 16])
def test_keys_that_are_rotated_in_part_or_not_at_all(dim: int | None) -> None:
    program, weights = model("llama-smollm2")
    nodes = []
    for node in program.nodes:
        if node.op == "attention":
            rope = None if dim is None else {**node.attributes["rope"], "dim": dim}
            nodes.append(replace(node, attributes={**node.attributes, "rope": rope}))
        else:
            nodes.append(node)
    program = rewrite(program, nodes)
    site = find_sites(program, [KEYS])[0]
    assert site.width == 3 * (64 - (dim or 0) // 2)
    changed = fold(weights, site, factors(site))
    assert models.relative_error(logits(program, weights | changed), logits(program, weights)) < 1e-9


def changed_nodes(program: Program, added: Node, **inputs: tuple[str, ...]) -> Program:
    """The program with one more node, and with other inputs for some nodes, named with _ for the dot."""
    nodes = [
        replace(n, inputs=inputs[n.name.replace(".", "_")]) if n.name.replace(".", "_") in inputs else n
        for n in program.nodes
    ]
    return rewrite(program, [*nodes, added])


def test_a_site_with_an_unknown_reader_is_not_listed() -> None:
    program, _ = model("llama")
    listed = {(site.kind, site.name) for site in find_sites(program, ALL)}
    # The first layer's residual now also takes the normed input, and its up projection is read twice.
    norm = Node("more", "add", ("layers.0.input_layernorm", "embed_tokens"), ("more",))
    without_norm = changed_nodes(
        program, norm, layers_0_self_attn_residual=("more", "layers.0.self_attn.o_proj")
    )
    up = "layers.0.mlp.up_proj"
    twice = changed_nodes(program, Node("more", "add", (up, up), ("more",)), layers_0_mlp_gated=("more", up))
    for found, gone in [
        (without_norm, (NORM, "layers.0.input_layernorm")),
        (twice, (GATED, "layers.0.mlp.up_proj")),
    ]:
        assert listed - {(site.kind, site.name) for site in find_sites(found, ALL)} == {gone}


def test_a_site_whose_tensor_is_read_elsewhere_is_not_listed() -> None:
    program, _ = model("llama")
    node, other = (program.node(f"layers.{i}.mlp.down_proj") for i in (1, 0))
    shared = [replace(n, weights=other.weights) if n is node else n for n in program.nodes]
    names = [site.name for site in find_sites(rewrite(program, shared), [GATED])]
    assert names == []


def test_wrong_use_is_refused() -> None:
    program, weights = model("llama")
    with pytest.raises(ProgramError, match="lowered"):
        find_sites(lower(program, LOWERING))
    site = find_sites(program)[0]
    for bad in (np.ones(3), np.zeros(site.width), np.full(site.width, np.inf), -np.ones(site.width)):
        with pytest.raises(UsageError, match=r"layers\.0\.input_layernorm"):
            fold(weights, site, bad)
