"""A checkpoint to a model folder, which appears whole or not at all. Weights are read and written tensor by tensor."""

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

from .. import adapters, weights
from ..adapters import Adapter
from ..description import Description
from ..errors import Error
from ..families import FAMILIES, MODELS
from ..families.base import tokenizer_of
from ..models import build
from ..recipe import DTYPES, Recipe, component_dtype
from ..recipe import recipe as checked
from . import lora, rules
from . import tokenizer as copying
from .checkpoint import FULL, Checkpoint, check, open
from .clip import PADS
from .parts import KINDS
from .registry import MODULES
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
    """`open` a source and `save` it."""
    return save(open(source, prediction, parts), target, bits, dtype, tokenizer, progress)


def save(
    checkpoint: Checkpoint,
    target: str | Path,
    bits: int | str | None = None,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    loras: list[tuple[str | Path, float]] | None = None,
    text_bits: int | str | None = None,
) -> Path:
    """Write a model folder at `target`, which appears whole or not at all.

    bits: 3, 4, 5, 6, 8, "mxfp4", "mxfp8" or "nvfp4", to quantize. dtype: float32, float16 or bfloat16; by default what
    suits this machine. tokenizer: a tokenizer folder, for a checkpoint that has none. progress is called with
    ("convert", bytes done, bytes in all). loras: LoRA files and their scales, which change the weights before they are
    quantized. text_bits: of T5 and Qwen3, or 16 for all; by default `bits`, or 8 on a GPU with less than 32 GB."""
    target = Path(target)
    recipe = checked(bits, dtype, FAMILIES.get(checkpoint.family), text_bits)
    try:
        _vacant(target)
        model = describe(checkpoint, recipe)
        tokenizers = _tokenizers(checkpoint, None if tokenizer is None else Path(tokenizer))
        changes = [(lora.read(Path(path), model), scale) for path, scale in loras or ()]
        model = model.widened() if any(adapter.inputs for adapter, _ in changes) else model
        with _appearing(target) as folder:
            _write(checkpoint, model, folder, tokenizers, (lambda *_: None) if progress is None else progress, changes)
    except OSError as e:
        raise Error(f"{target} cannot be written: {e.strerror}.", "Check the free space and the permissions.") from None
    return target


def read(source: str | Path, dtype: mx.Dtype, layout: str | None = None) -> dict[str, nn.Module]:
    """The networks of `source`, without a converted copy: for those that are small, or needed once for a picture.
    layout: see `open`."""
    checkpoint, networks = open(source, layout=layout), {}
    check(checkpoint)
    for name, part in checkpoint.components.items():
        networks[name] = build.build(part.config)
        networks[name].load_weights([(key, _sound(weight, dtype)) for key, weight in part.weights.items()])
    return networks


def _whole(checkpoint: Checkpoint) -> None:
    """Raise unless a picture can be drawn with this."""
    title, use = checkpoint.layout.title, checkpoint.layout.use
    if use:
        raise Error(f"{checkpoint.path} is {title}, which is no model by itself.", use)
    held, lacking = list(checkpoint.components), checkpoint.lacking
    if checkpoint.family not in FAMILIES or lacking:
        also = f", without {', '.join(lacking)}" if lacking else ""
        parts = [f"`{n}={p.beside}`" for n, p in checkpoint.layout.parts.items() if p.component in lacking]
        if checkpoint.part_of is not None:
            fix = f"Use the model that it is a part of, {checkpoint.part_of}."
        elif len(parts) == len(lacking) > 0:
            fix = f"Give {', '.join(parts)}, or put files of such names beside it.{_published(checkpoint)}"
        else:
            part = next((part for part in reversed(KINDS) if checkpoint.family in KINDS[part]), None)
            fix = FULL if part is None else f"Name the model that it is a part of, and give this one as `{part}=FILE`."
        raise Error(f"{checkpoint.path} holds only {', '.join(held)}{also}.", fix)
    family, configs = FAMILIES[checkpoint.family], {name: c.config for name, c in checkpoint.components.items()}
    for name, what, takes, gives in MODULES[family.network].reads(configs[family.denoiser], configs):
        if takes != gives:
            raise Error(
                f"{checkpoint.path} has a {family.denoiser} that takes {what} {takes} wide and "
                f"{_giver(checkpoint, name)} {gives}.",
                "Use a checkpoint whose networks belong together.",
            )
    variant = family.variants.get(checkpoint.variant)
    if variant is None or not variant.converts:
        raise Error(
            f"{checkpoint.path} is of the {checkpoint.variant} variant of {checkpoint.family}, which cannot draw yet.",
            "Use a text-to-image checkpoint.",
        )


def _published(checkpoint: Checkpoint) -> str:
    """A sentence about who publishes what a checkpoint lacks, and how large that is; empty if it is not known."""
    denoiser = checkpoint.components.get(checkpoint.layout.family.denoiser)
    for model in MODELS.values():
        if model.parts and denoiser is not None and model.networks[model.family.denoiser] == denoiser.config:
            sizes = [f"{name} ({model.parts[name]:.1f} GB)" for name in checkpoint.lacking if name in model.parts]
            return f" {model.repo} has {' and '.join(sizes)}."
    return ""


