"""The recipes that train the built-in model. References: an uninterrupted run for a resumed one, closed forms for what
is measured, torch's own GroupNorm for ours."""

import argparse

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import mlxdiff  # noqa: E402
from mlxdiff.train import __main__ as train  # noqa: E402
from mlxdiff.train import measure  # noqa: E402
from mlxdiff.train.tune import LoraTuning  # noqa: E402
from tests.recipes import cpu, flow_torch, student_torch, style, vae_torch  # noqa: E402
from tests.recipes import storybook_torch as st  # noqa: E402

TINY = vae_torch.Settings(latents=2, channels=(8, 8), attention=False, size=32, steps=8)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Two shards of four pictures, and two pictures to measure with; crops of 16."""
    for name, value in {"SHARD": 4, "KEPT": 2, "CROP": 16}.items():
        monkeypatch.setattr(vae_torch, name, value)
    vae_torch.render(tmp_path, 2, 32)
    np.save(tmp_path / "kept.npy", vae_torch.drawn(0, 2, 32))
    return tmp_path


def weights(run, name):
    return torch.load(run / name / "state.pt")["mean"]


def test_a_resumed_run_is_the_same_run(run, monkeypatch):
    """Left after a save among the crops and started again, against one that was not: equal to the last bit."""
    assert list(vae_torch.train(run, "whole", TINY)) == list(range(1, 9))
    with monkeypatch.context() as patch:
        patch.setattr(vae_torch, "SAVE_EVERY", -1)
        for step in vae_torch.train(run, "parts", TINY):
            if step == 3:
                break
    assert list(vae_torch.train(run, "parts", TINY)) == [4, 5, 6, 7, 8]
    whole, parts = weights(run, "whole"), weights(run, "parts")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert list(vae_torch.train(run, "parts", TINY)) == []
    with pytest.raises(SystemExit, match="same settings"):
        next(vae_torch.train(run, "parts", vae_torch.Settings()))


def test_another_run_starts_from_the_averaged_weights(run):
    list(vae_torch.train(run, "first", TINY))
    still = vae_torch.Settings(**vars(TINY) | {"start": "first", "rate": 0.0, "steps": 1})
    list(vae_torch.train(run, "second", still))
    first, second = weights(run, "first"), weights(run, "second")
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_decoder_learns_alone_and_leaves_the_latents(run):
    list(vae_torch.train(run, "first", TINY))
    vae_torch.export(run, "first", run / "public")
    tuning = vae_torch.Settings(**vars(TINY) | {"start": str(run / "public"), "decoder": True, "steps": 3})
    list(vae_torch.train(run, "second", tuning))
    first, second = weights(run, "first"), weights(run, "second")
    for name, before in first.items():
        learns = name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(second[name], before.half().float()) != learns, name


def test_measures_by_hand():
    """A step of 100 grey levels over two pixels is half as steep as over one; the decibels of 26 of 255."""
    picture = np.zeros((1, 32, 32, 3), np.uint8)
    picture[:, :, 16:] = 100
    blurred = picture.copy()
    blurred[:, :, 16] = 50
    for turned in ((0, 1, 2, 3), (0, 2, 1, 3)):  # steep sideways, and upwards
        assert measure.steepness(picture.transpose(turned)) == pytest.approx(100, abs=1e-3)
        assert measure.steepness(blurred.transpose(turned)) == pytest.approx(50, abs=1e-3)

    class Off:
        def encode(self, x):
            self.latent_dist, self.x = self, x
            return self

        def mode(self):
            return self.x

        def decode(self, x):
            self.sample = x + 26 / 127.5
            return self

    mean, worst, crispness = vae_torch.measure(Off(), picture)
    assert mean == worst == pytest.approx(-20 * np.log10(26 / 255), abs=1e-3)
    assert crispness == pytest.approx(1, abs=1e-3)


def test_edges_count_where_the_picture_is_steep():
    """A step of 1 between columns 3 and 4 is steep in columns 2 to 4: three of eight."""
    x = torch.zeros(1, 3, 8, 8)
    x[..., 4:] = 1
    for column, expected in {0: 0.0, 1: 0.0, 2: 0.1 / 8 / (3 / 8 + 1e-3), 4: 0.1 / 8 / (3 / 8 + 1e-3), 5: 0.0}.items():
        y = x.clone()
        y[..., column] += 0.1
        assert vae_torch.edge_loss(y, x).item() == pytest.approx(expected, rel=1e-4)


def test_the_norm_for_narrow_layers_equals_torch():
    """Values and all three gradients; float32 sums in another order."""
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    target, norm = torch.randn(2, 16, 6, 6), torch.nn.GroupNorm(8, 16)
    torch.nn.init.normal_(norm.weight)
    results = []
    for fn in (norm, lambda x: cpu.GroupNorm.apply(x, norm.weight, norm.bias, 8, norm.eps)):
        given = x.clone().requires_grad_()
        y = fn(given)
        results.append((y, *torch.autograd.grad((y * target).sum(), (given, norm.weight, norm.bias))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_student_begins_where_diffusers_ddim_does():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**st.SCHEDULE, timestep_spacing="trailing")
    scheduler.set_timesteps(student_torch.STEPS)
    assert student_torch.times() == scheduler.timesteps.tolist()
    levels, every = student_torch.teachers_levels(), student_torch.noise_levels()
    ends = np.cumsum([0, *student_torch.INSIDE])
    assert [levels[k] for k in ends] == pytest.approx([*every[student_torch.times()].tolist(), 0.0])


def test_the_teachers_walk_equals_the_closed_form():
    """Of Gaussian data of spread 0.5, where the best denoiser is a formula: x shrinks with the spread of noise and data
    together. The teacher's 12 steps are off by 3 % at most, at the end."""

    class Best:
        def __call__(self, x, t, context):
            every = student_torch.noise_levels().log().numpy()
            s = float(np.exp(np.interp(t[0].item(), np.arange(1000), every)))
            x = x * (1 + s**2) ** 0.5
            x0 = x * 0.25 / (0.25 + s**2)
            self.sample = (x / (1 + s**2) - x0) * (1 + s**2) ** 0.5 / s
            return self

    noise = torch.randn(2, 8, 4, 4)
    stops = student_torch.walk(Best(), torch.zeros(4, 40, 128), noise)
    levels = [student_torch.teachers_levels()[k] for k in np.cumsum([0, *student_torch.INSIDE])]
    start = (0.25 + levels[0] ** 2) ** 0.5 / (1 + levels[0] ** 2) ** 0.5
    for stop, s in zip(stops, levels, strict=True):
        share = (0.25 + s**2) ** 0.5 / (1 + s**2) ** 0.5 / start
        torch.testing.assert_close(stop, noise * share, rtol=0.032 if s == 0 else 0.012, atol=1e-5)


