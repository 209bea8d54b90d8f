"""Trains a LoRA: low-rank changes beside the layers of a frozen denoiser, which may be quantized. Hu et al. 2021; names
and first values as in peft."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..adapters import SidePath
from ..description import Description
from ..errors import Error, did_you_mean
from .fit import write_arrays

FILE = "pytorch_lora_weights.safetensors"
MOST_RANK = 1024


class LowRank(SidePath):
    """A frozen layer and a change of low rank beside it, which is trained in float32."""

    def __init__(self, layer: nn.Module, rank: int, alpha: float, rng: np.random.Generator):
        rows, columns = shape_of(layer)
        down = mx.array(rng.normal(0, 1 / rank, (rank, columns)).astype(np.float32))
        super().__init__(layer, [(down, mx.zeros((rows, rank)))])
        self.scale = alpha / rank

    def __call__(self, x: mx.array) -> mx.array:
        y = self.layer(x)
        return y + (self.scale * ((x @ self.down.T) @ self.up.T)).astype(y.dtype)


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a Linear layer, quantized or not."""
    rows, columns = layer.weight.shape
    return rows, columns * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else columns


def attach(
    net: nn.Module, name: str, layers: tuple[str, ...], rank: int, alpha: float, seed: int
) -> dict[str, LowRank]:
    """Freeze a network and put a LowRank in the place of each layer whose name ends like one of `layers`. name: of the
    model, for messages."""
    linear = {path: m for path, m in net.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)}
    for wanted in layers:
        if not any(_ends(path, wanted) for path in linear):
            ends = sorted({path.rpartition(".")[2] for path in linear if not path.rpartition(".")[2].isdigit()})
            raise Error(f"{name} has no layer {wanted!r}.", f"{did_you_mean(wanted, ends)}It has {', '.join(ends)}.")
    net.freeze()
    made = {}
    for i, path in enumerate(sorted(p for p in linear if any(_ends(p, wanted) for wanted in layers))):
        layer = linear[path]
        if rank > min(shape_of(layer)):
            problem = f"Rank {rank} is too high: {path} is {' x '.join(map(str, shape_of(layer)))}."
            raise Error(problem, f"Use at most {min(shape_of(layer))}.")
        made[path] = LowRank(layer, rank, alpha, np.random.default_rng([seed, 7, i]))
        _put(net, path, made[path])
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


def export(made: dict[str, LowRank], model: Description, notes: dict, folder: Path) -> Path:
    """Write the changes as a file that diffusers, ComfyUI and mlxdiff read. What the scale is beside 1 goes into `up`,
    so that alpha equals the rank, and a reader that ignores alpha draws the same."""
    component, tensors = model.family.denoiser, {}
    for path, layer in made.items():
        tensors[f"{component}.{path}.lora_A.weight"] = layer.down
        tensors[f"{component}.{path}.lora_B.weight"] = layer.scale * layer.up
    rank = next(iter(made.values())).down.shape[0]
    settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted(made)}
    peft = {f"{component}.{key}": value for key, value in settings.items()}
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
