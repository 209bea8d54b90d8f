"""How much memory a picture takes at its peak, known before anything is downloaded or read: weights by their shapes and
their recipe, activations by figures measured on the published networks. A preview's tiny decoder is left out.

Figures are numbers held at once beside the weights. On a CPU, where they were measured, a convolution unfolds its map
to nine times its size, and MLX begins about ten operations before the first of them ends. On Metal, which was not at
hand, nothing is unfolded, and MLX waits where memory is short: counted are the input, its norm, Winograd's two maps and
the output of the widest convolution, and for the U-Net the maps that wait for the way up."""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import recipe
from .description import Description
from .families import FAMILIES
from .models import build, t5
from .request import Request

SURE = 1.15  # by how much the estimate may be above the truth (tests hold it to that); only beyond is a run refused
TILE = 64  # latents a side of a tile under low_memory: 512 pixels, the size every VAE was trained at or above

_DECODER = {False: 84, True: 12.5}  # of a pixel, per channel of the first level; False: CPU, True: GPU
_ENCODER = {False: 58, True: 6.6}  # the same
_T5 = 10, 3  # of a token, per hidden width; and times the scores of a layer


class Peaks(NamedTuple):
    """Bytes, stage by stage."""

    encode: int  # of the prompt, or of the start picture
    denoise: int
    decode: int


@dataclass(frozen=True)
class Workload:
    """A picture and what draws it, as far as memory goes."""

    model: Description
    request: Request  # resolved
    low_memory: bool = False
    refiner: Description | None = None  # what finishes it

    def but(self, bits: int | str | None = None, **settings) -> "Workload":
        """The same with another setting: of the weights, of how it is drawn, or of the request."""
        own = {k: settings.pop(k) for k in ("low_memory", "refiner") if k in settings}
        changed = replace(self, request=replace(self.request, **settings), **own)
        if bits is None:
            return changed
        models = {"model": changed.model, "refiner": changed.refiner}
        fewer = {k: replace(m, recipe=replace(m.recipe, bits=bits)) for k, m in models.items() if m is not None}
        return replace(changed, **fewer)


def peak(workload: Workload, gpu: bool) -> int:
    return max(peaks(workload, gpu))


def peaks(workload: Workload, gpu: bool) -> Peaks:
    """Of a first picture: one text encoder after the other; the denoiser, which stays, and its refiner, which does not;
    and the VAE, which stays once it has encoded a picture."""
    model, request, low = workload.model, workload.request, workload.low_memory
    models = [model] if workload.refiner is None else [model, workload.refiner]
    vae, channels = _weights(model, "vae").held, model.components["vae"].channels
    pixels = request.width * request.height
    pixels = min(pixels, (TILE * model.factor) ** 2) if low else pixels
    numbers = pixels * channels[0] * _item(model, "vae")
    encode = max(_reads(m, request) for m in models)
    if request.image is not None:
        encode = max(encode, vae + _ENCODER[gpu] * numbers)

    kept, denoise, stays = vae if request.image is not None and not low else 0, 0, []
    for m in models:
        own, moves = _draws(m, request, low, gpu)
        stays.append(own)
        denoise = max(denoise, kept + own + moves)
        kept += 0 if low else own
    decode = vae + _DECODER[gpu] * numbers + (0 if low else stays[0])
    return Peaks(int(encode), int(denoise), int(decode))


def _reads(model: Description, request: Request) -> float:
    """Bytes of the largest text encoder at work."""
    encoders = [*model.text.clip, *([model.text.t5] if model.reads_t5(request) else [])]
    return max(_weights(model, name).held + _reading(model, name) for name in encoders)


def _reading(model: Description, name: str) -> int:
    """Activations of a text encoder; CLIP's are too few to count."""
    config, (wide, scores), tokens = model.components[name], _T5, model.text.t5_tokens
    if not isinstance(config, t5.Config):
        return 0
    return tokens * (wide * config.hidden + scores * config.heads * tokens) * _item(model, name)


def _draws(model: Description, request: Request, low: bool, gpu: bool) -> tuple[float, float]:
    """Bytes of the denoiser and what it prepares, which stay, and those that pass through it in a step."""
    name, text, passes = model.family.denoiser, model.text.tokens, model.passes(request)
    own, samples, item = _weights(model, name), request.count * passes, _item(model, name)
    prepared = (own.of_step * request.steps + own.of_word * text) * samples
    if passes == 2 and not low:  # both halves as one batch, and the prompt alone for unguided steps
        prepared += prepared // 2
    latents = request.width * request.height // model.factor**2
    numbers = model.family.activations(model.net, latents, text, gpu) * (request.count if low else samples)
    return own.held + prepared * item, numbers * item


class Weights(NamedTuple):
    held: int  # bytes, once the network computes
    of_step: int  # numbers made beforehand for each step of each sample: modulations
    of_word: int  # the same for each word of each sample: keys and values


def _weights(model: Description, name: str) -> Weights:
    return _counted(model.family.name, name, model.components[name], model.recipe)


@cache
def _counted(family_name: str, name: str, config: build.Config, how: recipe.Recipe) -> Weights:
    family = FAMILIES[family_name]  # by name: its rows hold dicts, by which nothing can be cached
    module, before, after = _built(config)
    item = recipe.DTYPES[recipe.component_dtype(family, name, how.dtype)].size
    layers, held = recipe.plan(family, name, module, how.bits), 0
    for parameter in after:
        path, _, leaf = parameter.rpartition(".")
        if leaf == "weight" and path in layers:
            held += _quantized(before[parameter], tuple(layers[path].items()), how.dtype)
        else:
            held += math.prod(before[parameter]) * item
    of_step = sum(math.prod(v) for k, v in before.items() if k not in after and k.endswith(".bias"))
    of_word = sum(before[k][0] for k in after if k.endswith(("attn2.to_k.weight", "attn2.to_v.weight")))
    return Weights(held, of_step, of_word)


@cache
def _built(config: build.Config) -> tuple[nn.Module, dict[str, tuple], list[str]]:
    """The network as it computes, its parameters' shapes before, and which of these it then holds. Nothing is
    allocated."""
    module = build.build(config)
    before = {k: tuple(v.shape) for k, v in tree_flatten(module.parameters())}
    if hasattr(module, "release_modulation"):
        module.release_modulation()
    return module, before, [k for k, _ in tree_flatten(module.parameters())]


@cache
def _quantized(shape: tuple[int, ...], how: tuple, dtype: str) -> int:
    """Bytes that MLX makes of a matrix."""
    return sum(part.nbytes for part in mx.quantize(mx.zeros(shape, recipe.DTYPES[dtype]), **dict(how)))


def _item(model: Description, name: str) -> int:
    """Bytes of a number that the component computes with."""
    return recipe.DTYPES[recipe.component_dtype(model.family, name, model.recipe.dtype)].size
