"""Lesson 1, forward noise: how a picture drowns in noise, at once and step by step. It needs only numpy, no model."""

import io
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ipywidgets as w
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from ... import images
from ...errors import Error
from ...schedules import alpha_bar, betas, q_sample, q_step
from ...train.storybook import Scene, render
from .lesson import BLUE, GREEN, GREY, ORANGE, Lesson, played

SIDE, STEPS = 96, 1000  # pixels: small, so that a thousand steps take half a second
KEPT = 100  # the chain is stored every so many steps, and goes on from there
ENDS = {  # the least and the greatest beta, as published; sigmoid has linear's
    "linear": (1e-4, 0.02),
    "scaled_linear": (0.00085, 0.012),
    "cosine": (0.0, 0.999),
    "sigmoid": (1e-4, 0.02),
}
LINES = {"linear": ":", "scaled_linear": "-", "cosine": "--", "sigmoid": "-."}
BETAS = {kind: betas(kind, STEPS, *ends) for kind, ends in ENDS.items()}
SHARES = {kind: alpha_bar(b) for kind, b in BETAS.items()}
SCENE = Scene(time="day", terrain="hills", sky="rainbow", object="house", colour="red", position="centre")


class Noisy(NamedTuple):
    """A picture after t steps, made in both ways."""

    share: float  # alpha-bar: the picture's share of the variance
    once: np.ndarray  # (S, S, 3): by the closed form, always with the same noise
    chain: np.ndarray  # (S, S, 3): after t steps, each with new noise
    combined: np.ndarray  # the chain's t noises, weighted and added up into one


class ForwardNoise(Lesson):
    title = "Forward noise"
    idea = "Noise is added to a picture a little at a time, and any number of such steps can be done in one."
    trying = (
        "Drag the slider until you no longer recognise the picture. How much of it is left then? "
        "Choose another schedule at the same step. Give it a picture of your own."
    )

    def __init__(self, picture: Image.Image | str | Path | None = None, kind: str = "scaled_linear", at: int = 300):
        self.kind = w.Dropdown(options=list(ENDS), value=kind, description="Schedule")
        self.at = w.IntSlider(at, min=1, max=STEPS, description="Step")
        self.file = w.FileUpload(accept="image/*", description="Own picture")
        super().__init__(self.kind, played(self.at, 150, step=10), self.file, asks={"file": self.file})
        self.show(scene() if picture is None else picture)

    def ask(self) -> None:
        """A file was chosen. Nothing is queued: no model is needed."""
        if self.file.value:
            file = self.file.value[-1]
            try:
                self.show(io.BytesIO(file["content"]), file["name"])
            except Error as e:
                self._fail(e)

    def show(self, picture: Image.Image | str | Path | io.BytesIO, name: str = "") -> None:
        """Use another picture, a PIL image or a file."""
        self.data = pixels(picture, name or str(picture))
        self.error, self.said.value = None, ""
        self._kept = {kind: {0: (self.data, np.zeros_like(self.data))} for kind in ENDS}
        self.redraw()

    def redraw(self) -> None:
        t, kind = self.at.value, self.kind.value
        share = SHARES[kind][t - 1]
        chain, combined = walk(self._kept[kind], kind, t)
        self.now = Noisy(share, q_sample(self.data, normals(0), share), chain, combined)
        super().redraw()

    def figure(self) -> Figure:
        t, now = self.at.value, self.now
        signal, noise = math.sqrt(now.share), math.sqrt(1 - now.share)
        fig = Figure(figsize=(8.4, 4.9))
        grid = partial(fig.add_gridspec, left=0.055, right=0.975)
        panels = (
            (self.data, "the picture"),
            (now.once, f"at once: {signal:.2f} × picture\n+ {noise:.2f} × one noise"),
            (now.chain, f"step by step, up to {t}:\neach adds a little new noise"),
        )
        *tops, added = grid(1, 4, top=0.9, bottom=0.54, wspace=0.14).subplots()
        for ax, (image, title) in zip(tops, panels, strict=True):
            ax.imshow(np.clip(image / 2 + 0.5, 0, 1))
            ax.set_title(title)
            ax.axis("off")
        bins = noise * np.linspace(-4, 4, 65)
        for image, name, colour in ((now.once, "at once", BLUE), (now.chain, "step by step", ORANGE)):
            left = image - signal * self.data
            added.hist(left.ravel(), bins, density=True, histtype="step", color=colour, label=name)
        added.plot(bins, np.exp(-((bins / noise) ** 2) / 2) / noise / math.sqrt(2 * math.pi), "k--", lw=0.8)
        added.set(title="what was added, by value\n(dashed: the bell curve)", xticks=[-3, 0, 3], yticks=[])
        added.set(xlim=(-4.2, 4.2), ylim=(0, 0.52 / noise))
        added.spines["left"].set_visible(False)
        added.legend(loc="upper left", fontsize=7.5, handlelength=1, borderpad=0)
        shares, ratios = grid(1, 2, top=0.4, bottom=0.1, wspace=0.14).subplots()
        for ax, curve in ((shares, lambda share: share), (ratios, log_snr)):
            for kind, values in SHARES.items():
                style = {"color": GREEN, "lw": 2.2} if kind == self.kind.value else {"color": GREY, "lw": 1}
                ax.plot(range(1, STEPS + 1), curve(values), LINES[kind], label=kind, **style)
            ax.plot(t, curve(now.share), "o", color="black", clip_on=False)
            ax.set(xlabel="step", xlim=(0, STEPS))
        shares.set(title="the picture's share (ᾱ)", ylim=(0, 1))
        ratios.axhline(0, color="black", lw=0.5)
        ratios.set(title="picture to noise (log-SNR): below 0 noise prevails", ylim=(-21, 10))
        ratios.legend(loc="lower left", ncols=2, handlelength=3)
        return fig

    def words(self) -> str:
        t, kind, now = self.at.value, self.kind.value, self.now
        signal, noise = math.sqrt(now.share), math.sqrt(1 - now.share)
        again = q_sample(self.data, now.combined, now.share)
        slope = (now.chain * self.data).sum() / (self.data**2).sum()
        spread = (now.chain - slope * self.data).std()
        return (
            f"Step {t} of {STEPS}, {kind}: {signal:.2f} of the picture and {noise:.2f} of noise, "
            f"log-SNR {log_snr(now.share):.1f}; noise prevails from step {half(kind)} on. "
            f"Measured in the chain: {slope:.2f} and {spread:.2f}. Its noises, combined into one and added at once, "
            f"give the chain's picture to {np.abs(again - now.chain).max():.0e}."
        )


