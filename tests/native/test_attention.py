"""Attention of every level and KV dtype against float64, and bit for bit over every way to cut the work."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from gristmill.backends.native import _native
from tests.kits import levels

LEVELS = _native.available_levels()
F32 = NDArray[np.float32]
KV = _native.KvFormat
MODES = {
    "bf16": (KV.BF16, True),
    "wide": (KV.BF16, False),
    "f32": (KV.F32, False),
    "int4": (KV.INT4, True),
    "int4-wide": (KV.INT4, False),
    "channel": (KV.INT4_CHANNEL, True),
    "channel-wide": (KV.INT4_CHANNEL, False),
}
CHANNEL = ("channel", "channel-wide")
# The tiles, emulated, where bf16 meets bf16; else that level's attention is the vectors'.
EMULATED = levels.emulated()
LEVELS_AND_MODES = [
    *itertools.product(LEVELS, MODES),
    *itertools.product(EMULATED, ["bf16"]),
]


def to_bf16(x: F32) -> F32:
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32).__lshift__(16).view(np.float32)


def to_int4(x: F32) -> F32:
    """What int4 keeps of vectors [..., head_dim]."""
    parts = []
    for begin in range(0, x.shape[-1], 128):
        part = x[..., begin : begin + 128]
        scale = to_bf16(np.abs(part).max(-1, keepdims=True) / np.float32(7))
        scale[scale == 0] = 1
        parts.append(np.rint(part / scale).clip(-8, 7) * scale)
    return np.concatenate(parts, -1)


def outward(x: F32, sign: int) -> F32:
    """Rounded to bf16: down (sign -1) or up."""
    near = to_bf16(x)
    bits = near.view(np.uint32) >> 16
    wrong = (near > x) if sign < 0 else (near < x)
    # One bf16 further; larger bits are larger magnitudes.
    step = np.where((near < 0) == (sign < 0), 1, -1)
    return np.where(wrong, ((bits + step).astype(np.uint32) << 16).view(np.float32), near)


def to_channels(x: F32) -> tuple[F32, F32, F32]:
    """What int4 by channel keeps of [tokens, heads, head_dim]: codes, scales and bases of every token.

    Full groups of 64 tokens; the others are left as they are.
    """
    codes = to_bf16(x)
    scales, bases = np.ones_like(codes), np.zeros_like(codes)
    for begin in range(0, len(x) // 64 * 64, 64):
        part = codes[begin : begin + 64]
        low = outward(part.min(0), -1)
        scale = outward((part.max(0) - low) / np.float32(15), 1)
        scale[scale == 0] = 1
        part[:] = np.rint((part - low) / scale).clip(0, 15) - 8
        scales[begin : begin + 64], bases[begin : begin + 64] = scale, low + 8 * scale
    return codes, scales, bases


@dataclass
class Layer:
    """An attention layer and random inputs for a sequence of `tokens`."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    window: int = 0
    mode: str = "bf16"
    scaled: bool = False
    """Whether keys are scaled after the rotation."""

    def inputs(self, tokens: int, seed: int = 0) -> tuple[F32, F32, F32]:
        rng = np.random.default_rng([seed, self.heads, self.head_dim])
        sizes = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (rng.standard_normal((tokens, n * self.head_dim)).astype(np.float32) for n in sizes)
        return q * np.float32(3), k, v

    def rope(self, positions: int = 2048) -> tuple[F32, F32]:
        frequencies = 10000.0 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        angles = np.arange(positions)[:, None] * frequencies
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def key_scale(self) -> F32:
        if not self.scaled:
            return np.zeros(0, np.float32)
        rng = np.random.default_rng(self.head_dim)
        return np.exp(rng.standard_normal(self.kv_heads * self.head_dim)).astype(np.float32)

    def native(self, level: str) -> _native.AttentionLayer:
        kv, bf16_math = MODES[self.mode]
        scale = self.head_dim**-0.5
        return _native.AttentionLayer(
            level,
            self.heads,
            self.kv_heads,
            self.head_dim,
            scale,
            self.window,
            kv,
            bf16_math,
            self.key_scale(),
        )

    def run(
        self,
        level: str,
        inputs: tuple[F32, F32, F32],
        cuts: tuple[int, ...] = (),
        parts: int = 1,
        fill: int = 255,
        *,
        mapped: bool = False,
    ) -> F32:
        """The whole sequence, in steps that end at `cuts`; the cache starts as NaN."""
        native = self.native(level)
        tokens = inputs[0].shape[0]
        view = native.allocate(tokens + 3, fill, mapped)
        out = np.full((tokens, self.heads * self.head_dim), np.nan, np.float32)
        for begin, end in itertools.pairwise((0, *cuts, tokens)):
            part = np.full((end - begin, out.shape[1]), np.nan, np.float32)
            q, k, v = (np.ascontiguousarray(x[begin:end]) for x in inputs)
            native.run(q, k, v, *self.rope(), part, [view], [end - begin], parts)
            out[begin:end] = part
        return out

    def oracle(self, inputs: tuple[F32, F32, F32]) -> NDArray[np.float64]:
        """softmax(scale q k^T, causal and windowed) v in float64; stored values as the cache rounds them."""
        cos, sin = self.rope()
        tokens = inputs[0].shape[0]
        half = self.head_dim // 2

        def rotated(x: F32, n: int) -> F32:
            x = x.reshape(tokens, n, self.head_dim)
            c, s = cos[:tokens, None], sin[:tokens, None]
            low, high = x[..., :half], x[..., half:]
            return np.concatenate([low * c - high * s, high * c + low * s], -1)

        kv, bf16_math = MODES[self.mode]
        group = self.heads // self.kv_heads
        q, k = rotated(inputs[0], self.heads), rotated(inputs[1], self.kv_heads)
        v = inputs[2].reshape(tokens, self.kv_heads, self.head_dim)
        if self.scaled:
            scale = self.key_scale().reshape(self.kv_heads, self.head_dim)
            k, q = k * scale, q / np.repeat(scale, group, 0)
        if kv == KV.BF16:
            k, v = to_bf16(k), to_bf16(v)
        if kv == KV.INT4:
            k, v = to_int4(k), to_int4(v)
        rounded = to_bf16 if bf16_math else np.array
        k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
        far_v = v = v.astype(np.float64)
        own = np.arange(tokens)[:, None] // 64 == np.arange(tokens)[None, :] // 64
        if kv == KV.INT4_CHANNEL:
            # What rows see of other groups of 64 tokens than their own.
            codes, scales, bases = to_channels(k)
            far = np.stack([rounded(q * scale) for scale in scales[::64]]).astype(np.float64)
            far_s = np.einsum("sthd,shd->hts", np.repeat(far, 64, 0)[:tokens], codes)
            far_s += np.einsum("thd,shd->hts", q.astype(np.float64), bases)
            codes, scales, bases = to_channels(v.astype(np.float32))
            far_v = codes.astype(np.float64) * scales + bases
            k, v = to_bf16(k), to_bf16(v.astype(np.float32)).astype(np.float64)
        s = np.einsum("thd,shd->hts", rounded(q).astype(np.float64), k.astype(np.float64))
        if kv == KV.INT4_CHANNEL:
            s = np.where(own, s, far_s)
        s *= self.head_dim**-0.5
        distance = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
        hidden = (distance < 0) | ((distance >= self.window) if self.window else False)
        s[:, hidden] = -np.inf
        p = np.exp(s - s.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        mixed = np.einsum("hts,shd->thd", p * own, v) + np.einsum("hts,shd->thd", p * ~own, far_v)
        return mixed.reshape(tokens, -1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "window"),
    [
        ((4, 2, 32), 0),
        ((9, 3, 64), 0),
        ((3, 3, 16), 0),
        ((8, 1, 80), 40),
        ((5, 5, 16), 100),
        ((50, 1, 16), 0),
        ((4, 2, 128), 0),
        ((2, 1, 208), 70),
    ],
    ids=str,
)
@pytest.mark.parametrize("scaled", [False, True])
def test_against_float64(mode: str, shape: tuple[int, int, int], window: int, scaled: bool) -> None:
    layer = Layer(*shape, 0 if mode in CHANNEL else window, mode, scaled=scaled)
    inputs = layer.inputs(333)
    expected = layer.oracle(inputs)
    # bf16 rounds the probabilities to 8 bits; the rest is float32 arithmetic on scores of size 30.
    tolerance = 6e-3 if MODES[mode][1] else 5e-5
    levels = LEVELS + EMULATED if mode == "bf16" else LEVELS
    for level, cuts in itertools.product(levels, [(), (1, 2, 70, 300), (330, 331, 332)]):
        got = layer.run(level, inputs, cuts)
        np.testing.assert_allclose(got, expected, atol=tolerance, rtol=0, err_msg=f"{level} {cuts}")


