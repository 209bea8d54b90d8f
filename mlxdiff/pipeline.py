"""From a Request to pictures: encode, denoise, decode, reported as Events. Drawing evaluates MLX arrays only here."""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from . import (
    advice,
    attached,
    builtin,
    conditioning,
    description,
    families,
    guidance,
    images,
    memory,
    pictures,
    samplers,
    schedules,
    upscale,
)
from .arguments import check_options
from .attached import Attached
from .guides import Guide
from .larger import Larger
from .models.controlnet import controlled
from .networks import Networks, computing, dtype_of
from .noise import Noise, draw_nhwc
from .recipe import recipe
from .references import extended, shown
from .request import SETTINGS, Request, Settings, asked, takes_settings
from .result import Event, Result
from .reuse import NOTHING, Passes
from .schedules import Schedule
from .start import Start, Starts

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SMALL_VAE = 16 * 2**20  # bytes; a VAE of this size decodes in less time than a step takes
_LOW_MEMORY_CACHE = 512 * 2**20  # bytes MLX may keep for reuse


def load(
    model: str | Path = families.DEFAULT,
    *,
    bits: int | str | None = None,
    text_bits: int | str | None = None,
    dtype: str | None = None,
    refiner: str | Path | None = None,
    taesd: str | Path | None = None,
    low_memory: bool = False,
    force: bool = False,
    request: Request | None = None,
    offline: bool = False,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    prediction: str | None = None,
    parts: dict[str, str | Path] | None = None,
    t5: bool = True,
    loras: list[str] | tuple[str, ...] = (),
    embeddings: list[str] | tuple[str, ...] = (),
    lora_dir: str | Path | None = None,
    prompt_cache: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
    **unknown: NoReturn,
) -> "Pipeline":
    """Open a model: load("sdxl", bits=8). It is downloaded and converted once, if it must be.

    model: a name (`mlxdiff models` lists them), a hub id (`org/repo`), a folder, or a .safetensors or .gguf file.
    bits: 3, 4, 5, 6, 8, "mxfp4", "mxfp8" or "nvfp4", to quantize.
    text_bits: the same for T5 and Qwen3, or 16 for all; by default `bits`, or 8 on a GPU with less than 32 GB.
    dtype: "float16", "bfloat16" or "float32"; by default the one that suits this machine.
    refiner: a second model that finishes each picture, such as "sdxl-refiner".
    taesd: a tiny decoder for previews: "auto" for the one made for the family, a hub id, a folder or a file.
    low_memory: slower, but in less memory. force: try it even if this machine has too little memory.
    request: the picture that will be drawn, so that a wrong setting is refused before a download.
    offline: never use the network. revision: a branch, tag or commit of the hub repository.
    tokenizer: a folder, for a checkpoint without a tokenizer. prediction: "eps" or "v", if the checkpoint does not say.
    parts: files of "vae", "clip", "clip_g", "t5" and "text_encoder" for a checkpoint that lacks them.
    t5: False leaves SD3's T5 out and does not fetch it.
    loras: LoRAs for every picture that does not say, such as ["style.safetensors:0.8"].
    embeddings: the same for words that are taught to CLIP (textual inversion), such as ["moss.safetensors=<moss>"].
    lora_dir: a folder where the names of both are looked up, in place of that of the variable MLXDIFF_LORAS.
    prompt_cache: whether to keep what large text encoders make of a prompt, for the next time.
    progress: called with (stage, bytes done, bytes in all)."""
    check_options(load, locals(), SETTINGS)
    from . import store, tune
    from .store import adapters

    if note := tune.apply():
        warnings.warn(note, stacklevel=2)

    lora_dir = adapters.folder_of(lora_dir)
    asked_for = {"request": request, "loras": loras, "embeddings": embeddings, "lora_dir": lora_dir}
    check = partial(_check, **asked_for, low_memory=low_memory, force=force, t5=t5)
    absent = [None if m is None or store.local(m) is not None else str(m) for m in (model, refiner)]
    advice.check_named(absent, recipe(bits, dtype, text_bits=text_bits), check)
    options = {"bits": bits, "text_bits": text_bits, "dtype": dtype, "prediction": prediction, "parts": parts, "t5": t5}
    options |= {"offline": offline, "revision": revision, "tokenizer": tokenizer, "progress": progress}

    def opened(name: str | Path, **check) -> Pipeline:
        folder = store.resolve(name, **options, **check)
        pipe = Pipeline(Networks(folder, description.read(folder)), low_memory, force, offline)
        pipe.keeps_prompts = prompt_cache
        return pipe

    pipe = opened(model, check=check)
    pipe.attached.progress = progress
    pipe.attached.loras, pipe.attached.embeddings, pipe.attached.lora_dir = tuple(loras), tuple(embeddings), lora_dir
    if refiner is not None:
        pipe.attach_refiner(opened(refiner))
    if taesd is not None and not (taesd == "auto" and pipe.previews_by_vae):
        name = pipe.description.taesd if taesd == "auto" else taesd
        pipe.attach_taesd(store.taesd(name, dtype=pipe.description.recipe.dtype, offline=offline, progress=progress))
    return pipe


