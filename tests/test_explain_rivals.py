"""Lesson 16 and the world that a reader draws: their numbers against closed forms and independent computations."""

import math
from itertools import pairwise

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the lessons need pip install -e '.[studio]'")
pytest.importorskip("anywidget", reason="the lessons need pip install -e '.[studio]'")

import mlx.core as mx
import mlx.nn as nn

from mlxdiff.errors import Error
from mlxdiff.train import rivals as learning
from mlxdiff.train import toy
from mlxdiff.widgets.explain import LossSays, Rivals, Scores, YourWorld, drawing, rivals
from tests.test_explain import numbers, quiet


def worked(lesson):
    lesson.data = lesson.work(None, quiet, **lesson.settings())
    lesson.redraw()
    assert lesson.error is None
    return lesson


def keeps(lesson, **moved):
    """Whether picture and words stay those of the data while the controls have moved on."""
    shown = lesson.image.value, lesson.words()
    lesson.ask = lambda: None
    for name, value in moved.items():
        getattr(lesson, name).value = value
    lesson.redraw()
    return (lesson.image.value, lesson.words()) == shown


@pytest.fixture(scope="module")
def short():
    """Few steps of learning, for all tests of this file: the numbers need not be good ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "STEPS", 20)
        patch.setattr(rivals, "EVERY", 10)
        patch.setattr(rivals, "MOMENTS", (0, 10, 20))
        yield
    rivals._kept.clear()


# ---- the rivals themselves


def test_the_losses_of_gan_and_vae_by_hand():
    """In float64, from the formulas of the lesson, with the networks' own outputs."""
    rng = np.random.default_rng(0)
    points, noise = (rng.standard_normal((16, 2)).astype(np.float32) for _ in range(2))
    gan, soft = learning.Gan(seed=0), lambda v: np.logaddexp(0, v)
    real, fake = (np.array(gan.critic(x), np.float64) for x in (mx.array(points), gan.forger(mx.array(noise))))
    loss = gan._critic_loss(gan.critic, mx.array(points), mx.array(noise))
    assert loss.item() == pytest.approx(soft(-real).mean() + soft(fake).mean(), rel=1e-5)
    assert gan._forger_loss(gan.forger, mx.array(noise)).item() == pytest.approx(soft(-fake).mean(), rel=1e-5)

    vae = learning.Vae(seed=0)
    out = np.array(vae.net.encoder(mx.array(points)), np.float64)
    mean, doubt = out[:, :2], out[:, 2:]
    read = np.array(vae.net.decoder(mx.array((mean + np.exp(doubt / 2) * noise).astype(np.float32))), np.float64)
    variance = math.exp(learning.START)
    off = ((points - read) ** 2 / variance + learning.START).sum(1) / 2
    apart = (mean**2 + np.exp(doubt) - doubt - 1).sum(1) / 2  # Kullback and Leibler's, from N(mean, s) to N(0, 1)
    found = vae._loss(vae.net, mx.array(points), mx.array(noise)).item()
    assert found == pytest.approx((off + apart).mean(), rel=1e-4)


@pytest.mark.parametrize("name", learning.RIVALS)
def test_a_step_moves_what_learns_and_the_mean_follows(name):
    """Against the mean by hand after the first step, which keeps 1/12 of the old weights: fit's rule."""
    rival = learning.RIVALS[name](seed=0)
    net = {"GAN": "forger", "VAE": "net"}.get(name)
    now = getattr(rival, net) if net else rival.toy.net
    averaged = rival.averaged if net else rival.averaged.net

    def flat(module):
        return np.concatenate([np.array(v).ravel() for _, v in nn.utils.tree_flatten(module.parameters())])

    old, mean = flat(now), flat(averaged)
    rival.step(mx.array(toy.ring(learning.BATCH, 8).astype(np.float32)), np.random.default_rng(0))
    assert np.abs(flat(now) - old).max() > 1e-4
    np.testing.assert_allclose(flat(averaged), mean + 11 / 12 * (flat(now) - mean), rtol=0, atol=1e-6)


