"""Group integers: 2- to 8-bit codes with one scale, and perhaps one minimum, per group of columns.

value = scale * (code - offset) + min; with E4M3 scales a little more. See `gristmill.formats.packed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError
from gristmill.formats import fp8
from gristmill.formats.packed import PLANES, ROWS, Packed, PackedSpec, round_up, unit

INT4_GROUP, INT4_OFFSET = 32, 8
INT8_GROUP, INT8_OFFSET = 64, 128
REQUANTISE_VERSION = 1
"""Raised whenever `quantise` starts to give other codes or scales, so that cached results are made anew."""

_KINDS = {np.dtype(np.float16): "f16", np.dtype(np.float32): "f32", np.dtype(np.uint8): "e4m3"}
_F16_MAX, _F32_MAX = 65504.0, float(np.finfo(np.float32).max)
# Divisors of a group's largest value that are tried as its scale, for codes from -8 to 7: around 8, where the
# largest value becomes the code -8, and around 7, where it becomes 7. Found by trying wider sets on normal,
# uniform and heavy-tailed groups of 32: more candidates changed the mean squared error by less than 0.1 %.
_NEGATIVE = tuple(-8.9 + 0.3 * i for i in range(10))
_POSITIVE = tuple(5.5 + 0.3 * i for i in range(9))
# For few bits or long groups, harder clipping as well: so many times the range. Without it the error of 2
# bits in groups of 128 is 12 % (normal) to 28 % (heavy-tailed) above a fine search's, with it 1 to 2 %.
_CLIPPED = (1.2, 1.35, 1.6, 1.95, 2.4)
# Parts of a group's range that are tried for codes with a minimum.
_SHRINKS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.63, 0.56, 0.48, 0.4)


def spec(
    shape: tuple[int, int],
    bits: int,
    group: int,
    offset: int,
    *,
    scales: str = "f16",
    mins: bool = False,
    exponent: int = 0,
    rounded: bool = False,
) -> PackedSpec:
    """The spec of a group-integer matrix; `group` 0 means the whole row."""
    if bits in PLANES:
        group = group or round_up(shape[1], max(8, unit(bits)))
    return PackedSpec("group_int", shape, bits, group, offset, scales, mins, exponent, rounded)


def pack(
    codes: NDArray[np.uint8],
    scales: NDArray[Any],
    mins: NDArray[Any] | None = None,
    *,
    bits: int,
    group: int,
    offset: int,
    exponent: int = 0,
    rounded: bool = False,
) -> Packed:
    """Packs codes [N, K] with scales, and mins if any, [N, G] (both float16 or both float32).

    Scales of uint8 are E4M3 codes; exponent and rounded go with them, as `PackedSpec` says.
    """
    n, k = codes.shape
    kind = _KINDS[scales.dtype]
    result = spec(
        (n, k),
        bits,
        group,
        offset,
        scales=kind,
        mins=mins is not None,
        exponent=exponent,
        rounded=rounded,
    )
    rows, columns = result.blocks * ROWS, result.columns
    if (n, k) != (rows, columns):
        padded = np.full((rows, columns), offset, np.uint8)
        padded[:n, :k] = codes
        codes = padded
    words = _to_planes(np.ascontiguousarray(codes).view(np.uint32), PLANES[bits])
    arrays = {"codes": interleave_words(words, result), "scales": interleave_groups(scales, result)}
    if mins is not None:
        arrays["mins"] = interleave_groups(mins.astype(scales.dtype, copy=False), result)
    return Packed(result, arrays)


def _to_planes(words: NDArray[np.uint32], widths: tuple[int, ...]) -> NDArray[np.uint32]:
    """[R, W] words of four codes each -> [R, W * bits / 8], cut into planes piece by piece."""
    parts, at = [], 0
    for width in widths:
        # [R, pieces, vectors of the plane, words that share a vector]
        fields = words.reshape(len(words), words.shape[1] * min(widths) // 8, -1, 8 // width)
        mask = np.uint32(0x01010101 * ((1 << width) - 1))
        plane = np.zeros(fields.shape[:3], np.uint32)
        for i in range(8 // width):
            plane |= ((fields[..., i] >> np.uint32(at)) & mask) << np.uint32(width * i)
        parts.append(plane)
        at += width
    return np.concatenate(parts, axis=2).reshape(len(words), -1)


def _from_planes(planes: NDArray[np.uint32], widths: tuple[int, ...]) -> NDArray[np.uint32]:
    """The inverse of `_to_planes`."""
    vectors = 8 // min(widths)  # of four columns each, in a piece
    pieces = planes.reshape(len(planes), -1, vectors * sum(widths) // 8)
    words = np.zeros((*pieces.shape[:2], vectors), np.uint32)
    at, first = 0, 0
    for width in widths:
        mask = np.uint32(0x01010101 * ((1 << width) - 1))
        count = vectors * width // 8
        plane = pieces[..., first : first + count]
        for i in range(8 // width):
            words[..., i :: 8 // width] |= ((plane >> np.uint32(width * i)) & mask) << np.uint32(at)
        at, first = at + width, first + count
    return words.reshape(len(planes), -1)


def interleave_words(words: NDArray[np.uint32], result: PackedSpec) -> NDArray[np.uint8]:
    """Words [nb * 16, W] of rows -> [nb, W, 16, 4] bytes."""
    lanes = words.reshape(result.blocks, ROWS, -1).transpose(0, 2, 1)
    return np.ascontiguousarray(lanes).view(np.uint8).reshape(result.blocks, -1, ROWS, 4)


def rows_of_words(array: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The inverse of `interleave_words`."""
    words = array.view(np.uint32)[..., 0].transpose(0, 2, 1)
    return np.ascontiguousarray(words).reshape(len(array) * ROWS, -1)


