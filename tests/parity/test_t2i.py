"""T2I-Adapters against diffusers on the same random weights: features (1e-4, float32 in another order) and whole
pictures (40 dB as for whole pipelines)."""

import re

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionAdapterPipeline, StableDiffusionXLAdapterPipeline, T2IAdapter
from mlx.utils import tree_flatten
from safetensors.torch import save_file

import mlxdiff
from mlxdiff import convert
from mlxdiff.errors import Error

from . import tiny
from .oracle import error, nchw, nhwc, randomize
from .test_controlnet import CFG, SAME, drawn, picture
from .test_pipelines import DB, oracle, psnr

pytestmark = pytest.mark.usefixtures("cache")
# kind -> its family's pipeline, and settings of the adapter that fits the U-Nets below
KINDS = {
    "full_adapter": ("sd1", {"channels": [24, 40, 40], "num_res_blocks": 2, "downscale_factor": 4}),
    "light_adapter": ("sd1", {"channels": [24, 40], "num_res_blocks": 3, "downscale_factor": 4}),
    "full_adapter_xl": ("sdxl", {"channels": [24, 40, 48, 48], "num_res_blocks": 2, "downscale_factor": 8}),
}


def adapter(kind: str, seed: int = 1, **settings) -> T2IAdapter:
    made = randomize(T2IAdapter(adapter_type=kind, **{**KINDS[kind][1], **settings}), seed)
    return tiny.louder(made, 3, ("conv_in.weight", "body.0.in_conv.weight"))


