"""Previews between the decodings of a slow decoder: a map fitted to few of its pictures, on random latents."""

import io
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mlx.core")

from mlxdiff import images
from mlxdiff.pipeline import Event
from mlxdiff.widgets import previews
from mlxdiff.widgets.previews import Previews

MIX = np.random.default_rng(0).normal(size=(4, 3)) / 2


def latents(seed: int, clear: float) -> np.ndarray:
    """Smooth latents (1, 16, 16, 4) that grow out of noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(1, 4, 4, 4)).repeat(4, 1).repeat(4, 2)
    return (clear * coarse + (1 - clear) * 0.3 * rng.normal(size=(1, 16, 16, 4))).astype(np.float32)


class Decoder:
    """Each latent is four pixels by four, in a colour that bends a little. It takes 40 ms."""

    def __init__(self):
        self.asked = 0

    def preview(self, x0: np.ndarray) -> list[Image.Image]:
        self.asked += 1
        time.sleep(0.04)
        return [images.to_image(np.tanh(x @ MIX).repeat(4, 0).repeat(4, 1)) for x in x0]


def decibel(a: Image.Image, b: Image.Image) -> float:
    wrong = np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)
    return 20 * np.log10(255 / np.sqrt((wrong**2).mean()))


def run(made: Previews, seed: int, steps: int = 25) -> list[tuple[int, Image.Image]]:
    out = []
    for step in range(1, steps + 1):
        made._next = 0.0  # as if the last one had been long ago
        frame = made.frame(Event("denoise", step, steps, 0.0, x0=latents(seed, step / steps)))
        if frame is not None:
            out.append((step, Image.open(io.BytesIO(frame))))
    return out


def test_between_decodings_a_run_is_guessed_well():
    """A map of nine latents can copy this decoder, but for its bend (tanh) and its edges, which are smoothed: 22 dB is
    an error of 20 in 255."""
    decoder = Decoder()
    made = Previews(decoder)
    for seed in (1, 2):
        before = decoder.asked
        frames = run(made, seed)
        assert [step for step, _ in frames] == [*range(1, 26)]
        assert decoder.asked - before <= 3  # of 25: 8 times 40 ms pass slower than these steps
        for step, frame in frames[5:]:
            truth = Decoder().preview(latents(seed, step / 25))[0].resize(frame.size, Image.Resampling.BICUBIC)
            assert decibel(frame, truth) > 22
        other = Decoder().preview(latents(seed + 1, 1.0))[0].resize(frame.size, Image.Resampling.BICUBIC)
        assert decibel(frame, other) < 15  # and it is this picture, not any


def test_a_slow_decoder_that_cannot_be_guessed_is_asked_seldom(monkeypatch):
    """As for latents of very many channels."""
    monkeypatch.setattr(previews, "_CHANNELS", 3)
    decoder = Decoder()
    frames = run(Previews(decoder), 1)
    assert len(frames) == decoder.asked <= 2


def test_a_quick_decoder_draws_every_preview(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(previews, "_SLOW", 10.0)
    monkeypatch.setattr(previews, "_SHARE", 0)
    decoder = Decoder()
    assert len(run(Previews(decoder), 1)) == decoder.asked == 25
