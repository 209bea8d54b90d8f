"""Tokenizers are copied as they are. A single-file checkpoint has none and borrows one with the same vocabulary."""

import json
import shutil
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from .. import foreign
from ..errors import Error
from ..models.build import Config, name_of
from ..tokenizers import LOAD
from .source import read_json

_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "spiece.model", "tokenizer_config.json", "added_tokens.json")
_MAP = "special_tokens_map.json"


def find(given: Path, name: str, kind: str) -> Path:
    """In the folder that a user gives: the folder of this name, else one of the same kind, else the given one."""
    folders = [given / name, *(given / t for t in ("tokenizer", "tokenizer_2", "tokenizer_3"))]
    return next((f for f in folders if f.is_dir() and _kind(f) == kind), given)


def _kind(folder: Path) -> str:
    """The network that a folder's tokenizer is for. Only CLIP's byte-level BPE marks the end of a word."""
    if (folder / "spiece.model").is_file():
        return "t5"
    words = read_json(folder / "vocab.json") if (folder / "vocab.json").is_file() else _vocab(folder)
    if isinstance(words, list):
        return "t5"
    return "qwen3" if words and not any(str(word).endswith("</w>") for word in words) else "clip"


def _vocab(folder: Path) -> object:
    """The vocabulary in tokenizer.json: CLIP's and Qwen's are {word: id}, T5's is [[word, score], ...]."""
    model = read_json(folder / "tokenizer.json").get("model") if (folder / "tokenizer.json").is_file() else None
    return model.get("vocab") if isinstance(model, dict) else None


def check(folder: Path, encoder: Config) -> None:
    """Raise unless the folder holds a tokenizer that works, and the text encoder knows all its words and, if it is
    CLIP's, all its positions."""
    kind = name_of(encoder)
    _check_words(folder, _t5_words(folder) if kind == "t5" else _bpe_words(folder), encoder.vocab)
    tokenizer = LOAD[kind](folder)
    if kind == "t5":
        return
    added = tokenizer.backend.get_vocab(with_added_tokens=True)  # may lie past the vocabulary
    _check_words(folder, 1 + max(added.values()), encoder.vocab)
    if kind == "clip" and not 2 < tokenizer.length <= encoder.positions:
        raise Error(
            f"The tokenizer in {folder} makes chunks of {tokenizer.length} tokens; the text encoder knows "
            f"{encoder.positions} positions.",
            "Give the tokenizer of this model: `tokenizer=DIR`.",
        )


def _check_words(folder: Path, count: int, vocab: int) -> None:
    if count > vocab:
        raise Error(
            f"The tokenizer in {folder} has {count} words; the text encoder knows {vocab}.",
            "Give the tokenizer of this model: `tokenizer=DIR`.",
        )


def _bpe_words(folder: Path) -> int:
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        words = read_json(folder / "vocab.json")
    elif (folder / "tokenizer.json").is_file() and not isinstance(_vocab(folder), list):
        words = _vocab(folder)
    else:
        raise Error(
            f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt.",
            "Give `tokenizer=DIR`, the tokenizer folder of a model in diffusers layout.",
        )
    if not isinstance(words, dict) or not all(type(i) is int for i in words.values()):
        raise Error(f"The vocabulary in {folder} is malformed.", "Fetch the tokenizer again.")
    return 1 + max(words.values(), default=-1)


def _t5_words(folder: Path) -> int:
    words = _vocab(folder)
    if isinstance(words, list):
        added = read_json(folder / "tokenizer.json").get("added_tokens", [])
        ids = [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        return max([len(words), *(i + 1 for i in ids if type(i) is int)])
    if not (folder / "spiece.model").is_file():
        raise Error(
            f"{folder} holds no tokenizer of T5: neither spiece.model nor a tokenizer.json of its kind.",
            "Give `tokenizer=DIR`, the folder of a whole model in diffusers layout, which holds one for each encoder.",
        )
    try:
        return SentencePieceProcessor(
            model_proto=foreign.read(folder / "spiece.model", "Fetch the tokenizer again.")
        ).get_piece_size()
    except (OSError, RuntimeError):
        raise Error(f"{folder / 'spiece.model'} is damaged.", "Fetch the tokenizer again.") from None


def _check_link(file: Path) -> None:
    """Raise for a link that leads out of the checkpoint: a copy of any file on this machine would be kept. The links
    in the hub's cache lead to its blobs."""
    real, around = file.resolve(), file.parent.resolve()
    around = around.parent if (around.parent / "model_index.json").is_file() else around
    blob = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    if not blob and not real.is_relative_to(around):
        raise Error(f"{file} is a link that leads out of its folder, to {real}.", "Put the file itself there.")


def copy(folder: Path, target: Path) -> None:
    target.mkdir()
    for name in (*_FILES, _MAP):
        if (folder / name).is_file():
            _check_link(folder / name)
            shutil.copyfile(folder / name, target / name)


def borrow(folder: Path, target: Path, pad: str) -> None:
    """A copy that fills texts up with `pad`, as in this family's training, whatever model the tokenizer is from."""
    copy(folder, target)
    settings = {}
    for name in ("tokenizer_config.json", _MAP):
        if (target / name).is_file():
            settings |= read_json(target / name)
    (target / _MAP).unlink(missing_ok=True)
    known = (target / "vocab.json").is_file() and pad in read_json(target / "vocab.json")
    known = known or (
        (target / "tokenizer.json").is_file() and pad in read_json(target / "tokenizer.json")["model"]["vocab"]
    )
    if known:
        settings["pad_token"] = pad
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
