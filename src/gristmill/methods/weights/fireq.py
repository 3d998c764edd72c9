"""FireQ: int4 weights under E4M3 scales, E4M3 rows of activations, int4 keys made even around the rotation.

Baek et al., arXiv 2505.20839. docs/methods/fireq.md says what is different here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from gristmill.calibrate.sites import GATED, KEYS, NORM, VALUES, Site, find_sites, fold
from gristmill.errors import ModelError, UsageError
from gristmill.formats import fp8, group_int
from gristmill.formats.packed import MAX_EXPONENT, Packed, decode_f32
from gristmill.methods.base import Method, Options, attention_of
from gristmill.methods.draft import Arrays, Draft
from gristmill.methods.weights._smoothing import best_of
from gristmill.program.edits import keep_keys, linears_of, round_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from gristmill.backends.reference.ops import Context
    from gristmill.program.nodes import Node, Program

Place = Literal["qkv", "o", "gate_up", "down"]

SEARCHED_TOKENS = 2048
"""Calibration tokens that the searches look at, at most; the products of a search are of fewer rows."""
_ROWS = 512
_BEFORE, _AFTER = ("n", "ns"), ("s", "ns")
_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_LEVELS = (0.7, 1.0, 1.4)
_TOPS = (1, 3, 8)
_SMALLEST = 7 * fp8.SMALLEST
"""What a group's largest weight must be for a scale that is not rounded up."""


class FireqOptions(Options):
    """Each part can be switched off; options of a part that is off are refused.

    weights: int4 codes in groups of `group` columns, scales "e4m3" or "f16"; lut_round: products of code and
    E4M3 scale are rounded to E4M3, as the paper's table holds them (None: if the scales are E4M3); codes: the
    nearest "multiple" of the scale, or the nearest "entry" of the rounded products. activations: rows of E4M3
    with one scale. smooth: the linears in front of which channels are scaled (None: gate_up and down, if
    weights are rounded), by the power `strength` of their weights' mean size (None: searched per place).
    keys: scales before the rotation ("n"), after it ("s"), both or none. top_k: channels of every key-value
    head that are scaled after the rotation, besides their partners; level: their largest key in relation to
    the other channels' (None: both searched per layer). kv: int4 cache.
    """

    weights: bool = True
    group: Annotated[int, Field(ge=8, le=1024, multiple_of=8)] = 64
    scales: Literal["e4m3", "f16"] = "e4m3"
    lut_round: bool | None = None
    codes: Literal["multiple", "entry"] = "multiple"
    activations: bool = True
    smooth: tuple[Place, ...] | None = None
    strength: Annotated[float, Field(ge=0, le=1)] | None = None
    keys: Literal["none", "n", "s", "ns"] = "ns"
    top_k: Annotated[int, Field(ge=1, le=256)] | None = None
    level: Annotated[float, Field(gt=0, le=1000)] | None = None
    kv: bool = True

    @property
    def rounded(self) -> bool:
        """Whether products of code and scale are rounded to E4M3."""
        return self.scales == "e4m3" if self.lut_round is None else self.lut_round

    @property
    def smoothed(self) -> tuple[Place, ...]:
        """The places where channels are scaled."""
        return (("gate_up", "down") if self.weights else ()) if self.smooth is None else self.smooth

    @model_validator(mode="after")
    def _nothing_in_vain(self) -> FireqOptions:
        default = FireqOptions.model_fields
        if not self.weights:
            for name in ("group", "scales", "lut_round", "codes", "strength"):
                if getattr(self, name) != default[name].default:
                    raise ValueError(f"{name} says how weights are rounded, but weights is false")
            if self.smooth:
                raise ValueError("smooth scales channels for the rounding of weights, but weights is false")
        if self.scales == "f16" and self.lut_round:
            raise ValueError("lut_round is of products with E4M3 scales, but scales is f16")
        if self.codes == "entry" and not self.rounded:
            raise ValueError("codes: entry are of rounded products, but lut_round is off")
        if self.strength is not None and not self.smoothed:
            raise ValueError("strength is of the places of smooth, and there are none")
        if self.keys not in _AFTER and (self.top_k is not None or self.level is not None):
            raise ValueError(f"top_k and level are of scales after the rotation, but keys is {self.keys}")
        return self


