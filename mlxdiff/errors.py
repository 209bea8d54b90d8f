"""The one exception a user sees: what is wrong, with the value seen, and what to do about it."""

import difflib
from collections.abc import Iterable


class Error(Exception):
    """`problem` is one sentence with the offending value in it; `fix` is one sentence that says what to do. Both name
    settings in backticks, as Python has them; see `spelling`."""

    def __init__(self, problem: str, fix: str = ""):
        super().__init__(f"{problem} {fix}".strip())
        self.problem, self.fix = problem, fix


def near(word: str, known: Iterable[str]) -> str:
    """The known word that a misspelt one is closest to, whatever its case; "" if none is close."""
    names = {name.casefold(): name for name in known}
    return next((names[n] for n in difflib.get_close_matches(word.casefold(), names, 1)), "")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The question, with a space after it, to put before a list of what there is; "" if nothing is close."""
    return f"Did you mean {close}? " if (close := near(word, known)) else ""
