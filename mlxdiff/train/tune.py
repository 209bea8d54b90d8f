"""Trains a file for a model on a folder of pictures. Latents and texts are encoded once, before the first step; then
`fit` runs. It can be stopped at any time, and continues if it is called again with the same settings."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from PIL import ImageOps

from .. import conditioning, foreign, images, samplers, schedules
from ..errors import Error
from ..families.base import EMBEDDED, INPUT
from ..networks import dtype_of
from ..pipeline import Pipeline
from ..request import MAX_SEED, Request, check_text
from . import folder as folders
from . import lora, objective
from .fit import Plan, Report, fit, same_run
from .folder import Picture

RUN = "run"  # the folder of the unfinished state, beside what is trained


@dataclass(frozen=True)
class Tuning:
    """The settings of a training. A resumed one must have the same."""

    images: str
    prompt: str | None = None  # of pictures without a .txt file
    trigger: str | None = None  # the word or phrase that a prompt needs later; it is noted in the file
    class_images: str | None = None  # pictures of the class, so that the model keeps what it knew
    class_prompt: str | None = None
    prior: float = 1.0  # weight of their loss
    size: int | None = None  # None: the model's
    crop: bool = False  # to squares; else pictures keep about their shape
    flip: bool = False  # also learn from mirrored pictures
    steps: int = 1000
    batch: int = 1
    rate: float = 1e-4
    warmup: int = 0
    rank: int = 16
    alpha: float | None = None  # None: the rank
    layers: tuple[str, ...] = ()  # none: the family's
    seed: int = 0
    save_every: int = 100

    def check(self) -> None:
        """Raise for a number out of range."""
        whole = {"steps": 10**6, "batch": 1024, "rank": lora.MOST_RANK, "save_every": 10**6, "seed": MAX_SEED}
        for name, most in whole.items():
            value, least = getattr(self, name), int(name != "seed")
            if not least <= value <= most:
                problem = f"{name} must be a whole number from {least} to {most}; {value} was given."
                raise Error(problem, f"Change `{name}`.")
        if not 0 <= self.warmup <= self.steps:
            raise Error(f"warmup must be from 0 to {self.steps} steps; {self.warmup} was given.", "Change `warmup`.")
        for name, low, high in (("rate", 1e-9, 1.0), ("alpha", 1e-3, 1e4), ("prior", 0.0, 100.0)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN fails too
                raise Error(f"{name} must be from {low:g} to {high:g}; {value:g} was given.", f"Change `{name}`.")
        for name in ("prompt", "trigger", "class_prompt"):
            if (value := getattr(self, name)) is not None:
                check_text(name, value)
        if self.class_images is None and self.class_prompt is not None:
            fix = "Give a folder: `class_images=FOLDER`. `mlxdiff generate` draws such pictures."
            raise Error("class_prompt describes pictures of the class, and there are none.", fix)


class Part(NamedTuple):
    """What a step reads of one set of pictures."""

    x: mx.array  # (B, h, w, c)
    t: mx.array  # (B,)
    target: mx.array
    args: dict[str, mx.array]  # of the denoiser's `prepare`
    weight: float


@dataclass(frozen=True)
class Data:
    """Encoded pictures. Those of a bucket, which have the same shape, can share a batch."""

    means: list[np.ndarray]  # (h, w, c)
    spreads: list[np.ndarray]  # of the VAE's distribution around them; all 0 where a model learns from the mean
    args: list[dict[str, mx.array]]  # of the denoiser's `prepare`
    weight: float = 1.0
    buckets: list[list[int]] = field(default_factory=list)

    def picks(self, rng: np.random.Generator, n: int) -> list[int]:
        """The pictures of a batch: each picture is equally probable."""
        sizes = np.array([len(b) for b in self.buckets])
        chosen = self.buckets[rng.choice(len(sizes), p=sizes / sizes.sum())]
        return [chosen[i] for i in rng.choice(len(chosen), n, replace=n > len(chosen))]


class Objective:
    """Noise levels and targets as the model was trained with."""

    def __init__(self, model, tokens: int):
        self.prediction, self.distilled = model.prediction, model.guidance == INPUT
        if model.flow:
            self.flow = schedules.flow(model.schedule, tokens, steps=28)
        else:
            self.alpha_bar = schedules.discrete(model.schedule, samplers.SAMPLERS["ddim"].grid).alpha_bar

    def levels(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Times, which are the network's input, and their levels."""
        u = objective.stratified(rng, n)
        if self.prediction != "flow":
            return objective.levels(self.prediction, self.alpha_bar, u)
        normal = np.array([NormalDist().inv_cdf(min(max(p, 1e-6), 1 - 1e-6)) for p in u])
        sigma = self.flow.shifted(1 / (1 + np.exp(-normal)))  # logit-normal (Esser et al. 2024)
        return sigma * self.flow.n / 1000, sigma

    def part(self, data: Data, rng: np.random.Generator, n: int) -> Part:
        """The batch of a step."""
        picks = data.picks(rng, n)
        mean, spread = (np.stack([of[i] for i in picks]) for of in (data.means, data.spreads))
        noises = rng.standard_normal((2, *mean.shape), np.float32)
        t, level = self.levels(rng, n)
        x0 = mx.array(mean + spread * noises[0])
        x, target = objective.mixture(self.prediction, x0, mx.array(noises[1]), mx.array(level.astype(np.float32)))
        args = {k: mx.concatenate([data.args[i][k] for i in picks]) for k in data.args[0]}
        if self.prediction == "flow":
            args["size"] = mean.shape[1:3]
        if self.distilled:
            args["guidance"] = 1.0  # the model then draws as without guidance, which is what pictures teach
        return Part(x, mx.array(t.astype(np.float32)), target, args, data.weight)


