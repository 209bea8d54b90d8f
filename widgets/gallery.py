"""Pictures with their settings, and labelled grids of pictures for comparisons. This module has no widgets."""

import io
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .. import foreign, images, pictures
from ..dialects import embedding, lora
from ..errors import Error
from ..guides import Guide
from ..request import Request
from ..signing import Signer

_THUMB = 160  # pixels: the strip shows 80; sharp screens need twice that
COMPARISON = "compare-"  # how the names of comparisons' files begin
_CELL = 192  # pixels: the longest edge of a cell while a grid fills; the file has whole pictures


@dataclass(frozen=True)
class Picture:
    """A finished picture. Its file is the only copy, so that a long session does not fill memory with pictures."""

    path: Path
    request: Request  # of this one picture: its seed, and count 1
    model: str
    recipe: str  # how its weights were stored
    seconds: float
    title: str = ""  # only a comparison has one

    @classmethod
    def write(
        cls,
        image: Image.Image,
        folder: Path,
        request: Request,
        model: str,
        recipe: str,
        seconds: float,
        signer: Signer | None = None,
    ) -> "Picture":
        """Save a picture; the prompt's first words and the seed name the file."""
        file = Path(folder) / images.file_name(request)
        path = images.save(image, file, request, model, recipe, signer=signer)
        return cls(path.resolve(), request, model, recipe, seconds)

    @property
    def image(self) -> Image.Image:
        """In RGB. Its file may have been changed, or be gone."""
        return images.read(self.path)

    def save(self, path: str | Path) -> Path:
        """Save another copy with its settings. The suffix chooses PNG, JPEG or WebP; no file is ever overwritten."""
        return images.save(self.image, Path(path), self.request, self.model, self.recipe)

    def copy(self, ending: str, signer: Signer | None = None) -> tuple[str, bytes]:
        """The name and the bytes of a copy in another format, with its settings."""
        if ending not in images.ENDINGS:
            raise Error(f"There is no format {ending!r:.20}.", f"Choose one of {', '.join(images.ENDINGS)}.")
        how = (self.request, self.model, self.recipe, images.ENDINGS[ending])
        return f"{self.path.stem}.{ending}", images.encoded(self.image, *how, signer=signer)

    def caption(self) -> str:
        r = self.request
        if self.title:
            return self.title
        guidance = "" if r.guidance is None else f" · guidance {r.guidance:g}"
        return f"seed {r.seed} · {r.width} × {r.height} · {r.steps} steps of {r.sampler}{guidance}"

    def before(self) -> bytes:
        """A PNG of the picture that it began with or edited, as it was cut for the run."""
        r, out = self.request, io.BytesIO()
        if r.strength is None:  # an edit
            image = images.read(r.pictures[0])
        else:
            canvas = pictures.canvas(r, pictures.read(r))
            image = canvas.image if canvas.whole is None else canvas.whole.image
        image.save(out, "PNG", compress_level=1)
        return out.getvalue()

    def unenlargeable(self) -> str:
        """Why it cannot be drawn again in two passes, the second at twice the size; "" if it can."""
        r = self.request
        if self.title:
            return "A comparison is not drawn in one run."
        if r.hires is not None:
            return "It was enlarged already."
        if r.masked:
            return "Only a part of it was drawn. Begin with it, and enlarge what is drawn then."
        return "A model that edits does not enlarge." if r.pictures and r.strength is None else ""

    def words(self) -> list[tuple[str, str]]:
        """What it was drawn from, each with a name: the prompts, and the pictures that it began with or edited."""
        r, out = self.request, []
        if r.prompt:
            out.append(("Prompt", r.prompt))
        if r.negative:
            out.append(("Negative prompt", r.negative))
        names = [_name(picture) for picture in r.pictures]
        if names:
            edited = r.strength is None
            out.append(("Edited", ", ".join(names)) if edited else ("Start picture", names[0]))
            out += [] if edited else [("Strength", f"{r.strength:g}")]
        if r.mask is not None:
            out.append(("Mask", _name(r.mask)))
        for what, guides in (("Control", r.controls), ("Reference", r.references)):
            out += [(what, f"{_seen(guide)}, scale {guide.scale:g}") for guide in guides]
        for name, scale in map(lora, r.loras or ()):
            out.append(("LoRA", f"{Path(name).stem}, scale {1 if scale is None else scale:g}"))
        for name, word in map(embedding, r.embeddings or ()):
            out.append(("Taught word", Path(name).stem if word is None else f"{word}, of {Path(name).stem}"))
        if any(r.outpaint):
            out.append(("Added around", ", ".join(map(str, r.outpaint))))
        return out

    def _repr_png_(self) -> bytes:
        try:
            foreign.check_regular(self.path)
            return self.path.read_bytes()
        except OSError as e:
            raise Error(f"{self.path} cannot be read: {e.strerror}.", "Was it moved? Draw it again.") from None


def _name(picture: str | Path | Image.Image) -> str:
    return Path(picture).name if isinstance(picture, str | Path) else "a picture"


