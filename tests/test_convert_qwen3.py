"""Conversion of Qwen3 text encoders and their tokenizers. References: what transformers itself saves."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, T5Config, T5EncoderModel

from mlxdiff import Error, conditioning, convert
from mlxdiff.convert import parts, tokenizer
from mlxdiff.convert.layout import Layout, Part, of_transformer
from mlxdiff.description import published
from mlxdiff.families import FAMILIES, PARTS
from mlxdiff.families.base import TextPlan
from mlxdiff.families.published import QWEN3_4B
from mlxdiff.models import qwen3
from mlxdiff.recipe import recipe
from mlxdiff.request import Request
from mlxdiff.store import tokenizer as store_tokenizer

from . import clip_vocab, qwen_vocab, t5_vocab
from .parity.oracle import randomize

TINY = {
    "vocab_size": 300, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 40, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 2e5},
}  # fmt: skip
KLEIN = replace(QWEN3_4B, layers=27, taps=(9, 18, 27))
Z_IMAGE = replace(QWEN3_4B, layers=35, taps=(35,))


def encoder(layers: int, tied: bool = True, bare: bool = False) -> torch.nn.Module:
    whole = Qwen3ForCausalLM(Qwen3Config(**TINY, num_hidden_layers=layers, tie_word_embeddings=tied))
    whole = randomize(whole, layers)
    return whole.model if bare else whole


def state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {k: v.detach().numpy() for k, v in module.state_dict().items()}


def read(path: Path, like: qwen3.Config):
    """The encoder in a file or folder, for a family that reads it as `like` says."""
    beside = {"text_encoder": Part("text_encoder", "qwen_3_4b*.safetensors")}
    row = Layout("a family", [], {"text_encoder": "qwen3"}, {"text_encoder": like}, None, beside)
    return parts._part(row, "text_encoder", path)


@pytest.mark.parametrize("form", ["a folder", "shards", "Qwen3Model", "an untied head", "a file", "a file for ComfyUI"])
@pytest.mark.parametrize(("like", "taps"), [(KLEIN, (9, 18, 27)), (Z_IMAGE, (28,))])
def test_every_form_gives_the_layers_that_are_read(tmp_path, like, taps, form):
    theirs = encoder(29, tied=form != "an untied head", bare=form == "Qwen3Model")
    if form == "a file":
        path = tmp_path / "qwen_3_4b.safetensors"
        save_file({k.removeprefix("model."): v.copy() for k, v in state(theirs).items() if k != "lm_head.weight"}, path)
    elif form == "a file for ComfyUI":
        path = tmp_path / "qwen_3_4b.safetensors"
        held = {k: v.copy() for k, v in state(theirs).items() if k != "lm_head.weight"}
        save_file({f"text_encoders.qwen3_4b.transformer.{k}": v for k, v in held.items()}, path)
    else:
        path = tmp_path / "text_encoder"
        theirs.save_pretrained(path, max_shard_size="60KB" if form == "shards" else "1GB")
        assert (len(list(path.glob("*.safetensors"))) > 1) == (form == "shards")
    made = read(path, like)
    assert (made.unmapped, made.missing) == ({}, [])
    theta, eps = (1e6, 1e-6) if form.startswith("a file") else (2e5, 1e-5)  # no shape shows them
    assert made.config == qwen3.Config(300, 24, taps[-1], 4, 2, 8, 40, theta, eps, taps)
    want = {k.removeprefix("model."): v for k, v in state(theirs).items()}
    assert len(made.weights) == 11 * taps[-1] + 1
    for name, weight in made.weights.items():
        np.testing.assert_array_equal(np.array(weight.array()), want[name])


def test_an_encoder_alone_is_named(tmp_path):
    encoder(3).save_pretrained(tmp_path / "q")
    checkpoint = convert.open(tmp_path / "q")
    assert (checkpoint.family, checkpoint.layout.title) == ("qwen3", "a Qwen3 text encoder")
    with pytest.raises(Error, match="holds only text_encoder"):
        convert.save(checkpoint, tmp_path / "m")


def test_too_few_layers_are_missing(tmp_path):
    encoder(20).save_pretrained(tmp_path / "q")
    made = read(tmp_path / "q", KLEIN)
    assert len(made.missing) == 7 * 11
    assert "layers.20.mlp.down_proj.weight" in made.missing


CHANGES = {
    "hidden_act": "gelu", "attention_bias": True, "use_sliding_window": True, "rope_scaling": {"type": "yarn"},
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}, "rope_theta": -1, "num_hidden_layers": 1,
    "head_dim": 0, "rms_norm_eps": 0, "vocab_size": "many",
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_settings_that_are_not_read_are_refused(tmp_path, key):
    encoder(3).save_pretrained(tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {key: CHANGES[key]}))
    with pytest.raises(Error, match=f"has {key} = "):
        read(tmp_path / "q", Z_IMAGE)


@pytest.mark.parametrize(("key", "value", "says"), [("num_key_value_heads", 3, "keys"), ("head_dim", 5, "halves of a")])
def test_heads_that_do_not_share_are_refused(tmp_path, key, value, says):
    encoder(3).save_pretrained(tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(Error, match=f"no multiple of its .* {says}"):
        read(tmp_path / "q", Z_IMAGE)


def test_theta_of_older_settings(tmp_path):
    encoder(3).save_pretrained(tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    del config["rope_parameters"]
    (tmp_path / "q" / "config.json").write_text(json.dumps(config | {"rope_theta": 12345, "rope_scaling": None}))
    assert read(tmp_path / "q", Z_IMAGE).config.theta == 12345


def test_other_encoders_are_named(tmp_path):
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    t5.save_pretrained(tmp_path / "t5")
    with pytest.raises(Error, match=f"holds a T5 text encoder, not {PARTS['text_encoder']}"):
        read(tmp_path / "t5", KLEIN)


def test_parts_of_a_transformer_that_reads_qwen():
    """ComfyUI's names for the encoder inside a file, and for the file beside it."""
    made = of_transformer("flux-dev", {"qwen3_4b": "text_encoder"}, vae="ae.safetensors")
    assert made.parts["text_encoder"].beside == "qwen_3_4b*.safetensors"
    made = of_transformer("flux-dev", {"qwen3_8b": "text_encoder"}, vae="ae.safetensors")
    assert made.parts["text_encoder"].beside == "qwen_3_8b*.safetensors"


