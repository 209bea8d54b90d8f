"""Reference pictures through IP-Adapters against diffusers' `load_ip_adapter` with the same random weights. diffusers
is handed pixels: it would resize by torchvision. Pictures: 40 dB, as for whole pipelines."""

import inspect
import re

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import mlxdiff
from mlxdiff.references import pixels
from mlxdiff.store.references import find, read

from . import adapters, tiny
from .oracle import error, nchw, nhwc
from .test_pipelines import DB, NEGATIVE, PROMPT, SEED, SIZE, oracle, psnr

pytestmark = pytest.mark.usefixtures("cache")
CFG = {"num_inference_steps": 3, "guidance_scale": 5.0, "negative_prompt": NEGATIVE}
OURS = {"steps": 3, "guidance": 5.0, "negative": NEGATIVE, "seed": SEED} | SIZE


def picture(seed: int, size: tuple[int, int] = (50, 37)) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


def deep(folder):
    """SDXL with as many levels and attentions as the published one."""
    theirs, (first, *_) = tiny.sdxl(folder), tiny.CROSS["down_block_types"]
    config = theirs.unet.config | {
        "layers_per_block": 2, "block_out_channels": (16, 24, 40), "attention_head_dim": (2, 3, 5),
        "transformer_layers_per_block": (1, 1, 2), "down_block_types": ("DownBlock2D", first, first),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    names = inspect.signature(UNet2DConditionModel.__init__).parameters
    torch.manual_seed(7)
    net = UNet2DConditionModel(**{k: v for k, v in config.items() if k in names})
    theirs.register_modules(unet=tiny.stir(net, 7, 2))
    return theirs


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """name -> (diffusers pipeline, our pipeline)"""
    root, made = tmp_path_factory.mktemp("ip"), {}
    for name, make in {"sd1": tiny.sd1, "sdxl": deep}.items():
        theirs = make(root / f"{name}-words")
        theirs.set_progress_bar_config(disable=True)
        theirs.save_pretrained(root / name)
        theirs.register_modules(image_encoder=adapters.eyes())
        made[name] = theirs, mlxdiff.load(root / name, dtype="float32")
    return made


def loaded(theirs, states: list) -> None:
    theirs.load_ip_adapter(
        states, subfolder=[""] * len(states), weight_name=[""] * len(states), image_encoder_folder=None,
        low_cpu_mem_usage=False,
    )  # fmt: skip


def unloaded(theirs) -> None:
    encoder = theirs.image_encoder
    theirs.unload_ip_adapter()
    theirs.register_modules(image_encoder=encoder)


def wanted(theirs, states: list, scales: list[float], images: list[torch.Tensor], **settings) -> np.ndarray:
    loaded(theirs, states)
    try:
        theirs.set_ip_adapter_scale(scales)
        return oracle(theirs, ip_adapter_image=images, **(CFG | settings))
    finally:
        unloaded(theirs)


CONFIG = mlxdiff.models.vision.Config(32, 8, 32, 3, 2, 50, "gelu", 20, True, 1e-5)


def shown(*pictures: Image.Image) -> torch.Tensor:
    return torch.tensor(np.concatenate([nchw(pixels(p, CONFIG)) for p in pictures]))


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_one_picture_draws_as_in_diffusers(models, kind, tmp_path):
    theirs, ours = models["sd1"]
    state, image = getattr(adapters, kind)(theirs.unet, 1), picture(3)
    file = adapters.saved(tmp_path, state, theirs.image_encoder)
    want = wanted(theirs, [state], [0.7], [shown(image)])
    bare = oracle(theirs, **CFG)
    assert psnr(want, bare) < DB - 10  # else the comparison proves nothing
    assert psnr(np.asarray(ours(PROMPT, references=[(file, image, 0.7)], **OURS).image), want) > DB
    assert psnr(np.asarray(ours(PROMPT, **OURS).image), bare) > DB  # nothing stays


@pytest.mark.parametrize("kind", ["plain", "plus", "full"])
def test_keys_and_values_equal_diffusers(models, kind, tmp_path):
    """1e-5: float32 sums in another order; 1e-6 is seen."""
    theirs, ours = models["sd1"]
    state, seen = getattr(adapters, kind)(theirs.unet, 2), shown(picture(4))
    reader = find(adapters.saved(tmp_path, state, theirs.image_encoder), ours.description, offline=True)
    encoder, adapter = read(reader, mx.float32)
    found = adapter(encoder(nhwc(seen.numpy())))
    loaded(theirs, [state])
    try:
        out = theirs.image_encoder(seen, output_hidden_states=True)
        (project,) = theirs.unet.encoder_hid_proj.image_projection_layers
        tokens = project(out.image_embeds if kind == "plain" else out.hidden_states[-2])
        layers = [p for n, p in theirs.unet.attn_processors.items() if "attn2" in n]
        assert len(layers) == len(found)
        for layer, (k, v) in zip(layers, found, strict=True):
            assert error(k, layer.to_k_ip[0](tokens).detach()) < 1e-5
            assert error(v, layer.to_v_ip[0](tokens).detach()) < 1e-5
    finally:
        unloaded(theirs)


def test_xl_draws_as_in_diffusers(models, tmp_path):
    """SDXL, whose negative prompt is zeros if it is not given."""
    theirs, ours = models["sdxl"]
    state, image = adapters.plus(theirs.unet, 4), picture(5, (37, 50))
    file = adapters.saved(tmp_path, state, theirs.image_encoder)
    want = wanted(theirs, [state], [0.9], [shown(image)], negative_prompt=None)
    assert psnr(want, oracle(theirs, **(CFG | {"negative_prompt": None}))) < DB - 10
    settings = OURS | {"negative": None}
    assert psnr(np.asarray(ours(PROMPT, references=[(file, image, 0.9)], **settings).image), want) > DB


def test_several_pictures_and_adapters_draw_as_in_diffusers(models, tmp_path):
    """Two pictures for one adapter, side by side, and one for another."""
    theirs, ours = models["sd1"]
    states = [adapters.plain(theirs.unet, 6), adapters.plus(theirs.unet, 7)]
    files = [adapters.saved(tmp_path / str(i), s, theirs.image_encoder) for i, s in enumerate(states)]
    one, two, three = (picture(i) for i in (8, 9, 10))
    want = wanted(theirs, states, [0.8, 0.5], [shown(one, two), shown(three)])
    references = [(files[0], one, 0.8), (files[1], three, 0.5), (files[0], two, 0.8)]
    assert psnr(np.asarray(ours(PROMPT, references=references, **OURS).image), want) > DB
    fewer = np.asarray(ours(PROMPT, references=references[:2], **OURS).image)
    assert psnr(fewer, want) < DB - 10


# What diffusers' `set_ip_adapter_scale` calls the layers that InstantStyle names.
ASPECTS = {"style": {"up": {"block_0": [0.0, 0.9, 0.0]}}, "layout": {"down": {"block_2": [0.0, 0.9]}}}


@pytest.mark.parametrize("aspect", ASPECTS)
def test_style_or_layout_alone_draws_as_in_diffusers(models, aspect, tmp_path):
    theirs, ours = models["sdxl"]
    state, image = adapters.plus(theirs.unet, 4), picture(5)
    file = adapters.saved(tmp_path, state, theirs.image_encoder)
    steps = {"num_inference_steps": 2}
    whole, want = (wanted(theirs, [state], [how], [shown(image)], **steps) for how in (0.9, ASPECTS[aspect]))
    assert psnr(want, whole) < DB - 10
    assert psnr(want, oracle(theirs, **(CFG | steps))) < DB - 10
    drawn = ours(PROMPT, references=[(f"{file}:{aspect}", image, 0.9)], **(OURS | {"steps": 2}))
    assert psnr(np.asarray(drawn.image), want) > DB


def test_the_layers_have_diffusers_names(models):
    for theirs, ours in models.values():
        names = [n for n in theirs.unet.attn_processors if "attn2" in n]
        found = [
            re.sub(r"\.(\d+)$", r".transformer_blocks.\1.attn2.processor", n) for n in ours.description.net.readers
        ]
        assert found == names


@pytest.mark.parametrize("span", [(0, 0.5), (0.25, 1)])
def test_a_part_of_the_steps_draws_as_in_diffusers(models, span, tmp_path):
    """There a callback sets the scale of the next step."""
    theirs, ours = models["sd1"]
    state, image = adapters.plain(theirs.unet, 1), picture(3)
    file = adapters.saved(tmp_path, state, theirs.image_encoder)
    steps = {"num_inference_steps": 4}
    whole = wanted(theirs, [state], [2.0], [shown(image)], **steps)

    def scale(i: int) -> float:
        return 2.0 if span[0] * 4 <= i < span[1] * 4 else 0.0

    def after(pipe, i, t, tensors):
        pipe.set_ip_adapter_scale(scale(i + 1))
        return {}

    want = wanted(theirs, [state], [scale(0)], [shown(image)], callback_on_step_end=after, **steps)
    assert psnr(want, whole) < DB - 10
    drawn = ours(PROMPT, references=[(file, image, 2.0, *span)], **(OURS | {"steps": 4}))
    assert psnr(np.asarray(drawn.image), want) > DB


FLUX = {"num_inference_steps": 3, "max_sequence_length": 512}


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> tuple:
    root = tmp_path_factory.mktemp("ip-flux")
    theirs = tiny.flux(root / "words")
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(root / "flux")
    return theirs, mlxdiff.load(root / "flux", dtype="float32")


@pytest.mark.parametrize("guided", [False, True], ids=["one pass, not in the first step", "true_cfg"])
def test_flux_draws_as_in_diffusers(flux, guided, tmp_path):
    theirs, ours = flux
    state, image, encoder = adapters.xlabs(theirs.transformer, 11), picture(12), adapters.eyes()
    file = adapters.saved_by_xlabs(tmp_path, state, encoder)
    cfg = {"true_cfg_scale": 3.0, "negative_prompt": NEGATIVE} if guided else {}
    bare = oracle(theirs, **FLUX, **cfg)
    theirs.register_modules(
        image_encoder=encoder, feature_extractor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    )
    theirs.load_ip_adapter(
        state, weight_name="", image_encoder_pretrained_model_name_or_path=None, low_cpu_mem_usage=False
    )
    try:
        theirs.set_ip_adapter_scale(0.8 if guided else 0.0)
        cfg |= {"callback_on_step_end": lambda pipe, *_: pipe.set_ip_adapter_scale(0.8) or {}}
        want = oracle(theirs, ip_adapter_image=[shown(image)], **FLUX, **cfg)
    finally:
        theirs.unload_ip_adapter()
    assert psnr(want, bare) < DB - 10
    settings = SIZE | {"steps": 3, "seed": SEED} | ({"true_cfg": 3.0, "negative": NEGATIVE} if guided else {})
    span = () if guided else (0.3, 1)
    assert psnr(np.asarray(ours(PROMPT, references=[(file, image, 0.8, *span)], **settings).image), want) > DB
    assert psnr(np.asarray(ours(PROMPT, **settings).image), bare) > DB
