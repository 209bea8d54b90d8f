"""Checkpoint files for tests: raw bytes, real tensors, or sparse files: a header and a size but no contents."""

import gzip
import json
import math
import struct
from pathlib import Path

import numpy as np

from mlxdiff import description, seal

MANIFESTS = Path(__file__).parent / "data" / "manifests"
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1}


def manifest(name: str) -> dict:
    with gzip.open(MANIFESTS / f"{name}.json.gz") as f:
        return json.load(f)


def header(shapes: dict, dtype: str = "F16", dtypes: dict | None = None, metadata: dict | None = None) -> dict:
    entries, at = {} if metadata is None else {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        kind = (dtypes or {}).get(name, dtype)
        end = at + math.prod(shape) * SIZES[kind]
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return entries


def raw(path: Path, entries: dict | bytes, size: int | None = None, body: bytes = b"") -> Path:
    """Header as given, then `body`, then zeros up to `size` bytes of data (as the header says when None)."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    if size is None:
        size = max([e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"], default=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + body)
        f.truncate(8 + len(text) + size)
    return path


def sparse(path: Path, shapes: dict, **kinds) -> Path:
    return raw(path, header(shapes, **kinds))


def full(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Real float32 (or int64) tensors."""
    arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    dtypes = {k: "I64" for k, v in arrays.items() if v.dtype == np.int64}
    entries = header({k: v.shape for k, v in arrays.items()}, "F32", dtypes)
    return raw(path, entries, body=b"".join(v.tobytes() for v in arrays.values()))


def seal_again(folder: Path) -> None:
    """Let a changed model folder pass for one that a conversion wrote."""
    file = folder / "model.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["seal"] = seal.of(folder, lambda done, total: None)
    values["hash"] = description.hash_of(values)
    file.write_text(json.dumps(values), encoding="utf-8")


def esrgan(fold: int, width: int, growth: int, blocks: int, doublings: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of an upscaler by BasicSR's names, of the scale that keeps what they are given."""
    rng, held = np.random.default_rng(seed), {}

    def conv(name: str, c_in: int, c_out: int) -> None:
        held[f"{name}.weight"] = rng.standard_normal((c_out, c_in, 3, 3), np.float32) * (9 * c_in) ** -0.5
        held[f"{name}.bias"] = 0.3 * rng.standard_normal(c_out, np.float32)

    conv("conv_first", 3 * fold**2, width)
    for b in range(blocks):
        for d in (1, 2, 3):
            for i in range(5):
                conv(f"body.{b}.rdb{d}.conv{i + 1}", width + i * growth, growth if i < 4 else width)
    for name in ("conv_body", *(f"conv_up{i + 1}" for i in range(doublings)), "conv_hr"):
        conv(name, width, width)
    conv("conv_last", width, 3)
    return held
