"""CLIP's and Qwen's byte-level BPE, T5's sentencepiece, weights in the prompt and long prompts. A short prompt without
weights gives exactly the padded ids of transformers' CLIPTokenizer (5.x: NFC, white space to one space, lower case; no
ftfy, no accent stripping), T5Tokenizer and Qwen2Tokenizer. Nothing is ever truncated: a prompt longer than one context
of CLIP becomes several chunks of length - 2 tokens; T5 and Qwen have no maximum length. Qwen is a language model and
reads the prompt as it is written: brackets and BREAK are text, and a weight with a number is refused."""

import base64
import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from . import foreign
from .errors import Error
from .foreign import fits

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
ROLES = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}  # with CLIPTokenizer's defaults
WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
_LONGEST = 100  # characters of a taught word
LENGTH = 77  # if tokenizer_config.json names no length; a length that was never set is stored as about 1e30
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")  # padding, and what templates use
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
T5_SPECIAL = re.compile(r"(<pad>|</s>|<unk>|<extra_id_\d\d?>)")

EMPHASIS = {"(": 1.1, "[": 1 / 1.1}
PARTNER = {")": "(", "]": "["}
MARKS = re.compile(r"(\\[()\[\]]|[()\[\]]|:\s*[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*\)|\bBREAK\b)")


class Chunk(NamedTuple):
    """One context of a text encoder. CLIP: begin, up to length - 2 tokens, end, padding. T5: the same without begin.
    Qwen: the prompt in its template, padding."""

    ids: list[int]
    weights: list[float]  # 1 for begin, end and padding
    visible: int | None = None  # how many ids the encoder sees; None: all, also padding


@dataclass(frozen=True)
class ClipTokenizer:
    backend: Tokenizer
    bos: int
    eos: int
    pad: int
    length: int
    taught: dict[int, list[int]] = field(default_factory=dict)  # a taught word's id in the backend -> its tokens

    def ids(self, text: str) -> list[int]:
        """The tokens of the text, without begin, end and padding. A special token written in the text is that token."""
        ids = self.backend.encode(_valid(text), add_special_tokens=False).ids
        return [token for i in ids for token in self.taught.get(i, (i,))]

    def teach(self, word: str, tokens: list[int]) -> None:
        """Read a word as these tokens from now on."""
        fix = "Give it a word without spaces that is not known yet: `embeddings=[FILE=WORD]`."
        if not word.isprintable() or not 1 <= len(word) <= _LONGEST or any(c.isspace() for c in word):
            raise Error(f"A word that is taught cannot be {word!r:.60}.", fix)
        if any(self.backend.token_to_id(known) is not None for known in (word, f"{word}</w>")):
            raise Error(f"The tokenizer knows the word {word!r} already.", fix)
        self.backend.add_tokens([AddedToken(word, normalized=True)])
        self.taught[self.backend.token_to_id(word)] = tokens

    def encode(self, prompt: str, weighted: bool = True) -> list[Chunk]:
        """At least one chunk, so `encode("")` is the empty one. `weighted=False` takes brackets and BREAK literally."""
        runs = [[]]  # of (id, weight); BREAK begins a new one
        for text, weight in parse_weights(prompt) if weighted else [(prompt, 1.0)]:
            if weight is None:
                runs.append([])
            else:
                runs[-1] += [(i, weight) for i in self.ids(text)]
        room = self.length - 2
        pieces = [run[k : k + room] for run in runs for k in range(0, len(run), room)]
        return [self._chunk(piece) for piece in pieces or [[]]]

    def _chunk(self, piece: list[tuple[int, float]]) -> Chunk:
        rest = self.length - 2 - len(piece)
        ids, weights = [i for i, _ in piece], [w for _, w in piece]
        return Chunk([self.bos, *ids, self.eos] + [self.pad] * rest, [1.0, *weights] + [1.0] * (rest + 1))


@dataclass(frozen=True)
class T5Tokenizer:
    pieces: Callable[[str], list[int]]
    eos: int
    pad: int

    def ids(self, text: str) -> list[int]:
        """The tokens of the text, without end and padding."""
        return self.pieces(_valid(text))

    def encode(self, prompt: str, length: int) -> Chunk:
        """The prompt padded to `length`; a longer prompt is not cut. BREAK is ignored: T5 has no chunks."""
        pairs = [(i, w) for text, w in parse_weights(prompt) if w is not None for i in self.ids(text)]
        rest = max(0, length - 1 - len(pairs))
        ids, weights = [i for i, _ in pairs], [w for _, w in pairs]
        return Chunk([*ids, self.eos] + [self.pad] * rest, weights + [1.0] * (rest + 1))


