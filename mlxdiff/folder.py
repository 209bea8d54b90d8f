"""A model folder, opened: what it is, which requests it takes, and its networks, read when a run needs them."""

import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from . import conditioning, images, memory, registry, samplers, schedules, weights
from .errors import Error
from .models.vae import factor
from .registry import FAMILIES, Defaults
from .request import Request
from .schedules import Schedule


class ModelFolder:
    """What `Pipeline` runs on. Opening one reads its description alone."""

    def __init__(self, folder: Path, low_memory: bool = False, defaults: Defaults | None = None):
        self.folder, self.low_memory = Path(folder), low_memory
        self.model = weights.read_description(self.folder)
        self.name = self.model["name"]
        self.family = FAMILIES[self.model["family"]]
        kind = self.model["family"], self.model["variant"]
        self.plan = conditioning.plan(*kind)
        self.net = "unet" if "unet" in self.model["components"] else "transformer"
        if defaults is None:
            row = registry.find(self.name)  # a converted copy of a named model is still that model
            own = row is not None and row.family == kind[0]
            defaults = row.defaults if own else registry.VARIANTS.get(kind, self.family.defaults)
        self.defaults = defaults
        self._networks: dict[str, nn.Module] = {}
        for name in (self.net, "vae", *self.plan.needs):
            if name not in self.model["components"]:
                raise Error(f"{self.folder} has no {name}.", "Use a checkpoint that holds the whole model.")
        if self.model["variant"] not in ("base", "kontext", "lcm", "schnell"):
            raise Error(
                f"{self.name} is a model of the variant {self.model['variant']!r}, which needs more than a prompt.",
                "It converts, but cannot draw yet: use a base model.",
            )

    def __repr__(self) -> str:
        return f"<{self.name}: {self.family.title}, {self.recipe}, in {self.folder}>"

    # --- what it is

    @property
    def recipe(self) -> str:
        """How its weights are stored, in a word."""
        return weights.label(self.model["recipe"])

    @property
    def flow(self) -> bool:
        """Whether this is rectified flow, as all transformers here are."""
        return self.model["prediction"] == "flow"

    @property
    def two_passes(self) -> bool:
        """Whether guidance is a second pass for the negative prompt: not so in LCM and FLUX."""
        net = self.model["components"][self.net]
        return net.get("time_cond") is None and "guidance" not in net

    @property
    def told(self) -> bool:
        """FLUX dev: whether guidance is one of the network's inputs."""
        return self.model["components"][self.net].get("guidance", False)

    @property
    def factor(self) -> int:
        """Pixels a latent stands for, along one edge."""
        return factor(self.model["components"]["vae"]["channels"])

    @property
    def multiple(self) -> int:
        """What a picture's edges are multiples of: a latent, or a transformer's patch of 2 x 2."""
        return self.factor * (2 if self.flow else 1)

    @property
    def latent_channels(self) -> int:
        return self.model["components"]["vae"]["latent_channels"]

    @property
    def time_cond(self) -> int | None:
        """Width of the guidance embedding of a consistency model, which is guided by it and not by a second pass."""
        return self.model["components"][self.net].get("time_cond")

    # --- what it can be asked

    def resolve(self, prompt: str | Request, **settings) -> Request:
        """The request with every open setting filled from this model's defaults, and checked."""
        if "image" in settings:  # not the one that a request to be replayed began with
            settings = {"image_hash": None} | settings
        if unknown := settings.keys() - Request.__dataclass_fields__:
            raise Error(f"There is no setting {min(unknown)}.", f"Use {', '.join(Request.__dataclass_fields__)}.")
        request = replace(prompt, **settings) if isinstance(prompt, Request) else Request(prompt, **settings)
        if request.image is not None:
            request = self._begun(request)
        own = self.model["schedule"]
        pair = self.family.fallback if own["sampler"] is None else (own["sampler"], own["spacing"])
        full = request.resolve(self.defaults, pair, own["spacing"], self.family.clip_skip, self.multiple)
        layers = min(self.model["components"][e]["layers"] for e, _ in self.plan.encoders)
        if full.clip_skip > layers:
            raise Error(f"clip_skip {full.clip_skip} goes below the text encoder's {layers} layers.", "Choose less.")
        self._check(full)
        return full

    def job(self, request: Request) -> memory.Job:
        """What memory counts of a resolved request."""
        return memory.Job(
            self.model["family"],
            self.model["variant"],
            self.model["components"],
            self.model["recipe"]["dtype"],
            self.model["recipe"]["bits"],
            request.width,
            request.height,
            request.steps,
            request.count,
            2 if self.cfg(request) > 1 else 1,
            request.t5,
            request.image is not None,
            self.low_memory,
        )

    def _begun(self, request: Request) -> Request:
        """With the size that the image to begin with makes, and the mark of what it shows."""
        image = images.read(request.image)
        mark = images.fingerprint(image)
        if request.image_hash not in (None, mark):
            raise Error("The image is not what these settings began with.", "Give that one: -i FILE, or image=FILE.")
        return replace(request.sized(image.size, self.defaults.size**2, self.multiple), image_hash=mark)

    def _check(self, request: Request) -> None:
        """What is good for one family and not for another, told before the work."""
        if self.flow:
            samplers.of_flow(request.sampler)
        elif request.shift is not None:
            raise Error(f"{self.name} has no shift: it is no rectified flow.", "Leave shift out.")
        schedule = self.schedule(request)
        schedules.sigmas(schedule, request.schedule, request.steps)
        if request.image is not None and schedule.taken(request.steps, request.strength) == 0:
            none = f"Strength {request.strength:g} of {request.steps} steps leaves no step to take."
            raise Error(none, "Take more of either.")
        if request.image is not None and self.model["variant"] == "kontext":
            raise Error(
                f"{self.name} is a Kontext model, which takes a picture to edit and not to begin with: not supported.",
                "Leave the image out, or use flux-dev.",
            )
        net = self.model["components"][self.net]
        if not request.t5 and (self.plan.t5 is None or self.plan.t5[0] in self.plan.needs):
            raise Error(f"Leaving T5 out is for SD3; {self.name} is {self.family.title}.", "Leave --no-t5 out.")
        if "guidance" in net:  # FLUX
            if not self.told and request.guidance > 1:
                raise Error(
                    f"{self.name} takes no guidance, and {request.guidance:g} was given.",
                    "Leave guidance out, or use flux-dev.",
                )
            if request.negative and request.true_cfg <= 1:
                raise Error(
                    f"{self.name} draws in one pass, which has no place for a negative prompt.",
                    "Add --true-cfg 4 for a second pass, or leave the negative prompt out.",
                )
            if request.negative is None and request.true_cfg > 1:
                raise Error("true_cfg has no negative prompt to pull from.", 'Give one: -n TEXT, or -n "".')
        elif request.true_cfg != 1:
            raise Error(f"true_cfg is for FLUX; {self.name} is {self.family.title}.", "Use guidance.")
        if request.skip_layers:
            self._check_skipped(request, net)
        side = net["positions"] * self.multiple if "positions" in net else math.inf
        if max(request.width, request.height) > side:
            raise Error(f"{self.name} knows positions up to {side} pixels a side.", "Choose a smaller size.")

    def _check_skipped(self, request: Request, net: dict) -> None:
        if self.model["family"] != "sd3":
            raise Error(f"skip_layers is for SD3; {self.name} is {self.family.title}.", "Leave it out.")
        if request.guidance <= 1:
            raise Error(f"skip_layers adds to guidance, and that is {request.guidance:g}.", "Use guidance above 1.")
        for layer in request.skip_layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < net["layers"]:
                raise Error(
                    f"skip_layers names {layer!r}; {self.name} has layers 0 to {net['layers'] - 1}.",
                    "For SD3.5 medium use 7 8 9.",
                )

    def schedule(self, request: Request) -> Schedule:
        """The noise levels of a resolved request."""
        if self.flow:
            h, w = self.latent_size(request)
            return schedules.flow(self.model["schedule"], h * w // 4, request.shift)  # patches of 2 x 2
        return schedules.discrete(self.model["schedule"], samplers.SAMPLERS[request.sampler].grid)

    def cfg(self, request: Request) -> float:
        """The scale of classifier-free guidance. In FLUX, which may be told its guidance, that is another number."""
        if self.time_cond is not None:
            return 1.0
        return request.guidance if self.two_passes else request.true_cfg

    def _reads_t5(self, request: Request) -> bool:
        return request.t5 and self.plan.t5 is not None and self.plan.t5[0] in self.model["components"]

    def latent_size(self, request: Request) -> tuple[int, int]:
        """(h, w)"""
        return request.height // self.factor, request.width // self.factor

    # --- its networks

    def network(self, name: str) -> nn.Module:
        """Opened when first asked for, and kept."""
        if name not in self._networks:
            self._networks[name] = self._open(name)
        return self._networks[name]

    def _open(self, name: str) -> nn.Module:
        return weights.load(self.folder, name, self.model)

    def _release(self, *names: str) -> None:
        for name in names:
            self._networks.pop(name, None)
        mx.clear_cache()

    def _check_finite(self, finite: mx.array) -> None:
        """No black picture is ever written: what overflows stops the run and names the dtype that does not."""
        if not finite.item():
            dtype = self.model["recipe"]["dtype"]
            other = "bfloat16" if dtype == "float16" else "float32"
            raise Error(
                f"{self.name} gave values that are not finite in {dtype}.",
                f"Run it with --dtype {other}." if dtype != "float32" else "Its weights are damaged: fetch them again.",
            )