def test_a_flow_learns_in_a_few_steps_and_draws_what_it_learned():
    """One round blob: after 200 steps its points have the blob's middle and spread, within a third of the spread."""
    points = (np.array([0.8, -0.5]) + 0.4 * np.random.default_rng(0).standard_normal((2000, 2))).astype(np.float32)
    *_, done = learning.train("flow", points, 200, (0, 200), 500, seed=0)
    before, after = done.clouds
    assert np.linalg.norm(before.mean(0) - [0.8, -0.5]) > np.linalg.norm(after.mean(0) - [0.8, -0.5])
    np.testing.assert_allclose(after.mean(0), [0.8, -0.5], atol=0.13)
    np.testing.assert_allclose(after.std(0), 0.4, atol=0.13)
    assert (len(done.losses), done.passes) == (200, learning.PASSES)
    assert done.weights == sum(v.size for _, v in nn.utils.tree_flatten(toy.Net(1.0).parameters()))


def test_the_same_seed_learns_the_same():
    points = toy.ring(500, 4).astype(np.float32)
    runs = [[*learning.train("GAN", points, 5, (5,), 50, seed)][-1] for seed in (3, 3, 4)]
    np.testing.assert_array_equal(runs[0].clouds[0], runs[1].clouds[0])
    assert not np.array_equal(runs[0].clouds[0], runs[2].clouds[0])


# ---- the lesson


def test_a_blob_is_found_if_it_has_half_its_share():
    a, b = toy.centres(2)
    assert rivals.covered(np.array(3 * [a] + [b]), 2) == 2
    assert rivals.covered(np.array(4 * [a] + [b]), 2) == 1
    assert rivals.shares(np.array(3 * [a] + [b + 0.1]), 2).tolist() == [0.75, 0.25]


def test_ranks_agree_as_spearman_says():
    assert rivals.ranks_agree(np.array([1.0, 5, 9]), np.array([2.0, 3, 8])) == pytest.approx(1)
    assert rivals.ranks_agree(np.array([1.0, 2, 3, 4]), np.array([4.0, 1, 3, 2])) == pytest.approx(1 - 6 * 14 / 60)


def test_the_clouds_are_those_of_the_moment(short):
    lesson = worked(Rivals(blobs=4, moment=10))
    run = lesson.data.runs["VAE"][0]
    on = np.mean([min(math.dist(p, c) for c in toy.centres(4)) < 3 * toy.SPREAD for p in run.clouds[1]])
    off = toy.apart(run.clouds[1], toy.ring(rivals.DRAWN, 4, seed=1))
    found = rivals.covered(run.clouds[1], 4)
    assert f"VAE {on:.0%}, {found} and {off:.3f}" in lesson.words()
    assert lesson.words().startswith("After 10 steps")
    before = lesson.image.value
    lesson.moment.value = 20
    assert (lesson.image.value != before, lesson.words()[:14]) == (True, "After 20 steps")
    assert keeps(lesson, blobs=2)


def test_the_table_has_every_seed(short):
    lesson = worked(Scores(seeds=2, blobs=4))
    scores = lesson.scores()
    assert [len(values) for values in scores["distance"].values()] == 4 * [2]
    assert scores["distance"]["GAN"][0] == lesson.data.off["GAN"][0, -1]
    assert all(v > 0 for v in scores["seconds to learn"]["flow"])
    mean = np.mean(scores["distance"]["GAN"])
    assert f"GAN: {np.mean(scores['% on a blob']['GAN']):.0f}% on a blob" in lesson.words()
    assert f"distance {mean:.3f}" in lesson.words()
    assert "1 pass for a point" in lesson.words()
    assert f"{learning.PASSES} passes for a point" in lesson.words()
    assert keeps(lesson, blobs=2, seeds=5)


def test_the_loss_is_set_beside_the_distance_at_the_end_of_its_steps(short):
    lesson = worked(LossSays(blobs=4))
    run = lesson.data.runs["flow"][0]
    loss, off = lesson.beside("flow")
    assert loss.tolist() == [run.losses[:10].mean(), run.losses[10:].mean()]
    assert off.tolist() == lesson.data.off["flow"][0][1:].tolist()


# ---- a world that is drawn


def test_what_a_page_sends_is_kept_where_it_is_a_point():
    board = drawing.Board()
    good = [[0.5, -1, 0], [2.4, 2.4, 1]]
    board.points = [*good, [9, 0, 0], [math.nan, 0, 0], [0, 0, 7], [0, 0], "x", [None, 0, 1], [True, "1", 0]]
    assert board.points == good
    board.points = [[0, 0, 0]] * (drawing.MOST + 9)
    assert len(board.points) == drawing.MOST


