"""Reference pictures: each goes through a vision model and an adapter, which make of it what the denoiser reads beside
the prompt. That is kept for the next seed; the two networks are not."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from PIL import Image

from . import foreign, images
from .conditioning import Layers, Picture, Sides, Text
from .description import Description
from .errors import Error
from .families import FAMILIES
from .guides import Guide
from .models import redux, vision
from .models.ip_adapter import IPAdapter
from .models.layers import Shown, Span
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
        if guide.mode is not None and guide.mode not in self.model.family.aspects:
            known = ", ".join(self.model.family.aspects)
            fix = f"Use one of {known}, or leave it out." if known else "Leave it out."
            raise Error(f"{self.model.name} cannot take {guide.mode!r} alone from a reference.", fix)
        if guide.mode is not None and not reads(self.model, guide.mode):
            problem = (
                f"{self.model.name} has no layers that decide the {guide.mode} of a picture, as larger models have."
            )
            raise Error(problem, f"Leave :{guide.mode} out.")
        if guide.model is None:
            fix = "Name an IP-Adapter or FLUX Redux before the picture: `references=[(FILE, PICTURE)]`."
            raise Error(f"The reference {guide} has no network that reads it.", fix)
        from .store import guides as store

        row = store.row(guide.model, self.model, "reference")
        if row is not None and "Redux" in row.kind:
            _check_whole(guide)

    def reader(self, guide: Guide, progress: Progress | None = None) -> "Reader":
        """The networks of a reference, whose headers are read once, and again if the files have changed. Raises if the
        model cannot take it. progress: is told of a download."""
        self.check(guide)
        held = self._readers.get(str(guide.model))
        if held is None or _times(held[1]) != held[0]:
            from .store import references as store

            reader = store.find(guide.model, self.model, offline=self.offline, progress=progress)
            self._readers[str(guide.model)] = _times(reader), reader
        reader = self._readers[str(guide.model)][1]
        if isinstance(reader.config, redux.Config):
            _check_whole(guide)
        return reader

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

    def _become(
        self, encoder: vision.Vision, adapter: IPAdapter | redux.Redux, picture: Image.Image, guided: bool
    ) -> Seen:
        out = encoder(pixels(picture, encoder.config))
        if isinstance(adapter, redux.Redux):
            found = adapter(out)
        else:
            found = Sides(adapter(out), adapter(_nothing(encoder, adapter, out)) if guided else None)
        mx.eval(found)
        finite = [mx.isfinite(x).all() for x in ([found] if isinstance(found, mx.array) else _arrays(found))]
        if not all(x.item() for x in finite):
            raise self.model.not_finite()
        return found


def _check_whole(guide: Guide) -> None:
    """Raise if a reference through Redux is not read in all steps."""
    if guide.interval != (0.0, 1.0):
        problem = f"The reference {guide} becomes a part of the prompt, which is the same in all steps."
        raise Error(problem, "Leave FROM and TO out, or use an IP-Adapter.")


def shown(
    model: Description, references: Sequence[Guide], seen: Sequence[Seen], span: Callable[[Guide], Span]
) -> list[Picture]:
    """What the denoiser reads of each IP-Adapter: its pictures side by side, the values of each times its scale. At
    equal scales this is that scale times the attention to all of them, as in diffusers. Pictures that are read in other
    steps or by other layers are apart. span: the times of a guide."""
    groups: dict[tuple, list[tuple[Sides, float]]] = {}
    for guide, found in zip(references, seen, strict=True):
        if isinstance(found, Sides):
            groups.setdefault((guide.model_hash, span(guide), guide.mode), []).append((found, guide.scale))

    def beside(several: list[Layers], scales: list[float], layers: list[int]) -> Shown:
        read = {}
        for i in layers:
            keys = mx.concatenate([of[i][0] for of in several], axis=1)
            values = mx.concatenate([of[i][1] * scale for of, scale in zip(several, scales, strict=True)], axis=1)
            read[i] = keys, values
        return read

    pictures = []
    for (_, times, mode), pairs in groups.items():
        scales, both = [scale for _, scale in pairs], [found for found, _ in pairs]
        layers = reads(model, mode)
        negative = None if both[0].negative is None else beside([found.negative for found in both], scales, layers)
        pictures.append(Picture(beside([found.prompt for found in both], scales, layers), negative, times))
    return pictures


def reads(model: Description, mode: str | None) -> list[int]:
    """The numbers, in an adapter's file, of the denoiser's layers that read a reference: those that decide its style or
    its layout (Wang et al. 2024, InstantStyle), or all."""
    if mode is None:
        return [*range(len(model.net.reading))]
    places = tuple(f"{place}." for place in model.family.aspects[mode])
    return [i for i, name in enumerate(model.net.readers) if name.startswith(places)]


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
    files = [reader.adapter, *sorted(reader.encoder.glob("*"))]
    return tuple((f.name, foreign.stamp(f)) for f in files)
