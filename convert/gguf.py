"""Safe reading of GGUF, the format of llama.cpp, ComfyUI-GGUF and stable-diffusion.cpp: a header, which is checked
completely before anything in it is used, then tensors, whose numbers are mostly packed in blocks.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import Error

MAGIC = b"GGUF"
# The format's number of a type -> our name, the numbers in a block of it and the bytes that the block takes. Names that
# safetensors has too mean the same.
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    30: ("BF16", 1, 2),
}
BLOCKS = {name: (numbers, size) for name, numbers, size in _TYPES.values() if numbers > 1}

# Types whose numbers are steps of a scale from a lowest number, both shared by 32, as in MLX's affine form -> the bits
# of a step. MLX holds such a tensor as it is.
STEPS = {"Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q8_0": 8}
_LOWEST = {"Q4_0": -8, "Q5_0": -16, "Q8_0": -128}  # in steps, where a block does not say it

# The kinds of metadata. Text is read, as are the numbers that are needed; the rest is passed over.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY, _INT32, _UINT32 = 8, 9, 5, 4
_SHAPE = "comfy.gguf.orig_shape."  # ComfyUI-GGUF lays convolutions out as rows of 256, and keeps their shape here

_MAX_HEADER = 100_000_000  # bytes. Those that hold a large vocabulary have about ten million
_MAX_NAME = 2**16 - 1
_CHUNK = 2**20  # numbers of a tensor that are unpacked together
_AGAIN = "Download it again."

# llama.cpp's names of text encoders to those of transformers. Rows apply in order.
_T5 = [
    (r"^enc\.", "encoder."),
    (r"^dec\.", "decoder."),  # of a whole T5: it is not read
    (r"\.blk\.", ".block."),
    (r"^token_embd\.", "shared."),
    (r"^output\.", "lm_head."),
    (r"\.output_norm\.", ".final_layer_norm."),
    (r"\.attn_norm\.", ".layer.0.layer_norm."),
    (r"\.attn_rel_b\.", ".layer.0.SelfAttention.relative_attention_bias."),
    (r"\.attn_([qkvo])\.", r".layer.0.SelfAttention.\1."),
    (r"\.ffn_norm\.", ".layer.1.layer_norm."),
    (r"\.ffn_gate\.", ".layer.1.DenseReluDense.wi_0."),
    (r"\.ffn_up\.", ".layer.1.DenseReluDense.wi_1."),
    (r"\.ffn_down\.", ".layer.1.DenseReluDense.wo."),
]
_QWEN3 = [
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^blk\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.attn_([qk])_norm\.", r".self_attn.\1_norm."),
    (r"\.attn_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attn_output\.", ".self_attn.o_proj."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."),
]
_NAMES = {"t5": _T5, "t5encoder": _T5, "qwen3": _QWEN3}

# stable-diffusion.cpp drops the first axis of what has only one entry along it. These have that many axes.
_RANKS = {"pos_embed": 3, "x_pad_token": 2, "cap_pad_token": 2}


@dataclass(frozen=True)
class Entry:
    """A tensor in the header, with the name and the shape that the other formats give it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file


