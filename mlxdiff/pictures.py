"""The pictures that a run takes: the start image or those to edit, and the mask. They are read, compared with
the fingerprints of a replay, and fitted to the size that is drawn; in the end, what the mask leaves out is pasted back.

A mask is white where the picture is drawn anew: from half of white on in the networks, in proportion to its grey in
pasting."""

from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from . import images
from .description import Description
from .errors import Error
from .families.base import Variant
from .request import ALPHA, Request

Box = tuple[int, int, int, int]  # left, top, right, bottom


class Taken(NamedTuple):
    """The pictures of a request."""

    images: list[Image.Image]
    mask: Image.Image | None  # grey, of any size

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        return tuple(image.size for image in self.images)


def sizes(request: Request) -> tuple[tuple[int, int], ...]:
    """Width and height of each image of a request, without reading the pixels."""
    return tuple(images.size(image) for image in request.pictures)


def read(request: Request) -> Taken:
    request.check_mask()
    taken = [images.read(image) for image in request.pictures]
    if request.mask is None:
        return Taken(taken, None)
    if request.mask == ALPHA:
        return Taken(taken, images.transparency(request.pictures[0]))
    mask = images.read(request.mask, ground="black").convert("L")
    (w, h), (mask_w, mask_h) = taken[0].size, mask.size
    if abs(mask_h - h * mask_w / w) > max(1, mask_w / w):  # a pixel of the smaller one, for what was scaled and rounded
        problem = f"The mask has another shape than its picture: {mask_w} x {mask_h} and {w} x {h}."
        raise Error(problem, "Give a mask of the picture's size.")
    return Taken(taken, mask)


def resolve(request: Request) -> tuple[Request, Taken]:
    """The request with the fingerprints of its pictures, and the pictures. Raises if those of a replay are others."""
    taken = read(request)
    if request.image is None:
        return request, taken
    found, mask = tuple(map(images.fingerprint, taken.images)), taken.mask and images.fingerprint(taken.mask)
    for i, (is_now, was) in enumerate(zip_longest(found, request.hashes)):
        if request.hashes and is_now != was:
            which = f"Image {i + 1}" if len(request.hashes) > 1 else "The image"
            raise Error(f"{which} is not the one that these settings name.", "Give that image as `image=FILE`.")
    if request.mask_hash not in (None, mask):
        raise Error("The mask is not the one that these settings name.", "Give that mask as `mask=FILE`.")
    return replace(request, image_hash=found, mask_hash=mask), taken


def check(request: Request | None, model: Description, taken: Taken | None = None) -> None:
    """Raise before the work if a request, resolved or not, has a mask under which nothing would be drawn, or nothing
    seen. taken: its pictures, if they were read already."""
    if request is None or not request.masked:
        return
    taken = read(request) if taken is None else taken
    mask = canvas(model.fill(request, taken.sizes), taken).latents(model.factor)
    if not mask.any():
        raise Error("The mask is black, or too thin: nothing would be drawn anew.", "Paint what to draw anew white.")
    if model.row.inpaints and mask.all():
        problem = f"The mask is white everywhere, so {model.name} would see nothing of the picture."
        raise Error(problem, "Leave a part of it black.")


def draws(row: Variant, request: Request) -> tuple[str, ...]:
    """What the noise of a seed is drawn for, in diffusers' order. "noise" is the noise of the run; each of the others
    makes a sample of the latents that the VAE gives for a picture: the start image, the same with grey under the mask,
    or a control picture. A noisy sampler goes on after these, so that even a draw that nothing uses counts.

    no start image, or an edit             noise
    start image                            image, noise
    with a mask                            image, noise, masked
    inpainting U-Net at strength 1         noise, masked
    a model that reads a control picture   control, noise
    with a start image                     control, image, noise
    with a mask                            masked, control, image, noise"""
    control, masked = ("control",) * ("control" in row.reads), ("masked",) * request.masked
    if request.image is None or row.edits:
        return (*control, "noise")
    if control:
        return (*masked, *control, "image", "noise")
    image = () if row.inpaints and request.strength == 1 and not row.starts_at_1 else ("image",)
    return (*image, "noise", *masked)


