"""What a person paints on the start picture: the mask, where the picture is drawn anew, and the pixels that are added
around it; or on a black page: a sketch, which guides the next picture. The page paints; here are the files and what the
page is told."""

import io
from dataclasses import replace
from pathlib import Path

from PIL import Image

from .. import images, pictures
from ..errors import Error
from ..guides import Guide
from ..request import OUTPAINT, STRENGTH, Request
from .settings import Settings
from .start_picture import GUIDE, StartPicture, keep, opened
from .view import View

MASK = "mask-"  # how the names of masks' files begin
_EDGE = 2048  # pixels: a larger picture is painted on in a smaller copy
SKETCH = ("sketch", "scribble")  # what networks are called that read a sketch
_TINT = (255, 45, 135)  # the page's paint; its alpha is the mask
_THUMB = 160  # pixels of the start picture with its mask


class Painting:
    """The painted part of one studio's start picture."""

    def __init__(self, studio: Settings, view: View, control: StartPicture):
        self._studio, self._view, self._control = studio, view, control
        self._size = (1, 1)  # of the copy that is painted on
        self._small: Image.Image | None = None  # for a thumbnail
        self._shown: str | None = None  # the fingerprint of the mask that the pages show
        self._sketches = False  # whether the page is black, and what is painted on it is a sketch
        self._sketch: Path | None = None  # the last sketch

    @property
    def _kind(self) -> str:
        return "mask" if self._studio.mask is not None else "outpaint" if any(self._studio.outpaint) else "whole"

    def open(self, picture: Path | None = None) -> None:
        """Let the page paint on the start picture; with `picture`, on that one, which becomes the start picture."""
        if picture is not None:
            self._studio.image = picture
        if self._view.unpaintable:
            raise Error(self._view.unpaintable, "Choose another model.")
        if self._sketches:
            self._studio._show_pictures()
        self._view.send({"do": "paint"})

    def sketch(self) -> None:
        """Let the page draw a sketch, as large as the next picture, or go on with the last one."""
        if not self.sketcher:
            raise Error(f"{self._studio.model} has no network that reads a sketch.", "Choose another model.")
        if not any(guide.image == self._sketch for guide in self._studio.control_guides):
            self._sketch = None
        size = (self._studio.width, self._studio.height) if self._sketch is None else images.size(self._sketch)
        self._sketches, self._size, self._shown = True, size, None
        black = _png(Image.new("RGB", size))
        self._view.paper = {"png": black, "width": size[0], "height": size[1], "sketch": True}
        drawn = b"" if self._sketch is None else _paint(images.read(self._sketch).convert("L"), (255, 255, 255))
        self._view.mask = {"id": "", "png": drawn}
        self.show_around()
        self._view.send({"do": "paint"})

    @property
    def sketcher(self) -> str | None:
        """The name of the model's network that reads a sketch."""
        named = self._studio._known.networks("control")
        return next((name for name in SKETCH if name in named), None)

    def show_picture(self, picture: Image.Image | None) -> None:
        """Give the page what it paints on, or nothing."""
        self._sketches = False
        if picture is None:
            self._view.paper = {}
            return
        copy = picture.convert("RGB")
        copy.thumbnail((_EDGE, _EDGE))
        self._size, self._small, self._shown = copy.size, copy.copy(), ""
        self._small.thumbnail((_THUMB, _THUMB))
        self._view.paper = {"png": _png(copy, compress_level=1), "width": copy.width, "height": copy.height}

    def show_mask(self) -> None:
        """Give the page the mask, unless it is the one that it sent."""
        mask, studio = None, self._studio
        if self._sketches:
            return
        if studio.mask is not None and studio.image is not None:
            try:
                mask = pictures.read(Request("", image=studio.image, mask=studio.mask)).mask
            except Error:
                studio.mask = None
                raise
        mask = mask and images.fit(mask, *self._size)
        self._control.show_part(self._small if mask is None else _tinted(self._small, mask), self._kind != "whole")
        found = mask and images.fingerprint(mask)
        if found != self._shown:
            self._shown = found
            self._view.mask = {"id": found or "", "png": _paint(mask) if mask else b""}

    def show_around(self) -> None:
        """Tell the page how large the picture is drawn, and what is added around it."""
        studio, step = self._studio, self._studio._known.multiple
        if self._sketches:
            self._view.around = {"sides": [0] * 4, "inner": [*self._size], "step": step, "blur": 0.0}
            return
        left, top, right, bottom = studio.outpaint
        inner = [max(step, studio.width - left - right), max(step, studio.height - top - bottom)]
        self._view.around = {"sides": [*studio.outpaint], "inner": inner, "step": step, "blur": studio.mask_blur}

    def take_mask(self, png: bytes, sender: str, folder: Path) -> None:
        """Take the mask or the sketch that a page sends. An empty one is none."""
        mask = read_mask(png, self._size)
        painted = mask.getbbox() is not None
        if self._sketches:
            self._view.mask = {"id": sender, "png": png}
            self._guide(write_mask(mask, folder, GUIDE) if painted else None)
            return
        self._shown = images.fingerprint(mask) if painted else None
        self._view.mask = {"id": sender, "png": png}
        self._set("mask", write_mask(mask, folder) if painted else None)

    def _guide(self, sketch: Path | None) -> None:
        """Let a sketch guide the next picture in the place of the last one."""
        guides, before = [*self._studio.control_guides], self._sketch
        places = [i for i, guide in enumerate(guides) if before is not None and guide.image == before]
        self._sketch = sketch
        if sketch is None:
            guides = [guide for i, guide in enumerate(guides) if i not in places]
        elif places:
            guides[places[0]] = replace(guides[places[0]], image=sketch, hash=None)
        else:
            guides.append(Guide(sketch, self.sketcher))
        self._studio.control_guides = guides

    def take_file(self, data: bytes, folder: Path) -> None:
        """Take a picture from the page as the mask: white where the start picture is drawn anew."""
        mask = images.read(opened(data), ground="black").convert("L")
        pictures.read(Request("", image=self._studio.image, mask=mask))  # its shape is checked before it is saved
        self._set("mask", write_mask(mask, folder))

    def take_around(self, sides: list) -> None:
        """Take the pixels that are to be added at the left, top, right and bottom."""
        Request("", image="", outpaint=tuple(sides)).check_mask()
        self._set("outpaint", tuple(sides))

    def take_blur(self, pixels: float) -> None:
        request = Request("", image="", mask="", mask_blur=pixels)
        request.check_mask()
        self._studio.mask_blur = request.mask_blur

    def forget(self) -> None:
        """Draw on the whole picture again, and on it alone."""
        self._set("outpaint", (0, 0, 0, 0))
        self._set("mask", None)

    def _set(self, name: str, value) -> None:
        """Set it. A part is redrawn more strongly than a whole picture."""
        before = self._kind
        setattr(self._studio, name, value)
        if self._kind != before and not self._studio._known.inpaints:
            self._studio.strength = {"mask": 1.0, "outpaint": OUTPAINT, "whole": STRENGTH}[self._kind]


def read_mask(png: bytes, size: tuple[int, int]) -> Image.Image:
    """The mask in grey from the page's paint, which is as opaque as the mask is white."""
    try:
        image = Image.open(io.BytesIO(png), formats=("PNG",))
        if image.size == size and image.mode == "RGBA":
            return image.getchannel("A")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        pass
    raise Error("The page sent no mask of the start picture's size.", "Reload the page, and paint it again.")


def write_mask(mask: Image.Image, folder: Path, kind: str = MASK) -> Path:
    """Save a mask or a sketch beside the pictures that will be drawn with it: their settings name this file."""
    return keep(folder / f"{kind}{images.fingerprint(mask)}.png", _png(mask))


def _paint(mask: Image.Image, tint: tuple[int, int, int] = _TINT) -> bytes:
    """A mask as the page's paint."""
    paint = Image.new("RGBA", mask.size, tint)
    paint.putalpha(mask)
    return _png(paint)


def _tinted(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with its mask, for a thumbnail."""
    where = images.fit(mask, *picture.size).point(lambda v: v * 0.6)
    return Image.composite(Image.new("RGB", picture.size, _TINT), picture, where)


def _png(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()
