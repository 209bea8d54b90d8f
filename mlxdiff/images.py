"""Arrays to pictures, and pictures to files that carry their settings: the text other tools read (A1111's
`parameters`) and the whole Request as JSON (`mlxdiff`). A file is never overwritten and never half-written."""

import hashlib
import io
import math
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from . import __version__
from .errors import Error
from .request import Request

SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_CHUNK = "mlxdiff"
_MOST = 100_000  # pictures of one name in a folder


class NoSettings(Error):
    """A picture carries none."""


def to_image(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) in [-1, 1] to an 8-bit picture, rounded as diffusers does."""
    return Image.fromarray((np.clip(pixels / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8))


def to_pixels(image: Image.Image) -> np.ndarray:
    """The way back: RGB to (H, W, 3) in [-1, 1]."""
    return np.asarray(image, np.float32) / 255 * 2 - 1


def read(source: str | Path | Image.Image) -> Image.Image:
    """A picture to begin with, in RGB: turned upright as its camera noted, what is transparent on white."""
    if not isinstance(source, str | Path | Image.Image):
        raise Error(f"The image is {type(source).__name__}, not a picture.", "Give a path or a PIL image.")
    name = "The image" if isinstance(source, Image.Image) else str(source)
    try:
        image = source if isinstance(source, Image.Image) else Image.open(Path(source).expanduser())
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise Error(f"{name} has more than 8 bits a channel.", "Save it with 8, as PNG or JPEG.")
        if 0 in image.size:
            raise Error(f"{name} has no pixels: it is {image.width} x {image.height}.", "Give one that has some.")
        if image.has_transparency_data:  # a photograph has none, and this would take most of the time
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except FileNotFoundError:
        raise Error(f"There is no picture at {name}.", "Check the path.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise Error(f"{name} cannot be read as a picture: {e}.", "Give a PNG, JPEG or WebP file.") from None


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scaled until it fills the size, and cropped about its middle."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def fingerprint(image: Image.Image) -> str:
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:16]


def preview(x0: np.ndarray, factors: tuple) -> Image.Image:
    """A rough picture of latents (h, w, c) by one linear map to RGB; the last row of `factors` is the bias."""
    table = np.asarray(factors, np.float32)
    return to_image(x0.astype(np.float32) @ table[:-1] + table[-1])


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size side by side, in as square a block as they make."""
    if len(pictures) == 1:
        return pictures[0]
    across = math.ceil(math.sqrt(len(pictures)))
    w, h = pictures[0].size
    out = Image.new("RGB", (across * w, math.ceil(len(pictures) / across) * h))
    for i, picture in enumerate(pictures):
        out.paste(picture, (i % across * w, i // across * h))
    return out


def save(image: Image.Image, path: Path, request: Request, model: str, recipe: str) -> Path:
    """Write a PNG (or JPEG, WebP by the suffix) under the first free name: house.png, house-1.png, ... model, recipe:
    what drew it, and how its weights were stored, by `weights.label`."""
    return write(image, path, **_settings(kind_of(Path(path)), request, model, recipe))


def write(image: Image.Image, path: Path, **options) -> Path:
    """Write a picture under the first free name. options: of PIL's writer."""
    path = Path(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.part")
    kind = kind_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            image.save(temp, kind, **options)
            return _claim(temp, path)
        finally:
            temp.unlink(missing_ok=True)
    except OSError as e:
        raise Error(f"{path} cannot be written: {e.strerror or e}.", "Choose another place with `output`.") from None


def png(image: Image.Image, request: Request, model: str, recipe: str) -> bytes:
    """The PNG that `save` writes."""
    out = io.BytesIO()
    image.save(out, "PNG", **_settings("PNG", request, model, recipe))
    return out.getvalue()


def file_name(request: Request) -> str:
    """A file name made of the prompt's first words and the seed."""
    return f"{stem(request)}.png"


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
    """Whether pictures go into a path, which need not be there yet, or become it."""
    return Path(path).expanduser().is_dir() or str(path).endswith(("/", "\\")) or not Path(path).suffix


def kind_of(path: Path) -> str:
    """The file format a name asks for."""
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise Error(f"{path} is not a picture name mlxdiff writes.", f"End it in one of {', '.join(SUFFIXES)}.")
    return kind


def _claim(temp: Path, path: Path) -> Path:
    """Give the finished file its name; a hard link fails if the name is taken, so two processes never collide."""
    for i in range(_MOST):
        target = path if i == 0 else path.with_name(f"{path.stem}-{i}{path.suffix}")
        try:
            os.link(temp, target)
            return target
        except FileExistsError:
            continue
        except OSError:  # no hard links here (FAT, some network drives): rename, having looked
            if not target.exists():
                os.replace(temp, target)
                return target
    raise Error(f"{path.parent} already holds {_MOST} pictures of this name.", "Choose another name with `output`.")


def _settings(kind: str, request: Request, model: str, recipe: str) -> dict:
    text = parameters(request, model, recipe)
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", text)
        info.add_itxt(_CHUNK, request.to_json())
        info.add_itxt("mlxdiff-model", model)
        info.add_itxt("mlxdiff-recipe", recipe)
        return {"pnginfo": info}
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")  # UserComment, as A1111 writes it
    return {"exif": exif.tobytes(), "quality": 95}


# --- the text A1111 and its relatives write and read

_A1111_SAMPLERS = {
    "pndm": "PLMS",
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
_A1111_SCHEDULES = {"karras": "Karras", "exponential": "Exponential", "sgm_uniform": "SGM Uniform", "beta": "Beta"}
_A1111_SCHEDULES |= {
    "simple": "Simple",
    "leading": "Leading",
    "trailing": "Trailing",
    "linspace": "Uniform",
    "lcm": "LCM",
}


def parameters(request: Request, model: str, recipe: str) -> str:
    """Settings of a resolved request as A1111 writes them: prompt, negative prompt, then one line of pairs."""
    lines = [request.prompt]
    if request.negative is not None:
        lines.append(f"Negative prompt: {request.negative}")
    pairs = {
        "Steps": request.steps,
        "Sampler": _A1111_SAMPLERS[request.sampler],
        "Schedule type": _A1111_SCHEDULES[request.schedule],
        "CFG scale": f"{request.guidance:g}",
        "Seed": request.seed,
        "Size": f"{request.width}x{request.height}",
        "Denoising strength": request.strength,
        "Model": _quoted(model),
        "Weights": recipe,
        "Clip skip": request.clip_skip,
        "RNG": {"torch": "CPU", "nv": "NV"}.get(request.noise),
        "Version": f"mlxdiff {__version__}",
    }
    lines.append(", ".join(f"{k}: {v}" for k, v in pairs.items() if v is not None))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return f'"{text}"' if re.search(r"[,:\n]", text) else text


def read_settings(source: Path | io.BytesIO) -> tuple[Request, str | None]:
    """The Request that drew a picture and the model's name, from our JSON or from A1111's text."""
    name = source if isinstance(source, Path) else "The picture"
    try:
        with Image.open(source) as image:
            info = dict(image.info)
            comment = image.getexif().get_ifd(0x8769).get(0x9286, b"")
    except FileNotFoundError:
        raise Error(f"There is no picture at {name}.", "Check its path.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        why = "its format is not known" if isinstance(e, UnidentifiedImageError) else e  # else a buffer's address
        raise Error(f"{name} cannot be read as a picture: {why}.", "Give a PNG written by mlxdiff or A1111.") from None
    if _CHUNK in info:
        try:
            return Request.from_json(info[_CHUNK]), info.get("mlxdiff-model")
        except (ValueError, TypeError, AttributeError) as e:
            raise Error(f"{name} carries damaged settings: {e}.", "Type the settings by hand.") from None
    text = info.get("parameters")
    if text is None and isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        text = comment[8:].decode("utf-16-be", errors="replace")
    if not text:
        fix = "Give a picture written by mlxdiff, A1111 or a relative of it."
        raise NoSettings(f"{name} carries no settings.", fix)
    return parse_parameters(text)


def parse_parameters(text: str) -> tuple[Request, str | None]:
    """A1111's text back to a Request. What mlxdiff has no name for is left at the model's default."""
    lines = text.strip().splitlines()
    pairs = _pairs(lines[-1]) if lines and "Steps:" in lines[-1] else {}
    body = "\n".join(lines[:-1] if pairs else lines)
    prompt, found, negative = body.partition("Negative prompt:")
    values: dict = {"prompt": prompt.strip(), "negative": negative.strip() if found else None}
    try:
        for key, name, kind in (("Steps", "steps", int), ("CFG scale", "guidance", float), ("Seed", "seed", int)):
            if key in pairs:
                values[name] = kind(pairs[key])
        if "Clip skip" in pairs:
            values["clip_skip"] = int(pairs["Clip skip"])
        if "Size" in pairs:
            values["width"], values["height"] = (int(v) for v in pairs["Size"].split("x"))
    except ValueError as e:
        raise Error(f"The picture's settings are damaged: {e}.", "Type the settings by hand.") from None
    sampler, schedule = _names(pairs.get("Sampler"), pairs.get("Schedule type"))
    values |= {"sampler": sampler, "schedule": schedule, "noise": "torch" if pairs.get("RNG") == "CPU" else "nv"}
    return Request(**values), pairs.get("Model")


def _pairs(line: str) -> dict[str, str]:
    found = re.findall(r'\s*([\w ]+):\s*("(?:\\.|[^"])*"|[^,]*)(?:,|$)', line)
    return {k.strip(): v.strip().strip('"') for k, v in found}


def _names(sampler: str | None, schedule: str | None) -> tuple[str | None, str | None]:
    """Older A1111 wrote the schedule as a suffix of the sampler: "DPM++ 2M Karras"."""
    if sampler is not None:
        for theirs in _A1111_SCHEDULES.values():
            if schedule is None and sampler.endswith(f" {theirs}"):
                sampler, schedule = sampler.removesuffix(f" {theirs}"), theirs
    samplers = {v: k for k, v in _A1111_SAMPLERS.items()}
    schedules = {v: k for k, v in _A1111_SCHEDULES.items()}
    return samplers.get(sampler), schedules.get(schedule)
