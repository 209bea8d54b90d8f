"""Pictures that begin with a picture, against diffusers' pipelines for that: same weights, prompt, seed, image and
strength. Bound: 40 dB as for pictures from noise; float32 on both sides, so it is far above."""

import numpy as np
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image

from . import tiny
from .test_flow_pipelines import opened
from .test_pipelines import DB, NEGATIVE, PROMPT, SEED, SIZE, command, psnr

CLASSES = {
    "sd1": StableDiffusionImg2ImgPipeline,
    "sd2": StableDiffusionImg2ImgPipeline,
    "sdxl": StableDiffusionXLImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
    "flux": FluxImg2ImgPipeline,
}
# 7 steps at 0.6 are 4 in Stable Diffusion and 5 in rectified flow, as diffusers rounds.
CASES = {
    "sd1": {"negative": NEGATIVE, "steps": 7, "guidance": 5.0, "strength": 0.6},
    "sd2": {"negative": NEGATIVE, "steps": 7, "guidance": 4.0, "strength": 0.35},
    "sdxl": {"negative": NEGATIVE, "steps": 7, "guidance": 4.0, "strength": 0.6},
    "sd3": {"negative": NEGATIVE, "steps": 7, "guidance": 4.0, "strength": 0.6},
    "flux": {"steps": 7, "guidance": 3.5, "strength": 0.6},
}


def image(seed: int, width: int = SIZE["width"], height: int = SIZE["height"]) -> Image.Image:
    """Colours that change by more than noise does."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def oracles(tmp_path_factory, cache) -> dict:
    """name -> (diffusers pipeline, folder it was saved in)"""
    root, made = tmp_path_factory.mktemp("image"), {}
    for name, cls in CLASSES.items():
        pipe = getattr(tiny, name)(root / f"{name}-words")
        pipe.vae.encoder.conv_out.weight.data.mul_(8)  # else another image would change the picture by 40 dB only
        pipe.save_pretrained(root / name)
        extra = tiny.BARE if name in ("sd1", "sd2") else {}
        made[name] = cls(**pipe.components | extra), root / name
        made[name][0].set_progress_bar_config(disable=True)
    return made


def theirs(pipe, picture: Image.Image, seed: int = SEED, **settings) -> np.ndarray:
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "negative": "negative_prompt"}
    settings = {names.get(k, k): v for k, v in settings.items()}
    if isinstance(
        pipe, StableDiffusionXLImg2ImgPipeline
    ):  # it takes the size from the latents times 8; here 4 is right
        settings |= dict.fromkeys(("original_size", "target_size"), (SIZE["height"], SIZE["width"]))
    if isinstance(pipe, FluxImg2ImgPipeline | StableDiffusion3Img2ImgPipeline):
        settings |= SIZE
    generator = torch.Generator("cpu").manual_seed(seed)
    return np.asarray(pipe(PROMPT, image=picture, generator=generator, **settings).images[0])


@pytest.mark.parametrize("name", CASES)
def test_image_to_image(oracles, name):
    pipe, folder = oracles[name]
    want = theirs(pipe, image(1), **CASES[name])
    ours = opened(folder)
    draw = lambda **other: np.asarray(ours(PROMPT, seed=SEED, image=image(1), **CASES[name] | other).image)  # noqa: E731
    assert psnr(draw(), want) > DB
    assert psnr(want, theirs(pipe, image(2), **CASES[name])) < DB - 10  # the oracle looks at its image
    whole = theirs(pipe, image(1), **CASES[name] | {"strength": 1.0})
    assert psnr(draw(strength=1.0), whole) > DB
    assert psnr(want, whole) < DB - 10


def test_a_sampler_that_adds_noise_goes_on_where_the_start_stopped(oracles):
    """The seed's draws: the VAE's sample, the start, then each step's."""
    pipe, folder = oracles["sd1"]
    own = pipe.scheduler
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(own.config, timestep_spacing="leading")
    settings = {"steps": 8, "guidance": 5.0, "strength": 0.5}
    try:
        want = theirs(pipe, image(1), **settings)
    finally:
        pipe.scheduler = own
    drawn = opened(folder)(PROMPT, seed=SEED, image=image(1), sampler="euler_ancestral", **settings).image
    assert psnr(np.asarray(drawn), want) > DB


def test_a_batch_draws_its_members_and_low_memory_the_same(oracles):
    pipe, folder = oracles["sd3"]
    ours, settings = opened(folder), CASES["sd3"]
    batch = ours(PROMPT, seed=SEED, image=image(1), count=2, **settings).images
    assert psnr(np.asarray(batch[1]), theirs(pipe, image(1), SEED + 1, **settings)) > DB
    small = opened(folder, low_memory=True)(PROMPT, seed=SEED, image=image(1), **settings).image
    assert psnr(np.asarray(small), np.asarray(batch[0])) > 50  # the same numbers in batches of another size


def test_through_the_command_line_with_another_size(oracles, cache, tmp_path):
    """Twice the size, of the same shape: scaled down by Lanczos as diffusers does."""
    pipe, folder = oracles["sdxl"]
    large = image(3, 80, 48)
    large.save(tmp_path / "large.png")
    args = ("-m", str(folder), "--steps", "7", "-g", "4", "-n", NEGATIVE, "--strength", "0.6")
    args += ("-i", str(tmp_path / "large.png"))
    drawn, said = command(cache, tmp_path / "a.png", PROMPT, *args, process=True)
    want = theirs(pipe, large.resize((SIZE["width"], SIZE["height"]), Image.Resampling.LANCZOS), **CASES["sdxl"])
    assert psnr(drawn, want) > DB
    assert (said["request"]["image"], said["request"]["strength"]) == (str(tmp_path / "large.png"), 0.6)
    again, _ = command(cache, tmp_path / "b.png", "--from-image", str(tmp_path / "a.png"), "-m", str(folder))
    assert np.array_equal(drawn, again)
