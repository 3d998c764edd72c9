"""SVDQuant: smoothing, then a low-rank branch for what is large, then integers for the rest.

With smoothing factors s, x^ = x / s and W^ = W diag(s) of all linears that read x, stacked:

    y = x^ D^T U^T + Q(x^) Q(W^ - U D)^T

The scales are folded into what writes x (see `calibrate.sites`), so that nothing is left of them at run time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from gristmill.errors import ModelError, UsageError
from gristmill.formats import dense, group_int
from gristmill.formats.packed import Packed, decode_f32
from gristmill.methods.base import CodeOptions, Method
from gristmill.methods.draft import Draft
from gristmill.methods.weights._sequential import note_damping
from gristmill.methods.weights._smoothing import best_of
from gristmill.program.edits import add_branch, linears_of, round_inputs
from gristmill.program.nodes import Node, Program, ProgramError

if TYPE_CHECKING:
    from torch import Tensor

    from gristmill.calibrate.sites import Site
    from gristmill.calibrate.stream import Stream

BRANCH = "svd"
"""Name of the branch: its weights are `*.svd_down.weight` and `*.svd_up.weight`."""
_ROWS = 256
"""Tokens over which errors are summed up; whole sequences where attention is looked through."""
_ROUNDS = 2
"""Steps of the subspace iteration that adapts a low-rank fit to a matrix a little different."""

Fit = tuple["Tensor", "Tensor"]
"""U [N, r] and D [r, K]."""


class SvdQuantOptions(CodeOptions):
    """rank 0: no branch; grid: steps of the smoothing exponents, 20 as in the paper, 0 for no smoothing.

    quantise: who rounds the residual; `none` leaves it to a later method of the recipe, whose group must be
    this one if inputs are rounded. activation_bits `none`: as the mode in which the model is run has it.
    """

    group: Annotated[int, Field(ge=16, le=1024, multiple_of=16)] = 64
    rank: Annotated[int, Field(ge=0, le=4096)] = 32
    branch: Literal["bf16", "int8"] = "bf16"
    activation_bits: Literal[4, 6, 8, "none"] = 4
    grid: Annotated[int, Field(ge=0, le=100)] = 10
    iterations: Annotated[int, Field(ge=1, le=1000)] = 100
    quantise: Literal["rtn", "gptq", "none"] = "rtn"


class SvdQuant(Method[SvdQuantOptions]):
    """Outliers move from activations to weights, and from there into a low-rank branch."""

    name = "svdquant"
    title = "W4A4 with a low-rank branch that absorbs the outliers"
    paper = "SVDQuant, ICLR 2025, arXiv 2411.05007"
    options = SvdQuantOptions
    calibrated = True

    def slots(self, options: SvdQuantOptions) -> Sequence[str]:
        """What the options switch off is free for other methods."""
        wanted = {
            "smoothing": options.grid > 0,
            "low_rank": options.rank > 0,
            "rounding": options.quantise != "none",
            "weight_format": options.quantise != "none",
            "activation_encoding": options.activation_bits != "none",
        }
        return [slot for slot, used in wanted.items() if used]

    def weight_group(self, options: SvdQuantOptions) -> int | None:
        """Its own, unless rounding is left to another method."""
        return None if options.quantise == "none" else options.group

    def input_group(self, options: SvdQuantOptions) -> int | None:
        """The same, if it rounds inputs."""
        return None if options.activation_bits == "none" else options.group

    def apply(self, draft: Draft, options: SvdQuantOptions, tensors: Sequence[str]) -> None:
        """Fits layer after layer, each on what the rounded layers before it give."""
        _Run(draft, options, tensors).run()


class _Run:
    def __init__(self, draft: Draft, options: SvdQuantOptions, tensors: Sequence[str]) -> None:
        from gristmill.calibrate.sites import find_sites

        self.draft, self.options = draft, options
        self.program = program = draft.program
        chosen = set(tensors)
        readers = linears_of(program)
        groups = [[n for n in nodes if n.weights[0] in chosen] for nodes in readers.values()]
        self.groups = {nodes[0].name: nodes for nodes in groups if nodes}
        """First node -> linears that share an input and a branch."""
        self.sites: dict[str, list[Site]] = {}
        """Node -> sites to be smoothed before it runs: a norm, or the first linear beside the producer."""
        smoothed: set[str] = set()
        for site in find_sites(program) if options.grid else []:
            matrices = {p.weight for p in site.parts if len(program.weights[p.weight].shape) == 2}
            if matrices <= chosen:
                producer = program.node(site.name)
                first = readers[producer.inputs[0]][0] if producer.op == "linear" else producer
                self.sites.setdefault(first.name, []).append(site)
                smoothed.update(site.consumers)
        self.unsmoothed = [name for name in tensors if name not in smoothed] if options.grid else []

    def run(self) -> None:
        draft, total = self.draft, len(self.groups)
        if self.unsmoothed:
            what = ", ".join(self.unsmoothed[:3]) + (", ..." if len(self.unsmoothed) > 3 else "")
            draft.notes.append(f"svdquant: {len(self.unsmoothed)} matrices are not smoothed: {what}")
        stream = draft.stream()
        done = 0
        for node in stream:
            for site in self.sites.get(node.name, ()):
                draft.fold(site, self.factors(stream, site, node))
            if node.name in self.groups:
                self.round(stream, self.groups[node.name])
                done += 1
                draft.progress("svdquant", done, total)
                if done == total:
                    break
        draft.edit(self.edited())

    def edited(self) -> Program:
        """The program with branches and rounded inputs."""
        program = self.draft.program
        try:
            for nodes in self.groups.values():
                names = [node.name for node in nodes]
                if self.options.rank:
                    rank = self.draft.packed[_down(nodes)].shape[0]
                    program = add_branch(program, names, rank, name=BRANCH)
                if self.options.activation_bits != "none":
                    program = round_inputs(
                        program, names, group=self.options.group, bits=[self.options.activation_bits]
                    )
        except ProgramError as error:
            raise UsageError(f"it cannot follow the methods before it: {error}") from None
        return program

    # Smoothing ------------------------------------------------------------------------------------------

    def factors(self, stream: Stream, site: Site, node: Node) -> NDArray[np.float64]:
        """The factors of a site [width] with the least error of its consumers, rounded and with a branch."""
        return self.draft.once(f"smooth {site.name}", lambda: {"s": self.search(stream, site, node)})["s"]

    def search(self, stream: Stream, site: Site, node: Node) -> NDArray[np.float64]:
        """`factors`, computed. node: the one at hand, from which the buffer of the site follows."""
        import torch

        from gristmill.calibrate.statistics import AbsMax

        consumers = [n for n in self.program.nodes if n.op == "linear" and n.weights[0] in site.consumers]
        inputs = stream.evaluate_span(node, self.program.writers()[site.buffer])
        largest = AbsMax(inputs[0].shape[1])
        for rows in inputs:
            largest.update(rows)
        error = _Error(self, stream, consumers, inputs)
        w = error.w
        a = site.largest(largest.result().double().numpy())
        b = site.largest(w.abs().amax(0).double().numpy())
        fit = low_rank(w, self.options.rank)

        def loss(s: NDArray[np.float64]) -> float:
            nonlocal fit
            columns = torch.from_numpy(s[site.channels]).float()
            fit = low_rank(w * columns, self.options.rank, start=fit[1] * columns)
            residual = w * columns - fit[0] @ fit[1]
            return error(error.x / columns, fit, self.rounded(residual))

        tried = candidates(a, b, self.options.grid)
        return best_of(f"svdquant: scales of {site.name}", tried, loss)

    # Fitting --------------------------------------------------------------------------------------------

    def round(self, stream: Stream, nodes: list[Node]) -> None:
        """Splits the matrices of linears into branch and residual, and finishes them."""
        import torch

        draft, options = self.draft, self.options
        names = [node.weights[0] for node in nodes]
        ups = [_up(node) for node in nodes]
        sizes = [self.program.weights[name].shape[0] for name in names]
        w = torch.cat([self.weight(node) for node in nodes])

        def fit() -> dict[str, Packed]:
            return self.packed_branch(_Error(self, stream, nodes, stream.inputs(nodes[0])))

        branch = torch.zeros(())
        if options.rank:
            draft.pack_once(f"branch {nodes[0].name}", [_down(nodes), *ups], fit)
            up = torch.cat([torch.from_numpy(draft.weight(name)) for name in ups])
            branch = up @ torch.from_numpy(draft.weight(_down(nodes)))
        residual = w - branch
        if options.quantise == "none":
            for name, part in zip(names, torch.split(residual, sizes), strict=True):
                draft.set(name, part.numpy())
        else:
            inputs = stream.inputs(nodes[0])
            draft.pack_once(
                f"residual {nodes[0].name}",
                names,
                lambda: dict(zip(names, self.packed_residual(residual, names, sizes, inputs), strict=True)),
            )
        for name, part in zip(names, torch.split(branch.expand_as(w), sizes), strict=True):
            # Until the program is edited the branch is part of the matrix.
            draft.executor.weights[name] = torch.from_numpy(draft.weight(name)) + part

    def packed_residual(
        self, residual: Tensor, names: Sequence[str], sizes: list[int], inputs: Sequence[Tensor]
    ) -> list[Packed]:
        """The residual in codes, cut into matrices of these sizes."""
        import torch

        bits, group = self.options.bits, self.options.group
        if self.options.quantise == "rtn":
            return [
                group_int.round_group_int(part.numpy(), bits=bits, group=group, symmetric=True)
                for part in torch.split(residual, sizes)
            ]
        from gristmill.calibrate.gptq import gptq
        from gristmill.calibrate.statistics import Hessian

        hessian = Hessian(residual.shape[1])
        for rows in inputs:
            hessian.update(self.rounded_rows(rows))
        rounded = gptq(residual.numpy(), hessian.result(), bits=bits, group=group)
        note_damping(self.draft, "svdquant", names, rounded)
        ends = np.cumsum(sizes)
        return [rounded.pack(slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)]

    def packed_branch(self, error: _Error) -> dict[str, Packed]:
        """U and D, alternating between the low-rank fit and the rounding until the error grows."""
        import torch

        w, nodes = error.w, error.nodes
        best = np.inf
        result: dict[str, Packed] = {}
        target, start = w, None
        for _ in range(self.options.iterations):
            up, down = low_rank(target, self.options.rank, start=start)
            packed = {_down(nodes): self.pack(down)}
            for node, part in zip(nodes, torch.split(up, error.sizes), strict=True):
                packed[_up(node)] = self.pack(part)
            stored_down, *stored_up = (torch.from_numpy(decode_f32(p)) for p in packed.values())
            stored = torch.cat(stored_up), stored_down
            rounded = self.rounded(w - stored[0] @ stored[1])
            found = error(error.x, stored, rounded)
            if not found < best:
                break
            best, result, target, start = found, packed, w - rounded, down
        if not result:
            raise ModelError(f"the branch of {nodes[0].name} has no finite error")
        return result

    def pack(self, values: Tensor) -> Packed:
        """One of the two matrices of a branch as it is stored."""
        if self.options.branch == "bf16":
            return dense.pack(values.numpy(), "bf16")
        group = self.options.group if values.shape[1] > self.options.group else 0
        return group_int.round_group_int(values.numpy(), bits=8, group=group, symmetric=True)

    def weight(self, node: Node) -> Tensor:
        """A matrix as it stands, float32."""
        import torch

        return torch.from_numpy(np.array(self.draft.weight(node.weights[0])))

    def rounded(self, residual: Tensor) -> Tensor:
        """The residual after round to nearest, whoever will round it in the end."""
        return _rounded(residual, self.options.group, self.options.bits)

    def rounded_rows(self, x: Tensor) -> Tensor:
        """Inputs as the residual meets them."""
        bits = self.options.activation_bits
        return x if bits == "none" else _rounded(x, self.options.group, bits)


class _Error:
    """Squared error of linears' results over some rows; of attention's projected result for q, k and v."""

    def __init__(self, run: _Run, stream: Stream, nodes: Sequence[Node], inputs: Sequence[Tensor]) -> None:
        """inputs: what the linears read, unrounded."""
        import torch

        weights = stream.executor.weights
        self.run, self.stream, self.nodes = run, stream, nodes
        self.w = torch.cat([run.weight(node) for node in nodes])
        self.sizes = [len(weights[node.weights[0]]) for node in nodes]
        none = [torch.zeros(size) for size in self.sizes]
        self.biases = torch.cat(
            [weights[n.weights[1]] if n.weights[1:] else z for n, z in zip(nodes, none, strict=True)]
        )
        self.last = _behind_attention(run.program, nodes)
        count, ends = len(inputs), np.cumsum([len(part) for part in inputs])
        if self.last is None:
            rows = spread(inputs, _ROWS)
        else:
            count = min(count, int(np.searchsorted(ends, _ROWS)) + 1)
            rows = torch.cat(list(inputs[:count]))
        self.lengths = [len(part) for part in inputs[:count]]
        self.x = rows
        self.target = self.module(rows @ self.w.T)

    def __call__(self, x: Tensor, fit: Fit, residual: Tensor) -> float:
        """The error of x D^T U^T + Q(x) R^T."""
        y = x @ fit[1].T @ fit[0].T + self.run.rounded_rows(x) @ residual.T
        return float((self.module(y) - self.target).double().square().sum())

    def module(self, y: Tensor) -> Tensor:
        """Where errors are measured, given the linears' results [rows, N] without their biases."""
        import torch

        if self.last is None:
            return y
        parts = torch.split(y + self.biases, self.sizes, 1)
        given = {
            node.outputs[0]: list(torch.split(part, self.lengths))
            for node, part in zip(self.nodes, parts, strict=True)
        }
        return torch.cat(self.stream.evaluate_span(self.nodes[0], self.last, given=given))


