"""Estimates the peak memory of a picture before anything is downloaded or read. Weights follow from their shapes and
their recipe, activations from figures that were measured on the published networks. The tiny decoder for previews is
not counted.

A figure says how many numbers are held at once besides the weights. On a CPU, where the figures were measured, a
convolution unfolds its map to nine times its size, and MLX begins about ten operations before the first of them ends.
On Metal, which was not available, nothing is unfolded, and MLX waits where memory is short. Those figures count the
input, its norm, Winograd's two maps and the output of the widest convolution; for the U-Net they also count the maps
that wait for the way up."""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import recipe
from .adapters import Adapter
from .description import Description
from .families import FAMILIES
from .models import build
from .models.vae import factor
from .recipe import BITS, Recipe
from .request import Request

SURE = 1.15  # the estimate may exceed the truth by this factor (tests check it); a run is refused only beyond it
TILE = 64  # latents along a tile's edge under low_memory: 512 pixels; every VAE was trained at this size or above

_DECODER = {False: 84, True: 12.5}  # per pixel and channel of the first level; False: CPU, True: GPU
_ENCODER = {False: 58, True: 6.6}  # the same
_UPSCALER = {False: 11100, True: 900}  # bytes per pixel of a tile: in float32 on a CPU, in float16 on a GPU
# Text encoders: per token and hidden width; and a factor of one layer's attention scores. CLIP's are too few to count.
_READ = {"clip": (0, 0), "t5": (10, 3), "qwen3": (7, 1.3), "vision": (10, 3)}


class Peaks(NamedTuple):
    """Bytes of each stage."""

    encode: int  # the prompt, or the start image
    denoise: int
    decode: int


class Reader(NamedTuple):
    """What reads a reference picture."""

    networks: tuple[build.Config, ...] | int  # a vision model and an adapter, or their bytes in 16 bits
    tokens: int  # that they make of it


@dataclass(frozen=True)
class Workload:
    """A picture and the models that draw it: all that the estimate depends on."""

    model: Description
    request: Request  # resolved
    low_memory: bool = False
    refiner: Description | None = None  # the model that finishes the picture
    pictures: tuple[tuple[int, int], ...] = ()  # width and height of each picture of the request
    beside: tuple[build.Config | int, ...] = ()  # the networks that guide it, or their bytes in 16 bits
    readers: tuple[Reader, ...] = ()  # of its references
    loras: tuple[Adapter | int, ...] = ()  # those that change the model, or their bytes in 16 bits

    @property
    def held(self) -> int:
        """Bytes of the LoRAs themselves, which are held in float32."""
        return sum(2 * lora if isinstance(lora, int) else lora.nbytes for lora in self.loras)

    def but(self, bits: int | str | None = None, **settings) -> "Workload":
        """The same workload with other settings: of the weights, of the run, or of the request."""
        of_run = {k: settings.pop(k) for k in ("low_memory", "refiner") if k in settings}
        changed = replace(self, request=replace(self.request, **settings), **of_run)
        if bits is None:
            return changed
        models = {"model": changed.model, "refiner": changed.refiner}
        fewer = {k: replace(m, recipe=Recipe(m.recipe.dtype, bits)) for k, m in models.items() if m is not None}
        return replace(changed, **fewer)


def peak(workload: Workload, gpu: bool) -> int:
    return max(peaks(workload, gpu))


def peaks(workload: Workload, gpu: bool) -> Peaks:
    """The peaks of a model's first picture. The text encoders are held one after the other. The denoiser stays, its
    refiner does not, and the VAE stays once it has encoded a start image."""
    if workload.request.hires is not None:
        return _of_two_passes(workload, gpu)
    model, request, low = workload.model, workload.request, workload.low_memory
    models = [model] if workload.refiner is None else [model, workload.refiner]
    vae, config = _weights(model, "vae").held, model.components["vae"]
    drawn = request.width * request.height
    references = [math.prod(cut.size) for cut in model.cuts(workload.pictures)]
    wider = 1 if config.decoder_channels is None else config.decoder_channels[0] / config.channels[0]

    encode = max(
        [_reads(m, request, workload.loras if m is model else ()) for m in models]
        + [_sees(model, reader) for reader in workload.readers]
    )
    guided = any(not isinstance(network, int) and network.reads_latents for network in workload.beside)
    encodes = request.image is not None or bool(model.row.reads) or guided
    if encodes:
        encode = max(encode, _encodes(workload, max(references, default=drawn), gpu))

    guides = sum(_guides(model, beside, request, low) for beside in workload.beside)
    kept, denoise, stays = vae if encodes and not low else 0, 0, []
    for m in models:
        more = (sum(references), sum(reader.tokens for reader in workload.readers)) if m is model else (0, 0)
        held, passing = _draws(m, request, low, gpu, *more)
        held += guides + _adapted(m, m.family.denoiser, workload.loras) if m is model else 0
        stays.append(held)
        denoise = max(denoise, kept + held + passing)
        kept += 0 if low else held
    decode = vae + _DECODER[gpu] * wider * _pixels(workload, drawn) + (0 if low else stays[0])
    if request.upscaler is not None:
        decode = max(decode, (0 if low else vae + stays[0]) + upscaling(gpu))
    return Peaks(*(int(stage + workload.held) for stage in (encode, denoise, decode)))


