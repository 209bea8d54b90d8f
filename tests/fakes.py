"""A pipeline without a model: the same `stream`, pictures in colours that follow from the seed. For the widgets."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from mlxdiff import images
from mlxdiff.description import Description, published
from mlxdiff.errors import Error
from mlxdiff.families import Defaults
from mlxdiff.families.base import Cut
from mlxdiff.images import to_image
from mlxdiff.pipeline import Event
from mlxdiff.recipe import recipe
from mlxdiff.request import Request

DEFAULTS = Defaults(size=64, steps=20, guidance=5.0, sampler=None, schedule=None)


def describe(name: str, model: str = "sd15") -> Description:
    """What a named model is, under another name and with the defaults of these tests."""
    like = published(model, recipe(dtype="float32"))
    return replace(like, name=name, family=replace(like.family, defaults=DEFAULTS, variants=_variants(like)))


def editor() -> Description:
    """A model that edits at most two pictures, and cuts them to multiples."""
    plain = describe("editor")
    cut = lambda w, h, multiple: Cut((w, h), (w // multiple * multiple, h // multiple * multiple))  # noqa: E731
    edits = {k: replace(v, edits=2) for k, v in plain.family.variants.items()}
    return replace(plain, family=replace(plain.family, variants=edits, cut=cut))


def _variants(model: Description) -> dict:
    return {k: replace(v, defaults=None) for k, v in model.family.variants.items()}


class Pipe:
    """Stands where a Pipeline would. pace: seconds a step. gate: steps wait for it, so that a test sees them run."""

    def __init__(self, name: str = "fake", pace: float = 0.0, gate: threading.Event | None = None):
        self.description = editor() if name == "editor" else describe(name)
        self.name, self.pace, self.gate = name, pace, gate
        self.steps = 0  # taken in its life

    def resolve(self, request: Request) -> Request:
        if self.description.row.edits:
            return self.description.resolve(request, [images.read(picture).size for picture in request.pictures])
        if request.image is not None:
            request = request.sized(images.read(request.image).size, DEFAULTS.size**2, self.description.multiple)
        return request.resolve(DEFAULTS, ("euler", "leading"), "leading", 1, self.description.multiple)

    def preview(self, x0: np.ndarray) -> list[Image.Image]:
        return [images.preview(x, self.description.family.preview) for x in x0]

    def run(self, request: Request) -> Iterator[Event]:
        yield Event("encode", 0, 1, 0.0)
        yield Event("denoise", 0, request.steps, 0.0)
        for step in range(1, request.steps + 1):
            if self.gate is not None:
                assert self.gate.wait(30)
            time.sleep(self.pace)
            self.steps += 1
            if "fail" in request.prompt and step == 2:
                raise Error("The fake model broke in step 2.", "Ask for something else.")
            yield Event("denoise", step, request.steps, self.pace, x0=latents(request, step))
        yield Event("decode", 0, request.count, 0.0)
        for i in range(request.count):
            yield Event("decode", i + 1, request.count, 0.0, image=picture(request, i))


def latents(request: Request, step: int) -> np.ndarray:
    """(B, h, w, 4): clearer with every step."""
    noise = np.random.default_rng([request.seed, step])
    shape = (request.count, request.height // 8, request.width // 8, 4)
    clear = step / request.steps
    return (clear * np.array([1.5, -0.5, 0.3, -1.0]) + (1 - clear) * noise.normal(size=shape)).astype(np.float32)


def picture(request: Request, i: int = 0) -> Image.Image:
    """A hill under a sky whose colours are the seed's."""
    colours = np.random.default_rng(request.seed + i).uniform(-0.8, 0.9, (2, 3))
    y, x = np.meshgrid(np.linspace(0, 1, request.height), np.linspace(0, 1, request.width), indexing="ij")
    hill = (y > 0.65 + 0.15 * np.sin(4 * x + request.seed))[..., None]
    return to_image(np.where(hill, colours[0], colours[1] + 0.5 * y[..., None]))


def load(model: str | Path, progress=None, pace: float = 0.0, **_) -> Pipe:
    if str(model) == "missing":
        raise Error("There is no model 'missing'.", "Name another.")
    return Pipe(str(model), pace)
