"""Adapters: small files that change a model's weights (LoRA and its relatives). `convert.lora` reads their spellings;
this applies what it gives to a network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

Pair = tuple[mx.array, mx.array]
UNNAMED = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # what trainers call all LoRAs


class Rows(NamedTuple):
    """What a layer of another layout is here: some rows of the weight of one of our layers."""

    layer: str
    first: int
    rows: int
    kernel: tuple[int, ...] | None = None  # (h, w) of a convolution there; one of 1 x 1 is a linear layer here


@dataclass(frozen=True)
class Change:
    """What one layer of an adapter adds to some rows of a parameter. Either `low` or `full` is given."""

    first: int  # the first of the rows
    rows: int
    low: Pair | None = None  # down (r, in) and up (rows, r): the change is up @ down
    full: Callable[[], mx.array] | None = None  # makes (rows, ...), anew each time: it may be as large as the model
    magnitude: mx.array | None = None  # DoRA: the length of each row, (rows, 1), or of each column, (1, in)
    replaces: bool = False  # what `full` makes takes the place of the rows, whatever the adapter's scale is
    widens: int = 0  # how many columns it makes of the parameter's, which has fewer, and zeros there; 0: it keeps them

    def of(self, bare: mx.array, scale: float) -> mx.array:
        """What is added to the rows of the bare parameter, in float32."""
        bare = bare.astype(mx.float32)
        if self.replaces:
            return self.full() - bare
        change = self.full() if self.low is None else self.low[1] @ self.low[0]
        if self.magnitude is None:
            return scale * change
        new = bare + change
        along = [i for i, n in enumerate(self.magnitude.shape) if n == 1]
        length = mx.sqrt(mx.square(new).sum(along, keepdims=True))
        return scale * (self.magnitude * new / length - bare)


@dataclass(frozen=True, eq=False)
class Adapter:
    name: str
    changes: dict[str, dict[str, list[Change]]]  # component -> parameter -> its changes
    layers: dict[str, int]  # component -> how many of its layers the file changes
    ranks: tuple[int, ...]
    nbytes: int  # in memory, as long as it is known
    words: tuple[str, ...] = ()  # that a prompt needs for it, as its trainer noted

    @property
    def inputs(self) -> int:
        """How many channels the denoiser's input has with it; 0 if it has as many as before."""
        return max((c.widens for named in self.changes.values() for cs in named.values() for c in cs), default=0)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {n}" for name, n in self.layers.items())
        ranks = " to ".join(str(rank) for rank in sorted({*self.ranks[:1], *self.ranks[-1:]}))
        n = sum(self.layers.values())
        return f"{self.name}: {n} layer{'s' * (n != 1)} ({parts})" + (f", rank {ranks}" if self.ranks else "")


@dataclass(frozen=True, eq=False)
class Word:
    """A word that a text encoder is taught (textual inversion; Gal et al. 2022)."""

    word: str
    vectors: dict[str, mx.array]  # text encoder -> the embeddings of its tokens, (n, d)


@dataclass(frozen=True)
class Taught:
    """Of a file that fits the model: the word that it teaches, and how many tokens the word takes in a prompt."""

    word: str
    tokens: int

    def __str__(self) -> str:
        return f"a word of {self.tokens} token{'s' * (self.tokens != 1)}"


class SidePath(nn.Module):
    """A quantized layer and low-rank changes that run beside it: they would be lost if they were quantized with it."""

    def __init__(self, layer: nn.Module, changes: list[Pair]):
        super().__init__()
        self.layer = layer
        self.down = mx.concatenate([down for down, _ in changes])  # (r, in)
        self.up = mx.concatenate([up for _, up in changes], axis=1)  # (out, r)

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x) + (x @ self.down.T) @ self.up.T


def apply(network: nn.Module, component: str, adapters: list[tuple[Adapter, float]]) -> None:
    """Change a network by adapters, each with its scale. Every change is relative to the bare weights. Weights that are
    not quantized are added up, lazily. Beside a quantized layer, changes of low rank run as a SidePath; for those of
    full rank, the layer is no longer quantized."""
    touched = {parameter for adapter, _ in adapters for parameter in adapter.changes.get(component, {})}
    for parameter in sorted(touched):
        changes = _of(adapters, component, parameter)
        path, _, leaf = parameter.rpartition(".")
        parent, _, name = path.rpartition(".")
        holder = _at(network, parent)
        layer = _at(holder, name)
        if leaf != "weight" or not isinstance(layer, nn.QuantizedLinear):
            layer[leaf] = _changed(layer[leaf], changes)
            continue
        if all(change.low is not None and change.magnitude is None for change, _ in changes):
            new = SidePath(layer, [_whole(change, scale, layer) for change, scale in changes])
        else:
            new = _dense(layer)
            new.weight = _changed(new.weight, changes)
        if isinstance(holder, list):
            holder[int(name)] = new
        else:
            setattr(holder, name, new)


def changed(bare: mx.array, component: str, parameter: str, adapters: list[tuple[Adapter, float]]) -> mx.array:
    """A parameter that is not quantized, under adapters."""
    changes = _of(adapters, component, parameter)
    return _changed(bare, changes) if changes else bare


def _of(adapters: list[tuple[Adapter, float]], component: str, parameter: str) -> list[tuple[Change, float]]:
    return [(c, scale) for adapter, scale in adapters for c in adapter.changes.get(component, {}).get(parameter, ())]


def _at(module, path: str):
    """The part of a network at a path, "" being the network itself."""
    for name in path.split(".") if path else ():
        module = module[int(name)] if isinstance(module, list) else module[name]
    return module


def _changed(bare: mx.array, changes: list[tuple[Change, float]]) -> mx.array:
    wide = max(change.widens for change, _ in changes)
    new = _widened(bare.astype(mx.float32), wide)
    for change, scale in changes:
        rows = slice(change.first, change.first + change.rows)
        new[rows] = new[rows] + _widened(change.of(_widened(bare[rows], change.widens), scale), wide)
    return new.astype(bare.dtype)


def _widened(value: mx.array, columns: int) -> mx.array:
    """With zeros as further columns, if it has fewer."""
    return value if columns <= value.shape[-1] else mx.pad(value, [(0, 0), (0, columns - value.shape[-1])])


def _whole(change: Change, scale: float, layer: nn.QuantizedLinear) -> Pair:
    """A change of low rank for all rows of a layer, in its dtype. Rows that it does not change are zeros."""
    down, up = change.low
    after = layer.weight.shape[0] - change.first - change.rows
    dtype = layer.scales.dtype if layer.scales.dtype != mx.uint8 else mx.float32
    return down.astype(dtype), (scale * mx.pad(up, [(change.first, after), (0, 0)])).astype(dtype)


def _dense(layer: nn.QuantizedLinear) -> nn.Linear:
    rows = layer.weight.shape[0]
    how = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    weight = mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **how)
    dense = nn.Linear(1, rows, bias="bias" in layer)
    dense.weight = weight
    if "bias" in layer:
        dense.bias = layer.bias
    return dense
