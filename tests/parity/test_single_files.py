"""Single files under the original authors' names, through the command line, against diffusers on the same weights.
Bound as in test_pipelines: 40 dB, float32 on both sides."""

import diffusers
import pytest
from transformers import CLIPTokenizer

from tests import clip_vocab
from tests.test_convert import BETAS, nets, single

from .test_pipelines import DB, NEGATIVE, PROMPT, command, oracle, psnr

BARE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A vocabulary of the 700 entries these text encoders have."""
    return clip_vocab.write(tmp_path_factory.mktemp("words"), clip_vocab.trained(186))


def ddim(**config) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **config)


def test_lcm_in_one_file_takes_its_guidance_as_an_embedding(words, cache, tmp_path):
    parts, tok = nets("sd1"), CLIPTokenizer.from_pretrained(words, model_max_length=77)
    scheduler = diffusers.LCMScheduler(**BETAS, timestep_spacing="leading")
    pipe = diffusers.LatentConsistencyModelPipeline(**parts, tokenizer=tok, scheduler=scheduler, **BARE)
    pipe.set_progress_bar_config(disable=True)
    file = single(tmp_path / "lcm.safetensors", "sd1", parts)
    args = (PROMPT, "-m", str(file), "--tokenizer", str(words), "-g", "6")
    drawn, said = command(cache, tmp_path / "a.png", *args, process=True)
    assert (said["request"]["sampler"], said["request"]["steps"]) == ("lcm", 4)  # nobody said it is an LCM
    assert psnr(drawn, oracle(pipe, num_inference_steps=4, guidance_scale=6.0)) > DB


def test_sd2_in_one_file_predicts_v(words, cache, tmp_path):
    parts, tok = nets("sd2"), CLIPTokenizer.from_pretrained(words, model_max_length=77, pad_token="!")
    scheduler = ddim(prediction_type="v_prediction")
    pipe = diffusers.StableDiffusionPipeline(**parts, tokenizer=tok, scheduler=scheduler, **BARE)
    pipe.set_progress_bar_config(disable=True)
    file = single(tmp_path / "sd2.safetensors", "sd2", parts)
    args = (PROMPT, "-n", NEGATIVE, "-m", str(file), "--tokenizer", str(words), "--prediction", "v", "-g", "5")
    drawn, _ = command(cache, tmp_path / "a.png", *args, "--sampler", "ddim", "--steps", "6")
    assert psnr(drawn, oracle(pipe, negative_prompt=NEGATIVE, num_inference_steps=6, guidance_scale=5.0)) > DB


def test_sdxl_in_one_file(words, cache, tmp_path):
    parts = nets("sdxl")
    toks = [CLIPTokenizer.from_pretrained(words, model_max_length=77, **pad) for pad in ({}, {"pad_token": "!"})]
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    pipe = diffusers.StableDiffusionXLPipeline(
        **parts, tokenizer=toks[0], tokenizer_2=toks[1], scheduler=scheduler, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    # The published widths: six sinusoids of 8 here, 256 there; a single file does not say, so the command is told
    # nothing either and must read it off the shapes.
    file = single(tmp_path / "sdxl.safetensors", "sdxl", parts)
    args = (PROMPT, "-n", NEGATIVE, "-m", str(file), "--tokenizer", str(words), "-g", "5", "--steps", "6")
    drawn, said = command(cache, tmp_path / "a.png", *args)
    assert said["request"]["sampler"] == "euler"
    assert psnr(drawn, oracle(pipe, negative_prompt=NEGATIVE, num_inference_steps=6, guidance_scale=5.0)) > DB
