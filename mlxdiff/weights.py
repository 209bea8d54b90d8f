"""Weight files of a model folder: one `<component>.safetensors` for each component, with our names and layout. Writing
streams tensor by tensor. Reading is lazy and strict: a missing, unknown or misshapen tensor is an error."""

import json
import math
import os
import struct
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .errors import Error
from .families import Family
from .foreign import check_regular
from .models import build
from .recipe import DTYPES, Recipe, component_bits, component_dtype, quantization_plan

_TAGS = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8"}
_STORED = 32  # numbers of a group in quantized files, which keep them
_ROWS = 2**22  # numbers of a tensor whose quantization error is measured together


def quantized(module: nn.Module, layers: dict[str, dict]) -> nn.Module:
    """The module with the layers of a quantization plan in quantized form. Their parameters are not filled yet."""
    if layers:
        nn.quantize(module, class_predicate=lambda path, _: layers.get(path, False))
    return module


class Writer:
    """Writes the safetensors file of one component, tensor by tensor in any order: the header is known beforehand.
    The file is named after its component. Use it as a context manager; if it exits without an error, every parameter
    was put exactly once. stored: parameter -> the bits in which its source has it, in groups of 32. Those to which the
    recipe gives as many bits, or more, keep these groups: they are in `as_stored`, with the recipe's bits."""

    def __init__(
        self,
        path: Path,
        family: Family,
        config: build.Config,
        recipe: Recipe,
        stored: dict[str, int | None] | None = None,
    ):
        self.path, name = path, path.stem
        self.dtype = DTYPES[component_dtype(family, name, recipe.dtype)]
        module = build.build(config)
        self.layers = quantization_plan(family, name, module, component_bits(family, name, recipe))
        self.as_stored = {}
        for layer, how in self.layers.items():
            key, bits = f"{layer}.weight", (stored or {}).get(f"{layer}.weight")
            if how["mode"] == "affine" and bits is not None and bits <= how["bits"]:
                self.layers[layer] = how | {"group_size": _STORED}
                self.as_stored[key] = how["bits"]
        self.entries, offset = {}, 0
        self.lost = self.whole = 0.0  # sums of squares over the quantized weights: of their errors, and of the weights
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

    def put(self, key: str, value: mx.array, parts: tuple[mx.array, ...] | None = None) -> None:
        """parts: of one of `as_stored`, the packed numbers, scales and biases of the value."""
        path, _, leaf = key.rpartition(".")
        value = value.astype(self.dtype)
        if leaf == "weight" and path in self.layers:
            parts = mx.quantize(value, **self.layers[path]) if parts is None else parts
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
        """The root mean square of the error of all quantized weights put so far, relative to that of the weights."""
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
    if value.dtype == mx.bfloat16:  # numpy has no bfloat16: pass the bits through unchanged
        value = value.view(mx.uint16)
    return np.ascontiguousarray(np.array(value, copy=False)).data.cast("B")


def load(path: Path, family: Family, config: build.Config, recipe: Recipe) -> nn.Module:
    """The component in a file that is named after it. Its weights are read from disk when they are first evaluated."""
    try:
        check_regular(path)
        arrays = mx.load(str(path))
    except (RuntimeError, OSError, ValueError) as e:
        raise Error(f"{path} cannot be read: {e}.", "Convert the checkpoint again.") from None
    try:
        build.check_size(config, len(arrays))
    except Error as e:
        raise Error(f"{path}: {e.problem}", e.fix) from None
    module = build.build(config)
    layers = quantization_plan(family, path.stem, module, component_bits(family, path.stem, recipe))
    linear = dict(module.named_modules())
    for layer, how in layers.items():  # those that the writer took as they were stored have more scales
        groups = (linear[layer].weight.shape[0], linear[layer].weight.shape[1] // _STORED)
        if how["mode"] == "affine" and f"{layer}.scales" in arrays and arrays[f"{layer}.scales"].shape == groups:
            layers[layer] = how | {"group_size": _STORED}
    quantized(module, layers)
    fit(path, arrays, {k: tuple(v.shape) for k, v in tree_flatten(module.parameters())})
    module.load_weights(list(arrays.items()))
    module.eval()
    return module


def fit(path: Path, arrays: dict[str, mx.array], shapes: dict[str, tuple]) -> None:
    """Raise if a key is missing or unknown, or if a shape differs from the network's."""
    again = "Convert the checkpoint again."
    for key in sorted(shapes.keys() - arrays.keys()):
        raise Error(f"{path} lacks {key}.", again)
    for key in sorted(arrays.keys() - shapes.keys()):
        raise Error(f"{path} holds {key}, which the network does not have.", again)
    for key, shape in shapes.items():
        if tuple(arrays[key].shape) != shape:
            raise Error(f"{path} has {key} of shape {tuple(arrays[key].shape)}; the network wants {shape}.", again)