def walk(kept: dict[int, tuple], kind: str, t: int) -> tuple[np.ndarray, np.ndarray]:
    """The chain after t steps, and its noises combined into one. Later steps shrink the noise of step s by
    sqrt(alpha_bar_t / alpha_bar_s). The squares of the weights add up to 1, so the sum is standard noise again."""
    known = max(s for s in kept if s <= t)
    x, total = kept[known]
    share = SHARES[kind]
    for s in range(known, t):
        noise, beta = normals(s + 1), BETAS[kind][s]
        x, total = q_step(x, noise, beta), total + math.sqrt(beta / share[s]) * noise
        if (s + 1) % KEPT == 0:
            kept[s + 1] = x, total
    return x, total * math.sqrt(share[t - 1] / (1 - share[t - 1]))


def normals(s: int) -> np.ndarray:
    """The noise of step s; 0 is the noise of the closed form."""
    return np.random.default_rng([SIDE, s]).standard_normal((SIDE, SIDE, 3))


def log_snr(share):
    return np.log(share / (1 - share))


def half(kind: str) -> int:
    """The first step after which there is more noise than picture."""
    return int(np.argmax(SHARES[kind] < 0.5)) + 1


def scene() -> Image.Image:
    """A picture of the storybook world, drawn by the program that drew the built-in model's training data."""
    return Image.fromarray(render(SCENE, np.random.default_rng(1), SIDE))


def pixels(picture: Image.Image | str | Path | io.BytesIO, name: str) -> np.ndarray:
    """(S, S, 3) in [-1, 1]."""
    return np.asarray(square(picture, name, SIDE), float) / 127.5 - 1


def square(picture: Image.Image | str | Path | io.BytesIO, name: str, side: int) -> Image.Image:
    """The middle square of a picture or a file, scaled to `side` pixels."""
    try:
        file = Path(picture) if isinstance(picture, str) else picture
        image = file if isinstance(file, Image.Image) else images.open_file(file)
        return ImageOps.fit(images.read(image), (side, side))
    except (OSError, Image.DecompressionBombError):
        raise Error(f"{name} is not a picture that can be read.", "Choose a PNG, JPEG or WebP.") from None