def _seen(guide: Guide) -> str:
    """What a guide shows: its picture, and what is taken over of it."""
    picture = "the masked start picture" if guide.masked else _name(guide.image)
    return picture if guide.mode is None else f"{picture}, its {guide.mode}"


def writable(folder: str | Path) -> Path:
    """Create the folder and check that it takes files: this is done before the work, not after."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise Error(f"{folder} cannot be written to: {e.strerror}.", "Set studio.folder.") from None
    return Path(folder)


def thumbnail(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((_THUMB, _THUMB))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return out.getvalue()


class Grid:
    """A comparison over one or two settings, which fills as its jobs end. As the last line of a cell it is shown."""

    def __init__(self, base: Request, axes: dict[str, list]):
        (self.across, self.columns), *rest = reversed(axes.items())  # the last setting runs from left to right
        self.down, self.rows = rest[0] if rest else (None, [None])
        self.base = base
        self.cells: dict[tuple[int, int], Picture] = {}
        self.jobs: list = []
        self._small: dict[tuple[int, int], Image.Image] = {}

    def requests(self) -> dict[tuple[int, int], Request]:
        """The requests of all cells, row by row."""
        out = {}
        for i, down in enumerate(self.rows):
            for j, across in enumerate(self.columns):
                row = {} if self.down is None else {self.down: down}
                out[i, j] = replace(self.base, **row, **{self.across: across})
        return out

    def result(self) -> "Grid":
        """Wait for all cells. Interrupting the wait cancels them."""
        try:
            for job in self.jobs:
                job.result()
        except KeyboardInterrupt:
            self.cancel()
            raise
        return self

    def cancel(self) -> None:
        for job in reversed(self.jobs):
            job.cancel()

    def put(self, cell: tuple[int, int], picture: Picture, image: Image.Image) -> bool:
        """Fill a cell; return True if it was the last."""
        self.cells[cell], self._small[cell] = picture, _fit(image)
        return len(self.cells) == len(self.rows) * len(self.columns)

    def draft(self, cell: tuple[int, int], preview: Image.Image) -> Image.Image:
        """A small version of the grid so far, with a preview in one cell."""
        return self._render(self._small | {cell: _fit(preview)})

    @property
    def image(self) -> Image.Image:
        """The labelled grid at full size."""
        return self._render({cell: picture.image for cell, picture in self.cells.items()})

    def _render(self, shown: dict[tuple[int, int], Image.Image]) -> Image.Image:
        w = max((i.width for i in shown.values()), default=_CELL)
        h = max((i.height for i in shown.values()), default=_CELL)
        size = max(12, round(min(w, h) / 14))
        font, gap, top = ImageFont.load_default(size), max(2, size // 3), 2 * size
        widest = max(math.ceil(font.getlength(_label(self.down, v))) for v in self.rows)
        side = size if self.down is None else min(widest, w) + 2 * size
        down, across = len(self.rows) * (h + gap), len(self.columns) * (w + gap)
        out = Image.new("RGB", (side + across - gap + size, top + down - gap + size), _PAPER)
        draw = ImageDraw.Draw(out)
        for j, value in enumerate(self.columns):
            text = _cut(font, _label(self.across, value), w)
            draw.text((side + j * (w + gap) + w // 2, top // 2), text, _INK, font, anchor="mm")
        for i, value in enumerate(self.rows):
            y = top + i * (h + gap)
            if self.down is not None:
                text = _cut(font, _label(self.down, value), side - size)
                draw.text((side - size // 2, y + h // 2), text, _INK, font, anchor="rm")
            for j in range(len(self.columns)):
                x = side + j * (w + gap)
                image = shown.get((i, j))
                if image is None:
                    draw.rectangle((x, y, x + w - 1, y + h - 1), _EMPTY)
                else:
                    out.paste(image, (x + (w - image.width) // 2, y + (h - image.height) // 2))
        return out

    def save(self, path: str | Path, signer: Signer | None = None) -> Path:
        """Save the labelled grid at full size, with the settings its cells share. No file is ever overwritten."""
        first = self.cells[min(self.cells)]
        return images.save(self.image, Path(path), first.request, first.model, first.recipe, signer=signer)

    def finish(self, folder: str | Path, signer: Signer | None = None) -> Picture:
        """Save the grid; the names of its settings name the file."""
        names = [n for n in (self.down, self.across) if n is not None]
        path = self.save(Path(folder) / f"{COMPARISON}{'-'.join(names)}.png", signer)
        return replace(self.cells[0, 0], path=path.resolve(), title=f"Comparison of {' and '.join(names)}")

    def _repr_png_(self) -> bytes:
        return images.shown(self.image, images.source(self.base))


_PAPER, _INK, _EMPTY = "#ffffff", "#222222", "#e8e8ea"


def _fit(image: Image.Image) -> Image.Image:
    """The image with its longer edge as long as a cell."""
    return image.resize([round(v * _CELL / max(image.size)) for v in image.size], Image.Resampling.BICUBIC)


def _label(name: str | None, value) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if name in ("prompt", "negative", "sampler", "schedule") else f"{name} {text}"


def _cut(font, text: str, width: int) -> str:
    """The text, cut off at the end if it is too wide."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