def unet(name: str):
    """Of three levels: with two, an adapter of the published kinds would not fit."""
    if name == "sd1":
        return tiny.unet(
            1, 5, cross_attention_dim=48, attention_head_dim=(3, 5, 5), block_out_channels=(24, 40, 40),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    return tiny.unet(
        7, 1, cross_attention_dim=80, attention_head_dim=(3, 5, 6), use_linear_projection=True,
        transformer_layers_per_block=(1, 1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 6 * 8, block_out_channels=(24, 40, 48),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """name -> (diffusers pipeline, our pipeline)"""
    root, made = tmp_path_factory.mktemp("t2i"), {}
    for name in ("sd1", "sdxl"):
        theirs = getattr(tiny, name)(root / f"{name}-words")
        theirs.register_modules(unet=unet(name))
        theirs.save_pretrained(root / name)
        made[name] = theirs, mlxdiff.load(root / name, dtype="float32")
    return made


def guided(theirs, adapters, **settings) -> np.ndarray:
    parts = {k: v for k, v in theirs.components.items() if k != "image_encoder"}
    if isinstance(theirs.unet.config.attention_head_dim, list | tuple) and "text_encoder_2" in parts:
        pipe = StableDiffusionXLAdapterPipeline(**parts, adapter=adapters)
    else:
        pipe = StableDiffusionAdapterPipeline(**parts, adapter=adapters, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return oracle(pipe, **(CFG | settings))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [3, 1])
def test_features_equal_diffusers(kind, channels, tmp_path):
    theirs = adapter(kind, in_channels=channels)
    theirs.save_pretrained(tmp_path)
    (ours,) = convert.read(tmp_path, mx.float32).values()
    grey = np.random.default_rng(1).random((1, 1, 24, 40), np.float32)
    rgb = np.random.default_rng(1).random((1, 3, 24, 40), np.float32) if channels == 3 else grey.repeat(3, 1)
    for a, b in zip(ours(nhwc(rgb)), theirs(torch.tensor(rgb[:, :channels])), strict=True):
        assert error(nchw(a), b.numpy()) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_draws_as_in_diffusers(models, kind, tmp_path):
    theirs, ours = models[KINDS[kind][0]]
    net = adapter(kind)
    net.save_pretrained(tmp_path)
    want = guided(theirs, net, image=picture(1), adapter_conditioning_scale=0.7)
    assert psnr(drawn(ours, (tmp_path, picture(1), 0.7)), want) > DB
    assert psnr(drawn(ours), want) < DB - 10  # without it the picture is another
    assert psnr(drawn(ours, (tmp_path, picture(2), 0.7)), want) < DB - 10  # and of another picture too


def test_two_adapters(models, tmp_path):
    theirs, ours = models["sd1"]
    nets = [adapter("full_adapter", 1), adapter("full_adapter", 2)]
    for i, net in enumerate(nets):
        net.save_pretrained(tmp_path / str(i))
    want = guided(theirs, nets, image=[picture(1), picture(2)], adapter_conditioning_scale=[0.5, 0.9])
    controls = [(tmp_path / "0", picture(1), 0.5), (tmp_path / "1", picture(2), 0.9)]
    assert psnr(drawn(ours, *controls), want) > DB
    assert psnr(drawn(ours, controls[0]), want) < DB - 10


def test_an_adapter_in_the_first_steps(models, tmp_path):
    theirs, ours = models["sdxl"]
    net = adapter("full_adapter_xl")
    net.save_pretrained(tmp_path)
    want = guided(theirs, net, image=picture(1), adapter_conditioning_factor=0.25, num_inference_steps=4)
    assert psnr(drawn(ours, (tmp_path, picture(1), 1, 0, 0.25), steps=4), want) > DB
    assert psnr(drawn(ours, (tmp_path, picture(1)), steps=4), want) < DB


def test_low_memory_and_a_batch_draw_the_same(models, tmp_path):
    _, ours = models["sd1"]
    adapter("full_adapter").save_pretrained(tmp_path)
    for settings in ({}, {"guess": True}):
        whole = drawn(ours, (tmp_path, picture(1)), **settings)
        batch = ours("a red fox in the snow, highly detailed", seed=10, count=2, width=40, height=24,
                     controls=[(tmp_path, picture(1))], **SAME, **settings).images  # fmt: skip
        assert psnr(np.asarray(batch[1]), whole) > 50
        ours.low_memory = True
        try:
            assert psnr(drawn(ours, (tmp_path, picture(1)), **settings), whole) > 50
        finally:
            ours.low_memory = False


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_names_mean_the_same(kind, tmp_path):
    theirs = adapter(kind, downscale_factor=16 if kind.endswith("xl") else 8)
    theirs.save_pretrained(tmp_path / "folder")
    state = {}
    for name, w in theirs.state_dict().items():
        name = name.removeprefix("adapter.")
        if m := re.match(r"body\.(\d)\.(?:resnets\.(\d)\.)?(.*)", name):
            i, j, rest = int(m[1]), m[2], m[3]
            name = f"body.{2 * i + int(j or 0)}.{rest}"
            if kind == "light_adapter":
                name = f"body.{i}.{rest}" if j is None else f"body.{i}.body.{j}.{rest}"
        state[name] = w
    save_file(state, tmp_path / "single.safetensors")
    (one,), (other,) = (convert.read(tmp_path / name, mx.float32).values() for name in ("folder", "single.safetensors"))
    held = dict(tree_flatten(other.parameters()))
    assert one.config == other.config
    assert all((w == held[n]).all() for n, w in tree_flatten(one.parameters()))


def test_what_does_not_fit_is_named(models, tmp_path):
    _, ours = models["sdxl"]
    adapter("full_adapter").save_pretrained(tmp_path / "full")
    with pytest.raises(
        Error, match=r"gives 24 channels at 1/4, 40 channels at 1/8, 40 channels at 1/16, which are not"
    ):
        drawn(ours, (tmp_path / "full", picture(1)))
    adapter("full_adapter_xl").save_pretrained(tmp_path / "xl")
    with pytest.raises(Error, match=r"reads edges in multiples of 8; the picture has 36x28\. Use 32x24"):
        drawn(ours, (tmp_path / "xl", picture(1)), width=36, height=28)
