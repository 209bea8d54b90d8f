"""Enlarges pictures with an ESRGAN network, tile by tile, so that memory does not grow with the picture."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from PIL import Image

from .. import foreign, images, memory
from ..advice import this_machine
from ..errors import Error, did_you_mean
from ..networks import dtype_of
from ..recipe import default_dtype

# Pixels around a tile, as the network sees them, that it reads and does not keep. Without norms, only what lies farther
# away makes a difference, and it grows small fast: see tests/parity/test_esrgan.py.
AROUND = 16


@dataclass(frozen=True)
class Named:
    """A published upscaler that has a name here."""

    file: str  # on the hub: org/repo/file
    title: str
    licence: str
    download: float  # GB


_KORNIA = "kornia/real_esrgan"  # the originals' tensors, unchanged, as .safetensors
NAMES = {
    "realesrgan-x4plus": Named(f"{_KORNIA}/RealESRGAN_x4plus.safetensors", "for photographs", "BSD-3-Clause", 0.067),
    "realesrgan-x4plus-anime": Named(
        f"{_KORNIA}/RealESRGAN_x4plus_anime_6B.safetensors", "for drawings, four times as fast", "BSD-3-Clause", 0.018
    ),
    "realesrgan-x2plus": Named(f"{_KORNIA}/RealESRGAN_x2plus.safetensors", "doubles", "BSD-3-Clause", 0.067),
}
DEFAULT = "realesrgan-x4plus"


class Tile(NamedTuple):
    """Progress: so many tiles of all are done. The last one brings the picture."""

    done: int
    tiles: int
    seconds: float  # that this tile took
    image: Image.Image | None = None


class Upscaler:
    """An opened upscaler: upscaler(image) is the image enlarged `scale` times.

    name: a name of `NAMES`, a .safetensors file, or a file on the hub (org/repo/file.safetensors). dtype: by default
    float16 on a GPU, else float32. offline: never use the network. progress: called with (stage, bytes done, bytes in
    all) while it is fetched."""

    def __init__(self, name: str | Path, *, dtype: str | None = None, offline: bool = False, progress=None):
        from .. import store

        row, what = NAMES.get(str(name)), "an upscaler"
        held = name if row is None else row.file
        path = store.network_file(held, what, _fix(name), offline=offline, progress=progress)
        if dtype is None:  # bfloat16, with its 8 significant bits, would show banding
            dtype = "float32" if default_dtype() == "float32" else "float16"
        self.name, self.path, self.hash = str(name), path, store.fingerprint(path)
        self._stamp = foreign.stamp(path)
        self.net = store.network(path, what, "Use an upscaler of the ESRGAN family.", dtype=dtype)
        self.scale = self.net.config.scale

    @property
    def current(self) -> bool:
        """Whether its file is still the one that was read."""
        return self._stamp == foreign.stamp(self.path)

    def __call__(self, image: str | Path | Image.Image) -> Image.Image:
        """The image enlarged. What is transparent stays so."""
        *_, last = self.tiles(images.read(image, alpha=True))
        return last.image

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of an enlarged picture. Raises if this machine could not hold it."""
        w, h = (edge * self.scale for edge in size)
        need, held = 8 * w * h, this_machine().memory  # bytes of the picture, twice
        if need > held:
            raise Error(
                f"A picture of {size[0]} x {size[1]}, enlarged {self.scale} times, takes {need / 1e9:.1f} GB; this "
                f"machine has {held / 1e9:.1f}.",
                "Enlarge a part of it, or a smaller copy.",
            )
        return w, h

    def tiles(self, image: Image.Image) -> Iterator[Tile]:
        """Enlarge a picture in RGB or RGBA tile by tile."""
        fold, s, size = self.net.config.fold, self.scale, self.size(image.size)
        x = np.asarray(image.convert("RGB"))
        spare = [(0, -n % fold) for n in x.shape[:2]]
        x = np.pad(x, [*spare, (0, 0)], "symmetric" if 1 in x.shape[:2] else "reflect")
        canvas = np.empty((x.shape[0] * s, x.shape[1] * s, 3), np.uint8)
        around = AROUND * fold
        core = max(around, tile_edge() // s - 2 * around)
        rows, columns = (_spans(n, core, around) for n in x.shape[:2])
        total = len(rows) * len(columns)
        yield Tile(0, total, 0.0)
        for i, (top, bottom, above, below) in enumerate(rows):
            for j, (left, right, before, after) in enumerate(columns):
                begin = time.perf_counter()
                part = self._run(x[above:below, before:after])
                part = part[(top - above) * s : (bottom - above) * s, (left - before) * s : (right - before) * s]
                canvas[top * s : bottom * s, left * s : right * s] = part
                done, seconds = i * len(columns) + j + 1, time.perf_counter() - begin
                if done < total:
                    yield Tile(done, total, seconds)
        made = Image.fromarray(canvas[: size[1], : size[0]])
        if image.mode == "RGBA":
            made.putalpha(image.getchannel("A").resize(size, Image.Resampling.LANCZOS))
        yield Tile(total, total, seconds, made)

    def _run(self, x: np.ndarray) -> np.ndarray:
        """(H, W, 3) to (s H, s W, 3), 8 bits both."""
        y = self.net(mx.array(x)[None].astype(dtype_of(self.net)) / 255)[0].astype(mx.float32)
        finite = mx.isfinite(y).all()
        y = mx.round(mx.clip(y, 0, 1) * 255).astype(mx.uint8)
        mx.eval(y, finite)
        if not finite.item():
            raise Error(f"{self.name} gave values that are not finite.", 'Use `dtype="float32"`.')
        return np.array(y)


def check(name: str | Path) -> None:
    """Raise if there is no upscaler of this name, or if it is a file that is none. Nothing is fetched."""
    from .. import store

    if store.local(name) is not None:
        Upscaler(name, offline=True)
    elif str(name) not in NAMES:
        store.check_hub_id(name, "an upscaler", _fix(name))


def _fix(name: str | Path) -> str:
    return f"{did_you_mean(str(name), NAMES)}Use one of {', '.join(NAMES)}, or a file."


def tile_edge() -> int:
    return memory.upscale_tile(mx.default_device() == mx.Device(mx.gpu))


def _spans(n: int, core: int, around: int) -> list[tuple[int, int, int, int]]:
    """Pieces of n pixels, about as long as each other: where a piece begins and ends, and where what is read of it
    begins and ends. All but n are multiples of 4, as folded pictures need."""
    count = math.ceil(n / core)
    step = math.ceil(n / count / 4) * 4
    return [(i, min(n, i + step), max(0, i - around), min(n, i + step + around)) for i in range(0, n, step)]
