"""Trains a LoRA: low-rank changes beside the layers of frozen networks, which may be quantized. Hu et al. 2021; names
and first values as in peft."""

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..adapters import Rows
from ..description import Description
from ..errors import Error, did_you_mean
from ..models.layers import Conv3x3, conv3x3
from .fit import write_arrays

FILE = "pytorch_lora_weights.safetensors"
MOST_RANK = 1024
EVERY = "all"  # in the place of layers' names
OF_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")  # the layers of CLIP that are trained, as in diffusers' scripts


class LowRank(nn.Module):
    """A change of low rank. It is trained in float32 and computes in the dtype of what it reads."""

    def __init__(self, rows: Rows, columns: tuple[int, ...], rank: int, scale: float, rng: np.random.Generator):
        super().__init__()
        self.down = mx.array(rng.normal(0, 1 / rank, (rank, *columns)).astype(np.float32))
        self.up = mx.zeros((rows.rows, rank))
        self.scale, self.kernel = scale, rows.kernel

    def __call__(self, x: mx.array) -> mx.array:
        return self.scale * (self.low(x) @ self.up.T.astype(x.dtype))

    def low(self, x: mx.array) -> mx.array:
        return x @ self.down.T.astype(x.dtype)

    def stored(self) -> tuple[mx.array, mx.array]:
        """down and up as diffusers stores them: those of a convolution are convolutions, the second of 1 x 1."""
        down, up = self.down, self.scale * self.up
        if self.kernel is None:
            return down, up
        down = down.transpose(0, 3, 1, 2) if down.ndim == 4 else down[:, :, None, None]
        return down, up[:, :, None, None]


class LowRankConv(LowRank):
    """That of a convolution, whose `down` is one like it. Yeh et al. 2023 call it LoCon."""

    def __init__(self, layer: nn.Conv2d, *values):
        super().__init__(*values)
        self._like = {"stride": layer.stride, "padding": layer.padding}
        self._fast = isinstance(layer, Conv3x3)

    def low(self, x: mx.array) -> mx.array:
        down = self.down.astype(x.dtype)
        return conv3x3(x, down) if self._fast else mx.conv2d(x, down, **self._like)


