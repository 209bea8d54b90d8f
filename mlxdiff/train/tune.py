"""Trains a file for a model on a folder of pictures. Latents and texts are encoded once, before the first step; then
`fit` runs. It can be stopped at any time, and continues if it is called again with the same settings."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image, ImageOps

from .. import conditioning, foreign, images, metadata, values
from ..description import Description
from ..errors import Error
from ..families.base import EMBEDDED, NONE
from ..machines import Machines
from ..pipeline import Pipeline
from ..request import MAX_EDGE, MAX_SEED, Request
from ..store import adapters
from . import batches, lora, texts
from . import folder as folders
from .batches import Data, Objective, Part
from .fit import Plan, Report, alone, check_shares, fit, same_run, write_picture
from .folder import Picture

RUN = "run"  # the folder of the unfinished state, beside what is trained
_SHOWN, _CELL = 20, 256  # of samples.png: the last steps, and the edge of a picture at most


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
    accumulate: int = 1  # batches of a step, one after the other
    low_memory: bool = False  # keep less of each block and compute it twice
    rate: float = 1e-4
    warmup: int = 0
    decay_after: float = 1.0  # the share of the steps after which the rate falls to 0; 1: it stays
    seed: int = 0
    save_every: int = 100

    def check(self) -> None:
        """Raise for a setting that cannot be."""
        for name, most in (("steps", 10**6), ("batch", 1024), ("accumulate", 1024), ("save_every", 10**6)):
            values.whole(name, getattr(self, name), 1, most)
        values.whole("warmup", self.warmup, 0, self.steps)
        values.whole("seed", self.seed, 0, MAX_SEED)
        values.number("rate", self.rate, 1e-9, 1.0)
        values.number("decay_after", self.decay_after, 0.0, 1.0)
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
    layers: tuple[str, ...] = ()  # names in diffusers, or their ends; "all"; none: the family's
    text_encoder: bool = False  # whether the CLIP encoders are trained along
    caption_dropout: float = 0.0  # the share of the pictures that a step reads without their caption

    def check(self) -> None:
        super().check()
        values.whole("rank", self.rank, 1, lora.MOST_RANK)
        values.number("alpha", self.rank if self.alpha is None else self.alpha, 1e-3, 1e4)
        values.number("prior", self.prior, 0.0, 100.0)
        values.number("caption_dropout", self.caption_dropout, 0.0, 0.9)
        if self.class_images is None and self.class_prompt is not None:
            fix = "Give a folder: `class_images=FOLDER`. `mlxdiff generate` draws such pictures."
            raise Error("class_prompt describes pictures of the class, and there are none.", fix)


def check(model: Description, tuning: Tuning) -> None:
    """Raise for a model that this cannot train for."""
    if getattr(tuning, "text_encoder", False) and model.flow:
        problem = f"{model.name} is {model.family.title}, whose text encoders are not trained."
        raise Error(problem, "Leave `text_encoder` out: the denoiser learns words too.")
    if model.guidance in (EMBEDDED, NONE) or model.row.beside or (model.row.edits and model.variant != "base"):
        fix = "Train for the base model of its family; what it learns often works with its relatives too."
        raise Error(f"{model.name} is a {model.variant} model, which this cannot train for.", fix)


def read(pipe: Pipeline, tuning: Tuning, images: str, prompt: str | None, setting: str = "prompt") -> list[Picture]:
    """The pictures of a folder. Raises for what is wrong with them, with the settings or with the model. setting: the
    name of the prompt's, for messages."""
    tuning.check()
    check(pipe.description, tuning)
    size, multiple = tuning.size_for(pipe.description), pipe.description.multiple
    if size % multiple or not multiple <= size <= MAX_EDGE:
        usual = pipe.description.defaults.size
        raise Error(f"Size {size} is not a multiple of {multiple} up to {MAX_EDGE}.", f"Use `size={usual}`.")
    return folders.read(foreign.path(images), prompt, size, multiple, tuning.crop, setting)


def encode(pipe: Pipeline, chosen: list[Picture], tuning: Tuning, args: Callable[[str, Request], dict]) -> Data:
    """Encode pictures once; the VAE is released. args: what a step reads of a caption and of sizes."""
    model, data = pipe.description, Data([], [], [])
    request = drawn(pipe, tuning)
    vae = pipe.networks.get("vae")
    for picture in chosen:
        image = images.fit(images.read(picture.path), picture.width, picture.height)
        sized = replace(request, width=picture.width, height=picture.height)
        for shown in (image, ImageOps.mirror(image)) if tuning.flip else (image,):
            mean, logvar = vae.encode(mx.array(images.to_pixels(shown))[None])
            latents = [of.astype(mx.float32) for of in (mean, vae.spread(logvar))]
            data.add(*latents, args(picture.caption, sized))
            if not mx.isfinite(latents[0]).all().item():
                raise model.not_finite()
            mx.eval(latents, data.args[-1])
    pipe.networks.release("vae")
    return data