class Fireq(Method[FireqOptions]):
    """Float formats of eight bits where they are cheap, integers of four where memory counts."""

    name = "fireq"
    title = "Int4 weights and keys under 8-bit float scales, 8-bit float activations"
    paper = "FireQ, 2025, arXiv 2505.20839"
    options = FireqOptions
    calibrated = True

    def reads_text(self, options: FireqOptions) -> bool:
        """Scaling does, rounding does not."""
        return bool(options.smoothed) or options.keys != "none"

    def slots(self, options: FireqOptions) -> Sequence[str]:
        """Those of the parts that are switched on."""
        parts = {
            "smoothing": bool(options.smoothed),
            "key_scaling": options.keys != "none",
            "rounding": options.weights,
            "weight_format": options.weights,
            "activation_encoding": options.activations,
            "kv_format": options.kv,
        }
        return tuple(slot for slot, on in parts.items() if on)

    def weight_group(self, options: FireqOptions) -> int | None:
        """Its own, if it rounds weights."""
        return options.group if options.weights else None

    def apply(self, draft: Draft, options: FireqOptions, tensors: Sequence[str]) -> None:
        """Scales channels, then keys, then rounds."""
        chosen = set(tensors)
        attention = attention_of(draft.program, chosen)
        if not attention and (options.kv or options.keys != "none"):
            draft.notes.append(f"{self.name}: no layer's k_proj is among the tensors: keys stay as they are")
        for name in attention:
            node = draft.program.node(name)
            if options.keys in _AFTER and node.weights:
                raise UsageError(f"the keys of {name} are scaled already")
            size = node.attributes["head_dim"]
            if options.top_k is not None and options.top_k > size:
                raise UsageError(f"top_k {options.top_k} is more than the {size} channels of {name}")
        _scale(draft, options, chosen, attention)
        if options.kv:
            draft.edit(keep_keys(draft.program, attention, kv_format="int4"))
        if options.weights:
            for i, name in enumerate(tensors):
                draft.pack(name, quantise(draft.weight(name), options))
                draft.progress("rounding", i + 1, len(tensors))
        if options.activations:
            program = draft.program
            for nodes in linears_of(program).values():
                names = [node.name for node in nodes if node.weights[0] in chosen]
                if names:
                    program = round_inputs(program, names, fp8=True)
            draft.edit(program)


# Weights ------------------------------------------------------------------------------------------------


def tau_exponent(maxima: NDArray[np.float32]) -> int:
    """i of the power of two tau = 2^i that a tensor is multiplied by, from the largest sizes of its groups.

    As many scales as possible shall be above E4M3's smallest value, and no weight above its largest: of the
    powers from 0 to 14 that keep to the second, the first with the least sum of what groups lack.
    """
    best, least = 0, np.inf
    for i in range(MAX_EXPONENT + 1):
        scaled = maxima.astype(np.float64) * 2.0**i
        if scaled.max() > fp8.MAX:
            break
        lacking = float(np.maximum(_SMALLEST - scaled, 0).sum())
        if lacking < least:
            best, least = i, lacking
    return best


def quantise(values: NDArray[np.float32], options: FireqOptions) -> Packed:
    """A finite matrix [N, K] as 4-bit codes, -8 to 7, under the scales of `options`.

    ModelError for weights above 448 if products are rounded to E4M3.
    """
    group = options.group
    if options.scales == "f16":
        return group_int.round_group_int(values, bits=4, group=group, symmetric=True)
    if not np.isfinite(values).all():
        raise ModelError("a matrix holds values that are not finite: it cannot be rounded to integers")
    maxima = np.maximum.reduceat(np.abs(values), np.arange(0, values.shape[1], group), axis=1)
    if options.rounded and maxima.max() > fp8.MAX:
        raise ModelError(f"weights above {fp8.MAX:.0f} are beyond E4M3: choose scales: f16")
    exponent = tau_exponent(maxima)
    tau = np.float32(2.0**exponent)
    sigma = fp8.round_e4m3(np.maximum(maxima * tau, np.float32(1e-5)) / np.float32(7))
    sigma = np.maximum(sigma, np.float32(fp8.SMALLEST))
    scaled = values * tau
    spread = np.repeat(sigma, group, axis=1)[:, : values.shape[1]]
    codes = (np.clip(np.rint(scaled / spread), -8, 7) + 8).astype(np.uint8)
    if options.codes == "entry":
        codes = _nearest_entries(scaled, spread, codes)
    return group_int.pack(
        codes,
        fp8.encode(sigma),
        bits=4,
        group=group,
        offset=group_int.INT4_OFFSET,
        exponent=exponent,
        rounded=options.rounded,
    )