def spread(parts: Sequence[Tensor], count: int) -> Tensor:
    """`count` rows of all parts, or all if there are fewer, evenly apart: all of the text has its share."""
    import torch

    lengths = [len(part) for part in parts]
    ends = np.cumsum(lengths)
    places = torch.linspace(0, int(ends[-1]) - 1, min(count, int(ends[-1]))).long().numpy()
    at = np.searchsorted(ends, places, side="right")
    return torch.stack([parts[i][row] for i, row in zip(at, places - (ends - lengths)[at], strict=True)])


def candidates(a: NDArray[np.float64], b: NDArray[np.float64], grid: int) -> list[NDArray[np.float64]]:
    """Smoothing factors a^p / b^q for (p, q) = (i / grid, 0) and (i / grid, 1 - i / grid), and at first 1.

    a, b: the largest magnitudes of inputs and weights of every channel. A factor of 0 becomes 1; a set with
    one that is not finite is all 1. Every set is divided by its geometric mean, which changes no result but
    keeps scales within float16.
    """
    result = [np.ones_like(a)]
    for i in range(1, grid):
        for q in (0.0, 1 - i / grid):
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                s = a ** (i / grid) / b**q
            s[s == 0] = 1
            if np.isfinite(s).all():
                result.append(s / np.exp(np.log(s).mean()))
    return result


