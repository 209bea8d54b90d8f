"""Training. References: closed forms for objectives, an uninterrupted run for a resumed one, torch with diffusers' own
networks and AdamW for the losses and weights of both nets, diffusers as the reader of an exported folder."""

import sys
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import mlxdiff
from mlxdiff import schedules
from mlxdiff.errors import Error
from mlxdiff.models import unet, vae
from mlxdiff.train import export, fit, judge, objective, recipe, toy
from mlxdiff.train import storybook as sb
from mlxdiff.train.__main__ import main

TINY_VAE = replace(recipe.VAE, latent_channels=4, channels=(8, 16), groups=4)
TINY_UNET = replace(
    recipe.UNET, in_channels=4, out_channels=4, channels=(16, 24), layers=(1, 1), depth=((), (1,)),
    up_depth=((1, 1), ()), heads=(2, 2), context=12, groups=4,
)  # fmt: skip
STEPS = 20


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# --- objectives


@pytest.mark.parametrize("prediction", objective.PREDICTIONS)
def test_the_target_gives_back_the_picture(prediction):
    """x0 solved by hand from mixture and target, at levels away from both ends."""
    x0, noise = mx.array(normal(0, 3, 4, 4, 2)), mx.array(normal(1, 3, 4, 4, 2))
    level = mx.array([0.1, 0.5, 0.9])
    x, target = objective.mixture(prediction, x0, noise, level)
    a = level.reshape(-1, 1, 1, 1)
    solved = {
        "eps": (x - mx.sqrt(1 - a) * target) / mx.sqrt(a),
        "v": mx.sqrt(a) * x - mx.sqrt(1 - a) * target,
        "x0": target,
        "flow": x - a * target,
    }[prediction]
    np.testing.assert_allclose(solved, x0, atol=1e-5)  # float32, divided by at least sqrt(0.1)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_min_snr_counts_the_error_in_x0(prediction):
    """An error of 0.1 in x0 costs min(SNR, 5) * 0.01 in each parametrization."""
    x0, noise = mx.array(normal(0, 4, 2, 2, 1)), mx.array(normal(1, 4, 2, 2, 1))
    level = mx.array([0.05, 0.4, 0.8, 0.99])
    x, target = objective.mixture(prediction, x0, noise, level)
    a = level.reshape(-1, 1, 1, 1)
    wrong = x0 + 0.1
    eps = (x - mx.sqrt(a) * wrong) / mx.sqrt(1 - a)
    guess = {"eps": eps, "v": mx.sqrt(a) * eps - mx.sqrt(1 - a) * wrong, "x0": wrong}[prediction]
    cost = objective.weights(prediction, level, 5.0) * mx.square(guess - target).mean((1, 2, 3))
    np.testing.assert_allclose(cost, np.minimum(level / (1 - level), 5) * 0.01, rtol=1e-3)  # float32 cancels at 0.99


def test_times_match_their_levels():
    alpha_bar = schedules.alpha_bar(schedules.betas("scaled_linear", 1000, 0.00085, 0.012))
    t, level = objective.levels("v", alpha_bar, np.array([0.0, 0.5, 0.9999999]))
    assert t.tolist() == [0, 500, 999]
    assert (level == alpha_bar[t]).all()
    t, level = objective.levels("flow", alpha_bar, np.array([0.25]))
    assert (t, level) == (250, 0.25)
    assert sorted((objective.stratified(np.random.default_rng(0), 8) * 8).astype(int)) == list(range(8))


# --- the loop


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.conv_out = nn.Linear(3, 1)


def line_loss(model, x, y):
    return mx.square(model.conv_out(model.inner(x)) - y).mean()


def line_batch(step):
    x = normal(step, 16, 3)
    return mx.array(x), mx.array(x @ np.array([[1.0], [-2.0], [0.5]], np.float32))