def _check(
    model: description.Description,
    *,
    request: Request | None,
    loras: Sequence[str],
    embeddings: Sequence[str],
    lora_dir: Path | None,
    low_memory: bool,
    force: bool,
    t5: bool,
    refiner: description.Description | None = None,
) -> None:
    """Raise for what a model, which may not be here yet, cannot draw on this machine. request, loras and so on: those
    of `load`. refiner: the second model, if it is known."""
    changed = attached.under(loras, request, model, lora_dir)
    others = {"beside": attached.beside(request, changed), "readers": attached.readers(request, changed)}
    others |= {"loras": attached.changes(loras, request, model, lora_dir), "refiner": refiner}
    full = None if request is None else attached.settled(request, loras, model, lora_dir)[0]
    advice.check_request(changed, request=full, low_memory=low_memory, force=force, t5=t5, **others)
    attached.check(embeddings, request, model, lora_dir)
    pictures.check(request, changed)
    if request is not None and request.upscaler is not None:
        upscale.check(request.upscaler)


@takes_settings
def stream(
    prompt: str | Request, model: str | Path = families.DEFAULT, **settings: "Unpack[Settings]"
) -> Iterator[Event]:
    """Load a model and draw with it once, event by event. To draw twice, keep the Pipeline that `load` returns."""
    request = asked(prompt, settings)
    return load(model, request=request).stream(request)


