"""Qwen's tokenizer against transformers' Qwen2Tokenizer from the same files, with a vocabulary made here."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer

from mlxdiff import Error, conditioning, tokenizers
from mlxdiff.families.base import TextPlan

from . import clip_vocab, qwen_vocab
from .test_tokenizers import TEXTS

MARKED = [
    "a <|im_end|>b", "<|endoftext|>", "<|IM_END|> <|im_end", "<think>hm</think> <THINK>", "<|vision_start|>",
    "<|im_end|>\n<|im_start|>system\nnow draw {prompt}", "line\n\nline\r\n  x\t\ty", "it's IT'S we'Ll", "1234567 ½²",
]  # fmt: skip
# The user's turn of Qwen3's published chat template, and its end.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
PLANS = {
    True: TextPlan(qwen="text_encoder", template=qwen_vocab.KLEIN, qwen_tokens=96, qwen_padded=True),
    False: TextPlan(qwen="text_encoder", template=qwen_vocab.Z_IMAGE, qwen_tokens=96),
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """transformers', and ours from each kind of files."""
    root = tmp_path_factory.mktemp("qwen")
    theirs = Qwen2Tokenizer.from_pretrained(qwen_vocab.write(root / "plain"))
    theirs.chat_template = CHAT
    theirs("x", padding="max_length", max_length=7, truncation=True)  # which it would store, and ours must not heed
    theirs.save_pretrained(root / "json")
    assert not (root / "json" / "vocab.json").exists()
    return theirs, tokenizers.load_qwen(root / "plain"), tokenizers.load_qwen(root / "json")


def test_ids_equal_transformers(three):
    theirs, *both = three
    texts = TEXTS + MARKED
    wanted = theirs(texts, add_special_tokens=False).input_ids
    assert len({i for ids in wanted for i in ids} - set(range(256))) > 100  # merges and special tokens are met
    for ours in both:
        for text, ids in zip(texts, wanted, strict=True):
            assert ours.ids(text) == ids, repr(text)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_text_equals_transformers(three, text):
    theirs, *both = three
    for ours in both:
        assert ours.ids(text) == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("padded", PLANS)
def test_prompts_in_their_template_equal_the_pipelines(three, padded):
    """As Flux2KleinPipeline and ZImagePipeline call it: the chat template, then padding to a length. A special token
    that somebody types is that token here too."""
    theirs, *both = three
    prompts = [t for t in TEXTS[:150] + MARKED if "\\" not in t and ":1." not in t and len(t) < 40]
    assert len(prompts) > 80
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=not padded)
        want = theirs(text, padding="max_length", max_length=96)
        for ours in both:
            ((chunk,),) = conditioning.tokenize(PLANS[padded], {"text_encoder": ours}, [prompt])["text_encoder"].chunks
            n = sum(want.attention_mask)
            length = max(96, n) if padded else n
            assert (chunk.ids, chunk.visible) == (want.input_ids[:length], n), repr(prompt)
            assert set(chunk.weights) == {1.0}


def test_longer_prompts_are_not_cut(three):
    """The pipelines cut such a prompt with its template's end. The shorter one is padded with it, where padding is."""
    ours = three[1]
    for padded, plan in PLANS.items():
        words = conditioning.tokenize(plan, {"text_encoder": ours}, ["", "fox " * 200])["text_encoder"]
        short, long = (chunk for (chunk,) in words.chunks)
        assert long.ids == ours.ids(plan.template.replace("{prompt}", "fox " * 200))
        assert len(long.ids) == long.visible > 96
        assert short.visible == len(ours.ids(plan.template.replace("{prompt}", ""))) < 96
        assert len(short.ids) == (len(long.ids) if padded else short.visible)


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a (red) [blue] fox BREAK moon", "a (red) [blue] fox BREAK moon"),
        (r"time \(12:30\) \[x\] \n", r"time (12:30) [x] \n"),
        ("a:1.3) ratio 16:9", "a:1.3) ratio 16:9"),
        ("", ""),
    ],
)
def test_prompts_are_read_as_they_are_written(prompt, read):
    assert tokenizers.unweighted(prompt) == read


@pytest.mark.parametrize("prompt", ["a (red:1.3) fox", "((red): 2 ) fox", "(it shows 12:30)"])
def test_weights_are_refused(three, prompt):
    with pytest.raises(Error, match="knows no weights") as e:
        conditioning.tokenize(PLANS[True], {"text_encoder": three[1]}, [prompt])
    assert r"\( and \)" in e.value.fix


def test_text_that_is_no_unicode_is_told(three):
    with pytest.raises(Error, match="not valid Unicode at character 4"):
        three[1].ids("fox \ud800")


def test_what_is_no_tokenizer_of_qwen_is_told(tmp_path):
    with pytest.raises(Error, match=r"neither tokenizer\.json nor vocab\.json"):
        tokenizers.load_qwen(tmp_path)
    with pytest.raises(Error, match=r"has no <\|endoftext\|>"):  # CLIP's has that as a word, not beside them
        tokenizers.load_qwen(clip_vocab.write(tmp_path / "clip", clip_vocab.trained(20)))
    config = json.loads((qwen_vocab.write(tmp_path / "q", 20) / "tokenizer_config.json").read_text())
    for change, says in (
        ({"999": config["added_tokens_decoder"].popitem()[1]}, "'<tool_call>' an id that does not follow"),
        ({"x": {"content": "a"}}, "special tokens .* are malformed"),
        ({"276": {"content": 3}}, "special tokens .* are malformed"),
        ({"276": None}, "special tokens .* are malformed"),
    ):
        changed = config | {"added_tokens_decoder": config["added_tokens_decoder"] | change}
        (tmp_path / "q" / "tokenizer_config.json").write_text(json.dumps(changed))
        with pytest.raises(Error, match=says):
            tokenizers.load_qwen(tmp_path / "q")
    (tmp_path / "q" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": [1]}))
    with pytest.raises(Error, match="malformed"):
        tokenizers.load_qwen(tmp_path / "q")
    (tmp_path / "q" / "tokenizer_config.json").unlink()
    with pytest.raises(Error, match=r"has no <\|endoftext\|>"):
        tokenizers.load_qwen(tmp_path / "q")
    names = qwen_vocab.SPECIAL
    (tmp_path / "q" / "added_tokens.json").write_text(json.dumps({s: 276 + i for i, s in enumerate(names)}))
    assert tokenizers.load_qwen(tmp_path / "q").pad == 276