@pytest.mark.parametrize(("level", "mode"), LEVELS_AND_MODES)
@pytest.mark.parametrize("window", [0, 40, 300])
def test_cuts_and_parts_change_no_bit(level: str, mode: str, window: int) -> None:
    if mode in CHANNEL and window:
        pytest.skip("groups of tokens keep no window")
    layer = Layer(6, 2, 32, window, mode)
    inputs = layer.inputs(600)
    steps = tuple(range(64, 600, 64)) if window == 40 else (512,)
    whole = layer.run(level, inputs, steps)
    assert np.isfinite(whole).all()
    for cuts in [(1, 17, 33, 63, 65, 128, 191), (255, 256, 257), tuple(range(1, 64))]:
        every = sorted({*cuts, *range(60, cuts[0], 60), *range(cuts[-1] + 60, 600, 60)})
        for parts in (1, 3):
            got = layer.run(level, inputs, tuple(every), parts)
            np.testing.assert_array_equal(got, whole, err_msg=f"{cuts} {parts}")


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_on_every_level(mode: str) -> None:
    layer = Layer(7, 1, 48, 0 if mode in CHANNEL else 70, mode)
    inputs = layer.inputs(300)
    expected = layer.run("portable", inputs, (250, 251))
    for level in LEVELS:
        if mode == "bf16" and level == "amx":
            continue
        np.testing.assert_array_equal(layer.run(level, inputs, (250, 251)), expected, err_msg=level)


