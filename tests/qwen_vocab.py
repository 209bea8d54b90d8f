"""Vocabularies of Qwen's kind made on the spot, in the published format: 256 bytes, merges learned from text made here,
and the special tokens beyond them."""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from mlxdiff.tokenizers import QWEN_SPECIAL, QWEN_WORDS

from .clip_vocab import WORDS, alphabet

# The published names that a prompt may hold; the last three are not special, so that decoding keeps them.
SPECIAL = (*QWEN_SPECIAL[:3], "<|vision_start|>", *QWEN_SPECIAL[3:], "<tool_call>")
PLAIN = (*QWEN_SPECIAL[3:], "<tool_call>")
KLEIN = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
Z_IMAGE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def merges(count: int) -> list[tuple[str, str]]:
    draw = random.Random(count)
    text = (" ".join(draw.choices(WORDS, k=12)) + draw.choice(["\n", "  ", ".\n\n"]) for _ in range(400))
    learner = Tokenizer(BPE())
    learner.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=256 + count, initial_alphabet=alphabet(), show_progress=False)
    learner.train_from_iterator(text, trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:count]


def write(folder: Path, count: int = 200) -> Path:
    """vocab.json, merges.txt and tokenizer_config.json, as published. The words are 256 + count + len(SPECIAL)."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = merges(count)
    words = [*alphabet(), *("".join(pair) for pair in pairs)]
    assert len(words) == 256 + count
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, pairs), ""]), encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {len(words) + i: {"content": s, **flags, "special": s not in PLAIN} for i, s in enumerate(SPECIAL)}
    config = {
        "added_tokens_decoder": added,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 131072,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
