"""A look inside a run, in numpy: what the network saw and said at every step, by prompt and by negative prompt, and the
latents of a picture. For lessons and for whoever asks why; `pipeline.stream` does the drawing."""

from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from PIL import Image

from . import samplers, schedules
from .errors import Error
from .pipeline import Event, Pipeline
from .request import Request

Look = Callable[[np.ndarray, float], np.ndarray]


class Step(NamedTuple):
    """One step, as the sampler sees it: x = x0 + sigma * noise, of which the network told the noise or x0."""

    step: int  # 1-based, of `steps`
    steps: int
    sigma: float  # of x; the noise level the step began with
    x: np.ndarray  # (B, h, w, c), before the step
    x0: np.ndarray  # the clean latents predicted from it
    seconds: float

    @property
    def noise(self) -> np.ndarray:
        """The predicted noise: what of x is not x0."""
        return (self.x - self.x0) / self.sigma


def trace(pipe: Pipeline, prompt: str | Request, **settings) -> Iterator[Step]:
    """The steps of `pipe.stream`, which draws the same picture; what is decoded is left out."""
    x = sigma = None
    for event in pipe.stream(prompt, **settings):
        if event.stage == "decode":
            return
        if event.x0 is not None:
            yield Step(event.step, event.steps, sigma, x, event.x0, event.seconds)
        if event.x is not None:
            x, sigma = event.x, event.sigma


def from_noise(pipe: Pipeline, noise: np.ndarray, prompt: str | Request, **settings) -> Iterator[Event]:
    """`pipe.stream` from standard noise (B, h, w, c) of your own, a picture each; the seed is a noisy sampler's."""
    request = pipe.resolve(prompt, **settings, count=len(noise))
    shape = (request.count, *pipe._latents(request), pipe.latent_channels)
    if noise.shape != shape:
        raise Error(f"This picture starts from noise of shape {shape}, not {noise.shape}.", "Give (B, h, w, c).")
    yield from pipe._stream(request, noise.astype(np.float32))


def sides(pipe: Pipeline, prompt: str | Request, **settings) -> tuple[Look, Look]:
    """The two predictions that guidance is made of: clean latents by the negative prompt alone and by the prompt alone,
    each a function of (x, sigma). The request must be guided."""
    request = pipe.resolve(prompt, **settings)
    schedule = pipe._schedule(request)
    sigmas = schedules.sigmas(schedule, request.schedule, request.steps)
    visits = samplers.SAMPLERS[request.sampler].visits(sigmas)
    negative, positive = _value(pipe._encode(request))

    def by(text) -> Look:
        denoise = _value(pipe._denoiser(request, schedule, visits, [text], (0.0, 0.0)))

        def look(x: np.ndarray, sigma: float) -> np.ndarray:
            x0 = denoise(mx.array(x), sigma)
            mx.eval(x0)
            return np.array(x0)

        return look

    return by(negative), by(positive)


def encode(pipe: Pipeline, image: Image.Image) -> np.ndarray:
    """A picture, whose edges the model can have, to its latents (1, h, w, c): the mean, without the VAE's noise."""
    pixels = np.asarray(image.convert("RGB"), np.float32)[None] / 127.5 - 1  # (1, H, W, 3)
    mean, _ = pipe._network("vae").encode(mx.array(pixels))
    return np.array(mean.astype(mx.float32))


def _value(events: Generator):
    """What a stage returns, its events left out."""
    while True:
        try:
            next(events)
        except StopIteration as e:
            return e.value
