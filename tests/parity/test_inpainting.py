"""Pictures of which a part is drawn anew, against diffusers' pipelines for that: same weights, prompt, seed, image,
mask and strength. Bound: 40 dB as for pictures from noise; float32 on both sides, so it is far above."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FluxControlImg2ImgPipeline,
    FluxControlInpaintPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxInpaintPipeline,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    StableDiffusion3InpaintPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    ZImageInpaintPipeline,
)
from PIL import Image, ImageDraw

from mlxdiff import images
from mlxdiff.errors import Error

from . import tiny
from .oracle import randomize
from .test_flow_pipelines import opened
from .test_image_to_image import image
from .test_pipelines import DB, NEGATIVE, PROMPT, SEED, command, psnr

CLASSES = {
    "sd1": StableDiffusionInpaintPipeline,
    "sdxl": StableDiffusionXLInpaintPipeline,
    "sd3": StableDiffusion3InpaintPipeline,
    "flux": FluxInpaintPipeline,
    "sd1-9": StableDiffusionInpaintPipeline,
    "sdxl-9": StableDiffusionXLInpaintPipeline,
    "fill": FluxFillPipeline,
    "zimage": ZImageInpaintPipeline,
    "control": FluxControlInpaintPipeline,
}
CONTROLS = (FluxControlPipeline, FluxControlImg2ImgPipeline, FluxControlInpaintPipeline)
WAYS = {"down": "DownEncoder", "up": "UpDecoder"}
GUIDED = {"negative": NEGATIVE, "steps": 4, "guidance": 4.0}
CASES = dict.fromkeys(CLASSES, GUIDED) | {name: {"steps": 4, "guidance": 3.5} for name in ("flux", "fill")}
del CASES["control"]  # it has a test of its own
CASES["zimage"] = {"steps": 4, "guidance": 1.0}


def mask(width: int = 40, height: int = 24) -> Image.Image:
    """A part whose edges lie between latents, and a smaller one that is too grey to count."""
    drawn = Image.new("L", (width, height))
    ImageDraw.Draw(drawn).rectangle((5, 3, width // 2, height - 6), fill=255)
    ImageDraw.Draw(drawn).rectangle((width - 12, 4, width - 5, 11), fill=127)
    return drawn


def size(name: str) -> tuple[int, int]:
    return (64, 32) if name == "fill" else (40, 24)


@pytest.fixture(scope="module")
def oracles(tmp_path_factory, cache) -> dict:
    """name -> (diffusers pipeline, folder it was saved in)"""
    root, made = tmp_path_factory.mktemp("inpaint"), {}
    for name, cls in CLASSES.items():
        parts = getattr(tiny, {"fill": "flux", "control": "flux"}.get(name, name.split("-")[0]))(
            root / f"{name}-words"
        ).components
        torch.manual_seed(1)
        if name.endswith("-9"):
            net = UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9)
            parts["unet"] = tiny.stir(net, 7, 5 if name == "sd1-9" else 1)
            parts["unet"].conv_in.weight.data[:, 4:] *= 4
        if name == "fill":  # its pipeline packs 8 x 8 pixels of the mask
            levels = {"block_out_channels": (8, 8, 16, 24)}
            levels |= {f"{way}_block_types": (f"{kind}Block2D",) * 4 for way, kind in WAYS.items()}
            parts["vae"] = tiny.stir(AutoencoderKL.from_config(parts["vae"].config, **levels), 31)
        if name in ("fill", "control"):
            more = {"in_channels": {"fill": 384, "control": 128}[name], "out_channels": 64}
            net = FluxTransformer2DModel.from_config(parts["transformer"].config, **more)
            parts["transformer"] = tiny.louder(randomize(net, 34), 4, ("context_embedder.weight",))
        parts["vae"].encoder.conv_out.weight.data.mul_(8)  # else another image would change the picture by 40 dB only
        if parts["vae"].quant_conv is not None:
            parts["vae"].quant_conv.weight.data[:4] *= 4  # the mean
        parts = {part: value for part, value in parts.items() if value is not None}
        pipe = cls(**parts | (tiny.BARE if name.startswith("sd1") else {}))
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(root / name)
        made[name] = pipe, root / name
    return made


def theirs(pipe, picture: Image.Image, hole: Image.Image, seed: int = SEED, **settings) -> np.ndarray:
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "negative": "negative_prompt"}
    edges = {"width": settings.pop("width", picture.width), "height": settings.pop("height", picture.height)}
    settings = {names.get(k, k): v for k, v in settings.items()} | edges
    if isinstance(pipe, ZImageInpaintPipeline):  # its guidance is one less than the usual number
        settings["guidance_scale"] -= 1
    if isinstance(pipe, StableDiffusionXLInpaintPipeline):
        settings |= dict.fromkeys(("original_size", "target_size"), (edges["height"], edges["width"]))
    flawed = isinstance(pipe, StableDiffusion3InpaintPipeline)  # it forgets the VAE's shift
    settings |= {"output_type": "latent"} if flawed else {}
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = pipe(PROMPT, image=picture, mask_image=hole, generator=generator, **settings).images
    if flawed:
        with torch.no_grad():
            pixels = pipe.vae.decode(drawn / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor)[0]
        drawn = pipe.image_processor.postprocess(pixels)
    return np.asarray(drawn[0])


def ours(folder, picture: Image.Image, hole: Image.Image, low_memory: bool = False, **settings) -> np.ndarray:
    settings = {"seed": SEED, "keep": False} | settings
    return np.asarray(opened(folder, low_memory=low_memory)(PROMPT, image=picture, mask=hole, **settings).image)


@pytest.mark.parametrize("name", CASES)
def test_inpainting(oracles, name):
    pipe, folder = oracles[name]
    edges, case = size(name), CASES[name]
    for strength in (0.6, 1.0):
        want = theirs(pipe, image(1, *edges), mask(*edges), strength=strength, **case)
        assert psnr(ours(folder, image(1, *edges), mask(*edges), strength=strength, **case), want) > DB
        assert psnr(want, theirs(pipe, image(2, *edges), mask(*edges), strength=strength, **case)) < DB - 10
        turned = mask(*edges).transpose(Image.Transpose.ROTATE_180)  # the oracle looks at its mask
        assert psnr(want, theirs(pipe, image(1, *edges), turned, strength=strength, **case)) < DB - 10
    small = ours(folder, image(1, *edges), mask(*edges), strength=1.0, low_memory=True, **case)
    assert psnr(small, want) > DB


SCHEDULERS = {
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "ddpm": DDPMScheduler,
}


@pytest.mark.parametrize(
    ("name", "sampler", "strength"),
    [
        *(("sd1", sampler, 0.6) for sampler in SCHEDULERS),
        *(("sd1", sampler, 1.0) for sampler in ("heun", "euler_ancestral")),
        *(("sd1-9", "euler_ancestral", strength) for strength in (0.6, 1.0)),
    ],
)
def test_samplers(oracles, name, sampler, strength):
    """Those that add noise go on after the draws for image, start and masked image, of which diffusers makes all."""
    pipe, folder = oracles[name]
    own = pipe.scheduler
    pipe.scheduler = SCHEDULERS[sampler].from_config(own.config, timestep_spacing="leading")
    settings = {"steps": 5, "guidance": 4.0, "strength": strength}
    try:
        want = theirs(pipe, image(1), mask(), **settings)
    finally:
        pipe.scheduler = own
    assert psnr(ours(folder, image(1), mask(), sampler=sampler, schedule="leading", **settings), want) > DB


@pytest.mark.parametrize("name", ["sd1", "sdxl-9"])
def test_a_batch_draws_its_members(oracles, name):
    """Each seed draws for itself, for its samples of the image and of the masked image too."""
    pipe, folder = oracles[name]
    settings = CASES[name] | {"strength": 0.6}
    request = {"image": image(1), "mask": mask(), "keep": False, "seed": SEED, "count": 2}
    batch = opened(folder)(PROMPT, **request, **settings).images
    assert psnr(np.asarray(batch[1]), theirs(pipe, image(1), mask(), SEED + 1, **settings)) > DB
    assert psnr(np.asarray(batch[0]), np.asarray(batch[1])) < DB - 10


def test_a_crop_is_drawn_and_put_back(oracles):
    """16 x 10 pixels and one around them, widened from 18 x 12 to 20 x 12, the shape of what is drawn."""
    pipe, folder = oracles["sd1"]
    hole = Image.new("L", (72, 60))
    ImageDraw.Draw(hole).rectangle((51, 21, 66, 30), fill=255)
    edges, settings = {"width": 40, "height": 24}, CASES["sd1"] | {"strength": 1.0}
    want = theirs(pipe, image(1, 72, 60), hole, padding_mask_crop=1, **edges, **settings)
    drawn = ours(folder, image(1, 72, 60), hole, mask_crop=1, keep=True, **edges, **settings)
    assert psnr(drawn, want) > DB
    outside = np.asarray(hole) == 0
    assert np.array_equal(drawn[outside], np.asarray(image(1, 72, 60))[outside])
    assert psnr(drawn[~outside], np.asarray(image(1, 72, 60))[~outside]) < DB - 10


def test_through_the_command_line(oracles, cache, tmp_path):
    """The PNG draws the result again, and refuses another mask."""
    pipe, folder = oracles["sdxl-9"]
    image(1).save(tmp_path / "a.png")
    mask().save(tmp_path / "hole.png")
    args = ("-m", str(folder), "--steps", "4", "-g", "4", "-n", NEGATIVE, "-i", str(tmp_path / "a.png"))
    args += ("--mask", str(tmp_path / "hole.png"))
    drawn, said = command(cache, tmp_path / "out.png", PROMPT, *args, "--no-keep")
    want = theirs(pipe, image(1), mask(), strength=1.0, **GUIDED)
    assert psnr(drawn, want) > DB
    told = {name: said["request"][name] for name in ("mask", "strength", "keep")}
    assert told == {"mask": str(tmp_path / "hole.png"), "strength": 1.0, "keep": False}
    again, _ = command(cache, tmp_path / "again.png", "--from-image", str(tmp_path / "out.png"), "-m", str(folder))
    assert np.array_equal(drawn, again)
    request, _ = images.read_settings(tmp_path / "out.png")
    Image.new("L", (40, 24), 255).save(tmp_path / "hole.png")
    with pytest.raises(Error, match="The mask is not the one that these settings name"):
        opened(folder).resolve(request)


def test_a_control_picture_beside_the_latents(oracles):
    """FLUX Depth and Canny: from noise, from a start image, and under a mask."""
    folder, settings = oracles["control"][1], {"steps": 4, "guidance": 10.0}
    begins = {"image": image(1), "strength": 0.6}
    pipes = [cls(**oracles["control"][0].components) for cls in CONTROLS]
    for pipe, more in zip(pipes, ({}, begins, begins | {"mask": mask()}), strict=True):
        pipe.set_progress_bar_config(disable=True)
        same = {"num_inference_steps": 4, "guidance_scale": 10.0, "width": 40, "height": 24}
        same |= {{"mask": "mask_image"}.get(name, name): value for name, value in more.items()}

        def want(control: Image.Image, pipe=pipe, same=same) -> np.ndarray:
            generator = torch.Generator("cpu").manual_seed(SEED)
            return np.asarray(pipe(PROMPT, control_image=control, generator=generator, **same).images[0])

        keep = {"keep": False} if "mask" in more else {}
        own = {"controls": [image(3)], "seed": SEED, "width": 40, "height": 24} | settings | more | keep
        drawn = np.asarray(opened(folder)(PROMPT, **own).image)
        assert psnr(drawn, want(image(3))) > DB
        assert psnr(want(image(3)), want(image(2))) < DB - 10
    drawn = np.asarray(opened(folder, low_memory=True)(PROMPT, **own).image)
    assert psnr(drawn, want(image(3))) > DB
