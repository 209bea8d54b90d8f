"""Pictures that edit a picture, against diffusers' FluxKontextPipeline: same weights, prompt, seed and picture. Bound:
40 dB as for pictures from a prompt alone; float32 on both sides, so it is far above."""

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image

from mlxdiff import images
from mlxdiff.errors import Error
from mlxdiff.families import FAMILIES, flux

from . import tiny
from .test_flow_pipelines import opened
from .test_image_to_image import image
from .test_pipelines import DB, NEGATIVE, PROMPT, SEED, SIZE, command, psnr

PUBLISHED, TABLE = flux.KONTEXT, tuple(pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS)
# A sixteenth of the published sizes, so that a picture has dozens of tokens, not thousands.
SMALL = tuple((w // 16, h // 16) for w, h in flux.KONTEXT)
SETTINGS = {"steps": 4, "guidance": 2.5}


@pytest.fixture(scope="module")
def kontext(tmp_path_factory, cache) -> tuple:
    """(diffusers pipeline, folder it was saved in)"""
    root = tmp_path_factory.mktemp("kontext")
    made = tiny.flux(root / "words")
    made.vae.encoder.conv_out.weight.data.mul_(8)  # else another picture would change the result by 40 dB only
    tiny.louder(made.transformer, 3, ("norm_q.weight", "norm_k.weight", "attn.to_v"))  # few tokens among 512 of text
    pipe = FluxKontextPipeline(**made.components)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(root / "model")
    return pipe, root / "model"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", list(SMALL))
    monkeypatch.setattr(flux, "KONTEXT", SMALL)


def theirs(pipe, picture: Image.Image | None, seed: int = SEED, size: dict = SIZE, **settings) -> np.ndarray:
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "negative": "negative_prompt"}
    settings = {names.get(k, k): v for k, v in (SETTINGS | settings).items()}
    settings |= size | {"max_area": size["width"] * size["height"]}
    generator = torch.Generator("cpu").manual_seed(seed)
    return np.asarray(pipe(prompt=PROMPT, image=picture, generator=generator, **settings).images[0])


@pytest.mark.parametrize("edges", [(40, 24), (101, 57), (33, 190)])
def test_kontext_edits(kontext, edges):
    """A picture of another size than the result: near its shape, odd, and far taller than any published size."""
    pipe, folder = kontext
    picture = image(1, *edges)
    want = theirs(pipe, picture)
    drawn = opened(folder)(PROMPT, seed=SEED, image=picture, **SETTINGS, **SIZE).image
    assert psnr(np.asarray(drawn), want) > DB


def test_the_oracle_looks_at_its_picture(kontext):
    """Else the tests here could not fail on a mistake in what becomes of it."""
    pipe, _ = kontext
    want = theirs(pipe, image(1))
    assert psnr(want, theirs(pipe, image(2))) < DB - 10
    assert psnr(want, theirs(pipe, image(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT))) < DB - 10
    assert psnr(want, theirs(pipe, None)) < DB - 10


def test_a_second_pass_sees_the_picture_too(kontext):
    pipe, folder = kontext
    guided = {"negative": NEGATIVE} | SETTINGS
    want = theirs(pipe, image(1), true_cfg_scale=3.0, **guided)
    draw = lambda **how: opened(folder, **how)(PROMPT, seed=SEED, image=image(1), true_cfg=3.0, **guided, **SIZE).image  # noqa: E731
    assert psnr(np.asarray(draw()), want) > DB
    assert psnr(np.asarray(draw(low_memory=True)), want) > DB  # one pass after the other
    assert psnr(want, theirs(pipe, image(1))) < DB - 10


def test_a_batch_draws_its_members_and_the_next_picture_is_its_own(kontext):
    """In one pipeline, which keeps the latents of the last pictures."""
    pipe, folder = kontext
    ours = opened(folder)
    batch = ours(PROMPT, seed=SEED, image=image(1), count=2, **SETTINGS, **SIZE).images
    assert psnr(np.asarray(batch[1]), theirs(pipe, image(1), SEED + 1)) > DB
    other = ours(PROMPT, seed=SEED, image=image(2), **SETTINGS, **SIZE).image
    assert psnr(np.asarray(other), theirs(pipe, image(2))) > DB
    again = ours(PROMPT, seed=SEED, image=image(1), **SETTINGS, **SIZE).image
    assert psnr(np.asarray(again), np.asarray(batch[0])) > 50  # the same numbers in a batch of another size
    assert psnr(np.asarray(batch[0]), np.asarray(other)) < DB - 10


def test_the_result_has_the_size_at_which_the_picture_is_read(kontext):
    pipe, folder = kontext
    size = {"width": 72, "height": 48}  # of 78 x 52, the nearest of SMALL, in multiples of 8
    drawn = np.asarray(opened(folder)(PROMPT, seed=SEED, image=image(3, 96, 64), **SETTINGS).image)
    assert drawn.shape == (48, 72, 3)
    assert psnr(drawn, theirs(pipe, image(3, 96, 64), size=size)) > DB


def test_through_the_command_line(kontext, cache, tmp_path):
    """The PNG draws the result again, and refuses another picture."""
    pipe, folder = kontext
    image(3, 96, 64).save(tmp_path / "a.png")
    args = ("-m", str(folder), "--steps", "4", "-g", "2.5", "-i", str(tmp_path / "a.png"))
    drawn, said = command(cache, tmp_path / "out.png", PROMPT, *args)
    assert psnr(drawn, theirs(pipe, image(3, 96, 64))) > DB
    assert (said["request"]["image"], said["request"]["strength"]) == (str(tmp_path / "a.png"), None)
    again, _ = command(cache, tmp_path / "again.png", "--from-image", str(tmp_path / "out.png"), "-m", str(folder))
    assert np.array_equal(drawn, again)
    request, _ = images.read_settings(tmp_path / "out.png")
    image(4, 96, 64).save(tmp_path / "a.png")
    with pytest.raises(Error, match="The image is not the one that these settings name"):
        opened(folder).resolve(request)


# ---- how a picture is cut, against the oracle's own table and choice


def test_kontext_chooses_the_size_that_diffusers_chooses(monkeypatch):
    monkeypatch.setattr(flux, "KONTEXT", PUBLISHED)
    assert sorted(PUBLISHED) == sorted(TABLE)
    processor = VaeImageProcessor(vae_scale_factor=16)
    rng = np.random.default_rng(0)
    for w, h in [*rng.integers(16, 3000, (300, 2)).tolist(), (1024, 1024), (16, 3000), (3000, 16), (500, 500)]:
        height, width = processor.get_default_height_width(Image.new("1", (w, h)))
        _, *want = min((abs(width / height - a / b), a, b) for a, b in TABLE)
        assert FAMILIES["flux"].cut(w, h, 16) == (tuple(want), tuple(want)), (w, h)
    assert FAMILIES["flux"].cut(3, 9, 16).size == (1024, 1024)  # the oracle divides by zero
