"""Converts arrays to pictures and writes pictures to files that carry their settings (see `metadata`): the text that
other programs read (`dialects`) and the whole Request as JSON. No file is ever overwritten or half-written."""

import ctypes
import hashlib
import io
import math
import os
import re
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from . import comfyui, dialects, foreign, metadata
from .errors import Error
from .request import Request
from .signing import Signer

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
READ = (*SUFFIXES, ".tif", ".tiff", ".bmp", ".gif")  # what names of pictures that are read end in
ENDINGS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}  # of names that mlxdiff gives
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")  # that are read
MOST_EDGE = {"JPEG": 65500, "WEBP": 16383}  # pixels
MOST_PIXELS = 10**8  # of a picture that is read: half a gigabyte; only a few cameras make larger ones
_MOST_WORK = 2**32  # scans times pixels of a JPEG: some seconds
_MOST_PARTS, _LARGE = 64, 2**24  # of EXIF in a JPEG; bytes of a file in which more could be
_MOST_BYTES = 10**9  # of a JPEG: of so many pixels, one of the best quality has a third of that
_PIECE = 2**20  # bytes of a file that are looked at together
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)  # of EXIF; what it is if the camera lay on its side
# What Pillow raises for damaged files, by what it happens to trip over.
_DAMAGED = (
    OSError,
    RuntimeError,
    ValueError,
    SyntaxError,
    struct.error,
    MemoryError,
    AssertionError,
    TypeError,
    KeyError,
    Image.DecompressionBombError,
)
_MOST_NAME = 255  # bytes of a file name, on every common file system
_STRIP = 256  # rows
_MOST = 100_000  # pictures of one name in a folder


class NoSettings(Error):
    """A picture carries no settings."""


def to_image(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) in [-1, 1] to an 8-bit picture, rounded as diffusers does."""
    return Image.fromarray((np.clip(pixels / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8))


def to_pixels(image: Image.Image) -> np.ndarray:
    """The inverse of `to_image`: RGB to (H, W, 3) in [-1, 1]."""
    return np.asarray(image, np.float32) / 255 * 2 - 1


def read(source: str | Path | Image.Image, ground: str = "white", alpha: bool = False) -> Image.Image:
    """A picture that a run takes, in RGB: turned upright as its camera noted, what is transparent on a ground, 16 bits
    rounded to 8, and of an animation the first frame. alpha: what is transparent stays so, in RGBA."""
    with _readable(source) as (name, image):
        kind, given = image.format, image is source
        if not given:  # else a caller's picture would be turned
            ImageOps.exif_transpose(image, in_place=True)  # without a copy: large pictures take hundreds of megabytes
        image = ImageOps.exif_transpose(image) if given else image
        if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):  # 16 bits in both cases
            image = _eight_bits(image)
        if image.mode in ("I", "F"):  # 32 bits, whose range nothing says
            raise Error(f"{name} has more than 16 bits a channel.", "Save it with 8 bits a channel, as PNG or JPEG.")
        if 0 in image.size:
            raise Error(f"{name} has no pixels: it is {image.width} x {image.height}.", "Give another picture.")
        if image.has_transparency_data and alpha:
            return image.convert("RGBA")
        if image.has_transparency_data:  # photographs are not transparent, and this step would take most of the time
            return _grounded(image, ground)
        if image.mode == "RGB" and kind in ("JPEG", "PNG") and not given:  # of other kinds the file may stay open
            image.load()
            return image
        made = image.convert("RGB")
        if image.mode == "CMYK":
            made.info.pop("icc_profile", None)  # it would be of other colours
        return made


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """A picture in strips, each with the row that it begins in: less to hold in another form."""
    for top in range(0, image.height, _STRIP):
        yield top, image.crop((0, top, image.width, min(image.height, top + _STRIP)))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Of a grey picture in 16 bits."""
    made = Image.new("L", image.size)
    for top, strip in strips(image):
        made.paste(Image.fromarray((np.asarray(strip).astype(np.float32) / 257).round().astype(np.uint8)), (0, top))
    return made


def _grounded(image: Image.Image, ground: str) -> Image.Image:
    """A transparent picture on a ground, in RGB."""
    made = Image.new("RGB", image.size)
    for top, strip in strips(image):
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, ground), strip.convert("RGBA"))
        made.paste(strip.convert("RGB"), (0, top))
    return made


def transparency(source: str | Path | Image.Image) -> Image.Image:
    """How transparent a picture is, in grey: white is transparent."""
    with _readable(source) as (name, image):
        if not image.has_transparency_data:
            raise Error(f"{name} has no transparent part, which is to be its mask.", "Give a mask as `mask=FILE`.")
        return ImageOps.invert(ImageOps.exif_transpose(image).convert("RGBA").getchannel("A"))


