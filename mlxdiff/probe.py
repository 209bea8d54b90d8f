"""Shows the inside of a run, in numpy: the network's input and output at every step, the predictions for the prompt and
for the negative prompt, where in the picture each word is read, the tokens of a prompt, the latents of a picture. The
lessons use it; `pipeline.stream` does the drawing."""

import json
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from . import conditioning, images, samplers, schedules, surgery, tokenizers
from .errors import Error
from .families.base import tokenizer_of
from .models.layers import split_heads
from .pipeline import Event, Pipeline
from .request import Request

Look = Callable[[np.ndarray, float], np.ndarray]


class Step(NamedTuple):
    """One step, as the sampler sees it: x = x0 + sigma * noise. The network predicts one of them: the noise or x0."""

    step: int  # 1-based, of `steps`
    steps: int
    sigma: float  # the noise level of x, before the step
    x: np.ndarray  # (B, h, w, c), before the step
    x0: np.ndarray  # the clean latents predicted from it
    seconds: float

    @property
    def noise(self) -> np.ndarray:
        """The predicted noise: the part of x that is not x0."""
        return (self.x - self.x0) / self.sigma


def trace(pipe: Pipeline, prompt: str | Request, **settings) -> Iterator[Step]:
    """The steps of a run of `pipe.stream`. It stops before the picture is decoded."""
    x = sigma = None
    for event in pipe.stream(prompt, **settings):
        if event.stage == "decode":
            return
        if event.x0 is not None:
            yield Step(event.step, event.steps, sigma, x, event.x0, event.seconds)
        if event.x is not None:
            x, sigma = event.x, event.sigma


def noise_of(pipe: Pipeline, seed: int, **settings) -> np.ndarray:
    """The standard noise (B, h, w, c) that a run of this seed starts from."""
    request = pipe.resolve("", seed=seed, **settings)
    return np.array(pipe.noise(request)())


def from_noise(pipe: Pipeline, noise: np.ndarray, prompt: str | Request, **settings) -> Iterator[Event]:
    """`pipe.stream` from given standard noise (B, h, w, c), one picture for each. Only noisy samplers use the seed."""
    request = pipe.resolve(prompt, **settings, count=len(noise))
    shape = (request.count, *pipe.description.latent_size(request), pipe.description.latent_channels)
    if noise.shape != shape:
        raise Error(f"This picture starts from noise of shape {shape}, not {noise.shape}.", "Give (B, h, w, c).")
    yield from pipe.run(request, noise.astype(np.float32))


def sides(pipe: Pipeline, prompt: str | Request, **settings) -> tuple[Look, Look]:
    """The two predictions that guidance combines: the clean latents for the negative prompt alone and for the prompt
    alone, each as a function of (x, sigma). The request must use guidance."""
    request = pipe.resolve(prompt, **settings)
    if pipe.description.passes(request) == 1:
        raise Error("Without guidance there is one prediction, not two.", "Ask for guidance above 1.")
    if pipe.under(request).description.row.reads:
        raise Error(f"{pipe.name} also reads pictures, which are not known here.", "Look at a model that reads none.")
    if request.references:
        raise Error("The two predictions are those of the prompts alone.", "Leave `references` out.")
    schedule = pipe.description.noise_levels(request)
    sigmas = schedules.sigmas(schedule, request.schedule, request.steps)
    visits = samplers.SAMPLERS[request.sampler].visits(sigmas)
    negative, positive = _value(pipe.texts(request))

    def by(text) -> Look:
        denoise = _value(pipe.denoiser(request, schedule, visits, [text], sigmas))

        def look(x: np.ndarray, sigma: float) -> np.ndarray:
            x0 = denoise(mx.array(x), sigma)
            mx.eval(x0)
            return np.array(x0)

        return look

    return by(negative), by(positive)


# --- where in the picture each word is read


class Attention(NamedTuple):
    step: Step
    maps: np.ndarray  # (N, h, w): each token's share of the attention of a place; the shares of all tokens sum to 1


def attention(pipe: Pipeline, prompt: str | Request, **settings) -> Iterator[Attention]:
    """The steps of `trace` with the cross-attention of a U-Net: the mean over layers, heads and pictures, for the
    prompt alone, in the last call of the network in each step. N counts the tokens of all chunks, see `tokens`."""
    for step, seen in _watched_steps(pipe, prompt, "attn2", **settings):
        h, w = step.x.shape[1:3]
        yield Attention(step, np.mean([_enlarged(maps, h, w) for maps in seen], axis=0))


class Gaze(NamedTuple):
    step: Step
    maps: dict[str, np.ndarray]  # block -> (h, w, h, w) at the block's level: each place's attention to all places


def gaze(pipe: Pipeline, prompt: str | Request, **settings) -> Iterator[Gaze]:
    """Like `attention`, but the self-attention of each block: the mean over its layers, heads and pictures. The blocks
    are named as in `surgery.blocks`."""
    for step, seen in _watched_steps(pipe, prompt, "attn1", **settings):
        h, w = step.x.shape[1:3]
        rest, maps = iter(seen), {}
        for name, block in surgery.blocks(pipe.networks.get("unet")).items():
            own = [next(rest) for a in block.attentions for _ in a.transformer_blocks]
            if own:
                height, width = _level(len(own[0]), h, w)
                maps[name] = np.mean(own, axis=0).reshape(height, width, height, width)
        yield Gaze(step, maps)


