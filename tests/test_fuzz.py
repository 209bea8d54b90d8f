"""A few of the damaged files of `tests.fuzz`, the same in each run. Reference: the good files, which are read."""

import random
import time

from tests.damage import damaged
from tests.fuzz import Fuzz

SECONDS = 8.0  # for all of it, so that a slow machine tries fewer


def test_damaged_files_are_read_or_refused_with_one_error(tmp_path):
    fuzz, stop = Fuzz(tmp_path), time.monotonic() + SECONDS
    for number in range(400):
        fuzz.one(number)
        if time.monotonic() > stop:
            break
    assert sum(fuzz.ends.values()) > 20
    assert {end.rpartition(" ")[2] for end in fuzz.ends} == {"read", "refused"}


def test_an_input_is_the_same_each_time():
    good = b'{"a": [1, 2, {"b": "c"}], "d": 3}'
    inputs = [[damaged(random.Random(n), good, True) for n in range(50)] for _ in range(2)]
    assert inputs[0] == inputs[1]
    assert len({*inputs[0]}) > 30
