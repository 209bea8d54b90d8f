"""Model folders: `model.json`, one `<component>.safetensors` each in our names and layout, tokenizers beside them.
Writing streams tensor by tensor; reading is strict (no tensor missing, unknown or misshapen) and lazy."""

import json
import math
import os
import struct
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .errors import Error
from .models import clip, flux, sd3, t5, taesd, unet, vae
from .registry import FAMILIES

FORMAT = 1
NETWORKS = (
    (clip.Config, clip.CLIPText),
    (t5.Config, t5.T5Encoder),
    (unet.Config, unet.UNet),
    (sd3.Config, sd3.SD3),
    (flux.Config, flux.Flux),
    (vae.Config, vae.VAE),
    (taesd.Config, taesd.Decoder),
)
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
BITS = (3, 4, 5, 6, 8)
_TAGS = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32"}

# Linear layers that see every step's time or size, or whose error nothing downstream averages out, stay unquantized.
# The modulations of a transformer are a quarter of FLUX, but are read once and dropped before the first step.
_SD3 = ("time_text_embed", "context_embedder", "norm1", "norm_out", "proj_out")
_FLUX = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "_mod.", "modulation", "final_layer")
_KEEP = {"unet": ("time_embedding", "add_embedding", "time_emb_proj"), "transformer": _SD3 + _FLUX}
_KEEP_TEXT = ("text_projection", "embeddings")


def build(name: str, config: dict) -> nn.Module:
    """The network of a component, told by its stored settings. Parameters are lazy: building it allocates nothing."""
    for Config, Module in NETWORKS:
        if {f.name for f in fields(Config)} == config.keys():
            return Module(Config(**{k: _tuples(v) for k, v in config.items()}))
    raise Error(f"The settings of {name} are of no network that is known here.", "Convert the checkpoint again.")


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def default_dtype() -> str:
    """float32 on a CPU, where half precision is emulated; float16 on M1 and M2, whose GPUs emulate bfloat16."""
    if mx.default_device() != mx.Device(mx.gpu):
        return "float32"
    chip = str(mx.device_info().get("architecture", ""))  # "applegpu_g13s": 13 is M1, 14 is M2, 15 is M3
    digits = "".join(c for c in chip.removeprefix("applegpu_g") if c.isdigit())
    return "float16" if chip.startswith("applegpu") and digits and int(digits) < 15 else "bfloat16"


def component_dtype(family: str, name: str, dtype: str) -> str:
    """The model's dtype, but float32 for a VAE that overflows in float16; bfloat16's 8 bits would show as banding."""
    if name == "vae" and not (dtype == "float16" and FAMILIES[family].vae_float16):
        return "float32"
    return dtype


def plan(name: str, module: nn.Module, bits: int | None) -> dict[str, int]:
    """Which Linear layers of a component are quantized, and with which group width: {path: group}."""
    if bits is None or name == "vae":
        return {}
    groups, keep = {}, _KEEP.get(name, _KEEP_TEXT)
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and not any(k in path for k in keep):
            group = next((g for g in (64, 32) if layer.weight.shape[1] % g == 0), None)
            if group is not None:
                groups[path] = group
    return groups


def quantized(module: nn.Module, groups: dict[str, int], bits: int | None) -> nn.Module:
    """The module with its planned layers in quantized form, parameters still to be filled."""
    if groups:
        nn.quantize(
            module,
            class_predicate=lambda p, _: {"group_size": groups[p], "bits": bits} if p in groups else False,
        )
    return module


