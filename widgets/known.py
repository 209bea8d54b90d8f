"""What is known of the model that a studio names, before and after it is open: its defaults, the sizes that it takes,
and how much memory its pictures need."""

import os
from collections.abc import Sequence
from dataclasses import replace

from .. import advice, families, images
from ..advice import Machine
from ..description import Description, published
from ..families import MODELS, QUICK, Defaults, Fast
from ..memory import Workload, peak
from ..recipe import Recipe, recipe
from ..request import Request

MULTIPLE = 64  # pixels: until a model is open, edges are multiples of this, which suits every model
SHAPES = {"Square": (1, 1), "Tall": (2, 3), "Wide": (3, 2)}


class Known:
    """The model of one name. `opened` is its description, once it is open."""

    def __init__(self, name: str):
        row = families.find(name)
        self.name = name
        self.opened: Description | None = None
        self.defaults: Defaults | None = None if row is None else row.defaults
        self.here = os.path.exists(name) if row is None else row.repo is None  # opening it fetches nothing

    def open(self, model: Description) -> None:
        self.opened, self.defaults = model, model.defaults

    @property
    def description(self) -> Description | None:
        """The model's own description once it is open; before that, the published one of a named model."""
        if self.opened is not None:
            return self.opened
        return published(self.name, recipe(family=MODELS[self.name].family)) if self.name in MODELS else None

    @property
    def edits(self) -> int:
        """How many pictures the model edits, as far as it is known."""
        model = self.description
        return 0 if model is None else model.row.edits

    @property
    def inpaints(self) -> bool:
        """Whether the model was made to draw a part of a picture anew, and draws nothing else."""
        model = self.description
        return model is not None and model.row.inpaints

    @property
    def reads_control(self) -> bool:
        """Whether the model itself reads a control picture, without a network beside it."""
        model = self.description
        return model is not None and "control" in model.row.reads

    @property
    def takes_references(self) -> bool:
        """Whether a reference picture may guide the model, as far as it is known."""
        model = self.description
        return model is None or bool(model.family.references)

    def networks(self, role: str, masked: bool = False) -> list[str]:
        """The names of networks that guide the model. role: "control" or "reference". masked: those that read the
        masked start picture, else those that read a picture of their own."""
        model = self.description
        rows = {} if model is None else families.fitting(model.family, model.net, role)
        return [name for name, row in rows.items() if row.masked == masked]

    @property
    def quick(self) -> Fast | None:
        """The model's own LoRA for few steps, if it has one."""
        model = self.description
        return None if model is None else families.fitting(model.family, model.net, "lora").get(QUICK)

    @property
    def aspects(self) -> tuple[str, ...]:
        """What the model may take over of a reference picture alone."""
        model = self.description
        return () if model is None else tuple(model.family.aspects)

    @property
    def multiple(self) -> int:
        return MULTIPLE if self.opened is None else self.opened.multiple

    def sized(self, shape: tuple[int, int], outpaint: Sequence[int] = (0, 0, 0, 0)) -> dict[str, int]:
        """Width and height of this shape, with at most as many pixels as the model's default size, and what `outpaint`
        adds."""
        request = Request("", outpaint=tuple(outpaint)).sized(shape, self.defaults.size**2, self.multiple)
        return {"width": request.width, "height": request.height}

    def shaped(self, name: str) -> dict[str, int]:
        """Width and height of one of SHAPES, with about as many pixels as the model's default size."""
        return self.sized(tuple(edge * self.defaults.size for edge in SHAPES[name]))

    def shape(self, pictures: Sequence[tuple[int, int]], outpaint: Sequence[int]) -> dict[str, int]:
        """Width and height of the result of pictures of these sizes; empty if there are none."""
        if not pictures:
            return {}
        if self.edits:
            return dict(zip(("width", "height"), self.description.cuts(pictures[:1])[0].size, strict=True))
        return self.sized(pictures[0], outpaint)

    # --- memory

    def workload(self, request: Request, options: dict) -> Workload | None:
        """The request with the options of `mlxdiff.load`, or None as long as the model is not known."""
        model = self.description
        if model is None:
            return None
        if options.get("bits") is not None:
            model = replace(model, recipe=Recipe(model.recipe.dtype, options["bits"]))
        sizes = tuple(images.size(picture) for picture in request.pictures)
        refiner = options.get("refiner")
        second = published(refiner, model.recipe) if refiner in MODELS else None
        return Workload(model, model.resolve(request, sizes), options.get("low_memory", False), second, sizes)


def estimate(workload: Workload, machine: Machine) -> str:
    return f"Memory: about {peak(workload, machine.gpu) / 1e9:.1f} of {machine.budget / 1e9:.1f} GB"


def fit(workload: Workload, machine: Machine) -> dict | None:
    """Settings that make the workload fit, none if it does, or None if nothing makes it fit."""
    if advice.fits(workload, machine):
        return {}
    return next((settings for settings, _ in advice.options(workload, machine)), None)