def run(folder, stop=None, kind="adamw", steps=12):
    mx.random.seed(0)
    model = Line()
    plan = fit.Plan(steps, 0.05, kind, warmup=2, decay=0.5, clip=1.0, ema=0.9, save_every=5)
    reports = []
    for report in fit.fit(model, line_loss, line_batch, plan, folder):
        reports.append(report)
        if report.step == stop:
            break
    return model, reports


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_run_is_the_same_run(tmp_path, kind):
    """Left between two saves and started again, against one that was not: equal to the last bit."""
    whole, reports = run(tmp_path / "whole", kind=kind)
    run(tmp_path / "parts", stop=7, kind=kind)
    resumed, rest = run(tmp_path / "parts", kind=kind)
    assert [r.step for r in rest] == [8, 9, 10, 11, 12]
    assert [r.loss for r in rest] == [r.loss for r in reports[7:]]
    for (name, a), (_, b) in zip(tree_flatten(whole.parameters()), tree_flatten(resumed.parameters()), strict=True):
        assert mx.array_equal(a, b), name
    logs = [(tmp_path / n / "log.csv").read_text().splitlines() for n in ("whole", "parts")]
    first, second = ([line.split(",")[:3] for line in log] for log in logs)  # all but the seconds
    assert first == second
    mean_whole, mean_parts = (fit.averaged(Line(), tmp_path / n) for n in ("whole", "parts"))
    assert mx.array_equal(mean_whole.inner.weight, mean_parts.inner.weight)
    assert not mx.array_equal(mean_whole.inner.weight, whole.inner.weight)


def test_ctrl_c_at_any_moment_of_a_step_continues_as_the_same_run(tmp_path):
    """Raised at each line of the loop in turn, most of which Ctrl-C only meets by chance; while a step is computed, it
    is raised as soon as that ends."""
    whole, _ = run(tmp_path / "whole", kind="muon", steps=4)
    log = [line.split(",")[:3] for line in (tmp_path / "whole" / "log.csv").read_text().splitlines()]

    def moments():
        """How many moments one has passed, until it is interrupted at the last of them."""
        for last in range(1, 99):
            passed = 0

            def trace(frame, event, _, last=last):
                nonlocal passed
                if frame.f_code is not fit.fit.__code__:
                    return None
                if event == "line" and frame.f_locals.get("step") == 2:
                    passed += 1
                    if passed == last:
                        raise KeyboardInterrupt
                return trace

            place = tmp_path / f"{last}"
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                run(place, stop=3, kind="muon", steps=4)
            except KeyboardInterrupt:
                yield place
            else:
                return
            finally:
                sys.settrace(before)

    places = [*moments()]
    assert len(places) > 12
    for place in places:
        resumed, _ = run(place, kind="muon", steps=4)
        assert [line.split(",")[:3] for line in (place / "log.csv").read_text().splitlines()] == log
        for (name, a), (_, b) in zip(tree_flatten(whole.parameters()), tree_flatten(resumed.parameters()), strict=True):
            assert mx.array_equal(a, b), (place.name, name)


def test_the_loss_falls_and_is_drawn(tmp_path):
    _, reports = run(tmp_path, steps=60)
    assert reports[-1].loss < 0.2 * reports[0].loss
    assert (tmp_path / "loss.png").stat().st_size > 500
    assert not list(tmp_path.glob("*.new.*"))


def test_the_rate_rises_then_stays_then_falls():
    plan = fit.Plan(100, 1.0, "adamw", warmup=10, decay=0.5, clip=1.0, ema=0.9, save_every=5)
    assert [fit.rate_at(plan, s) for s in (0, 9, 49, 75, 100)] == [0.1, 1.0, 1.0, 0.5, 0.0]


# --- against torch


def batches(shape):
    return [normal(100 + k, *shape) for k in range(STEPS)]


def train_mlx(model, loss, inputs):
    chosen = fit.optimizer("adamw")
    chosen.init(model.trainable_parameters())
    gradient, losses = nn.value_and_grad(model, loss), []
    for values in inputs:
        fit.set_rate(chosen, 1e-3)
        value, grads = gradient(model, *values)
        chosen.update(model, grads)
        mx.eval(value, model.parameters(), chosen.state)
        losses.append(value.item())
    return losses


