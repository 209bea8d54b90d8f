"""How much memory a picture takes at its peak, told before anything is downloaded or read: weights by their shapes and
their recipe, activations by figures measured on the published networks. A preview's tiny decoder is left out. And what
this machine has."""

import json
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import conditioning, weights
from .errors import Error
from .models.vae import factor
from .published import ROWS
from .registry import MODELS
from .request import Request

SURE = 1.15  # by how much the estimate may be above the truth (tests hold it to that); only beyond is a run refused
TILE = 64  # latents a side of a tile under --low-memory: 512 pixels, the size every VAE was trained at or above

# Numbers held at once beside the weights. On a CPU, where they were measured, a convolution unfolds its map to nine
# times its size, and MLX begins about ten operations before the first of them ends. On Metal, which was not at hand,
# nothing is unfolded, and MLX waits where memory is short: counted are the input, its norm, Winograd's two maps and the
# output of the widest convolution, and for the U-Net the maps that wait for the way up.
_UNET = {False: 105, True: 25}  # of a latent, per channel of the first level; False: CPU, True: GPU
_DECODER = {False: 84, True: 12.5}  # of a pixel, per channel of the first level
_ENCODER = {False: 58, True: 6.6}  # the same
_FLUX = 37.5  # of a token, per width
_SD3 = {False: 25.5, True: 36}  # of a token, per width, without and with dual attention
_T5 = 10, 3  # of a token, per hidden width; and times the scores of a layer
_BITS, _SIZES = (8, 6, 5, 4, 3), (768, 512, 256)


class Peaks(NamedTuple):
    """Bytes, stage by stage."""

    encode: int  # of the prompt, or of the picture to begin with
    denoise: int
    decode: int


class Machine(NamedTuple):
    memory: int  # bytes, all of it
    budget: int  # of these, what programs are told to stay within
    gpu: bool


@dataclass(frozen=True)
class Job:
    """A picture and what draws it, as far as memory goes."""

    family: str
    variant: str
    components: dict[str, dict]  # settings, as in model.json
    dtype: str
    bits: int | str | None
    width: int
    height: int
    steps: int
    count: int
    passes: int  # 2 where a second one is guided away from
    t5: bool
    image: bool  # whether it begins with one, which the VAE encodes
    low_memory: bool
    refiner: "Job | None" = None  # what finishes it

    def but(self, **change) -> "Job":
        """The same with a change to all that draws it."""
        refiner = None if self.refiner is None else self.refiner.but(**change)
        return replace(self, **({"refiner": refiner} | change))


def peaks(job: Job, gpu: bool) -> Peaks:
    """Of a first picture: one text encoder after the other; the denoiser, which stays, and its refiner, which does not;
    and the VAE, which stays once it has encoded a picture."""
    jobs, vae = [job] if job.refiner is None else [job, job.refiner], _weights(job, "vae").held
    channels, pixels = job.components["vae"]["channels"], job.width * job.height
    pixels = min(pixels, (TILE * factor(channels)) ** 2) if job.low_memory else pixels
    numbers = pixels * channels[0] * _item(job, "vae")
    encode = max(_reads(j) for j in jobs)
    if job.image:
        encode = max(encode, vae + _ENCODER[gpu] * numbers)

    kept, denoise = vae if job.image and not job.low_memory else 0, 0
    for j in jobs:
        stays, moves = _draws(j, gpu)
        denoise = max(denoise, kept + stays + moves)
        kept += 0 if job.low_memory else stays
    decode = vae + _DECODER[gpu] * numbers + (0 if job.low_memory else _draws(job, gpu)[0])
    return Peaks(int(encode), int(denoise), int(decode))


def _reads(job: Job) -> float:
    """Bytes of the largest text encoder at work."""
    plan = conditioning.plan(job.family, job.variant)
    t5 = None if plan.t5 is None else plan.t5[0]
    encoders = [n for n in job.components if n.startswith("text_encoder") and (n != t5 or job.t5)]
    return max(_weights(job, n).held + _reading(job, n, plan.tokens if n == t5 else 77) for n in encoders)


def _draws(job: Job, gpu: bool) -> tuple[float, float]:
    """Bytes of the denoiser and what it prepares, which stay, and those that pass through it in a step."""
    net, plan = "unet" if "unet" in job.components else "transformer", conditioning.plan(job.family, job.variant)
    edge, text = factor(job.components["vae"]["channels"]), 77 * plan.clip_read + plan.tokens
    own, samples = _weights(job, net), job.count * job.passes
    prepared = (own.of_step * job.steps + own.of_word * text) * samples
    if job.passes == 2 and not job.low_memory:  # both halves as one batch, and the prompt alone for unguided steps
        prepared += prepared // 2
    numbers = _step(job.components[net], job.width * job.height // edge**2, text, gpu) * (
        job.count if job.low_memory else samples
    )
    return own.held + prepared * _item(job, net), numbers * _item(job, net)


