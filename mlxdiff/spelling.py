"""How each front end spells a setting. The library's errors name settings in backticks, as Python has them, with a
value or without: `bits=4`, `t5=False`, `shift`. The command line and the studio put their own words in their place."""

import re
from collections.abc import Callable

# Settings whose flag is not simply their name.
FLAGS = {
    "bits": "-q",
    "count": "-b",
    "guidance": "-g",
    "height": "-H",
    "image": "-i",
    "model": "-m",
    "negative": "-n",
    "output": "-o",
    "seed": "-s",
    "width": "-W",
}
# Values that are spelled by a flag alone.
_WORDS = {("t5", "False"): "--no-t5", ("refiner", "None"): "no --refiner"}
# Settings of a run that the studio has under a label; all others of Request go through `more`, those of load `options`.
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
}
_MARKED = re.compile(r"`(\w+)(?:=([^`]*))?`")


def flag(setting: str) -> str:
    return FLAGS.get(setting, f"--{setting.replace('_', '-')}")


def as_flags(text: str) -> str:
    """For the command line: `bits=4` -> -q 4."""

    def spell(name: str, value: str | None) -> str:
        if (name, value) in _WORDS:
            return _WORDS[name, value]
        return flag(name) if value in (None, "True") else f"{flag(name)} {_plain(value)}"

    return _spelled(text, spell)


def as_controls(text: str) -> str:
    """For the studio: `steps=4` -> Steps 4, `bits=4` -> options={'bits': 4}."""

    def spell(name: str, value: str | None) -> str:
        if name in LABELS:
            return LABELS[name] if value is None else f"{LABELS[name]} {_plain(value)}"
        return name if value is None else f"options={{'{name}': {value}}}"

    return _spelled(text, spell).replace("} options={", ", ")


def _spelled(text: str, spell: Callable[[str, str | None], str]) -> str:
    return _MARKED.sub(lambda m: spell(m[1], m[2]), text)


def _plain(value: str) -> str:
    """A Python value as it is typed: text without quotes, unless it is empty; a tuple without brackets and commas."""
    if value[0] == "(":
        return value[1:-1].replace(",", "")
    return value[1:-1] if len(value) > 2 and value[0] == value[-1] and value[0] in "'\"" else value