class Writer:
    """A safetensors file of one component, written tensor by tensor in any order: the header is known beforehand.
    Used as a context manager; leaving it without an error means every parameter was put exactly once."""

    def __init__(self, path: Path, name: str, config: dict, dtype: str, bits: int | None):
        self.path, self.bits, self.dtype = path, bits, DTYPES[dtype]
        module = build(name, config)
        self.groups = plan(name, module, bits)
        self.shapes = {k: tuple(v.shape) for k, v in tree_flatten(module.parameters())}
        self.entries, offset = {}, 0
        for key, value in tree_flatten(quantized(module, self.groups, bits).parameters()):
            kind = mx.uint32 if value.dtype == mx.uint32 else self.dtype
            size = math.prod(value.shape) * kind.size
            self.entries[key] = (kind, tuple(value.shape), offset, size)
            offset += size
        self.size = offset

    def __enter__(self) -> "Writer":
        header = {"__metadata__": {"format": "mlx"}}
        for key, (kind, shape, offset, size) in self.entries.items():
            header[key] = {"dtype": _TAGS[kind], "shape": shape, "data_offsets": [offset, offset + size]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.file = open(self.path, "wb")
        self.file.write(struct.pack("<Q", len(text)) + text)
        self.start = self.file.tell()
        self.file.truncate(self.start + self.size)
        self.left = set(self.entries)
        return self

    def put(self, key: str, value: mx.array) -> None:
        path, _, leaf = key.rpartition(".")
        if leaf == "weight" and path in self.groups:
            parts = mx.quantize(value.astype(self.dtype), self.groups[path], self.bits)
            for suffix, part in zip(("weight", "scales", "biases"), parts, strict=True):
                self._write(f"{path}.{suffix}", part)
        else:
            self._write(key, value.astype(self.dtype))

    def _write(self, key: str, value: mx.array) -> None:
        kind, shape, offset, _ = self.entries[key]
        if key not in self.left or tuple(value.shape) != shape or value.dtype != kind:
            raise AssertionError(
                f"{key}: {value.shape} {value.dtype}, not the {shape} {kind} announced, or written twice"
            )
        self.file.seek(self.start + offset)
        self.file.write(_bytes(value))
        self.left.discard(key)

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
        finally:
            self.file.close()
        if kind is None and self.left:
            raise AssertionError(f"{self.path.name}: {len(self.left)} tensors never written, first {min(self.left)}")


def _bytes(value: mx.array) -> memoryview:
    if value.dtype == mx.bfloat16:  # numpy has no bfloat16: the bits go through as they are
        value = value.view(mx.uint16)
    return np.ascontiguousarray(np.array(value, copy=False)).data.cast("B")


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_model(folder: Path) -> dict:
    """`model.json` of a model folder, checked."""
    path = Path(folder) / "model.json"
    try:
        model = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise Error(f"{path} cannot be read as a model description: {e}.", "Convert the checkpoint again.") from None
    if not isinstance(model, dict) or model.get("format") != FORMAT:
        found = model.get("format") if isinstance(model, dict) else type(model).__name__
        raise Error(f"{path} has format {found}; this version reads {FORMAT}.", "Convert the checkpoint again.")
    return model


def load(folder: Path, name: str, model: dict) -> nn.Module:
    """One component of a model folder. Its weights are read from disk when they are first evaluated."""
    path = Path(folder) / f"{name}.safetensors"
    module, bits = build(name, model["components"][name]), model["recipe"]["bits"]
    quantized(module, plan(name, module, bits), bits)
    try:
        arrays = mx.load(str(path))
    except (RuntimeError, OSError, ValueError) as e:
        raise Error(f"{path} cannot be read: {e}.", "Convert the checkpoint again.") from None
    fit(path, arrays, {k: tuple(v.shape) for k, v in tree_flatten(module.parameters())})
    module.load_weights(list(arrays.items()))
    module.eval()
    return module


def fit(path: Path, arrays: dict[str, mx.array], shapes: dict[str, tuple]) -> None:
    """No key missing, none unknown, every shape as the network has it."""
    again = "Convert the checkpoint again."
    for key in sorted(shapes.keys() - arrays.keys()):
        raise Error(f"{path} lacks {key}.", again)
    for key in sorted(arrays.keys() - shapes.keys()):
        raise Error(f"{path} holds {key}, which the network does not have.", again)
    for key, shape in shapes.items():
        if tuple(arrays[key].shape) != shape:
            raise Error(f"{path} has {key} of shape {tuple(arrays[key].shape)}; the network wants {shape}.", again)
