"""Trains the storybook model from nothing: pictures, VAE, vocabulary and latents, U-Net with its text encoder, export.
Each stage leaves a file in the folder and does not run twice."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from .. import guidance, metadata, samplers, schedules
from ..errors import Error
from ..families import MODELS
from ..models import clip, unet, vae
from ..tokenizers import ClipTokenizer, load
from ..whole import PART, appearing
from . import bpe, export, objective
from . import storybook as sb
from .fit import Plan, Report, alone, averaged, fit, write_picture, write_text, writing

CAPTIONS = 8  # of a picture
SCALE = 0.18215  # as in files of this layout; the latents are whitened first, so it is right by construction
# Left and right are equally frequent, so features that separate the sides do not lower the loss by themselves, and the
# words for the sides need such features: they were not learned at all. Leaning left for a few hundred steps breaks the
# symmetry.
LEANING, LEAN = range(600, 900), {"left": 0.62, "centre": 0.28, "right": 0.10}
SAVE_EVERY, SAMPLES_EVERY = 250, 1000  # steps; samples are drawn from the state that was just saved
ALPHA_BAR = schedules.alpha_bar(schedules.betas("scaled_linear", 1000, 0.00085, 0.012))

_STORYBOOK = MODELS["storybook"]
_NETWORKS, SIZE = _STORYBOOK.networks, _STORYBOOK.defaults.size
VAE = replace(_NETWORKS["vae"], scale=1.0)
UNET = _NETWORKS["unet"]
CELL = vae.factor(VAE.channels)  # the edge of a latent, in pixels


def text_config(vocab: int) -> clip.Config:
    return replace(_NETWORKS["text_encoder"], vocab=vocab, eos=vocab - 1)


@dataclass(frozen=True)
class Recipe:
    pictures: int
    size: int  # pixels: the edge of each
    vae_steps: int
    steps: int
    batch: int  # samples a step of the denoiser; the VAE sees a quarter of that, in crops
    optimizer: str
    prediction: str
    gamma: float | None  # for min-SNR
    seed: int


class Denoiser(nn.Module):
    """The U-Net and its text encoder, which are trained together."""

    def __init__(self, vocab: int):
        super().__init__()
        self.unet, self.text = unet.UNet(UNET), clip.CLIPText(text_config(vocab))

    def __call__(self, x: mx.array, t: mx.array, ids: mx.array) -> mx.array:
        return self.unet(x, t, **self.unet.prepare(None, self.text(ids).last))


# --- losses


def pyramid(y: mx.array, x: mx.array) -> mx.array:
    """Squared error, L1 at four scales, and for sharp edges L1 of neighbours' differences at the two finest scales."""
    total = 2 * mx.square(y - x).mean()
    for k in range(4):
        d = y - x
        total = total + mx.abs(d).mean() * (1.0 if k == 0 else 0.6)
        if k < 2:
            total = total + 0.7 * (mx.abs(d[:, 1:] - d[:, :-1]).mean() + mx.abs(d[:, :, 1:] - d[:, :, :-1]).mean())
        x, y = halved(x), halved(y)
    return total