def _giver(checkpoint: Checkpoint, name: str) -> str:
    """A network and the file it is from, for a sentence that goes on with the width that it gives."""
    if name not in checkpoint.components:
        return f"{name} that give"
    weight = next(iter(checkpoint.components[name].weights.values()))
    return f"a {name} ({weight.pieces[0].tensor.file.name}) that gives"


def _tokenizers(checkpoint: Checkpoint, given: Path | None) -> dict[str, tuple[Path, str | None]]:
    """The folder that each tokenizer is copied from and, if it is another model's, the token that fills a text up."""
    tokenizers, layout = {}, checkpoint.layout
    for encoder in (e for e in layout.encoders if e in checkpoint.components):
        name, kind = tokenizer_of(encoder), layout.networks[encoder]
        if name in checkpoint.tokenizers:
            tokenizers[name] = checkpoint.tokenizers[name], None
        elif given is not None:
            folder = copying.find(given, name, kind)
            borrowed = kind == "clip" and folder != given / name
            tokenizers[name] = folder, PADS[layout.published[encoder].act] if borrowed else None
        else:
            raise Error(
                f"{checkpoint.path} has no tokenizer.",
                "Give `tokenizer=DIR`, the tokenizer folder of a model in diffusers layout.",
            )
        copying.check(tokenizers[name][0], checkpoint.components[encoder].config)
    return tokenizers


def describe(checkpoint: Checkpoint, recipe: Recipe) -> Description:
    """The model that a conversion gives. Raises unless that is a whole model and every tensor is understood."""
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


def _write(
    checkpoint: Checkpoint,
    model: Description,
    folder: Path,
    tokenizers: dict,
    progress: Callable,
    changes: list[tuple[Adapter, float]],
) -> None:
    writers = []
    for name, part in checkpoint.components.items():
        kind = DTYPES[component_dtype(model.family, name, model.recipe.dtype)]
        # What a LoRA changes has other numbers than the file.
        stored = {} if changes else {key: weight.bits for key, weight in part.weights.items()}
        writer = weights.Writer(
            folder / f"{name}.safetensors", model.family, model.components[name], model.recipe, stored
        )
        writers.append((part, writer, kind))
    size, free = sum(w.size for _, w, _ in writers), shutil.disk_usage(folder).free
    if free < size:
        raise Error(
            f"{folder.parent} has {free / 1e9:.2f} GB free; the model needs {size / 1e9:.2f} GB.",
            "Free some space, write elsewhere, or make it smaller: `bits=4`.",
        )
    done, total = 0, sum(p.parameters * kind.size for p, _, kind in writers)
    for part, writer, kind in writers:
        name = writer.path.stem
        with writer:
            for key, weight in part.weights.items():
                progress("convert", done, total)
                value = adapters.changed(_sound(weight, kind), name, key, changes)
                bits = writer.as_stored.get(key)
                writer.put(key, value, None if bits is None else _steps(weight, bits, kind))
                done += math.prod(weight.shape) * kind.size
    progress("convert", total, total)
    for name, (place, pad) in tokenizers.items():
        if pad is None:
            copying.copy(place, folder / name)
        else:
            copying.borrow(place, folder / name, pad)
    error = {writer.path.stem: writer.error for _, writer, _ in writers if writer.error is not None}
    made = replace(model, tokenizers=tuple(tokenizers), error=error)
    made.write(folder, lambda done, total: progress("check", done, total))


def _sound(weight: rules.Weight, dtype: mx.Dtype) -> mx.array:
    """A parameter in the given type. Raises if a number of it is not finite."""
    return weight.fitted([_sound_tensor(p.tensor, dtype) for p in weight.pieces])


def _steps(weight: rules.Weight, bits: int, dtype: mx.Dtype) -> tuple[mx.array, ...]:
    """A quantized parameter as it is stored, with scales in the given type."""
    packed, *scales = weight.steps(bits)
    rounded = [x.astype(dtype) for x in scales]
    if not all(map(_finite, rounded)):  # the lowest number that a group could hold, which may not occur
        raise _too_large(weight.pieces[0].tensor, dtype)
    return packed, *rounded


def _sound_tensor(tensor: Tensor, dtype: mx.Dtype) -> mx.array:
    stored = tensor.read()
    value = stored.astype(dtype)
    if _finite(value):
        return value
    if _finite(stored):
        raise _too_large(tensor, dtype)
    raise Error(
        f"{tensor.name!r} in {tensor.file} has numbers that are NaN or infinite.",
        "Use another copy of this checkpoint.",
    )


def _too_large(tensor: Tensor, dtype: mx.Dtype) -> Error:
    problem = f"{tensor.name!r} in {tensor.file} has numbers too large for {str(dtype)[9:]}."
    return Error(problem, 'Use `dtype="bfloat16"` or float32.')


# type -> its bits as integers, and the lowest, without the sign, that is not finite. Ten times faster than isfinite.
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
    """Raise unless the target is absent, an empty folder or a model folder: only these are overwritten."""
    if target.is_dir():
        if any(target.iterdir()) and not (target / "model.json").is_file():
            raise Error(f"{target} is a folder of something else.", "Give a new folder, or an older model folder.")
    elif os.path.lexists(target):
        raise Error(f"{target} exists and is no folder.", "Give a new folder.")


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder that takes the target's name, and the place of an older model folder, once all of it is on disk. After
    an error or an interrupt, nothing of it stays."""
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
