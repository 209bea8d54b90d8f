"""Reference: transformers' CLIPTokenizer from the same files; prompt syntax: the rules as written in parse_weights."""

import json
import random
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from mlxdiff import Error, tokenizers
from mlxdiff.tokenizers import parse_weights
from tests import clip_vocab

BOS, EOS = clip_vocab.BOS, clip_vocab.EOS


def _token(content, **flags):
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False} | flags


# The side files of published folders: SD 1.x; SDXL's second tokenizer and SD 2.x, whose pad is "!" (id 0); the same as
# newer transformers wrote it, where "!" became a special token; no side file at all.
SD1 = {
    "special_tokens_map": {
        "bos_token": _token(BOS),
        "eos_token": _token(EOS),
        "pad_token": EOS,
        "unk_token": _token(EOS),
    },
    "tokenizer_config": {
        "bos_token": {"__type": "AddedToken", **_token(BOS)},
        "eos_token": {"__type": "AddedToken", **_token(EOS)},
        "unk_token": {"__type": "AddedToken", **_token(EOS)},
        "pad_token": EOS,
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    },
}
SDXL_2 = {
    "special_tokens_map": SD1["special_tokens_map"] | {"pad_token": "!"},
    "tokenizer_config": SD1["tokenizer_config"] | {"pad_token": "!"},
}


def _newer(words):
    decoder = {0: _token("!", normalized=False, special=True)}
    decoder |= {words - 2: _token(BOS, special=True), words - 1: _token(EOS, normalized=False, special=True)}
    config = {"added_tokens_decoder": decoder, "bos_token": BOS, "eos_token": EOS, "pad_token": "!", "unk_token": EOS}
    return {"tokenizer_config": config | {"model_max_length": 77}}


CASES = {  # name -> (merges, side files)
    "sd1": (clip_vocab.trained(100), SD1),
    "sdxl_2": (clip_vocab.trained(200), SDXL_2),
    "newer": (clip_vocab.trained(200), _newer(514 + 200)),
    "bare": ([], {}),
    "full size": (clip_vocab.made_up(49408 - 514), SD1),
}


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    merges, extra = CASES[request.param]
    return clip_vocab.write(tmp_path_factory.mktemp("tokenizer"), merges, **extra)


@pytest.fixture(scope="module")
def pair(folder):
    return tokenizers.load(folder), CLIPTokenizer.from_pretrained(folder)


def _tricky() -> list[str]:
    words = [
        *("", " ", "\n", "\t\r\n ", "!", "!!", "a!b", "don't", "DON'T they'LL we've", "'", "''s", "cat's's"),
        *("<|startoftext|>", "a <|endoftext|>b", "<|ENDOFTEXT|>", "<|endoftext|", "<|startoftext|><|startoftext|>"),
        *("café", "cafe\u0301", "CAFÉ", "ﬁne ﬂow", "Ω\u2126", "Å\u212b", "İstanbul", "ǅ", "ẞß", "ŉ"),
        *("שלום עולם", "مرحبا بالعالم", "\u202eabc\u202c", "猫と雪", "雪\u3000山", "고양이", "각", "हिन्दी में"),
        *("🦊", "👩\u200d🚀", "❤\ufe0f", "🇫🇷", "a🦊b", "1234567890", "3.14e-7", "x²½Ⅻ٣", "4k,8k", "_a_b__"),
        *(
            "&amp; &lt;b&gt; &#39;",
            "<b>bold</b>",
            "a\x00b",
            "\x1b[31mred",
            "a\u00a0b",
            "a\u2028b\u2029c\x85d",
            "\ufeffbom",
        ),
        *(
            "\ufeffbom",
            "\u00ad",
            "a\u200bb",
            "\x1c\x1d\x1e\x1f",
            "\ud7ff\ue000",
            "\U0010ffff",
            "(red:1.3) [b] \\(x\\)",
            "a BREAK b",
        ),
        *("fox " * 500, "x" * 3000, "é" * 200, "!" * 200, "a" + "\u0301" * 50),
    ]
    return words + [unicodedata.normalize(form, w) for w in words for form in ("NFD", "NFKC", "NFKD")]


def _drawn(count: int) -> list[str]:
    """Seeded strings that mix the training words with characters of every plane and kind."""
    draw = random.Random(1)
    planes = [(0, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x6FF), (0x900, 0x1FFF), (0x2000, 0x2BFF)]
    planes += [(0x3040, 0xD7FF), (0xE000, 0xFFFD), (0x1F000, 0x1FAFF), (0x10000, 0x10FFFF)]

    def piece():
        kind = draw.random()
        if kind < 0.5:
            return draw.choice(clip_vocab.WORDS)
        if kind < 0.6:
            return draw.choice([" ", "  ", "\n", "\t", "'", "'s", "!", BOS, EOS, ",", "(", ":1.2)", "\u00a0"])
        return "".join(chr(draw.randint(*draw.choice(planes))) for _ in range(draw.randint(1, 6)))

    return ["".join(piece() + draw.choice(["", " "]) for _ in range(draw.randint(1, 12))) for _ in range(count)]