def encoded(
    pipe: Pipeline, tuning: Tuning, sets: list[list[Picture]], out: Path, captions: texts.Captions | None
) -> list[Data]:
    """The sets of pictures, with their captions. A run that continues reads them from its folder. captions: if the text
    encoders are trained, and read them in each step."""
    model, request = pipe.description, drawn(pipe, tuning)
    files = [out / RUN / f"encoded-{i}.safetensors" for i in range(len(sets))]
    prior, dropout = getattr(tuning, "prior", 1.0), getattr(tuning, "caption_dropout", 0.0)
    plain = batches.Reads({k: v.shape[-1:] for k, v in batches.read(model, 1).items()}, None)
    reads = plain if captions is None else captions.reads

    def held() -> list[Data | None]:
        how = zip(files, (1.0, prior), sets, strict=False)
        return [batches.stored(file, w, dropout, _shapes(model, tuning, s), reads) for file, w, s in how]

    found = held()
    if all(found):
        return found
    said = [p.caption for pictures in sets for p in pictures] + [""] * bool(dropout)
    args = _texts(pipe, request, said) if captions is None else captions.arguments
    for file, pictures in zip(files, sets, strict=True):
        data = encode(pipe, pictures, tuning, args)
        if dropout:
            data.empty.update({k: v for k, v in args("", request).items() if k != "time_ids"})
        batches.store(file, data)
    return held()