def size(source: str | Path | Image.Image) -> tuple[int, int]:
    """Width and height that `read` gives, without reading the pixels; of a PNG before it is turned, since its EXIF may
    stand behind them."""
    with _readable(source) as (_, image):
        lying = image.format != "PNG" and image.getexif().get(_ORIENTATION) in _LYING
        return image.size[::-1] if lying else image.size


@contextmanager
def _readable(source: str | Path | io.BytesIO | Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """What a picture is called in messages, and the picture, opened. Whatever is wrong with it becomes an Error."""
    if not isinstance(source, str | Path | io.BytesIO | Image.Image):
        raise Error(f"The image is {type(source).__name__}, not a picture.", "Give a path or a PIL image.")
    name = "The image" if isinstance(source, Image.Image) else "The picture"
    name = str(source) if isinstance(source, str | Path) else name
    try:
        file = foreign.path(source) if isinstance(source, str | Path) else source
        yield name, file if isinstance(file, Image.Image) else open_file(file)
    except FileNotFoundError:
        raise Error(f"There is no picture at {name}.", "Check the path.") from None
    except _DAMAGED as e:
        why = getattr(e, "strerror", None) or str(e) or f"it is damaged ({type(e).__name__})"
        why = "its format is not known" if isinstance(e, UnidentifiedImageError) else why  # else a buffer's address
        fix = f"Give one of {', '.join(FORMATS)}."
        raise Error(f"{name} cannot be read as a picture: {why}.", fix) from None


def open_file(file: Path | io.BytesIO) -> Image.Image:
    """A picture of a format that only reading its bytes decodes: for others Pillow may start a program, as for EPS.
    Raises OSError if decoding it would take far more work or memory than its pixels are worth."""
    if isinstance(file, Path):
        foreign.check_regular(file)
    large = (file.stat().st_size if isinstance(file, Path) else file.getbuffer().nbytes) > _LARGE
    parts, scans = _marks(file) if large else (0, None)
    if parts > _MOST_PARTS:  # joining them takes Pillow a time that grows with their square: minutes for 130 MB
        raise OSError(0, f"it is a JPEG whose EXIF has more than {_MOST_PARTS} parts")
    image = Image.open(file, formats=FORMATS)
    if image.format == "TIFF":
        _quiet_libtiff()
    pixels = image.width * image.height
    if pixels > MOST_PIXELS:
        raise OSError(0, f"it has {pixels // 10**6} megapixels, and {MOST_PIXELS // 10**6} are the most")
    if "progressive" in image.info and pixels * (_marks(file)[1] if scans is None else scans) > _MOST_WORK:
        raise OSError(0, "it is a JPEG in more scans than its pixels need")
    return image


@cache
def _quiet_libtiff() -> None:
    """libtiff tells standard error what is wrong with a file. Pillow raises for it, and we say it in one line."""
    folder = Path(Image.__file__).parent
    for library in (*folder.parent.glob("pillow.libs/libtiff*"), *folder.glob(".dylibs/libtiff*")):
        with suppress(OSError, AttributeError):
            ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)


