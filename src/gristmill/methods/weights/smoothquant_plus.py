"""SmoothQuant+: scales moved into weights, their strength chosen by the loss of the whole rounded model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gristmill.calibrate.sites import SMOOTHING, VALUES, Site
from gristmill.formats import group_int
from gristmill.formats.packed import Packed, decode_f32
from gristmill.methods.base import CodeOptions, Method
from gristmill.methods.draft import Draft
from gristmill.methods.weights._smoothing import Factors, best_of, first_tokens, folded, move, sites_within

if TYPE_CHECKING:
    from torch import Tensor

    from gristmill.calibrate.stream import Rows

_FLOOR = 1e-5


class SmoothQuantPlusOptions(CodeOptions):
    """bits, group, symmetric: of the codes, rounded to nearest; quantise false leaves that to another method.

    step: between the strengths tried, from 0 to 1, besides none. where: the loss is the squared error of the
    last norm's output, of every residual sum, or of the logits. values: scale v and o as well. quantile: of
    a channel's magnitudes that counts as its largest. tokens: that the search runs over.
    """

    symmetric: bool = False
    quantise: bool = True
    step: Annotated[float, Field(ge=0.01, le=1)] = 0.05
    where: Literal["final_hidden", "per_block_sum", "logits"] = "final_hidden"
    values: bool = True
    quantile: Annotated[float, Field(ge=0.5, le=1)] = 1.0
    tokens: Annotated[int, Field(ge=2, le=1 << 20)] = 1024


class SmoothQuantPlus(Method[SmoothQuantPlusOptions]):
    """Channels with large inputs are made small, their weights large; one strength for the whole model."""

    name = "smoothquant_plus"
    title = "Move outliers of inputs into weights, as strongly as the whole rounded model likes best"
    paper = "SmoothQuant+, 2023, arXiv 2312.03788"
    options = SmoothQuantPlusOptions
    calibrated = True

    def slots(self, options: SmoothQuantPlusOptions) -> Sequence[str]:
        """It scales and, unless told otherwise, rounds."""
        return ("smoothing", "rounding", "weight_format") if options.quantise else ("smoothing",)

    def weight_group(self, options: SmoothQuantPlusOptions) -> int | None:
        """Its own, unless rounding is left to another method."""
        return options.group if options.quantise else None

    def apply(self, draft: Draft, options: SmoothQuantPlusOptions, tensors: Sequence[str]) -> None:
        """Finds the strength, moves the scales, packs every tensor."""
        kinds = [kind for kind in SMOOTHING if kind != VALUES or options.values]
        sites = sites_within(draft, tensors, kinds)
        search = _Search(draft, options, sites, tensors)
        strengths = [None, *np.linspace(0, 1, round(1 / options.step) + 1)]
        losses = []

        def loss(i: int) -> float:
            kept = draft.once(f"{self.name} {i}", partial(search.loss, strengths[i]))
            losses.append(float(kept["loss"][0]))
            draft.progress("searching the strength", i + 1, len(strengths))
            return losses[i]

        best = best_of(f"{self.name}: strength", range(len(strengths)), loss)
        found = "none" if strengths[best] is None else f"{strengths[best]:.2f}"
        beside = [i for i in (best - 1, best + 1) if best > 0 and 0 < i < len(losses)]
        draft.notes.append(
            f"{self.name}: strength {found}, loss {losses[best]:.6g}, without smoothing {losses[0]:.6g}"
            + "".join(f", at {strengths[i]:.2f} {losses[i]:.6g}" for i in beside)
        )
        move(draft, sites, search.factors(strengths[best]))
        if options.quantise:
            for i, name in enumerate(tensors):
                draft.pack(name, _rounded(draft.weight(name), options))
                draft.progress("rounding", i + 1, len(tensors))


def _rounded(values: NDArray[np.float32], options: SmoothQuantPlusOptions) -> Packed:
    return group_int.round_group_int(
        values, bits=options.bits, group=options.group, symmetric=options.symmetric
    )


class _Search:
    """The loss of the whole rounded model, running on its own inputs, for a strength."""

    def __init__(
        self, draft: Draft, options: SmoothQuantPlusOptions, sites: Sequence[Site], tensors: Sequence[str]
    ) -> None:
        self.draft, self.options, self.sites, self.tensors = draft, options, sites, tensors
        self.sequences = first_tokens(draft.sequences, options.tokens)
        self.inputs: dict[str, NDArray[np.float64]] = {}
        """By buffer of a site: the largest magnitude of every channel. Found in the first run."""
        self.wanted = list(self._outputs(draft.executor.weights))

    def _outputs(self, weights: Mapping[str, Tensor]) -> Iterator[Rows]:
        """What the loss compares, part by part, for these weights."""
        from gristmill.backends.reference import ReferenceExecutor

        program, where = self.draft.program, self.options.where
        of_buffer = {site.buffer: site for site in self.sites}
        writers = program.writers()
        seen: set[str] = set()
        stream = self.draft.stream(self.sequences, ReferenceExecutor(program, weights))
        for node in stream:
            for i, name in enumerate(node.inputs):
                if name in of_buffer and name not in self.inputs:
                    self.inputs[name] = self._largest(of_buffer[name], stream.inputs(node, i))
                if where == "per_block_sum" and writers[name].op == "add" and name not in seen:
                    yield stream.inputs(node, i)
                seen.add(name)
            if program.output in node.outputs and where != "logits":
                if where == "final_hidden":
                    yield stream.inputs(node)
                return
        yield stream.output()

    def _largest(self, site: Site, rows: Rows) -> NDArray[np.float64]:
        from gristmill.calibrate.statistics import Quantiles

        seen = Quantiles(rows[0].shape[1], [self.options.quantile], sum(map(len, rows)))
        for x in rows:
            seen.update(x.abs())
        return site.largest(seen.result()[0].numpy())

    def factors(self, strength: float | None) -> Factors:
        """s = a^strength / w^(1 - strength), a and w a channel's largest input and weight; None: all 1."""
        result = {}
        for site in self.sites:
            if strength is None:
                result[site.buffer] = np.ones(site.width)
                continue
            columns = [self.draft.executor.weights[name].abs().amax(0).numpy() for name in site.consumers]
            weight = np.maximum(site.largest(np.max(columns, axis=0)), _FLOOR)
            factor = self.inputs[site.buffer] ** strength / weight ** (1 - strength)
            result[site.buffer] = np.maximum(factor, _FLOOR)
        return result

    def loss(self, strength: float | None) -> dict[str, NDArray[np.float64]]:
        """The squared error, summed over all tokens, under "loss"; infinite if the model breaks down."""
        import torch

        weights = dict(self.draft.executor.weights)
        weights |= folded(weights, self.sites, self.factors(strength))
        for name in self.tensors:
            weights[name] = torch.from_numpy(decode_f32(_rounded(weights[name].numpy(), self.options)))
        total = 0.0
        for found, wanted in zip(self._outputs(weights), self.wanted, strict=True):
            for x, y in zip(found, wanted, strict=True):
                total += float((x.double() - y.double()).square().sum())
        return {"loss": np.array([total if np.isfinite(total) else np.inf])}


METHOD = SmoothQuantPlus()