class Pipeline:
    """A model that draws. Text encoders are released before the denoiser is loaded."""

    def __init__(self, networks: Networks, low_memory: bool = False, force: bool = False, offline: bool = False):
        self.networks, self.description = networks, networks.description
        self.description.check_draws()
        self.low_memory, self.force, self.keeps_prompts = low_memory, force, False
        self.attached = Attached(networks.folder, networks.description, offline)
        self.refiner: Pipeline | None = None
        self._taesd: nn.Module | None = None
        self.larger = Larger(networks.description, offline)
        self._texts: tuple[tuple, list[conditioning.Text]] | None = None
        self.starts = Starts(networks, self.description, low_memory)
        self._wider: Pipeline | None = None  # what a LoRA that reads control pictures makes of this one

    def __repr__(self) -> str:
        model = self.description
        return f"<{self.name}: {model.family.title}, {model.recipe}, in {self.networks.folder}>"

    @property
    def name(self) -> str:
        return self.description.name

    def attach_refiner(self, refiner: "Pipeline") -> None:
        """Let a second model finish the pictures that this one begins. It must work on the same latents."""
        self.description.check_refiner(refiner.description)
        self.refiner = refiner

    def hold(self, networks: dict[str, nn.Module]) -> None:
        """Draw the next picture with these networks, which are being trained. `release` ends that."""
        for name, network in networks.items():
            self.networks.hold(name, network)
        self._texts = None  # they may have been read by an encoder before it was trained

    def release(self, networks: dict[str, nn.Module]) -> None:
        self.networks.release(*networks)
        self._texts = None

    def attach_taesd(self, decoder: nn.Module) -> None:
        """Use a tiny decoder for previews."""
        self.description.check_taesd(decoder.config.latent_channels)
        self._taesd = decoder

    # --- requests and pictures

    @takes_settings
    def resolve(self, prompt: str | Request, **settings: "Unpack[Settings]") -> Request:
        """The request with every open setting filled from this model's defaults, and checked. prompt: what to draw, or
        an earlier request, whose settings hold where no others are given."""
        request = self.larger.resolve(self.attached.resolve(asked(prompt, settings)))
        pipe = self.under(request)
        full = pipe.starts.resolve(request)
        for each in [full] if full.hires is None else [full, pipe.description.second_pass(full)]:
            self.attached.check_size(each)
        return full

    def under(self, request: Request) -> "Pipeline":
        """The pipeline that draws a request whose LoRAs are known: this one, or one of the same networks if a LoRA lets
        the denoiser read a control picture."""
        if self._wider is self or not any(adapter.inputs for adapter, _ in self.attached.adapters(request)):
            return self
        if self._wider is None:
            self._wider = copy(self)
            self._wider._wider = self._wider
            self._wider.description = self.description.widened()
            self._wider.starts = Starts(self.networks, self._wider.description, self.low_memory)
        return self._wider

    def workload(self, request: Request) -> memory.Workload:
        """The workload of a resolved request, for `memory`."""
        if (pipe := self.under(request)) is not self:
            return pipe.workload(request)
        refiner = None if self.refiner is None else self.refiner.description
        sizes = self.starts.pictures(request).sizes
        beside = tuple(self.attached.control(guide)[1] for guide in request.controls if guide.model is not None)
        readers = tuple(self.attached.references.reader(guide).workload for guide in request.references)
        loras = tuple(adapter for adapter, _ in self.attached.adapters(request))
        return memory.Workload(self.description, request, self.low_memory, refiner, sizes, beside, readers, loras)

    @takes_settings
    def __call__(self, prompt: str | Request, **settings: "Unpack[Settings]") -> Result:
        """Draw: pipe("a red house", seed=7).save("house.png"). prompt: what to draw, or an earlier request, whose
        settings hold where no others are given."""
        start, drawn, reused = time.perf_counter(), [], 0
        request = self.resolve(prompt, **settings)
        self._warn(request)
        mx.reset_peak_memory()
        for event in self.run(request):
            reused += event.reused
            if event.image is not None:
                drawn.append(event.image)
        seconds = time.perf_counter() - start
        return Result(drawn, request, seconds, mx.get_peak_memory(), self.name, str(self.description.recipe), reused)

    @takes_settings
    def stream(self, prompt: str | Request, **settings: "Unpack[Settings]") -> Iterator[Event]:
        """The run, event by event. Leaving the loop stops the run; nothing continues in the background."""
        request = self.resolve(prompt, **settings)
        self._warn(request)
        return self.run(request)

    def _warn(self, request: Request) -> None:
        """Warn of words that the model does not know, unless it is being taught."""
        if not self.networks.trains(*self.description.components):
            builtin.warn(self.name, request.prompt, self.attached.taught(request))

    def run(self, request: Request, given: np.ndarray | None = None) -> Iterator[Event]:
        """The run of a resolved request. given: standard noise (B, h, w, c) to use in place of the seed's first
        noise."""
        if (pipe := self.under(request)) is not self:
            yield from pipe.run(request, given)
            return
        if not self.force:
            advice.check(self.workload(request))
        with computing(self.name):
            if request.hires is not None:
                yield from self.larger.two_passes(self._pass, request, given)
                return
            for event in self._pass(request, given):
                if event.image is None or request.upscaler is None:
                    yield event
                else:
                    yield event._replace(image=None)
                    yield from self.larger.upscale(request, event.image)

    def _pass(self, request: Request, given: np.ndarray | None = None) -> Iterator[Event]:
        """One pass of a resolved request."""
        model = self.description
        if self.low_memory:
            mx.set_cache_limit(_LOW_MEMORY_CACHE)
        self.networks.adapt(self.attached.adapters(request))
        spec, schedule = samplers.SAMPLERS[request.sampler], model.noise_levels(request)
        fn = samplers.of_flow(request.sampler) if model.flow else spec.fn
        whole = schedules.sigmas(schedule, request.schedule, request.steps)
        steps = model.taken(request)
        sigmas = whole[-1 - steps :]
        parts = [(self, sigmas)] if self.refiner is None else self._hand_over(request, schedule, sigmas)
        texts, seen = [], (yield from self.attached.references.see(request, self.attached.picture))
        for pipe, _ in parts:
            texts.append((yield from pipe.texts(request)))
        texts[0] = extended(texts[0], request.references, seen)

        draw = self.noise(request)
        hints = yield from self.starts.controls(request, self.attached.encoded(request), draw)
        control = next((self.attached.picture(guide) for guide in request.controls if guide.model is None), None)
        start = yield from self.starts.begin(request, schedule, sigmas[0], draw, given, control)
        start = start._replace(hints=hints)
        x = start.x
        extra, done, passes = {"draw": draw, "eta": request.eta} if spec.noisy else {}, 0, Passes(request.reuse)
        for (pipe, part), text in zip(parts, texts, strict=True):
            span = partial(Guide.times, taken=steps, sigmas=whole, t=schedule.t)
            read, see = (start, shown(model, request.references, seen, span)) if pipe is self else (None, [])
            asked = request if pipe is self else replace(request, controls=())  # they guide the first model alone
            denoise = yield from pipe.denoiser(asked, schedule, spec.visits(part), text, whole, read, see, passes)
            if start.mask is not None:
                denoise = guidance.masked(denoise, start.mask, start.z, start.noised, sigmas[0])
            yield Event("denoise", done, steps, 0.0, x=np.array(x), sigma=part[0])
            begin = time.perf_counter()
            for (state, x0), sigma in zip(fn(denoise, x, part, **extra), part[1:], strict=True):
                x, finite = state, mx.isfinite(state).all()
                mx.eval(x, x0, finite)
                pipe._check_finite(finite)
                done, now = done + 1, time.perf_counter()
                yield Event("denoise", done, steps, now - begin, np.array(x0), None, np.array(x), sigma, passes.step())
                begin = time.perf_counter()
            del denoise  # it holds the network
            if pipe is not self or self.low_memory:
                pipe.networks.release(pipe.description.family.denoiser)
                pipe.attached.release()
        z = x / schedule.spread(sigmas[-1])
        if start.mask is not None:  # a run that ends above 0 leaves noise outside the mask too
            z = start.mask * z + (1 - start.mask) * start.z
        yield from self._decode(z, start.finish)

    def preview(self, x0: np.ndarray) -> list[Image.Image]:
        """Rough pictures of predicted latents (B, h, w, c). The TAESD makes them if there is one, the VAE if it is
        small; else, or if the numbers overflow there, one linear map, if the family's fits these latents."""
        decoder, usual = self._taesd, self.description.usual_latents
        if decoder is None and (self.previews_by_vae or not usual):
            decoder = self.networks.get("vae")
        pixels = None if decoder is None else _pixels(decoder, x0)
        if pixels is None or (usual and not np.isfinite(pixels).all()):
            return [images.preview(x, self.description.family.preview) for x in x0]
        return [images.to_image(np.nan_to_num(p)) for p in pixels]

    def decode(self, z: np.ndarray) -> list[Image.Image]:
        """The pictures that the VAE decodes from latents (B, h, w, c)."""
        pixels = _pixels(self.networks.get("vae"), z)
        if not np.isfinite(pixels).all():
            raise self.description.not_finite()
        return [images.to_image(p) for p in pixels]

    @property
    def previews_by_vae(self) -> bool:
        """Whether the VAE is small enough to draw previews."""
        return (self.networks.folder / "vae.safetensors").stat().st_size <= _SMALL_VAE

    # --- the stages; `probe` runs some of them alone

    def noise(self, request: Request) -> Callable[[], mx.array]:
        """A function that draws standard noise (B, h, w, c) from the request's seeds, new noise in each call."""
        seeds = [Noise(request.seed + i, request.noise) for i in range(request.count)]
        return partial(draw_nhwc, seeds, *self.description.latent_size(request), self.description.latent_channels)

    def texts(self, request: Request) -> Iterator[Event]:
        """The encoded negative prompt (if this run uses guidance) and prompt. They are kept for the next seed."""
        model = self.description
        guided, t5 = model.passes(request) == 2, model.reads_t5(request)
        zeros = guided and request.negative is None and model.zero_negative
        prompts = [request.prompt]
        if guided and not zeros:
            prompts.insert(0, "" if request.negative is None else request.negative)
        files = request.loras, request.lora_hashes, request.embeddings, request.embedding_hashes
        key = (prompts, request.clip_skip, zeros, t5, *files)
        if self._texts is None or self._texts[0] != key:
            from .store import prompts as prompt_cache

            yield Event("encode", 0, 1, 0.0)
            begin = time.perf_counter()
            texts = prompt_cache.read(self, prompts, request, t5, files)
            if zeros:
                texts.insert(0, conditioning.Text(*(None if a is None else mx.zeros_like(a) for a in texts[0])))
            mx.eval(texts)
            self._texts = (key, texts)
            yield Event("encode", 1, 1, time.perf_counter() - begin)
        return self._texts[1]

    def read(self, prompts: list[str], request: Request, t5: bool) -> list[conditioning.Text]:
        """Encode prompts as a resolved request says, whatever its own prompt is."""
        model, text_plan, parts = self.description, self.description.text, {}
        toks = conditioning.load_tokenizers(text_plan, self.networks.folder, t5)
        learned = self.attached.words(request)
        conditioning.teach_tokenizers(toks, learned, model.components)
        for name, words in conditioning.tokenize(text_plan, toks, prompts).items():
            try:
                conditioning.teach(self.networks.get(name), name, learned)
                parts[name] = conditioning.read(text_plan, self.networks.get(name), words, request.clip_skip)
                mx.eval(parts[name])
            finally:  # one encoder at a time: T5 alone is larger than all the others; after Ctrl-C it is still taught
                self.networks.release(name)
        return conditioning.join(text_plan, parts, model.net.context)

    def denoiser(
        self,
        request: Request,
        schedule: Schedule,
        visits: list[float],
        texts: list,
        sigmas: list[float],
        start: Start | None = None,
        pictures: Sequence[conditioning.Picture] = (),
        passes: Passes = NOTHING,
    ):
        """The network under its conditions, with everything that does not depend on the latent already computed.
        visits: the sigmas at which it will be called; sigmas: those of the whole run, for intervals; start: what the
        run starts with; pictures: what IP-Adapters give; passes: what they keep, if steps are to be reused."""
        model, ts = self.description, [schedule.t(s) for s in visits]
        net = yield from self._loaded()
        conds = self._conditions(net, request, ts, texts, start, pictures)
        for side, controls in (yield from self._controls(request, schedule, ts, texts, sigmas, start, conds)).items():
            conds[side]["controls"] = controls
        conds = {side: cond | passes.one() for side, cond in conds.items()}
        begin, end = (f * request.steps for f in request.skip_interval)  # both ends are excluded, as in diffusers
        return guidance.denoiser(
            controlled(net),
            schedule,
            model.prediction,
            **conds,
            beside=None if start is None else start.beside,
            scale=model.cfg(request) if len(texts) == 2 else 1.0,
            rescale=request.rescale,
            interval=tuple(sigmas[round(f * request.steps)] for f in request.interval),
            skip=conds["cond"] | passes.one() | {"skip_layers": request.skip_layers} if request.skip_layers else None,
            skip_scale=request.skip_scale,
            skip_interval=(sigmas[min(math.floor(begin) + 1, request.steps)], sigmas[math.ceil(end)]),
            dtype=dtype_of(net),
        )

    def _loaded(self) -> Iterator[Event]:
        """The denoiser."""
        name = self.description.family.denoiser
        if name not in self.networks:
            yield Event("load", 0, 1, 0.0)
            begin = time.perf_counter()
            net = self.networks.get(name)
            if self.description.flow:
                net.release_modulation()
            mx.eval(net.parameters())
            yield Event("load", 1, 1, time.perf_counter() - begin)
        return self.networks.get(name)

    def _conditions(
        self, net: nn.Module, request: Request, ts: list[float], texts: list, start: Start | None, pictures: Sequence
    ) -> dict[str, dict]:
        """What the denoiser reads beside the latent, on each side of guidance, evaluated."""
        model = self.description
        # Modulation weights are needed only here: a transformer rereads them for each run and frees them afterwards.
        source = self.networks.whole(model.family.denoiser) if model.flow else net
        references = () if start is None else start.references
        conds = conditioning.prepare(model, source, request, ts, texts, not self.low_memory, references, pictures)
        del source  # it would hold the modulation weights until all conditions are evaluated
        # A transformer's conditions are evaluated one by one. Otherwise all modulation weights are read before the
        # first is used, which holds a quarter of FLUX once more. A U-Net holds its weights anyway: it waits once for
        # all of its conditions, not once for each layer.
        for part in [part for _, part in tree_flatten(conds)] if model.flow else [conds]:
            mx.eval(part)
        return conds

    def _controls(
        self,
        request: Request,
        schedule: Schedule,
        ts: list[float],
        texts: list,
        sigmas: list[float],
        start: Start | None,
        sides: dict[str, dict],
    ) -> Iterator[Event]:
        """What the networks that guide add to the conditions of each side. sigmas: those of the whole run."""
        latents = iter(() if start is None else start.hints)
        added = {}
        base = self.networks.get(self.description.family.denoiser)
        for path in self.attached.networks(request):
            yield Event("load", 0, 1, 0.0)
            begin = time.perf_counter()
            self.attached.open(path)
            yield Event("load", 1, 1, time.perf_counter() - begin)
        for guides in self.attached.together([guide for guide in request.controls if guide.model is not None]):
            net = self.attached.network(guides[0])
            times = guides[0].times(self.description.taken(request), sigmas, schedule.t)
            if net.config.reads_latents:
                hints = [next(latents)]
            else:
                shown, hole = [self.attached.picture(guide) for guide in guides], net.config.hole
                hints = [mx.array(self.starts.control(request, picture, hole))[None] / 2 + 0.5 for picture in shown]
            found = conditioning.control(self.description, net, guides, request, hints, ts, texts, sides, times, base)
            for side, control in found.items():
                mx.eval(vars(control))
                added.setdefault(side, []).append(control)
        return added

    def _decode(self, z: mx.array, finish: Callable[[Image.Image], Image.Image]) -> Iterator[Event]:
        """Decode pictures one at a time: a batch would need the VAE's peak memory once for each picture."""
        yield Event("decode", 0, z.shape[0], 0.0)
        vae, tile = self.networks.get("vae"), memory.TILE if self.low_memory else None
        for i in range(z.shape[0]):
            begin = time.perf_counter()
            pixels = vae.decode(z[i : i + 1].astype(dtype_of(vae)), tile=tile)[0].astype(mx.float32)
            mx.eval(pixels)
            self._check_finite(mx.isfinite(pixels).all())
            image = finish(images.to_image(np.array(pixels)))
            yield Event("decode", i + 1, z.shape[0], time.perf_counter() - begin, image=image)

    def _check_finite(self, finite: mx.array) -> None:
        """Stop the run at an overflow, so that no black picture is written. The error names a dtype that works."""
        if not finite.item():
            raise self.description.not_finite()

    def _hand_over(self, request: Request, schedule: Schedule, sigmas: list[float]) -> list[tuple]:
        """This model and its refiner, each with its sigmas. The refiner takes the timesteps below the cut."""
        cut = round(schedule.n * (1 - request.refine_at))
        k = sum(schedule.t(s) >= cut for s in sigmas[:-1])
        halves = [(self, sigmas[: k + 1]), (self.refiner, sigmas[k:])]
        return [(pipe, part) for pipe, part in halves if len(part) > 1]


def _pixels(decoder: nn.Module, z: np.ndarray) -> np.ndarray:
    """(B, h, w, c) to (B, H, W, 3) in [-1, 1]."""
    pixels = decoder.decode(mx.array(z).astype(dtype_of(decoder))).astype(mx.float32)
    mx.eval(pixels)
    return np.array(pixels)
