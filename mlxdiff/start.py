"""What a run starts with: the noise of its seeds, the latents of its pictures, and what a mask leaves as it is."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from . import images, memory, pictures
from .description import Description
from .networks import Networks
from .request import Request
from .result import Event
from .schedules import Schedule

How = Callable[[nn.Module, mx.array, int | None], mx.array]  # the VAE, pixels (1, H, W, 3), its tile -> latents


class Start(NamedTuple):
    x: mx.array  # the sampler's first x
    mask: mx.array | None = None  # (1, h, w, 1): what the sampler draws anew; None if a mask is left to the network
    z: mx.array | None = None  # then: the latents of the start image, (B, h, w, c)
    noised: Callable[[float], mx.array] | None = None  # then: these at a sigma, with the noise of the run
    beside: mx.array | None = None  # more channels for the network to read, (B, h, w, more)
    references: Sequence[mx.array] = ()  # latents of pictures to edit
    hints: Sequence[mx.array] = ()  # of the control pictures that are read as latents, (B, h, w, c) each
    finish: Callable[[Image.Image], Image.Image] = lambda image: image  # for each picture, once it is decoded


class Starts:
    """Those of one model's runs. The pictures of the last request are kept, and the latents of those to edit."""

    def __init__(self, networks: Networks, model: Description, low_memory: bool):
        self.networks, self.model, self.low_memory = networks, model, low_memory
        self._taken: tuple[tuple, pictures.Taken] | None = None  # after their fingerprints
        self._references: tuple[tuple, list[mx.array]] = (), []  # the same

    def resolve(self, request: Request) -> Request:
        """The request resolved for the model, with the fingerprints of its pictures."""
        request, taken = pictures.resolve(request)
        full = self.model.resolve(request, taken.sizes)
        pictures.check(full, self.model, taken)
        self._taken = (full.hashes, full.mask_hash), taken
        return full

    def pictures(self, request: Request) -> pictures.Taken:
        """The pictures of a resolved request."""
        held = self._taken is not None and self._taken[0] == (request.hashes, request.mask_hash)
        known = len(request.hashes) == len(request.pictures)  # a second pass begins with a picture that is in no file
        return self._taken[1] if held and known else pictures.read(request)

    def control(self, request: Request, picture: Image.Image | None, hole: float | None = None) -> np.ndarray:
        """A control picture of a resolved request as its network reads it, (H, W, 3) in [-1, 1]. None: the start image,
        and `hole`, in [0, 1], where the mask is white."""
        taken = self.pictures(request)
        if picture is not None:
            return images.to_pixels(pictures.control(request, taken, picture))
        canvas = pictures.canvas(request, taken)
        return np.where(canvas.anew[..., None], np.float32(2 * hole - 1), images.to_pixels(canvas.image))

    def controls(self, request: Request, controls: list[tuple], draw: Callable[[], mx.array]) -> Iterator:
        """Events, then the latents of control pictures, each given with its network's Config and its kind: one sample
        for each seed, or the mean; behind it the mask, 0 where it is white, if the network reads it. In diffusers too
        these draws come before all others."""
        pixels = [c.pixels(self.control(request, picture, c.hole), mode) for picture, c, mode in controls]
        hows = [partial(_sample, noise=draw()) if c.draws else _mean for _, c, _ in controls]
        latents = yield from self._encode(pixels, hows)
        if any(c.reads_mask for _, c, _ in controls):
            kept = 1 - mx.array(pictures.canvas(request, self.pictures(request)).latents(self.model.factor))
        return [
            mx.concatenate([z, kept.astype(z.dtype)], axis=-1) if c.reads_mask else z
            for z, (_, c, _) in zip(latents, controls, strict=True)
        ]

    def begin(
        self,
        request: Request,
        schedule: Schedule,
        sigma: float,
        draw: Callable[[], mx.array],
        given: np.ndarray | None,
        control: Image.Image | None,
    ) -> Iterator:
        """Events, then the Start of a run whose first noise level is sigma. draw() -> standard noise (B, h, w, c).
        given: standard noise to use in place of the run's. control: the picture that the denoiser itself reads."""
        row, starts = self.model.row, self.model.starts(request)
        noises = {what: draw() for what in pictures.draws(row, request)}
        noise = noises.pop("noise") if given is None else mx.array(given)
        canvas = pictures.canvas(request, self.pictures(request)) if starts else None
        pixels = {} if canvas is None else canvas.pixels
        if control is not None:
            pixels["control"] = self.control(request, control)
        afresh = not starts or (request.masked and request.strength == 1)  # from noise alone
        wanted = [n for n in noises if n in row.reads or (n == "image" and not (afresh and row.inpaints))]
        samples = [partial(_sample, noise=noises[name]) for name in wanted]
        z = dict(zip(wanted, (yield from self._encode([pixels[name] for name in wanted], samples)), strict=True))
        x = noise * schedule.start(sigma, request.schedule) if afresh else schedule.noised(z["image"], noise, sigma)
        start = Start(x)
        if request.image is not None and not starts:
            start = start._replace(references=(yield from self._edited(request)))
        parts = dict(z)
        if request.masked:
            parts["mask"] = mx.array(canvas.latents(self.model.factor))
            parts["tiles"] = mx.array(canvas.tiles(self.model.factor))
            start = start._replace(finish=partial(canvas.finish, keep=request.keep))
        if request.masked and not row.inpaints:
            noised = partial(schedule.noised, z["image"], noise)
            start = start._replace(mask=parts["mask"], z=z["image"], noised=noised)
        if row.reads:
            wide = [mx.broadcast_to(parts[name], (*x.shape[:3], parts[name].shape[-1])) for name in row.reads]
            start = start._replace(beside=mx.concatenate(wide, axis=-1))
        return start

    def _edited(self, request: Request) -> Iterator:
        """Latents of the pictures to edit, (1, h, w, c) each: the mean, not a sample. They are kept for the next
        seed."""
        if self._references[0] != request.hashes:
            taken = self.pictures(request)
            cuts = zip(taken.images, self.model.cuts(taken.sizes), strict=True)
            pixels = [images.to_pixels(images.cut(image, *how)) for image, how in cuts]
            self._references = request.hashes, (yield from self._encode(pixels, [_mean] * len(pixels)))
        return self._references[1]

    def _encode(self, pixels: list[np.ndarray], hows: list[How]) -> Iterator:
        """Events, then the latents of pictures (H, W, 3)."""
        if not pixels:
            return []
        yield Event("encode", 0, len(pixels), 0.0)
        latents, tile = [], memory.TILE if self.low_memory else None
        for i, (picture, how) in enumerate(zip(pixels, hows, strict=True)):
            begin = time.perf_counter()
            x0 = how(self.networks.get("vae"), mx.array(picture)[None], tile)
            finite = mx.isfinite(x0).all()
            mx.eval(x0, finite)
            if not finite.item():
                raise self.model.not_finite()
            latents.append(x0)
            yield Event("encode", i + 1, len(pixels), time.perf_counter() - begin)
        if self.low_memory:
            self.networks.release("vae")
        return latents


def _sample(vae: nn.Module, pixels: mx.array, tile: int | None, noise: mx.array) -> mx.array:
    return vae.sample(pixels, noise, tile)


def _mean(vae: nn.Module, pixels: mx.array, tile: int | None) -> mx.array:
    return vae.encode(pixels, tile)[0]