def _shapes(model: Description, tuning: Tuning, pictures: list[Picture]) -> list[tuple[int, ...]]:
    """Of the latents of a set, in the order of `encode`."""
    times = 2 if tuning.flip else 1
    sizes = [(p.height // model.factor, p.width // model.factor) for p in pictures for _ in range(times)]
    return [(1, *size, model.latent_channels) for size in sizes]


def _texts(pipe: Pipeline, request: Request, said: list[str]) -> Callable[[str, Request], dict]:
    """What a step reads of a caption and of sizes. Each caption is read once; the encoders are released."""
    model, captions = pipe.description, list(dict.fromkeys(said))
    found = dict(zip(captions, pipe.read(captions, request, model.reads_t5(request)), strict=True))
    return lambda caption, request: conditioning.arguments(model.text, found[caption], request, negative=False)


def drawn(pipe: Pipeline, tuning: Tuning) -> Request:
    """The resolved request of a picture as it is trained."""
    size = tuning.size_for(pipe.description)
    return pipe.resolve(Request("", width=size, height=size))


def notes(kind: str, pipe: Pipeline, tuning: Tuning, sets: list[list[Picture]]) -> dict:
    """What makes a training what it is, as JSON has it."""
    model, seen = pipe.description, [folders.fingerprint(s) for s in sets]
    start = {"kind": kind, "model": model.name, "recipe": str(model.recipe), "pictures": seen}
    values = json.loads(json.dumps(start | asdict(tuning)))
    del values["low_memory"]  # which changes nothing but rounding: a run that was too large can go on with it
    return values


class LoraRun:
    """A training of a LoRA: made, and checked, before the work."""

    def __init__(self, pipe: Pipeline, tuning: LoraTuning, out: Path, others: Machines | None = None):
        self.pipe, self.tuning, self.out, self.others = pipe, tuning, out, others
        self.sets = [read(pipe, tuning, tuning.images, tuning.prompt)]
        if tuning.class_images is not None:
            self.sets.append(read(pipe, tuning, tuning.class_images, tuning.class_prompt, "class_prompt"))
        model, denoiser = pipe.description, pipe.description.family.denoiser
        pipe.networks.adapt([])  # what it drew with before does not count
        self.networks = {n: pipe.networks.open(n) for n in (denoiser, *model.text.clip * tuning.text_encoder)}
        self.made = {name: attach(net, model, name, tuning) for name, net in self.networks.items()}
        self.net, *encoders = self.networks.values()
        self.trained, self.captions = self.net, None
        if encoders:
            toks = texts.tokenizers(model, pipe.networks.folder)
            chosen = [p for s in self.sets for p in s]
            self.captions = texts.Captions(model, toks, chosen, drawn(pipe, tuning).clip_skip)
            self.trained = texts.Reader(self.net, dict(zip(model.text.clip, encoders, strict=True)))
        self.notes = notes("lora", pipe, tuning, self.sets)
        if others is not None:
            agree(self.notes, others)
        same_run(out, self.notes, longer=True)

    @property
    def file(self) -> Path:
        return self.out / lora.FILE

    @property
    def flag(self) -> str:
        """How the command line takes it."""
        return f"--lora {self.out}"

    def lines(self) -> list[str]:
        """What will be trained, for people."""
        numbers = sum(v.size for _, v in tree_flatten(self.trained.trainable_parameters()))
        layers = " and ".join(f"{len(made)} layers of {name}" for name, made in self.made.items())
        return [told(self.sets), f"{layers}, rank {self.tuning.rank}: {numbers / 1e6:.3g} million numbers."]

    def sample(self, prompts: Sequence[str], step: int) -> list[Path]:
        """Draw pictures with what is trained so far."""
        return samples(self.pipe, self.tuning, self.networks, prompts, step, self.out)

    def steps(self) -> Iterator[Report]:
        """Train, step by step. The file is written whenever the state is saved, and in the end."""
        loss = batches.loss if self.captions is None else self.captions.loss
        with alone(self.out):
            data = self.encoded()
            yield from trained(self.trained, loss, data, self.pipe, self.tuning, self.out, self.export, self.others)

    def encoded(self) -> list[Data]:
        """The pictures and those of the class, with their captions."""
        return encoded(self.pipe, self.tuning, self.sets, self.out, self.captions)

    def export(self) -> Path:
        return lora.export(self.made, self.pipe.description, self.notes, self.out)


def attach(net: nn.Module, model: Description, name: str, tuning: LoraTuning) -> dict[str, lora.LowRank]:
    """Put changes beside the layers of a component."""
    encoders = list(model.text.clip)
    layers = lora.OF_TEXT if name in encoders else tuning.layers or model.family.trained
    seed = [tuning.seed, 107 + 100 * encoders.index(name) if name in encoders else 7]
    alpha = tuning.rank if tuning.alpha is None else tuning.alpha
    return lora.attach(net, model.name, adapters.layers(model, name), layers, tuning.rank, alpha, seed)


def agree(notes: dict, others: Machines) -> None:
    """Raise unless all machines train the same: the settings are those of one command, but the files may differ."""
    check_shares(notes["accumulate"], others.size)
    if others.rank == 0:
        others.greet({"notes": notes})
        others.watch()
        return
    first = others.greeted()["notes"]
    changed = [name for name in notes if notes[name] != first.get(name)]
    if changed:
        fix = "Put the same pictures and captions on all machines, and give a `dtype` if their chips differ."
        raise Error(f"It would train with other {', '.join(changed)} than the first machine.", fix)


def told(sets: Sequence[Sequence[Picture]]) -> str:
    """How many pictures there are, and in which sizes, for people."""
    counts = [Counter(f"{p.width}x{p.height}" for p in pictures) for pictures in sets]
    parts = [f"{len(s)} picture{'s' * (len(s) > 1)} ({', '.join(c)})" for s, c in zip(sets, counts, strict=True)]
    return " and of the class ".join(parts) + "."


def samples(
    pipe: Pipeline, tuning: Tuning, networks: dict, prompts: Sequence[str], step: int, out: Path, **settings
) -> list[Path]:
    """Draw pictures of prompts into the folder of a run, in its size, with the networks that are trained. samples.png
    shows those of all steps, one below the other."""
    files, size = [], tuning.size_for(pipe.description)
    try:
        for i, prompt in enumerate(prompts):
            pipe.hold(networks)  # for each, since an encoder is released when it has read
            drawn = pipe(prompt, seed=0, width=size, height=size, **settings)
            files += drawn.save(out / f"sample-{step:06}-{i + 1}.png")
    finally:  # also when it is stopped, or the next picture would be theirs
        pipe.release(networks)
    sheet(sorted(out.glob("sample-??????-*.png"))[-_SHOWN * len(prompts) :], len(prompts), out / "samples.png")
    return files


def sheet(files: Sequence[Path], columns: int, file: Path) -> None:
    """Write pictures in rows of so many as one."""
    shown = [ImageOps.contain(images.read(f), (_CELL, _CELL)) for f in files]
    rows = -(-len(shown) // columns)
    whole = Image.new("RGB", (columns * (_CELL + 4) - 4, rows * (_CELL + 4) - 4), "white")
    for i, picture in enumerate(shown):
        whole.paste(picture, (i % columns * (_CELL + 4), i // columns * (_CELL + 4)))
    write_picture(file, whole, metadata.DRAWN)


def trained(
    net: nn.Module,
    loss: Callable,
    sets: Sequence[Data],
    pipe: Pipeline,
    tuning: Tuning,
    out: Path,
    export: Callable[[], Path],
    others: Machines | None = None,
) -> Iterator[Report]:
    """The steps of a training. What was trained is written whenever the state is saved, and when the run stops."""
    aim = Objective(pipe.description)

    if tuning.low_memory:
        batches.recompute(net)

    def batch(number: int) -> tuple[list[Part]]:
        rng = np.random.default_rng([tuning.seed, 11, number])
        return ([aim.part(data, rng, tuning.batch) for data in sets],)

    plan = Plan(
        tuning.steps,
        tuning.rate,
        "adamw",
        tuning.warmup,
        decay=tuning.decay_after,
        clip=1.0,
        ema=0.0,
        save_every=tuning.save_every,
        weight_decay=1e-2,
        accumulate=tuning.accumulate,
    )
    try:
        for report in fit(net, loss, batch, plan, out / RUN, others):
            if report.step % tuning.save_every == 0:
                export()
            yield report
    except (GeneratorExit, KeyboardInterrupt, SystemExit):
        export()
        raise
    export()