@pytest.mark.skipif("amx" not in LEVELS, reason="this processor has no matrix tiles")
@pytest.mark.parametrize(
    ("shape", "window"), [((7, 1, 48), 70), ((9, 3, 64), 0), ((2, 1, 208), 0), ((50, 1, 16), 0)], ids=str
)
@pytest.mark.parametrize("size", [1.0, 1e-37])
def test_tiles_are_what_their_emulation_is(shape: tuple[int, int, int], window: int, size: float) -> None:
    layer = Layer(*shape, window)
    q, k, v = layer.inputs(300)
    v *= np.float32(size)  # sums about the smallest normal number: what is below is zero
    for cuts in ((250, 251), (), (7, 20, 37, 100)):
        real, emulated = (layer.run(level, (q, k, v), cuts) for level in ("amx", "amx_emulated"))
        np.testing.assert_array_equal(real, emulated)


@pytest.mark.parametrize(
    ("level", "mode"),
    [*itertools.product(LEVELS, ["bf16", "int4", "channel"]), *itertools.product(EMULATED, ["bf16"])],
)
def test_sequences_do_not_meet(level: str, mode: str) -> None:
    layer = Layer(6, 2, 32, mode=mode)
    native = layer.native(level)
    lengths, starts = [1, 0, 70, 3, 1], [280, 5, 0, 254, 0]
    rows, views, alone = [], [], []
    for i, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        inputs = layer.inputs(start + length, seed=i)
        alone.append(layer.run(level, inputs, (start,) if start else ())[start:])
        view = native.allocate(400, 255)
        if start:
            first = [np.ascontiguousarray(x[:start]) for x in inputs]
            native.run(*first, *layer.rope(), np.zeros((start, 192), np.float32), [view], [start])
        views.append(view)
        rows.append([x[start:] for x in inputs])
    q, k, v = (np.concatenate([r[i] for r in rows]) for i in range(3))
    for parts in (1, 4):
        out = np.full((sum(lengths), 192), np.nan, np.float32)
        native.run(q, k, v, *layer.rope(), out, views, lengths, parts)
        np.testing.assert_array_equal(out, np.concatenate(alone))
        if mode == "channel":
            break  # not every sequence can go back
        for view, start in zip(views, starts, strict=True):
            view.truncate(start)