def halved(x: mx.array) -> mx.array:
    B, H, W, c = x.shape
    return x.reshape(B, H // 2, 2, W // 2, 2, c).mean((2, 4))


def vae_loss(model: vae.VAE, x: mx.array, noise: mx.array) -> mx.array:
    mean, logvar = model.encode(x)
    y = model.decode(mean + mx.exp(0.5 * logvar) * noise)
    return pyramid(y, x) + 1e-4 * (mx.square(mean) + mx.exp(logvar) - 1 - logvar).mean()


def denoiser_loss(model: Denoiser, x: mx.array, target: mx.array, t: mx.array, ids: mx.array, weight: mx.array):
    return (mx.square(model(x, t, ids) - target).mean((1, 2, 3)) * weight).mean()


# --- stages


def pictures(folder: Path, recipe: Recipe) -> tuple[np.ndarray, list[sb.Scene]]:
    """The training pictures, (N, size, size, 3) uint8 on disk, and their scenes. They are rendered once."""
    file, listing = folder / "pictures.npy", folder / "scenes.json"
    if not listing.exists():
        scenes, shape = [], (recipe.pictures, recipe.size, recipe.size, 3)
        free = shutil.disk_usage(folder).free
        if free < (need := math.prod(shape)):
            problem = f"The pictures need {need / 1e9:.2f} GB; {folder} has {free / 1e9:.2f} GB free."
            raise Error(problem, "Free some space, or give another `output`.")
        with writing(file), appearing(file) as part, open(part, "wb") as out:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            for k in range(recipe.pictures):
                rng = np.random.default_rng([recipe.seed, k])
                scenes.append(sb.sample(rng))
                out.write(sb.render(scenes[-1], rng, recipe.size).tobytes())
        write_text(listing, json.dumps([astuple(s) for s in scenes]))
    with _sound(file):
        shown = np.load(file, mmap_mode="r")
    with _sound(listing):
        return shown, [sb.Scene(*s) for s in json.loads(listing.read_text(encoding="utf-8"))]


@contextmanager
def _sound(file: Path) -> Iterator[None]:
    """Make one Error of whatever is wrong with a file of an earlier stage."""
    try:
        yield
    except (EOFError, KeyError, OSError, TypeError, ValueError, BadZipFile) as e:
        raise Error(f"{file} is damaged: {e}.", "Give another `output`.") from None


def train_vae(folder: Path, recipe: Recipe, shown: np.ndarray) -> Iterator[Report]:
    """Train the VAE on crops with half the picture's side: they have as many edges, for a quarter of the work."""
    side, n = recipe.size // 2 // CELL * CELL, max(1, recipe.batch // 4)

    def batch(step):
        rng = np.random.default_rng([recipe.seed, 1, step])
        corners = rng.integers(0, (recipe.size - side) // CELL + 1, (n, 2)) * CELL
        picks = rng.integers(0, len(shown), n)
        crops = np.stack([shown[i, y : y + side, x : x + side] for i, (y, x) in zip(picks, corners, strict=True)])
        noise = rng.standard_normal((n, side // CELL, side // CELL, VAE.latent_channels), np.float32)
        return mx.array(crops.astype(np.float32) / 127.5 - 1), mx.array(noise)

    mx.random.seed(recipe.seed)
    rate = 0.02 if recipe.optimizer == "muon" else 1e-3
    plan = Plan(
        recipe.vae_steps, rate, recipe.optimizer, warmup=40, decay=0.0, clip=1.0, ema=0.995, save_every=SAVE_EVERY
    )
    yield from fit(vae.VAE(VAE), vae_loss, batch, plan, folder / "vae")


def whitened(model: vae.VAE, mean: np.ndarray, covariance: np.ndarray) -> vae.VAE:
    """The same autoencoder with uncorrelated latents of unit variance at the model's scale. The 1x1 convolutions beside
    the latents contain the change of basis."""
    values, vectors = np.linalg.eigh(covariance)
    into, back = vectors / np.sqrt(values), np.sqrt(values)[:, None] * vectors.T  # white = (z - mean) @ into
    n = len(mean)
    inward, outward = model.quant_conv, model.post_quant_conv
    w, b = np.array(inward.weight, np.float64), np.array(inward.bias, np.float64)
    w[:n], b[:n] = into.T @ w[:n] / SCALE, (b[:n] - mean) @ into / SCALE
    w[n:], b[n:] = 0, -6  # the posterior's spread means nothing in the new basis
    inward.weight, inward.bias = mx.array(w.astype(np.float32)), mx.array(b.astype(np.float32))
    matrix, bias = np.array(outward.weight, np.float64), np.array(outward.bias, np.float64)
    outward.weight = mx.array((matrix @ back.T * SCALE).astype(np.float32))
    outward.bias = mx.array((bias + matrix @ mean).astype(np.float32))
    model.config = vae.Config(**{**vars(model.config), "scale": SCALE})
    return model


def encode(folder: Path, recipe: Recipe, shown: np.ndarray, scenes: list[sb.Scene]) -> dict[str, np.ndarray]:
    """Latents (N, h, w, c), their mean and covariance, and token ids (N, captions, positions)."""
    file = folder / "latents.npz"
    if not file.exists():
        rng = np.random.default_rng([recipe.seed, 2])
        captions = [[sb.caption(s, rng) for _ in range(CAPTIONS)] for s in scenes]
        stray = " ".join(sb.captions.STRAY)
        merges = bpe.learn([c for cs in captions for c in cs] + [stray] * 20, 2000)
        with writing(folder / "tokenizer"):
            bpe.save(folder / "tokenizer", merges, _NETWORKS["text_encoder"].positions)
        tokenizer = load(folder / "tokenizer")
        ids = np.array([[padded(tokenizer, c) for c in cs] for cs in captions], np.int16)
        model, latents = averaged(vae.VAE(VAE), folder / "vae"), []
        for k in range(0, len(shown), 32):
            mean, _ = model.encode(mx.array(shown[k : k + 32].astype(np.float32) / 127.5 - 1))
            latents.append(np.array(mean).astype(np.float16))
        z = np.concatenate(latents)
        flat = z.reshape(-1, z.shape[-1]).astype(np.float32)
        with writing(file), appearing(file) as part:
            np.savez(part, z=z, ids=ids, mean=flat.mean(0), covariance=np.cov(flat.T))
    with _sound(file):
        return dict(np.load(file))


def padded(tokenizer: ClipTokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, weighted=False)[0].ids


def train_denoiser(
    folder: Path, recipe: Recipe, data: dict[str, np.ndarray], scenes: list[sb.Scene]
) -> Iterator[Report]:
    """Train the U-Net and the text encoder. One caption in ten is empty, for guidance."""
    values, vectors = np.linalg.eigh(data["covariance"])
    white = ((data["z"].astype(np.float32) - data["mean"]) @ (vectors / np.sqrt(values))).astype(np.float32)
    empty = np.array(padded(load(folder / "tokenizer"), ""))
    leaning = np.array([LEAN[s.position] for s in scenes])
    leaning /= leaning.sum()

    def batch(step):
        rng = np.random.default_rng([recipe.seed, 3, step])
        picks = rng.choice(len(white), recipe.batch, p=leaning if step in LEANING else None)
        ids = data["ids"][picks, rng.integers(0, CAPTIONS, recipe.batch)].astype(np.int32)
        ids[rng.random(recipe.batch) < 0.1] = empty
        t, level = objective.levels(recipe.prediction, ALPHA_BAR, objective.stratified(rng, recipe.batch))
        x0, noise = mx.array(white[picks]), mx.array(rng.standard_normal(white[picks].shape, np.float32))
        level = mx.array(level.astype(np.float32))
        x, target = objective.mixture(recipe.prediction, x0, noise, level)
        weight = objective.weights(recipe.prediction, level, recipe.gamma)
        return x, target, mx.array(t.astype(np.float32)), mx.array(ids), weight

    mx.random.seed(recipe.seed)
    model = Denoiser(vocab_size(folder))
    rate = 0.01 if recipe.optimizer == "muon" else 1e-3
    plan = Plan(recipe.steps, rate, recipe.optimizer, warmup=80, decay=0.5, clip=1.0, ema=0.998, save_every=SAVE_EVERY)
    yield from fit(model, denoiser_loss, batch, plan, folder / "denoiser")


def vocab_size(folder: Path) -> int:
    return len(json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8")))


def finish(folder: Path, recipe: Recipe, data: dict[str, np.ndarray]) -> Path:
    """Write the public folder `model` from the averaged weights, whole or not at all."""
    target, part = folder / "model", folder / f".model{PART}"
    model = averaged(Denoiser(vocab_size(folder)), folder / "denoiser")
    autoencoder = whitened(averaged(vae.VAE(VAE), folder / "vae"), data["mean"], data["covariance"])
    shutil.rmtree(part, ignore_errors=True)
    try:
        with writing(target):
            export.write(part, autoencoder, model.unet, model.text, recipe.prediction, recipe.size)
            shutil.copytree(folder / "tokenizer", part / "tokenizer")
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def samples(folder: Path, recipe: Recipe, data: dict[str, np.ndarray], scenes: list[sb.Scene]) -> Image.Image:
    """Scenes drawn with the current averaged weights: 25 steps of Euler, guidance 4, always the same noise."""
    model = averaged(Denoiser(vocab_size(folder)), folder / "denoiser")
    autoencoder = whitened(averaged(vae.VAE(VAE), folder / "vae"), data["mean"], data["covariance"])
    tokenizer, n = load(folder / "tokenizer"), len(scenes)
    ids = [padded(tokenizer, text) for text in [""] * n + [sb.plain(s) for s in scenes]]
    both = model.unet.prepare(None, model.text(mx.array(ids)).last)
    positive = both | {"kv": [(k[n:], v[n:]) for k, v in both["kv"]]}
    schedule = schedules.Discrete(ALPHA_BAR)
    settings = {"both": both, "scale": 4.0, "dtype": mx.float32}
    denoise = guidance.denoiser(model.unet, schedule, recipe.prediction, positive, **settings)
    sigmas = schedules.sigmas(schedule, "trailing", 25)
    x = mx.array(np.random.default_rng(recipe.seed).standard_normal((n, *data["z"].shape[1:]), np.float32)) * sigmas[0]
    for state, _ in samplers.euler(denoise, x, sigmas):
        x = state
        mx.eval(x)
    pixels = np.clip(np.array(autoencoder.decode(x)) * 127.5 + 128, 0, 255).astype(np.uint8)
    return Image.fromarray(np.concatenate(list(pixels), 1))


def storybook(folder: Path, recipe: Recipe) -> Iterator[tuple[str, Report]]:
    """The whole training, step by step, as (stage, Report). It may stop at any time; the next call continues it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        shown, scenes = pictures(folder, recipe)
        for report in train_vae(folder, recipe, shown):
            yield "vae", report
        data = encode(folder, recipe, shown, scenes)
        for report in train_denoiser(folder, recipe, data, scenes):
            if report.step % SAMPLES_EVERY == 0 and recipe.prediction != "flow":
                sheet = samples(folder, recipe, data, scenes[:8])
                write_picture(folder / f"samples_{report.step:06d}.png", sheet, metadata.DRAWN)
            yield "denoiser", report
        finish(folder, recipe, data)
