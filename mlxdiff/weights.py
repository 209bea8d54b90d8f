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

FORMAT = 3  # goes up when `plan` changes, by which a quantized file is read again, or what a conversion comes out as
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
# What quantizes, by the bits of a number: a whole number of them scales and shifts every group of numbers, the others
# are MLX's kinds of small floats, which only scale it.
BITS: dict[int | str, int] = {3: 3, 4: 4, 5: 5, 6: 6, 8: 8, "mxfp4": 4, "mxfp8": 8, "nvfp4": 4}
SMALLER = f"{', '.join(map(str, BITS))}: smaller, not faster"
_GROUPS = {"mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
_TAGS = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8"}

# Of each component, by parts of their paths: Linear layers that stay as they are, small ones that every step or token
# passes through; and those that keep 8 bits under any recipe, a transformer's modulations, a quarter of FLUX.
_SD3 = ("time_text_embed", "context_embedder", "norm_out", "proj_out")
_FLUX = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")
_CAREFUL = {
    "unet": (("time_embedding", "add_embedding", "time_emb_proj"), ()),
    "transformer": (_SD3 + _FLUX, (".norm1", "_mod.", ".modulation.")),
}
_CAREFUL_TEXT = (("text_projection", "embeddings"), ())
_ROWS = 2**22  # numbers of a tensor whose quantization error is looked at together


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


def bits_of(text: str) -> int | str:
    """What a command line's -q says: one of BITS."""
    return int(text) if text.isdigit() else text


def recipe(bits: int | str | None, dtype: str | None) -> dict:
    """How to store weights, checked. dtype None: what suits this machine."""
    if bits is not None and bits not in BITS:
        raise Error(f"Weights cannot be quantized to {bits!r}.", f"Use one of {', '.join(map(str, BITS))}.")
    if dtype is not None and dtype not in DTYPES:
        raise Error(f"{dtype!r} is not a dtype for weights.", f"Use one of {', '.join(DTYPES)}.")
    return {"dtype": default_dtype() if dtype is None else dtype, "bits": bits}


def label(recipe: dict) -> str:
    """How weights are stored, in a word: float16, float16-4bit, float16-mxfp4."""
    dtype, bits = recipe["dtype"], recipe["bits"]
    return dtype if bits is None else f"{dtype}-{bits}bit" if isinstance(bits, int) else f"{dtype}-{bits}"


def plan(name: str, module: nn.Module, bits: int | str | None) -> dict[str, dict]:
    """Which Linear layers of a component are quantized, and how, in MLX's words: {path: {group_size, bits, mode}}."""
    if bits is None or name == "vae":
        return {}
    layers, (whole, eight) = {}, _CAREFUL.get(name, _CAREFUL_TEXT)
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and not any(k in path for k in whole):
            own = 8 if any(k in path for k in eight) else bits
            group = next((g for g in _GROUPS.get(own, (64, 32)) if layer.weight.shape[1] % g == 0), None)
            if group is not None:
                layers[path] = {"group_size": group, "bits": BITS[own], "mode": own if own in _GROUPS else "affine"}
    return layers


def quantized(module: nn.Module, layers: dict[str, dict]) -> nn.Module:
    """The module with its planned layers in quantized form, parameters still to be filled."""
    if layers:
        nn.quantize(module, class_predicate=lambda path, _: layers.get(path, False))
    return module


class Writer:
    """A safetensors file of one component, written tensor by tensor in any order: the header is known beforehand.
    Used as a context manager; leaving it without an error means every parameter was put exactly once."""

    def __init__(self, path: Path, name: str, config: dict, dtype: str, bits: int | str | None):
        self.path, self.dtype = path, DTYPES[dtype]
        module = build(name, config)
        self.layers = plan(name, module, bits)
        self.entries, offset = {}, 0
        self.lost = self.whole = 0.0  # sums of squares, over what is quantized: of its errors, and of itself
        for key, value in tree_flatten(quantized(module, self.layers).parameters()):
            kind = value.dtype if value.dtype in (mx.uint32, mx.uint8) else self.dtype
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
        value = value.astype(self.dtype)
        if leaf == "weight" and path in self.layers:
            parts = mx.quantize(value, **self.layers[path])
            for suffix, part in zip(("weight", "scales", "biases"), parts, strict=False):  # small floats have no biases
                self._write(f"{path}.{suffix}", part)
            self._compare(value, parts, self.layers[path])
        else:
            self._write(key, value)

    def _compare(self, value: mx.array, parts: tuple[mx.array, ...], how: dict) -> None:
        step = max(1, _ROWS // value.shape[1])
        for i in range(0, value.shape[0], step):
            true = value[i : i + step].astype(mx.float32)
            back = mx.dequantize(*(p[i : i + step] for p in parts), **how, dtype=mx.float32)
            self.lost += mx.square(back - true).sum().item()
            self.whole += mx.square(true).sum().item()

    @property
    def error(self) -> float | None:
        """Of the quantized weights put so far, the root mean square of what was lost, relative to their own."""
        if not self.layers:
            return None
        return math.sqrt(self.lost / self.whole) if self.whole else 0.0

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


# What drawing asks of a description.
_SOUND = {
    "name": lambda v: isinstance(v, str),
    "family": lambda v: v in [*FAMILIES],
    "variant": lambda v: isinstance(v, str),
    "prediction": lambda v: isinstance(v, str),
    "recipe": lambda v: isinstance(v, dict) and v.get("dtype") in [*DTYPES] and v.get("bits") in [None, *BITS],
    "schedule": lambda v: isinstance(v, dict),
    "components": lambda v: isinstance(v, dict) and all(isinstance(config, dict) for config in v.values()),
}


def read_description(folder: Path) -> dict:
    """The same of a model to draw with, which says more than its format."""
    model = read_model(folder)
    for key, sound in _SOUND.items():
        if not sound(model.get(key)):
            found = f"{Path(folder) / 'model.json'} has {key} {model.get(key)!r:.60}."
            raise Error(found, "Convert the checkpoint again.")
    return model


def load(folder: Path, name: str, model: dict) -> nn.Module:
    """One component of a model folder. Its weights are read from disk when they are first evaluated."""
    path = Path(folder) / f"{name}.safetensors"
    module = build(name, model["components"][name])
    quantized(module, plan(name, module, model["recipe"]["bits"]))
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
