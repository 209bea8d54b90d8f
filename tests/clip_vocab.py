"""CLIP vocabularies made on the spot, in the published format: 256 bytes, the same ending a word, merges, begin, end.
`trained` ones are learned from text made here; `made_up` ones reach CLIP's 49408 entries without any text."""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
TEXT = """
a photo of the red fox snow house under full moon painting portrait cat's dog's we're they'll don't can't i'm I'd 've
trending artstation highly detailed 4k 8k café naïve straße Größe façade élan señor кошка дом снег 猫 雪山 写真 家
بيت قمر שלום बिल्ली 고양이 ねこ 🦊 👩‍🚀 ❤️ ... !!! ?? -- 1girl 1980s 3d &amp; <b> (masterpiece:1.2) [blurry] e.g.
"""
WORDS = TEXT.split()


def alphabet() -> list[str]:
    """The 256 characters that stand for bytes, in CLIP's order: printable ASCII first, so that "!" is id 0."""
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    printable = sorted(c for c in letters if ord(c) < 256)
    return printable + sorted(letters - set(printable))


def trained(merges: int) -> list[tuple[str, str]]:
    draw = random.Random(merges)
    text = (" ".join(draw.choices(WORDS, k=12)) for _ in range(400))
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(
        Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True
    )
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=512 + merges, initial_alphabet=alphabet(), end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(text, trainer)
    pairs = json.loads(learner.to_str())["model"]["merges"]
    return [tuple(pair) for pair in pairs][:merges]


def made_up(merges: int) -> list[tuple[str, str]]:
    """Random merges of what there is so far, most of them of letters, so that they are met in words."""
    draw = random.Random(0)
    pieces = [c for c in alphabet() if c.isalnum()]
    ends = [c + "</w>" for c in pieces]
    seen, pairs = set(pieces + ends), []
    while len(pairs) < merges:
        pair = draw.choice(pieces), draw.choice(ends if draw.random() < 0.4 else pieces)
        word = "".join(pair)
        if word not in seen and len(word) < 14:
            seen.add(word)
            pairs.append(pair)
            (ends if word.endswith("</w>") else pieces).append(word)
    return pairs


def write(folder: Path, merges: list[tuple[str, str]], **extra: dict) -> Path:
    """vocab.json and merges.txt, and each of `extra` as NAME.json beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = alphabet()
    words = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges), BOS, EOS]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    for name, content in extra.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
