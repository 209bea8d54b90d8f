"""Learns a vocabulary in CLIP's format: byte pairs over lower-case words; `</w>` marks the end of a word. Any
CLIPTokenizer reads the files. Sennrich et al. 2016."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_")  # CLIP's split


def alphabet() -> list[str]:
    """One printable character for each byte, in CLIP's order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + k) for k in range(len(hidden))]


def learn(texts: Iterable[str], merges: int) -> list[tuple[str, str]]:
    """At most `merges` pairs, the most frequent first; ties go to the pair seen first. Stops when words are whole."""
    counts = Counter(word for text in texts for word in WORD.findall(text.lower()))
    words = {word: [*word[:-1], f"{word[-1]}</w>"] for word in counts if word.isascii()}
    learned = []
    while len(learned) < merges:
        pairs = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=pairs.__getitem__)
        learned.append(best)
        for parts in words.values():
            k = 0
            while k < len(parts) - 1:
                if (parts[k], parts[k + 1]) == best:
                    parts[k : k + 2] = ["".join(best)]
                k += 1
    return learned


def save(folder: Path, merges: list[tuple[str, str]], positions: int) -> None:
    """Write the four files of a Hugging Face tokenizer folder."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = alphabet()
    tokens = [*letters, *(f"{c}</w>" for c in letters), *("".join(m) for m in merges), START, END]
    vocab = {token: k for k, token in enumerate(tokens)}
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": positions,
        "do_lower_case": True,
        "add_prefix_space": False,
        **special,
    }
    files = {"vocab.json": vocab, "special_tokens_map.json": special, "tokenizer_config.json": config}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
