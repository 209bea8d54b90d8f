"""Tokenizers are copied as they are; a single-file checkpoint has none and borrows one of the same vocabulary."""

import json
import shutil
from pathlib import Path

from ..errors import Error
from .source import read_json

_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json")
_MAP = "special_tokens_map.json"


def find(given: Path, name: str) -> Path:
    """Of a folder the user named: the tokenizer's own folder inside it, else the first tokenizer's, else it itself."""
    return next((f for f in (given / name, given / "tokenizer") if f.is_dir()), given)


def check(folder: Path, vocab: int) -> None:
    """That there is one, and that the text encoder knows all its words."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        words = read_json(folder / "vocab.json")
    elif (folder / "tokenizer.json").is_file():
        model = read_json(folder / "tokenizer.json").get("model")
        words = model.get("vocab") if isinstance(model, dict) else None
    else:
        raise Error(
            f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt.",
            "Pass --tokenizer with the tokenizer folder of a model in diffusers layout.",
        )
    if not isinstance(words, dict) or not all(type(i) is int for i in words.values()):
        raise Error(f"The vocabulary in {folder} is malformed.", "Fetch the tokenizer again.")
    if max(words.values(), default=0) >= vocab:
        raise Error(
            f"The tokenizer in {folder} has {len(words)} words; the text encoder knows {vocab}.",
            "Pass the tokenizer of this model with --tokenizer.",
        )


def copy(folder: Path, target: Path) -> None:
    target.mkdir()
    for name in (*_FILES, _MAP):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def borrow(folder: Path, target: Path, pad: str) -> None:
    """A copy that fills up with `pad`, as this family was trained, whatever model the tokenizer is from."""
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
