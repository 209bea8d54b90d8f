"""Damages good files at random, the same way for the same number."""

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    10**9,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e308,
    "",
    "x",
    "\x1b[31m",
    "../../x",
    "a" * 999,
]
_VALUES += [[0, 2**31 - 1], [2**31 - 1, 0], [], {}, [0], [[1]], {"a": 1}, ["a", "b"], [10**6] * 4]
_VALUES += [float("nan"), float("inf")]


def damaged(rng: random.Random, data: bytes, is_json: bool) -> bytes:
    """One to three changes: of values in the JSON, or of bytes."""
    for _ in range(rng.randint(1, 3)):
        if is_json and rng.random() < 0.8:
            try:
                data = json.dumps(_changed(rng, json.loads(data))).encode()
                continue
            except (ValueError, RecursionError):  # no JSON any more, after a change of bytes
                pass
        at = rng.randrange(len(data) + 1)
        data = rng.choice(
            [
                data[:at],
                data[:at] + rng.randbytes(4) + data[at:],
                data[:at] + data[at + rng.randint(1, 9) :],
                data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
                data + data,
                b"[" * 100_000,
            ]
        )
    return data


def _changed(rng: random.Random, value):
    """The JSON value with one place of it replaced, removed, or put twice."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice([*value])
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.1:
            return value | {f"{key}2": value[key]}
        return value | {key: _changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return [*value[:i], _changed(rng, value[i]), *value[i + 1 :]]
    return rng.choice(_VALUES)


def with_header(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Weights whose header is changed, and with it, mostly, its length."""
    length = struct.unpack("<Q", data[:8])[0]
    header = change(data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def other_weights(rng: random.Random, data: bytes) -> bytes:
    """A sound file of other tensors: one has another name, shape, type or numbers, comes twice, or is missing."""
    length = struct.unpack("<Q", data[:8])[0]
    entries, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    notes = {"__metadata__": entries.pop("__metadata__")} if "__metadata__" in entries else {}
    held = {n: [e["dtype"], e["shape"], body[slice(*e["data_offsets"])]] for n, e in entries.items()}
    for _ in range(rng.randint(1, 2)):
        name = rng.choice([*held])
        dtype, shape, numbers = held[name]
        way = rng.randrange(8)
        if way == 0 and len(held) > 1:
            del held[name]
        elif way == 1:
            held[rng.choice((f"{name}.x", name[:-1], name.replace("0", "1"), name.upper(), ""))] = held[name]
        elif way == 2:
            held[name][1] = shape[::-1]
        elif way == 3:
            held[name][1] = rng.choice(([*shape, 1], [1, *shape], [math.prod(shape)], [*shape[:-1], 1, *shape[-1:]]))
        elif way == 4:
            many = rng.choice((0, 2, 3))
            held[name][1:] = [many * n if i == 0 else n for i, n in enumerate(shape)], numbers * (many if shape else 1)
        elif way == 5:
            held[name][0] = rng.choice(("I32", "U32")) if dtype in ("F32", "I32", "U32") else dtype
        elif way == 6 and dtype == "F32":
            held[name][::2] = rng.choice(("F16", "BF16", "I16")), numbers[: len(numbers) // 2]
        else:
            held[name][2] = (rng.choice(_NUMBERS) * len(numbers))[: len(numbers)]
    at = 0
    for name, (dtype, shape, numbers) in held.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(numbers)]}
        at += len(numbers)
    header = json.dumps(notes | {name: entries[name] for name in held}).encode()
    return struct.pack("<Q", len(header)) + header + b"".join(numbers for *_, numbers in held.values())


# Little-endian float32: 0, NaN, infinity, the largest, 65520 (infinite in float16), the smallest
_NUMBERS = [struct.pack("<f", x) for x in (0.0, math.nan, -math.inf, 3.4e38, 65520.0, 1e-45)]


def damaged_file(rng: random.Random, file: Path, good: bytes) -> bytes:
    """A file's bytes, damaged where it counts: JSON in its values, weights in their header, or in what they are."""
    if file.suffix == ".safetensors" and (luck := rng.random()) < 0.9:
        return other_weights(rng, good) if luck < 0.5 else with_header(good, lambda text: damaged(rng, text, True))
    return damaged(rng, good, file.suffix == ".json")


class Folder:
    """A folder of good files. In `broken`, one of them is damaged."""

    def __init__(self, path: Path, *suffixes: str):
        self.path = path
        found = sorted(f for f in path.rglob("*") if f.is_file() and (not suffixes or f.suffix in suffixes))
        self.good = {file: file.read_bytes() for file in found}

    @contextmanager
    def broken(self, rng: random.Random) -> Iterator[Path]:
        file = rng.choice([*self.good])
        try:
            file.write_bytes(damaged_file(rng, file, self.good[file]))
            yield file
        finally:
            file.write_bytes(self.good[file])
