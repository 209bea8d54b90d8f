"""Larger pictures: an upscaler, and two passes, of which the second draws the enlarged picture on."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from PIL import Image

from .description import Description
from .errors import Error
from .request import Request
from .result import Event
from .upscale import Upscaler

Draw = Callable[..., Iterator[Event]]  # one pass of a resolved request, and perhaps with given noise


class Larger:
    """What enlarges the pictures of one model. The last upscaler is kept."""

    def __init__(self, model: Description, offline: bool):
        self.model, self.offline = model, offline
        self._upscaler: Upscaler | None = None

    def resolve(self, request: Request) -> Request:
        """The request with the fingerprint of its upscaler, which is opened here, before the work."""
        request.check_hires()
        if request.upscaler is None:
            return request
        if self._upscaler is not None and not self._upscaler.current:
            self._upscaler = None
        found = self._open(request).hash
        if request.upscaler_hash not in (None, found):
            problem = f"The upscaler {request.upscaler} is not the one that these settings name."
            raise Error(problem, "Give that file as `upscaler=FILE`.")
        return replace(request, upscaler_hash=found)

    def upscale(self, request: Request, image: Image.Image) -> Iterator[Event]:
        for tile in self._open(request).tiles(image):
            yield Event("upscale", tile.done, tile.tiles, tile.seconds, image=tile.image)

    def two_passes(self, draw: Draw, request: Request, given: np.ndarray | None) -> Iterator[Event]:
        """Draw, enlarge, and draw on, one picture at a time: each equals what it gives by the commands one by one."""
        drawn = []
        for event in draw(replace(request, hires=None, upscaler=None), given):
            drawn += [] if event.image is None else [event.image]
            yield event._replace(image=None)
        for i, (picture, single) in enumerate(zip(drawn, request.singles(), strict=True)):
            second = self.model.second_pass(single)
            if request.upscaler is not None:
                for event in self.upscale(request, picture):
                    picture = picture if event.image is None else event.image
                    yield event._replace(image=None, hires=i)
            picture = picture.resize((second.width, second.height), Image.Resampling.LANCZOS)
            for event in draw(replace(second, image=picture)):
                yield event._replace(hires=i)

    def _open(self, request: Request) -> Upscaler:
        if self._upscaler is None or self._upscaler.name != str(request.upscaler):
            self._upscaler = Upscaler(request.upscaler, offline=self.offline)
        return self._upscaler
