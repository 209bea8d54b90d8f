"""Textual inversions: a word's embeddings for the CLIP text encoders of a model, in the forms of A1111, diffusers and
SDXL."""

from pathlib import Path

import mlx.core as mx

from ..adapters import Taught, Word
from ..description import Description
from ..errors import Error
from . import source

_AGAIN = "Use another copy of it."
_PAIR = ("clip_l", "clip_g")  # of SDXL; SD3 has the same two first
_MOST = 75  # tokens: as many as a prompt has room for


def look(path: Path, model: Description) -> Taught | None:
    """What a file teaches, or None if it is no textual inversion. Raises if it is one that does not fit the model."""
    tensors = source.read(path).tensors
    alone = len(tensors) == 1 and not any(key.endswith(".weight") for key in tensors)  # else a layer's
    if not (alone or {*tensors} == {*_PAIR}):
        return None
    word = read(path, model)
    return Taught(word.word, len(next(iter(word.vectors.values()))))


def read(path: Path, model: Description, word: str | None = None) -> Word:
    """What a file teaches a model's text encoders. word: its name; by default the one in the file, else the file's."""
    tensors = source.read(path).tensors
    encoders = model.text.clip
    if not encoders:
        raise Error(f"{model.name} has no CLIP text encoder, which {path} would teach a word.", "Leave it out.")
    if set(tensors) & set(_PAIR):
        keys, called = _PAIR[: len(encoders)], path.stem
    elif "emb_params" in tensors or len(tensors) != 1:
        keys, called = ("emb_params",), path.stem
    else:
        (called,) = keys = tuple(tensors)
    if set(keys) != set(tensors) or len(keys) != len(encoders):
        raise Error(
            f"{path} holds {', '.join(sorted(tensors)[:4]) or 'nothing'}; {model.name} has {len(encoders)} CLIP text "
            f"encoder{'s' * (len(encoders) > 1)}.",
            "Use a textual inversion that was made for this family of models.",
        )
    pairs = zip(encoders, keys, strict=True)
    vectors = {enc: _vectors(path, tensors[key], model.components[enc].width) for enc, key in pairs}
    if len({len(v) for v in vectors.values()}) > 1:
        raise Error(f"{path} has not as many vectors for one text encoder as for the other.", _AGAIN)
    return Word(called if word is None else word, vectors)


def _vectors(path: Path, tensor: source.Tensor, width: int) -> mx.array:
    shape = tensor.shape if len(tensor.shape) == 2 else (1, *tensor.shape)
    if not tensor.floating or len(shape) != 2 or shape[1] != width or not 1 <= shape[0] <= _MOST:
        raise Error(
            f"{tensor.name!r} in {path} is {tensor.dtype} of shape {tensor.shape}; the text encoder takes rows of "
            f"{width}.",
            "Use a textual inversion that was made for this family of models.",
        )
    value = tensor.read().astype(mx.float32).reshape(shape)
    if not mx.isfinite(value).all().item():
        raise Error(f"{tensor.name!r} in {path} has numbers that are NaN or infinite.", _AGAIN)
    return value
