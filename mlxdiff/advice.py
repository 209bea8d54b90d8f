"""How much memory this machine has, whether a picture fits it, and which settings would make it fit."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from . import pictures
from .description import Description, published
from .errors import Error
from .families import MODELS, name_of
from .memory import SURE, Workload, peak
from .recipe import BITS, Recipe
from .request import Request

_BITS, _SIZES = (8, 6, 5, 4, 3), (768, 512, 256)


class Machine(NamedTuple):
    memory: int  # bytes in all
    budget: int  # bytes that programs should stay within
    gpu: bool


def this_machine() -> Machine:
    """A GPU reports its limits. Else the memory of the system counts, or the limit of this container. Windows has no
    sysconf, so enough memory is assumed there."""
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
    """A Mac with this much memory. Its GPU may use two thirds of up to 32 GB, and three quarters of more. These are the
    lowest limits that Metal was seen to recommend; newer systems recommend up to 78 %."""
    memory = gigabytes * 2**30
    return Machine(memory, memory * 2 // 3 if gigabytes <= 32 else memory * 3 // 4, True)


def named(name: str, recipe: Recipe, low_memory: bool = False, request: Request | None = None) -> Workload:
    """The workload of a published model that draws a picture, by default with the model's size and steps."""
    model, request = published(name, recipe), Request("") if request is None else request
    sizes = pictures.sizes(request)
    return Workload(model, model.fill(request, sizes), low_memory, pictures=sizes)


def fits(workload: Workload, machine: Machine) -> bool:
    return peak(workload, machine.gpu) <= machine.budget


def check(workload: Workload, machine: Machine | None = None) -> None:
    """Refuse a workload that clearly exceeds the machine, and name settings that would fit."""
    machine = this_machine() if machine is None else machine
    need, request = peak(workload, machine.gpu), workload.request
    if need <= SURE * machine.memory:
        return
    fitting = [f"{spell(settings)} ({n / 1e9:.1f} GB)" for settings, n in options(workload, machine)]
    if fitting:
        fix = f"What fits: {', or '.join(fitting)}."
    else:
        plain = Recipe(workload.model.recipe.dtype, None)
        smaller = [n for n in MODELS if fits(named(n, plain, low_memory=True), machine)]
        others = f"{', '.join(smaller)} would, with `low_memory=True`" if smaller else "nor does any other named model"
        fix = f"It fits at no setting; {others}."
    size = f"{request.width}x{request.height}"
    size += "" if request.hires is None else f", enlarged {request.hires[0]:g} times,"
    size += f", {request.count} at once" if request.count > 1 else ""
    also = "" if workload.refiner is None else " and its refiner"
    raise Error(
        f"{workload.model.name}{also} at {size} takes about {need / 1e9:.1f} GB; this machine has "
        f"{machine.memory / 1e9:.1f}.",
        f"{fix} `force=True` tries it as it is.",
    )


def check_request(
    model: Description,
    request: Request | None,
    low_memory: bool,
    force: bool,
    t5: bool,
    refiner: Description | None = None,
    beside: tuple = (),
    readers: tuple = (),
    loras: tuple = (),
) -> None:
    """Refuse a request, not yet resolved, that this model cannot draw here. request: None if it is not known yet what
    will be drawn, which counts as a small picture. force: do not ask whether the memory is enough."""
    model.check_draws()
    sizes = ()
    if request is None:
        full = model.fill(Request("", width=128, height=128, t5=t5))
    else:
        if request.sampler is None:  # a checkpoint that is not here yet may name another than the family's
            request = replace(request, eta=None)
        sizes = pictures.sizes(request)
        full = model.resolve(request, sizes)
    if not force:
        check(Workload(model, full, low_memory, refiner, sizes, beside, readers, loras))


def check_named(models: list[str | None], recipe: Recipe, check: Callable) -> None:
    """Check a model and its refiner before anything is fetched. Only published models can be checked; nothing is known
    of others yet. None: there is no such model, or it is on this machine."""
    names = [None if m is None else name_of(m) for m in models]
    first, second = (None if name is None else published(name, recipe) for name in names)
    if first is not None:
        check(first, refiner=second)
        if second is not None:
            first.check_refiner(second)


def spell(settings: dict) -> str:
    """Settings as Python spells them."""
    return " ".join(f"`{name}={value!r}`" for name, value in settings.items())


def options(workload: Workload, machine: Machine) -> list[tuple[dict, int]]:
    """Settings that make the workload fit, and the bytes it then takes. Of each kind, the first setting that fits is
    chosen: it gives up least."""
    request, recipe = workload.request, workload.model.recipe
    low = [] if workload.low_memory else [{"low_memory": True}]
    bits = [{"bits": b} for b in _BITS if recipe.bits is None or b < BITS[recipe.bits]]
    t5 = [{"t5": False}] if request.t5 and "t5" in workload.model.family.takes else []
    sizes = [{"width": n, "height": n} for n in _SIZES if n < max(request.width, request.height)]
    fewer = [{"count": 1}] if request.count > 1 else []
    unrefined = [{"refiner": None}] if workload.refiner is not None else []

    def first(kind: list[dict]) -> list[tuple[dict, int]]:
        tried = ((settings, workload.but(**settings)) for settings in kind)
        return next(([(settings, peak(w, machine.gpu))] for settings, w in tried if fits(w, machine)), [])

    ways = [way for kind in (low, fewer, t5, unrefined, bits, sizes) for way in first(kind)]
    if low and not first(low):  # with low_memory, more bits or more pictures may fit
        alone = [settings for settings, _ in ways]
        spared = first(_pairs(bits, low))
        ways = [way for way in spared if {"bits": way[0]["bits"]} not in alone] + ways
        ways = ways if {"count": 1} in alone else first(_pairs(low, fewer)) + ways
    ways = ways or first(_pairs(t5, low)) or first(_pairs(unrefined, low))
    return ways or first(_pairs(_pairs(_pairs(bits, low), fewer), sizes))


def _pairs(some: list[dict], others: list[dict]) -> list[dict]:
    """All pairs; if one list is empty, the other."""
    return [a | b for a in some for b in others] or some or others
