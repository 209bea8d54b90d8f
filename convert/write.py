"""A checkpoint to a model folder that appears whole or not at all, its weights streamed tensor by tensor."""

import contextlib
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import weights
from ..description import Description
from ..errors import Error
from ..families import FAMILIES
from ..models import build
from ..recipe import DTYPES, Recipe, component_dtype
from ..recipe import recipe as checked
from . import detect, flux, rules, sd3
from . import tokenizer as copying
from .checkpoint import FULL, Checkpoint, check, open
from .source import Tensor


def convert(
    source: str | Path,
    target: str | Path,
    bits: int | str | None = None,
    dtype: str | None = None,
    prediction: str | None = None,
    tokenizer: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    parts: dict[str, str | Path] | None = None,
) -> Path:
    """What `save` does with what `open` says of a source."""
    return save(open(source, prediction, parts), target, bits, dtype, tokenizer, progress)


def save(
    checkpoint: Checkpoint,
    target: str | Path,
    bits: int | str | None = None,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write a model folder at `target`, which appears whole or not at all. The weights pass one by one.

    bits: 3, 4, 5, 6, 8, "mxfp4", "mxfp8" or "nvfp4", to quantize. dtype: float32, float16 or bfloat16; by default what
    suits this machine. tokenizer: a tokenizer folder, for a checkpoint that brings none. progress is told ("convert",
    bytes done, bytes in all)."""
    target = Path(target)
    recipe = checked(bits, dtype)
    try:
        _vacant(target)
        model = describe(checkpoint, recipe)
        words = _words(checkpoint, None if tokenizer is None else Path(tokenizer))
        with _appearing(target) as folder:
            _write(checkpoint, model, folder, words, (lambda *_: None) if progress is None else progress)
    except OSError as e:
        raise Error(f"{target} cannot be written: {e.strerror}.", "Check the free space and the permissions.") from None
    return target


def read(source: str | Path, dtype: mx.Dtype) -> dict[str, nn.Module]:
    """The networks of `source` themselves, without a converted copy: for a decoder of a few megabytes."""
    checkpoint, networks = open(source), {}
    check(checkpoint)
    for name, part in checkpoint.components.items():
        networks[name] = build.build(part.config)
        networks[name].load_weights([(key, _sound(weight, dtype)) for key, weight in part.weights.items()])
    return networks


def _whole(checkpoint: Checkpoint) -> None:
    """Raise unless a picture can be drawn with this."""
    if checkpoint.family == "taesd":
        raise Error(f"{checkpoint.path} is a TAESD, which is used as it is.", "Give it to `generate` as --taesd FILE.")
    held, lacking, row = list(checkpoint.components), checkpoint.lacking, detect.FAMILIES[checkpoint.family]
    if checkpoint.family not in FAMILIES or lacking:
        also = f", without {', '.join(lacking)}" if lacking else ""
        flags = [f"--{k.replace('_', '-')} {p.beside}" for k, p in row.parts.items() if p.component in lacking]
        if checkpoint.part_of is not None:
            fix = f"Use the model that it is a part of, {checkpoint.part_of}."
        elif len(flags) == len(lacking) > 0:
            fix = f"Pass {', '.join(flags)}, or put files of such names beside it."
        else:
            fix = FULL
        raise Error(f"{checkpoint.path} holds only {', '.join(held)}{also}.", fix)
    for name, what, takes, gives in _reads(checkpoint):
        if takes != gives:
            net = next(n for n in ("unet", "transformer") if n in held)
            raise Error(
                f"{checkpoint.path} has a {net} that takes {what} {takes} wide and {_told(checkpoint, name)} {gives}.",
                "Use a checkpoint whose networks belong together.",
            )
    variant = FAMILIES[checkpoint.family].variants.get(checkpoint.variant)
    if variant is None or not variant.converts:
        raise Error(
            f"{checkpoint.path} is of the {checkpoint.variant} variant of {checkpoint.family}, which cannot draw yet.",
            "Use a text-to-image checkpoint.",
        )


def _reads(checkpoint: Checkpoint) -> list[tuple[str, str, int, int]]:
    """What the denoiser takes from the other networks: (which, what, how wide it takes it, how wide that gives it)."""
    configs = {name: c.config for name, c in checkpoint.components.items()}
    if "transformer" in configs:
        module = {"flux": flux, "sd3": sd3}[checkpoint.family]
        return module.reads(configs["transformer"], configs)
    encoders = [c.width for name, c in configs.items() if name.startswith("text_encoder")]
    return [("text encoders", "text", configs["unet"].context, sum(encoders))]


def _told(checkpoint: Checkpoint, name: str) -> str:
    if name not in checkpoint.components:
        return f"{name} that give"
    weight = next(iter(checkpoint.components[name].weights.values()))
    return f"a {name} ({weight.pieces[0].tensor.file.name}) that gives"


def _words(checkpoint: Checkpoint, given: Path | None) -> dict[str, tuple[Path, str | None]]:
    """Where each tokenizer is taken from and, if it is another model's, what it has to fill up with."""
    words = {}
    for name, pad in detect.FAMILIES[checkpoint.family].pads.items():
        encoder = checkpoint.components.get(name.replace("tokenizer", "text_encoder"))
        if encoder is None:
            continue
        t5 = pad is None
        if name in checkpoint.tokenizers:
            words[name] = checkpoint.tokenizers[name], None
        elif given is not None:
            folder = copying.find(given, name, t5)
            words[name] = folder, None if folder == given / name else pad
        else:
            raise Error(
                f"{checkpoint.path} has no tokenizer.",
                "Pass --tokenizer with the tokenizer folder of a model in diffusers layout.",
            )
        copying.check(words[name][0], encoder.config.vocab, None if t5 else encoder.config.positions)
    return words


def describe(checkpoint: Checkpoint, recipe: Recipe) -> Description:
    """What the conversion will be a model of. Raises unless a whole model comes out, every tensor understood."""
    check(checkpoint)
    _whole(checkpoint)
    return Description(
        name=checkpoint.path.stem if checkpoint.path.is_file() else checkpoint.path.resolve().name,
        family=FAMILIES[checkpoint.family],
        variant=checkpoint.variant,
        prediction=checkpoint.prediction,
        recipe=recipe,
        schedule=checkpoint.schedule,
        zero_negative=checkpoint.zero_negative,
        components={name: c.config for name, c in checkpoint.components.items()},
    )


def _write(checkpoint: Checkpoint, model: Description, folder: Path, words: dict, progress: Callable) -> None:
    writers = []
    for name, part in checkpoint.components.items():
        kind = DTYPES[component_dtype(model.family, name, model.recipe.dtype)]
        writer = weights.Writer(folder / f"{name}.safetensors", model.family, part.config, model.recipe)
        writers.append((part, writer, kind))
    size, free = sum(w.size for _, w, _ in writers), shutil.disk_usage(folder).free
    if free < size:
        raise Error(
            f"{folder.parent} has {free / 1e9:.2f} GB free; the model needs {size / 1e9:.2f} GB.",
            "Free some space, write elsewhere, or make it smaller with -q.",
        )
    done, total = 0, sum(p.parameters * kind.size for p, _, kind in writers)
    for part, writer, kind in writers:
        with writer:
            for key, weight in part.weights.items():
                progress("convert", done, total)
                writer.put(key, _sound(weight, kind))
                done += math.prod(weight.shape) * kind.size
    progress("convert", total, total)
    for name, (place, pad) in words.items():
        if pad is None:
            copying.copy(place, folder / name)
        else:
            copying.borrow(place, folder / name, pad)
    error = {writer.path.stem: writer.error for _, writer, _ in writers if writer.error is not None}
    replace(model, tokenizers=tuple(words), error=error).write(folder)


def _sound(weight: rules.Weight, dtype: mx.Dtype) -> mx.array:
    """The weight in its place's layout and type, all of it finite."""
    return weight.fitted([_sound_tensor(p.tensor, dtype) for p in weight.pieces])


def _sound_tensor(tensor: Tensor, dtype: mx.Dtype) -> mx.array:
    stored = tensor.read()
    value = stored.astype(dtype)
    if _finite(value):
        return value
    if _finite(stored):
        raise Error(
            f"{tensor.name!r} in {tensor.file} has numbers too large for {str(dtype)[9:]}.",
            "Pass --dtype bfloat16 or float32.",
        )
    raise Error(
        f"{tensor.name!r} in {tensor.file} has numbers that are NaN or infinite.",
        "Use another copy of this checkpoint.",
    )


# type -> its bits as integers, and the least of them, sign aside, that is no number. Ten times faster than isfinite.
_INFINITE = {
    mx.float32: (mx.uint32, 0x7F800000),
    mx.float16: (mx.uint16, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7F80),
}


def _finite(x: mx.array) -> bool:
    kind, least = _INFINITE[x.dtype]
    bits = np.array(x.view(kind), copy=False)
    return (bits & (2 ** (8 * kind.size - 1) - 1)).max(initial=0) < least


def _vacant(target: Path) -> None:
    """What is overwritten: nothing, an empty folder, or a model folder."""
    if target.is_dir():
        if any(target.iterdir()) and not (target / "model.json").is_file():
            raise Error(f"{target} is a folder of something else.", "Give a new folder, or an older model folder.")
    elif os.path.lexists(target):
        raise Error(f"{target} exists and is no folder.", "Give a new folder.")


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder that gets the target's name once all is in it, on disk too; an older model folder of that name goes.
    Left early, for whatever reason, it leaves nothing."""
    made = target.absolute().parent / f".{target.name}-{secrets.token_hex(4)}.part"
    old, fresh = made.with_suffix(".old"), [p for p in made.parents if not p.exists()]
    try:
        made.mkdir(parents=True)
        yield made
        _sync(made)
        if target.is_dir():
            os.rename(target, old)
        os.rename(made, target)
        _sync(target.absolute().parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        with contextlib.suppress(OSError):
            if old.exists() and not target.exists():
                os.rename(old, target)
            shutil.rmtree(made, ignore_errors=True)
            for folder in fresh:
                folder.rmdir()
        raise


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