class Changed(nn.Module):
    """A frozen layer and the changes that are added to its output. Each changes the rows of one layer of diffusers,
    where ours is several of those in one."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.changes = layer, []
        self._first: list[int] = []

    def add(self, first: int, change: LowRank) -> None:
        self.changes.append(change)
        self._first.append(first)

    @property
    def weight(self) -> mx.array:  # networks read their dtypes off such
        return self.layer.weight

    @property
    def bias(self) -> mx.array:
        return self.layer.bias

    def __call__(self, x: mx.array) -> mx.array:
        return self._plus(self.layer(x), x)

    def without_bias(self, x: mx.array) -> mx.array:
        return self._plus(self.layer.without_bias(x), x)

    def _plus(self, y: mx.array, x: mx.array) -> mx.array:
        if len(self.changes) == 1 and self.changes[0].up.shape[0] == y.shape[-1]:
            return y + self.changes[0](x).astype(y.dtype)
        parts, end = [], 0
        for first, change in sorted(zip(self._first, self.changes, strict=True), key=lambda pair: pair[0]):
            parts += [mx.zeros((*y.shape[:-1], first - end), y.dtype)] if first > end else []
            parts.append(change(x).astype(y.dtype))
            end = first + change.up.shape[0]
        parts += [mx.zeros((*y.shape[:-1], y.shape[-1] - end), y.dtype)] if end < y.shape[-1] else []
        return y + mx.concatenate(parts, axis=-1)


def columns_of(layer: nn.Module) -> tuple[int, ...]:
    """The shape of what one output of a layer reads, quantized or not: (in,), or (h, w, in) of a convolution."""
    columns = layer.weight.shape[1:]
    return (columns[0] * 32 // layer.bits,) if isinstance(layer, nn.QuantizedLinear) else columns


def attach(
    net: nn.Module, name: str, known: dict[str, Rows], wanted: tuple[str, ...], rank: int, alpha: float, seed: list[int]
) -> dict[str, LowRank]:
    """Freeze a network, and put changes beside all layers whose names end like one of `wanted`, or beside every layer,
    which have a lower rank where a layer is smaller. known: its layers by their names in diffusers. name: of the model,
    for messages. seed: of the first values."""
    net.freeze()
    modules, kinds = dict(net.named_modules()), nn.Linear | nn.QuantizedLinear | nn.Conv2d
    layers = {n: rows for n, rows in known.items() if isinstance(modules[rows.layer], kinds)}
    every = EVERY in wanted
    for end in () if every else wanted:
        if not any(_ends(path, end) for path in layers):
            ends = sorted({path.rpartition(".")[2] for path in layers if not path.rpartition(".")[2].isdigit()})
            raise Error(f"{name} has no layer {end!r}.", f"{did_you_mean(end, ends)}It has {', '.join(ends)}.")
    made, held = {}, {}
    for i, path in enumerate(sorted(p for p in layers if every or any(_ends(p, end) for end in wanted))):
        rows = layers[path]
        layer, columns = modules[rows.layer], columns_of(modules[rows.layer])
        most = min(rows.rows, math.prod(columns))
        if rank > most and not every:
            problem = f"Rank {rank} is too high: {path} is {' x '.join(map(str, (rows.rows, *columns)))}."
            raise Error(problem, f"Use at most {most}.")
        values = rows, columns, min(rank, most), alpha / rank, np.random.default_rng([*seed, i])
        made[path] = LowRankConv(layer, *values) if len(columns) == 3 else LowRank(*values)
        if rows.layer not in held:
            held[rows.layer] = Changed(layer)
            _put(net, rows.layer, held[rows.layer])
        held[rows.layer].add(rows.first, made[path])
    return made


def _ends(path: str, wanted: str) -> bool:
    return f".{path}".endswith(f".{wanted}")


def _put(net: nn.Module, path: str, layer: nn.Module) -> None:
    *parents, last = path.split(".")
    for part in parents:
        net = net[int(part)] if isinstance(net, list) else net[part]
    if isinstance(net, list):
        net[int(last)] = layer
    else:
        net[last] = layer


def export(made: dict[str, dict[str, LowRank]], model: Description, notes: dict, folder: Path) -> Path:
    """Write the changes of each component as a file that diffusers, ComfyUI and mlxdiff read. What the scale is beside
    1 goes into `up`, so that alpha equals the rank, and a reader that ignores alpha draws the same."""
    tensors, peft = {}, {}
    for component, changes in made.items():
        prefix = component if component == model.family.denoiser else f"{component}.text_model"
        names = {f"{prefix}.{path}": change for path, change in changes.items()}
        for path, change in names.items():
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = map(mx.contiguous, change.stored())
        ranks = {path: change.down.shape[0] for path, change in changes.items()}
        rank = max(ranks.values())
        lower = {path: r for path, r in ranks.items() if r < rank}
        settings = {
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": lower,
            "alpha_pattern": lower,
            "target_modules": sorted(changes),
        }  # peft reads them as ends of names
        peft |= {f"{component}.{key}": value for key, value in settings.items()}
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(peft),
        "ss_base_model_version": model.family.name,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "modelspec.title": folder.name,
    }
    return write(folder / FILE, tensors, header, notes)


def write(file: Path, tensors: dict[str, mx.array], header: dict[str, str], notes: dict) -> Path:
    """Write a file completely or not at all. notes: the settings of the training, the words to use it among them."""
    header = header | {"mlxdiff": json.dumps(notes)}
    if notes.get("trigger"):
        header["modelspec.trigger_phrase"] = notes["trigger"]
    write_arrays(file, tensors, header)
    return file
