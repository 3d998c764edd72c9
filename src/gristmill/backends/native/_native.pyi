"""What the extension module holds; native/bindings/ defines it, and a test compares the two.

Arrays are C-contiguous and must have the dtype that is stated. A wrong size or an unknown level is a
ValueError.
"""

import enum
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

_F32: TypeAlias = NDArray[np.float32]
_I32: TypeAlias = NDArray[np.int32]
_I8: TypeAlias = NDArray[np.int8]
_U8: TypeAlias = NDArray[np.uint8]

class Storage(enum.Enum):
    F32 = 0
    BF16 = 1
    F16 = 2
    INT4 = 3
    INT8 = 4
    INT2 = 5
    INT3 = 6
    INT5 = 7
    INT6 = 8
    SPARSE24 = 9

class Encoding(enum.Enum):
    F32 = 0
    BF16 = 1
    INT8 = 2
    FP8 = 3

class KvFormat(enum.Enum):
    F32 = 0
    BF16 = 1
    INT4 = 2
    INT4_CHANNEL = 3

class Pool:
    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...

class Shares:
    def __init__(self, pieces: int, threads: int) -> None: ...
    def renew(self) -> None: ...
    def take(self, piece: int, units: int, least: int, thread: int) -> tuple[int, int]: ...
    def share_out(self, pool: Pool, units: int, least: int, rounds: int) -> list[int]: ...

class WeightArena:
    def __init__(self, bytes: int) -> None: ...
    def put(self, bytes: _U8) -> int: ...
    def read(self, path: str, offset: int, bytes: int) -> int: ...
    @property
    def used(self) -> int: ...

class KvExhausted(Exception): ...

class KvPlacement(enum.Enum):
    TABLE = 0
    MAPPED = 1

class KvSpan:
    @property
    def held(self) -> list[bool]: ...
    @property
    def shared(self) -> int: ...

