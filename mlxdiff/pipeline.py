"""From a Request to pictures: encode, denoise, decode, told as Events. The only place where MLX is made to evaluate."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from . import conditioning, guidance, images, memory, registry, samplers, schedules, tokenizers
from .errors import Error
from .folder import ModelFolder
from .noise import Noise, draw_nhwc
from .registry import Defaults
from .request import Request
from .schedules import Schedule

_SMALL_VAE = 16 * 2**20  # bytes; decoding one of these takes less than a step
_LOW_MEMORY_CACHE = 512 * 2**20  # bytes MLX may keep for reuse


class Event(NamedTuple):
    """One thing that happened. Stages in order: encode, load, denoise (once a step), decode (once a picture).
    Each opens with an event of step 0, so that whoever watches knows what is being waited for."""

    stage: str
    step: int  # 1-based, of `steps` in this stage
    steps: int
    seconds: float  # what this step took
    x0: np.ndarray | None = None  # denoise: the predicted clean latents so far, (B, h, w, c)
    image: Image.Image | None = None  # decode: the finished picture
    x: np.ndarray | None = None  # denoise: the noisy latents after this step, and their noise level
    sigma: float | None = None


@dataclass(frozen=True)
class Result:
    images: list[Image.Image]
    request: Request  # resolved: the seed that was drawn, the steps that were taken
    seconds: float
    peak_bytes: int

    @property
    def image(self) -> Image.Image:
        return self.images[0]


def load(
    model: str | Path,
    *,
    bits: int | str | None = None,
    dtype: str | None = None,
    refiner: str | Path | None = None,
    taesd: str | Path | None = None,
    offline: bool = False,
    low_memory: bool = False,
    force: bool = False,
    request: Request | None = None,
    **options,
) -> "Pipeline":
    """Open a model: a name (`mlxdiff models` lists them), a hub id, a folder, or a .safetensors file. Whatever must be
    downloaded or converted is, once. bits: 3, 4, 5, 6, 8, "mxfp4", "mxfp8" or "nvfp4", to quantize. dtype: float16,
    bfloat16, float32; by default what suits this machine. taesd: "auto", a hub id, a folder or a file: the tiny decoder
    to draw previews with. Auto is the one made for the model's family, where its VAE is too large for that. low_memory:
    slower, smaller. force: try also what this machine has too little memory for. request: what is going to be drawn, so
    that what is too large is refused before a download. options: see `store.resolve` (tokenizer, prediction, ...)."""
    from . import store

    fetched = [str(name) for name in (model, refiner) if name is not None and store.local(name) is None]
    if fetched and not force:
        if request is None:  # then at the least size; every run is looked at once more
            request = Request("", width=128, height=128, t5=options.get("t5", True))
        memory.check_named(fetched[0], bits, dtype, low_memory, request, *fetched[1:])

    def opened(name: str | Path) -> Pipeline:
        folder = store.resolve(name, bits=bits, dtype=dtype, offline=offline, **options)
        row = registry.find(str(name))
        return Pipeline(folder, low_memory, None if row is None else row.defaults, force)

    pipe = opened(model)
    if refiner is not None:
        pipe.attach_refiner(opened(refiner))
    if taesd is not None and not (taesd == "auto" and pipe.previews_by_vae):
        name, dtype = pipe.family.taesd if taesd == "auto" else taesd, pipe.model["recipe"]["dtype"]
        pipe.attach_taesd(store.taesd(name, dtype=dtype, offline=offline, progress=options.get("progress")))
    return pipe


def stream(prompt: str | Request, model: str | Path = registry.DEFAULT, **settings) -> Iterator[Event]:
    """Load a model and draw with it once, event by event. To draw twice, keep what `load` gives."""
    return load(model).stream(prompt, **settings)


class Pipeline(ModelFolder):
    """A model folder that draws. The text encoders go before the denoiser comes."""

    def __init__(self, folder: Path, low_memory: bool = False, defaults: Defaults | None = None, force: bool = False):
        super().__init__(folder, low_memory, defaults)
        self.force = force
        self.refiner: Pipeline | None = None
        self._taesd: nn.Module | None = None
        self._texts: tuple[tuple, list[conditioning.Text]] | None = None

    def attach_refiner(self, refiner: "Pipeline") -> None:
        """A second model that finishes what this one begins, on the same latents."""
        if refiner.model["components"]["vae"]["scale"] != self.model["components"]["vae"]["scale"]:
            raise Error(
                f"{refiner.name} works on other latents than {self.name}.", "Use the refiner made for this model."
            )
        self.refiner = refiner

    def attach_taesd(self, decoder: nn.Module) -> None:
        """A tiny decoder for previews."""
        channels = decoder.config.latent_channels
        if channels != self.latent_channels:
            raise Error(
                f"This TAESD reads latents of {channels} channels; {self.name} has {self.latent_channels}.",
                f"Use {self.family.taesd}.",
            )
        self._taesd = decoder

    def job(self, request: Request) -> memory.Job:
        """What memory counts of a resolved request, the refiner's share with it."""
        own = super().job(request)
        return own if self.refiner is None else replace(own, refiner=self.refiner.job(request))

    def __call__(self, prompt: str | Request, **settings) -> Result:
        """Draw: `pipe("a red house", seed=7).image.save("house.png")`. The settings are Request's fields."""
        start, drawn = time.perf_counter(), []
        request = self.resolve(prompt, **settings)
        mx.reset_peak_memory()
        for event in self.run(request):
            if event.image is not None:
                drawn.append(event.image)
        return Result(drawn, request, time.perf_counter() - start, mx.get_peak_memory())

    def stream(self, prompt: str | Request, **settings) -> Iterator[Event]:
        """The run, event by event. Leaving the loop stops it; nothing keeps running and nothing is registered."""
        yield from self.run(self.resolve(prompt, **settings))

    def run(self, request: Request, given: np.ndarray | None = None) -> Iterator[Event]:
        """The run of a resolved request. given: standard noise (B, h, w, c) to start from instead of the seed's."""
        if not self.force:
            memory.check(self.job(request), self.name)
        if self.low_memory:
            mx.set_cache_limit(_LOW_MEMORY_CACHE)
        spec, schedule = samplers.SAMPLERS[request.sampler], self.schedule(request)
        fn = samplers.of_flow(request.sampler) if self.flow else spec.fn
        whole = schedules.sigmas(schedule, request.schedule, request.steps)
        steps = request.steps if request.image is None else schedule.taken(request.steps, request.strength)
        sigmas = whole[-1 - steps :]
        parts = [(self, sigmas)] if self.refiner is None else self._hand_over(request, schedule, sigmas)
        texts = []
        for pipe, _ in parts:
            texts.append((yield from pipe.texts(request)))

        draw, begun = self.noise(request), None
        if request.image is not None:  # the seed's first draw goes to the VAE, as in diffusers
            begun = yield from self._encode_image(request, draw())
        first = draw()  # drawn even if not used: a noisy sampler goes on where this ends
        first = first if given is None else mx.array(given)
        if begun is None:
            x = first * schedule.start(sigmas[0], request.schedule)
        else:
            x = schedule.noised(begun, first, sigmas[0])
        extra, done = {"draw": draw, "eta": request.eta} if spec.noisy else {}, 0
        for (pipe, part), text in zip(parts, texts, strict=True):
            denoise = yield from pipe.denoiser(request, schedule, spec.visits(part), text, whole)
            yield Event("denoise", done, steps, 0.0, x=np.array(x), sigma=part[0])
            begin = time.perf_counter()
            for (state, x0), sigma in zip(fn(denoise, x, part, **extra), part[1:], strict=True):
                x, finite = state, mx.isfinite(state).all()
                mx.eval(x, x0, finite)
                pipe._check_finite(finite)
                done, now = done + 1, time.perf_counter()
                yield Event("denoise", done, steps, now - begin, np.array(x0), x=np.array(x), sigma=sigma)
                begin = time.perf_counter()
            del denoise  # it holds the network
            if pipe is not self or self.low_memory:
                pipe._release(pipe.net)
        yield from self._decode(x / schedule.spread(sigmas[-1]))

    def preview(self, x0: np.ndarray) -> list[Image.Image]:
        """Rough pictures of predicted latents (B, h, w, c): by the TAESD if there is one, by the VAE where it is small,
        else by one linear map."""
        if self._taesd is not None:
            return _pictures(self._taesd, x0)
        return self.decode(x0) if self.previews_by_vae else [images.preview(x, self.family.preview) for x in x0]

    def decode(self, z: np.ndarray) -> list[Image.Image]:
        """The pictures of latents (B, h, w, c), by the VAE."""
        return _pictures(self.network("vae"), z)

    @property
    def previews_by_vae(self) -> bool:
        """Whether the VAE is small enough to draw previews."""
        return (self.folder / "vae.safetensors").stat().st_size <= _SMALL_VAE

    # --- the stages; `probe` looks at some of them alone

    def noise(self, request: Request) -> Callable[[], mx.array]:
        """What draws standard noise (B, h, w, c) by the request's seeds, another at each call."""
        seeds = [Noise(request.seed + i, request.noise) for i in range(request.count)]
        return partial(draw_nhwc, seeds, *self.latent_size(request), self.latent_channels)

    def texts(self, request: Request) -> Iterator[Event]:
        """Texts of the negative prompt (if this run is guided) and of the prompt; remembered for the next seed."""
        guided, t5 = self.cfg(request) > 1, self._reads_t5(request)
        zeros = guided and request.negative is None and self.model["zero_negative"]
        prompts = [request.prompt]
        if guided and not zeros:
            prompts.insert(0, "" if request.negative is None else request.negative)
        key = (prompts, request.clip_skip, zeros, t5)
        if self._texts is None or self._texts[0] != key:
            yield Event("encode", 0, 1, 0.0)
            begin = time.perf_counter()
            toks = {t: tokenizers.load(self.folder / t) for _, t in self.plan.encoders}
            if t5:
                toks[self.plan.t5[1]] = tokenizers.load_t5(self.folder / self.plan.t5[1])
            parts = {}
            for name, words in conditioning.tokenize(self.plan, toks, prompts, t5).items():
                is_t5 = self.plan.t5 is not None and name == self.plan.t5[0]
                parts[name] = conditioning.read(self.plan, self.network(name), is_t5, words, request.clip_skip)
                mx.eval(parts[name])
                self._release(name)  # one encoder at a time: T5 alone is larger than all the others
            texts = conditioning.join(self.plan, parts, self.model["components"][self.net]["context"])
            if zeros:
                texts.insert(0, conditioning.Text(*(None if a is None else mx.zeros_like(a) for a in texts[0])))
            mx.eval(texts)
            self._texts = (key, texts)
            yield Event("encode", 1, 1, time.perf_counter() - begin)
        return self._texts[1]

    def _encode_image(self, request: Request, noise: mx.array) -> Iterator[Event]:
        """Latents of the image to begin with, (B, h, w, c): for each picture a sample of its own."""
        yield Event("encode", 0, 1, 0.0)
        begin = time.perf_counter()
        image = images.fit(images.read(request.image), request.width, request.height)
        tile = memory.TILE if self.low_memory else None
        x0 = self.network("vae").sample(mx.array(images.to_pixels(image))[None], noise, tile)
        mx.eval(x0)
        self._check_finite(mx.isfinite(x0).all())
        if self.low_memory:
            self._release("vae")
        yield Event("encode", 1, 1, time.perf_counter() - begin)
        return x0

    def denoiser(self, request: Request, schedule: Schedule, visits: list[float], texts: list, sigmas: list[float]):
        """The network under its conditions, with everything that does not depend on the latent already computed.
        visits: the sigmas it will be called at; sigmas: of the whole run, of which intervals are parts."""
        if self.net not in self._networks:
            yield Event("load", 0, 1, 0.0)
            begin = time.perf_counter()
            net = self.network(self.net)
            if self.flow:
                net.release_modulation()
            mx.eval(net.parameters())
            yield Event("load", 1, 1, time.perf_counter() - begin)
        net = self.network(self.net)
        conds = self._conditions(request, [schedule.t(s) for s in visits], texts)
        # A transformer's one by one: else the weights of all modulations are read before the first is used, and a
        # quarter of FLUX is in memory once more. A U-Net's weights are held anyway: one wait, not one for each layer.
        for part in [part for _, part in tree_flatten(conds)] if self.flow else [conds]:
            mx.eval(part)
        begin, end = (f * request.steps for f in request.skip_interval)  # both left out, as diffusers counts
        return guidance.denoiser(
            net,
            schedule,
            self.model["prediction"],
            **conds,
            scale=self.cfg(request) if len(texts) == 2 else 1.0,
            rescale=request.rescale,
            interval=tuple(sigmas[round(f * request.steps)] for f in request.interval),
            skip=conds["cond"] | {"skip_layers": request.skip_layers} if request.skip_layers else None,
            skip_scale=request.skip_scale,
            skip_interval=(sigmas[min(math.floor(begin) + 1, request.steps)], sigmas[math.ceil(end)]),
            dtype=_dtype(net),
        )

    def _conditions(self, request: Request, ts: list[float], texts: list[conditioning.Text]) -> dict[str, dict]:
        """What the network takes besides x and t, by the names `guidance.denoiser` has for it."""
        # What a transformer only prepares with is read anew for each run, passes through memory and is gone.
        net = self._open(self.net) if self.flow else self.network(self.net)
        sides = [
            conditioning.arguments(self.plan, text, request, negative=len(texts) == 2 and i == 0)
            for i, text in enumerate(texts)
        ]
        if self.time_cond is not None:
            sides[0]["guidance_embedding"] = conditioning.guidance_embedding(request.guidance, self.time_cond)
        fixed = {"size": self.latent_size(request)} if self.flow else {}
        if self.told:
            fixed["guidance"] = request.guidance

        def prepare(*sides: dict) -> dict:
            def batch(name: str) -> mx.array:
                return mx.concatenate([mx.repeat(side[name], request.count, axis=0) for side in sides])

            return net.prepare(ts, **{name: batch(name) for name in sides[0]}, **fixed)

        conds = {"cond": prepare(sides[-1])}
        if len(sides) == 2:
            conds |= {"uncond": prepare(sides[0])} if self.low_memory else {"both": prepare(*sides)}
        return conds

    def _decode(self, z: mx.array) -> Iterator[Event]:
        """Pictures one at a time: a batch through the VAE would need its peak memory once for each."""
        yield Event("decode", 0, z.shape[0], 0.0)
        vae, tile = self.network("vae"), memory.TILE if self.low_memory else None
        for i in range(z.shape[0]):
            begin = time.perf_counter()
            pixels = vae.decode(z[i : i + 1].astype(_dtype(vae)), tile=tile)[0].astype(mx.float32)
            mx.eval(pixels)
            self._check_finite(mx.isfinite(pixels).all())
            image = images.to_image(np.array(pixels))
            yield Event("decode", i + 1, z.shape[0], time.perf_counter() - begin, image=image)

    def _hand_over(
        self, request: Request, schedule: Schedule, sigmas: list[float]
    ) -> list[tuple["Pipeline", list[float]]]:
        """The sigmas this model walks and those its refiner walks: timesteps below the cut are the refiner's."""
        cut = round(schedule.n * (1 - request.refine_at))
        k = sum(schedule.t(s) >= cut for s in sigmas[:-1])
        halves = [(self, sigmas[: k + 1]), (self.refiner, sigmas[k:])]
        return [(pipe, part) for pipe, part in halves if len(part) > 1]


def _pictures(decoder: nn.Module, z: np.ndarray) -> list[Image.Image]:
    pixels = decoder.decode(mx.array(z).astype(_dtype(decoder))).astype(mx.float32)
    mx.eval(pixels)
    return [images.to_image(p) for p in np.array(pixels)]


def _dtype(net: nn.Module) -> mx.Dtype:
    """The dtype a network computes in: that of its weights, quantized ones (uint32) aside."""
    return next(v.dtype for _, v in tree_flatten(net.parameters()) if mx.issubdtype(v.dtype, mx.floating))
