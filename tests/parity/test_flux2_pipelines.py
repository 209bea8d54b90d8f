"""FLUX.2's VAE and whole pipelines against diffusers: same weights, prompt, seed and settings, same picture. Bound: 40
dB, as for the other families; float32 on both sides, so it is far above."""

import json
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

import mlxdiff
from mlxdiff import convert, memory
from mlxdiff.errors import Error
from mlxdiff.families import FAMILIES
from mlxdiff.models import vae
from tests import original
from tests.checkpoints import full, manifest, sparse

from .bfl import from_diffusers
from .oracle import error, nchw, nhwc, randomize
from .test_pipelines import DB, PROMPT, SEED, SIZE, command, psnr
from .tiny import louder, stir

pytestmark = pytest.mark.usefixtures("cache")
OTHER = "a blue boat on a lake, at night"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
ADDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def words(folder: Path) -> Qwen2Tokenizer:
    """Byte-level BPE with a few merges, in the files and with the added tokens of Qwen3."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator([PROMPT, OTHER, "user assistant think"], trainer)
    folder.mkdir(parents=True)
    backend.model.save(str(folder))
    listed = {
        str(backend.get_vocab_size() + i): {"content": t, "special": "|" in t, "normalized": False, "lstrip": False,
                                            "rstrip": False, "single_word": False}
        for i, t in enumerate(ADDED)
    }  # fmt: skip
    settings = {"added_tokens_decoder": listed, "pad_token": ADDED[0], "eos_token": ADDED[2], "unk_token": ADDED[0]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer", "chat_template": TEMPLATE})
    )
    return Qwen2Tokenizer.from_pretrained(folder)


def autoencoder(seed: int, **config) -> AutoencoderKLFlux2:
    torch.manual_seed(seed)
    n = 3
    own = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        **({"block_out_channels": (8, 16, 24), "norm_num_groups": 4, "latent_channels": 8} | config),
    )
    own.bn.running_mean.normal_(0, 0.5)
    own.bn.running_var.uniform_(0.2, 3)
    return stir(own, seed).requires_grad_(False)


def made(folder: Path, width: int = 48, head: int = 16, text: int = 16, distilled: bool = False) -> Flux2KleinPipeline:
    """width: of the transformer. text: the width of the encoder."""
    tok = words(folder)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tok), hidden_size=text, num_hidden_layers=28, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, intermediate_size=2 * text, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    net = Flux2Transformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=2, attention_head_dim=head, num_attention_heads=width // head,
        joint_attention_dim=3 * text, guidance_embeds=False, axes_dims_rope=(head // 4,) * 4,
    )  # fmt: skip
    pipe = Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        autoencoder(41, block_out_channels=(32, 32, 64), norm_num_groups=32), randomize(encoder, 42),
        tok, louder(randomize(net, 43), 4, ("context_embedder.weight",)), is_distilled=distilled,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def klein(tmp_path_factory) -> dict:
    """kind -> (diffusers pipeline, folder it was saved in); both have the same weights."""
    root = tmp_path_factory.mktemp("flux2")
    pipe = made(root / "words")
    distilled = Flux2KleinPipeline(**pipe.components, is_distilled=True)
    distilled.set_progress_bar_config(disable=True)
    kinds = {"base": (pipe, root / "base"), "distilled": (distilled, root / "distilled")}
    for own, folder in kinds.values():
        own.save_pretrained(folder)
    return kinds


@pytest.fixture
def short(monkeypatch) -> dict:
    """A prompt is filled up to 64 tokens on both sides, not to 512, which `test_from_a_folder` proves: a step is five
    times sooner, and pictures count for more. Returns what the oracle is told."""
    family = FAMILIES["flux2"]
    text = replace(family.text, qwen_tokens=64)
    monkeypatch.setitem(FAMILIES, "flux2", replace(family, text=text))
    return {"max_sequence_length": 64}


def opened(folder, **options):
    return mlxdiff.load(folder, dtype="float32", **options)


def oracle(pipe, prompt: str = PROMPT, **settings) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(SEED)
    return np.asarray(pipe(prompt=prompt, generator=generator, **(SIZE | settings)).images[0])


# ---- the VAE


VAES = {
    "published": {},
    "small decoder": {"decoder_block_out_channels": (4, 12, 16)},
    "two layers": {"layers_per_block": 2, "latent_channels": 3},
}


def vae_pair(tmp_path: Path, config: dict):
    """Theirs, and ours as it is read from their folder."""
    theirs = autoencoder(1, **({"layers_per_block": 1} | config))
    theirs.save_pretrained(tmp_path)
    part = convert.open(tmp_path).components["vae"]
    ours = vae.VAE(part.config)
    ours.load_weights([(name, weight.array()) for name, weight in part.weights.items()], strict=True)
    return theirs, ours


# 1e-5: float32 sums in another order.
@pytest.mark.parametrize("config", VAES.values(), ids=VAES)
def test_vae_equals_diffusers_both_ways(tmp_path, config):
    theirs, ours = vae_pair(tmp_path, config)
    image = np.random.default_rng(2).uniform(-1, 1, (2, 3, 24, 40)).astype(np.float32)
    own, _ = ours.encode(nhwc(image))
    pipe = Flux2KleinPipeline
    z = torch.randn(2, ours.config.seen, 3, 5, generator=torch.Generator().manual_seed(3))
    mean, std = theirs.bn.running_mean.view(1, -1, 1, 1), (theirs.bn.running_var + 1e-4).sqrt().view(1, -1, 1, 1)
    want = (pipe._patchify_latents(theirs.encode(torch.tensor(image)).latent_dist.mode()) - mean) / std
    assert error(nchw(own), want) < 1e-5
    want = theirs.decode(pipe._unpatchify_latents(z * std + mean)).sample
    assert error(nchw(ours.decode(nhwc(z.numpy()))), want) < 1e-5
    ours.bn.running_mean = mx.roll(ours.bn.running_mean, 1)  # the order of channels counts
    assert error(nchw(ours.decode(nhwc(z.numpy()))), want) > 1e-2


def test_vae_in_tiles(tmp_path):
    """Tiles are counted in latents of 8 pixels, whatever the diffusion model sees. Their norms see less, so the result
    is near, not equal."""
    _, ours = vae_pair(tmp_path, {})
    z = mx.random.normal((1, 6, 11, ours.config.seen), key=mx.random.key(0))
    whole, tiled = ours.decode(z), ours.decode(z, tile=8)
    assert tiled.shape == whole.shape == (1, 48, 88, 3)
    assert error(tiled, np.array(whole)) < 0.5
    again, _ = ours.encode(whole, tile=8)
    assert again.shape == z.shape


# ---- whole pictures


@pytest.mark.parametrize("kind", ["distilled", "base"])
def test_from_a_folder(klein, cache, tmp_path, kind):
    """The oracle listens to the prompt and, if it takes guidance, to that."""
    pipe, folder = klein[kind]
    guided = {"guidance_scale": 4.0} if kind == "base" else {}
    want = oracle(pipe, num_inference_steps=4, **guided)
    typed = ["-m", str(folder), PROMPT, "--steps", "4"]
    drawn, said = command(cache, tmp_path / "a.png", *typed, process=kind == "distilled")
    assert psnr(drawn, want) > DB
    assert said["request"]["guidance"] == (4.0 if kind == "base" else 0.0)
    assert psnr(want, oracle(pipe, OTHER, num_inference_steps=4, **guided)) < DB - 10
    if kind == "base":
        assert psnr(want, oracle(pipe, num_inference_steps=4, guidance_scale=1.0)) < DB - 10
    else:
        assert opened(folder).resolve(PROMPT).steps == 4


@pytest.mark.parametrize("low_memory", [False, True])
def test_an_odd_size_and_a_batch(klein, short, low_memory):
    """Both passes in one batch and, to spare memory, one after the other."""
    pipe, folder = klein["base"]
    size = {"width": 56, "height": 8}
    want = oracle(pipe, num_inference_steps=2, guidance_scale=3.0, **size, **short)
    pipe = opened(folder, low_memory=low_memory)
    drawn = pipe(PROMPT, seed=SEED - 1, count=2, steps=2, guidance=3.0, **size).images
    assert psnr(np.asarray(drawn[1]), want) > DB


def test_from_single_files(klein, cache, tmp_path):
    """The transformer with and without a prefix, the VAE under its authors' names, ComfyUI's names of files. The name
    says which of the two it is."""
    pipe, folder = klein["base"]
    net = {k: x.numpy() for k, x in from_diffusers(pipe.transformer.state_dict()).items()}
    bfl = original.vae({k: x.numpy() for k, x in pipe.vae.state_dict().items()})
    bfl = {f"{'decoder' if 'post' in k else 'encoder'}.{k}" if "quant_conv" in k else k: x for k, x in bfl.items()}
    text = {k: x.numpy() for k, x in pipe.text_encoder.model.state_dict().items()}
    typed = [PROMPT, "--steps", "4", "--tokenizer", str(folder / "tokenizer")]
    beside = tmp_path / "beside"
    file = full(beside / "flux-2-klein-4b.safetensors", original.under("model.diffusion_model.", net))
    full(beside / "flux2-vae.safetensors", bfl)
    full(beside / "qwen_3_4b.safetensors", original.under("model.", text))
    drawn, _ = command(cache, tmp_path / "a.png", *typed, "-m", str(file), process=True)
    assert psnr(drawn, oracle(klein["distilled"][0], num_inference_steps=4)) > DB
    alone = full(tmp_path / "flux-2-klein-base-4b.safetensors", net)
    given = ["--vae", str(beside / "flux2-vae.safetensors"), "--text-encoder", str(beside / "qwen_3_4b.safetensors")]
    drawn, _ = command(cache, tmp_path / "b.png", *typed, "-m", str(alone), *given)
    assert psnr(drawn, oracle(pipe, num_inference_steps=4, guidance_scale=4.0)) > DB


@pytest.mark.usefixtures("short")
def test_8_bits_are_near(tmp_path):
    """Over three prompts; widths that groups of 32 divide."""
    made(tmp_path / "words", width=64, head=32, text=32).save_pretrained(tmp_path / "wide")
    whole, small = opened(tmp_path / "wide"), opened(tmp_path / "wide", bits=8)
    assert {"text_encoder", "transformer"} <= small.description.error.keys()
    for prompt in (PROMPT, OTHER, "a red house"):
        a, b = (np.asarray(p(prompt, seed=SEED, steps=2, guidance=1.0, **SIZE).image) for p in (whole, small))
        assert psnr(a, b) > 35


# ---- what is refused


def test_what_klein_refuses(klein):
    distilled, base = (opened(klein[kind][1]) for kind in ("distilled", "base"))
    for pipe, settings, said in (
        (distilled, {"guidance": 4.0}, "distilled takes no guidance, and 4 was given"),
        (distilled, {"negative": "blue"}, "has no place for a negative prompt"),
        (base, {"true_cfg": 2.0, "negative": ""}, "true_cfg is for FLUX.1; base is FLUX.2 klein"),
        (base, {"width": 44}, "44 is not a multiple of 8"),
    ):
        with pytest.raises(Error, match=said):
            pipe.resolve(PROMPT, **settings)


def test_taesd_is_refused_before_a_fetch(klein):
    folder = klein["base"][1]
    with pytest.raises(Error, match=r"mlxdiff reads no TAESD for FLUX.2 klein."):
        opened(folder, taesd="auto").description.check_taesd(16)


def test_parts_that_do_not_belong(klein, tmp_path):
    """FLUX.1's VAE, and an encoder of another width."""
    pipe, folder = klein["base"]
    net = {k: x.numpy() for k, x in from_diffusers(pipe.transformer.state_dict()).items()}
    file = full(tmp_path / "klein.safetensors", net)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    own = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=16, **kinds)
    own.save_pretrained(tmp_path / "ae")
    parts = {"text_encoder": folder / "text_encoder", "vae": tmp_path / "ae"}
    with pytest.raises(Error, match=r"takes latents 32 wide and a vae .* gives 16"):
        convert.convert(file, tmp_path / "out", tokenizer=folder / "tokenizer", parts=parts)
    with pytest.raises(Error, match="holds a VAE, not the Qwen3 text encoder"):
        convert.open(file, parts={"text_encoder": tmp_path / "ae"})
    assert not (tmp_path / "out").exists()