def _watched_steps(
    pipe: Pipeline, prompt: str | Request, which: str, **settings
) -> Iterator[tuple[Step, list[np.ndarray]]]:
    """The steps of `trace`, each with what `_watched` collects in it."""
    if pipe.description.family.denoiser != "unet" or pipe.refiner is not None:
        raise Error(f"{pipe.name} does not draw with one U-Net.", "Look at the attention of a U-Net without a refiner.")
    request = pipe.resolve(prompt, **settings)
    steps, net = trace(pipe, request), pipe.networks.get("unet")
    while True:
        with _watched(net, request.count, which) as seen:  # restored before anyone else can draw with it
            step = next(steps, None)
        if step is None:
            return
        yield step, [np.array(seen[i]) for i in sorted(seen)]


class _Watched:
    """Wraps an attention: it returns the same output, and reports its softmax."""

    def __init__(self, layer: nn.Module, report: Callable[[mx.array], None]):
        self.layer, self.kv, self.report = layer, layer.kv, report

    def __call__(self, x: mx.array, kv: tuple[mx.array, mx.array]) -> mx.array:
        q = split_heads(self.layer.to_q(x), self.layer.heads).astype(mx.float32)  # (B, heads, hw, d)
        k = kv[0][..., : q.shape[-1]].astype(mx.float32)  # without the zeros that pad it
        self.report(mx.softmax(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]), axis=-1))
        return self.layer(x, kv)


@contextmanager
def _watched(net: nn.Module, count: int, which: str) -> Iterator[dict[int, mx.array]]:
    """While the context lasts, collects each layer's last softmax, (hw, N): the mean over its heads and over the last
    `count` samples of the batch. The prompt's half comes last in a batch; of two separate passes its pass comes
    last. which: attn1, the self-attention, or attn2, the cross-attention."""
    layers = [layer for block in net.blocks() for a in block.attentions for layer in a.transformer_blocks]
    originals, seen = [layer[which] for layer in layers], {}

    def keep(i: int) -> Callable[[mx.array], None]:
        return lambda softmax: seen.update({i: softmax[-count:].mean((0, 1))})

    try:
        for i, layer in enumerate(layers):
            layer[which] = _Watched(originals[i], keep(i))
        yield seen
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer[which] = original


def _enlarged(maps: np.ndarray, h: int, w: int) -> np.ndarray:
    """Maps (hw, N) at one level of the network -> (N, h, w) at the size of the latents."""
    planes = np.ascontiguousarray(maps.T).reshape(-1, *_level(len(maps), h, w))
    return np.stack([Image.fromarray(plane).resize((w, h), Image.Resampling.BILINEAR) for plane in planes])


def _level(places: int, h: int, w: int) -> tuple[int, int]:
    """The size of the map that has so many places: each level of the network halves both edges of the latents."""
    while h * w > places:
        h, w = -(-h // 2), -(-w // 2)
    return h, w


# --- the text


class Token(NamedTuple):
    id: int
    piece: str  # as the vocabulary spells it: </w> marks the end of a word
    weight: float
    role: str  # begin, text, end or padding


def _clip(pipe: Pipeline) -> str:
    """The first text encoder, which is a CLIP: only CLIP's tokens are shown."""
    if not pipe.description.text.clip:
        raise Error(f"{pipe.name} reads no prompt with CLIP.", "Use a model of Stable Diffusion to see its tokens.")
    return pipe.description.text.clip[0]


def tokens(pipe: Pipeline, prompt: str | Request, **settings) -> list[list[Token]]:
    """The prompt's chunks as the first text encoder reads them, with the empty chunks that this run adds."""
    request = pipe.resolve(prompt, **settings)
    negative = (request.negative or "") if pipe.description.passes(request) == 2 else ""
    text_plan, first = pipe.description.text, _clip(pipe)
    toks = conditioning.load_tokenizers(text_plan, pipe.networks.folder, t5=False)
    words = conditioning.tokenize(text_plan, toks, [request.prompt, negative])
    return [_described(toks[first], chunk) for chunk in words[first].chunks[0]]


def _described(tokenizer: tokenizers.ClipTokenizer, chunk: tokenizers.Chunk) -> list[Token]:
    end = chunk.ids.index(tokenizer.eos)
    roles = ["begin", *["text"] * (end - 1), "end", *["padding"] * (len(chunk.ids) - end - 1)]
    pieces = map(tokenizer.backend.id_to_token, chunk.ids)
    return [Token(*parts) for parts in zip(chunk.ids, pieces, chunk.weights, roles, strict=True)]


def merges(pipe: Pipeline, prompt: str) -> list[list[list[str]]]:
    """How the letters of each word of a prompt become tokens of the first text encoder: the letters, then the pieces
    after each merge. Of all neighbouring pairs, the pair that was learned first is merged (Sennrich et al. 2016)."""
    backend = tokenizers.load(pipe.networks.folder / tokenizer_of(_clip(pipe))).backend
    learned = json.loads(backend.to_str())["model"]["merges"]
    rank = {tuple(pair): k for k, pair in enumerate(learned)}
    text = " ".join(text for text, weight in tokenizers.parse_weights(prompt) if weight is not None)
    grown = []
    for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        states = [parts]
        while known := [pair for pair in pairwise(parts) if pair in rank]:
            parts = _joined(parts, min(known, key=rank.__getitem__))
            states.append(parts)
        grown.append(states)
    return grown


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """The parts with the pair joined wherever it occurs."""
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


# --- pictures


def encode(pipe: Pipeline, image: Image.Image) -> np.ndarray:
    """A picture -> its latents (1, h, w, c): the mean, without the VAE's noise. The model must support its edges."""
    mean, _ = pipe.networks.get("vae").encode(mx.array(images.to_pixels(image.convert("RGB")))[None])
    return np.array(mean.astype(mx.float32))


def _value(events: Generator):
    """The return value of a stage; its events are dropped."""
    while True:
        try:
            next(events)
        except StopIteration as e:
            return e.value
