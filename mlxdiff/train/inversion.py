"""Teaches a model a word: only the embeddings of its new tokens are trained (textual inversion; Gal et al. 2022)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import conditioning, values
from ..adapters import Word
from ..description import Description
from ..errors import Error
from ..pipeline import Pipeline
from . import lora, texts, tune
from .batches import Data
from .fit import Report, alone, same_run

FILE = "learned_embeds.safetensors"
MOST_VECTORS = 32
PROMPT = "a photo of {}"


@dataclass(frozen=True, kw_only=True)
class WordTuning(tune.Tuning):
    """Of a word."""

    word: str
    initial: str  # known words that it begins as
    vectors: int = 1  # how many tokens it has
    rate: float = 5e-4

    def check(self) -> None:
        super().check()
        values.whole("vectors", self.vectors, 1, MOST_VECTORS)


class Taught(nn.Module):
    """A frozen embedding and new rows behind its own, which are trained in float32."""

    def __init__(self, base: nn.Embedding, rows: mx.array):
        super().__init__()
        self.base, self.rows = base, rows

    @property
    def weight(self) -> mx.array:
        return mx.concatenate([self.base.weight, self.rows.astype(self.base.weight.dtype)])

    def __call__(self, ids: mx.array) -> mx.array:
        n = self.base.weight.shape[0]
        known, new = self.base(mx.minimum(ids, n - 1)), self.rows[mx.maximum(ids - n, 0)]
        return mx.where(ids[..., None] < n, known, new.astype(known.dtype))


def check(model: Description) -> None:
    """Raise for a model that is taught no words."""
    if model.flow:
        problem = f"{model.name} is {model.family.title}, whose text encoders are taught no words."
        raise Error(problem, "Train a LoRA with a trigger word: `mlxdiff train lora`.")


def attach(net: nn.Module, model: Description, name: str, tuning: WordTuning) -> None:
    """Freeze a component; an encoder gets the rows of a word, which are zeros."""
    if name in model.text.clip:
        base = net.embeddings.token_embedding
        net.embeddings.token_embedding = Taught(base, mx.zeros((tuning.vectors, model.components[name].width)))
    net.freeze()
    if name in model.text.clip:
        net.embeddings.token_embedding.unfreeze(keys="rows", recurse=False)


class WordRun:
    """A training of a word: made, and checked, before the work."""

    def __init__(self, pipe: Pipeline, tuning: WordTuning, out: Path):
        self.pipe, self.tuning, self.out = pipe, tuning, out
        model, plan = pipe.description, pipe.description.text
        check(model)
        prompt = PROMPT.format(tuning.word) if tuning.prompt is None else tuning.prompt
        self.pictures = tune.read(pipe, tuning, tuning.images, prompt)
        lacks = next((p for p in self.pictures if tuning.word not in p.caption), None)
        if lacks is not None:
            problem = f"The caption of {lacks.path} has no {tuning.word}: {lacks.caption!r:.80}."
            raise Error(problem, "Put the word into it.")
        pipe.networks.adapt([])  # what it drew with before does not count
        toks, encoders = texts.tokenizers(model, pipe.networks.folder), {}
        for name in plan.clip:
            encoder = pipe.networks.open(name)
            encoder.embeddings.token_embedding = taught(encoder, toks[name].ids(tuning.initial), tuning)
            encoders[name] = encoder
        self.encoders = encoders
        try:
            conditioning.teach_tokenizers(toks, [self.word], model.components)
        except Error as e:  # it would name the setting of a run
            raise Error(e.problem, "Give a `word` without spaces that is not known yet.") from None
        self.captions = texts.Captions(model, toks, self.pictures, tune.drawn(pipe, tuning).clip_skip)
        self.net = pipe.networks.open(model.family.denoiser)
        self.reader = texts.Reader(self.net, encoders)
        self.reader.freeze()
        for encoder in encoders.values():
            encoder.embeddings.token_embedding.unfreeze(keys="rows", recurse=False)
        self.notes = tune.notes("embedding", pipe, tuning, [self.pictures])
        same_run(out, self.notes, longer=True)

    @property
    def word(self) -> Word:
        """The word as it is trained so far."""
        return Word(self.tuning.word, {n: e.embeddings.token_embedding.rows for n, e in self.encoders.items()})

    @property
    def file(self) -> Path:
        return self.out / FILE

    @property
    def flag(self) -> str:
        """How the command line takes it."""
        return f"--embedding '{self.out}={self.tuning.word}'"

    def lines(self) -> list[str]:
        """What will be trained, for people."""
        sizes = ", ".join(f"{v.shape[0]} x {v.shape[1]} numbers of {n}" for n, v in self.word.vectors.items())
        return [tune.told([self.pictures]), f"The word {self.tuning.word}: {sizes}."]

    def steps(self) -> Iterator[Report]:
        """Train, step by step. The file is written whenever the state is saved, and in the end."""
        with alone(self.out):
            loss, data = self.captions.loss, self.encoded()
            yield from tune.trained(self.reader, loss, data, self.pipe, self.tuning, self.out, self.export)

    def encoded(self) -> list[Data]:
        """The pictures, with the numbers of their captions. A run that continues reads them from its folder."""
        return tune.encoded(self.pipe, self.tuning, [self.pictures], self.out, self.captions)

    def sample(self, prompts: Sequence[str], step: int) -> list[Path]:
        """Draw pictures with what is trained so far."""
        given = f"{self.export()}={self.tuning.word}"
        networks = {self.pipe.description.family.denoiser: self.net}
        return tune.samples(self.pipe, self.tuning, networks, prompts, step, self.out, embeddings=[given])

    def export(self) -> Path:
        """Write the word as a file that diffusers, A1111, ComfyUI and mlxdiff read."""
        values = list(self.word.vectors.values())
        keys = (self.tuning.word,) if len(values) == 1 else ("clip_l", "clip_g")
        notes = self.notes | {"trigger": self.tuning.word}
        return lora.write(self.file, dict(zip(keys, values, strict=True)), {"format": "pt"}, notes)


def taught(encoder: nn.Module, ids: list[int], tuning: WordTuning) -> Taught:
    """The embedding of a text encoder with new rows, which begin as those of known words; one row begins as their
    mean."""
    base = encoder.embeddings.token_embedding
    if not ids:
        raise Error("The initial words are empty.", "Give a word that is close to the thing: `initial=TEXT`.")
    rows = base.weight[mx.array(ids)].astype(mx.float32)
    rows = rows.mean(0, keepdims=True) if tuning.vectors == 1 else rows[mx.arange(tuning.vectors) % len(ids)]
    if tuning.vectors > len(ids):  # rows that begin equal would stay equal
        noise = np.random.default_rng([tuning.seed, 13]).standard_normal(rows.shape).astype(np.float32)
        rows = rows + 0.1 * mx.std(base.weight.astype(mx.float32)) * mx.array(noise)
    return Taught(base, rows)
