"""ControlNets against diffusers on the same random weights: residuals (1e-4, float32 in another order) and whole
pictures (40 dB as for whole pipelines)."""

import re
from dataclasses import fields, replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    HeunDiscreteScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from mlx.utils import tree_flatten
from PIL import Image
from safetensors.torch import save_file

import mlxdiff
from mlxdiff import convert
from mlxdiff.models import controlnet, unet
from tests import original

from . import tiny
from .oracle import error, give, nchw, nhwc, randomize
from .test_pipelines import DB, NEGATIVE, PROMPT, SEED, SIZE, oracle, psnr
from .test_unet import CASES, inputs, ready

pytestmark = pytest.mark.usefixtures("cache")
HINT = (5, 7, 9)  # halved twice, as the tiny VAE does


def picture(seed: int, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Squares of 8 pixels: finer things would be lost in the convolutions."""
    rng = np.random.default_rng(seed)
    squares = rng.integers(0, 255, (size[1] // 8, size[0] // 8, 3), np.uint8)
    return Image.fromarray(squares.repeat(8, 0).repeat(8, 1))


# ---- the network


@pytest.mark.parametrize("case", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("pooled", [False, True])
def test_residuals_equal_diffusers(case, pooled):
    base, extra = CASES[case]
    shared = {f.name: getattr(base, f.name) for f in fields(unet.HalfConfig)}
    config = controlnet.Config(**shared, hint_channels=3, hint=HINT, pooled=pooled)
    added = {}
    if base.added is not None:
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": base.added_time}
        added["projection_class_embeddings_input_dim"] = base.added
    theirs = ControlNetModel(
        block_out_channels=base.channels,
        layers_per_block=base.layers[0],
        down_block_types=tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in base.depth),
        attention_head_dim=base.heads,
        cross_attention_dim=base.context,
        norm_num_groups=base.groups,
        use_linear_projection=base.linear_projection,
        conditioning_embedding_out_channels=HINT,
        global_pool_conditions=pooled,
        **added,
        **extra,
    )
    config = replace(config, layers=(base.layers[0],) * len(base.layers), depth=depth_of(base))
    ours = give(randomize(theirs, 1), controlnet.ControlNet(config))
    x, cond = inputs(base, 2, 6, 8)
    pixels = np.random.default_rng(3).random((1, 3, 24, 32), np.float32)
    told = {k: torch.tensor(v) for k, v in cond.items()}
    pooled_text = {"text_embeds": told.get("pooled"), "time_ids": told.get("time_ids")}
    down, mid = theirs(
        torch.tensor(x), torch.tensor(481.25), told["context"], torch.tensor(pixels).expand(2, -1, -1, -1),
        added_cond_kwargs=pooled_text, return_dict=False,
    )  # fmt: skip
    hint = ours.hint(nhwc(pixels))
    found = ours(nhwc(x), 481.25, **ours.prepare([481.25], **ready(cond)), hint=hint)
    assert len(found) == len(down) + 1
    for a, b in zip(found, [*down, mid], strict=True):
        assert error(nchw(a), b.numpy()) < 1e-4


def depth_of(base: unet.Config) -> tuple:
    """That of a ControlNet in diffusers, which has as many residual blocks in every level as in the first."""
    return tuple((d[0],) * base.layers[0] if d else () for d in base.depth)


def test_the_original_names_mean_the_same(tmp_path):
    theirs = ControlNetModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=16,
        conditioning_embedding_out_channels=(4, 6, 8, 10),
    )
    theirs = randomize(theirs, 1)
    theirs.save_pretrained(tmp_path / "folder")
    names, state = theirs.state_dict(), {}
    guides = {n: w for n, w in names.items() if n.startswith("controlnet_")}
    for name, w in guides.items():
        if m := re.match(r"controlnet_cond_embedding\.(conv_in|conv_out|blocks\.(\d))\.(.*)", name):
            number = {"conv_in": 0, "conv_out": 14}.get(m[1], 2 + 2 * int(m[2] or 0))
            state[f"input_hint_block.{number}.{m[3]}"] = w
        elif m := re.match(r"controlnet_down_blocks\.(\d)\.(.*)", name):
            state[f"zero_convs.{m[1]}.0.{m[2]}"] = w
        else:
            state[name.replace("controlnet_mid_block", "middle_block_out.0")] = w
    state |= original.unet({n: w for n, w in names.items() if n not in guides})
    save_file({f"control_model.{n}": w for n, w in state.items()}, tmp_path / "single.safetensors")
    (one,), (other,) = (convert.read(tmp_path / name, mx.float32).values() for name in ("folder", "single.safetensors"))
    held = dict(tree_flatten(other.parameters()))
    assert one.config == other.config
    assert all((w == held[n]).all() for n, w in tree_flatten(one.parameters()))


# ---- pictures

PIPELINES = {
    "sd1": StableDiffusionControlNetPipeline,
    "sd2": StableDiffusionControlNetPipeline,
    "sdxl": StableDiffusionXLControlNetPipeline,
}
CFG = {"num_inference_steps": 2, "guidance_scale": 5.0, "negative_prompt": NEGATIVE}
SAME = {"steps": 2, "guidance": 5.0, "negative": NEGATIVE}


def guide_of(net, seed: int, **config) -> ControlNetModel:
    """A ControlNet for a U-Net. Its last layers, which are zeros when training begins, count."""
    made = ControlNetModel.from_unet(net, conditioning_embedding_out_channels=HINT)
    made = randomize(ControlNetModel.from_config({**made.config, **config}), seed)
    return tiny.louder(made, 4, ("cond_embedding.blocks", "cond_embedding.conv_in.weight"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """name -> (diffusers pipeline without control, our pipeline, two ControlNets, their folders)"""
    root, made = tmp_path_factory.mktemp("control"), {}
    for name in PIPELINES:
        theirs = getattr(tiny, name)(root / f"{name}-words")
        theirs.save_pretrained(root / name)
        nets = [guide_of(theirs.unet, seed) for seed in (1, 2)]
        for i, net in enumerate(nets):
            net.save_pretrained(root / f"{name}-{i}")
        ours = mlxdiff.load(root / name, dtype="float32")
        made[name] = theirs, ours, nets, [root / f"{name}-{i}" for i in range(2)]
    return made


def guided(theirs, name: str, nets, **settings) -> np.ndarray:
    parts = {k: v for k, v in theirs.components.items() if k != "image_encoder" or name == "sdxl"}
    pipe = PIPELINES[name](**parts, controlnet=nets, **({"requires_safety_checker": False} if name != "sdxl" else {}))
    pipe.set_progress_bar_config(disable=True)
    return oracle(pipe, **(CFG | settings))


def drawn(pipe, *controls, **settings) -> np.ndarray:
    return np.asarray(pipe(PROMPT, seed=SEED, controls=controls, **(SAME | SIZE | settings)).image)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_controlnet_draws_as_in_diffusers(models, name):
    theirs, ours, nets, folders = models[name]
    want = guided(theirs, name, nets[0], image=picture(1), controlnet_conditioning_scale=0.7)
    found = drawn(ours, (folders[0], picture(1), 0.7))
    assert psnr(found, want) > DB
    assert psnr(drawn(ours), want) < DB - 10  # without it the picture is another
    assert psnr(drawn(ours, (folders[0], picture(2), 0.7)), want) < DB - 10  # and of another picture too


def test_two_controlnets_each_in_its_steps(models):
    theirs, ours, nets, folders = models["sd1"]
    settings = {"num_inference_steps": 4, "control_guidance_start": [0.2, 0.0], "control_guidance_end": [1.0, 0.3]}
    settings["controlnet_conditioning_scale"] = [0.9, 1.8]
    want = guided(theirs, "sd1", nets, image=[picture(1), picture(2)], **settings)
    controls = [(folders[0], picture(1), 0.9, 0.2, 1), (folders[1], picture(2), 1.8, 0, 0.3)]
    found = drawn(ours, *controls, steps=4)
    assert psnr(found, want) > DB
    assert psnr(drawn(ours, controls[0], steps=4), want) < DB - 10
    whole = [(folders[0], picture(1), 0.9), (folders[1], picture(2), 1.8)]
    assert psnr(drawn(ours, *whole, steps=4), want) < DB  # the intervals count


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_guess_guides_the_prompts_pass_alone(models, name):
    theirs, ours, nets, folders = models[name]
    want = guided(theirs, name, nets[0], image=picture(1), guess_mode=True)
    control = (folders[0], picture(1))
    assert psnr(drawn(ours, control, guess=True), want) > DB
    assert psnr(drawn(ours, control), want) < DB - 10


def test_a_pooled_controlnet(models, tmp_path):
    """As the one of shuffled pictures: its residuals are averages, for the prompt's pass alone."""
    theirs, ours, _, _ = models["sd1"]
    net = guide_of(theirs.unet, 3, global_pool_conditions=True)
    net.save_pretrained(tmp_path / "shuffle")
    want = guided(theirs, "sd1", net, image=picture(1))
    assert psnr(drawn(ours, (tmp_path / "shuffle", picture(1))), want) > DB
    assert psnr(drawn(ours), want) < DB - 10


def test_from_a_start_image_the_steps_that_are_taken_count(models):
    theirs, ours, nets, folders = models["sd1"]
    parts = {k: v for k, v in theirs.components.items() if k != "image_encoder"}
    pipe = StableDiffusionControlNetImg2ImgPipeline(**parts, controlnet=nets[0], requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "strength": 0.8, "control_guidance_end": 0.5}
    settings["controlnet_conditioning_scale"] = 1.0
    want = oracle(pipe, image=picture(4), control_image=picture(1), **(CFG | settings))
    control = (folders[0], picture(1), 1, 0, 0.5)
    assert psnr(drawn(ours, control, image=picture(4), strength=0.8, steps=5), want) > DB
    assert psnr(drawn(ours, control[:3], image=picture(4), strength=0.8, steps=5), want) < DB


def test_a_mask_and_a_control(models):
    theirs, ours, nets, folders = models["sd1"]
    parts = {k: v for k, v in theirs.components.items() if k != "image_encoder"}
    pipe = StableDiffusionControlNetInpaintPipeline(**parts, controlnet=nets[0], requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    hole = Image.new("L", (40, 24))
    hole.paste(255, (8, 4, 32, 20))
    given = {"image": picture(4), "mask_image": hole, "control_image": picture(1), "strength": 1.0}
    want = oracle(pipe, **given, controlnet_conditioning_scale=1.0, **CFG)
    control, masked = (folders[0], picture(1)), {"image": picture(4), "mask": hole, "strength": 1.0, "keep": False}
    assert psnr(drawn(ours, control, **masked), want) > DB
    assert psnr(drawn(ours, **masked), want) < DB - 10
    # Of a crop, the control picture is cut as the start image is: in the large picture it lies where the hole is.
    large, hole, control = (Image.new(kind, (80, 48)) for kind in ("RGB", "L", "RGB"))
    large.paste(picture(4), (8, 8)), hole.paste(255, (8, 8, 48, 32)), control.paste(picture(1), (8, 8))
    cropped = {"image": large, "mask": hole, "mask_crop": 0, "strength": 1.0, "keep": False}
    result = ours(PROMPT, seed=SEED, controls=[(folders[0], control)], **cropped, **SAME, **SIZE).image
    small = np.asarray(result.crop((8, 8, 48, 32)))
    whole = {"image": picture(4), "mask": Image.new("L", (40, 24), 255), "strength": 1.0}
    assert psnr(small, drawn(ours, (folders[0], picture(1)), **whole)) > DB


@pytest.mark.parametrize("strength", [0.7, 1.0])
def test_the_masked_start_image_guides(models, strength):
    """As the card of the ControlNet for inpainting has it: what the mask marks is -1, where pictures begin at 0."""
    theirs, ours, nets, folders = models["sd1"]
    parts = {k: v for k, v in theirs.components.items() if k != "image_encoder"}
    pipe = StableDiffusionControlNetInpaintPipeline(**parts, controlnet=nets[0], requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    hole = Image.new("L", (40, 24))
    hole.paste(255, (10, 4, 31, 19))
    shown = np.asarray(picture(4), np.float32) / 255
    shown = np.where(np.asarray(hole)[..., None] > 127, np.float32(-1), shown)
    shown = torch.tensor(shown).permute(2, 0, 1)[None]
    given = {"image": picture(4), "mask_image": hole, "control_image": shown, "strength": strength}
    want = oracle(pipe, **given, controlnet_conditioning_scale=0.9, **(CFG | {"num_inference_steps": 4}))
    masked = {"image": picture(4), "mask": hole, "keep": False, "steps": 4}
    masked |= {} if strength == 1 else {"strength": strength}  # 1 is the default beside such a control
    control = (str(folders[0]), "masked", 0.9)
    assert psnr(drawn(ours, control, **masked), want) > DB
    other = drawn(ours, (folders[0], picture(4), 0.9), **(masked | {"strength": strength}))
    assert psnr(other, want) < DB - 10  # the start image as it is


def test_low_memory_and_a_batch_draw_the_same(models):
    _, ours, _, folders = models["sd1"]
    controls = [(folders[0], picture(1)), (folders[1], picture(2), 0.5, 0, 0.5)]
    whole = drawn(ours, *controls)
    ours.low_memory = True
    try:
        small, guessed = drawn(ours, *controls), drawn(ours, *controls, guess=True)
    finally:
        ours.low_memory = False
    assert psnr(whole, small) > 50  # the same numbers in two batches instead of one
    assert psnr(drawn(ours, *controls, guess=True), guessed) > 50
    batch = ours(PROMPT, seed=SEED - 1, count=2, controls=controls, **SAME, **SIZE).images
    assert psnr(np.asarray(batch[1]), whole) > 50


def test_every_sampler_follows_a_control(models):
    """Heun calls the network twice in most steps."""
    theirs, ours, nets, folders = models["sd1"]
    own = theirs.scheduler
    theirs.scheduler = HeunDiscreteScheduler(**tiny.BETAS, steps_offset=1, timestep_spacing="leading")
    try:
        want = guided(theirs, "sd1", nets[0], image=picture(1))
    finally:
        theirs.scheduler = own
    assert psnr(drawn(ours, (folders[0], picture(1)), sampler="heun", schedule="leading"), want) > DB