def low_rank(w: Tensor, rank: int, *, start: Tensor | None = None) -> Fit:
    """U [N, r] and D [r, K], in W's dtype, with U D next to W [N, K] in the Frobenius norm; r <= min(N, K).

    The truncated SVD (Eckart and Young), from the eigenvectors of the smaller Gram matrix in float64: rows
    of D are right singular vectors whose largest entry is positive, U holds the singular values. start: a D
    near to the wanted one, from which a few steps of subspace iteration lead to it nearly, and faster.
    """
    import torch

    n, k = w.shape
    rank = min(rank, n, k)
    if rank == 0:
        return w.new_zeros(n, 0), w.new_zeros(0, k)
    if start is not None:
        basis = start.T
        for _ in range(_ROUNDS):
            basis = torch.linalg.qr(w.T @ (w @ basis)).Q
        return w @ basis, basis.T.contiguous()
    wide = w.double()
    gram = wide.T @ wide if k <= n else wide @ wide.T
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    if k <= n:
        up, down = wide @ vectors, vectors.T
    else:
        down = vectors.T @ wide
        size = down.norm(dim=1)
        up, down = vectors * size, down / torch.where(size > 0, size, 1.0)[:, None]
    peak = down.gather(1, down.abs().argmax(1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).double()
    return (up * sign.T).to(w.dtype), (down * sign).to(w.dtype)


def _rounded(x: Tensor, group: int, bits: int) -> Tensor:
    import torch

    from gristmill.backends.reference.ops import round_rows

    return round_rows(x, group, torch.full((-(-x.shape[1] // group),), 2.0 ** (bits - 1) - 1))


def _behind_attention(program: Program, nodes: Sequence[Node]) -> Node | None:
    """The node that reads the attention that alone reads the linears' results, normed or not."""
    readers = program.readers()
    found: dict[str, Node] = {}
    for node in nodes:
        following = readers[node.outputs[0]]
        while len(following) == 1 and following[0].op == "head_rmsnorm":
            following = readers[following[0].outputs[0]]
        found |= {n.name: n for n in following}
    (attention, *others) = found.values()
    if others or attention.op != "attention":
        return None
    behind = readers[attention.outputs[0]]
    whole = len(nodes) == len(attention.inputs) and len(behind) == 1
    return behind[0] if whole else None


def _down(nodes: Sequence[Node]) -> str:
    return f"{nodes[0].weights[0].removesuffix('.weight')}.{BRANCH}_down.weight"


def _up(node: Node) -> str:
    return f"{node.weights[0].removesuffix('.weight')}.{BRANCH}_up.weight"


METHOD = SvdQuant()
