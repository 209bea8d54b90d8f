"""The events of a run, and its result."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from . import foreign, images, metadata, signing, values
from .request import Request
from .signing import Signer

_SHOWN = 40  # characters of the prompt in a repr


class Event(NamedTuple):
    """One event of a run. The stages in order: encode, load, denoise (one event a step), decode (one event a picture),
    and upscale (one event a tile) if there is an upscaler. With `hires`, all of them again for each picture. Each stage
    starts with an event of step 0, so that a viewer knows what the run is waiting for."""

    stage: str
    step: int  # 1-based, of `steps` in this stage
    steps: int
    seconds: float  # how long this step took
    x0: np.ndarray | None = None  # denoise: the predicted clean latents so far, (B, h, w, c)
    image: Image.Image | None = None  # decode or upscale: the finished picture
    x: np.ndarray | None = None  # denoise: the noisy latents after this step, and their noise level
    sigma: float | None = None
    reused: bool = False  # denoise: whether this step took over the work of an earlier one (`reuse`)
    hires: int | None = None  # in the second pass of `hires`: which picture of the request this is, from 0


@dataclass(frozen=True, repr=False)
class Result:
    """The pictures of one call. `result.image` is the first, `result.save()` writes them all with their settings. A
    notebook displays the pictures of a result."""

    images: list[Image.Image]
    request: Request  # resolved: the seed that was drawn, the steps that were taken
    seconds: float
    peak_bytes: int
    model: str  # its name
    recipe: str  # how its weights were stored: float16, float16-4bit
    reused: int = 0  # steps that took over the work of earlier ones

    @property
    def image(self) -> Image.Image:
        return self.images[0]

    def save(
        self, path: str | Path | None = None, quality: int | None = None, sign: bool | Signer = False
    ) -> list[Path]:
        """Write every picture with its settings, and return the paths. path: a folder (by default the current one),
        where each picture is named after its prompt and seed; or a file name (PNG, JPEG or WebP); each of several
        pictures adds its seed to it. No file is ever overwritten: if house.png exists, the new file is house-1.png.
        quality: of a JPEG or WebP, 1 to 100 (95); a WebP of 100 loses nothing. sign: add Content
        Credentials; True takes the key that `mlxdiff.signing.signer()` finds."""
        if quality is not None:
            values.whole("quality", quality, 1, metadata.LOSSLESS)
        by = signing.signer() if sign is True else sign or None
        return [
            images.save(image, self._name(path, request), request, self.model, self.recipe, quality, by)
            for image, request in zip(self.images, self.request.singles(), strict=True)
        ]

    def _name(self, path: str | Path | None, request: Request) -> Path:
        if path is None or images.is_folder(path):
            return foreign.path("" if path is None else path) / images.file_name(request)
        file = foreign.path(path)
        return file if len(self.images) == 1 else images.numbered(file, request.seed)

    def __repr__(self) -> str:
        prompt, n = self.request.prompt, len(self.images)
        shown = prompt if len(prompt) <= _SHOWN else f"{prompt[: _SHOWN - 1]}…"
        seeds = f"seed {self.request.seed}" if n == 1 else f"seeds {self.request.seed} to {self.request.seed + n - 1}"
        return f"<Result: {n} of {shown!r} by {self.model}, {seeds}, {self.seconds:.1f} s>"

    def _repr_png_(self) -> bytes:
        """The pictures side by side, for a notebook."""
        return images.shown(images.sheet(self.images), images.source(self.request))
