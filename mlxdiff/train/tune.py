"""Trains a file for a model on a folder of pictures. Latents and texts are encoded once, before the first step; then
`fit` runs. It can be stopped at any time, and continues if it is called again with the same settings."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from PIL import ImageOps

from .. import conditioning, foreign, images, samplers, schedules, values
from ..description import Description
from ..errors import Error
from ..families.base import EMBEDDED
from ..networks import dtype_of
from ..pipeline import Pipeline
from ..request import MAX_EDGE, MAX_SEED, Request
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
    size: int | None = None  # None: the model's
    crop: bool = False  # to squares; else pictures keep about their shape
    flip: bool = False  # also learn from mirrored pictures
    steps: int = 1000
    batch: int = 1
    rate: float = 1e-4
    warmup: int = 0
    seed: int = 0
    save_every: int = 100

    def check(self) -> None:
        """Raise for a setting that cannot be."""
        for name, most in (("steps", 10**6), ("batch", 1024), ("save_every", 10**6)):
            values.whole(name, getattr(self, name), 1, most)
        values.whole("warmup", self.warmup, 0, self.steps)
        values.whole("seed", self.seed, 0, MAX_SEED)
        values.number("rate", self.rate, 1e-9, 1.0)
        for name in ("prompt", "trigger", "class_prompt", "word", "initial"):
            if (value := getattr(self, name, None)) is not None:
                values.text(name, value)

    def size_for(self, model: Description) -> int:
        return model.defaults.size if self.size is None else self.size


@dataclass(frozen=True)
class LoraTuning(Tuning):
    """Of a LoRA."""

    trigger: str | None = None  # the word or phrase that a prompt needs later; it is noted in the file
    class_images: str | None = None  # pictures of the class, so that the model keeps what it knew
    class_prompt: str | None = None
    prior: float = 1.0  # weight of their loss
    rank: int = 16
    alpha: float | None = None  # None: the rank
    layers: tuple[str, ...] = ()  # none: the family's

    def check(self) -> None:
        super().check()
        values.whole("rank", self.rank, 1, lora.MOST_RANK)
        values.number("alpha", self.rank if self.alpha is None else self.alpha, 1e-3, 1e4)
        values.number("prior", self.prior, 0.0, 100.0)
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
    spreads: list[np.ndarray]  # of the VAE's distribution around them
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

    def __init__(self, model: Description):
        self.prediction = model.prediction
        self.alpha_bar = schedules.discrete(model.schedule, samplers.SAMPLERS["ddim"].grid).alpha_bar

    def part(self, data: Data, rng: np.random.Generator, n: int) -> Part:
        """The batch of a step."""
        picks = data.picks(rng, n)
        mean, spread = (np.stack([of[i] for i in picks]) for of in (data.means, data.spreads))
        noises = rng.standard_normal((2, *mean.shape), np.float32)
        t, level = objective.levels(self.prediction, self.alpha_bar, objective.stratified(rng, n))
        x0 = mx.array(mean + spread * noises[0])
        x, target = objective.mixture(self.prediction, x0, mx.array(noises[1]), mx.array(level.astype(np.float32)))
        args = {k: mx.concatenate([data.args[i][k] for i in picks]) for k in data.args[0]}
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
    if model.flow:
        problem = f"{model.name} is {model.family.title}, which this cannot train for yet."
        raise Error(problem, "Train for a model of SD 1.x, 2.x or XL.")
    if model.guidance == EMBEDDED or model.row.beside or model.row.edits:
        fix = "Train for the base model of its family; what it learns often works with its relatives too."
        raise Error(f"{model.name} is a {model.variant} model, which this cannot train for.", fix)


def read(pipe: Pipeline, tuning: Tuning, images: str, prompt: str | None) -> list[Picture]:
    """The pictures of a folder. Raises for what is wrong with them, with the settings or with the model."""
    tuning.check()
    check(pipe)
    size, multiple = tuning.size_for(pipe.description), pipe.description.multiple
    if size % multiple or not multiple <= size <= MAX_EDGE:
        usual = pipe.description.defaults.size
        raise Error(f"Size {size} is not a multiple of {multiple} up to {MAX_EDGE}.", f"Use `size={usual}`.")
    return folders.read(foreign.path(images), prompt, size, multiple, tuning.crop)


def texts(pipe: Pipeline, chosen: list[Picture], request: Request) -> Callable[[Picture], conditioning.Text]:
    """The encoded captions of pictures. Each is read once; the encoders are released."""
    captions = list(dict.fromkeys(p.caption for p in chosen))
    found = pipe.read(captions, request, pipe.description.reads_t5(request))
    by_caption = dict(zip(captions, found, strict=True))
    return lambda picture: by_caption[picture.caption]


def encode(
    pipe: Pipeline, chosen: list[Picture], tuning: Tuning, args: Callable[[Picture, Request], dict], weight: float = 1.0
) -> Data:
    """Encode pictures once; the VAE is released. args: what a step reads of a picture besides its latents."""
    model, data = pipe.description, Data([], [], [], weight)
    request = drawn(pipe, tuning)
    vae, buckets = pipe.networks.get("vae"), {}
    for picture in chosen:
        image = images.fit(images.read(picture.path), picture.width, picture.height)
        sized = replace(request, width=picture.width, height=picture.height)
        for shown in (image, ImageOps.mirror(image)) if tuning.flip else (image,):
            mean, logvar = vae.encode(mx.array(images.to_pixels(shown))[None])
            spread = mx.exp(0.5 * mx.clip(logvar, -30, 20)) * vae.config.scale
            buckets.setdefault(mean.shape, []).append(len(data.means))
            data.means.append(np.array(mean[0].astype(mx.float32)))
            data.spreads.append(np.array(spread[0].astype(mx.float32)))
            if not np.isfinite(data.means[-1]).all():
                raise model.not_finite()
            data.args.append(args(picture, sized))
    pipe.networks.release("vae")
    data.buckets.extend(buckets.values())
    return data


def drawn(pipe: Pipeline, tuning: Tuning) -> Request:
    """The resolved request of a picture as it is trained."""
    size = tuning.size_for(pipe.description)
    return pipe.resolve(Request("", width=size, height=size))


def notes(kind: str, pipe: Pipeline, tuning: Tuning, sets: list[list[Picture]]) -> dict:
    """What makes a training what it is, as JSON has it."""
    model, seen = pipe.description, [folders.fingerprint(s) for s in sets]
    start = {"kind": kind, "model": model.name, "recipe": str(model.recipe), "pictures": seen}
    return json.loads(json.dumps(start | asdict(tuning)))


class LoraRun:
    """A training of a LoRA: made, and checked, before the work."""

    def __init__(self, pipe: Pipeline, tuning: LoraTuning, out: Path):
        self.pipe, self.tuning, self.out = pipe, tuning, out
        self.sets = [read(pipe, tuning, tuning.images, tuning.prompt)]
        if tuning.class_images is not None:
            self.sets.append(read(pipe, tuning, tuning.class_images, tuning.class_prompt))
        model = pipe.description
        pipe.networks.adapt([])  # what it drew with before does not count
        self.net = pipe.networks.open(model.family.denoiser)
        layers = tuning.layers or model.family.trained
        alpha = tuning.rank if tuning.alpha is None else tuning.alpha
        self.made = lora.attach(self.net, model.name, layers, tuning.rank, alpha, tuning.seed)
        self.notes = notes("lora", pipe, tuning, self.sets)
        same_run(out, self.notes)

    @property
    def file(self) -> Path:
        return self.out / lora.FILE

    @property
    def flag(self) -> str:
        """How the command line takes it."""
        return f"--lora {self.out}"

    def lines(self) -> list[str]:
        """What will be trained, for people."""
        numbers = sum(v.size for _, v in tree_flatten(self.net.trainable_parameters()))
        return [
            told(self.sets),
            f"{len(self.made)} layers, rank {self.tuning.rank}: {numbers / 1e6:.3g} million numbers.",
        ]

    def sample(self, prompts: Sequence[str], step: int) -> list[Path]:
        """Draw pictures with what is trained so far."""
        return samples(self.pipe, self.net, prompts, step, self.out)

    def steps(self) -> Iterator[Report]:
        """Train, step by step. The file is written whenever the state is saved, and in the end."""
        yield from trained(self.net, loss, self.encoded(), self.pipe, self.tuning, self.out, self.export)

    def encoded(self) -> list[Data]:
        """The pictures and those of the class, with their captions."""
        text = texts(self.pipe, [p for s in self.sets for p in s], drawn(self.pipe, self.tuning))

        def args(picture: Picture, request: Request) -> dict[str, mx.array]:
            return conditioning.arguments(self.pipe.description.text, text(picture), request, negative=False)

        weights = (1.0, self.tuning.prior)
        return [encode(self.pipe, s, self.tuning, args, w) for s, w in zip(self.sets, weights, strict=False)]

    def export(self) -> Path:
        return lora.export(self.made, self.pipe.description, self.notes, self.out)


def told(sets: Sequence[Sequence[Picture]]) -> str:
    """How many pictures there are, and in which sizes, for people."""
    counts = [Counter(f"{p.width}x{p.height}" for p in pictures) for pictures in sets]
    parts = [f"{len(s)} picture{'s' * (len(s) > 1)} ({', '.join(c)})" for s, c in zip(sets, counts, strict=True)]
    return " and of the class ".join(parts) + "."


def samples(pipe: Pipeline, net: nn.Module, prompts: Sequence[str], step: int, out: Path, **settings) -> list[Path]:
    """Draw pictures of prompts into the folder of a run, with the denoiser that is open already."""
    pipe.networks.hold(pipe.description.family.denoiser, net)
    files = []
    for i, prompt in enumerate(prompts):
        files += pipe(prompt, seed=0, **settings).save(out / f"sample-{step:06}-{i + 1}.png")
    pipe.networks.release(pipe.description.family.denoiser)
    return files


def trained(
    net: nn.Module,
    loss: Callable,
    sets: Sequence[Data],
    pipe: Pipeline,
    tuning: Tuning,
    out: Path,
    export: Callable[[], Path],
) -> Iterator[Report]:
    """The steps of a training. What was trained is written whenever the state is saved, and when the run stops."""
    aim = Objective(pipe.description)

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