# Tokenizers


def test_the_tokenizer_of_a_kind_is_found_and_checked(tmp_path):
    clip_vocab.write(tmp_path / "tokenizer", clip_vocab.trained(20))
    t5_vocab.write(tmp_path / "tokenizer_2")
    qwen_vocab.write(tmp_path / "tokenizer_3", 40)
    config = qwen3.Config(256 + 40 + len(qwen_vocab.SPECIAL), 8, 1, 1, 1, 8, 8, 1e6, 1e-6, (1,))
    for kind, name in (("clip", "tokenizer"), ("t5", "tokenizer_2"), ("qwen3", "tokenizer_3")):
        assert tokenizer.find(tmp_path, "tokenizer_9", kind) == tmp_path / name
    tokenizer.check(tmp_path / "tokenizer_3", config)
    with pytest.raises(Error, match=f"has {config.vocab} words; the text encoder knows {config.vocab - 1}"):
        tokenizer.check(tmp_path / "tokenizer_3", replace(config, vocab=config.vocab - 1))
    for other in ("tokenizer", "tokenizer_2", ""):
        with pytest.raises(Error, match=r"no <\|endoftext\|>|holds no tokenizer"):
            tokenizer.check(tmp_path / other, replace(config, vocab=99999))


def reads_qwen(monkeypatch, tmp_path, vocab: int):
    """A checkpoint of a family that reads prompts with Qwen3, and has no tokenizer."""
    family = replace(FAMILIES["flux"], text=TextPlan(qwen="text_encoder", template=qwen_vocab.KLEIN))
    monkeypatch.setitem(store_tokenizer.FAMILIES, "flux", family)
    part = SimpleNamespace(config=replace(QWEN3_4B, vocab=vocab))
    return SimpleNamespace(
        path=tmp_path / "a.safetensors", family="flux", components={"text_encoder": part}, tokenizers={}, lacking=[],
        missing=[], unmapped={},
    )  # fmt: skip


