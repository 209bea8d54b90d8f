"""Lesson 17: inversion, start pictures, masks, and the mapping of an adapter, against loops and sums here."""

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("matplotlib", reason="the lessons need pip install -e '.[studio]'")
pytest.importorskip("anywidget", reason="the lessons need pip install -e '.[studio]'")

import mlx.core as mx
from PIL import Image

import mlxdiff
from mlxdiff import surgery
from mlxdiff.train import storybook as sb
from mlxdiff.train import swap
from mlxdiff.widgets.explain import OnlyAPart, Strength, ThereAndBack, editing
from mlxdiff.widgets.explain.guidance import changes
from mlxdiff.widgets.explain.latent import psnr
from tests.test_explain import stands
from tests.test_explain_further import worked

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def pipe():
    return mlxdiff.load("storybook")


def test_a_case_is_a_render_and_a_caption_with_one_word_changed(pipe):
    for seed, kind in ((1, "colour"), (2, "sky"), (3, "object")):
        it = editing.case(pipe, seed, kind)
        rng = np.random.default_rng([seed, 17])
        scene = sb.sample(rng)
        assert (np.asarray(it.picture) == sb.render(scene, rng, pipe.resolve("").width)).all()
        assert it.caption == sb.plain(scene) != it.other
        assert it.word != getattr(scene, kind)


def test_inversion_is_euler_backwards():
    """Two steps by hand, with the level that each leaves; and in a world of N(0, 1), where x0 = x / (1 + s^2), there
    and back comes nearer the shorter the steps are."""
    spread = lambda x, s: x / (1 + s**2)  # noqa: E731
    x = 1.3 + 1.0 * (1.3 - 1.3 / (1 + 0.1**2)) / 0.1  # from 0, where 0.1 is the lowest level that is known, to 1
    x = x + 2.0 * (x - x / (1 + 1.0**2)) / 1.0  # from 1 to 3
    assert editing.inverted(spread, np.array([1.3]), [3.0, 1.0, 0.0], 0.1)[0] == pytest.approx(x)

    def error(n):
        levels = [*np.geomspace(10, 0.02, n), 0.0]
        there = editing.inverted(spread, np.array([1.3]), levels, 0.02)
        return abs(editing.walked(spread, there, levels)[0] - 1.3)

    assert error(8) > 2 * error(32) > 4 * error(128)


def test_there_and_back_says_what_was_measured(pipe):
    lesson = worked(ThereAndBack(scene=2, steps=4), pipe)
    d, words = lesson.data, lesson.words()
    assert f"{psnr(d.back, d.coded):.1f} dB of what the autoencoder" in words
    assert f"it is {psnr(d.changed, d.case.picture):.1f} dB from the picture, and the judge sees {d.read}." in words
    assert psnr(d.back, d.coded) > psnr(d.changed, d.coded)  # other words, another picture
    assert d.noise.shape == pipe.noise(pipe.resolve("", seed=0))().shape[1:]
    assert stands(lesson)


def test_a_higher_strength_keeps_less(pipe, monkeypatch):
    monkeypatch.setattr(editing, "STRENGTHS", (0.2, 1.0))
    lesson = worked(Strength(scene=2), pipe)
    d = lesson.data
    assert psnr(d.drawn[0], d.case.picture) > psnr(d.drawn[1], d.case.picture)
    assert f"{psnr(d.drawn[0], d.case.picture):.1f} dB and {d.read[0]} at 0.2" in lesson.words()
    assert stands(lesson)


def test_outside_the_mask_nothing_changes(pipe):
    lesson = worked(OnlyAPart(scene=2, area="left half"), pipe)
    d = lesson.data
    half = d.case.picture.width // 2
    by = changes(d.masked, d.case.picture)
    assert (by[:, half:] == 0).all()
    assert (lesson.inside()[:, :half].all(), lesson.inside()[:, half:].any()) == (True, False)
    assert f"by {by[:, :half].mean():.1f} of 255 inside, and 0% of those outside change at all" in lesson.words()
    assert stands(lesson)


# ---- the adapter


def test_the_mapping_is_the_least_squares_solution():
    """Against the normal equations solved by numpy's lstsq on stacked rows, at full rank."""
    rng = np.random.default_rng(0)
    source, target, stay = rng.normal(size=(9, 5)), rng.normal(size=(9, 5)), rng.normal(size=(30, 5))
    up, down = swap.mapping(source, target, stay, rank=5)
    weight = np.sqrt(swap.KEEP * len(source) / len(stay))
    held = source.T @ source + weight**2 * stay.T @ stay
    little = np.sqrt(1e-3 * np.trace(held) / 5) * np.eye(5)
    rows = np.concatenate([source, weight * stay, little])
    wanted = np.concatenate([target - source, np.zeros((35, 5))])
    np.testing.assert_allclose((up @ down).T, np.linalg.lstsq(rows, wanted)[0], atol=1e-9)
    assert [part.shape for part in swap.mapping(source, target, stay, rank=2)] == [(5, 2), (2, 5)]


def test_the_adapter_reads_one_word_as_the_other_and_is_a_file_like_any(pipe, tmp_path):
    """What the layers make of "red" with it, against "blue" without it: over all layers at least a fifth of the way is
    gone, with eight directions for forty tokens; "green" moves less far. Scale 0 is the bare model; at 1 a drawn house
    is nearer to the blue one."""
    sources, targets = ([f"a {colour} {thing}" for thing in ("house", "tent", "tree")] for colour in ("red", "blue"))
    stay = [f"a {colour} {thing}" for colour in ("green", "white") for thing in ("house", "tent")]
    file = tmp_path / "swap.safetensors"
    swap.write(file, pipe, sources, targets, [*stay, ""])
    made = load_file(file)
    a, b, c = (swap.contexts(pipe, [prompt])[0] for prompt in ("a red house", "a blue house", "a green house"))
    left, moved, way = [], [], []
    for name, layer in surgery.unet(pipe).named_modules():
        if name.endswith(".attn2"):
            weight = np.array(layer.to_v.weight.astype(mx.float32), np.float64)
            change = made[f"unet.{name}.to_v.lora_B.weight"] @ made[f"unet.{name}.to_v.lora_A.weight"]
            left.append(a @ (weight + change).T - b @ weight.T)
            moved.append(c @ change.T)
            way.append((b - a) @ weight.T)
    left, moved, way = (np.sqrt(sum((part**2).sum() for part in each)) for each in (left, moved, way))
    assert left < 0.8 * way
    assert moved < 0.7 * way
    same = {"seed": 3, "steps": 2}
    bare = pipe("a red house", **same).image
    assert pipe("a red house", loras=[f"{file}:0"], **same).image.tobytes() == bare.tobytes()
    changed = pipe("a red house", loras=[f"{file}:1"], **same).image
    blue = pipe("a blue house", **same).image
    assert changes(changed, blue).mean() < 0.8 * changes(bare, blue).mean()


def test_the_picture_and_the_mask_have_the_models_size(pipe):
    it = editing.case(pipe, 1, "sky")
    assert it.picture.size == 2 * (pipe.resolve("").width,)
    assert isinstance(it.picture, Image.Image)