def interleave_groups(values: NDArray[Any], result: PackedSpec) -> NDArray[Any]:
    """[N, G] -> [nb, G, 16], zero in the padding rows."""
    n, groups = values.shape
    padded = values
    if n != result.blocks * ROWS:
        padded = np.zeros((result.blocks * ROWS, groups), values.dtype)
        padded[:n] = values
    return np.ascontiguousarray(padded.reshape(result.blocks, ROWS, groups).transpose(0, 2, 1))


def rows_of_groups(values: NDArray[Any], n: int) -> NDArray[Any]:
    """[nb, G, 16] -> [N, G]."""
    return values.transpose(0, 2, 1).reshape(-1, values.shape[1])[:n]


def unpack(packed: Packed) -> tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any] | None]:
    """Codes [N, K], scales [N, G] and mins [N, G] (or None): the inverse of `pack`."""
    n, k = packed.shape
    words = _from_planes(rows_of_words(packed.arrays["codes"]), PLANES[packed.bits])
    codes = words.view(np.uint8)[:n, :k]
    mins = packed.arrays.get("mins")
    scales = rows_of_groups(packed.arrays["scales"], n)
    return codes, scales, None if mins is None else rows_of_groups(mins, n)


def decode(packed: Packed) -> NDArray[np.float64]:
    """The matrix [N, K] in float64.

    Exact for float16 and E4M3 scales and for the float32 scales of GGUF's K-quants: there the product has at
    most 24 significant bits, and the sum with the minimum at most 53.
    """
    return values_of(*unpack(packed), packed.spec, np.float64)