def test_a_tokenizer_is_borrowed_from_this_machine(monkeypatch, tmp_path):
    """Only Qwen3's published vocabulary will do: 151,643 words, then its special tokens."""
    monkeypatch.setenv("MLXDIFF_CACHE", str(tmp_path / "cache"))
    checkpoint = reads_qwen(monkeypatch, tmp_path, 151936)
    models = tmp_path / "cache" / "models"
    clip_vocab.write(models / "one" / "tokenizer", clip_vocab.trained(20))
    qwen_vocab.write(models / "two" / "tokenizer", 40)
    with pytest.raises(Error, match="has no tokenizer, none is on this machine"):
        store_tokenizer.tokenizer_for(checkpoint, True, print)
    words = {f"word {i}": i for i in range(151643)}
    added = [{"id": 151643 + i, "content": s, "special": True} for i, s in enumerate(qwen_vocab.SPECIAL)]
    place = models / "three" / "tokenizer"
    place.mkdir(parents=True)
    model = {"model": {"type": "BPE", "vocab": words, "merges": []}, "added_tokens": added}
    (place / "tokenizer.json").write_text(json.dumps(model))
    assert store_tokenizer.tokenizer_for(checkpoint, True, print) == place
    other = reads_qwen(monkeypatch, tmp_path, 1000)
    with pytest.raises(Error, match="its text_encoder knows 1000 words where Qwen3 has 151936"):
        store_tokenizer.tokenizer_for(other, True, print)


# Conditions


def test_prompts_of_their_own_lengths_reach_the_denoiser(tmp_path):
    """Without padding, contexts are filled up with zeros to share a batch, and `lengths` says how long each is."""
    tokenizers = {"text_encoder": conditioning.tokenizers.load_qwen(qwen_vocab.write(tmp_path, 40))}
    net = qwen3.Qwen3(qwen3.Config(400, 8, 2, 1, 1, 8, 8, 1e6, 1e-6, (1, 2)))
    given = []
    denoiser = SimpleNamespace(prepare=lambda ts, **kinds: given.append(kinds) or {})
    for padded in (False, True):
        plan = TextPlan(qwen="text_encoder", template=qwen_vocab.Z_IMAGE, qwen_tokens=70, qwen_padded=padded)
        words = conditioning.tokenize(plan, tokenizers, ["", "a red fox in the snow"])["text_encoder"]
        a, b = conditioning.join(plan, {"text_encoder": conditioning.read(plan, net, words, 1)}, 16)
        assert (a.pooled, b.pooled) == (None, None)
        n, m = a.context.shape[1], b.context.shape[1]
        assert (n, m) == (70, 70) if padded else n < m < 70
        model = SimpleNamespace(text=plan, guidance="second pass", flow=False)
        given.clear()
        conditioning.prepare(model, denoiser, Request("", count=2), [1.0], [a, b], both=True)
        alone, both = given
        assert alone["context"].shape == (2, m, 16)
        assert both["context"].shape == (4, m, 16)
        assert mx.array_equal(both["context"][:2, :n], mx.repeat(a.context, 2, axis=0))
        assert mx.array_equal(both["context"][2:], alone["context"])
        assert not mx.any(both["context"][:2, n:]).item()
        lengths = (alone.get("lengths"), both.get("lengths"))
        assert lengths == ((None, None) if padded else ((m, m), (n, n, m, m)))


def test_a_weight_is_refused_before_anything_is_drawn():
    model = published("flux-schnell", recipe(dtype="float32"))
    text = TextPlan(qwen="text_encoder", template=qwen_vocab.KLEIN)
    variants = {"schnell": replace(model.row, t5_tokens=None)}
    model = replace(model, family=replace(model.family, text=text, variants=variants))
    model.resolve(Request("a (red) fox"))
    for request in (Request("a (red:1.3) fox"), Request("a fox", negative="(red:1.3)", true_cfg=2.0)):
        with pytest.raises(Error, match="knows no weights"):
            model.resolve(request)