def _reading(job: Job, name: str, tokens: int) -> int:
    """Activations of a text encoder; CLIP's are too few to count."""
    config, (wide, scores) = job.components[name], _T5
    if "buckets" not in config:
        return 0
    return tokens * (wide * config["hidden"] + scores * config["heads"] * tokens) * _item(job, name)


def _step(net: dict, latents: int, text: int, gpu: bool) -> float:
    """Numbers one sample holds in one call of the denoiser."""
    if "channels" in net:
        return _UNET[gpu] * net["channels"][0] * latents
    tokens = latents // 4 + text  # patches of 2 x 2
    if "axes" in net:
        return _FLUX * net["width"] * tokens
    return _SD3[bool(net["dual"])] * net["heads"] * net["head_dim"] * tokens


class Weights(NamedTuple):
    held: int  # bytes, once the network computes
    of_step: int  # numbers made beforehand for each step of each sample: modulations
    of_word: int  # the same for each word of each sample: keys and values


def _weights(job: Job, name: str) -> Weights:
    kind = "text_encoder" if name.startswith("text_encoder") else name
    return _counted(kind, json.dumps(job.components[name]), job.bits, job.dtype, _item(job, name))


@cache
def _counted(name: str, config: str, bits: int | str | None, dtype: str, item: int) -> Weights:
    module, before, after = _built(name, config)
    layers, held = weights.plan(name, module, bits), 0
    for key in after:
        path, _, leaf = key.rpartition(".")
        if leaf == "weight" and path in layers:
            held += _quantized(before[key], tuple(layers[path].items()), dtype)
        else:
            held += math.prod(before[key]) * item
    of_step = sum(math.prod(v) for k, v in before.items() if k not in after and k.endswith(".bias"))
    of_word = sum(before[k][0] for k in after if k.endswith(("attn2.to_k.weight", "attn2.to_v.weight")))
    return Weights(held, of_step, of_word)


@cache
def _built(name: str, config: str) -> tuple[nn.Module, dict[str, tuple], list[str]]:
    """The network, its parameters' shapes, and which of these are held while it computes. Nothing is allocated."""
    module, computes = (weights.build(name, json.loads(config)) for _ in range(2))
    if name == "transformer":
        computes.release_modulation()
    before, after = (tree_flatten(m.parameters()) for m in (module, computes))
    return module, {k: tuple(v.shape) for k, v in before}, [k for k, _ in after]


@cache
def _quantized(shape: tuple[int, ...], how: tuple, dtype: str) -> int:
    """Bytes that MLX makes of a matrix."""
    return sum(part.nbytes for part in mx.quantize(mx.zeros(shape, weights.DTYPES[dtype]), **dict(how)))


def _item(job: Job, name: str) -> int:
    """Bytes of a number that the component computes with."""
    return weights.DTYPES[weights.component_dtype(job.family, name, job.dtype)].size


# ---- what is asked for


def named(
    name: str, bits: int | str | None, dtype: str, low_memory: bool = False, request: Request | None = None
) -> Job:
    """A published model and a request to it, by default at its own size and steps."""
    row, d = MODELS[name], MODELS[name].defaults
    request = Request("") if request is None else request
    net = ROWS[name].get("unet", ROWS[name].get("transformer"))
    guidance = d.guidance if request.guidance is None else request.guidance
    if hasattr(net, "guidance"):  # FLUX
        guidance = request.true_cfg
    elif getattr(net, "time_cond", None) is not None:
        guidance = 1.0
    return Job(
        row.family,
        "schnell" if name == "flux-schnell" else "base",
        {n: asdict(c) for n, c in ROWS[name].items()},
        dtype,
        bits,
        d.size if request.width is None else request.width,
        d.size if request.height is None else request.height,
        d.steps if request.steps is None else request.steps,
        request.count,
        2 if guidance > 1 else 1,
        request.t5,
        request.image is not None,
        low_memory,
    )


