"""The start picture, which runs begin with instead of noise alone: its control, the size it needs, and its file."""

import base64
import io
from pathlib import Path

import ipywidgets as w
from PIL import Image

from .. import images
from ..errors import Error
from ..request import Request
from .gallery import thumbnail


class StartPicture(w.HBox):
    """Shows the start picture and how much of it is redrawn. It is hidden while there is no start picture."""

    def __init__(self):
        self.picture = w.HTML()
        self.strength = w.FloatSlider(description="Strength", min=0, max=1, step=0.05, readout_format=".2f")
        self.strength.tooltip = "How much of the picture is redrawn: 1 ignores it"
        self.remove = w.Button(icon="times", tooltip="Begin with noise alone")
        super().__init__([self.picture, self.strength, self.remove])
        self.add_class("mlxdiff-start-picture")
        self.show(None)

    def show(self, image: Image.Image | None) -> None:
        self._size = None if image is None else image.size
        if image is not None:
            data = base64.b64encode(thumbnail(image)).decode()
            self.picture.value = f'<img alt="The start picture" src="data:image/jpeg;base64,{data}">'
        self.layout.display = "none" if image is None else None

    def shape(self, size: int, multiple: int) -> dict[str, int]:
        """Width and height in its shape, with at most size² pixels; empty if there is no start picture."""
        if self._size is None:
            return {}
        request = Request("").sized(self._size, size**2, multiple)
        return {"width": request.width, "height": request.height}


def write_start_picture(data: bytes, folder: Path) -> Path:
    """Save a picture from the page beside the pictures that will be drawn from it: their settings name this file."""
    try:
        image = images.open_file(io.BytesIO(data))
    except (OSError, Image.DecompressionBombError):
        raise Error("The file cannot be read as a picture.", "Give a PNG, JPEG or WebP file.") from None
    path = folder / f"begin-{images.fingerprint(images.read(image))}.{image.format.lower()}"
    part = path.with_suffix(".part")
    part.write_bytes(data)
    return part.replace(path)
