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
    names: dict[str, str] = {}
    for name in known:
        names.setdefault(name.casefold(), name)  # of two spellings the first
    return next((names[n] for n in difflib.get_close_matches(word.casefold(), names, 1, least)), "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question, "Did you mean ...? ", to put before a list of all choices; "" if no choice is close."""
    return f"Did you mean {close}? " if (close := near(word, known)) else ""
