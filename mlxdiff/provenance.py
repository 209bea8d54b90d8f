"""`mlxdiff inspect PICTURE`: where a picture comes from. Its settings, who says that it made it, the marks it carries,
whether a signature holds, and what a JPEG copy would lose. Everything but the pixels is a claim of the file."""

import io
import json
import math
from pathlib import Path

import numpy as np

from . import foreign, images, metadata, signing
from .errors import Error
from .guides import Guide
from .metadata import Metadata

_MEANINGS = {
    metadata.DRAWN: "made by a model",
    metadata.EDITED: "a picture that a model changed",
    "compositeSynthetic": "put together, a part of it by a model",
    metadata.ENHANCED: "changed by a program",
    metadata.COMPUTED: "made by a program that learned from nothing",
    "digitalCapture": "a photograph",
}
_MAGIC = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_WEIGHTS = (".safetensors", ".gguf")  # the first begins with a number, which may look like any letters
_WORDS = 60  # characters of a prompt that are shown
_NAMES = 200  # of the networks that a picture was drawn with


def is_picture(path: Path) -> bool:
    """Whether a file begins as a picture does."""
    try:
        if path.suffix.lower() in _WEIGHTS or not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(8).startswith(_MAGIC)
    except (OSError, ValueError):
        return False


def facts(path: Path) -> dict:
    """What a picture says about itself, as JSON can hold it."""
    held, (kind, size, bands) = images.read_metadata(path, whole=True), images.form(path)
    found = {"path": str(path), "format": kind, "width": size[0], "height": size[1], "bytes": path.stat().st_size}
    try:
        request, model = images.settings_of(held, path)
    except images.NoSettings:
        found |= {"settings": None, "model": None}
    except Error as e:
        found |= {"settings": None, "model": None, "damaged": e.problem}
    else:
        found |= {"settings": json.loads(request.to_json()), "model": model}
    found |= {"program": _program(held), "source": held.source, "problems": list(held.problems)}
    found["enlarged_by"] = held.texts.get(metadata.ENLARGED, "")[: metadata.MAX_TEXT] or None
    found["credentials"] = signing.verify(path, kind) if kind in signing.MIMES else None
    found["as_jpeg"] = _as_jpeg(path, bands)
    return found


def _program(held: Metadata) -> str | None:
    """Which program says that it made the picture."""
    if metadata.REQUEST in held.texts and held.tool is None:
        return "mlxdiff"
    if held.tool is None and any(name in held.texts for name in metadata.COMFYUI):
        return "ComfyUI"
    if held.tool is None and metadata.A1111 in held.texts:
        return "A1111 or a relative of it"
    return held.tool


def _as_jpeg(path: Path, bands: str) -> dict:
    """How a JPEG of our quality would differ as most programs write it, measured on the picture."""
    image, out = images.read(path), io.BytesIO()
    if max(image.size) > images.MOST_EDGE["JPEG"]:
        return {"quality": metadata.QUALITY, "impossible": f"it has {max(image.size)} pixels along an edge"}
    image.save(out, "JPEG", quality=metadata.QUALITY)
    copy, squares, most = images.read(out), 0, 0
    for (_, strip), (_, other) in zip(images.strips(image), images.strips(copy), strict=True):
        apart = np.abs(np.asarray(strip).astype(np.int32) - np.asarray(other))
        squares, most = squares + int((apart**2).sum(dtype=np.int64)), max(most, int(apart.max()))
    mean = squares / (3 * image.width * image.height)
    return {
        "quality": metadata.QUALITY,
        "bytes": len(out.getvalue()),
        "largest_change": most,
        "decibels": None if mean == 0 else round(10 * math.log10(255**2 / mean), 1),
        "transparency": "A" in bands,
    }


def describe(found: dict) -> str:
    """The same for people: one line each."""
    lines = [f"{found['path']}: {found['format']}, {found['width']} x {found['height']}, {found['bytes']:,} bytes"]
    model = "" if found["model"] is None else f", model {found['model']}"
    lines.append(f"  program     {found['program'] or 'says nothing'}{model}")
    lines.append(f"  settings    {_settings(found)}")
    lines += _networks(found["settings"] or {})
    source = found["source"]
    meaning = f" ({_MEANINGS[source]})" if source in _MEANINGS else ""
    lines.append(f"  mark        {'none' if source is None else f'IPTC {source}{meaning}'}")
    lines += _signature(found["credentials"])
    lines.append(f"  as a JPEG   {_jpeg(found['as_jpeg'], found['credentials'])}")
    lines += [f"  damaged     {problem}" for problem in found["problems"]]
    return foreign.lines(lines)


def _settings(found: dict) -> str:
    s = found["settings"]
    if s is None:
        return found.get("damaged", "none that mlxdiff reads")
    prompt = _cut(s["prompt"], _WORDS)
    size = None if s["width"] is None else f"{s['width']} x {s['height']}"
    guidance = None if s["guidance"] is None else f"{s['guidance']:g}"
    shown = {"seed": s["seed"], "steps": s["steps"], "sampler": s["sampler"], "guidance": guidance, "size": size}
    return ", ".join([f"“{prompt}”", *(f"{k} {v}" for k, v in shown.items() if v is not None)])


def _networks(settings: dict) -> list[str]:
    """What it was drawn with beside the model, a line for each kind."""
    kinds = {"LoRA": settings.get("loras"), "words": settings.get("embeddings")}
    for kind in ("control", "reference"):
        kinds[kind] = [_guide(Guide(**held)) for held in settings.get(f"{kind}s", ())]
    kinds["enlarged by"] = [settings["upscaler"]] if settings.get("upscaler") else []
    return [f"  {kind:11} {_cut(', '.join(names), _NAMES)}" for kind, names in kinds.items() if names]


def _guide(guide: Guide) -> str:
    made = "" if guide.detect is None else f" ({guide.detect} of it)"
    steps = " to ".join(f"{share:g}" for share in guide.interval)
    part = "" if guide.interval == (0, 1) else f" from {steps} of the steps"
    return f"{guide}{made} at {guide.scale:g}{part}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _signature(held: dict | None) -> list[str]:
    if held is None:
        return ["  signature   none"]
    if held["state"] != signing.HOLDS:
        return [f"  signature   Content Credentials, {held['state']}: {held['problem']}"]
    said = ", ".join([*held["actions"], *held["sources"]])
    own = "a key that mlxdiff made on this machine: it shows that the file was not changed since, not who made it"
    by = own if held["this_machine"] else f"“{held['signer']}”, a name that nothing here vouches for"
    said = f"{held['program'] or 'no program'} says {said or 'nothing'}"
    return [f"  signature   Content Credentials hold, the file is as it was signed: {said}", f"  signed by   {by}"]


def _jpeg(held: dict, credentials: dict | None) -> str:
    if "impossible" in held:
        return f"impossible: {held['impossible']}"
    apart = "the same pixels"
    if held["decibels"] is not None:
        apart = f"pixels change by at most {held['largest_change']} of 255 ({held['decibels']} dB)"
    loses = ["transparency"] * held["transparency"] + ["signature"] * (credentials is not None)
    lost = f"; it loses its {' and '.join(loses)}" if loses else ""
    keeps = "; mark and settings stay if a program keeps XMP or EXIF"
    return f"{held['bytes']:,} bytes at quality {held['quality']}: {apart}{lost}{keeps}"
