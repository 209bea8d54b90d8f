"""Lesson 18: lines, the learned word and LoRAs, against counts and sums here."""

from collections import Counter
from math import comb

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the lessons need pip install -e '.[studio]'")
pytest.importorskip("anywidget", reason="the lessons need pip install -e '.[studio]'")

from PIL import Image, ImageDraw

import mlxdiff
from mlxdiff.errors import Error
from mlxdiff.train import judge
from mlxdiff.widgets.explain import Adapter, Drift, FromLines, LearnedWord, Scale, adapters, added, editing
from mlxdiff.widgets.explain.guidance import changes
from mlxdiff.widgets.explain.latent import psnr
from tests.test_explain import quiet, stands
from tests.test_explain_further import worked

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def pipe():
    return mlxdiff.load("storybook")


def test_lines_are_followed_where_the_picture_has_an_edge():
    """A square whose border lies under one of two lines of equal length, then within three pixels of it, then not."""
    lines = Image.new("RGB", (64, 64))
    draw = ImageDraw.Draw(lines)
    draw.line((20, 10, 20, 50), "white")
    draw.line((54, 10, 54, 50), "white")
    for left, share in ((20, 0.5), (23, 0.5), (30, 0.0)):
        picture = Image.new("RGB", (64, 64), "grey")
        ImageDraw.Draw(picture).rectangle((left, 0, 44, 64), "red")
        assert added.followed(picture, lines) == share
    assert added.followed(Image.new("RGB", (64, 64), "grey"), lines) == 0


def test_lines_guide_and_at_strength_0_do_nothing(pipe):
    lesson = worked(FromLines("house", strength=0.0), pipe)
    assert lesson.data.bare.tobytes() == lesson.data.drawn.tobytes()
    lesson = worked(FromLines("house", until=0.4), pipe)
    d = lesson.data
    assert changes(d.bare, d.drawn).mean() > 1
    bare, drawn = d.followed
    assert f"40% of the steps: {drawn:.0%} of the lines" in lesson.words()
    assert f"Without the lines it is {bare:.0%}, and a {d.read[0]}." in lesson.words()
    assert stands(lesson)


def test_the_words_nearest_are_by_the_models_own_table(pipe, monkeypatch):
    """Reference: the rows of the table, found by the tokenizer's ids of whole words, and numpy."""
    monkeypatch.setattr(added, "LENGTHS", (0.0, 1.0))
    monkeypatch.setattr(added, "PLACES", (0.0, 1.0))
    table = added.known(pipe)
    assert {"red", "house", "snow"} <= set(table)
    lesson = worked(LearnedWord("red"), pipe)
    d = lesson.data
    assert len(d.longer) == len(d.between) == 2
    assert d.between[0] is d.longer[1]  # the word as it was learned
    (word, cosine), *_ = d.near
    assert all(each <= cosine for _, each in d.near)
    assert f"by cosine: {word} {cosine:.2f}" in lesson.words()
    same = {"seed": 3, "loras": ["quick"]}
    want = pipe("a <teal> house by day", embeddings=["teal"], **same).image
    assert d.longer[1].tobytes() == want.tobytes()
    red = pipe("a red house by day", embeddings=[], **same).image
    assert changes(d.between[1], red).mean() < 1  # its vector is the whole of a word
    assert changes(d.between[1], want).mean() > 1


def test_teal_is_a_hue():
    assert added.teal(Image.new("RGB", (8, 8), (0, 158, 148))) == 1
    assert added.teal(Image.new("RGB", (8, 8), (30, 60, 200))) == 0
    assert added.teal(Image.new("RGB", (8, 8), (150, 158, 157))) == 0  # grey


def test_the_adapters_lesson_says_what_the_judge_sees(pipe, monkeypatch):
    monkeypatch.setattr(adapters, "SCALES", (0.0, 1.0))
    lesson = worked(Adapter("red", "blue", seed=3), pipe)
    d = lesson.data
    assert d.read == editing.seen(d.drawn, "colour")
    assert f"the judge sees {d.read[0]} at 0, {d.read[1]} at 1." in lesson.words()
    moved = changes(d.others[1], d.others[0]).mean()
    assert f"changes by {moved:.1f} of 255 at scale 1." in lesson.words()
    assert d.numbers < d.whole / 20
    assert stands(lesson)
    with pytest.raises(Error, match="Choose two colours"):
        lesson.work(pipe, quiet, "red", "red", 3)


def test_a_scale_of_0_is_the_model_with_as_few_steps(pipe):
    lesson = worked(Scale("a red house", scale=0.0), pipe)
    d = lesson.data
    same = {"seed": 5, "steps": d.calls[0], "guidance": 1.0, "sampler": "ddim", "schedule": "trailing"}
    bare = pipe("a red house", loras=[], **same).image
    assert d.bare.tobytes() == d.drawn.tobytes() == bare.tobytes()
    assert d.calls[1] == 2 * adapters.STEPS  # guided
    lesson = worked(Scale("a red house"), pipe)
    assert f"{psnr(lesson.data.drawn, lesson.data.whole):.1f} dB from what the model alone" in lesson.words()
    assert stands(lesson)


def test_drift_counts_the_words_that_moved(pipe, monkeypatch):
    a = np.array([[0, 0, 0, 0], [1, 0, 0, 0]])
    assert adapters.apart(a, a) == adapters.apart(a, a[::-1]) == 0  # as counts
    assert adapters.apart(a, np.array([[1, 0, 0, 0], [1, 0, 2, 3]])) == 3 / 8
    # Reference: shuffling twenty zeros and twenty ones, exactly; a step of the share is 0.1, and 400 shuffles are few.
    one, other = np.zeros((20, 4), int), np.ones((20, 4), int)
    ways = Counter()
    for k in range(21):
        ways[abs(2 * k - 20) / 20] += comb(20, k) ** 2 / comb(40, 20)
    exact = min(gap for gap in ways if sum(p for each, p in ways.items() if each <= gap) >= 0.95)
    assert adapters.by_chance(one, other) == pytest.approx(exact, abs=0.1)
    assert adapters.by_chance(one, one) == 0
    monkeypatch.setattr(adapters, "TURNS", (0.0, 1.0))
    lesson = worked(Drift(count=6), pipe)
    d = lesson.data
    found = judge.read(judge.load(judge.shipped()), adapters.read(d.images[1]))
    houses = (found[:, [*judge.WORDS].index("object")] == judge.WORDS["object"].index("house")).mean()
    assert (
        f"at 1 the judge sees a house in {houses:.0%}, and {d.drift[1]:.0%} of the open words moved" in lesson.words()
    )
    assert all(counts.sum() == 6 for each in d.counts for counts in each.values())
    assert stands(lesson)
