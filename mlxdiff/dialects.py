"""The names that other programs have for our settings: for samplers and schedules, and in the text `parameters` that
A1111 writes into its pictures. Settings are dicts with the field names of `Request`, which looks up names here."""

import re
import reprlib
from dataclasses import dataclass
from pathlib import Path

from . import __version__
from .errors import Error, did_you_mean

# ---- names of samplers and schedules


@dataclass(frozen=True)
class Names:
    a1111: str
    diffusers: tuple[str, ...] = ()  # scheduler classes
    comfyui: tuple[str, ...] = ()  # its names that differ from ours


# Our name of a sampler -> the other programs' names. A user may type any of them, in upper or lower case.
SAMPLERS = {
    "euler": Names("Euler", ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler")),
    "euler_ancestral": Names("Euler a", ("EulerAncestralDiscreteScheduler",)),
    "heun": Names("Heun", ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")),
    "dpmpp_2m": Names("DPM++ 2M", ("DPMSolverMultistepScheduler",)),
    "dpmpp_2m_sde": Names("DPM++ 2M SDE"),
    "dpmpp_sde": Names("DPM++ SDE", ("DPMSolverSDEScheduler",)),
    "unipc": Names("UniPC", ("UniPCMultistepScheduler",), ("uni_pc", "uni_pc_bh2")),
    "pndm": Names("PLMS", ("PNDMScheduler",)),
    "ddim": Names("DDIM", ("DDIMScheduler",)),
    "ddpm": Names("DDPM", ("DDPMScheduler",)),
    "lcm": Names("LCM", ("LCMScheduler",)),
}
# Our name of a schedule -> A1111's. A name that ends in another name must come before it.
SCHEDULES = {
    "leading": "Leading",
    "trailing": "Trailing",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm_uniform": "SGM Uniform",
    "linspace": "Uniform",
    "beta": "Beta",
    "simple": "Simple",
    "lcm": "LCM",
}
DIFFUSERS = {cls: sampler for sampler, names in SAMPLERS.items() for cls in names.diffusers}
_NAMES = {
    name: sampler
    for sampler, names in SAMPLERS.items()
    for name in (sampler, names.a1111, *names.diffusers, *names.comfyui)
}
_SAMPLER_OF = {name.casefold(): sampler for name, sampler in _NAMES.items()}
_SCHEDULE_OF = {name.casefold(): schedule for schedule, name in SCHEDULES.items()}


def sampler(name: str) -> tuple[str, str | None]:
    """Our sampler for any program's name of it, and the schedule if the name ends in one. Case is ignored."""
    if isinstance(name, str):
        head, schedule = _split(name)
        if head.casefold() in _SAMPLER_OF:
            return _SAMPLER_OF[head.casefold()], schedule
    near = did_you_mean(name, _NAMES) if isinstance(name, str) else ""
    raise Error(f"There is no sampler {reprlib.repr(name)}.", f"{near}Use one of {', '.join(SAMPLERS)}.")


def _split(name: str) -> tuple[str, str | None]:
    """Older versions of A1111 append the schedule to the sampler: "DPM++ 2M Karras"."""
    for theirs, ours in _SCHEDULE_OF.items():
        if name.casefold().endswith(f" {theirs}"):
            return name[: -len(theirs) - 1], ours
    return name, None


# ---- the text that A1111 and its relatives write and read


def parameters(settings: dict, model: str, recipe: str) -> str:
    """The settings of a resolved request as A1111 writes them: prompt, negative prompt, then one line of pairs."""
    lines = [" ".join([settings["prompt"], *map(_tag, settings["loras"] or ())])]
    if settings["negative"] is not None:
        lines.append(f"Negative prompt: {settings['negative']}")
    pairs = {
        "Steps": settings["steps"],
        "Sampler": SAMPLERS[settings["sampler"]].a1111,
        "Schedule type": SCHEDULES[settings["schedule"]],
        "CFG scale": f"{settings['guidance']:g}",
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Denoising strength": settings["strength"],
        **_enlarged(settings),
        "Model": _quoted(model),
        "Weights": recipe,
        "Clip skip": settings["clip_skip"],
        "RNG": {"torch": "CPU", "nv": "NV"}.get(settings["noise"]),
        "Version": f"mlxdiff {__version__}",
    }
    lines.append(", ".join(f"{k}: {v}" for k, v in pairs.items() if v is not None))
    return "\n".join(lines)


def _enlarged(settings: dict) -> dict:
    """What A1111 writes of two passes, and of an enlarged picture."""
    by = None if settings["upscaler"] is None else _quoted(Path(settings["upscaler"]).name)
    if settings["hires"] is None:
        return {"Postprocess upscaler": by}
    scale, strength = settings["hires"]
    shared = {} if settings["image"] is not None else {"Denoising strength": strength}
    return shared | {"Hires upscale": f"{scale:g}", "Hires upscaler": "Lanczos" if by is None else by}


_LORA = re.compile(r"<lora:([^:<>]+)(?::([^:<>]*))?[^<>]*>")


def loras(prompt: str) -> tuple[str, list[str]]:
    """A prompt without A1111's <lora:name:scale>, and these LoRAs as a request has them. What is no scale stays, to be
    refused; what extensions add behind it, and values with names, are left out."""
    named = [f"{name}:{scale}" if scale.strip() and "=" not in scale else name for name, scale in _LORA.findall(prompt)]
    return (_LORA.sub("", prompt).strip(), named) if named else (prompt, named)


def lora(text: str) -> tuple[str, float | None]:
    """A LoRA and its scale: style.safetensors:0.8. None: it is not said."""
    name, _, scale = text.rpartition(":")
    try:
        return (name, float(scale)) if name else (text, None)
    except ValueError:
        return text, None


def embedding(text: str) -> tuple[str, str | None]:
    """An embedding's file and its word: moss.safetensors=<moss>. None: the word that the file has."""
    name, found, word = text.partition("=")
    return name, word if found else None


def _quoted(text: str) -> str:
    return f'"{text}"' if re.search(r"[,:\n]", text) else text


def _tag(lora: str) -> str:
    """A LoRA of a request as A1111 writes it into the prompt."""
    name, _, scale = lora.rpartition(":")
    return f"<lora:{Path(name).stem}:{scale}>"


def parse_parameters(text: str) -> tuple[dict, str | None]:
    """Settings and the model's name from A1111's text. A sampler or schedule that is not ours becomes None. Raises
    ValueError if a number cannot be read."""
    lines = text.strip().splitlines()
    pairs = _pairs(lines[-1]) if lines and "Steps:" in lines[-1] else {}
    body = "\n".join(lines[:-1] if pairs else lines)
    prompt, separator, negative = body.partition("Negative prompt:")
    settings: dict = {"prompt": prompt.strip(), "negative": negative.strip() if separator else None}
    for key, read in _READ.items():
        if key in pairs:
            try:
                settings |= read(pairs[key])
            except ValueError:
                raise ValueError(f"{key} is {reprlib.repr(pairs[key])}") from None
    head, schedule = _split(pairs.get("Sampler", ""))
    if "Schedule type" in pairs:
        schedule = _SCHEDULE_OF.get(pairs["Schedule type"].casefold())
    settings |= {"sampler": _SAMPLER_OF.get(head.casefold()), "schedule": schedule}
    settings["noise"] = "torch" if pairs.get("RNG") == "CPU" else "nv"
    return settings, pairs.get("Model")


def _edges(size: str) -> dict:
    width, height = size.split("x")
    return {"width": int(width), "height": int(height)}


_READ = {
    "Steps": lambda v: {"steps": int(v)},
    "CFG scale": lambda v: {"guidance": float(v)},
    "Seed": lambda v: {"seed": int(v)},
    "Clip skip": lambda v: {"clip_skip": int(v)},
    "Size": _edges,
}
# A value in quotes where \" means a quote; or in quotes with a plain backslash at the end; or up to the next comma.
_VALUE = re.compile(r'\s*("[^"\\]*(?:\\.[^"\\]*)*"(?=,|$)|"[^"]*"(?=,|$)|[^,]*)')


def _pairs(line: str) -> dict[str, str]:
    """`key: value, key: "value, with commas"`. The line is read once from left to right, so the time is linear in its
    length. A colon with an empty key is skipped, and a value never reaches back."""
    pairs, start = {}, 0
    while (colon := line.find(":", start)) >= 0:
        key = re.split(r"[^\w ]", line[start:colon])[-1]
        start = colon + 1
        if key:
            value = _VALUE.match(line, start)
            pairs[key.strip()] = value[1].strip().strip('"')
            start = value.end() + 1  # after the comma
    return pairs