TEXTS = _tricky() + _drawn(3000)


def test_ids_equal_transformers(pair):
    ours, theirs = pair
    wanted = theirs(TEXTS, add_special_tokens=False).input_ids
    for text, ids in zip(TEXTS, wanted, strict=True):
        assert ours.ids(text) == ids, repr(text)


def test_padded_chunk_equals_transformers(pair):
    ours, theirs = pair
    room = ours.length - 2
    for text in [t for t in TEXTS if len(ours.ids(t)) <= room][:1500]:
        padded = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
        (chunk,) = ours.encode(text, weighted=False)
        assert chunk.ids == padded, repr(text)
        assert chunk.weights == [1.0] * 77


def test_a_prompt_without_syntax_is_the_same_weighted_or_not(pair):
    ours, _ = pair
    plain = [t for t in TEXTS if not set("()[]") & set(t) and "BREAK" not in t]
    assert len(plain) > 1000
    for text in plain:
        assert ours.encode(text) == ours.encode(text, weighted=False), repr(text)


def test_what_transformers_saves_itself_loads_the_same(pair, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)  # tokenizer.json, no vocab.json
    assert not (tmp_path / "vocab.json").exists()
    again, wanted = tokenizers.load(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    assert (again.bos, again.eos, again.pad, again.length) == (ours.bos, ours.eos, ours.pad, ours.length)
    for text in TEXTS[:600]:
        assert again.ids(text) == wanted(text, add_special_tokens=False).input_ids, repr(text)


@pytest.mark.parametrize(("case", "pad"), [("sd1", EOS), ("sdxl_2", "!"), ("newer", "!"), ("bare", EOS)])
def test_roles_are_read_from_the_side_files(case, pad, tmp_path):
    merges, extra = CASES[case]
    ours = tokenizers.load(clip_vocab.write(tmp_path, merges, **extra))
    words = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert (ours.bos, ours.eos, ours.pad, ours.length) == (words[BOS], words[EOS], words[pad], 77)


def test_exclamation_mark_is_the_pad_token_where_it_is_special(tmp_path):
    merges, extra = CASES["sdxl_2"]
    assert tokenizers.load(clip_vocab.write(tmp_path, merges, **extra)).ids("!") == [0]
    assert tokenizers.load(clip_vocab.write(tmp_path, merges, **CASES["sd1"][1])).ids("!") == [256]  # "!</w>"


def test_other_context_lengths(tmp_path):
    config = SD1["tokenizer_config"] | {"model_max_length": 11}
    short = tokenizers.load(clip_vocab.write(tmp_path, [], tokenizer_config=config))
    assert [len(c.ids) for c in short.encode("x" * 20)] == [11, 11, 11]


# Long prompts, BREAK and weights, on one tokenizer.


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    merges, extra = CASES["sd1"]
    return tokenizers.load(clip_vocab.write(tmp_path_factory.mktemp("clip"), merges, **extra))


def content(chunk, clip):
    """The chunk's tokens between begin and the first end that padding follows."""
    ids = list(chunk.ids)
    assert ids[0] == clip.bos
    while ids[-1] == clip.pad:
        ids.pop()
    return ids[1:]


@given(st.text(max_size=400), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_chunks_hold_every_token_once_in_order(clip, text, times):
    text = (text.replace(EOS, "") + " ") * times
    chunks = clip.encode(text, weighted=False)
    assert [i for c in chunks for i in content(c, clip)] == clip.ids(text)
    assert all(len(c.ids) == len(c.weights) == 77 and clip.eos in c.ids for c in chunks)
    assert all(len(content(c, clip)) == 75 for c in chunks[:-1])  # only the last may be short


@pytest.mark.parametrize(("tokens", "chunks"), [(0, 1), (1, 1), (74, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_cut_every_75_tokens(clip, tokens, chunks):
    encoded = clip.encode("1 " * tokens)  # a digit is a token of its own
    assert len(encoded) == chunks
    assert encoded[-1].ids[-1] == clip.eos


def test_break_begins_a_chunk(clip):
    fox, snow = clip.encode("a fox BREAK snow")
    assert (fox, snow) == (clip.encode("a fox")[0], clip.encode("snow")[0])
    assert clip.encode("BREAK BREAK a fox BREAK") == clip.encode("a fox")  # no empty chunks
    assert clip.encode("BREAK") == clip.encode("")
    assert len(clip.encode("a fox BREAK snow", weighted=False)) == 1
    assert len(clip.encode("BREAKFAST break")) == 1


def test_weights_lie_on_the_tokens_of_their_words(clip):
    (chunk,) = clip.encode("a (red fox:1.5) in [snow]")
    words = [("a", 1), ("red fox", 1.5), ("in", 1), ("snow", 1 / 1.1)]
    ids = [i for text, _ in words for i in clip.ids(text)]
    weights = [w for text, w in words for _ in clip.ids(text)]
    assert chunk.ids[: len(ids) + 2] == [clip.bos, *ids, clip.eos]
    assert chunk.weights == [1, *weights] + [1] * (76 - len(ids))


def test_brackets_are_characters_when_escaped_or_unweighted(clip):
    assert clip.encode(r"fox \(animal\) \[x\]") == clip.encode("fox (animal) [x]", weighted=False)


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("", []),
        ("a fox", [("a fox", 1)]),
        ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
        ("[red]", [("red", 1 / 1.1)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red: 1.3 )", [("red", 1.3)]),
        ("(red:.5)", [("red", 0.5)]),
        ("(red:2.)", [("red", 2)]),
        ("(red:0)", [("red", 0)]),
        ("(red:-1)", [("red", -1)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("([red])", [("red", 1.1 * (1 / 1.1))]),
        ("(a (b:2) c:3)", [("a ", 3), ("b", 6), (" c", 3)]),
        ("((a:2) b)", [("a", 1.1 * 2), (" b", 1.1)]),
        ("(a)(b)", [("ab", 1.1)]),
        (r"\(a\) \[b\]", [("(a) [b]", 1)]),
        (r"(\(a\):2)", [("(a)", 2)]),
        (r"C:\art \o/ a\\b", [(r"C:\art \o/ a\\b", 1)]),  # other backslashes are themselves
        ("()", []),
        ("a sad face :(", [("a sad face :(", 1)]),
        (":) :] :[", [(":) :] :[", 1)]),
        ("(a (b)", [("(a ", 1), ("b", 1.1)]),
        ("a) (b)", [("a) ", 1), ("b", 1.1)]),
        ("([a)]", [("[a", 1.1), ("]", 1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:1,3)", [("a:1,3", 1.1)]),
        ("(a:nan)", [("a:nan", 1.1)]),
        ("(a:1e3)", [("a:1e3", 1.1)]),
        ("(a:" + "9" * 400 + ")", [("(a:" + "9" * 400 + ")", 1)]),
        ("a:1.3) b", [("a:1.3) b", 1)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),
        ("at 16:9", [("at 16:9", 1)]),
        ("a BREAK b", [("a ", 1), ("BREAK", None), (" b", 1)]),
        ("(a BREAK b:2)", [("a ", 2), ("BREAK", None), (" b", 2)]),
        ("breaking BREAKs", [("breaking BREAKs", 1)]),
    ],
)
def test_prompt_syntax(prompt, parsed):
    assert parse_weights(prompt) == [(t, w if w is None else pytest.approx(w, rel=1e-15)) for t, w in parsed]


@given(st.text(alphabet="ab ()[]\\:.1-", max_size=60))
@settings(max_examples=400, deadline=None)
def test_any_prompt_parses_to_its_own_characters(prompt):
    """Nothing is invented or reordered: what is left of the prompt is a subsequence of it, with finite weights."""
    parsed = parse_weights(prompt)
    rest = iter(prompt)
    assert all(c in rest for text, _ in parsed for c in text)
    assert all(abs(w) < float("inf") for _, w in parsed)
    assert all(a[1] != b[1] for a, b in pairwise(parsed))  # neighbours of equal weight are one


def test_hostile_prompts_take_linear_time():
    """A million characters of what a careless pattern or a quadratic stack would choke on."""
    n = 250_000
    for prompt in ("(" * n, "(" * n + ")" * n, "([" * n, "(" * n + "]" * n, ":" * n, ":" + "1" * n, ": " * n, "\\" * n):
        parse_weights(prompt)


# Bad input: each names the thing.


def test_lone_surrogate_is_an_error(clip):
    with pytest.raises(Error, match="not valid Unicode at character 2"):
        clip.encode("a \udcff fox")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("vocab.json", "<html>", "vocab.json is not valid JSON"),
        ("vocab.json", "[1, 2]", "vocab.json holds list, not a JSON object"),
        ("vocab.json", '{"a": 0}', "merges.txt has a merge unknown"),
        ("merges.txt", "a b c\n", "merges.txt has a merge unknown"),
        ("merges.txt", "<!DOCTYPE html>\n", "merges.txt has a merge unknown"),
        ("special_tokens_map.json", '{"pad_token": "<pad>"}', "has no <pad>"),
        ("special_tokens_map.json", '{"pad_token": 3}', "special tokens in .* malformed"),
        ("tokenizer_config.json", '{"model_max_length": "many"}', "special tokens in .* malformed"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "special tokens in .* malformed"),
        ("tokenizer.json", '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}', "not a byte-level BPE"),
        ("tokenizer.json", "{}", "not a byte-level BPE"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 0}, "merges": []}}', r"has no <\|startoftext\|>"),
    ],
)
def test_broken_files_are_named(name, text, says, tmp_path):
    clip_vocab.write(tmp_path, CASES["sd1"][0])
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(Error, match=says) as caught:
        tokenizers.load(tmp_path)
    assert caught.value.fix


def test_missing_and_binary_files_are_named(tmp_path):
    with pytest.raises(Error, match="holds no tokenizer"):
        tokenizers.load(tmp_path)
    clip_vocab.write(tmp_path, [])
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(Error, match=r"merges\.txt cannot be read"):
        tokenizers.load(tmp_path)
