"""How each front end spells a setting. The library's errors put settings in backticks and spell them as Python does,
with a value or without: `bits=4`, `t5=False`, `shift`. The command line and the studio replace these by their own
spelling."""

import re
from collections.abc import Callable

# Settings whose flag is not simply `--` and their name.
FLAGS = {
    "bits": "-q",
    "controls": "--control",
    "count": "-b",
    "embeddings": "--embedding",
    "guidance": "-g",
    "height": "-H",
    "image": "-i",
    "loras": "--lora",
    "model": "-m",
    "negative": "-n",
    "output": "-o",
    "references": "--reference",
    "seed": "-s",
    "upscaler": "--upscale",
    "width": "-W",
}
# Settings with a value that a flag without a value stands for.
_WORDS = {("t5", "False"): "--no-t5", ("keep", "False"): "--no-keep", ("refiner", "None"): "no --refiner"}
# Settings that have a label in the studio. There the other fields of Request are given in `more`, load's in `options`.
LABELS = {
    "prompt": "Prompt",
    "negative": "Negative prompt",
    "seed": "Seed",
    "steps": "Steps",
    "guidance": "Guidance",
    "width": "Width",
    "height": "Height",
    "count": "Pictures",
    "strength": "Strength",
    "sampler": "Sampler",
    "schedule": "Schedule",
    "model": "Model",
    "image": "a picture dropped on the page",
    "mask_blur": "Soft edge",
}
_MARKED = re.compile(r"`(\w+)(?:=([^`]*))?`")


def flag(setting: str) -> str:
    return FLAGS.get(setting, f"--{setting.replace('_', '-')}")


def as_flags(text: str) -> str:
    """Spell settings for the command line: `bits=4` -> -q 4."""

    def spell(name: str, value: str | None) -> str:
        if (name, value) in _WORDS:
            return _WORDS[name, value]
        return flag(name) if value in (None, "True") else f"{flag(name)} {_plain(value)}"

    return _spelled(text, spell)


def as_controls(text: str) -> str:
    """Spell settings for the studio: `steps=4` -> Steps 4, `bits=4` -> options={'bits': 4}."""

    def spell(name: str, value: str | None) -> str:
        if name in LABELS:
            return LABELS[name] if value is None else f"{LABELS[name]} {_plain(value)}"
        return name if value is None else f"options={{'{name}': {value}}}"

    return _spelled(text, spell).replace("} options={", ", ")


def _spelled(text: str, spell: Callable[[str, str | None], str]) -> str:
    return _MARKED.sub(lambda m: spell(m[1], m[2]), text)


def _plain(value: str) -> str:
    """A Python value as people type it: text without quotes, unless empty; a tuple or list without brackets and
    commas."""
    if value[0] in "([":
        return re.sub(r"[()\[\],]", "", value)
    return value[1:-1] if len(value) > 2 and value[0] == value[-1] and value[0] in "'\"" else value
