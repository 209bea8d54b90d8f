"""The pictures that a studio shows in its strip: those that it has drawn, and those that its folder held before. A file
beside the pictures names the favourites, one a line."""

import fcntl
import itertools
import os
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

from PIL import Image

from .. import foreign, images, whole
from ..errors import Error
from .gallery import COMPARISON, Picture, thumbnail
from .start_picture import GUIDE, START
from .view import STRIP, View

FAVOURITES = "favourites.txt"


class History:
    def __init__(self, view: View):
        self._view = view
        self._pictures: dict[int, Picture] = {}
        self._keys = itertools.count()
        self.lock = threading.RLock()  # of what the worker's thread and the page's both change

    def __getitem__(self, key: int) -> Picture:
        return self._pictures[key]

    def keep(self, picture: Picture, image: Image.Image, show: bool) -> None:
        entry = self._entry(picture, image)
        with self.lock:
            self._view.history = _newest([*self._view.history, entry])
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
        if path.name in favourites(path.parent):
            _star(path, False)
        self._pictures.pop(key)
        with self.lock:
            self._view.history = [entry for entry in self._view.history if entry["key"] != key]
        for entry in reversed(self._view.history):
            with suppress(Error):  # its file may be gone too
                self.show(entry["key"])
                return
        self._view.shown = {}

    def recall(self, folder: str | Path) -> None:
        """Put the newest pictures of the folder before those in the strip. Files without settings are left out."""
        here = {picture.path for picture in self._pictures.values()}
        found = [p for p in Path(folder).resolve().glob("*.png") if not p.name.startswith((START, GUIDE, "."))]
        found = [p for p in found if p not in here]
        earlier, wrong = [], None
        try:
            starred = favourites(Path(folder))
        except Error as e:  # the pictures are shown all the same
            starred, wrong = set(), e
        found.sort(key=lambda p: foreign.stamp(p)[1:2])
        for path in [*(p for p in found[:-STRIP] if p.name in starred), *found[-STRIP:]]:
            with suppress(Error):
                request, model = images.read_settings(path)
                title = "Comparison" if path.name.startswith(COMPARISON) else ""
                picture = Picture(path, request, model or "", "", 0.0, title)
                earlier.append(self._entry(picture, images.read(path), path.name in starred))
        with self.lock:
            self._view.history = _newest([*earlier, *self._view.history])
        if wrong is not None:
            raise wrong

    def star(self, key: int) -> None:
        """Make a picture a favourite, or, if it is shown as one, one no more."""
        path = self._pictures[key].path
        if "\n" in path.name:
            raise Error("The name of this picture has more than one line.", "Rename its file.")
        star = not any(e["star"] for e in self._view.history if e["key"] == key)
        _star(path, star)
        with self.lock:
            self._view.history = [e | {"star": star} if e["key"] == key else e for e in self._view.history]

    def _entry(self, picture: Picture, image: Image.Image, star: bool = False) -> dict:
        key = next(self._keys)
        self._pictures[key] = picture
        title = picture.title or f"{picture.request.prompt or 'no prompt'}, seed {picture.request.seed}"
        return {"key": key, "title": title, "thumb": thumbnail(image), "star": star}


def _newest(entries: list[dict]) -> list[dict]:
    """As many as the strip holds, and the favourites among those before."""
    return [*(e for e in entries[:-STRIP] if e["star"]), *entries[-STRIP:]]


def favourites(folder: Path) -> set[str]:
    """The names of a folder's favourites."""
    if not (folder / FAVOURITES).exists():
        return set()
    data = foreign.read(folder / FAVOURITES, f"Mend {FAVOURITES} there, or delete it.")
    return {name.removesuffix("\r") for name in data.decode("utf-8", "surrogateescape").split("\n")} - {""}


def _star(path: Path, star: bool) -> None:
    """Note whether a picture is a favourite, while no other studio notes one in its folder: one of them would be
    lost."""
    with ExitStack() as stack:
        with suppress(OSError):  # some drives have no locks
            folder = os.open(path.parent, os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        names = favourites(path.parent)
        _write(path.parent, names | {path.name} if star else names - {path.name})


def _write(folder: Path, names: set[str]) -> None:
    text = "".join(f"{name}\n" for name in sorted(names))
    try:
        whole.write(folder / FAVOURITES, text.encode("utf-8", "surrogateescape"))
    except OSError as e:
        fix = "Check the free space and the permissions."
        raise Error(f"{folder / FAVOURITES} cannot be written: {e.strerror}.", fix) from None