def _of_two_passes(workload: Workload, gpu: bool) -> Peaks:
    """Of a request with `hires`. The second pass takes one picture at a time, and reads no prompt; while it encodes,
    the denoiser is held."""
    model, low = workload.model, workload.low_memory
    second = replace(workload, request=replace(model.second_pass(workload.request), count=1), pictures=())
    first, again = peaks(workload.but(hires=None), gpu), peaks(second, gpu)
    held = 0 if low else _weights(model, model.family.denoiser).held
    encode = _encodes(second, second.request.width * second.request.height, gpu)
    return Peaks(
        max(first.encode, int(encode + held + workload.held)),
        max(first.denoise, again.denoise),
        max(first.decode, again.decode),
    )


def _encodes(workload: Workload, pixels: int, gpu: bool) -> float:
    """Bytes of the VAE while it encodes a picture."""
    return _weights(workload.model, "vae").held + _ENCODER[gpu] * _pixels(workload, pixels)


def _pixels(workload: Workload, pixels: int) -> float:
    """Bytes of one map of the VAE's first level."""
    model, config = workload.model, workload.model.components["vae"]
    pixels = min(pixels, (TILE * factor(config.channels)) ** 2) if workload.low_memory else pixels
    return pixels * config.channels[0] * _item(model, "vae")


def upscaling(gpu: bool) -> float:
    """Bytes of a published upscaler while it enlarges a tile."""
    return _UPSCALER[gpu] * upscale_tile(gpu) ** 2


def upscale_tile(gpu: bool) -> int:
    """Pixels along the edge of an enlarged tile."""
    return 1024 if gpu else 512


def _reads(model: Description, request: Request, loras: tuple[Adapter | int, ...]) -> float:
    """Bytes of the largest text encoder while it works. loras: those of the model that it belongs to."""
    encoders = [name for name in model.text.encoders if name != model.text.t5 or model.reads_t5(request)]
    return max(_weights(model, name).held + _reading(model, name) + _adapted(model, name, loras) for name in encoders)


def _reading(model: Description, name: str) -> int:
    """Bytes of a text encoder's activations."""
    config, tokens = model.components[name], max(model.text.t5_tokens, model.text.qwen_tokens)
    wide, scores = _READ[build.name_of(config)]
    return int(tokens * (wide * config.hidden + scores * config.heads * tokens) * _item(model, name))


def _draws(
    model: Description, request: Request, low: bool, gpu: bool, references: int, tokens: int
) -> tuple[float, float]:
    """Bytes that stay (the denoiser and its prepared conditions), and bytes of the activations of one step.
    references: pixels of the pictures to edit, which each sample reads beside its own; tokens: those of reference
    pictures, which it reads beside the text's."""
    name, text, passes = model.family.denoiser, model.text.tokens + tokens, model.passes(request)
    weights, samples, item = _weights(model, name), request.count * passes, _item(model, name)
    prepared = (weights.of_step * request.steps + weights.of_word * text) * samples
    if passes == 2 and not low:  # both halves run as one batch, and the prompt alone in unguided steps
        prepared += prepared // 2
    latents = (request.width * request.height + references) // model.factor**2
    numbers = model.family.activations(model.net, latents, text, gpu) * (request.count if low else samples)
    return weights.held + prepared * item, numbers * item + (0 if gpu else _made_whole(model, name))


def _made_whole(model: Description, name: str) -> int:
    """Bytes of quantized weights that a CPU makes whole for products: MLX begins some layers ahead (4.2 were measured).
    Those of text encoders are not counted: a denoiser takes more."""
    bits = recipe.component_bits(model.family, name, model.recipe)
    if bits is None:
        return 0
    shapes, plan = _built(model.components[name])[1], _plan(model.family.name, name, model.components[name], bits)
    return 4 * max((math.prod(shapes[f"{path}.weight"]) for path in plan), default=0) * _item(model, name)


