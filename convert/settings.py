"""A foreign config.json, read strictly: a value of the wrong kind, or one that is not implemented, is an Error that
names it. Other keys are ignored, as in diffusers and transformers."""

import copy
from pathlib import Path

from ..errors import Error
from ..models.build import MOST_LAYERS
from .source import read_json

_FIX = "Use a checkpoint of a supported model; `mlxdiff inspect FILE` says what a file is."


class Settings:
    def __init__(self, path: Path):
        self.path, self.values = path, read_json(path)
        architectures = self.values.get("architectures")
        named = architectures[0] if isinstance(architectures, list) and architectures else None
        self.cls = str(self.values.get("_class_name", named))

    def inner(self, key: str) -> "Settings":
        """The settings inside one of these."""
        values = self.get(key, None)
        if not isinstance(values, dict):
            self.refuse(key, values)
        inside = copy.copy(self)
        inside.values = values
        return inside

    def of_whole(self, key: str, cls: str) -> "Settings":
        """Those of one model of a whole CLIP, which projects to a width that the whole one states."""
        inside = self.inner(key)
        inside.values, inside.cls = inside.values | {"projection_dim": self.get("projection_dim", 512)}, cls
        return inside

    def get(self, key: str, default: object) -> object:
        return self.values.get(key, default)

    def refuse(self, key: str, value: object):
        raise Error(f"{self.path} has {key} = {value!r:.100}, which is not supported.", _FIX)

    def one(self, key: str, default: object, allowed: list) -> object:
        value = self.get(key, default)
        if value not in allowed:
            self.refuse(key, value)
        return value

    def whole(self, key: str, default: int, most: int = 2**24, least: int = 1) -> int:
        return self._whole(key, self.get(key, default), least, most)

    def _whole(self, key: str, value: object, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, value)
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not abs(value) < 1e30:
            self.refuse(key, value)
        return float(value)

    def positive(self, key: str, default: float) -> float:
        value = self.number(key, default)
        if value <= 0:
            self.refuse(key, value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.one(key, default, [False, True]))

    def wholes(self, key: str, default: list[int] | int, n: int | None = None, most: int = 2**24) -> tuple[int, ...]:
        """A list of positive integers; a single one means `n` equal ones."""
        value = self.get(key, default)
        value = [value] * n if n is not None and type(value) is int else value
        if not isinstance(value, list) or not 0 < len(value) <= MOST_LAYERS or (n is not None and len(value) != n):
            self.refuse(key, value)
        return tuple(self._whole(key, v, 1, most) for v in value)

    def layers(self, key: str, value: object, counts: list[int]) -> list[tuple[int, ...]]:
        """Transformer layers of each attention, per block. Given as one number, as one per block, or as a list per
        block."""
        value = [value] * len(counts) if type(value) is int else value
        if not isinstance(value, list) or len(value) != len(counts):
            self.refuse(key, value)
        per_block = [v if isinstance(v, list) else [v] * n for v, n in zip(value, counts, strict=True)]
        if any(len(v) != n for v, n in zip(per_block, counts, strict=True)):
            self.refuse(key, value)
        return [tuple(self._whole(key, v, 0, MOST_LAYERS) for v in block) for block in per_block]
