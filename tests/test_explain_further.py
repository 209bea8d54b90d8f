"""Lessons 10 to 12 and what was added to others: their numbers against closed forms and independent computations."""

import math

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the lessons need pip install -e '.[studio]'")
pytest.importorskip("anywidget", reason="the lessons need pip install -e '.[studio]'")

import mlx.core as mx

import mlxdiff
from mlxdiff import samplers, surgery
from mlxdiff.probe import gaze, trace
from mlxdiff.train import storybook, toy
from mlxdiff.widgets.explain import (
    FewSteps,
    InkDrop,
    LyingAboutTime,
    Memory,
    NoiseTable,
    Straighten,
    TakenOut,
    UNetBesideTransformer,
    WhereBlocksLook,
    WhoDecides,
    blocks,
    claims_further,
    dots,
    few,
    inside,
    novelty,
)
from tests import notebooks
from tests.test_explain import numbers, quiet, stands

pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def pipe():
    return mlxdiff.load("storybook")


def worked(lesson, pipe):
    lesson.data = lesson.work(pipe, quiet, **lesson.settings())
    lesson.redraw()
    assert lesson.error is None
    return lesson


# ---- lesson 1


def test_a_random_walk_and_its_way_back():
    """From one blob of spread g, after n pushes the spread is sqrt(g^2 + n p^2), and after the way back g again: within
    five standard errors of a spread of 8,000 numbers. Another blob's way back does not end there."""
    rng, n = np.random.default_rng(1), 50
    middle, spread = np.array([[0.7, -0.4]]), math.sqrt(dots.GRAIN**2 + n * dots.PUSH**2)
    far = middle + spread * rng.standard_normal((4000, 2))
    back = dots.walked_back(middle, far, n, rng)
    assert len(back) == n + 1
    assert np.abs((back[-1] - middle).std() / dots.GRAIN - 1) < 5 / math.sqrt(2 * 8000)
    half = back[n // 2] - middle
    assert np.abs(half.std() / math.sqrt(dots.GRAIN**2 + n / 2 * dots.PUSH**2) - 1) < 5 / math.sqrt(2 * 8000)
    other = dots.walked_back(middle + 1, far, n, rng)
    assert np.linalg.norm((other[-1] - middle).mean(0)) > 1


def test_the_ink_says_how_far_it_has_spread(pipe):
    lesson = worked(InkDrop(at=50), pipe)
    d, said = lesson.data, numbers(lesson.words())
    by_hand = [math.sqrt(((d.out[k] - d.out[0]) ** 2).sum(1).mean()) for k in (50, dots.STEPS // 4, dots.STEPS)]
    assert said[:6] == [
        50,
        round(by_hand[0], 2),
        dots.STEPS // 4,
        round(by_hand[1], 2),
        dots.STEPS,
        round(by_hand[2], 2),
    ]
    assert by_hand[2] == pytest.approx(math.sqrt(2 * dots.STEPS) * dots.PUSH, rel=5 / math.sqrt(2 * dots.DOTS))
    assert stands(lesson)


# ---- lesson 10


def test_the_weights_of_the_noise_table_by_hand():
    """Cosine's share is cos^2 as Nichol and Dhariwal have it; a flow mixes in a straight line; t = 0 is the picture."""
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (0, 400)]
    assert few.weights("cosine", 400) == pytest.approx((math.sqrt(f[1] / f[0]), math.sqrt(1 - f[1] / f[0])), rel=1e-9)
    assert few.weights("flow", 400) == (0.6, 0.4)
    root = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000)
    assert few.weights("scaled_linear", 1000)[0] == pytest.approx(math.sqrt(np.prod(1 - root**2)))
    assert all(few.weights(kind, 0) == (1.0, 0.0) for kind in few.KINDS)


def test_the_noise_table_says_its_numbers(pipe):
    lesson = worked(NoiseTable(scene=3), pipe)
    rng = np.random.default_rng(3)
    scene = storybook.sample(rng)
    assert (storybook.render(scene, rng, len(lesson.data.pixels)) == lesson.data.pixels).all()
    said = numbers(lesson.words())
    assert said[:15] == [x for t in few.TIMES for x in (*np.round(few.weights("scaled_linear", t), 2), t)]
    pixels = lesson.data.pixels
    by_hand = (np.abs(np.diff(pixels, axis=0)).mean() + np.abs(np.diff(pixels, axis=1)).mean()) / 2
    assert said[15] == pytest.approx(by_hand, abs=0.51)
    assert said[18] > 10 * said[15]
    assert stands(lesson)


@pytest.mark.parametrize("flow", [True, False])
def test_the_rings_denoiser_is_the_mean_of_what_made_x(flow):
    """Against toy.best, the mean over very many of the ring's points: within five standard errors of such a mean."""
    points, sigma = toy.ring(200_000, blobs=3, seed=1), 0.5
    x = np.array([[0.3, -0.2], [1.2, 0.4], [-1.0, 0.9]])
    ratio, seen = (sigma / (1 - sigma), (1 - sigma) * x) if flow else (sigma, x)
    found = np.array(toy.ring_denoiser(3, flow)(mx.array(seen.astype(np.float32).reshape(-1, 1, 1, 2)), sigma))
    far = ((x[:, None] - points) ** 2).sum(-1) / (2 * ratio**2)
    weights = np.exp(-far) / np.exp(-far).sum(1, keepdims=True)
    spread = np.sqrt(weights @ points**2 - (weights @ points) ** 2)
    error = spread * np.sqrt((weights**2).sum(1, keepdims=True))
    assert (np.abs(found.reshape(-1, 2) - toy.best(points, x, ratio)) < 5 * error + 1e-6).all()


def test_straightness_and_blobs_by_hand():
    """Two sides of a square instead of its diagonal; and points at, near and far from the centre of one blob."""
    corner = np.array([[[0, 0]], [[1, 0]], [[1, 1]]], float)
    assert few.straightness(corner) == pytest.approx(math.sqrt(2) / 2)
    centre = toy.centres(1)[0]
    points = centre + np.array([[0, 0], [2.9 * toy.SPREAD, 0], [0, 3.1 * toy.SPREAD], [5, 5]])
    assert few.on_blob(points, 1) == 0.5


def test_few_steps_says_what_its_runs_give(pipe, monkeypatch):
    """Every runner's end against its own loop, and more steps are better."""
    monkeypatch.setattr(few, "LONG", 50)
    monkeypatch.setattr(few, "COUNTS", (1, 2, 16))
    lesson = FewSteps(blobs=4, steps=16)
    worked(lesson, pipe)
    d, real = lesson.data, toy.ring(few.JUDGED, 4, seed=1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((few.POINTS, 1, 1, 2), np.float32)
    for s, after in zip(np.linspace(1, 1 / 16, 16), [*np.linspace(1, 1 / 16, 16)[1:], 0.0], strict=True):
        x0 = np.array(toy.ring_denoiser(4, True)(mx.array(x), s))
        x = x0 + after / s * (x - x0)
    np.testing.assert_allclose(d.paths["flow"][16][-1], x.reshape(-1, 2), rtol=0, atol=1e-4)
    assert d.off["flow"][16] == toy.apart(d.paths["flow"][16][-1], real)
    assert all(off[16] < off[2] < off[1] for off in d.off.values())
    assert f"flow with 16: {few.on_blob(d.paths['flow'][16][-1], 4):.0%} on a blob" in lesson.words()
    assert stands(lesson)


def test_a_flow_and_a_diffusion_at_the_same_ratios_take_the_same_euler_steps():
    """What lesson 10 says in words; within float32."""
    t = np.linspace(0.99, 0, 6)
    start = np.random.default_rng(0).standard_normal((50, 1, 1, 2), np.float32)
    ends = []
    for flow, x, levels in ((True, start, t), (False, start / 0.01, t / (1 - t))):
        *_, (x, _) = samplers.euler(toy.ring_denoiser(5, flow), mx.array(x.astype(np.float32)), levels.tolist())
        ends.append(np.array(x))
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-3)


def test_the_student_goes_straighter_than_its_teacher(pipe):
    lesson = worked(Straighten(steps=200, blobs=4), pipe)
    teacher, student = (few.straightness(runs[4]) for runs in lesson.data)
    assert student > teacher
    assert few.on_blob(lesson.data.student[1][-1], 4) > few.on_blob(lesson.data.teacher[1][-1], 4)
    assert f"straightness {student:.2f}." in lesson.words()


# ---- lesson 11


def test_distance_to_the_nearest_by_hand():
    assert novelty.nearest(np.array([[0.0, 0.0], [3, 4]]), np.array([[3.0, 0], [3, 3]])).tolist() == [3, 1]


def test_the_perfect_denoiser_repeats_and_the_network_does_not(pipe):
    """Most of the perfect one's points lie on a learned one; the share is counted here anew. 74 % were seen."""
    lesson = worked(Memory(points=60, steps=200), pipe)
    d = lesson.data
    near = np.median([min(math.dist(a, b) for b in d.points) for a in d.fresh]) / 10
    share = [np.mean([min(math.dist(a, b) for b in d.points) < near for a in c]) for c in (d.perfect, d.learned)]
    assert share[0] > 0.6 > 0.2 > share[1]
    said = numbers(lesson.words())
    assert said[0] == 60
    assert said[2:4] == pytest.approx([100 * s for s in share], abs=0.51)
    assert (toy.two_moons(60) == d.points).all()


def test_a_training_picture_is_the_recipes():
    """tests/recipes/storybook_torch.py: seed 1,000,003 + k, its scene first, then its render."""
    rng = np.random.default_rng(1_000_003 + 4096)
    scene = storybook.sample(rng)
    assert (novelty.training_picture(4096, 128) == storybook.render(scene, rng, 128)).all()
    assert novelty.apart(np.zeros((2, 2, 3)), np.full((2, 2, 3), 7)) == 7


def test_the_nearest_is_searched_among_those_that_share_five_words(pipe, monkeypatch):
    """In a data set of 3000, against a search through all of it."""
    monkeypatch.setattr(novelty, "COUNT", 3000)
    novelty.trained_on.cache_clear()
    lesson = worked(novelty.NearestPicture(scene=5), pipe)
    novelty.trained_on.cache_clear()
    d = lesson.data
    scenes = [storybook.sample(np.random.default_rng(1_000_003 + k)) for k in range(3000)]
    rng = np.random.default_rng([5, 0])
    own = storybook.sample(rng)
    same = [k for k, s in enumerate(scenes) if len(vars(s).items() - vars(own).items()) <= 1]
    assert d.compared == len(same)
    drawn = np.asarray(pipe(storybook.plain(own), seed=5, steps=10).image, float)
    far = [math.sqrt(((drawn - novelty.training_picture(k, len(drawn))) ** 2).mean()) for k in same]
    assert d.near[0][0] == pytest.approx(min(far))
    assert f"of 3,000 training pictures {len(same)} share" in lesson.words()
    assert f"is {min(far):.0f} of 255 away" in lesson.words()


# ---- lesson 12. References: test_surgery.py for the changes themselves


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(inside, "STEPS", 2)


def test_what_is_taken_out_is_named_and_drawn(pipe, short):
    lesson = worked(TakenOut("attention", prompt="a red house", seed=5), pipe)
    same = {"seed": 5, "steps": 2, "guidance": 1}
    whole = pipe("a red house", **same).image
    assert inside.changed_by(lesson.data.whole, whole) < 1  # a batch is decoded in another order
    with surgery.muted(surgery.unet(pipe), ["middle"]):
        without = pipe("a red house", **same).image
    assert inside.changed_by(lesson.data.without["middle"], without) < 1
    by = {name: inside.changed_by(image, lesson.data.whole) for name, image in lesson.data.without.items()}
    assert lesson.words().endswith(f"Most without {max(by, key=by.get)}, least without {min(by, key=by.get)}.")
    assert stands(lesson)


def test_the_lies_are_told_in_every_step(pipe, short):
    lesson = worked(LyingAboutTime("a red house", seed=5), pipe)
    assert len(lesson.data.pictures) == len(inside.SHIFTS)
    true = lesson.data.pictures[inside.SHIFTS.index(0)]
    assert inside.changed_by(true, pipe("a red house", seed=5, steps=2, guidance=1).image) < 1
    changed = [inside.changed_by(p, true) for p in lesson.data.pictures if p is not true]
    assert min(changed) > 0.4  # of 255, in the mean
    assert max(changed) > 2


def test_who_decides_counts_the_way_that_one_block_goes(pipe, short):
    lesson = worked(WhoDecides("a red house", "a blue house", seed=5), pipe)
    net = surgery.unet(pipe)
    (text,) = pipe.read(["a blue house"], pipe.resolve(""), t5=False)
    same = {"seed": 5, "steps": 2, "guidance": 1}

    def latents(prompt):
        return [e.x0 for e in pipe.stream(prompt, **same) if e.x0 is not None][-1].ravel().astype(float)

    a, b = latents("a red house"), latents("a blue house")
    with surgery.reading(net, ["up 2"], text.context):
        x = latents("a red house")
    assert lesson.data.share["up 2"] == pytest.approx((x - a) @ (b - a) / ((b - a) @ (b - a)), abs=1e-3)
    assert list(lesson.data.share) == surgery.readers(net)
    assert stands(lesson)


# ---- lesson 12: where blocks look, and what can be counted


def test_a_block_whose_queries_are_nothing_looks_everywhere_alike(pipe):
    """Equal scores make equal shares; the shares of a place add up to 1; and who watches changes nothing."""
    net, same = surgery.unet(pipe), {"seed": 7, "steps": 2, "guidance": 1.0}
    plain = [step.x0 for step in trace(pipe, inside.PROMPT, **same)]
    seen = list(gaze(pipe, inside.PROMPT, **same))
    assert all((a == b.step.x0).all() for a, b in zip(plain, seen, strict=True))
    assert [*seen[0].maps] == surgery.readers(net)
    assert all(np.allclose(m.sum((2, 3)), 1, atol=1e-4) for m in seen[0].maps.values())
    (layer,) = surgery.blocks(net)["middle"].attentions[0].transformer_blocks
    kept = layer.attn1.to_q.weight
    try:
        layer.attn1.to_q.weight = mx.zeros_like(kept)
        maps = next(gaze(pipe, inside.PROMPT, **same)).maps
    finally:
        layer.attn1.to_q.weight = kept
    np.testing.assert_allclose(maps["middle"], 1 / maps["middle"][0, 0].size, rtol=1e-5)
    assert not np.allclose(maps["down 2"], 1 / maps["down 2"][0, 0].size, rtol=1e-2)


def test_how_far_an_even_look_goes_by_hand():
    assert blocks.reach(np.full((2, 2, 2, 2), 0.25)) == pytest.approx((0 + 0.5 + 0.5 + math.sqrt(0.5)) / 4)
    own = np.eye(4).reshape(2, 2, 2, 2)  # each place looks at itself
    assert blocks.reach(own) == 0


def test_where_blocks_look_says_what_was_seen(pipe):
    lesson = worked(WhereBlocksLook(step=2), pipe)
    for name, maps in lesson.data.maps.items():
        assert f"{name} {blocks.reach(maps):.2f}" in lesson.words()
    before = lesson.image.value
    lesson.down.value = 10
    lesson.redraw()
    assert lesson.image.value != before
    assert stands(lesson)


def test_the_places_of_published_networks_by_their_known_counts(pipe):
    """SD 1.5 compares at 64 x 64 places in 5 layers, at 32 x 32 and 16 x 16 in 5 each, and once in the middle; SD3
    medium has 24 layers, and 1,024 patches at 512 pixels. Their weights: 860 million and 2.03 billion."""
    lesson = worked(UNetBesideTransformer(), pipe)
    d = lesson.data
    assert d.pairs("sd15", 512) == 5 * (4096**2 + 1024**2 + 256**2) + 64**2
    assert d.pairs("sd3-medium", 512) == 24 * 1024**2
    assert d.pairs("sdxl", 1024) == 10 * 4096**2 + 60 * 1024**2  # 2 and 3 attentions of 2 layers; 2, 1 and 3 of 10
    assert d.weights["sd15"] == pytest.approx(860e6, rel=0.001)
    assert d.weights["sd3-medium"] == pytest.approx(2.03e9, rel=0.03)
    assert "16 times as many" in lesson.words()
    small = lesson.image.value
    lesson.size.value = 1024
    lesson.redraw()
    assert lesson.image.value != small


# ---- claims that stand in the lessons. Reference of the evidence: what is committed, by test_notebooks.py


def test_things_are_counted_where_they_do_not_touch():
    mask = np.zeros((20, 20), bool)
    mask[2:6, 2:6] = mask[2:6, 9:13] = mask[12, 3:17] = True
    assert claims_further.regions(mask) == 3
    mask[4, 6:9] = True
    assert claims_further.regions(mask) == 2
    mask[19, 0] = True  # too small to be a thing
    assert claims_further.regions(mask) == 2


def test_the_lessons_claims_have_their_verdict_in_what_is_committed():
    said = "\n".join("\n".join(notebooks.texts(notebooks.read(name))) for name in notebooks.names())
    for claim in claims_further.CLAIMS:
        assert f"**“{claim.quote}”.**" in said
        assert f"Verdict: {claim.verdict}. " in said.split(f"**“{claim.quote}”.**")[1]