@pytest.mark.parametrize(("level", "mode"), LEVELS_AND_MODES)
def test_a_value_that_is_no_number_stays_so(level: str, mode: str) -> None:
    layer = Layer(2, 2, 16, mode=mode)
    inputs = layer.inputs(200)
    inputs[2][40, 3] = np.nan
    for cuts in ((), (39, 40, 41, 150)):
        got = layer.run(level, inputs, cuts)
        # The tokens from 40 on see it, in the first head alone.
        assert np.isnan(got[40:, :16]).any(1).all()
        assert np.isfinite(got[:, 16:]).all()


@pytest.mark.parametrize(("level", "mode"), LEVELS_AND_MODES)
def test_keys_that_are_no_numbers_make_nothing_large(level: str, mode: str) -> None:
    layer = Layer(1, 1, 16, mode=mode)
    q, k, v = layer.inputs(200)
    rng = np.random.default_rng(5)
    # Scores of some hundreds: where the highest is lost among those that are no numbers, the exponential of
    # another's distance to what is left is beyond float32.
    q *= np.float32(60)
    k[rng.random(200) < 0.5, 3] = np.nan
    got = layer.run(level, (q, k, v))
    # Averages of values, where they are numbers; 4-bit values are rounded.
    assert not (np.abs(got) > 1.1 * np.abs(v).max()).any()


