"""The built-in models: their folders, and the words that they were trained to understand."""

import json
import os
import re
import secrets
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from ..errors import near

NAME = "storybook"
FLOW = "storybook-flow"  # its sibling: another network on the same latents and words
NAMES = NAME, FLOW
FOLDER = Path(__file__).parent / NAME
_LONG = 4  # letters; a shorter word is close to too many others


@cache
def _words() -> dict:
    return json.loads((Path(__file__).parent / "words.json").read_text(encoding="utf-8"))


def vocabulary() -> dict[str, list[str]]:
    """The words for people to read: kind of word -> the words."""
    return _words()["vocabulary"]


def surprise() -> str:
    """A prompt of random words: a thing of some colour, and where, when or under what sky it is."""
    words = vocabulary()
    kinds = ("colours", "objects", "places", secrets.choice(("times", "skies")))
    colour, *rest = (secrets.choice(words[kind]) for kind in kinds)
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {' '.join(rest)}"


@cache
def known_words() -> frozenset[str]:
    phrases = [*_words()["filling"], *(phrase for kind in vocabulary().values() for phrase in kind)]
    return frozenset(word for phrase in phrases for word in phrase.split())


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that the model does not know."""
    said = re.findall(r"[a-z]+", prompt.replace("BREAK", "").lower())
    return [word for word in dict.fromkeys(said) if word not in known_words()]


def notice(model: str, prompt: str, taught: Iterable[str] = ()) -> str:
    """A sentence for people: the words that a built-in model does not know, each with the closest word that it knows.
    "" if it knows all words, and for other models. taught: words that it was taught."""
    if model not in NAMES:
        return ""
    words, taught = [], list(taught)
    for word in taught:
        prompt = prompt.replace(word, "")
    for word in unknown_words(prompt):
        close = near(word, [w for w in sorted(known_words()) if len(w) >= _LONG], 0.75) if len(word) >= _LONG else ""
        close = f"<{word}>" if f"<{word}>" in taught else close
        words.append(f"{word} ({close}?)" if close else word)
    return f"{model} does not know: {', '.join(words)}." if words else ""


def size_notice(model: str, width: int, height: int, edge: int) -> str:
    """A sentence for people about a picture that is smaller than those that a built-in model learned from. "" for
    others."""
    small = f"{model} learned from pictures of {edge} x {edge} pixels: at {width} x {height} it draws less well."
    return small if model in NAMES and width * height < 0.75 * edge**2 else ""


_warned: set[str] = set()


def warn(model: str, prompt: str, taught: Iterable[str] = ()) -> None:
    """If `model` is built in, warn about unknown words: once for the same words, and on the first of several machines.
    The warning points to the code that called the pipeline."""
    text = notice(model, prompt, taught)
    if text and text not in _warned and os.environ.get("MLX_RANK", "0") == "0":
        _warned.add(text)
        warnings.warn(f"{text} mlxdiff.builtin.vocabulary() lists what it knows.", stacklevel=4)