class KvView:
    @property
    def capacity(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def reserved_bytes(self) -> int: ...
    def used_bytes(self) -> int: ...
    def wanted_bytes(self, tokens: int) -> int: ...
    def prepare(self, tokens: int) -> None: ...
    def truncate(self, length: int) -> None: ...
    def fork(self, length: int, capacity: int) -> KvView: ...
    def span(self, index: int) -> KvSpan: ...
    def adopt(self, spans: Sequence[KvSpan], length: int) -> None: ...

class KvPool:
    @property
    def backing(self) -> str: ...
    @property
    def limit(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def frame_bytes(self) -> int: ...
    @property
    def windows(self) -> list[int]: ...
    def trim(self, keep: int) -> None: ...
    def stats(self) -> dict[str, int]: ...
    def allocate(self, capacity: int) -> KvView: ...

class Program:
    def __init__(self, level: str, pool: Pool) -> None: ...
    def add_weight(
        self,
        storage: Storage,
        n: int,
        k: int,
        kp: int,
        group: int,
        groups: int,
        offset: int,
        wide_scales: bool,
        exponent: int,
        rounded: bool,
        values: int,
        scales: int,
        mins: int,
    ) -> int: ...
    def add_vector(self, values: _F32) -> int: ...
    def add_buffer(
        self, encoding: Encoding, logits: bool, width: int, padded: int, group: int, private_copies: bool
    ) -> int: ...
    def add_rope(self) -> int: ...
    def set_rope(self, index: int, cos: _F32, sin: _F32) -> None: ...
    def add_embedding(self, name: str, weight: int, out: int, scale: float) -> None: ...
    def add_rmsnorm(self, name: str, in_: int, out: int, vector: int, eps: float, heads: int) -> None: ...
    def add_add(self, name: str, in_: int, out: int) -> None: ...
    def add_encode(
        self,
        name: str,
        in_: int,
        out: int,
        phase: int,
        group: int = 0,
        limits: Sequence[float] = [],
        order: Sequence[int] = [],
        fp8: bool = False,
    ) -> None: ...
    def add_linears(
        self, name: str, terms: Sequence[tuple[Sequence[tuple[int, int, int]], int, int, bool]], gate: int
    ) -> None: ...
    def add_attention(
        self,
        name: str,
        layer: int,
        q: int,
        k: int,
        v: int,
        out: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int,
        rope: int,
        key_scale: int,
        bf16_math: bool,
    ) -> None: ...
    def add_select_rows(self, name: str, in_: int, out: int) -> None: ...
    def set_geometry(self, layers: Sequence[tuple[int, int, int, KvFormat]]) -> None: ...
    def set_logits(self, buffer: int) -> None: ...
    def kv_pool(self, limit: int, placement: KvPlacement, memfd: bool = True) -> KvPool: ...
    @property
    def progress(self) -> int: ...
    def run(
        self,
        tokens: _I32,
        phases: _U8,
        views: Sequence[KvView],
        lengths: Sequence[int],
        logit_rows: _I32,
        logits: _F32,
        cancel: _I32,
    ) -> bool: ...
    def set_profiling(self, on: bool) -> None: ...
    def profile(self) -> list[tuple[str, float]]: ...
    @property
    def prompts_in_bf16(self) -> bool: ...
    @property
    def level(self) -> str: ...

class SampleRow:
    def __init__(
        self,
        prompt: _I32,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        repetition: float,
        presence: float,
        frequency: float,
        seed: int,
        logprobs: int,
    ) -> None: ...
    @property
    def position(self) -> int: ...
    def push(self, token: int) -> None: ...
    def bias(self, tokens: Sequence[int], values: Sequence[float]) -> None: ...
    def mask(self, words: _I32) -> None: ...
    def logprobs(self) -> tuple[float, list[tuple[int, float]]]: ...

class AttentionLayer:
    def __init__(
        self,
        level: str,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int,
        kv: KvFormat,
        bf16_math: bool,
        key_scale: _F32,
    ) -> None: ...
    def allocate(self, capacity: int, fill: int = 0, mapped: bool = False) -> KvView: ...
    def run(
        self,
        q: _F32,
        k: _F32,
        v: _F32,
        cos: _F32,
        sin: _F32,
        out: _F32,
        views: Sequence[KvView],
        lengths: Sequence[int],
        parts: int = 1,
    ) -> None: ...

def available_levels() -> list[str]: ...
def compiled_levels() -> list[str]: ...
def default_level() -> str: ...
def encode_int8(
    level: str, x: _F32, group: int, kp: int, limits: _F32, order: _I32, q: _I8, scale: _F32, sum: _I32
) -> None: ...
def linear(
    level: str,
    arithmetic: str,
    storage: Storage,
    n: int,
    k: int,
    kp: int,
    group: int,
    groups: int,
    offset: int,
    wide: bool,
    exponent: int,
    rounded: bool,
    values: _U8,
    scales: _U8,
    mins: _U8,
    x: _F32,
    bias: _F32,
    accumulate: bool,
    out: _F32,
    block_begin: int,
    block_end: int,
    /,
) -> None: ...
def decode_row(
    level: str,
    storage: Storage,
    n: int,
    k: int,
    kp: int,
    group: int,
    groups: int,
    offset: int,
    wide: bool,
    exponent: int,
    rounded: bool,
    values: _U8,
    scales: _U8,
    mins: _U8,
    row: int,
    out: _F32,
    /,
) -> None: ...
def read_bandwidth(level: str, pool: Pool, bytes: int, rounds: int) -> float: ...
def rmsnorm(level: str, x: _F32, w: _F32, y: _F32, eps: float) -> None: ...
def add(level: str, x: _F32, y: _F32) -> None: ...
def gated(level: str, gate: _F32, up: _F32, out: _F32, activation: int) -> None: ...
def sample(
    logits: _F32, rows: Sequence[SampleRow], tokens: _I32, pool: Pool | None, level: str = ""
) -> None: ...
def score(
    logits: _F32, tokens: _I32, top: int, pool: Pool | None
) -> list[tuple[float, list[tuple[int, float]]]]: ...
def philox(key: int, counter_low: int, counter_high: int) -> tuple[int, int, int, int]: ...
def watch_interrupt(word: _I32) -> bool: ...
def unwatch_interrupt() -> None: ...
