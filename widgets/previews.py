"""The previews of a run. A slow decoder is asked now and then. In between, a linear map that was fitted to what it has
drawn guesses in a millisecond what has changed since."""

import io
import time

import numpy as np
from PIL import Image

from ..images import sheet, to_image, to_pixels
from ..pipeline import Event, Pipeline

_APART = 0.12  # seconds between two previews
_SHARE = 8  # a decoding that took t seconds is followed by none for 8 t: it slows a run by about a tenth
_SLOW = 0.02  # seconds of a decoding after which guesses are worth their trouble
_EDGE = 256  # pixels: smaller previews, such as one pixel for each latent, are enlarged to about this
_CHANNELS = 16  # of latents, at most: the map has nine times as many inputs
_FADE = 0.7  # what a picture's say in the map is multiplied by, when the next one is added
_FIRM = 1e-3  # ridge: how much the map resists what few pictures seem to say, as a part of its inputs' mean square


class Previews:
    """The previews of one model. They are made on the worker's thread."""

    def __init__(self, pipe: Pipeline):
        self._pipe, self._guess = pipe, _Guess()
        self._next = self._decode = 0.0  # the earliest times of the next preview, and of the next decoding
        self._slow = False
        self._last: np.ndarray | None = None  # the latents of the last step
        self._decoded = 0  # the step of this run's last decoding
        self._rest: np.ndarray | float = 0.0  # what the decoder drew there, less what was guessed

    def frame(self, event: Event) -> bytes | None:
        """The event's preview as a JPEG, or None if it has none or the last one is too recent."""
        if (
            event.image is not None and self._slow and event.step <= len(self._last)
        ):  # a decoding that costs nothing more
            self._guess.learn(self._last[event.step - 1 : event.step], [event.image])
        if event.x0 is None:
            return None
        begin, self._last = time.perf_counter(), event.x0
        if event.step == 1:
            self._decoded, self._rest = 0, 0.0
        if begin < self._next:
            return None
        early = max(2, event.steps // 6)  # before this step there is little to see
        known = self._guess.knows(event.x0)
        if known and (event.step < early or (self._decoded >= early and begin < self._decode)):
            pictures = [to_image(p) for p in self._guess(event.x0) + self._rest]
        elif not known and begin < self._decode:  # it is slow, and no map was fitted
            return None
        else:
            pictures = self._pipe.preview(event.x0)
            took = time.perf_counter() - begin
            self._slow, self._decode = took > _SLOW, time.perf_counter() + _SHARE * took
            if self._slow and self._guess.learn(event.x0, pictures):
                self._decoded, self._rest = event.step, _pixels(pictures) - self._guess(event.x0)
        self._next = time.perf_counter() + _APART
        rough = sheet(pictures)
        grow = max(1, _EDGE // max(rough.size))  # a page would enlarge it less smoothly
        return jpeg(rough.resize([grow * edge for edge in rough.size], Image.Resampling.BICUBIC))


class _Guess:
    """A linear map from a latent and its eight neighbours to the pixels in its place, by least squares."""

    def __init__(self):
        self._inner = self._outer = self._map = None
        self._tile = (0, 0)  # a latent's pixels, down and across

    def knows(self, x0: np.ndarray) -> bool:
        """Whether it has learned from latents like these."""
        return self._inner is not None and len(self._inner) == 9 * x0.shape[-1] + 1

    def learn(self, x0: np.ndarray, pictures: list[Image.Image]) -> bool:
        """Add pictures that the decoder has drawn to those that the map is fitted to; say whether it can."""
        h, w, c = x0.shape[1:]
        there, pixels = _inputs(x0), _pixels(pictures)
        if c > _CHANNELS or pixels.shape[1] % h or pixels.shape[2] % w:
            return False
        tall, wide = pixels.shape[1] // h, pixels.shape[2] // w
        blocks = pixels.reshape(len(pixels), h, tall, w, wide, 3).transpose(0, 1, 3, 2, 4, 5).reshape(len(there), -1)
        inner, outer = there.T @ there, there.T @ blocks
        if self._inner is None or self._inner.shape != inner.shape or self._outer.shape != outer.shape:
            self._inner, self._outer = np.zeros_like(inner), np.zeros_like(outer)
        self._inner, self._outer = _FADE * self._inner + inner, _FADE * self._outer + outer
        firm = _FIRM * np.trace(self._inner) / len(self._inner)
        self._map = np.linalg.solve(self._inner + firm * np.eye(len(self._inner)), self._outer)
        self._tile = (tall, wide)
        return True

    def __call__(self, x0: np.ndarray) -> np.ndarray:
        n, h, w, _ = x0.shape
        tall, wide = self._tile
        blocks = (_inputs(x0) @ self._map).reshape(n, h, w, tall, wide, 3).transpose(0, 1, 3, 2, 4, 5)
        return _smooth(blocks.reshape(n, h * tall, w * wide, 3), self._tile)


def _inputs(x0: np.ndarray) -> np.ndarray:
    """A row for each latent: itself, its neighbours (at the edge, the edge again), and 1."""
    n, h, w, c = x0.shape
    padded = np.pad(x0.astype(np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    near = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return np.concatenate([*near, np.ones((n, h, w, 1), np.float32)], -1).reshape(n * h * w, 9 * c + 1)


def _smooth(pixels: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """Each pixel averaged over a tile around it: the map leaves seams between tiles."""
    for axis, n in enumerate(tile, 1):
        room = [(0, 0)] * 4
        room[axis] = (n // 2 + 1, n - 1 - n // 2)
        sums = np.pad(pixels, room, "edge").cumsum(axis)
        ends = (np.take(sums, range(first, first + pixels.shape[axis]), axis) for first in (n, 0))
        pixels = np.subtract(*ends) / n
    return pixels


def _pixels(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([to_pixels(p) for p in pictures])


def jpeg(image: Image.Image) -> bytes:
    """Encode a preview. This is small and quick: a PNG of a noisy picture takes forty times as long."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()