def read(path: Path, file: BinaryIO, size: int) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of an open GGUF file, and the metadata that is text."""
    header = _Header(path, file, size)
    metadata, shapes = _metadata(header)
    tensors = [_tensor(header) for _ in range(header.tensors)]
    align = metadata.get("general.alignment", 32)
    if type(align) is not int or align <= 0 or align & (align - 1):
        raise Error(f"{path} has the alignment {align!r}, which is no power of two.", _AGAIN)
    if metadata.get("split.count", 1) != 1:
        raise Error(f"{path} is one of several parts of a network.", "Join them: `llama-gguf-split --merge`.")
    begin = _up(header.at, align)
    _laid_out(path, [(start, start + length, name) for name, _, _, start, length in tensors], begin, align, size)
    text = {key: value for key, value in metadata.items() if isinstance(value, str)}
    table, entries = _NAMES.get(text.get("general.architecture"), []), {}
    sdxl = any("label_emb." in name for name, *_ in tensors)
    for name, dtype, shape, start, _ in tensors:
        entry = Entry(_renamed(name, table), dtype, _reshaped(path, name, shape, shapes, sdxl), begin + start)
        if entry.name in entries:
            raise Error(f"The header of {path} lists {entry.name!r} twice.", _AGAIN)
        entries[entry.name] = entry
    return list(entries.values()), text


def unpack(raw: np.ndarray, dtype: str, out: np.ndarray) -> None:
    """The numbers in the bytes of whole blocks, as float32."""
    from gguf import GGMLQuantizationType, quants  # only here: no other file needs it

    numbers, size = BLOCKS[dtype]
    kind, blocks = GGMLQuantizationType[dtype], _CHUNK // numbers
    for i in range(0, raw.size // size, blocks):
        # As one row, which the package unpacks at once. It would take rows by sixteens.
        part = np.array(raw[i * size : (i + blocks) * size])[None]
        with np.errstate(all="ignore"):  # NaN and infinity are refused when they are read
            out[i * numbers : (i + blocks) * numbers] = quants.dequantize(part, kind)[0]


def steps(raw: np.ndarray, dtype: str, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes of whole blocks of one of STEPS as MLX holds them in so many bits, or more than the type has: the
    steps, packed into 32-bit words, and for every 32 numbers the scale and the lowest number, as float32."""
    (numbers, size), parts = BLOCKS[dtype], []
    for i in range(0, raw.size, _CHUNK // 32 * size):
        blocks = np.array(raw[i : i + _CHUNK // 32 * size]).reshape(-1, size)
        values = np.empty(len(blocks) * numbers, np.float32)
        unpack(blocks.reshape(-1), dtype, values)
        scale, low = _scales(blocks, dtype)
        with np.errstate(all="ignore"):  # a scale of 0, whose numbers are all the lowest
            step = np.rint((values.reshape(-1, 32) - low[:, None]) / scale[:, None])
        step = np.nan_to_num(step, posinf=0, neginf=0).clip(0, 2 ** STEPS[dtype] - 1).astype(np.uint8)
        ones = np.unpackbits(step[..., None], axis=-1, bitorder="little", count=bits)
        parts.append((np.packbits(ones, bitorder="little").view(np.uint32), scale, low))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def _scales(blocks: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The scale of every 32 numbers and the lowest number, from blocks (n, bytes)."""
    from gguf.quants import Q4_K

    first, second = (blocks[:, i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))  # (n, 1)
    if dtype in _LOWEST:
        scale, low = first, first * _LOWEST[dtype]
    elif dtype.endswith("_1"):
        scale, low = first, second
    else:  # both are multiples of the block's own
        times, below = Q4_K.get_scale_min(blocks[:, 4:16].copy())  # (n, 8); Q5_K has them alike
        scale, low = first * times, -second * below
    return scale.reshape(-1), low.reshape(-1)


class _Header:
    """Reads the header from its start. Nothing is read, and no number of it is used, beyond the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.at, self.end = path, file, 0, min(size, _MAX_HEADER)
        file.seek(0)
        magic, version = self.take(4), self.number("I")
        if magic != MAGIC:
            raise Error(f"{path} is not a GGUF file.", _AGAIN)
        if version & 0xFFFF == 0 and version:
            raise Error(f"{path} is a big-endian GGUF file, which is not read.", "Use the usual, little-endian file.")
        if version not in (2, 3):
            raise Error(f"{path} is a GGUF file of version {version}; versions 2 and 3 are read.", "Use another copy.")
        self.tensors, self.keys = self.number("Q"), self.number("Q")
        # The least that each of them takes: a length and a kind; a length, dimensions, a type and an offset.
        if 13 * self.keys + 24 * self.tensors > self.end - self.at:
            raise Error(
                f"{path} claims {self.tensors:,} tensors and {self.keys:,} metadata keys; it has {size:,} bytes.",
                _AGAIN,
            )

    def _room(self, n: int) -> None:
        if n > self.end - self.at:
            if self.end == _MAX_HEADER:
                raise Error(f"{self.path} has a header of more than {_MAX_HEADER:,} bytes.", _AGAIN)
            raise Error(f"{self.path} is cut short: its header goes on after {self.end:,} bytes.", _AGAIN)

    def take(self, n: int) -> bytes:
        self._room(n)
        data = self.file.read(n)
        if len(data) != n:
            raise Error(f"{self.path} has changed while it was read.", "Try again.")
        self.at += n
        return data

    def skip(self, n: int) -> None:
        self._room(n)
        self.at = self.file.seek(self.at + n)

    def number(self, code: str) -> int | float | bool:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        """Text need not be UTF-8: some vocabularies are not."""
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def name(self) -> str:
        length = self.number("Q")
        if length > _MAX_NAME:
            raise Error(f"{self.path} has a name of {length:,} bytes in its header.", _AGAIN)
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise Error(f"{self.path} has a name in its header that is not UTF-8.", _AGAIN) from None


def _metadata(header: _Header) -> tuple[dict[str, object], dict[str, tuple[int, ...]]]:
    """Text and numbers by key, and ComfyUI-GGUF's shapes by the names of the tensors. Other arrays are left out."""
    values, shapes = {}, {}
    for _ in range(header.keys):
        key = header.name()
        if key in values:
            raise Error(f"The header of {header.path} lists {key!r} twice.", _AGAIN)
        values[key] = None
        kind = header.number("I")
        if kind == _TEXT:
            values[key] = header.text()
        elif kind == _ARRAY:
            shape = _array(header, key)
            if shape is not None:
                shapes[key.removeprefix(_SHAPE)] = shape
        elif kind in _SCALARS:
            values[key] = header.number(_SCALARS[kind])
        else:
            raise Error(f"{key!r} in the header of {header.path} is of the unknown kind {kind}.", _AGAIN)
    return values, shapes


def _array(header: _Header, key: str) -> tuple[int, ...] | None:
    """Pass over an array. If it is the shape of a tensor, return it."""
    kind, n = header.number("I"), header.number("Q")
    if key.startswith(_SHAPE):
        if kind != _INT32 or n > 8:
            raise Error(f"{key!r} in the header of {header.path} is no shape.", _AGAIN)
        return tuple(header.number("i") for _ in range(n))
    if kind == _TEXT:
        for _ in range(n):  # each takes at least its length, so the end of the header ends this
            header.skip(header.number("Q"))
    elif kind in _SCALARS:
        header.skip(n * struct.calcsize(f"<{_SCALARS[kind]}"))
    else:
        what = "an array of arrays" if kind == _ARRAY else f"an array of the unknown kind {kind}"
        raise Error(f"{key!r} in the header of {header.path} is {what}, which is not read.", _AGAIN)
    return None


def _tensor(header: _Header) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, type, shape, offset from the first tensor, and bytes. GGUF has the last axis first."""
    path, name, axes = header.path, header.name(), header.number("I")
    if axes > 8:
        raise Error(f"{name!r} in {path} has {axes:,} axes, which cannot be.", _AGAIN)
    shape = tuple(header.number("Q") for _ in range(axes))[::-1]
    kind, offset = header.number("I"), header.number("Q")
    if any(n >= 2**31 for n in shape) or math.prod(shape) >= 2**48:
        raise Error(f"{name!r} in {path} has shape {shape}, which cannot be.", _AGAIN)
    if kind not in _TYPES:
        known = ", ".join(known for known, *_ in _TYPES.values() if not known.startswith("I"))
        raise Error(f"{name!r} in {path} has the type {kind}, which is not read.", f"Use a file of {known}.")
    dtype, numbers, size = _TYPES[kind]
    if numbers > 1 and (not shape or shape[-1] % numbers):
        raise Error(f"{name!r} in {path}: shape {shape} is not in blocks of {numbers}, as {dtype} is.", _AGAIN)
    return name, dtype, shape, offset, math.prod(shape) // numbers * size


def _up(n: int, align: int) -> int:
    return -(-n // align) * align


def _laid_out(path: Path, spans: list[tuple[int, int, str]], begin: int, align: int, size: int) -> None:
    """Raise unless each tensor begins at the next multiple of the alignment, and the last one ends the file."""
    at = 0
    for start, end, name in sorted(spans):
        if start != _up(at, align):
            if start % align:
                what = f"is not aligned to {align} bytes"
            else:
                what = "overlaps the tensor before it" if start < at else "leaves unused bytes before it"
            raise Error(f"{name!r} in {path} {what} (byte {start:,}, expected {_up(at, align):,}).", _AGAIN)
        at = end
    if spans and begin + at > size:
        raise Error(f"{path} is cut short: {size:,} bytes of {begin + at:,}.", _AGAIN)
    if size > begin + _up(at, align):
        raise Error(f"{path} has {size - begin - _up(at, align):,} bytes after its last tensor.", _AGAIN)


def _renamed(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, target in table:
        name = re.sub(pattern, target, name)
    return name


def _reshaped(path: Path, name: str, shape: tuple[int, ...], shapes: dict, sdxl: bool) -> tuple[int, ...]:
    """The shape that the tensor had before it was written."""
    if name in shapes:
        if any(n < 1 for n in shapes[name]) or math.prod(shapes[name]) != math.prod(shape):
            raise Error(f"{name!r} in {path} was {shapes[name]}, says its header, and is {shape}.", _AGAIN)
        return shapes[name]
    if sdxl and re.search(r"\.proj_(in|out)\.weight$", name) and shape[2:] == (1, 1):
        return shape[:2]  # stable-diffusion.cpp makes 1x1 convolutions of these linear layers
    return (1,) * (_RANKS.get(name.rpartition(".")[2], 0) - len(shape)) + shape
