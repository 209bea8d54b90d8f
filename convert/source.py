"""Safe reading of weights: single files, indexes of shards and the folder of one component. Each header is checked
completely (length, JSON, dtypes, sizes, offsets) before any weight is read, and nothing is ever unpickled.
Format: https://github.com/huggingface/safetensors; for GGUF see gguf.py."""

import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from .. import foreign
from ..errors import Error
from . import gguf

_E4M3 = np.array(
    [
        s * (np.nan if c == 127 else math.ldexp(c & 7, -9) if c < 8 else math.ldexp(8 + (c & 7), (c >> 3) - 10))
        for s in (1, -1)
        for c in range(128)
    ],
    np.float16,
)
_E5M2 = (np.arange(256, dtype=np.uint16) << 8).view(np.float16)  # float16 cut to its upper byte

# tag -> (numpy type of the stored numbers, table that widens them). Both 8-bit kinds are exact in float16.
FLOATS = {
    "F64": (np.float64, None),
    "F32": (np.float32, None),
    "F16": (np.float16, None),
    "BF16": (np.uint16, None),
    "F8_E4M3": (np.uint8, _E4M3),
    "F8_E5M2": (np.uint8, _E5M2),
}
_HELD = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.uint16}  # that MLX takes as they are; numpy has no bfloat16
_SIZES = {tag: np.dtype(kind).itemsize for tag, (kind, _) in FLOATS.items()} | {
    tag: int(tag[-2:].strip("IU")) // 8 for tag in ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")
}
_SIZES["BOOL"] = 1

_SCALE = re.compile(r"\.(scale_weight|weight_scale)$")
# Bytes. The format allows three times as much; the largest published headers have about one million.
_MAX_HEADER = 2**25
_MOST_TENSORS = 50_000  # of a file: the largest published ones have under 5,000, and their names are looked at often
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_VARIANTS = ("fp16", "bf16")
_AGAIN = "Download it again."
_OF_COMPONENT = re.compile(r"(diffusion_pytorch_)?model\.([\w.]+\.)?safetensors(\.index[\w.]*\.json)?")
_SHARD = re.compile(r"-\d+-of-(?!0*1\.)\d+\.safetensors$")


@dataclass(frozen=True)
class Tensor:
    """The place of a tensor in a file. `read` reads this tensor only."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    scale: "Tensor | None" = None  # one number that the tensor is multiplied by

    @property
    def size(self) -> int:
        """Bytes."""
        numbers, size = gguf.BLOCKS.get(self.dtype) or (1, _SIZES[self.dtype])
        return math.prod(self.shape) // numbers * size

    @property
    def floating(self) -> bool:
        return self.dtype in FLOATS or self.dtype in gguf.BLOCKS

    def read(self) -> mx.array:
        return self._unpacked() if self.dtype in gguf.BLOCKS else self._plain()

    def _unpacked(self) -> mx.array:
        array = mx.zeros(self.shape, mx.float32)
        if array.size:
            gguf.unpack(self._stored(np.uint8, (self.size,)), self.dtype, np.array(array, copy=False).reshape(-1))
        return array

    def steps(self, bits: int) -> tuple[mx.array, mx.array, mx.array]:
        """A matrix of one of `gguf.STEPS` as MLX holds it: words, scales and biases, (rows, n) each."""
        parts = gguf.steps(self._stored(np.uint8, (self.size,)), self.dtype, bits)
        return tuple(mx.array(part.reshape(self.shape[0], -1)) for part in parts)

    def _stored(self, kind: type, shape: tuple[int, ...]) -> np.ndarray:
        return self._into(np.empty(shape, kind))

    def _into(self, out: np.ndarray) -> np.ndarray:
        """Its bytes, in an array. They are not mapped: a file that is cut short meanwhile would end the process."""
        rest = memoryview(out.reshape(-1).view(np.uint8))
        try:
            with open(self.file, "rb", buffering=0) as f:
                f.seek(self.offset)
                while rest and (n := f.readinto(rest)):
                    rest = rest[n:]
        except OSError as e:
            raise Error(f"{self.file} can no longer be read at {self.name!r}: {e.strerror}.", _AGAIN) from None
        if rest:
            raise Error(f"{self.file} became shorter while it was read.", _AGAIN)
        return out

    def _plain(self) -> mx.array:
        kind, table = FLOATS[self.dtype]
        if table is not None or self.dtype == "F64":
            raw = self._stored(kind, self.shape)
            array = mx.array(raw.astype(np.float32) if table is None else table[raw])
        else:
            array = mx.zeros(self.shape, _HELD[self.dtype])
            if array.size:
                self._into(np.array(array, copy=False))
        array = array.view(mx.bfloat16) if self.dtype == "BF16" else array
        return array if self.scale is None else array.astype(mx.float32) * self.scale.read().astype(mx.float32)


@dataclass(frozen=True)
class Weights:
    """Tensors by name and the header's free text."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read(path: Path) -> Weights:
    """A .safetensors or .gguf file, an index of shards, or the folder of one component."""
    if _SHARD.search(path.name):
        raise Error(f"{path} is one of several shards of a network.", f"Give their folder, {path.parent}.")
    if path.is_dir():
        path = _pick(path)
    weights = _shards(path) if path.suffix == ".json" else _file(path)
    return replace(weights, tensors=_scaled(weights.tensors))


