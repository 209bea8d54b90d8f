"""Makes control pictures from photographs: edges, depth, grey, inverted."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from .. import images
from ..console import install
from ..errors import Error, did_you_mean
from ..models.depth import resized

# Depth Anything V2 small; Apache-2.0, 99 MB
DEPTH = "depth-anything/Depth-Anything-V2-Small-hf/model.safetensors"
_DEPTH_EDGE = 518  # pixels: the size that it was trained at, and its processor's
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_THRESHOLDS = (100, 200)  # of the published ControlNets' examples


def run(
    kind: str,
    image: str | Path | Image.Image,
    *,
    model: str | Path | None = None,
    offline: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Image.Image:
    """The control picture of an image, of the same size, in RGB.

    kind: canny (white edges on black, by OpenCV), depth (near is white), grey or invert.
    model: another Depth Anything model in transformers' layout, for depth: a folder, a file, or org/repo/file.
    offline: never use the network. progress: called with (stage, bytes done, bytes in all) while it is fetched."""
    check(kind, model)
    image = images.read(image)
    if kind == "depth":
        return _depth(image, DEPTH if model is None else model, offline, progress)
    return KINDS[kind](image)


def check(kind: str, model: str | Path | None = None) -> None:
    """Raise before the work if there is no such kind of control picture, or if it takes no model."""
    if kind not in [*KINDS]:
        fix = f"{did_you_mean(str(kind), KINDS)}Use one of {', '.join(KINDS)}."
        raise Error(f"There is no control picture {kind!r:.60}.", fix)
    if model is not None and kind != "depth":
        raise Error(f"{kind} needs no model.", "Leave `model` out.")
    if kind == "canny":
        _opencv()


def _opencv():
    try:
        import cv2
    except ImportError:
        raise Error(
            "Canny edges are found by OpenCV, which is not here.", f"Install it: {install('control')}"
        ) from None
    return cv2


def _canny(image: Image.Image) -> Image.Image:
    return Image.fromarray(_opencv().Canny(np.asarray(image), *_THRESHOLDS)).convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def _depth(image: Image.Image, model: str | Path, offline: bool, progress: Callable | None) -> Image.Image:
    from .. import store

    what, fix = "a depth model", "Use a Depth Anything model in transformers' layout."
    file = store.network_file(model, what, fix, offline=offline, progress=progress)
    net = store.network(file, what, fix, dtype="float32")  # small, and its numbers are large
    config = net.config
    edge = _DEPTH_EDGE if config.patch == 14 else config.grid * config.patch
    near = net(mx.array(depth_input(image, config.patch, edge)))
    near = resized(near[..., None], image.height, image.width, "bicubic")[0, ..., 0]
    near = (near - near.min()) / mx.maximum(near.max() - near.min(), 1e-9)
    mx.eval(near)
    near = np.array(near)
    if not np.isfinite(near).all():
        raise Error(f"{model} gave values that are not finite.", "Its weights are damaged: fetch them again.")
    return Image.fromarray((near * 255).round().astype(np.uint8)).convert("RGB")


def depth_input(image: Image.Image, patch: int, edge: int) -> np.ndarray:
    """The picture as the network reads it, (1, H, W, 3). Of the two scales that make an edge that long, the one that
    changes the picture less is used; then both edges are rounded to patches."""
    scale = min((edge / n for n in image.size[::-1]), key=lambda s: abs(1 - s))
    w, h = (max(1, round(n * scale / patch)) * patch for n in image.size)
    x = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC), np.float32) / 255
    return ((x - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32))[None]


KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "canny": _canny,
    "depth": _depth,
    "grey": _grey,
    "invert": ImageOps.invert,
}