@dataclass(frozen=True)
class QwenTokenizer:
    backend: Tokenizer
    pad: int

    def ids(self, text: str) -> list[int]:
        """The tokens of the text. A special token written in the text is that token, as in transformers."""
        return self.backend.encode(_valid(text), add_special_tokens=False).ids

    def encode(self, prompt: str, around: tuple[str, str], length: int) -> Chunk:
        """The prompt, with the texts before and after it, padded to `length`; a longer prompt is not cut."""
        before, after = around
        ids = self.ids(before + unweighted(prompt) + after)
        padded = ids + [self.pad] * (length - len(ids))
        return Chunk(padded, [1.0] * len(padded), len(ids))


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise Error(
            f"The prompt is not valid Unicode at character {e.start} ({text[e.start]!r}).", "Give it as UTF-8 text."
        ) from None
    return text


def parse_weights(prompt: str) -> list[tuple[str, float | None]]:
    """Split a prompt into [(text, weight)]; ("BREAK", None) is where a new chunk begins.

    `(text)` weighs 1.1, `[text]` 1/1.1, `(text:1.3)` 1.3; nested weights multiply; `\\(`, `\\)`, `\\[`, `\\]` are plain
    brackets. A bracket without a partner, and a `:number` that closes no bracket or is not finite, are text."""
    parts = MARKS.split(prompt)  # text, mark, text, mark, ..., text
    factors, closers = _pairs(parts)
    weights, pieces = [1.0], []
    for i, part in enumerate(parts):
        if i in factors:
            weights.append(weights[-1] * factors[i])
        elif i in closers:
            weights.pop()
        elif i % 2 and part == "BREAK":
            pieces.append((None, part))
        elif part:
            pieces.append((weights[-1], part[1:] if i % 2 and part[0] == "\\" else part))
    runs = groupby(pieces, key=lambda piece: piece[0])
    return [("BREAK" if weight is None else "".join(text for _, text in run), weight) for weight, run in runs]


def unweighted(prompt: str) -> str:
    """The prompt as a text encoder without weights reads it. `\\(`, `\\)`, `\\[`, `\\]` are plain brackets here too.
    Raises for a weight: the encoder would read its number as text."""
    parts = MARKS.split(prompt)
    closers = _pairs(parts)[1]
    weight = next((parts[i] for i in sorted(closers) if parts[i][0] == ":"), None)
    if weight is not None:
        raise Error(
            f"This model's text encoder knows no weights, and the prompt has one: {weight!r}.",
            r"Say it in words, or write \( and \) for brackets that are text.",
        )
    return "".join(part[1:] if i % 2 and part[0] == "\\" else part for i, part in enumerate(parts))


def _pairs(parts: list[str]) -> tuple[dict[int, float], set[int]]:
    """Where brackets open, with their factors, and where they close. If pairs cross, as in `([)]`, the first one
    counts."""
    factors, closers, opened = {}, set(), {"(": [], "[": []}
    for i in range(1, len(parts), 2):
        mark = parts[i]
        if mark in EMPHASIS:
            opened[mark].append(i)
        elif mark[0] in ":)]":
            kind = PARTNER[mark[-1]]
            factor = float(mark[1:-1]) if mark[0] == ":" else EMPHASIS[kind]
            if opened[kind] and math.isfinite(factor):
                j = opened[kind].pop()
                factors[j] = factor
                closers.add(i)
                for others in opened.values():
                    while others and others[-1] > j:
                        others.pop()
    return factors, closers


def load(folder: str | Path) -> ClipTokenizer:
    """Read tokenizer.json, else vocab.json and merges.txt. Special tokens and length come from the two files beside
    them."""
    folder = Path(folder)
    vocab, merges, added = _vocabulary(folder)
    try:
        roles, tokens, length = _special(folder, vocab, added)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise Error(f"The special tokens in {folder} are malformed ({e!r}).", "Fetch the tokenizer again.") from None

    backend = Tokenizer(BPE(vocab, merges, end_of_word_suffix="</w>", unk_token=roles["unk_token"]))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.add_tokens(list(tokens.values()))
    bos, eos, pad = (backend.token_to_id(roles[role]) for role in ("bos_token", "eos_token", "pad_token"))
    return ClipTokenizer(backend, bos, eos, pad, length)