def loss(net: nn.Module, parts: list[Part]) -> mx.array:
    """The squared error of what the network predicts."""
    total = 0.0
    for x, t, target, args, weight in parts:
        out = net(x.astype(dtype_of(net)), t, **net.prepare(None, **args)).astype(mx.float32)
        total = total + weight * mx.square(out - target).mean()
    return total


def check(pipe: Pipeline) -> None:
    """Raise for a model that this cannot train for."""
    model = pipe.description
    if model.guidance == EMBEDDED or model.row.beside or model.row.edits:
        fix = "Train for the base model of its family; what it learns often works with its relatives too."
        raise Error(f"{model.name} is a {model.variant} model, which this cannot train for.", fix)


def pictures(pipe: Pipeline, tuning: Tuning) -> list[list[Picture]]:
    """The pictures, and those of the class if there are any. Raises for what is wrong with them."""
    tuning.check()
    check(pipe)
    size, multiple = _size(pipe, tuning), pipe.description.multiple
    if size % multiple or not multiple <= size <= 4096:
        raise Error(
            f"Size {size} is not a multiple of {multiple} up to 4096.", f"Use `size={pipe.description.defaults.size}`."
        )
    sets = [folders.read(foreign.path(tuning.images), tuning.prompt, size, multiple, tuning.crop)]
    if tuning.class_images is not None:
        place = foreign.path(tuning.class_images)
        sets.append(folders.read(place, tuning.class_prompt, size, multiple, tuning.crop))
    return sets


def _size(pipe: Pipeline, tuning: Tuning) -> int:
    return pipe.description.defaults.size if tuning.size is None else tuning.size


def encode(pipe: Pipeline, chosen: list[Picture], tuning: Tuning, weight: float = 1.0) -> Data:
    """Encode pictures and captions, each once. The encoders are released."""
    model, data = pipe.description, Data([], [], [], weight)
    request = pipe.resolve(Request("", width=_size(pipe, tuning), height=_size(pipe, tuning)))
    captions = list(dict.fromkeys(p.caption for p in chosen))
    texts = dict(zip(captions, pipe.read(captions, request, model.reads_t5(request)), strict=True))
    vae, buckets = pipe.networks.get("vae"), {}
    for picture in chosen:
        image = images.fit(images.read(picture.path), picture.width, picture.height)
        sized = replace(request, width=picture.width, height=picture.height)
        for shown in (image, ImageOps.mirror(image)) if tuning.flip else (image,):
            mean, logvar = vae.encode(mx.array(images.to_pixels(shown))[None])
            packed = mean.shape != logvar.shape  # FLUX.2, which learns from the mean
            spread = mx.zeros_like(mean) if packed else mx.exp(0.5 * mx.clip(logvar, -30, 20)) * vae.config.scale
            buckets.setdefault(mean.shape, []).append(len(data.means))
            data.means.append(np.array(mean[0].astype(mx.float32)))
            data.spreads.append(np.array(spread[0].astype(mx.float32)))
            if not np.isfinite(data.means[-1]).all():
                raise model.not_finite()
            data.args.append(conditioning.arguments(model.text, texts[picture.caption], sized, negative=False))
    pipe.networks.release("vae")
    data.buckets.extend(buckets.values())
    return data


