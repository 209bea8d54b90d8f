"""Reference pictures: each goes through a vision model and an adapter, which make of it what the denoiser reads beside
the prompt. That is kept for the next seed; the two networks are not."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from PIL import Image

from . import images
from .conditioning import Layers, Sides, Text
from .description import Description
from .errors import Error
from .families import FAMILIES
from .guides import Guide
from .models import vision
from .models.ip_adapter import IPAdapter
from .models.redux import Redux
from .recipe import DTYPES
from .request import Request
from .result import Event

if TYPE_CHECKING:
    from .store.references import Reader

Progress = Callable[[str, int, int], None]
Seen = Sides | mx.array  # of an IP-Adapter, or the tokens (1, N, d) of Redux

# The mean and spread of the channels of CLIP's training pictures.
_MEAN, _SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_LONGEST = 16  # of a picture whose longer edge is cut: times its shorter edge


class References:
    """Those of one model."""

    def __init__(self, model: Description, offline: bool):
        self.model, self.offline = model, offline
        self._readers: dict[str, tuple[tuple, Reader]] = {}  # name -> times and sizes of its files, and what they hold
        self._seen: dict[tuple, Seen] = {}  # what the last request's pictures became

    def check(self, guide: Guide) -> None:
        """Raise if the model cannot take a reference, as far as no file shows it."""
        if not self.model.family.references:
            whose = " and ".join(f.title for f in FAMILIES.values() if f.references)
            problem = f"References are for {whose}; {self.model.name} is {self.model.family.title}."
            edits = ", or give the picture as `image=FILE`" if self.model.row.edits else ""
            raise Error(problem, f"Leave `references` out{edits}.")
        if guide.interval != (0.0, 1.0) or guide.mode is not None:
            problem = f"The reference {guide} has an interval or a mode, which only controls have."
            raise Error(problem, "Leave it out.")
        if guide.model is None:
            fix = "Name an IP-Adapter or FLUX Redux before the picture: `references=[(FILE, PICTURE)]`."
            raise Error(f"The reference {guide} has no network that reads it.", fix)

    def reader(self, guide: Guide, progress: Progress | None = None) -> "Reader":
        """The networks of a reference, whose headers are read once, and again if the files have changed. Raises if the
        model cannot take it. progress: is told of a download."""
        self.check(guide)
        held = self._readers.get(str(guide.model))
        if held is None or _times(held[1]) != held[0]:
            from .store import references as store

            reader = store.find(guide.model, self.model, offline=self.offline, progress=progress)
            self._readers[str(guide.model)] = _times(reader), reader
        return self._readers[str(guide.model)][1]

    def see(self, request: Request, picture: Callable[[Guide], Image.Image]) -> Iterator[Event]:
        """What each reference of a resolved request becomes. picture: gives that of a guide."""
        from .store import references as store

        guided = self.model.passes(request) == 2
        wanted = {(guide.hash, guide.model_hash, guided): guide for guide in request.references}
        seen = {key: self._seen[key] for key in wanted if key in self._seen}
        missing = sorted(wanted.keys() - seen.keys(), key=lambda key: key[1])  # those of one network together
        if missing:
            yield Event("encode", 0, len(missing), 0.0)
        opened, networks = None, ()
        for i, key in enumerate(missing):
            begin, reader = time.perf_counter(), self.reader(wanted[key])
            if reader != opened:
                networks = ()  # one pair at a time
                opened, networks = reader, store.read(reader, DTYPES[self.model.recipe.dtype])
            seen[key] = self._become(*networks, picture(wanted[key]), guided)
            yield Event("encode", i + 1, len(missing), time.perf_counter() - begin)
        del networks
        mx.clear_cache()
        self._seen = seen
        return [seen[guide.hash, guide.model_hash, guided] for guide in request.references]

    def _become(self, encoder: vision.Vision, adapter: IPAdapter | Redux, picture: Image.Image, guided: bool) -> Seen:
        out = encoder(pixels(picture, encoder.config))
        if isinstance(adapter, Redux):
            found = adapter(out)
        else:
            found = Sides(adapter(out), adapter(_nothing(encoder, adapter, out)) if guided else None)
        mx.eval(found)
        finite = [mx.isfinite(x).all() for x in ([found] if isinstance(found, mx.array) else _arrays(found))]
        if not all(x.item() for x in finite):
            raise self.model.not_finite()
        return found


def sides(references: Sequence[Guide], seen: Sequence[Seen]) -> list[Sides]:
    """What each IP-Adapter gives: its pictures side by side, the values of each times its scale. At equal scales this
    is that scale times the attention to all of them, as in diffusers."""
    of_adapter: dict[str, list[tuple[Sides, float]]] = {}
    for guide, found in zip(references, seen, strict=True):
        if isinstance(found, Sides):
            of_adapter.setdefault(guide.model_hash, []).append((found, guide.scale))

    def beside(several: list[Layers], scales: list[float]) -> Layers:
        layers = []
        for of_layer in zip(*several, strict=True):
            keys = mx.concatenate([k for k, _ in of_layer], axis=1)
            values = mx.concatenate([v * scale for (_, v), scale in zip(of_layer, scales, strict=True)], axis=1)
            layers.append((keys, values))
        return layers

    joined = []
    for pairs in of_adapter.values():
        scales, both = [scale for _, scale in pairs], [found for found, _ in pairs]
        negative = None if both[0].negative is None else beside([found.negative for found in both], scales)
        joined.append(Sides(beside([found.prompt for found in both], scales), negative))
    return joined


def extended(texts: list[Text], references: Sequence[Guide], seen: Sequence[Seen]) -> list[Text]:
    """The texts with Redux's tokens after those of the prompt, each picture's times its scale."""
    tokens = [x * guide.scale for guide, x in zip(references, seen, strict=True) if isinstance(x, mx.array)]
    if not tokens:
        return texts
    *negative, text = texts
    rows = [text.context, *(x.astype(text.context.dtype) for x in tokens)]
    return [*negative, text._replace(context=mx.concatenate(rows, axis=1))]


def pixels(picture: Image.Image, sees: vision.Config) -> mx.array:
    """A picture as a vision model reads it, (1, size, size, 3). For CLIP its shorter edge is scaled to the size and its
    middle is cut out; for SigLIP it is stretched."""
    size = sees.size
    if not sees.class_token:
        square = picture.resize((size, size), Image.Resampling.BICUBIC)
        return mx.array(images.to_pixels(square))[None]
    short = min(picture.size)
    w, h = (min(edge, _LONGEST * short) for edge in picture.size)  # of a longer one, the middle alone is scaled
    picture = images.cut(picture, picture.size, (w, h))
    scaled = tuple(size * edge // short for edge in (w, h))
    square = images.cut(picture, scaled, (size, size), Image.Resampling.BICUBIC)
    values = (np.asarray(square, np.float32) / 255 - np.array(_MEAN, np.float32)) / np.array(_SPREAD, np.float32)
    return mx.array(values)[None]


def _nothing(encoder: vision.Vision, adapter: IPAdapter, out: vision.Output) -> vision.Output:
    """What stands for no picture in the pass of the negative prompt, as in diffusers: zeros for a plain adapter, for
    FLUX.1's a black picture, for the others one whose normalised pixels are zeros."""
    size, kind = encoder.config.size, adapter.config.kind
    if kind == "plain":
        return out._replace(pooled=mx.zeros_like(out.pooled))
    if kind == "xlabs":
        return encoder(pixels(Image.new("RGB", (size, size)), encoder.config))
    return encoder(mx.zeros((1, size, size, 3)))


def _arrays(found: Sides) -> list[mx.array]:
    return [x for side in found if side is not None for kv in side for x in kv]


def _times(reader: "Reader") -> tuple:
    files = [reader.adapter, *sorted(reader.encoder.iterdir())] if reader.encoder.is_dir() else [reader.adapter]
    return tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.exists())