def decode_f32(packed: Packed) -> NDArray[np.float32]:
    """The matrix [N, K] in float32: `decode` rounded once."""
    # A float16 scale times a code has at most 19 bits, an E4M3 one 12, so float32 rounds only in the sum, as
    # float64 does.
    if packed.spec.scales != "f32":
        return values_of(*unpack(packed), packed.spec, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return decode(packed).astype(np.float32)


def values_of(
    codes: NDArray[np.uint8], scales: NDArray[Any], mins: NDArray[Any] | None, spec: PackedSpec, dtype: Any
) -> NDArray[Any]:
    """scale * (code - offset) + min of codes [N, K] as `dtype`; of E4M3 scales as the spec says."""
    n, k = codes.shape
    values = np.zeros((n, spec.groups * spec.group), dtype)
    np.subtract(codes, dtype(spec.offset), out=values[:, :k], dtype=dtype)
    grouped = values.reshape(n, spec.groups, spec.group)
    with np.errstate(over="ignore", invalid="ignore"):
        if spec.scales == "e4m3":
            grouped *= fp8.decode(scales).astype(dtype)[..., None]
            if spec.rounded:
                grouped[...] = fp8.round_e4m3(grouped)
            grouped *= dtype(2.0**-spec.exponent)
        else:
            grouped *= scales.astype(dtype)[..., None]
        if mins is not None:
            grouped += mins.astype(dtype)[..., None]
    return values[:, :k]


def quantise(values: NDArray[np.float32], bits: int) -> Packed:
    """Rounds a finite matrix [N, K] as the weight modes `int4` and `int8` do, with float16 scales.

    4 bits: groups of 32 with clip search; 8 bits: groups of 64, scale = max|x| / 127. See `round_group_int`.
    """
    if bits not in (4, 8):
        raise ValueError(f"quantise makes 4- or 8-bit codes, not {bits}")
    if bits == 4:
        return round_group_int(values, bits=4, group=INT4_GROUP, symmetric=True, clip="mse")
    return round_group_int(values, bits=8, group=INT8_GROUP, symmetric=True)


def round_group_int(
    values: NDArray[np.float32],
    *,
    bits: int,
    group: int,
    symmetric: bool,
    clip: Literal["none", "mse"] = "none",
    scales: Literal["f16", "f32"] = "f16",
) -> Packed:
    """Rounds a matrix [N, K] to the nearest codes, under scales that follow from each group alone.

    `group` 0 means the whole row. With a = max|x|, low = min(0, min x), high = max(0, max x) of a group:

    - symmetric, none: offset 2^(bits-1), scale = a / (2^(bits-1) - 1); the lowest code is not used.
    - symmetric, mse: the same offset, all codes. Several scales are tried, and the one that leaves the least
      squared error after a least-squares fit to its codes is taken, so fitted.
    - asymmetric, none: offset 0, scale = (high - low) / (2^bits - 1), min = low.
    - asymmetric, mse: several ranges within the group's own are tried, scale and min fitted likewise.

    Scales and minimums are rounded to their dtype before codes are chosen; what lies beyond the codes' range
    takes the last code. Deterministic, and each row by itself. ModelError if a value is not finite.
    """
    if clip not in ("none", "mse"):
        raise ValueError(f"clip is none or mse, not {clip!r}")
    if not np.isfinite(values).all():
        raise ModelError("a matrix holds values that are not finite: it cannot be rounded to integers")
    n, k = values.shape
    offset = 1 << (bits - 1) if symmetric else 0
    target = spec((n, k), bits, group, offset, scales=scales, mins=not symmetric)
    scale = np.empty(n * target.groups, np.float32)
    low = np.empty(0 if symmetric else n * target.groups, np.float32)
    # Zeros in a ragged last group change no symmetric fit; for the others the last value is repeated.
    for start, stop, x in _group_columns(values, target.group, "constant" if symmetric else "edge"):
        scale[start:stop], low[start:stop] = fit_columns(x, bits, symmetric=symmetric, clip=clip)
    stored = to_stored(scale, scales).reshape(n, target.groups)
    mins = None if symmetric else to_stored(low, scales).reshape(n, target.groups)
    codes = encode_with(values, stored, mins, bits=bits, group=target.group, offset=offset)
    if symmetric and clip == "none":
        np.maximum(codes, 1, out=codes)
    return pack(codes, stored, mins, bits=bits, group=target.group, offset=offset)


def encode_with(
    values: NDArray[np.float32],
    scales: NDArray[Any],
    mins: NDArray[Any] | None = None,
    *,
    bits: int,
    group: int,
    offset: int,
) -> NDArray[np.uint8]:
    """The nearest codes [N, K] of values [N, K] under given scales, and mins if any, [N, ceil(K / group)].

    Ties go to the even distance from the offset; a scale of 0 gives the offset. ModelError for NaN.
    """
    n, k = values.shape
    codes = np.empty((n, k), np.uint8)
    step = max(1, (1 << 17) // k)
    for start in range(0, n, step):
        rows = slice(start, start + step)

        def spread(of: NDArray[np.float32]) -> NDArray[np.float32]:
            return np.repeat(of, group, axis=1)[:, :k]

        x = values[rows].astype(np.float32, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):
            if mins is not None:
                x = x - spread(mins[rows].astype(np.float32))
            q = x * spread(_inverse(scales[rows].astype(np.float32)))
        if np.isnan(q).any():
            raise ModelError("a matrix holds values that are not finite: it cannot be rounded to integers")
        np.rint(q, out=q)
        q += np.float32(offset)
        codes[rows] = np.clip(q, 0, (1 << bits) - 1, out=q)
    return codes


_Fit = tuple[NDArray[np.float32], NDArray[np.float32] | float]
"""Scales and minimums of the groups in the columns of x [group, n]."""


def fit_columns(x: NDArray[np.float32], bits: int, *, symmetric: bool, clip: Literal["none", "mse"]) -> _Fit:
    """Scales [n] and minimums [n] (0.0 if symmetric) of groups that lie in the columns of x [group, n].

    As `round_group_int` says; float32, not yet rounded to the dtype they are stored in.
    """
    if clip == "mse":
        fit = _search_symmetric if symmetric else _search_range
    else:
        fit = _absmax if symmetric else _range
    with np.errstate(over="ignore"):
        return fit(x, bits)


def to_stored(values: NDArray[np.float32] | float, scales: Literal["f16", "f32"] = "f16") -> NDArray[Any]:
    """Scales or minimums in the dtype they are stored in; beyond its range they take its largest value."""
    dtype, most = (np.float16, _F16_MAX) if scales == "f16" else (np.float32, _F32_MAX)
    return np.clip(values, -most, most).astype(dtype)


def _group_columns(
    values: NDArray[np.float32], group: int, padding: Literal["constant", "edge"]
) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """Yields (start, stop, x [group, stop - start]): groups numbered row by row, a ragged last one padded.

    Groups lie in columns, so that sums over a group add whole vectors; a chunk stays in the level-2 cache.
    """
    if values.shape[1] % group:
        values = np.pad(values, ((0, 0), (0, -values.shape[1] % group)), mode=padding)
    rows = np.ascontiguousarray(values, np.float32).reshape(-1, group)
    chunk = max(16, (1 << 16) // group)
    for start in range(0, len(rows), chunk):
        stop = min(start + chunk, len(rows))
        yield start, stop, np.ascontiguousarray(rows[start:stop].T)


def _absmax(x: NDArray[np.float32], bits: int) -> _Fit:
    return np.abs(x).max(axis=0) / np.float32((1 << (bits - 1)) - 1), 0.0


def _range(x: NDArray[np.float32], bits: int) -> _Fit:
    low = np.minimum(x.min(axis=0), np.float32(0))
    high = np.maximum(x.max(axis=0), np.float32(0))
    top = np.float32((1 << bits) - 1)
    return high / top - low / top, low


def _inverse(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / scale, and 0 where it is not finite."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scale
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def _search_symmetric(x: NDArray[np.float32], bits: int) -> _Fit:
    """For codes q the best scale is sum(xq) / sum(qq) and leaves sum(xx) - sum(xq)^2 / sum(qq); the candidate
    with the largest second term wins. The first of equals is kept.
    """
    half = 1 << (bits - 1)
    size = np.abs(x)
    peak = np.take_along_axis(x, size.argmax(axis=0)[None], axis=0)[0]
    # Work on groups of peak 1, so that squares neither overflow nor vanish.
    x = x * _inverse(peak)
    q, product = np.empty_like(x), np.empty_like(x)
    best = np.zeros_like(peak)
    scale = np.zeros_like(peak)
    divisors = [*(d * half / 8 for d in _NEGATIVE), *(d * (half - 1) / 7 for d in _POSITIVE)]
    if bits < 4 or (bits < 6 and len(x) > 32):
        divisors += [d * end for end in (-half, half - 1) for d in _CLIPPED]
    for divisor in divisors:
        np.multiply(x, np.float32(divisor), out=q)
        np.rint(q, out=q)
        np.maximum(q, np.float32(-half), out=q)
        np.minimum(q, np.float32(half - 1), out=q)
        np.multiply(q, x, out=product)
        xq = product.sum(axis=0)
        np.multiply(q, q, out=product)
        fit = xq / np.maximum(product.sum(axis=0), np.float32(1))
        gain = fit * xq
        better = gain > best
        np.copyto(best, gain, where=better)
        np.copyto(scale, fit, where=better)
    return scale * peak, 0.0


def _search_range(x: NDArray[np.float32], bits: int) -> _Fit:
    """As `_search_symmetric` with a minimum: the best scale is cov(x, q) / var(q), which leaves var(x) less
    cov(x, q)^2 / var(q); ranges are shrunk towards the mean.
    """
    top, count = np.float32((1 << bits) - 1), np.float32(len(x))
    mean = (x / count).sum(axis=0)
    x = x - mean
    size = np.abs(x).max(axis=0)
    x *= _inverse(size)
    low, high = x.min(axis=0), x.max(axis=0)
    q, product = np.empty_like(x), np.empty_like(x)
    best, scale, middle = np.zeros_like(mean), np.zeros_like(mean), np.zeros_like(mean)
    for ratio in _SHRINKS:
        factor = _inverse((high - low) * np.float32(ratio) / top)
        np.subtract(x, low * np.float32(ratio), out=q)
        np.multiply(q, factor, out=q)
        np.rint(q, out=q)
        np.clip(q, 0, top, out=q)
        centre = q.sum(axis=0) / count
        q -= centre
        np.multiply(q, x, out=product)
        xq = product.sum(axis=0)
        np.multiply(q, q, out=product)
        fit = xq * _inverse(product.sum(axis=0))
        gain = fit * xq
        better = gain > best
        np.copyto(best, gain, where=better)
        np.copyto(scale, fit, where=better)
        np.copyto(middle, centre, where=better)
    return scale * size, mean - scale * size * middle