def load_t5(folder: str | Path) -> T5Tokenizer:
    """Read tokenizer.json, else spiece.model."""
    fast, model = Path(folder) / "tokenizer.json", Path(folder) / "spiece.model"
    again = "Give the tokenizer folder of a T5 text encoder."
    if not fast.is_file() and not model.is_file():
        raise Error(f"{folder} holds no tokenizer: neither tokenizer.json nor spiece.model.", again)
    try:
        if fast.is_file():
            _check_steps(fast)
            backend = _unpanicked(Tokenizer.from_str, _text(fast))
            backend.no_padding()  # the file may store padding and truncation from its last use
            backend.no_truncation()
            eos, pad = (backend.token_to_id(token) for token in ("</s>", "<pad>"))
            pieces = lambda text: _unpanicked(backend.encode, text, add_special_tokens=False).ids  # noqa: E731
        else:
            from sentencepiece import SentencePieceProcessor  # slow to import (0.05 s), and most models have no T5

            spm = SentencePieceProcessor(model_proto=foreign.read(model, again))
            eos, pad = spm.eos_id(), spm.pad_id()
            special = {spm.id_to_piece(i): i for i in (pad, eos, spm.unk_id()) if i >= 0}
            special |= {f"<extra_id_{i}>": len(spm) + 99 - i for i in range(100)}  # T5 adds these after the file's

            def pieces(text: str) -> list[int]:
                parts = T5_SPECIAL.split(text)
                return [i for p in parts for i in ([special[p]] if p in special else spm.encode(p))]

    except Error:
        raise
    except Exception as e:  # for damaged files, both libraries raise no narrower type
        raise Error(f"The tokenizer in {folder} cannot be read: {e}.", again) from None
    if eos is None or pad is None or min(eos, pad) < 0:
        raise Error(f"The tokenizer in {folder} has no </s> or no <pad>.", again)
    return T5Tokenizer(pieces, eos, pad)


def _check_steps(file: Path) -> None:
    """Raise unless what a tokenizer.json does before it looks up words is what T5's do. Other steps of the format could
    make a text endless, or take for ever on it."""
    content, again = _json(file), "Give the tokenizer folder of a T5 text encoder."
    for place, inside in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = content.get(place)
        steps = step.get(inside) if isinstance(step, dict) and step.get("type") == "Sequence" else [step]
        if not isinstance(steps, list) or len(steps) > _MOST_STEPS:
            raise Error(f"The {place} of {file} is not like T5's.", again)
        for step in steps:
            if step is not None and not (isinstance(step, dict) and _is_t5s(step)):
                raise Error(f"{file} has a {place} that T5's does not have: {reprlib.repr(step)}.", again)


def _is_t5s(step: dict) -> bool:
    """Whether a step is one of those that T5's tokenizers have had, in this package's versions and its forerunners'."""
    kind = step.get("type")
    if kind == "Replace":
        return step.get("pattern") in ({"Regex": " {2,}"}, {"String": " "}) and step.get("content") in (" ", "▁")
    if kind == "Precompiled":
        try:
            table = base64.b64decode(step["precompiled_charsmap"], validate=True)
        except (KeyError, TypeError, ValueError):
            return False
        return len(table) > 4 and int.from_bytes(table[:4], "little") < len(table) - 3
    return kind in ("Strip", "NFKC", "WhitespaceSplit", "Metaspace", "ByteLevel")


_MOST_STEPS = 4


def _unpanicked(call: Callable, *args, **settings):
    """The result of a call into the tokenizers package, whose faults would pass by every `except Exception`."""
    try:
        return call(*args, **settings)
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        raise Error(f"The tokenizer cannot be used: {e}.", "Fetch the tokenizer again.") from None


