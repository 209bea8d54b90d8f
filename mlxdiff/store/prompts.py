"""What text encoders made of prompts, kept in the cache, so that a prompt that was drawn before loads no encoder. A
file is named after a hash of all that its numbers depend on. It holds no text; but who can read it can try out which
prompt it belongs to, so only its owner may."""

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from .. import __version__, foreign
from ..conditioning import Text
from ..description import Description
from ..families.base import tokenizer_of
from ..request import Request
from . import cache

if TYPE_CHECKING:
    from ..pipeline import Pipeline

MOST = 512 * 2**20  # bytes of all files; FLUX has 4.2 MB for a prompt
WORTH = 64 * 2**20  # bytes of encoders that are read quickly enough without this


def read(pipe: "Pipeline", prompts: list[str], request: Request, t5: bool, files: tuple) -> list[Text]:
    """Encode prompts, or take what was kept of them. files: LoRAs and taught words, with their fingerprints."""
    identity = _identity(pipe, [prompts, request.clip_skip, t5, files], t5) if pipe.keeps_prompts else None
    if identity is None:
        return pipe.read(prompts, request, t5)
    file = folder() / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:40]}.safetensors"
    texts = _kept(file, len(prompts), *_widths(pipe.description))
    if texts is None:
        texts = pipe.read(prompts, request, t5)
        with suppress(OSError, RuntimeError):  # a full disk, or a cache that may not be written, stops no picture
            _keep(file, texts)
    return texts


def folder() -> Path:
    return cache.root() / "prompts"


def held() -> tuple[int, int]:
    """How many files there are, and their bytes."""
    sizes = [file.lstat().st_size for file in _files()]
    return len(sizes), sum(sizes)


def clear() -> None:
    for file in _files():
        with cache.writing(file):
            file.unlink(missing_ok=True)


def _identity(pipe: "Pipeline", words: list, t5: bool) -> list | None:
    """All that the result depends on; None if it is not worth keeping, or not known."""
    model = pipe.description
    names = [name for name, network in model.text.encoders.items() if t5 or network != "t5"]
    if pipe.networks.trains(*names) or any(f"{name}.safetensors" not in model.seal for name in names):
        return None
    encoders = {name: model.seal[f"{name}.safetensors"] for name in names}
    if sum(mark.size for mark in encoders.values()) < WORTH:
        return None
    tokenizers = tuple(f"{tokenizer_of(name)}/" for name in names)
    marks = {name: mark for name, mark in model.seal.items() if name.startswith(tokenizers)} | encoders
    machine = [__version__, mx.__version__, str(mx.default_device())]
    return [machine, model.family.name, model.variant, str(model.recipe), sorted(marks.items()), words]


def _widths(model: Description) -> tuple[int, int]:
    """Of a text, and of its pooled vector: 0 if it has none."""
    pooled = (model.components[name] for name in model.text.pooled)
    return model.net.context, sum(c.width if c.projection is None else c.projection for c in pooled)


def _kept(file: Path, count: int, width: int, pooled: int) -> list[Text] | None:
    """What was kept, checked; None if there is nothing, or nothing sound."""
    try:
        foreign.check_regular(file)
        arrays = mx.load(str(file))
        texts = [Text(arrays.pop(f"{i}.context"), arrays.pop(f"{i}.pooled", None)) for i in range(count)]
        every = [array for text in texts for array in text if array is not None]
        sound = not arrays and all(t.context.shape[::2] == (1, width) and t.context.ndim == 3 for t in texts)
        vector = (1, pooled) if pooled else ()
        sound = sound and all(vector == (() if t.pooled is None else t.pooled.shape) for t in texts)
        if not (sound and all(mx.issubdtype(a.dtype, mx.floating) and mx.isfinite(a).all().item() for a in every)):
            return None
    except (KeyError, OSError, RuntimeError, ValueError):
        return None
    with suppress(OSError):  # a cache that may only be read
        os.utime(file)  # the oldest leave first
    return texts


def _keep(file: Path, texts: list[Text]) -> None:
    arrays = {}
    for i, text in enumerate(texts):
        arrays |= {f"{i}.{name}": array for name, array in text._asdict().items() if array is not None}
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=".", suffix=".safetensors", dir=file.parent)  # for its owner alone
    os.close(handle)
    try:
        mx.save_safetensors(part, arrays)
        os.replace(part, file)
    finally:
        Path(part).unlink(missing_ok=True)
    left = MOST
    for other in sorted(_files(), key=lambda f: f.stat().st_mtime, reverse=True):
        left -= other.stat().st_size
        if left < 0 and other != file:
            other.unlink(missing_ok=True)


def _files() -> list[Path]:
    """Those that this module made, whole or not."""
    return [file for file in folder().glob("*.safetensors") if file.is_file() and not file.is_symlink()]