def _adapted(model: Description, name: str, loras: tuple[Adapter | int, ...]) -> float:
    """Bytes that LoRAs add to a quantized network: their factors run beside its layers, in its dtype, and a layer that
    one changes at full rank is no longer quantized. A network that is not quantized takes no more than without them."""
    bits = recipe.component_bits(model.family, name, model.recipe)
    if bits is None or not loras:
        return 0
    shapes, item, more, dense = _built(model.components[name])[1], _item(model, name), 0.0, set()
    plan = _plan(model.family.name, name, model.components[name], bits)
    for lora in loras:
        if isinstance(lora, int):
            more += lora * item / 2 if name == model.family.denoiser else 0
            continue
        for parameter, changes in lora.changes.get(name, {}).items():
            path, _, leaf = parameter.rpartition(".")
            if leaf == "weight" and path in plan:
                low = all(c.low is not None and c.magnitude is None for c in changes)
                more += sum(c.low[0].shape[0] for c in changes) * sum(shapes[parameter]) * item if low else 0
                dense |= set() if low else {(parameter, path)}
    for parameter, path in dense:
        small = _quantized(shapes[parameter], tuple(plan[path].items()), model.recipe.dtype)
        more += math.prod(shapes[parameter]) * item - small
    return more


@cache
def _plan(family_name: str, name: str, config: build.Config, bits: int | str) -> dict[str, dict]:
    return recipe.quantization_plan(FAMILIES[family_name], name, _built(config)[0], bits)


def _guides(model: Description, network: build.Config | int, request: Request, low: bool) -> float:
    """Bytes of a network that guides, and of its prepared conditions. Its activations are no larger than the
    denoiser's, and are gone when that begins."""
    name = model.family.denoiser
    if isinstance(network, int):
        return network * (_item(model, name) / 2 if model.recipe.bits is None else BITS[model.recipe.bits] / 16)
    weights = _counted(model.family.name, name, network, model.recipe)
    samples = request.count * (model.passes(request) + (0 if low else 1))
    return weights.held + weights.of_word * model.text.tokens * samples * _item(model, name)


def _sees(model: Description, reader: Reader) -> float:
    """Bytes of a vision model and an adapter while they read a picture."""
    item = recipe.DTYPES[model.recipe.dtype].size
    if isinstance(reader.networks, int):
        return reader.networks * item / 2
    held = sum(math.prod(shape) for network in reader.networks for shape in _built(network)[1].values())
    sees, (wide, scores) = reader.networks[0], _READ["vision"]
    passing = sees.tokens * (wide * sees.hidden + scores * sees.heads * sees.tokens)
    return (held + passing) * item


class Weights(NamedTuple):
    held: int  # bytes, while the network computes
    of_step: int  # numbers prepared for each step of each sample: modulations
    of_word: int  # numbers prepared for each token of each sample: keys and values


def _weights(model: Description, name: str) -> Weights:
    return _counted(model.family.name, name, model.components[name], model.recipe)


@cache
def _counted(family_name: str, name: str, config: build.Config, how: recipe.Recipe) -> Weights:
    family = FAMILIES[family_name]  # the cache needs hashable arguments, and a Family holds dicts
    module, before, after = _built(config)
    item = recipe.DTYPES[recipe.component_dtype(family, name, how.dtype)].size
    layers = recipe.quantization_plan(family, name, module, recipe.component_bits(family, name, how))
    held = 0
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
    """The network as it computes, the shapes of all parameters in its file, and the parameters that it keeps while it
    computes. Nothing is allocated."""
    module = build.build(config)
    before = {k: tuple(v.shape) for k, v in tree_flatten(module.parameters())}
    if hasattr(module, "release_modulation"):
        module.release_modulation()
    return module, before, [k for k, _ in tree_flatten(module.parameters())]


@cache
def _quantized(shape: tuple[int, ...], how: tuple, dtype: str) -> int:
    """Bytes of a matrix that MLX has quantized."""
    return sum(part.nbytes for part in mx.quantize(mx.zeros(shape, recipe.DTYPES[dtype]), **dict(how)))


def _item(model: Description, name: str) -> int:
    """Bytes of one number in the dtype that the component computes in."""
    return recipe.DTYPES[recipe.component_dtype(model.family, name, model.recipe.dtype)].size