def test_groups_of_tokens_are_not_broken_up() -> None:
    layer = Layer(4, 2, 32, mode="channel")
    native = layer.native(LEVELS[-1])
    a, b = layer.inputs(200), layer.inputs(200, seed=9)
    for length, back in ((150, 140), (150, 128), (150, 64), (128, 64), (150, 0), (130, 129)):
        mixed = tuple(np.concatenate([x[:back], y[back:]]) for x, y in zip(a, b, strict=True))
        view = native.allocate(200, 255)
        out = np.zeros((200, 128), np.float32)
        native.run(*(x[:length] for x in a), *layer.rope(), out[:length], [view], [length])
        for refused in (length // 64 * 64 - 1, 63, 1):
            with pytest.raises(ValueError, match="groups of 64"):
                view.truncate(refused)
        view.truncate(back)
        native.run(*(x[back:] for x in b), *layer.rope(), out[back:], [view], [200 - back])
        np.testing.assert_array_equal(out[back:], layer.run(LEVELS[-1], mixed)[back:])


@pytest.mark.parametrize("mode", ["bf16", "int4"])
def test_a_truncated_sequence_forgets(mode: str) -> None:
    layer = Layer(4, 2, 32, mode=mode)
    native = layer.native(LEVELS[-1])
    a, b = layer.inputs(100), layer.inputs(100, seed=9)
    mixed = tuple(np.concatenate([x[:41], y[41:]]) for x, y in zip(a, b, strict=True))
    view = native.allocate(128, 255)
    out = np.zeros((100, 128), np.float32)
    native.run(*a, *layer.rope(), out, [view], [100])
    view.truncate(41)
    rest = np.zeros((59, 128), np.float32)
    native.run(*(np.ascontiguousarray(x[41:]) for x in b), *layer.rope(), rest, [view], [59])
    np.testing.assert_array_equal(rest, layer.run(LEVELS[-1], mixed)[41:])


def test_what_lies_behind_a_window_is_given_up() -> None:
    layer = Layer(2, 1, 16, window=20)
    native = layer.native(LEVELS[-1])
    inputs = layer.inputs(1500)
    got = layer.run(LEVELS[-1], inputs, tuple(range(30, 1500, 30)))
    np.testing.assert_allclose(got, layer.oracle(inputs), atol=6e-3)
    view = native.allocate(1500)
    most = 0
    for begin in range(0, 1500, 30):
        part = [np.ascontiguousarray(x[begin : begin + 30]) for x in inputs]
        native.run(*part, *layer.rope(), np.zeros((30, 32), np.float32), [view], [30])
        most = max(most, view.used_bytes())
    assert most == 2 * (256 * 2 * 16 * 2)
    view.truncate(1490)
    with pytest.raises(ValueError, match="window has moved on"):
        view.truncate(100)


@pytest.mark.parametrize("mode", MODES)
def test_placement_changes_no_bit(mode: str) -> None:
    layer = Layer(4, 2, 32, mode=mode)
    inputs = layer.inputs(700)
    table = layer.run(LEVELS[-1], inputs, (200, 201, 600))
    np.testing.assert_array_equal(layer.run(LEVELS[-1], inputs, (200, 201, 600), mapped=True), table)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", [1, 17, 64, 255, 256, 300, 512, 600])
def test_forks_go_their_own_ways(mode: str, cut: int, mapped: bool) -> None:
    """Several views go on from one beginning, in one step or in several: as if each had memory of its own."""
    layer = Layer(4, 2, 32, mode=mode)
    level = LEVELS[-1]
    native = layer.native(level)
    common, ends = layer.inputs(600), [layer.inputs(900, seed=n) for n in range(3)]
    view = native.allocate(2000, 255, mapped)
    native.run(*common, *layer.rope(), np.zeros((600, 128), np.float32), [view], [600])
    if mode in CHANNEL and cut % 64 and cut // 64 != 600 // 64:
        with pytest.raises(ValueError, match="groups"):
            view.fork(cut, 2000)
        return
    forks = [view.fork(cut, 2000) for _ in ends]
    view.truncate(cut)
    used = view.used_bytes()
    wholes = [
        tuple(np.concatenate([x[:cut], y[cut:]]) for x, y in zip(common, end, strict=True)) for end in ends
    ]
    results = [np.zeros((900 - cut, 128), np.float32) for _ in ends]
    at = cut
    for step in [1, 1, 30, 900 - cut - 32]:
        parts = [[np.ascontiguousarray(x[at : at + step]) for x in whole] for whole in wholes]
        q, k, v = (np.concatenate(x) for x in zip(*parts, strict=True))
        out = np.zeros((len(q), 128), np.float32)
        native.run(q, k, v, *layer.rope(), out, forks, [step] * len(forks))
        for n, result in enumerate(results):
            result[at - cut : at - cut + step] = out[n * step : (n + 1) * step]
        at += step
    for whole, result in zip(wholes, results, strict=True):
        np.testing.assert_array_equal(result, layer.run(level, whole)[cut:])
    # The one they came from has seen nothing of it.
    assert view.used_bytes() == used
    rest = np.zeros((600 - cut, 128), np.float32)
    if cut < 600:
        native.run(*(np.ascontiguousarray(x[cut:]) for x in common), *layer.rope(), rest, [view], [600 - cut])
    np.testing.assert_array_equal(rest, layer.run(level, common)[cut:])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("n", [1, 16, 17, 63, 64, 100, 576, 1000])
def test_row_operations_against_float64(level: str, n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((3, n)).astype(np.float32)
    w = rng.standard_normal(n).astype(np.float32)
    y = np.full_like(x, np.nan)
    _native.rmsnorm(level, x, w, y, 1e-5)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(y, wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * w, rtol=2e-6)

    total = x.copy()
    _native.add(level, total, y)
    np.testing.assert_array_equal(total, x + y)

    gate = (x * np.float32(20)).clip(-150, 150)
    sigmoid = 1 / (1 + np.exp(-gate.astype(np.float64)))
    u = np.sqrt(2 / np.pi) * (gate.astype(np.float64) + 0.044715 * gate.astype(np.float64) ** 3)
    for activation, expected in enumerate([gate * sigmoid, 0.5 * gate * (1 + np.tanh(u))]):
        out = np.full_like(x, np.nan)
        _native.gated(level, gate, x, out, activation)
        np.testing.assert_allclose(out, expected * wide, rtol=3e-6, atol=1e-5)


def test_row_operations_have_the_same_bits_on_every_level() -> None:
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((4, 577)) * 4).astype(np.float32)
    w = rng.standard_normal(577).astype(np.float32)
    seen = set()
    for level in LEVELS:
        y, a, b = np.empty_like(x), np.empty_like(x), np.empty_like(x)
        _native.rmsnorm(level, x, w, y, 1e-6)
        _native.gated(level, x, y, a, 0)
        _native.gated(level, x, y, b, 1)
        seen.add(y.tobytes() + a.tobytes() + b.tobytes())
    assert len(seen) == 1