def test_what_a_published_file_lacks_is_named_with_its_place_and_size(tmp_path):
    file = sparse(tmp_path / "flux-2-klein-4b.safetensors", manifest("flux2_klein_4b")["tensors"], dtype="BF16")
    said = r"FLUX.2-klein-4B has text_encoder \(8.0 GB\) and vae \(0.2 GB\)"
    with pytest.raises(Error) as e:
        convert.convert(file, tmp_path / "out")
    assert "holds only transformer, without text_encoder, vae" in e.value.problem
    assert re.search(said, e.value.fix)


def test_dev_converts_and_says_why_it_does_not_draw(klein, tmp_path):
    """From a folder, whose text encoder is not read, though it is not even there."""
    pipe, folder = klein["base"]
    net = Flux2Transformer2DModel(
        in_channels=32, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=20, guidance_embeds=True, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    net.save_pretrained(tmp_path / "dev" / "transformer")
    pipe.vae.save_pretrained(tmp_path / "dev" / "vae")
    pipe.scheduler.save_pretrained(tmp_path / "dev" / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "Flux2Pipeline", "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"]}
    (tmp_path / "dev" / "model_index.json").write_text(json.dumps(index))
    made = convert.convert(tmp_path / "dev", tmp_path / "out")
    with pytest.raises(Error, match="dev model, which also needs its text encoder, Mistral Small of 24B parameters"):
        opened(made)


def test_the_estimate_counts_a_small_decoder(klein):
    model = opened(klein["base"][1])
    request = model.resolve(PROMPT, width=512, height=512)
    own = model.description
    small = replace(own.components["vae"], decoder_channels=(4, 12, 16))
    fewer = replace(own, components=own.components | {"vae": small})
    decode = [memory.peaks(memory.Workload(m, request), gpu=False).decode for m in (own, fewer)]
    assert decode[1] < 0.7 * decode[0]
