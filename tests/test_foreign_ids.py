"""Token ids that a text encoder does not have: MLX checks no bounds, so they must never reach an embedding. Reference:
the built-in model with its tokenizer changed, which draws as it is."""

import json
import shutil
from pathlib import Path

import pytest

import mlxdiff
from mlxdiff import builtin, convert
from mlxdiff.errors import Error
from tests.checkpoints import seal_again

EXTRA = {"content": "dragon", "special": False, "lstrip": False, "rstrip": False, "single_word": False}


def add_token(tokenizer: Path) -> None:
    """A token past the vocabulary, as `added_tokens_decoder` may state it."""
    file = tokenizer / "tokenizer_config.json"
    words = json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))
    settings = json.loads(file.read_text(encoding="utf-8"))
    kept = {str(words[w]): {"content": w, "special": True} for w in ("<|startoftext|>", "<|endoftext|>")}
    file.write_text(json.dumps(settings | {"added_tokens_decoder": kept | {str(len(words)): EXTRA}}), encoding="utf-8")


def raise_id(tokenizer: Path) -> None:
    """A word of the vocabulary whose id the embedding does not have."""
    file = tokenizer / "vocab.json"
    words = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(words | {"red</w>": 10**6}), encoding="utf-8")


def lengthen(tokenizer: Path) -> None:
    """Chunks longer than the encoder has positions for."""
    file = tokenizer / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(settings | {"model_max_length": 400}), encoding="utf-8")


DAMAGE = [add_token, raise_id, lengthen]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_is_not_converted(tmp_path, damage):
    shutil.copytree(builtin.FOLDER, tmp_path / "model")
    damage(tmp_path / "model" / "tokenizer")
    with pytest.raises(Error, match=r"The tokenizer in .* the text encoder knows"):
        convert.convert(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_converted_folder_does_not_draw(tmp_path, damage):
    convert.convert(builtin.FOLDER, tmp_path / "model", dtype="float32")
    prompt = {"prompt": "a red dragon", "steps": 1, "width": 64, "height": 64}
    mlxdiff.load(tmp_path / "model")(**prompt)
    damage(tmp_path / "model" / "tokenizer")
    with pytest.raises(Error, match="is not as the conversion wrote it"):
        mlxdiff.load(tmp_path / "model")
    seal_again(tmp_path / "model")  # who changes a folder on purpose can do that
    with pytest.raises(Error, match="The tokenizer does not belong to this model"):
        mlxdiff.load(tmp_path / "model")(**prompt)
