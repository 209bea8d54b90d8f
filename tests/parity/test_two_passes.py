"""Two passes (`hires`) in every family that begins with a picture: the first picture, enlarged by PIL and then given as
a start image with the same seed, draws the same, to the last bit; and the second pass changes what PIL enlarged. In
Stable Diffusion 1 with the built-in model: tests/test_upscale.py."""

import numpy as np
import pytest
from PIL import Image

import mlxdiff
from mlxdiff.errors import Error

from . import tiny
from .test_pipelines import NEGATIVE, PROMPT, SEED, psnr

SIZE = {"width": 32, "height": 24}
CASES = {
    "sd2": {"negative": NEGATIVE, "steps": 4, "guidance": 4.0},
    "sdxl": {"negative": NEGATIVE, "steps": 4, "guidance": 4.0},
    "sd3": {"negative": NEGATIVE, "steps": 4, "guidance": 4.0},
    "flux": {"steps": 4, "guidance": 3.5},
    "zimage": {"steps": 4},
}


@pytest.mark.parametrize("name", CASES)
def test_the_second_pass_is_the_command_with_a_start_picture(tmp_path, cache, name):
    getattr(tiny, name)(tmp_path / "words").save_pretrained(tmp_path / name)
    pipe, how = mlxdiff.load(tmp_path / name, dtype="float32"), {"seed": SEED} | CASES[name]
    first = pipe(PROMPT, **SIZE, **how).image
    size = {edge: 2 * n for edge, n in SIZE.items()}
    grown = first.resize((size["width"], size["height"]), Image.Resampling.LANCZOS)
    second = pipe(PROMPT, image=grown, strength=0.6, **size, **how).image
    both = pipe(PROMPT, hires=(2, 0.6), **SIZE, **how)
    assert np.array_equal(np.asarray(both.image), np.asarray(second))
    assert (both.request.width, both.request.hires) == (SIZE["width"], (2, 0.6))
    assert psnr(np.asarray(both.image), np.asarray(grown)) < 30  # it did draw on
    if name == "sd3":
        with pytest.raises(Error, match="positions for at most 72 pixels"):  # which the first pass has
            pipe.resolve(PROMPT, hires=3, **SIZE, **how)
