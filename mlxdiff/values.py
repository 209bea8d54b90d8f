"""Checks of single values that people give. Each raises an Error that names the setting and shows the value."""

import reprlib

from .errors import Error


def text(name: str, value) -> None:
    """Text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise Error(f"The {name} is {type(value).__name__}, not text.", f"Give the {name} as a string.")
    try:
        value.encode()
    except UnicodeEncodeError:  # Python puts such characters in the place of bytes that are not UTF-8
        raise Error(f"The {name} {reprlib.repr(value)} is not valid UTF-8.", "Type it again.") from None


def whole(name: str, value, low: int, high: int) -> None:
    """A whole number within bounds."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Error(f"{_title(name)} must be a whole number from {low} to {high}; {value!r} was given.")


def number(name: str, value, low: float, high: float) -> None:
    """A number within bounds; NaN is in none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Error(f"{_title(name)} must be a number from {low} to {high}; {reprlib.repr(value)} was given.")


def _title(name: str) -> str:
    """A setting's name at the start of a sentence; a name of two words stays as it is in Python."""
    return name if "_" in name else name[0].upper() + name[1:]


def span(name: str, value) -> None:
    """A part of the steps: two fractions, in order."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise Error(f"{name} {value!r} is not a pair of numbers.", "Give two fractions, such as (0.1, 0.8).")
    for v in value:
        number(name, v, 0, 1)
    if value[0] > value[1]:
        raise Error(f"{name} {value[0]} to {value[1]} ends before it begins.", "Give the smaller fraction first.")
