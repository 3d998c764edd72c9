"""LoRA adapters as Hugging Face's PEFT writes them, added to a model without touching its weights.

An adapter adds strength * alpha / r * B A to matrices W [N, K], with A [r, K] and B [N, r] (Hu et al., arXiv
2106.09685). It becomes one more product of the linear: nothing is merged, nothing quantised anew. Where a
recipe has scaled the model's channels, W' = diag(rows) W diag(columns), A and B are scaled alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gristmill.errors import ModelError, UsageError
from gristmill.formats import dense
from gristmill.formats.packed import Packed
from gristmill.io.checkpoint import Checkpoint, Extent
from gristmill.io.json_file import read_object
from gristmill.io.mapped import short
from gristmill.io.safetensors import SafetensorsFile
from gristmill.program.builder import node_name

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>[\w.]{1,400})\.lora_(?P<part>[AB])(\.\w{1,100})?\.weight"
)
_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_F16_MAX = 65504.0
# What an adapter may say of variants that compute something else than B A; left out counts as the first.
_PLAIN: dict[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """What an adapter adds to one matrix: scale * B A."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scale: float
    form: str
    """How the adapter stores both: f32, f16 or bf16."""


def read_adapter(directory: Path) -> dict[str, Pair]:
    """The pairs of an adapter directory by module name (`model.layers.0.self_attn.q_proj`).

    ModelError, one line, for a missing or damaged file, another kind of adapter than plain LoRA, and tensors
    whose shapes do not agree with each other or with the rank.
    """
    where = directory / CONFIG
    config = read_object(where)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{where}: adapters of type {short(kind)} are not supported, only LORA")
    for key, plain in _PLAIN.items():
        if not any(config.get(key, plain[0]) == value for value in plain):
            raise ModelError(f"{where}: {key} {short(config[key])} is not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= 1 << 20:
        raise ModelError(f"{where}: r is {short(rank)}, not a rank")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= 1e6:
        raise ModelError(f"{where}: lora_alpha is {short(alpha)}, not a number within a million")
    targets = config.get("target_modules")
    file = SafetensorsFile(directory / WEIGHTS)
    found: dict[str, dict[str, str]] = {}
    for name, entry in file.entries.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ModelError(f"{file.path}: {short(name)} is no matrix of a plain LoRA adapter")
        if entry.dtype not in _DTYPES or len(entry.shape) != 2:
            raise ModelError(f"{file.path}: {short(name)} is no matrix of F32, F16 or BF16")
        module, part = match["module"], match["part"]
        if isinstance(targets, list) and not any(_ends(module, target) for target in targets):
            raise ModelError(f"{file.path}: {short(module)} is not among the target_modules of {CONFIG}")
        if part in found.setdefault(module, {}):
            raise ModelError(f"{file.path} holds lora_{part} of {short(module)} twice")
        found[module][part] = name
    if not found:
        raise ModelError(f"{file.path} holds no tensors")
    patterned = config.get("rank_pattern") not in (None, {})
    result = {}
    for module, names in found.items():
        if len(names) != 2:
            raise ModelError(f"{file.path} lacks one of lora_A and lora_B of {short(module)}")
        a, b = (file.entries[names[part]] for part in "AB")
        own = a.shape[0]
        if own < 1 or b.shape[1] != own or (own != rank and not patterned):
            raise ModelError(
                f"{file.path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} of {short(module)} "
                f"do not fit r = {rank}"
            )
        values = [_values(file, names[part]) for part in "AB"]
        scale = alpha / (sqrt(own) if config.get("use_rslora") else own)
        form = _DTYPES[a.dtype] if a.dtype == b.dtype else "f32"
        result[module] = Pair(values[0], values[1], scale, form)
    return result


def _ends(module: str, target: object) -> bool:
    return isinstance(target, str) and f".{module}".endswith(f".{target}")


def _values(file: SafetensorsFile, name: str) -> NDArray[np.float32]:
    array = file.array(name)
    values = dense.from_bf16(array) if file.entries[name].dtype == "BF16" else array.astype(np.float32)
    if not np.isfinite(values).all():
        raise ModelError(f"{file.path}: {short(name)} holds values that are not finite")
    return values


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint with adapters as further products of its linears. It is read like any other."""

    def __init__(self, directory: Path, adapters: Sequence[tuple[Path, float]]) -> None:
        """adapters: directories and strengths, which may all be the same. ModelError as in `read_adapter`,
        and for a module that the model lacks or another shape than the model's.
        """
        from gristmill.program.edits import add_branches

        super().__init__(directory)
        self._added: dict[str, Packed] = {}
        if self.config["quantization_config"].get("adapters") is False:
            raise ModelError(f"{self.directory}: its channels are in an order of their own: no adapter fits")
        program = self.program()
        for number, (path, strength) in enumerate(adapters):
            nodes = {node.name: node for node in program.nodes if node.op == "linear"}
            branches: list[tuple[list[str], int]] = []
            for module, pair in read_adapter(path).items():
                node = nodes.get(node_name(module))
                if node is None:
                    raise ModelError(f"{path}: the model has no linear {short(module)}")
                weight = program.weights[node.weights[0]]
                if weight.shape != (len(pair.b), pair.a.shape[1]):
                    raise ModelError(
                        f"{path}: the adapter of {short(module)} is for a matrix "
                        f"{[len(pair.b), pair.a.shape[1]]}, but the model's is {list(weight.shape)}"
                    )
                a, b = pair.a, pair.b * np.float32(pair.scale * strength)
                if weight.name in self.factors:
                    rows, columns = self.factors[weight.name]
                    a, b = a * columns, b * rows[:, None]
                stem = weight.name.removesuffix(".weight")
                self._added[f"{stem}.lora{number}_down.weight"] = _pack(a, pair.form)
                self._added[f"{stem}.lora{number}_up.weight"] = _pack(b, pair.form)
                branches.append(([node.name], len(pair.a)))
            program = add_branches(program, branches, name=f"lora{number}")
        self._program = program
        self.edited = True
        self.specs = {**self.specs, **{name: packed.spec for name, packed in self._added.items()}}
        self._names = (*self._names, *self._added)

    def packed(self, name: str) -> Packed:
        """A matrix of the checkpoint or of an adapter."""
        return self._added[name] if name in self._added else super().packed(name)

    def extents(self, name: str) -> dict[str, Extent]:
        """As for any checkpoint; nothing for what an adapter has added, which lies in no file."""
        return {} if name in self._added else super().extents(name)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, adapters included."""
        return super().weight_bytes + sum(packed.nbytes for packed in self._added.values())


def _pack(values: NDArray[np.float32], form: str) -> Packed:
    # Strength and smoothing may lead beyond float16.
    wide = form == "f16" and float(np.abs(values).max()) > _F16_MAX
    return dense.pack(values, "f32" if wide else form)


Adapters = str | Path | Sequence[str | Path]
"""Adapter directories: one or several."""
Strengths = float | Sequence[float]


def open_adapted(directory: Path, lora: Adapters = (), strength: Strengths = 1.0) -> Checkpoint:
    """A checkpoint, with adapters if any are given.

    strength: of all of them, or one for each (none: 1). UsageError for another number of strengths, or one
    that is no number within a million.
    """
    paths = [Path(lora)] if isinstance(lora, (str, Path)) else [Path(path) for path in lora]
    strengths: list[Any] = list(strength) if isinstance(strength, Sequence) else [strength] * len(paths)
    strengths = strengths or [1.0] * len(paths)
    if len(strengths) != len(paths):
        raise UsageError(f"{len(paths)} adapters cannot have {len(strengths)} strengths")
    for value in strengths:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e6:
            raise UsageError(f"the strength of an adapter must be a number within a million, not {value!r}")
    if not paths:
        return Checkpoint.open(directory)
    return AdaptedCheckpoint(directory, list(zip(map(Path.expanduser, paths), strengths, strict=True)))