def _nearest_entries(
    values: NDArray[np.float32], sigma: NDArray[np.float32], codes: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """The codes whose products, rounded to E4M3, are nearest; the given ones where none is nearer."""

    def distance(of: NDArray[np.uint8]) -> NDArray[np.float32]:
        entries: NDArray[np.float32] = fp8.round_e4m3((of.astype(np.float32) - np.float32(8)) * sigma)
        gap: NDArray[np.float32] = np.abs(values - entries)
        return gap

    # The products move by at most a sixteenth, half a code at the ends: only neighbours can be nearer.
    best, least = codes, distance(codes)
    for step in (-1, 1):
        tried = np.clip(codes.astype(np.int16) + step, 0, 15).astype(np.uint8)
        found = distance(tried)
        best = np.where(found < least, tried, best)
        least = np.minimum(found, least)
    return best


# Scales -------------------------------------------------------------------------------------------------


def places(program: Program, chosen: set[str]) -> dict[Place, list[Site]]:
    """The sites whose matrices are all chosen, by what they are in front of."""
    gates = {name for node in program.nodes if node.op == "gated" for name in node.inputs}
    found: dict[Place, list[Site]] = {"qkv": [], "o": [], "gate_up": [], "down": []}
    outputs = {node.weights[0]: node.outputs[0] for node in program.nodes if node.op == "linear"}
    for site in find_sites(program, (NORM, GATED, VALUES)):
        if not chosen.issuperset(_matrices(program, site)):
            continue
        if site.kind == NORM:
            found["gate_up" if outputs[site.consumers[0]] in gates else "qkv"].append(site)
        else:
            found["down" if site.kind == GATED else "o"].append(site)
    return found


def _matrices(program: Program, site: Site) -> set[str]:
    return {part.weight for part in site.parts if len(program.weights[part.weight].shape) == 2}


def _scale(draft: Draft, options: FireqOptions, chosen: set[str], attention: list[str]) -> None:
    """Moves scales between weights and out of keys, as a look at the calibration text says."""
    sites: dict[str, Site] = {}  # first consumer -> site
    if options.smoothed:
        by_place = places(draft.program, chosen)
        sites = {s.consumers[0]: s for place in options.smoothed for s in by_place[place]}
        if bare := [place for place in options.smoothed if not by_place[place]]:
            draft.notes.append(f"fireq: no channels can be scaled in front of {', '.join(bare)}")
    key_sites: dict[str, Site] = {}  # attention node -> site
    if options.keys in _BEFORE:
        by_buffer = {site.buffer: site for site in find_sites(draft.program, (KEYS,))}
        for name in attention:
            buffer = draft.program.node(name).inputs[1]
            if buffer not in by_buffer:
                raise UsageError(f"the keys of {name} cannot be scaled before the rotation: choose keys: s")
            key_sites[name] = by_buffer[buffer]
            if not chosen.issuperset(_matrices(draft.program, by_buffer[buffer])):
                raise UsageError(f"the keys of {name} cannot be scaled: its q_proj is not among the tensors")
    if not sites and options.keys == "none":
        return

    count = max(1, SEARCHED_TOKENS // len(draft.sequences[0]))
    stream = draft.stream(draft.sequences[:count])
    factors: list[tuple[Site, NDArray[np.float64]]] = []
    key_scales: dict[str, NDArray[np.float32]] = {}
    for i, node in enumerate(stream):
        if node.op == "select_rows":
            break  # the logits are not needed
        draft.progress("scaling", i, len(draft.program.nodes))
        if node.op == "linear" and node.weights[0] in sites:
            site, rows = sites[node.weights[0]], stream.inputs(node)
            found = draft.once(f"fireq {site.name}", partial(_strength, draft, options, site, rows))
            factors.append((site, found["factors"]))
        if node.name in attention and options.keys != "none":
            qkv = [stream.inputs(node, j) for j in range(3)]
            before = key_sites.get(node.name)
            found = draft.once(f"fireq {node.name}", partial(scale_keys, node, qkv, options, before))
            if before is not None:
                factors.append((before, found["factors"]))
            key_scales[node.name] = found["key_scale"]
    for site, s in factors:
        draft.fold(site, s)
    if options.keys in _AFTER:
        draft.edit(keep_keys(draft.program, attention, scaled=True))
        for name, scale in key_scales.items():
            draft.set(f"{name}.key_scale", scale)


def channel_means(site: Site, weights: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    """The mean size of the consumers' weights in every channel of a site: [site.width]."""
    total, count = np.zeros(site.width), np.zeros(site.width)
    for part in site.parts:
        if part.consumes:
            size = np.abs(weights[part.weight].astype(np.float64))
            np.add.at(total, part.channels, size.sum(axis=0))
            np.add.at(count, part.channels, float(len(size)))
    return total / count


def _strength(draft: Draft, options: FireqOptions, site: Site, rows: list[Tensor]) -> Arrays:
    """The factors of a site: (c / mean size of the channel's weights) ^ strength.

    The constant c has no effect but through tau: it is such that the factors' geometric mean is 1.
    """
    import torch

    from gristmill.backends.reference.ops import round_rows_fp8

    tensors = {part.weight: draft.weight(part.weight) for part in site.parts}
    means = channel_means(site, tensors)
    means = np.maximum(means, 1e-6 * means.max() or 1.0)
    means /= np.exp(np.log(means).mean())
    x = torch.cat(rows)
    x = x[:: max(1, len(x) // _ROWS)]

    def loss(factors: NDArray[np.float64]) -> float:
        columns = (1 / factors)[site.channels].astype(np.float32)
        rounded = x * torch.from_numpy(columns)
        if options.activations:
            rounded = round_rows_fp8(rounded)
        folded = fold(tensors, site, factors)
        error = 0.0
        for name in site.consumers:
            exact = x @ torch.from_numpy(tensors[name]).T
            used = torch.from_numpy(decode_f32(quantise(folded[name], options)))
            error += float((rounded @ used.T - exact).square().sum(dtype=torch.float64))
        return error

    strengths = _STRENGTHS if options.strength is None else (options.strength,)
    candidates = (means**-strength for strength in strengths)
    return {"factors": best_of(f"fireq: scales of {site.name}", candidates, loss)}


def scale_keys(node: Node, rows: list[list[Tensor]], options: FireqOptions, site: Site | None) -> Arrays:
    """The scales of an attention node's keys, from its q, k and v rows: one tensor per sequence and input.

    Before the rotation (if there is a site) the larger a rotary pair has ever been, the smaller it is made:
    `factors` of the site. After it, `key_scale` [kv_heads * head_dim] brings the channels that are largest in
    their head, and their partners, each to `level` times the size of the others.
    """
    import torch

    a = node.attributes
    heads, size = a["kv_heads"], a["head_dim"]
    half = 0 if a["rope"] is None else int(a["rope"]["dim"]) // 2
    radius = _largest(rows[1], lambda k: _radii(k.reshape(-1, heads, size), half))
    peak = _largest(rows[1], lambda k: _rotated(node, k).abs()).reshape(heads, size)
    exact = _attend(node, rows, None, "f32")

    def before(scales: Arrays) -> NDArray[np.float64]:
        """What the keys are multiplied by before the rotation."""
        return np.ones(heads * size) if site is None else 1 / scales["factors"][site.channels]

    def candidate(top: int, level: float) -> Arrays:
        scaled = _outliers(peak, top, half)
        result: Arrays = {}
        if site is not None:
            channel = site.largest(radius)
            # A channel whose every key is scaled afterwards needs nothing before.
            alone = np.ones(site.width, bool)
            np.logical_and.at(alone, site.channels, scaled.reshape(-1))
            result["factors"] = np.where(alone | (channel <= 0), 1.0, channel)
        made = peak * before(result).reshape(heads, size)
        others = [row[there] for row, there in zip(made, ~scaled & (made > 0), strict=True)]
        usual = np.array([1.0 if site or not len(row) else np.median(row) for row in others])
        after = np.where(scaled & (made > 0), level * usual[:, None] / np.where(made > 0, made, 1), 1.0)
        result["key_scale"] = after.reshape(-1).astype(np.float32)
        return result

    def loss(scales: Arrays) -> float:
        turned = torch.from_numpy(before(scales).astype(np.float32))
        by_head = turned.reshape(heads, size).repeat_interleave(a["heads"] // heads, 0).reshape(-1)
        q, k, v = rows
        tried = [[x / by_head for x in q], [x * turned for x in k], v]
        found = _attend(node, tried, torch.from_numpy(scales["key_scale"]), "int4")
        return float(
            sum((f - e).square().sum(dtype=torch.float64) for f, e in zip(found, exact, strict=True))
        )

    candidates = (candidate(top, level) for top, level in _choices(options, size))
    return best_of(f"fireq: scales of the keys of {node.name}", candidates, loss)


def _choices(options: FireqOptions, size: int) -> list[tuple[int, float]]:
    """Numbers of channels to scale after the rotation, with their levels; 0 where none are."""
    if options.keys not in _AFTER:
        return [(0, 1.0)]
    tops = [t for t in _TOPS if t <= size // 4] if options.top_k is None else [options.top_k]
    levels = _LEVELS if options.level is None else (options.level,)
    none = [(0, 1.0)] if options.top_k is None else []
    return none + [(top, level) for top in tops for level in levels]


def _outliers(peak: NDArray[np.float64], top: int, half: int) -> NDArray[np.bool_]:
    """[kv_heads, head_dim]: the `top` channels with the largest keys of every head, and their partners."""
    chosen = np.zeros(peak.shape, bool)
    if top:
        largest = np.argsort(-peak, axis=1, kind="stable")[:, :top]
        np.put_along_axis(chosen, largest, True, axis=1)
    pairs = chosen[:, :half] | chosen[:, half : 2 * half]
    return np.concatenate([pairs, pairs, chosen[:, 2 * half :]], axis=1)


def _largest(rows: list[Tensor], of: Callable[[Tensor], Tensor]) -> NDArray[np.float64]:
    """The maximum over all tokens of what `of` makes of a sequence's rows: flat."""
    import torch

    return torch.stack([of(x).amax(0).reshape(-1) for x in rows]).amax(0).double().numpy()


def _radii(keys: Tensor, half: int) -> Tensor:
    """[tokens, heads, size]: for both channels of a rotary pair its length; other channels' sizes."""
    import torch

    pair = torch.hypot(keys[..., :half], keys[..., half : 2 * half])
    return torch.cat([pair, pair, keys[..., 2 * half :].abs()], -1)


def _context(tokens: int, state: str, kv_format: str) -> Context:
    import torch

    from gristmill.backends.reference.ops import Context

    every = torch.arange(tokens)
    return Context(every, every, every, [tokens], [{}], {state: kv_format})


def _rotated(node: Node, keys: Tensor) -> Tensor:
    from gristmill.backends.reference.ops import run
    from gristmill.program.nodes import Node

    a = node.attributes
    if a["rope"] is None:
        return keys
    rope = {"heads": a["kv_heads"], "head_dim": a["head_dim"], "rope": a["rope"]}
    return run(_context(len(keys), "", ""), Node("", "rope", (), (), (), None, rope), [keys], [])[0]


def _attend(node: Node, rows: list[list[Tensor]], key_scale: Tensor | None, kv_format: str) -> list[Tensor]:
    """The node's output for each sequence, with keys and values kept in a format."""
    from gristmill.backends.reference.ops import run

    weights = [] if key_scale is None else [key_scale]
    return [
        run(_context(len(x[0]), str(node.state), kv_format), node, x, weights)[0]
        for x in zip(*rows, strict=True)
    ]


METHOD = Fireq()
