"""The built-in model: the folder it lies in, and the words that it was shown to mean something."""

import json
import re
from functools import cache
from pathlib import Path

NAME = "storybook"
FOLDER = Path(__file__).parent / NAME


@cache
def _words() -> dict:
    return json.loads((Path(__file__).parent / "words.json").read_text(encoding="utf-8"))


def vocabulary() -> dict[str, list[str]]:
    """For people: kind of word -> the words."""
    return _words()["vocabulary"]


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that the model does not know."""
    phrases = [*_words()["filling"], *(phrase for kind in vocabulary().values() for phrase in kind)]
    known = {word for phrase in phrases for word in phrase.split()}
    said = re.findall(r"[a-z]+", prompt.replace("BREAK", "").lower())
    return [word for word in dict.fromkeys(said) if word not in known]
