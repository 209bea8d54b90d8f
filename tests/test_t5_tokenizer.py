"""T5's tokenizer against transformers', from spiece.model and from tokenizer.json, with a vocabulary made here."""

import json
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import T5Tokenizer

from mlxdiff import Error, tokenizers

from . import t5_vocab

STRINGS = [
    "a red fox in the snow", "", " ", "  two  spaces\nand a line ", "tab\there\r\n", "café ﬁne Ⅷ ① ½",
    "e\u0301 combining", "猫 unknown ☃☃☃ 字字", "4k, 8k!!! it's we'll", "😀😀 fox 👩\u200d🚀",
    "\u200bzero width\u00a0nbsp", "ÄÖÜ ẞ straße", "x" * 300, "— dash … “quotes”", "(red:1.2) [blue]",
    "a</s>b <extra_id_0> <pad>x <extra_id_99><unk>", "<extra_id_100> </s", "بيت קמר",
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("t5") / "json"


@pytest.fixture(scope="module")
def three(saved):
    """transformers', and ours from each kind of file."""
    root = saved.parent
    t5_vocab.write(root / "spiece")
    theirs = T5Tokenizer.from_pretrained(root / "spiece")
    theirs("x", padding="max_length", max_length=7, truncation=True)  # which it would store, and ours must not heed
    theirs.save_pretrained(root / "json")
    return theirs, tokenizers.load_t5(root / "spiece"), tokenizers.load_t5(root / "json")


@pytest.mark.parametrize("text", STRINGS)
def test_equals_transformers(three, text):
    theirs, *both = three
    for ours in both:
        assert ours.ids(text) == theirs(text, add_special_tokens=False).input_ids


@given(st.text(alphabet=st.characters(exclude_categories=["Cs", "Co", "Cn", "Cc"]), max_size=40))
@settings(max_examples=150, deadline=None)
def test_equals_transformers_on_any_text(three, text):
    theirs, *both = three
    for ours in both[loses_a_mark(text) :]:  # of spiece.model, sentencepiece itself is the reference there
        assert ours.ids(text) == theirs(text, add_special_tokens=False).input_ids


def loses_a_mark(text: str) -> bool:
    """transformers' tokenizer forgets a mark that stands on a character that is written otherwise first, such as the
    accent of "²\\u0591" where ² becomes 2. sentencepiece, which T5 was trained with, keeps it."""
    stands = ((a, b) for a, b in pairwise(text) if unicodedata.category(b) in ("Mn", "Mc", "Me", "Cf"))
    return any(unicodedata.normalize("NFKC", a) != a for a, _ in stands)


def test_a_mark_on_a_character_that_is_written_otherwise(three):
    theirs, ours, by_json = three
    assert loses_a_mark("²\u0591")
    assert ours.ids("²\u0591") == ours.ids("2\u0591") == theirs("2\u0591", add_special_tokens=False).input_ids
    assert by_json.ids("²\u0591") == theirs("²\u0591", add_special_tokens=False).input_ids == theirs("2").input_ids[:-1]


@pytest.mark.parametrize("length", [8, 256, 512])
def test_padding_equals_transformers(three, length):
    theirs, *both = three
    for text in ("a red fox", ""):
        want = theirs(text, padding="max_length", max_length=length, truncation=True).input_ids
        for ours in both:
            chunk = ours.encode(text, length)
            assert (chunk.ids, set(chunk.weights)) == (want, {1.0})


def test_longer_prompts_are_not_cut_and_weights_stand_by_their_tokens(three):
    theirs, *both = three
    for ours in both:
        assert ours.encode("fox " * 20, 8).ids == theirs("fox " * 20).input_ids
        ids, weights, _ = ours.encode("a (red fox:1.5) snow BREAK moon", 32)
        n = [len(ours.ids(text)) for text in ("a ", "red fox", " snow ", " moon")]
        assert weights[: sum(n)] == [1.0] * n[0] + [1.5] * n[1] + [1.0] * (n[2] + n[3])
        assert len(ids) == len(weights) == 32


def test_what_is_no_tokenizer_is_told(tmp_path):
    with pytest.raises(Error, match=r"neither tokenizer\.json nor spiece.model"):
        tokenizers.load_t5(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(Error, match="cannot be read"):
        tokenizers.load_t5(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Error, match="cannot be read"):
        tokenizers.load_t5(tmp_path)


GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 999}
HOSTILE = {
    "a text that grows": {"normalizer": {"type": "Sequence", "normalizers": [GROWS] * 4}},
    "one that grows alone": {"normalizer": GROWS},
    "a pattern that takes for ever": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}}},
    "many steps": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 5}},
    "steps within steps": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence"}]}},
    "a table of another type": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": [1]}},
    "a table that is none": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
    "text": {"normalizer": "x"},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.usefixtures("three")
def test_steps_that_are_not_t5s_are_refused(tmp_path, saved, change, capfd):
    """The package would take them: a prompt of 12 letters would become 10^13. A wrong table makes it panic, which is
    no Exception and prints lines of its own."""
    content = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | change), encoding="utf-8")
    with pytest.raises(Error, match="T5's") as e:
        tokenizers.load_t5(tmp_path)
    assert len(str(e.value)) < 400
    assert capfd.readouterr().err == ""


def _interrupted():
    raise KeyboardInterrupt


def test_a_panic_of_the_package_is_an_error():
    class PanicException(BaseException):
        pass

    def panics():
        raise PanicException("index out of bounds")

    with pytest.raises(Error, match="cannot be used: index out of bounds"):
        tokenizers._unpanicked(panics)
    with pytest.raises(KeyboardInterrupt):
        tokenizers._unpanicked(_interrupted)


def test_text_that_is_no_unicode_is_told(three):
    with pytest.raises(Error, match="not valid Unicode at character 4"):
        three[1].encode("fox \ud800", 8)