def same_weights(name, ours, theirs, reference):
    """Every tensor of the file, in float32: the export's names and layout are tested on the way. AdamW divides a
    gradient by its own size, so where it is nearly nothing rounding decides about parts of a step of 1e-3. Hence: no
    weight differs by a step, and the mean weight of no tensor by a fiftieth of one."""
    stored = export.public(name, ours, mx.float32)
    torch_side = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    assert stored.keys() == torch_side.keys()
    moved = 0.0
    for key, value in torch_side.items():
        if not key.endswith("to_k.bias"):  # softmax cancels it: its gradient is rounding alone
            difference = np.abs(np.array(stored[key]) - value)
            assert difference.max() < 1e-3, key
            assert difference.mean() < 2e-5, key
        moved = max(moved, np.abs(value - reference[key]).max())
    assert moved > 5e-3  # twenty steps of 1e-3 did go somewhere


def load_torch(module, name, ours):
    torch = pytest.importorskip("torch")
    stored = {k: torch.from_numpy(np.array(v)) for k, v in export.public(name, ours, mx.float32).items()}
    module.load_state_dict(stored)
    return {k: v.numpy().copy() for k, v in stored.items()}


def test_unet_training_equals_torch():
    """The first 20 losses within 1e-4 of their size (float32, compounding over the steps), then the weights."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    mx.random.seed(1)
    ours = unet.UNet(TINY_UNET)
    theirs = diffusers.UNet2DConditionModel.from_config(export.unet_config(TINY_UNET, 8))
    before = load_torch(theirs, "unet", ours)
    x, target, context = batches((2, 8, 8, 4)), batches((2, 8, 8, 4))[::-1], normal(5, 2, 6, 12)
    ts = np.random.default_rng(0).integers(0, 1000, (STEPS, 2))

    def loss(model, x, target, t):
        return mx.square(model(x, t, **model.prepare(None, mx.array(context))) - target).mean()

    inputs = [(mx.array(a), mx.array(b), mx.array(t.astype(np.float32))) for a, b, t in zip(x, target, ts, strict=True)]
    losses = train_mlx(ours, loss, inputs)
    adam, expected = torch.optim.AdamW(theirs.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.0), []
    for a, b, t in zip(x, target, ts, strict=True):
        out = theirs(torch.from_numpy(a).permute(0, 3, 1, 2), torch.from_numpy(t), torch.from_numpy(context)).sample
        value = torch.nn.functional.mse_loss(out.permute(0, 2, 3, 1), torch.from_numpy(b))
        adam.zero_grad()
        value.backward()
        adam.step()
        expected.append(value.item())
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    same_weights("unet", ours, theirs, before)


def test_vae_training_equals_torch():
    """As above. The posterior's noise is given, so both draw the same latents."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    mx.random.seed(2)
    ours = vae.VAE(TINY_VAE)
    theirs = diffusers.AutoencoderKL.from_config(export.vae_config(TINY_VAE, 16))
    before = load_torch(theirs, "vae", ours)
    pictures, noise = batches((2, 16, 16, 3)), batches((2, 8, 8, 4))[::-1]
    losses = train_mlx(
        ours, recipe.vae_loss, [(mx.array(a), mx.array(b)) for a, b in zip(pictures, noise, strict=True)]
    )
    adam, expected = torch.optim.AdamW(theirs.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.0), []
    for a, b in zip(pictures, noise, strict=True):
        x = torch.from_numpy(a).permute(0, 3, 1, 2)
        posterior = theirs.encode(x).latent_dist
        mean, logvar = posterior.mean, posterior.logvar
        y = theirs.decode(mean + torch.exp(0.5 * logvar) * torch.from_numpy(b).permute(0, 3, 1, 2)).sample
        value = torch_pyramid(y, x) + 1e-4 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        adam.zero_grad()
        value.backward()
        adam.step()
        expected.append(value.item())
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    same_weights("vae", ours, theirs, before)


def torch_pyramid(y, x):
    """The picture loss in torch's own functions."""
    from torch.nn import functional as F

    total = 2 * F.mse_loss(y, x)
    for k in range(4):
        total = total + F.l1_loss(y, x) * (1 if k == 0 else 0.6)
        if k < 2:
            total = total + 0.7 * sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return total


# --- export


