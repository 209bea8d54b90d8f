"""The pictures that a run takes: the start picture, with which it begins instead of noise alone, or those that it
edits. Their control, the size of the result, and their files."""

import base64
import io
from collections.abc import Callable
from pathlib import Path

import ipywidgets as w
from PIL import Image

from .. import images, whole
from ..errors import Error
from .gallery import thumbnail

START = "begin-"  # how the names of their files begin
GUIDE = "guide-"  # and those of controls and references


class StartPicture(w.HBox):
    """Shows the start picture and how much of it is redrawn, or the pictures to edit. It is hidden while there are
    none. Every picture has a button that calls `drop` with its number. A start picture has one to paint on it."""

    def __init__(self):
        self.drop: Callable[[int], None] | None = None
        self.sizes: list[tuple[int, int]] = []
        self.remove: list[w.Button] = []
        self.strength = w.FloatSlider(description="Strength", min=0, max=1, step=0.05, readout_format=".2f")
        self.strength.tooltip = "How much of the picture is redrawn: 1 ignores it"
        self.paint = w.Button(description="Change a part")
        self.inpaint = w.Button(
            description="With an inpainting ControlNet", tooltip="A network that reads the picture around the part"
        )
        self.forget = w.Button(description="Change all of it", tooltip="Forget the mask, and what is added around")
        super().__init__()
        self.add_class("mlxdiff-start-picture")
        self.show([], edits=False)

    def show(self, pictures: list[Image.Image], edits: bool) -> None:
        """edits: whether the model edits them; else the first is the start picture."""
        self.sizes, self.remove, shown = [picture.size for picture in pictures], [], []
        for i, picture in enumerate(pictures):
            what = "The start picture" if not edits else f"Picture {i + 1} to edit"
            shown.append(w.HTML(picture_tag(picture, what)))
            tooltip = "Begin with noise alone" if not edits else f"Leave picture {i + 1} out"
            self.remove.append(w.Button(description="Remove", tooltip=tooltip))
            self.remove[i].on_click(lambda _, i=i: self.drop(i))
        pairs = [part for pair in zip(shown, self.remove, strict=True) for part in pair]
        self.children = (*pairs, self.paint, self.inpaint, self.forget, self.strength)
        self.forget.layout.display = self.inpaint.layout.display = "none"
        self.paint.disabled = edits
        self.paint.tooltip = "This model edits: it takes no mask" if edits else "Paint where it is drawn anew"
        self.layout.display = None if pictures else "none"
        self._first = shown[0] if shown else None

    def show_part(self, picture: Image.Image, part: bool) -> None:
        """picture: the start picture, with its mask if it has one. part: whether only a part is drawn anew."""
        self._first.value = picture_tag(picture, "The start picture")
        self.forget.layout.display = None if part else "none"


def picture_tag(picture: Image.Image, what: str) -> str:
    """A thumbnail as HTML."""
    data = base64.b64encode(thumbnail(picture)).decode()
    return f'<img alt="{what}" src="data:image/jpeg;base64,{data}">'


def opened(data: bytes) -> Image.Image:
    """A picture from the page."""
    try:
        return images.open_file(io.BytesIO(data))
    except (OSError, Image.DecompressionBombError):
        raise Error("The file cannot be read as a picture.", "Give a PNG, JPEG or WebP file.") from None


def write_picture(data: bytes, folder: Path, kind: str) -> Path:
    """Save a picture from the page beside the pictures that will be drawn from it: their settings name this file.
    kind: START or GUIDE."""
    image = opened(data)
    path = folder / f"{kind}{images.fingerprint(images.read(image))}.{image.format.lower()}"
    return keep(path, data)


def keep(path: Path, data: bytes) -> Path:
    """Write a file beside the pictures."""
    try:
        whole.write(path, data)
    except OSError as e:
        fix = "Free some space, or set studio.folder."
        raise Error(f"{path} cannot be written: {e.strerror}.", fix) from None
    return path