class LoraRun:
    """A training of a LoRA: made, and checked, before the work."""

    def __init__(self, pipe: Pipeline, tuning: Tuning, out: Path):
        self.pipe, self.tuning, self.out = pipe, tuning, out
        self.sets = pictures(pipe, tuning)
        model = pipe.description
        self.net = pipe.networks.open(model.family.denoiser)
        layers = tuning.layers or model.family.trained
        alpha = tuning.rank if tuning.alpha is None else tuning.alpha
        self.made = lora.attach(self.net, model.name, layers, tuning.rank, alpha, tuning.seed)
        same_run(out, self.notes)

    @property
    def notes(self) -> dict:
        model = self.pipe.description
        seen = [folders.fingerprint(s) for s in self.sets]
        kind = {"kind": "lora", "model": model.name, "recipe": str(model.recipe), "pictures": seen}
        return json.loads(json.dumps(kind | asdict(self.tuning)))

    @property
    def file(self) -> Path:
        return self.out / lora.FILE

    def lines(self) -> list[str]:
        """What will be trained, for people."""
        numbers = sum(v.size for _, v in tree_flatten(self.net.trainable_parameters()))
        return [
            told(self.sets),
            f"{len(self.made)} layers, rank {self.tuning.rank}: {numbers / 1e6:.3g} million numbers.",
        ]

    def sample(self, prompts: Sequence[str], step: int) -> list[Path]:
        """Draw pictures with what is trained so far."""
        self.pipe.networks.hold(self.pipe.description.family.denoiser, self.net)
        return samples(self.pipe, prompts, step, self.out)

    def steps(self) -> Iterator[Report]:
        """Train, step by step. The file is written whenever the state is saved, and in the end."""
        tuning, model = self.tuning, self.pipe.description
        weights = (1.0, tuning.prior)
        sets = [encode(self.pipe, s, tuning, w) for s, w in zip(self.sets, weights, strict=False)]
        yield from trained(self.net, loss, sets, model, tuning, self.out, self.export)

    def export(self) -> Path:
        return lora.export(self.made, self.pipe.description, self.notes, self.out)


def told(sets: Sequence[Sequence[Picture]]) -> str:
    """How many pictures there are, and in which sizes, for people."""
    counts = [Counter(f"{p.width}x{p.height}" for p in pictures) for pictures in sets]
    parts = [f"{len(s)} picture{'s' * (len(s) > 1)} ({', '.join(c)})" for s, c in zip(sets, counts, strict=True)]
    return " and of the class ".join(parts) + "."


def samples(pipe: Pipeline, prompts: Sequence[str], step: int, out: Path) -> list[Path]:
    """Draw pictures of prompts into the folder of a run."""
    files = []
    for i, prompt in enumerate(prompts):
        files += pipe(prompt, seed=0).save(out / f"sample-{step:06}-{i + 1}.png")
    pipe.networks.release(pipe.description.family.denoiser)
    return files


def trained(
    net: nn.Module, loss: Callable, sets: Sequence[Data], model, tuning: Tuning, out: Path, export: Callable[[], Path]
) -> Iterator[Report]:
    """The steps of a training. What was trained is written whenever the state is saved, and when the run stops."""
    size = model.defaults.size if tuning.size is None else tuning.size
    aim = Objective(model, (size // model.multiple) ** 2)

    def batch(step: int) -> tuple[list[Part]]:
        rng = np.random.default_rng([tuning.seed, 11, step])
        return ([aim.part(data, rng, tuning.batch) for data in sets],)

    plan = Plan(tuning.steps, tuning.rate, "adamw", tuning.warmup, 1.0, 1.0, 0.0, tuning.save_every, 1e-2)
    try:
        for report in fit(net, loss, batch, plan, out / RUN):
            if report.step % tuning.save_every == 0:
                export()
            yield report
    except (GeneratorExit, KeyboardInterrupt):
        export()
        raise
    export()