def _marks(file: Path | io.BytesIO) -> tuple[int, int]:
    """Of a JPEG: in how many parts its EXIF is, which is one in pictures, and how often it goes over its pixels: ten
    times usually, and a file of a megabyte could do it ten thousand times. Thumbnails within it count too."""
    counts, before = [0, 0], b""
    with file.open("rb") if isinstance(file, Path) else io.BytesIO(file.getbuffer()) as f:
        if f.read(2) != b"\xff\xd8":
            return 0, 0
        if f.seek(0, os.SEEK_END) > _MOST_BYTES:
            raise OSError(0, f"it is a JPEG of more than {_MOST_BYTES / 1e9:.0f} GB")
        f.seek(2)
        while piece := f.read(_PIECE):
            for i, mark in enumerate((b"Exif\0\0", b"\xff\xda")):
                counts[i] += (before[1 - len(mark) :] + piece).count(mark)  # also one that two pieces share
            before = piece[-8:]
    return tuple(counts)


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image scaled until it fills the size, then cropped around its middle."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def cut(
    image: Image.Image, scaled: tuple[int, int], size: tuple[int, int], how: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """The image stretched to one size, then cropped around its middle to another."""
    if image.size != scaled:
        image = image.resize(scaled, how)
    left, top = ((a - b) // 2 for a, b in zip(scaled, size, strict=True))
    return image.crop((left, top, left + size[0], top + size[1]))


def fingerprint(image: Image.Image) -> str:
    seen = hashlib.sha256(repr(image.size).encode())
    for _, strip in strips(image):
        seen.update(strip.tobytes())
    return seen.hexdigest()[:16]


def preview(x0: np.ndarray, factors: tuple) -> Image.Image:
    """A rough picture of latents (h, w, c) by one linear map to RGB; the last row of `factors` is the bias."""
    table = np.asarray(factors, np.float32)
    return to_image(x0.astype(np.float32) @ table[:-1] + table[-1])


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of the same size joined into one, in a block as close to a square as possible."""
    if len(pictures) == 1:
        return pictures[0]
    across = math.ceil(math.sqrt(len(pictures)))
    w, h = pictures[0].size
    out = Image.new("RGB", (across * w, math.ceil(len(pictures) / across) * h))
    for i, picture in enumerate(pictures):
        out.paste(picture, (i % across * w, i // across * h))
    return out


def save(
    image: Image.Image,
    path: Path,
    request: Request,
    model: str,
    recipe: str,
    quality: int | None = None,
    signer: Signer | None = None,
) -> Path:
    """Write a PNG (or JPEG, WebP by the suffix) under the first free name: house.png, house-1.png, ... model:
    the name of the model that drew it. recipe: how its weights were stored, as `str(Recipe)`. quality: of a JPEG or
    WebP, 1 to 100; a WebP of 100 loses nothing. signer: adds Content Credentials."""
    return write(image, path, source(request), _texts(request, model, recipe), quality, signer)


def write(
    image: Image.Image,
    path: Path,
    source: str,
    texts: dict[str, str] | None = None,
    quality: int | None = None,
    signer: Signer | None = None,
) -> Path:
    """Write a picture that carries texts under the first free name. source: how it was made, in IPTC's word."""
    path = Path(path)
    temp = path.with_name(f".{secrets.token_hex(8)}.part")  # of this call alone: threads and machines share folders
    kind = kind_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            encode(image, temp, kind, source, texts, quality)
            if signer is not None:
                temp.write_bytes(signer.sign(temp.read_bytes(), kind, source))
            return _claim(temp, path)
        finally:
            temp.unlink(missing_ok=True)
    except OSError as e:
        raise Error(f"{path} cannot be written: {e.strerror or e}.", "Choose another place with `output`.") from None


def encode(
    image: Image.Image,
    file: Path | io.BytesIO,
    kind: str,
    source: str,
    texts: dict[str, str] | None = None,
    quality: int | None = None,
) -> None:
    """Write a picture's bytes. kind: "PNG", "JPEG" or "WEBP"."""
    options = metadata.options(kind, {} if texts is None else texts, source, quality)
    image.save(file, kind, icc_profile=image.info.get("icc_profile"), **options)


def encoded(
    image: Image.Image,
    request: Request,
    model: str,
    recipe: str,
    kind: str = "PNG",
    quality: int | None = None,
    signer: Signer | None = None,
) -> bytes:
    """The bytes of the file that `save` writes."""
    out = io.BytesIO()
    encode(image, out, kind, source(request), _texts(request, model, recipe), quality)
    return out.getvalue() if signer is None else signer.sign(out.getvalue(), kind, source(request))


def shown(image: Image.Image, source: str = metadata.DRAWN) -> bytes:
    """A PNG without settings, for a notebook, from where people save pictures too."""
    out = io.BytesIO()
    encode(image, out, "PNG", source)
    return out.getvalue()


def check_settings(kind: str, request: Request, model: str, recipe: str) -> None:
    """Raise before the work if the settings of a picture do not fit into a file of this kind."""
    metadata.options(kind, _texts(request, model, recipe), source(request))


def check_fits(path: Path, size: tuple[int, int], mode: str) -> None:
    """Raise before the work if the format of a name cannot hold such a picture."""
    kind = kind_of(path)
    if max(size) > MOST_EDGE.get(kind, math.inf):
        problem = f"{path} would have {size[0]} x {size[1]} pixels; {kind} has at most {MOST_EDGE[kind]} along an edge."
        raise Error(problem, "End the name in .png.")
    if mode == "RGBA" and kind == "JPEG":
        raise Error(f"{path} cannot be transparent, which the picture is in part.", "End the name in .png.")


def _texts(request: Request, model: str, recipe: str) -> dict[str, str]:
    text = dialects.parameters(vars(request), model, recipe)
    return {
        metadata.A1111: text,
        metadata.REQUEST: request.to_json(),
        metadata.MODEL: model,
        metadata.RECIPE: recipe,
    }


def source(request: Request) -> str:
    """How a picture is made, in IPTC's word. A start picture is edited; a control or reference only guides."""
    return metadata.EDITED if request.pictures or request.hashes else metadata.DRAWN


def file_name(request: Request, ending: str = "png") -> str:
    """A file name with the prompt's first words and the seed."""
    return f"{stem(request)}.{ending}"


def stem(request: Request) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:40].strip("-") or "picture"
    return f"{words}-{request.seed}"