def test_new_points_of_a_world_of_one_blob_are_that_blob():
    """One point with its grain is a normal distribution: mean and spread within five standard errors, and what Euler
    and its steps add to the spread, which is less than a tenth."""
    lesson = YourWorld()
    lesson.ask = lambda: None
    lesson.board.points = [[0.7, -0.4, 0]]
    worked(lesson)
    end = lesson.data.paths[-1]
    error = drawing.GRAIN / math.sqrt(drawing.COUNT)
    np.testing.assert_allclose(end.mean(0), [0.7, -0.4], atol=5 * error)
    np.testing.assert_allclose(end.std(0), drawing.GRAIN, rtol=0.1 + 5 / math.sqrt(2 * drawing.COUNT))
    assert len(lesson.data.paths) == drawing.STEPS + 1 == len(lesson.data.levels)


def test_guidance_is_the_formula_and_pushes_away_from_the_other_colour():
    """The answers of both worlds by toy.blobs_denoiser, mixed by hand, walked by Euler here; at scale 1 the other
    colour does not count."""
    points = [[-1.0, 0.0, 0], [1.0, 0.0, 1]]

    def end(told, scale):
        lesson = YourWorld(told=told, guidance=scale)
        lesson.ask = lambda: None
        lesson.board.points = points
        return worked(lesson).data.paths[-1]

    x = np.random.default_rng(0).standard_normal((drawing.COUNT, 1, 1, 2), np.float32)
    every, own = (toy.blobs_denoiser(np.array(p), drawing.GRAIN, True) for p in ([[-1.0, 0], [1, 0]], [[1.0, 0]]))
    levels = np.linspace(1, 0, drawing.STEPS + 1)
    for s, after in pairwise(levels):
        a, b = (np.array(answer(mx.array(x), s)) for answer in (every, own))
        x0 = a + 4 * (b - a)
        x = x0 + after / s * (x - x0)
    np.testing.assert_allclose(end("orange", 4.0), x.reshape(-1, 2), rtol=0, atol=1e-3)
    plain, strong = end("orange", 1.0), end("orange", 4.0)
    assert np.abs(plain.mean(0) - [1, 0]).max() < 0.05
    assert strong[:, 0].mean() > plain[:, 0].mean()
    assert abs(end(drawing.EITHER, 4.0)[:, 0].mean()) < 0.25  # both colours: half here, half there


def test_the_world_says_its_numbers_and_moves_on_the_board():
    lesson = worked(YourWorld("two moons", told="blue", guidance=3.0))
    said = numbers(lesson.words())
    assert said[:3] == [40, 40, 3]
    new, own = lesson.data.paths[-1], np.array([p[:2] for p in drawing.moons() if p[2] == 0])
    near = np.mean([min(math.dist(a, b) for b in own) < 3 * drawing.GRAIN for a in new])
    assert said[4] == pytest.approx(100 * near, abs=0.51)
    far = np.mean([math.dist(a, b) for a in new for b in new])
    assert said[5] == pytest.approx(far, abs=0.006)
    sizes = lesson.board.run
    assert len(lesson.board.paths) == 4 * 2 * (sizes["steps"] + 1) * sizes["count"]
    assert (
        len(lesson.board.arrows) == 4 * 2 * sizes["steps"] * sizes["grid"] == sizes["steps"] * len(lesson.board.places)
    )
    assert np.frombuffer(lesson.board.paths, "<f4")[-2:].tolist() == new[-1].astype("<f4").tolist()


def test_a_network_can_learn_the_drawn_world(monkeypatch):
    """Its points come nearer to the drawn ones than noise is."""
    monkeypatch.setattr(drawing, "LEARN", 60)
    lesson = YourWorld("two moons", learned=True)
    lesson.ask = lambda: None
    lesson.board.points = [[1.0, 1.0, 0], [1.2, 1.0, 0]]
    worked(lesson)
    end = lesson.data.paths[-1]
    assert (
        np.linalg.norm(end - [1.1, 1.0], axis=1).mean() < 0.5 * np.linalg.norm(lesson.data.paths[0] - 1, axis=1).mean()
    )
    assert "a network that learned for 60 steps" in lesson.words()


def test_an_empty_world_is_one_line():
    lesson = YourWorld(told="orange")
    lesson.ask = lambda: None
    lesson.board.points = [[0, 0, 0]]
    with pytest.raises(Error, match="There are no orange points"):
        lesson.work(None, quiet, **lesson.settings())
