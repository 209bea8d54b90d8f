"""Pictures that edit pictures, against diffusers' Flux2KleinPipeline: same weights, prompt, seed and pictures. Bound:
40 dB as for pictures from a prompt alone; float32 on both sides, so it is far above."""

import numpy as np
import pytest
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from mlxdiff import images
from mlxdiff.errors import Error
from mlxdiff.families import FAMILIES

from .test_flux2_pipelines import made, opened, oracle, short
from .test_image_to_image import image
from .test_pipelines import DB, PROMPT, SEED, SIZE, psnr
from .tiny import louder

__all__ = ["short"]  # a fixture
pytestmark = pytest.mark.usefixtures("cache")
REFERENCES = {"one": [(80, 64)], "odd": [(101, 67)], "two of different sizes": [(64, 96), (83, 70)]}


def pictures(sizes: list[tuple[int, int]], seed: int = 1) -> list[Image.Image]:
    return [image(seed + i, *size) for i, size in enumerate(sizes)]


@pytest.fixture(scope="module")
def editing(tmp_path_factory, cache) -> dict:
    """As klein, with an encoder whose latents differ by more, and a network that attends to them."""
    root = tmp_path_factory.mktemp("editing")
    pipe = made(root / "words")
    louder(pipe.vae, 4, ("encoder.conv_out.weight",))
    louder(pipe.transformer, 3, ("norm_q.weight", "norm_k.weight", "to_v"))
    distilled = Flux2KleinPipeline(**pipe.components, is_distilled=True)
    distilled.set_progress_bar_config(disable=True)
    kinds = {"base": (pipe, root / "base"), "distilled": (distilled, root / "distilled")}
    for own, folder in kinds.values():
        own.save_pretrained(folder)
    return kinds


@pytest.mark.parametrize("sizes", REFERENCES.values(), ids=REFERENCES)
def test_klein_edits(editing, short, sizes):
    """References of their own sizes, cropped to multiples of 8; the oracle looks at every one of them."""
    pipe, folder = editing["distilled"]
    same = {"num_inference_steps": 4, **short}
    want = oracle(pipe, image=pictures(sizes), **same)
    drawn = opened(folder)(PROMPT, seed=SEED, steps=4, image=pictures(sizes), **SIZE).image
    assert psnr(np.asarray(drawn), want) > DB
    assert psnr(want, oracle(pipe, **same)) < DB - 10
    for i in range(len(sizes)):
        other = [*pictures(sizes)[:i], *pictures(sizes, seed=5)[i:]]
        assert psnr(want, oracle(pipe, image=other, **same)) < DB - 10


def test_base_edits_in_both_passes(editing, short):
    pipe, folder = editing["base"]
    want = oracle(pipe, image=pictures([(80, 64)]), num_inference_steps=4, guidance_scale=3.0, **short)
    same = {"seed": SEED, "steps": 4, "guidance": 3.0, "image": pictures([(80, 64)]), **SIZE}
    assert psnr(np.asarray(opened(folder)(PROMPT, **same).image), want) > DB
    assert psnr(np.asarray(opened(folder, low_memory=True)(PROMPT, **same).image), want) > DB
    batch = opened(folder)(PROMPT, count=2, **same).images
    assert psnr(np.asarray(batch[0]), want) > DB


def test_a_reference_is_cut_as_the_image_processor_cuts_it():
    """Which scales what has more than a megapixel, crops, and refuses small and long pictures."""
    cut = FAMILIES["flux2"].cut
    for size in ((1500, 1000), (1024, 1024), (3000, 400), (100, 77)):
        picture = image(1, *size)
        want = picture if size[0] * size[1] <= 1024**2 else Flux2ImageProcessor._resize_to_target_area(picture)
        edges = [edge // 16 * 16 for edge in want.size]
        want = Flux2ImageProcessor()._resize_and_crop(want, *edges)
        assert np.array_equal(np.asarray(images.cut(picture, *cut(*size, 16))), np.asarray(want)), size
    for size in ((63, 100), (800, 64 + 1), (64, 513)):
        refused = max(size) > 8 * min(size) or min(size) < 64
        try:
            Flux2ImageProcessor.check_image_input(Image.new("RGB", size))
            assert not refused
        except ValueError:
            assert refused
        if refused:
            with pytest.raises(Error, match=f"A picture of {size[0]}x{size[1]} is too small or too long to edit"):
                cut(*size, 16)


def test_the_first_reference_gives_the_result_its_size(editing):
    pipe = opened(editing["distilled"][1])
    full = pipe.resolve(PROMPT, image=pictures([(101, 67), (64, 64)]))
    assert (full.width, full.height, full.strength) == (96, 64, None)
    with pytest.raises(Error, match="edits: it takes no strength"):
        pipe.resolve(PROMPT, image=pictures([(80, 64)]), strength=0.5)
    with pytest.raises(Error, match="takes at most 4 to edit; 5 pictures were given"):
        pipe.resolve(PROMPT, image=pictures([(80, 64)] * 5))
