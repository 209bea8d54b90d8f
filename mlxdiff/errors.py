"""The one exception a user sees: what is wrong, with the value seen, and what to do about it."""

import difflib
from collections.abc import Iterable


class Error(Exception):
    """`problem` is one sentence that states the offending value; `fix` is one sentence that says what to do. Both put
    settings in backticks and spell them as Python does; see `spelling`."""

    def __init__(self, problem: str, fix: str = ""):
        super().__init__(f"{problem} {fix}".strip())
        self.problem, self.fix = problem, fix


def near(word: str, known: Iterable[str], least: float = 0.6) -> str:
    """The known word closest to a misspelt one; case is ignored; "" if no word is close. least: how alike the two must
    be; 1 means equal."""
    return next(iter(_nearest(word, known, 1, least)), "")


def did_you_mean(word: str, known: Iterable[str], most: int = 1) -> str:
    """A question, "Did you mean ...? ", to put before a list of all choices; "" if no choice is close. most: of how
    many words."""
    words = _nearest(word, known, most, 0.6)
    if not words:
        return ""
    return f"Did you mean {', '.join(words[:-1])}{' or ' if words[1:] else ''}{words[-1]}? "


def _nearest(word: str, known: Iterable[str], most: int, least: float) -> list[str]:
    """The known words closest to a misspelt one, closest first; only one if nothing but its case is wrong."""
    names: dict[str, str] = {}
    for name in known:
        names.setdefault(name.casefold(), name)  # of two spellings the first
    word = word.casefold()
    return [names[n] for n in ([word] if word in names else difflib.get_close_matches(word, names, most, least))]
