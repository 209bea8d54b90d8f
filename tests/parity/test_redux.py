"""FLUX Redux against diffusers' FluxPriorReduxPipeline and FluxPipeline with the same random weights. Tokens: 1e-5, as
float32 sums in another order. Pictures: 40 dB, as for whole pipelines."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import FluxPriorReduxPipeline
from safetensors.torch import save_file
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import mlxdiff
from mlxdiff.references import pixels
from mlxdiff.store.references import find, read

from . import adapters, tiny
from .oracle import error
from .test_ip_adapter import picture
from .test_pipelines import DB, NEGATIVE, PROMPT, SEED, SIZE, oracle, psnr

pytestmark = pytest.mark.usefixtures("cache")
PLAIN = {"num_inference_steps": 3}
OURS = SIZE | {"steps": 3, "seed": SEED}


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> tuple:
    """diffusers' pipeline, its prior, ours, and the prior's folder"""
    root = tmp_path_factory.mktemp("redux")
    theirs = tiny.flux(root / "words")
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(root / "flux")
    processor = SiglipImageProcessorPil(size={"height": 128, "width": 128})
    prior = FluxPriorReduxPipeline(
        adapters.siglip(), processor, adapters.redux(36), theirs.text_encoder, theirs.tokenizer,
        theirs.text_encoder_2, theirs.tokenizer_2,
    )  # fmt: skip
    prior.save_pretrained(root / "redux")
    return theirs, prior, mlxdiff.load(root / "flux", dtype="float32"), root / "redux"


def test_tokens_equal_diffusers(flux):
    _, prior, ours, folder = flux
    image = picture(1)
    want = prior.image_embedder(prior.encode_image(image, "cpu", 1)).image_embeds
    reader = find(folder, ours.description, offline=True)
    encoder, adapter = read(reader, mx.float32)
    assert error(adapter(encoder(pixels(image, reader.sees))), want) < 1e-5
    assert reader.workload.tokens == want.shape[1]


def test_a_picture_draws_as_in_diffusers(flux, tmp_path):
    """From diffusers' folder, and from the authors' file with the vision model beside it."""
    theirs, prior, ours, folder = flux
    image = picture(2)
    given = prior(image, prompt=PROMPT)
    want = oracle_of(theirs, given.prompt_embeds, given.pooled_prompt_embeds)
    bare = oracle(theirs, max_sequence_length=512, **PLAIN)
    assert psnr(want, bare) < DB - 10
    assert psnr(np.asarray(ours(PROMPT, references=[(folder, image)], **OURS).image), want) > DB
    save_file(prior.image_embedder.state_dict(), tmp_path / "flux1-redux-dev.safetensors")
    (tmp_path / "image_encoder").symlink_to(folder / "image_encoder")
    file = tmp_path / "flux1-redux-dev.safetensors"
    assert psnr(np.asarray(ours(PROMPT, references=[(file, image)], **OURS).image), want) > DB
    assert psnr(np.asarray(ours(PROMPT, **OURS).image), bare) > DB


def oracle_of(theirs, embeds: torch.Tensor, pooled: torch.Tensor, **settings) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(SEED)
    given = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    return np.asarray(theirs(generator=generator, **given, **SIZE, **PLAIN, **settings).images[0])


def test_scales_several_pictures_and_a_negative_prompt(flux):
    """Tokens of several pictures stand one after the other, each times its scale; the negative prompt's pass reads
    none, as in diffusers."""
    theirs, prior, ours, folder = flux
    one, two = picture(3), picture(4)
    (text, first), second = (
        prior(one, prompt=PROMPT).prompt_embeds.split([512, 256], 1),
        prior(two, prompt=PROMPT).prompt_embeds[:, 512:],
    )
    pooled = prior(one, prompt=PROMPT).pooled_prompt_embeds
    negative = {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0, "max_sequence_length": 512}
    want = oracle_of(theirs, torch.cat([text, 0.7 * first, 1.5 * second], 1), pooled, **negative)
    references = [(folder, one, 0.7), (folder, two, 1.5)]
    settings = OURS | {"negative": NEGATIVE, "true_cfg": 3.0}
    assert psnr(np.asarray(ours(PROMPT, references=references, **settings).image), want) > DB
    assert psnr(np.asarray(ours(PROMPT, references=references[:1], **settings).image), want) < DB - 5