def settings(path: Path) -> Path | None:
    """The config.json of a network in a folder that holds nothing else: if the path is that folder, or its weights
    under the name that diffusers or transformers give them."""
    folder = path if path.is_dir() else path.parent if _OF_COMPONENT.fullmatch(path.name) else None
    return folder / "config.json" if folder is not None and (folder / "config.json").is_file() else None


def _scaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In ComfyUI's files of 8-bit floats a layer has one number to multiply its weight by, and another for its inputs,
    which is not needed here. Scales of any other kind stay, and the file is refused."""
    scales = [
        n for n in tensors if _SCALE.search(n) and math.prod(tensors[n].shape) == 1 and tensors[n].dtype in FLOATS
    ]
    of = {_SCALE.sub(".weight", n): n for n in scales}
    of = {weight: n for weight, n in of.items() if weight in tensors and tensors[weight].dtype.startswith("F8_")}
    if not of:
        return tensors
    spare = {_SCALE.sub(end, n) for n in of.values() for end in (".scale_input", ".input_scale", ".comfy_quant")}
    spare |= {n for n in tensors if n.rpartition(".")[2] == "scaled_fp8"} | set(of.values())
    kept = {n: t for n, t in tensors.items() if n not in spare}
    return kept | {weight: replace(tensors[weight], scale=tensors[n]) for weight, n in of.items()}


def read_json(path: Path) -> dict:
    """A JSON object from a small file."""
    _stat(path)
    return foreign.read_json(path, _AGAIN)


def _pick(folder: Path) -> Path:
    """The file without a suffix, which is the most precise; else its fp16, else its bf16 copy."""
    try:
        names = set(os.listdir(folder))
    except OSError as e:
        raise Error(f"{folder} cannot be read: {e.strerror}.", "Check the folder's permissions.") from None
    for stem in ("diffusion_pytorch_model", "model"):
        plain = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
        copies = [f for v in _VARIANTS for f in (f"{stem}.{v}.safetensors", f"{stem}.safetensors.index.{v}.json")]
        for name in plain + copies:
            if name in names:
                return folder / name
    others = sorted(n for n in names if n.endswith(".safetensors") and "-of-" not in n)
    others = others or sorted(n for n in names if n.endswith(".gguf"))
    if len(others) == 1:
        return folder / others[0]
    if others:
        raise Error(f"{folder} holds several weight files: {', '.join(others)}.", "Give the path of one of them.")
    for name in sorted(names):
        if name.endswith(_PICKLES):
            return folder / name  # `_file` refuses it and says why
    if any("-of-" in n for n in names):
        raise Error(
            f"{folder} holds shards of weights but no index of them.", "Download its .safetensors.index.json too."
        )
    raise Error(
        f"{folder} holds no .safetensors or .gguf weights.", "Give a checkpoint file, or a folder in diffusers layout."
    )


def _shards(path: Path) -> Weights:
    index = read_json(path)
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(f, str) for f in placed.values()):
        raise Error(f"{path} is not an index of shards: it has no weight_map.", _AGAIN)
    tensors = {}
    for name in sorted(set(placed.values())):
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise Error(f"{path} names the shard {name!r}, which is not a .safetensors file beside it.", _AGAIN)
        shard = path.parent / name
        if not shard.exists():
            raise Error(f"{path.parent} lacks the shard {name}.", "Download the missing file.")
        held = _file(shard).tensors
        for key in sorted(held.keys() ^ {k for k, f in placed.items() if f == name}):
            where = "not in it" if key not in held else f"in it, and listed under {placed.get(key)}"
            raise Error(f"{path.name} disagrees with {shard} about {key!r}: it is {where}.", "Download both again.")
        tensors |= held
    return Weights(tensors, {})


def _stat(path: Path) -> os.stat_result:
    try:
        status = path.stat()
    except OSError as e:
        raise Error(f"{path} cannot be read: {e.strerror}.", "Check the path, its links and its permissions.") from None
    except ValueError:  # a NUL in the name
        raise Error(f"{str(path)!r} is not a file name.", "Check the path.") from None
    if not path.is_file():
        raise Error(f"{path} is not a file.", "Give a .safetensors or .gguf file, or a folder in diffusers layout.")
    return status


def _file(path: Path) -> Weights:
    size = _stat(path).st_size
    if path.suffix.lower() in _PICKLES:
        _refuse_pickle(path)
    try:
        with open(path, "rb") as f:
            start = f.read(512)
            if start.startswith(gguf.MAGIC):
                entries, metadata = gguf.read(path, f, size)
                _check_number(path, len(entries))
                return Weights({e.name: Tensor(path, e.name, e.dtype, e.shape, e.offset) for e in entries}, metadata)
            _recognise(path, size, start)
            length = int.from_bytes(start[:8], "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise Error(f"{path} claims a header of {length:,} bytes; the file has {size:,}.", _AGAIN)
            f.seek(8)
            text = f.read(length)
    except OSError as e:
        raise Error(f"{path} cannot be read: {e.strerror}.", "Check the file's permissions.") from None
    return _parse(path, text, 8 + length, size)


def _refuse_pickle(path: Path):
    raise Error(
        f"{path} is a pickle, which can run any code when it is opened.",
        "Use the .safetensors file of the same model, or write one with PyTorch: torch.load(FILE, weights_only=True), "
        "which runs no code, then safetensors.torch.save_file of its tensors.",
    )


def _recognise(path: Path, size: int, start: bytes) -> None:
    """Refuse, by name, what people often have in place of weights."""
    if start[8:9] == b"{":  # looks right; the first eight bytes are a number and may spell anything
        return
    if size == 0:
        raise Error(f"{path} is empty.", _AGAIN)
    if start.startswith(b"version https://git-lfs"):
        raise Error(f"{path} is a Git LFS pointer, not the weights.", "Run `git lfs pull`, or download it again.")
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        _refuse_pickle(path)
    if start.lstrip()[:1] == b"<":
        raise Error(f"{path} is a web page (HTML), not weights.", "Download it again; the link may need a login.")
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff")) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
        raise Error(f"{path} is a picture, not weights.", f"`mlxdiff generate --from-image {path}` draws it again.")
    if path.suffix.lower() != ".safetensors":
        what = "a GGUF file" if path.suffix.lower() == ".gguf" else "a .safetensors or .gguf file"
        raise Error(f"{path} is not {what}.", "Give a .safetensors or .gguf file, or a folder in diffusers layout.")
    if size < 10:
        raise Error(f"{path} is cut short: {size} bytes are no safetensors file.", _AGAIN)


def _check_number(path: Path, tensors: int) -> None:
    if tensors > _MOST_TENSORS:
        raise Error(f"{path} lists {tensors:,} tensors; {_MOST_TENSORS:,} are the most that are read.", _AGAIN)


def _unique(pairs: list[tuple[str, object]]) -> dict:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise KeyError(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return entries


def _parse(path: Path, text: bytes, begin: int, size: int) -> Weights:
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except KeyError as e:
        raise Error(f"The header of {path} lists {e.args[0]!r} twice.", _AGAIN) from None
    except (ValueError, RecursionError) as e:
        raise Error(f"The header of {path} is not valid JSON: {e}.", _AGAIN) from None
    if not isinstance(entries, dict):
        raise Error(f"The header of {path} is not a JSON object.", _AGAIN)
    _check_number(path, len(entries))
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # mx.save_safetensors writes null
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Error(f"__metadata__ of {path} is not text by name.", _AGAIN)
    spans, tensors = [], {}
    for name, entry in entries.items():
        dtype, shape, start, end = _entry(path, name, entry)
        spans.append((start, end, name))
        tensors[name] = Tensor(path, name, dtype, shape, begin + start)
    at = 0
    for start, end, name in sorted(spans):
        if start != at:
            what = "overlaps the tensor before it" if start < at else "leaves unused bytes before it"
            raise Error(f"{name!r} in {path} {what} (byte {start:,}, expected {at:,}).", _AGAIN)
        at = end
    if begin + at > size:
        raise Error(f"{path} is cut short: {size:,} bytes of {begin + at:,}.", _AGAIN)
    if begin + at < size:
        raise Error(f"{path} has {size - begin - at:,} bytes after its last tensor.", _AGAIN)
    return Weights(tensors, metadata)


def _entry(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    def whole(values: object, most: int) -> bool:
        return isinstance(values, list) and all(type(v) is int and 0 <= v < most for v in values)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Error(f"The entry of {name!r} in {path} is not dtype, shape and data_offsets.", _AGAIN)
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise Error(f"{name!r} in {path} has the unknown dtype {dtype!r}.", f"Known are {', '.join(_SIZES)}.")
    if not whole(shape, 2**31) or len(shape) > 8 or not whole(span, 2**63) or len(span) != 2 or span[0] > span[1]:
        raise Error(
            f"{name!r} in {path} has shape {shape!r:.60} and data_offsets {span!r:.60}, which cannot be.", _AGAIN
        )
    if math.prod(shape) * _SIZES[dtype] != span[1] - span[0]:
        raise Error(f"{name!r} in {path}: {dtype} of shape {shape} does not fill {span[1] - span[0]:,} bytes.", _AGAIN)
    return dtype, tuple(shape), span[0], span[1]
