"""Whole pipelines through the command line against diffusers: same weights, prompt, seed and settings, same picture.
Bound: 40 dB, a mean error below 1 in 255 after 8-bit rounding; float32 on both sides, so it is usually far above."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler
from PIL import Image

import mlxdiff
from mlxdiff import generate

from . import tiny

PROMPT, NEGATIVE, SEED = "a red fox in the snow, highly detailed", "blurry moon", 11
SIZE = {"width": 40, "height": 24}  # latents of 10 x 6, then 5 x 3: odd where it matters
DB = 40


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture(scope="module")
def oracles(tmp_path_factory) -> dict:
    """name -> (diffusers pipeline, folder it was saved in)"""
    root, made = tmp_path_factory.mktemp("oracles"), {}
    for name in ("sd1", "sd2", "sdxl"):
        made[name] = getattr(tiny, name)(root / f"{name}-words"), root / name
    made["refiner"] = tiny.refiner(root / "refiner-words", made["sdxl"][0]), root / "refiner"
    for pipe, folder in made.values():
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(folder)
    return made


def command(cache: Path, out: Path, *args: str, process: bool = False) -> tuple[np.ndarray, dict]:
    """`python -m mlxdiff.generate ... --json`: the picture and what was printed. process: in one of its own, as a user
    runs it; else in this one, which is sooner there."""
    typed = [*args, "-o", str(out), "--json", "--dtype", "float32"]
    typed += ["-W", str(SIZE["width"]), "-H", str(SIZE["height"]), "-s", str(SEED)]
    if process:
        env = os.environ | {"MLXDIFF_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).parents[2])}
        call = [sys.executable, "-m", "mlxdiff.generate", *typed]
        ran = subprocess.run(call, capture_output=True, text=True, env=env, check=False)
        code, printed, complained = ran.returncode, ran.stdout, ran.stderr
    else:
        with (
            redirect_stdout(io.StringIO()) as o,
            redirect_stderr(io.StringIO()) as e,
            pytest.MonkeyPatch.context() as p,
        ):
            p.setenv("MLXDIFF_CACHE", str(cache))
            code = generate.main(typed)
        printed, complained = o.getvalue(), e.getvalue()
    assert code == 0, complained
    said = json.loads(printed)
    return np.asarray(Image.open(said["path"])), said


def oracle(pipe, **settings) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(SEED)
    return np.asarray(pipe(prompt=PROMPT, generator=generator, **(SIZE | settings)).images[0])


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_the_oracles_listen_to_their_prompts(oracles, name):
    """Else the tests below could not fail on a mistake in the text."""
    pipe, same = oracles[name][0], {"num_inference_steps": 6, "guidance_scale": 5.0}
    plain = oracle(pipe, negative_prompt=NEGATIVE, **same)
    assert psnr(plain, oracle(pipe, negative_prompt="", **same)) < DB - 10
    theirs = pipe("a blue boat", generator=torch.Generator("cpu").manual_seed(SEED), **SIZE, **same).images[0]
    assert psnr(plain, np.asarray(theirs)) < DB - 10


def test_sd1_with_a_negative_prompt(oracles, cache, tmp_path):
    pipe, folder = oracles["sd1"]
    typed = (PROMPT, "-n", NEGATIVE, "-m", str(folder), "--steps", "7", "-g", "6.5")
    drawn, said = command(cache, tmp_path / "a.png", *typed, process=True)
    assert (said["request"]["sampler"], said["request"]["schedule"]) == (
        "ddim",
        "leading",
    )  # the folder's own scheduler
    assert psnr(drawn, oracle(pipe, negative_prompt=NEGATIVE, num_inference_steps=7, guidance_scale=6.5)) > DB


def test_sd1_under_the_scheduler_it_was_published_with(oracles, cache, tmp_path):
    """PNDM, without its Runge-Kutta steps: nothing about it is typed."""
    pipe, _ = oracles["sd1"]
    own = pipe.scheduler
    pipe.scheduler = PNDMScheduler(**tiny.BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    try:
        pipe.save_pretrained(tmp_path / "model")
        want = oracle(pipe, negative_prompt=NEGATIVE, num_inference_steps=7, guidance_scale=5.0)
    finally:
        pipe.scheduler = own
    typed = (PROMPT, "-n", NEGATIVE, "-m", str(tmp_path / "model"), "--steps", "7", "-g", "5")
    drawn, said = command(cache, tmp_path / "a.png", *typed)
    assert (said["request"]["sampler"], said["request"]["schedule"]) == ("pndm", "leading")
    assert psnr(drawn, want) > DB


def test_sd2_predicts_v(oracles, cache, tmp_path):
    pipe, folder = oracles["sd2"]
    drawn, said = command(cache, tmp_path / "a.png", PROMPT, "-m", str(folder), "--steps", "6", "-g", "4")
    assert said["request"]["negative"] is None
    assert psnr(drawn, oracle(pipe, num_inference_steps=6, guidance_scale=4.0)) > DB


def test_sdxl_with_zeros_for_no_negative_prompt(oracles, cache, tmp_path):
    pipe, folder = oracles["sdxl"]
    drawn, said = command(cache, tmp_path / "a.png", PROMPT, "-m", str(folder), "--steps", "6", "-g", "5")
    assert (said["request"]["sampler"], said["request"]["schedule"]) == ("euler", "leading")
    assert psnr(drawn, oracle(pipe, num_inference_steps=6, guidance_scale=5.0)) > DB


def test_sdxl_with_an_empty_negative_prompt_is_another_picture(oracles, cache, tmp_path):
    pipe, folder = oracles["sdxl"]
    args = (PROMPT, "-n", "", "-m", str(folder), "--steps", "6", "-g", "5")
    drawn, _ = command(cache, tmp_path / "a.png", *args)
    theirs = oracle(pipe, negative_prompt="", num_inference_steps=6, guidance_scale=5.0)
    assert psnr(drawn, theirs) > DB
    assert psnr(theirs, oracle(pipe, num_inference_steps=6, guidance_scale=5.0)) < DB


def test_sdxl_hands_over_to_its_refiner(oracles, cache, tmp_path):
    base, folder = oracles["sdxl"]
    refiner, second = oracles["refiner"]
    args = (PROMPT, "-n", NEGATIVE, "-m", str(folder), "--refiner", str(second), "--refine-at", "0.6")
    drawn, _ = command(cache, tmp_path / "a.png", *args, "--steps", "10", "-g", "4", process=True)
    same = {"negative_prompt": NEGATIVE, "num_inference_steps": 10, "guidance_scale": 4.0}
    generator = torch.Generator("cpu").manual_seed(SEED)
    half = base(PROMPT, generator=generator, denoising_end=0.6, output_type="latent", **SIZE, **same).images
    # The oracle takes the size from the latents times the VAE's factor, and here that is 4, not 8.
    size = (SIZE["height"], SIZE["width"])
    theirs = refiner(
        PROMPT, image=half, denoising_start=0.6, original_size=size, target_size=size, generator=generator, **same
    ).images[0]
    assert psnr(drawn, np.asarray(theirs)) > DB


def test_karras_dpmpp_2m(oracles, cache, tmp_path):
    pipe, folder = oracles["sd1"]
    own = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(own.config, use_karras_sigmas=True)
    try:
        theirs = oracle(pipe, num_inference_steps=8, guidance_scale=5.0)
    finally:
        pipe.scheduler = own
    args = ("--sampler", "DPM++ 2M", "--schedule", "karras", "--steps", "8", "-g", "5")
    drawn, _ = command(cache, tmp_path / "a.png", PROMPT, "-m", str(folder), *args)
    assert psnr(drawn, theirs) > DB


def test_low_memory_draws_the_same_picture(oracles, cache, tmp_path):
    _, folder = oracles["sdxl"]
    args = (PROMPT, "-m", str(folder), "--steps", "4", "-g", "5")
    whole, _ = command(cache, tmp_path / "a.png", *args)
    small, _ = command(cache, tmp_path / "b.png", *args, "--low-memory")
    assert psnr(whole, small) > 50  # the same numbers in two batches instead of one


def test_the_same_seed_draws_the_same_bytes_and_a_batch_its_members(oracles, cache):
    pipe = mlxdiff.load(oracles["sd1"][1], dtype="float32")
    request = pipe.resolve(PROMPT, seed=5, steps=3, sampler="euler_ancestral", count=3, **SIZE)
    batch = [np.asarray(i) for i in pipe(request).images]
    again = [np.asarray(i) for i in pipe(request).images]
    assert all(np.array_equal(a, b) for a, b in zip(batch, again, strict=True))
    for i, member in enumerate(batch):
        alone = pipe(request, seed=5 + i, count=1).image
        assert psnr(member, np.asarray(alone)) > 50  # a batched matmul may round differently from a single one
    assert psnr(batch[0], batch[1]) < 40


def test_long_and_weighted_prompts_run_and_differ(oracles, cache):
    pipe = mlxdiff.load(oracles["sdxl"][1], dtype="float32")
    draw = lambda prompt: np.asarray(pipe(prompt, seed=5, steps=2, **SIZE).image)  # noqa: E731
    plain = draw("a red fox")
    assert psnr(plain, draw("a (red:1.0) fox")) > 50  # weight 1 is no weight
    assert psnr(plain, draw("a (red:1.5) fox")) < 40
    assert psnr(plain, draw("a red fox BREAK " + "snow " * 200)) < 40
