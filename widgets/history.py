"""The pictures that a studio shows in its strip: those that it has drawn, and those that its folder held before."""

import itertools
from contextlib import suppress
from pathlib import Path

from PIL import Image

from .. import images
from ..errors import Error
from .gallery import COMPARISON, Picture, thumbnail
from .start_picture import GUIDE, START
from .view import STRIP, View


class History:
    def __init__(self, view: View):
        self._view = view
        self._pictures: dict[int, Picture] = {}
        self._keys = itertools.count()

    def __getitem__(self, key: int) -> Picture:
        return self._pictures[key]

    def keep(self, picture: Picture, image: Image.Image, show: bool) -> None:
        entry = self._entry(picture, image)
        self._view.history = [*self._view.history, entry][-STRIP:]
        if show:
            self.show(entry["key"])

    def show(self, key: int) -> None:
        self._view.show(key, self._pictures[key])

    def delete(self, key: int) -> None:
        """Delete a picture's file, and show the newest of the others."""
        path = self._pictures[key].path
        try:
            path.unlink(missing_ok=True)
        except OSError as e:
            raise Error(f"{path} cannot be deleted: {e.strerror}.", "Delete it yourself.") from None
        self._pictures.pop(key)
        self._view.history = [entry for entry in self._view.history if entry["key"] != key]
        if self._view.history:
            self.show(self._view.history[-1]["key"])
        else:
            self._view.shown = {}

    def recall(self, folder: str | Path) -> None:
        """Put the newest pictures of the folder before those in the strip. Files without settings are left out."""
        here = {picture.path for picture in self._pictures.values()}
        found = [p for p in Path(folder).resolve().glob("*.png") if not p.name.startswith((START, GUIDE))]
        found = [p for p in found if p not in here]
        earlier = []
        for path in sorted(found, key=lambda p: p.stat().st_mtime_ns)[-STRIP:]:
            with suppress(Error):
                request, model = images.read_settings(path)
                title = "Comparison" if path.name.startswith(COMPARISON) else ""
                picture = Picture(path, request, model or "", "", 0.0, title)
                earlier.append(self._entry(picture, images.read(path)))
        self._view.history = [*earlier, *self._view.history][-STRIP:]

    def _entry(self, picture: Picture, image: Image.Image) -> dict:
        key = next(self._keys)
        self._pictures[key] = picture
        title = picture.title or f"{picture.request.prompt or 'no prompt'}, seed {picture.request.seed}"
        return {"key": key, "title": title, "thumb": thumbnail(image)}