def test_the_flow_sibling_is_a_public_folder_that_diffusers_and_we_draw_alike_with(tmp_path, monkeypatch):
    """Random weights, both in float32 from the same float16 files, T5 left out: above 40 dB. And the one token that
    stands for T5's 256 in training, against all 256 of them in diffusers' attention."""
    import diffusers

    torch.manual_seed(0)
    net = flow_torch.network()
    torch.nn.init.normal_(net.proj_out.weight, std=0.1)
    torch.save({"transformer": net.state_dict()}, tmp_path / "transformer.pt")
    flow_torch.export(argparse.Namespace(run=tmp_path, folder=tmp_path / "flow", start=st.START))
    file = tmp_path / "flow" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_size < 8_000_000
    more = {"torch_dtype": torch.float32, **flow_torch.WITHOUT_T5}
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "flow", **more)
    theirs.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(1)
    small = {"height": 64, "width": 64, "guidance_scale": 4.0}
    (want,) = theirs("a red house", num_inference_steps=3, generator=g, output_type="np", **small).images
    monkeypatch.setenv("MLXDIFF_CACHE", str(tmp_path / "cache"))
    pipe = mlxdiff.load(tmp_path / "flow", dtype="float32")
    ours = pipe("a red house", seed=1, steps=3, guidance=4.0, width=64, height=64).image
    assert -10 * np.log10(np.square(np.asarray(ours) / 255 - want).mean()) > 40

    ids = theirs.tokenizer("a red house", padding="max_length", return_tensors="pt").input_ids
    context, pooled = flow_torch.read(st.known_text(st.START), ids)
    x, t = torch.randn(1, 8, 8, 8), torch.tensor([500.0])
    with torch.no_grad():
        whole = net(x, torch.nn.functional.pad(context, (0, 0, 0, flow_torch.LEFT_OUT - 1)), pooled, t).sample
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", flow_torch.attention)
        torch.testing.assert_close(net(x, context, pooled, t).sample, whole, rtol=1e-3, atol=1e-4)


def test_the_style_is_trained_by_two_commands_and_goes_on_where_it_was(tmp_path, monkeypatch):
    """The commands are such as `mlxdiff train` takes, and a run that is past the first is not asked to go back."""
    calls = []
    monkeypatch.setattr(style, "COUNT", 1)
    monkeypatch.setattr(style, "ship", lambda folder: calls.append(folder))
    monkeypatch.setattr(style.subprocess, "run", lambda call, **how: calls.append(call[4:]))
    style.make(tmp_path)
    *trainings, shipped = calls
    asked = [train._settings(train.parser().parse_args(words), LoraTuning) for words in trainings]
    assert [(tuning.steps, tuning.layers) for tuning in asked] == [(600, ("all",)), (1000, ("all",))]
    assert shipped == tmp_path
    assert {f.suffix for f in (tmp_path / "pictures").iterdir()} == {".png", ".txt"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text('{"steps": 1000}')
    calls.clear()
    style.make(tmp_path)
    assert calls == [trainings[1], tmp_path]