def this_machine() -> Machine:
    """On a GPU what it says of itself. Else what the system has, or lets this container have; Windows, which has no
    sysconf, is taken to have enough."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize
    if mx.default_device() == mx.Device(mx.gpu):
        info = mx.device_info()
        memory = int(info.get("memory_size", info.get("total_memory", memory)))
        return Machine(memory, int(info.get("max_recommended_working_set_size", memory)), True)
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups 2 and 1
        try:
            memory = min(memory, int(Path("/sys/fs/cgroup", limit).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return Machine(memory, memory, False)


def mac(gigabytes: int) -> Machine:
    """A Mac of so much memory. Its GPU is told to stay within two thirds of up to 32 GB, and three quarters of more:
    the least that Metal was seen to recommend; newer systems say up to 78 %."""
    memory = gigabytes * 2**30
    return Machine(memory, memory * 2 // 3 if gigabytes <= 32 else memory * 3 // 4, True)


def check(job: Job, name: str, machine: Machine | None = None) -> None:
    """Refuse what clearly exceeds the machine, and name what would fit."""
    machine = this_machine() if machine is None else machine
    need = max(peaks(job, machine.gpu))
    if need <= SURE * machine.memory:
        return
    fitting = [f"{flags} ({n / 1e9:.1f} GB)" for flags, n in options(job, machine)]
    if fitting:
        fix = f"What fits: {', or '.join(fitting)}."
    else:
        smaller = [n for n in MODELS if fits(named(n, None, job.dtype, True), machine)]
        others = f"{', '.join(smaller)} would, with --low-memory" if smaller else "nor would another named model"
        fix = f"No setting makes it fit; {others}."
    size = f"{job.width}x{job.height}" + (f", {job.count} at once" if job.count > 1 else "")
    also = "" if job.refiner is None else " and its refiner"
    raise Error(
        f"{name}{also} at {size} takes about {need / 1e9:.1f} GB; this machine has {machine.memory / 1e9:.1f}.",
        f"{fix} --force tries it as it is.",
    )


def check_named(
    model: str,
    bits: int | str | None,
    dtype: str | None,
    low_memory: bool,
    request: Request,
    refiner: str | None = None,
    machine: Machine | None = None,
) -> None:
    """The same by the names or hub ids alone; of other models nothing is known yet."""
    names = {n: n for n in MODELS} | {row.repo: n for n, row in MODELS.items() if row.repo is not None}
    asked = {"low_memory": low_memory, **weights.recipe(bits, dtype)}
    known = [names[m] for m in (model, refiner) if m in names]
    if known:
        job = named(known[0], request=request, **asked)
        if len(known) == 2:
            same = replace(request, width=job.width, height=job.height, steps=job.steps)
            job = replace(job, refiner=named(known[1], request=same, **asked))
        check(job, known[0], machine)


def fits(job: Job, machine: Machine) -> bool:
    return max(peaks(job, machine.gpu)) <= machine.budget


def options(job: Job, machine: Machine) -> list[tuple[str, int]]:
    """Flags that make it fit, and what it takes then: of each kind the first that does, which gives up least."""
    low = [] if job.low_memory else [("--low-memory", {"low_memory": True})]
    bits = [(f"-q {b}", {"bits": b}) for b in _BITS if job.bits is None or b < weights.BITS[job.bits]]
    plan = conditioning.plan(job.family, job.variant)
    t5 = [("--no-t5", {"t5": False})] if job.t5 and plan.t5 is not None and plan.clip_read else []
    sizes = [(f"-W {n} -H {n}", {"width": n, "height": n}) for n in _SIZES if n < max(job.width, job.height)]
    fewer = [("-b 1", {"count": 1})] if job.count > 1 else []
    unrefined = [("no --refiner", {"refiner": None})] if job.refiner is not None else []

    def first(kind: list[tuple[str, dict]]) -> list[tuple[str, int]]:
        found = ((flags, job.but(**change)) for flags, change in kind)
        return next(([(flags, max(peaks(j, machine.gpu)))] for flags, j in found if fits(j, machine)), [])

    found = [way for kind in (low, fewer, t5, unrefined, bits, sizes) for way in first(kind)]
    if low and not first(low):  # then it may spare some bits, or some pictures
        alone = {flags for flags, _ in found}
        found = [way for way in first(both(bits, low)) if way[0].removesuffix(" --low-memory") not in alone] + found
        found = found if "-b 1" in alone else first(both(low, fewer)) + found
    found = found or first(both(t5, low)) or first(both(unrefined, low))
    return found or first(both(both(both(bits, low), fewer), sizes))


def both(some: list[tuple[str, dict]], others: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """Each of some with each of others; where there are none of a kind, those of the other kind alone."""
    return [(f"{a} {b}", x | y) for a, x in some for b, y in others] or some or others