def new_folder(path: Path) -> Path:
    """Make a folder under the first free name: house, house-1, ..."""
    for i in range(_MOST):
        folder = path if i == 0 else path.with_name(f"{path.name}-{i}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as e:
            raise Error(f"{folder} cannot be made: {e.strerror}.", "Choose another place.") from None
    raise Error(f"{path.parent} already holds {_MOST} folders of this name.", "Choose another place.")


def is_folder(path: str | Path) -> bool:
    """Whether a path means a folder of pictures rather than one picture file. The path need not exist yet."""
    return os.path.isdir(foreign.path(path)) or str(path).endswith(("/", "\\")) or not Path(path).suffix


def kind_of(path: Path) -> str:
    """The file format of a name, by its suffix."""
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise Error(f"{path} is not a kind of picture that mlxdiff writes.", f"End it in one of {', '.join(SUFFIXES)}.")
    return kind


def check_name(path: Path) -> None:
    """Raise before the work if no picture can have this name."""
    kind_of(path)
    try:
        path.lstat()
    except FileNotFoundError:
        _quiet_libtiff()
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        raise Error(f"{path} cannot be written: {why}.", "Choose another place with `output`.") from None


def numbered(path: Path, word: str | int) -> Path:
    """house.png -> house-7.png. A long name is cut, so that the new one is no longer than a file system allows."""
    stem, end = path.stem, f"-{word}{path.suffix}"
    while stem and len(os.fsencode(stem + end)) > _MOST_NAME:
        stem = stem[:-1]
    return path.with_name(stem + end)


def _claim(temp: Path, path: Path) -> Path:
    """Give the finished file its name; a hard link fails if the name is taken, so two processes never collide."""
    for i in range(_MOST):
        target = path if i == 0 else numbered(path, i)
        try:
            os.link(temp, target)
            return target
        except FileExistsError:
            continue
        except OSError:  # no hard links here (FAT, some network drives): take the name first, then the place
            try:
                os.close(os.open(target, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            try:
                os.replace(temp, target)
            except BaseException:
                target.unlink()
                raise
            return target
    raise Error(f"{path.parent} already holds {_MOST} pictures of this name.", "Choose another name with `output`.")


def read_metadata(source: Path | io.BytesIO, whole: bool = False) -> metadata.Metadata:
    """What a picture file says about itself. whole: as `metadata.read` has it."""
    with _readable(source) as (_, image):
        return metadata.read(image, whole)


def form(source: Path) -> tuple[str, tuple[int, int], str]:
    """A file's format, its width and height, and the letters of its channels: RGB, RGBA, ..."""
    with _readable(source) as (_, image):
        return str(image.format), image.size, "RGBA" if image.has_transparency_data else image.mode


def read_settings(source: Path | io.BytesIO) -> tuple[Request, str | None]:
    """The Request that drew a picture and the model's name, from our JSON, A1111's text or ComfyUI's graph."""
    return settings_of(read_metadata(source), source if isinstance(source, Path) else "The picture")


def settings_of(held: metadata.Metadata, name: str | Path) -> tuple[Request, str | None]:
    """The same, of what was read from the picture of this name."""
    kinds = (metadata.REQUEST, metadata.A1111, metadata.COMFYUI[0])
    kind, text = next(((kind, held.texts[kind]) for kind in kinds if held.texts.get(kind)), ("", ""))
    if not text:
        fix = "Give a picture written by mlxdiff, A1111, a relative of it, or ComfyUI."
        why = f": {'; '.join(held.problems)}" if held.problems else ""
        raise NoSettings(f"{name} carries no settings{why}.", fix)
    by_hand = "Type the settings by hand."
    if len(text) > metadata.MAX_TEXT:
        problem = f"{name} carries {len(text)} characters of settings, more than {metadata.MAX_TEXT}."
        raise Error(problem, by_hand)
    try:
        if kind == metadata.REQUEST:
            return Request.from_json(text), held.texts.get(metadata.MODEL)
        settings, model = (dialects.parse_parameters if kind == metadata.A1111 else comfyui.parse)(text)
        return Request(**settings), model
    except ValueError as e:
        raise Error(f"{name} carries damaged settings: {e}.", by_hand) from None
