"""Control pictures and the command that makes them. References: OpenCV's own Canny and PIL. Depth is compared with
transformers in tests/parity/test_depth.py."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mlxdiff import detect
from mlxdiff.detect.__main__ import main
from mlxdiff.errors import Error

from .checkpoints import sparse


def photo(mode: str = "RGB") -> Image.Image:
    """Two colours that meet in a circle, and some noise below Canny's thresholds."""
    y, x = np.mgrid[:40, :60]
    inside = ((x - 30) ** 2 + (y - 20) ** 2 < 150)[..., None]
    rng = np.random.default_rng(0)
    made = np.where(inside, [200, 60, 40], [20, 90, 160]) + rng.integers(-3, 4, (40, 60, 3))
    return Image.fromarray(made.astype(np.uint8)).convert(mode)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    photo().save("photo.png")
    return tmp_path


def test_canny_finds_the_edges_that_opencv_finds(here, capsys):
    """With the thresholds of diffusers' examples, 100 and 200; white on black, in three channels."""
    cv2 = pytest.importorskip("cv2")
    expected = np.stack([cv2.Canny(np.asarray(photo()), 100, 200)] * 3, -1)
    assert main(["photo.png", "canny"]) == 0
    assert "photo-canny.png  60 x 40" in capsys.readouterr().out
    made = np.asarray(Image.open("photo-canny.png"))
    assert np.array_equal(made, expected)
    assert set(np.unique(made)) == {0, 255}
    assert 20 < (made[..., 0] > 0).sum() < 200  # a circle


def test_grey_and_inverted():
    image = photo()
    assert detect.run("grey", image).tobytes() == image.convert("L").convert("RGB").tobytes()
    assert detect.run("invert", image).tobytes() == ImageOps.invert(image).tobytes()
    lost = photo("RGBA")
    lost.putalpha(0)
    assert np.asarray(detect.run("invert", lost)).max() == 0  # what is transparent is white


def test_names(here):
    os.makedirs("out")
    for typed in ([], [], ["-o", "a.jpg"], ["-o", "out"], ["-o", "new/b.webp"]):
        assert main(["photo.png", "grey", *typed]) == 0
    made = sorted(p.as_posix() for p in Path().rglob("*.*") if p.name != "photo.png")
    assert made == ["a.jpg", "new/b.webp", "out/photo-grey.png", "photo-grey-1.png", "photo-grey.png"]


# what was typed -> what the error says
BAD = {
    "the kind first": (["canny", "photo.png"], "comes after the picture"),
    "no such kind": (["photo.png", "cany"], "no control picture 'cany'. Did you mean canny?"),
    "no such picture": (["absent.png", "grey"], "no picture at absent.png"),
    "no picture": (["text.png", "grey"], "text.png cannot be read as a picture"),
    "no kind of file": (["photo.png", "grey", "-o", "a.txt"], "a.txt is not a kind of picture"),
    "in a file": (["photo.png", "grey", "-o", "text.png/a.png"], "text.png"),
    "a model for edges": (["photo.png", "grey", "-m", "up.safetensors"], "grey needs no model. Leave -m out."),
    "no such model": (["photo.png", "depth", "-m", "absent"], "There is no depth model, file or folder 'absent'"),
    "another network": (["photo.png", "depth", "-m", "up.safetensors"], "its first tensor is 'stranger'. Use a Depth"),
    "a pickle": (["photo.png", "depth", "-m", "depth.pth"], "depth.pth is a pickle"),
    "offline": (["photo.png", "depth", "--offline"], "Depth-Anything-V2-Small-hf is not on this machine"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line(here, capsys, kind):
    typed, says = BAD[kind]
    Path("text.png").write_text("hello")
    Path("depth.pth").write_bytes(b"PK\3\4")
    sparse(here / "up.safetensors", {"stranger": [2]})
    there = sorted(os.listdir())
    assert main(typed) == 1
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert sorted(os.listdir()) == there


def test_without_opencv_it_says_how_to_install_it(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert main(["photo.png", "canny"]) == 1
    said = capsys.readouterr().err
    assert "Canny edges are found by OpenCV, which is not here. Install it: pip install" in said
    assert '[control]"' in said
    with pytest.raises(Error, match="OpenCV"):
        detect.run("canny", "photo.png")