def test_whitening_changes_the_latents_and_not_the_picture():
    """Encode-decode before and after; and the latents of what the covariance was taken from come out white."""
    mx.random.seed(3)
    model = vae.VAE(TINY_VAE)
    model.quant_conv.weight = model.quant_conv.weight * 3  # latents that are not white to begin with
    x = mx.array(normal(7, 64, 16, 16, 3))
    z, _ = model.encode(x)
    y = np.array(model.decode(z[:4]))
    flat = np.array(z).reshape(-1, 4).astype(np.float64)
    recipe.whitened(model, flat.mean(0), np.cov(flat.T))
    white, _ = model.encode(x)
    np.testing.assert_allclose(np.array(model.decode(white[:4])), y, atol=1e-3)  # float32 through 1/sqrt
    flat = np.array(white).reshape(-1, 4)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-2)
    np.testing.assert_allclose(np.cov(flat.T), np.eye(4), atol=2e-2)


# --- judge


def test_adherence_and_distance_by_hand(monkeypatch):
    """A judge that answers what it is told; a Frechet distance of two Gaussians known in closed form."""
    scenes = [sb.sample(np.random.default_rng(k)) for k in range(4)]
    truth = judge.labels(scenes)
    answers = truth.copy()
    answers[0, 0] = (answers[0, 0] + 1) % 4
    answers[1, 3] = (answers[1, 3] + 1) % 10
    monkeypatch.setattr(judge, "read", lambda *_: answers)
    shares = judge.adherence(None, None, scenes)
    assert shares == {"time": 0.75, "terrain": 1, "sky": 1, "object": 0.75, "colour": 1, "position": 1, "all": 0.5}
    unit = np.sqrt(1.5) * np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])  # mean 0, covariance 1
    a, b = unit * [1, 2], unit * 2 + [3, 0]
    monkeypatch.setattr(judge, "features", lambda _, which: which)
    assert judge.frechet(None, a, b) == pytest.approx(9 + (1 - 2) ** 2)


# --- the whole