def load_qwen(folder: str | Path) -> QwenTokenizer:
    """Read tokenizer.json, else vocab.json and merges.txt with the added tokens of tokenizer_config.json or
    added_tokens.json."""
    folder = Path(folder)
    vocab, merges, added = _vocabulary(folder)
    try:
        tokens = _added_to(folder, added)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise Error(f"The special tokens in {folder} are malformed ({e!r}).", "Fetch the tokenizer again.") from None
    backend = Tokenizer(BPE(vocab, merges))
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    backend.add_tokens([token for _, token in tokens])
    wrong = next((token.content for i, token in tokens if backend.token_to_id(token.content) != i), None)
    if wrong is not None:
        fix = "Fetch the tokenizer again."
        raise Error(f"The tokenizer in {folder} gives {wrong!r:.60} an id that does not follow its vocabulary.", fix)
    lacking = next((name for name in QWEN_SPECIAL if name not in [token.content for _, token in tokens]), None)
    if lacking is not None:  # it would be read letter by letter
        raise Error(f"The tokenizer in {folder} has no {lacking}.", "Give the tokenizer of a Qwen3 text encoder.")
    return QwenTokenizer(backend, backend.token_to_id(QWEN_SPECIAL[0]))


# text encoder's network -> what reads its tokenizer
LOAD = {"clip": load, "t5": load_t5, "qwen3": load_qwen}


def _added_to(folder: Path, added: list[dict]) -> list[tuple[int, AddedToken]]:
    """(id, token) of the tokens beyond the vocabulary, by their ids."""
    listed = _json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if listed is not None:
        pairs = [(int(i), _added(token)) for i, token in listed.items()]
    elif added:
        pairs = [(token["id"], _added(token)) for token in added]
    else:
        pairs = [(i, _added(text)) for text, i in _json(folder / "added_tokens.json").items()]
    return sorted(pairs, key=lambda pair: pair[0])


def _special(folder: Path, vocab: dict, added: list[dict]) -> tuple[dict[str, str], dict[str, AddedToken], int]:
    """(roles -> tokens, the tokens that are matched before words are split, the context length)."""
    config = _json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in config:  # as in transformers, the older special_tokens_map.json is then ignored
        added = [token for _, token in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0]))]
    else:
        config |= _json(folder / "special_tokens_map.json")
    listed = {token.content: token for token in map(_added, added)}
    tokens, roles = dict(listed), {}
    for role, default in ROLES.items():
        token = _added(config.get(role) or default)
        if token.content not in vocab and token.content not in listed:
            raise Error(f"The tokenizer in {folder} has no {token.content}.", "Give the tokenizer of a CLIP encoder.")
        token = listed.get(token.content, token)
        token.special = True
        tokens[token.content] = token  # if roles share a token, the last role's flags count, as in transformers
        roles[role] = token.content
    length = config.get("model_max_length", LENGTH)
    return roles, tokens, LENGTH if length > 1e9 else int(length)


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[dict]]:
    """(vocab, merges, added tokens), checked as far as the BPE model needs. Only tokenizer.json has added tokens."""
    if (folder / "tokenizer.json").is_file():
        source = folder / "tokenizer.json"
        content = _json(source)
        model, added = content.get("model"), content.get("added_tokens", [])
        vocab, merges = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        source = folder / "merges.txt"
        vocab, added = _json(folder / "vocab.json"), []
        merges = [line for line in _text(source).split("\n") if line and not line.startswith("#version")]
    else:
        raise Error(
            f"{folder} holds no tokenizer: neither tokenizer.json nor vocab.json with merges.txt.",
            "Give the tokenizer folder of a model in diffusers layout.",
        )
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise Error(f"{source} is not a byte-level BPE.", "Give the tokenizer of a CLIP text encoder.")
    if not all(isinstance(merge, str) or fits(merge, tuple[str, ...]) for merge in merges):
        raise Error(f"{source} has a merge that is not text.", "Fetch the tokenizer again.")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    bad = [p for p in pairs if len(p) != 2 or p[0] not in vocab or p[1] not in vocab or p[0] + p[1] not in vocab]
    if bad:
        raise Error(f"{source} has a merge unknown to the vocabulary: {bad[0]}.", "Fetch the tokenizer again.")
    if not all(isinstance(i, int) and 0 <= i < 2**32 for i in vocab.values()):
        raise Error(f"The vocabulary in {folder} has ids that are not numbers.", "Fetch the tokenizer again.")
    return vocab, pairs, added


def _added(token: str | dict) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    flags = {k: token[k] for k in ("special", "single_word", "lstrip", "rstrip", "normalized") if k in token}
    return AddedToken(token["content"], **flags)


def _text(path: Path) -> str:
    return foreign.read_text(path, "Fetch the tokenizer again.")


def _json(path: Path) -> dict:
    """The object in a JSON file; {} if there is no file."""
    return foreign.read_json(path, "Fetch the tokenizer again.") if path.exists() else {}