@dataclass(frozen=True)
class Canvas:
    """A start image as it reaches the networks, and what the result is pasted into."""

    image: Image.Image  # of the size that is drawn
    mask: Image.Image | None = None  # grey, of the same size
    whole: "Canvas | None" = None  # of a crop: the picture and the mask that it was cut from
    box: Box | None = None  # where it lay there

    @property
    def anew(self) -> np.ndarray:
        """(H, W): whether a pixel is drawn anew."""
        return np.asarray(self.mask) >= 128

    def latents(self, factor: int) -> np.ndarray:
        """(1, h, w, 1): 1 where a latent is drawn anew, which its first pixel says."""
        return self.anew[None, ::factor, ::factor, None].astype(np.float32)

    def tiles(self, factor: int) -> np.ndarray:
        """(1, h, w, factor^2): the mask of all pixels of a latent, row by row."""
        H, W = self.anew.shape
        tiles = self.anew.reshape(H // factor, factor, W // factor, factor).swapaxes(1, 2)
        return tiles.reshape(1, H // factor, W // factor, -1).astype(np.float32)

    @property
    def pixels(self) -> dict[str, np.ndarray]:
        """What the VAE encodes, (H, W, 3) in [-1, 1], under the names of `draws`."""
        image = images.to_pixels(self.image)
        return {"image": image} if self.mask is None else {"image": image, "masked": image * ~self.anew[..., None]}

    def finish(self, drawn: Image.Image, keep: bool) -> Image.Image:
        """The result for what was drawn: in its place in the whole picture, if this is a crop. keep: under the mask
        alone, so that all other pixels stay as they were."""
        if self.whole is None:
            return Image.composite(drawn, self.image, self.mask) if keep and self.mask is not None else drawn
        left, top, right, bottom = self.box
        part = drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        result = self.whole.image.copy()
        result.paste(part, self.box, self.whole.mask.crop(self.box) if keep else None)
        return result


def canvas(request: Request, taken: Taken) -> Canvas:
    """The start image and the mask of a resolved request."""
    size, image, mask = (request.width, request.height), taken.images[0], taken.mask
    if request.mask_crop is not None:
        mask = _soft(images.fit(mask, *image.size), request.mask_blur)
        if mask.getbbox() is None:
            return Canvas(images.fit(image, *size), images.fit(mask, *size))
        box = crop_box(mask, size, request.mask_crop)
        cut = (picture.crop(box).resize(size, Image.Resampling.LANCZOS) for picture in (image, mask))
        return Canvas(*cut, Canvas(image, mask), box)
    left, top, right, bottom = request.outpaint
    inner = size[0] - left - right, size[1] - top - bottom
    image, mask = images.fit(image, *inner), mask and images.fit(mask, *inner)
    if any(request.outpaint):
        around = (top, bottom), (left, right)
        inside = np.zeros(inner[::-1], np.uint8) if mask is None else np.asarray(mask)
        mask = Image.fromarray(np.pad(inside, around, constant_values=255))
        image = Image.fromarray(np.pad(np.asarray(image), (*around, (0, 0)), "edge"))
    return Canvas(image, mask and _soft(mask, request.mask_blur))


def control(request: Request, taken: Taken, picture: Image.Image) -> Image.Image:
    """A control picture at the size that is drawn: of a crop the same part as of the start image."""
    if request.mask_crop is not None:
        laid = canvas(request, taken)
        picture = images.fit(picture, *laid.whole.image.size).crop(laid.box)
    return images.fit(picture, request.width, request.height)


def _soft(mask: Image.Image, blur: float) -> Image.Image:
    return mask.filter(ImageFilter.GaussianBlur(blur)) if blur > 0 else mask


def crop_box(mask: Image.Image, size: tuple[int, int], pad: int) -> Box:
    """The part of a picture that holds its mask with `pad` pixels around, widened to the shape of what is drawn (width,
    height) as far as the picture goes, as in diffusers."""
    (w, h), (left, top, right, bottom) = mask.size, mask.getbbox()
    left, top, right, bottom = max(left - pad, 0), max(top - pad, 0), min(right + pad, w), min(bottom + pad, h)
    shape = size[0] / size[1]
    if (right - left) / (bottom - top) > shape:
        top, bottom = _widened(top, bottom, (right - left) / shape, h)
    else:
        left, right = _widened(left, right, (bottom - top) * shape, w)
    return left, top, right, bottom


def _widened(start: int, end: int, length: float, most: int) -> tuple[int, int]:
    more = int(length - (end - start))
    start, end = start - more // 2, end + more - more // 2
    start, end = start - max(0, end - most), min(end, most)  # shifted inside
    return max(start, 0), min(end - min(start, 0), most)