def test_a_sheet_of_scenes_goes_where_it_can_and_nowhere_else(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    draw = ["scenes", "--size", "16", "--output"]
    bad = {
        "sc": "is not a kind of picture that mlxdiff writes",
        "sc.gif": "End it in one of",
        "file/a.png": "cannot be written",
    }
    for name, says in bad.items():
        assert main([*draw, str(tmp_path / name)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("mlxdiff train: ")
        assert says in line
    for _ in range(2):
        assert main([*draw, str(tmp_path / "new" / "a.png")]) == 0
    assert capsys.readouterr().err.splitlines() == [str(tmp_path / "new" / f"{n}.png") for n in ("a", "a-1")]
    assert Image.open(tmp_path / "new" / "a.png").size == (64, 48)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "new"]


@pytest.mark.parametrize(("name", "text"), [("run/recipe.json", "{"), ("run", "a file"), ("above", "a file")])
def test_a_run_where_none_can_be_is_one_line(tmp_path, capsys, name, text):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    folder = tmp_path / ("above/run" if name == "above" else "run")
    assert main(["storybook", "--out", str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mlxdiff train: ")


@pytest.mark.parametrize("size", ["0", "100", "20000"])
def test_a_size_that_the_judge_cannot_read_is_one_line(tmp_path, capsys, size):
    assert main(["storybook", "--out", str(tmp_path / "run"), "--size", size]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"Size {size} is not a multiple of 64 up to" in line
    assert not (tmp_path / "run").exists()
    with pytest.raises(Error, match="cannot read pictures of 64 x 96 pixels"):
        judge.read(None, np.zeros((1, 96, 64, 3), np.uint8))


@pytest.mark.slow
def test_a_folder_of_something_else_and_no_judge_are_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["storybook", "--out", str(tmp_path)]) == 1
    assert "holds something other than a run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    assert main(["judge", "storybook", "--judge", str(tmp_path / "notes.txt")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "notes.txt is not a judge" in line


def test_from_nothing_to_a_folder_that_others_open(tmp_path, capsys, monkeypatch):
    """A run of a few steps: both losses fall, the same command goes on without doing anything twice, other settings
    are refused, and diffusers draws from the folder what we draw (float16 file, float32 arithmetic on both sides)."""
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("MLXDIFF_CACHE", str(tmp_path / "cache"))
    arguments = ["storybook", "--out", str(tmp_path / "run"), "--pictures", "16", "--vae-steps", "6", "--steps", "10"]
    arguments += ["--size", "64"]
    assert main([*arguments, "--batch", "8"]) == 0
    assert "draws 64 x 64 pixels" in capsys.readouterr().out
    for stage, steps in (("vae", 6), ("denoiser", 10)):
        log = (tmp_path / "run" / stage / "log.csv").read_text().splitlines()[1:]
        losses = [float(line.split(",")[1]) for line in log]
        assert len(losses) == steps
        assert losses[-1] < losses[0]
    before = (tmp_path / "run" / "denoiser" / "state.safetensors").stat().st_mtime_ns
    assert main([*arguments, "--batch", "8"]) == 0
    assert (tmp_path / "run" / "denoiser" / "state.safetensors").stat().st_mtime_ns == before
    assert main([*arguments, "--batch", "4"]) == 1
    assert "batch 8" in capsys.readouterr().err

    settings = {"width": 64, "height": 64, "guidance": 3.0, "sampler": "ddim"}
    ours = mlxdiff.load(tmp_path / "run" / "model")("a red house", seed=3, steps=4, **settings).image
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "model", torch_dtype=torch.float32)
    g = torch.Generator().manual_seed(3)
    picture = theirs("a red house", 64, 64, 4, guidance_scale=3.0, generator=g, output_type="np").images[0]
    error = np.square(np.asarray(ours) / 255 - picture).mean()
    assert -10 * np.log10(error) > 40


# --- points in the plane. References: closed forms of the best denoiser and of the distance to a half circle


def test_the_best_denoiser_of_two_points():
    """At -1 and 1 it expects tanh(x / ratio^2); float64."""
    x = np.array([[-2.0, 0.0], [-0.3, 0.0], [0.0, 0.0], [0.1, 0.0]])
    expected = toy.best(np.array([[-1.0, 0.0], [1.0, 0.0]]), x, 0.7)
    np.testing.assert_allclose(expected[:, 0], np.tanh(x[:, 0] / 0.7**2), atol=1e-12)


def test_the_distance_to_the_moons():
    """By hand, in coordinates in which the upper moon is the unit half circle; then points on them."""
    by_hand = {(0, 2): 1, (-1, -0.5): 0.5, (1, 0.5): np.hypot(1, 0.5) - 1, (1, -2.5): 2}
    found = toy.off_moons(np.array(list(by_hand), float) - [0.5, 0.25])
    np.testing.assert_allclose(found, list(by_hand.values()), atol=1e-12)
    assert toy.off_moons(toy.two_moons(500, noise=0.0)).max() < 1e-6  # float32


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_a_perfect_denoiser_draws_the_points_it_knows(prediction, sampler):
    """The samplers' last step goes to what is expected with the least noise: one of the points, to its noise's tail."""
    points, learner = toy.two_moons(20, noise=0.0), toy.Toy(prediction)

    def perfect(x, sigma):
        signal, ratio = (1 - sigma, sigma / max(1 - sigma, 1e-6)) if prediction == "flow" else (1.0, sigma)
        known = toy.best(points, np.array(x).reshape(-1, 2) / max(signal, 1e-6), ratio)
        return mx.array(known.astype(np.float32).reshape(-1, 1, 1, 2))

    learner.denoise = perfect
    ends = learner.paths(50, steps=100, sampler=sampler)[-1]
    nearest = np.hypot(*(ends[:, None] - points).transpose(2, 0, 1)).min(1)
    assert np.median(nearest) < 0.01


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_a_toy_comes_near_the_best_denoiser(prediction):
    """In 200 steps to a tenth of the error of one that has learned nothing but the middle; the same again from the
    same seed, to the last bit."""
    points = toy.two_moons(500)
    x = points + 0.5 * normal(0, 500, 2)
    best = toy.best(points, x, 0.5)
    runs = []
    for _ in range(2):
        learner = toy.Toy(prediction, seed=3)
        runs.append(([r.loss for r in learner.learn(points, 200, seed=3)], learner.expected(x, 0.5)))
    assert runs[0][0] == runs[1][0]
    assert (runs[0][1] == runs[1][1]).all()
    assert np.square(runs[0][1] - best).mean() < 0.1 * np.square(points.mean(0) - best).mean()
