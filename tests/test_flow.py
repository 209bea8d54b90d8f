"""Rectified flow against diffusers' FlowMatch schedulers, step for step, and against closed forms."""

import math
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from mlxdiff import guidance, samplers, schedules
from mlxdiff.errors import Error
from mlxdiff.noise import Noise, draw_nhwc
from mlxdiff.schedules import Flow

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers

DEV = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
STEPS = (1, 2, 3, 4, 7, 20, 28, 50)
SEED, SHAPE = 7, (4, 6, 3)
# diffusers keeps sigmas in float32, and SD3's smallest passes through it twice more: 6e-8 a rounding.
ROUNDED = 1e-6


def row(shift=1.0, dynamic=None, ends="linspace", steps=1000) -> dict:
    return {"shift": shift, "dynamic": dynamic, "ends": ends, "steps": steps}


# ---- schedules


@pytest.mark.parametrize("steps", [1000, 500])
@pytest.mark.parametrize("dynamic", [None, DEV])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5])
def test_sd3_equals_diffusers(shift, dynamic, steps):
    """The times that the network is told too, in training steps of 1000 whatever the scheduler counts."""
    theirs = FlowMatchEulerDiscreteScheduler(steps, shift=shift, use_dynamic_shifting=dynamic is not None)
    for n in STEPS:
        theirs.set_timesteps(n, mu=1.15)  # of 4096 patches; looked at where shifting is dynamic
        schedule = schedules.flow(row(shift, dynamic, steps=steps), 4096, 28)
        ours = schedules.sigmas(schedule, "linspace", n)
        np.testing.assert_allclose(ours, theirs.sigmas.numpy(), rtol=ROUNDED, atol=1e-9)
        told = [1000 * schedule.t(s) for s in ours[:-1]]
        np.testing.assert_allclose(told, theirs.timesteps.numpy(), rtol=ROUNDED)


@pytest.mark.parametrize("tokens", [6, 256, 1024, 4096, 9216])
@pytest.mark.parametrize("dynamic", [None, DEV, DEV | {"base_shift": 0.3, "max_image_seq_len": 3000}])
def test_flux_equals_diffusers(dynamic, tokens):
    config = {"use_dynamic_shifting": True, **dynamic} if dynamic else {}
    theirs = FlowMatchEulerDiscreteScheduler(shift=1.0, **config)
    d = dynamic or DEV
    mu = calculate_shift(tokens, d["base_image_seq_len"], d["max_image_seq_len"], d["base_shift"], d["max_shift"])
    for n in STEPS:
        theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / n, n), mu=mu)  # as FluxPipeline does
        ours = schedules.sigmas(schedules.flow(row(1.0, dynamic, "trailing"), tokens, n), "trailing", n)
        np.testing.assert_allclose(ours, theirs.sigmas.numpy(), rtol=ROUNDED, atol=1e-9)


@pytest.mark.parametrize("ends", ["linspace", "trailing"])
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_spacings_between_the_models_own_ends_equal_diffusers(spacing, ends):
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0, **{f"use_{spacing}_sigmas": True})
    for n in STEPS[1:]:
        theirs.set_timesteps(
            **({"sigmas": np.linspace(1.0, 1 / n, n)} if ends == "trailing" else {"num_inference_steps": n})
        )
        ours = schedules.sigmas(Flow(3.0, ends), spacing, n)
        np.testing.assert_allclose(ours, theirs.sigmas.numpy(), rtol=2 * ROUNDED, atol=1e-8)


def test_a_shift_that_was_asked_for_replaces_the_models_own():
    assert schedules.flow(row(3.0, DEV), 4096, 28, 2.5).shift == 2.5
    assert schedules.flow(row(3.0, DEV), 4096, 28).shift == pytest.approx(math.exp(1.15))
    assert schedules.flow(row(3.0), 4096, 28).shift == 3.0


def test_x_is_what_the_network_sees():
    assert Flow().spread(0.7) == Flow().start(1.0, "linspace") == 1.0
    assert Flow().t(0.7) == 0.7


def test_a_spacing_of_the_other_family_names_those_there_are():
    with pytest.raises(Error, match=r"leading.*rectified flow") as e:
        schedules.sigmas(Flow(), "leading", 10)
    assert "linspace" in e.value.fix


# ---- samplers


def network(lib, x, sigma):
    """Some network, the same in torch and MLX: nonlinear in x, and bent over time by as much as one step shows."""
    return 0.6 * lib.sin(2 * x + 6 * sigma) + 0.5 * x * math.cos(3 * sigma)


def run_diffusers(scheduler) -> list[np.ndarray]:
    """x after each call. The network's time is the exact sigma: DPM++ and UniPC round the one they hand out."""
    h, w, c = SHAPE
    x = torch.randn(1, c, h, w, generator=torch.Generator("cpu").manual_seed(SEED))
    out = []
    for t in scheduler.timesteps:
        heun = isinstance(scheduler, FlowMatchHeunDiscreteScheduler)
        i = len(out) if not heun else (len(out) + 1) // 2
        sigma = float(scheduler.sigmas[i] if not heun else scheduler.sigmas[[0, *range(1, 99, 2)][i]])
        x = scheduler.step(network(torch, x, sigma), t, x).prev_sample
        out.append(x.numpy())
    return out


def run_ours(name, sigmas, eta=None) -> list[np.ndarray]:
    schedule, noises = Flow(), [Noise(SEED)]
    x = draw_nhwc(noises, *SHAPE) * schedule.start(sigmas[0], "linspace")
    denoise = guidance.denoiser(lambda x, t: network(mx, x, t), schedule, "flow", cond={}, dtype=mx.float32)
    extra = {} if eta is None else {"draw": lambda: draw_nhwc(noises, *SHAPE), "eta": eta}
    return [np.array(x).transpose(0, 3, 1, 2) for x, _ in samplers.of_flow(name)(denoise, x, sigmas, **extra)]


def check(theirs, ours):
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        # float32 on both sides, about ten roundings a step; a wrong coefficient shows at 1e-3
        assert np.abs(a - b).max() / max(1, np.abs(a).max()) < 1e-5


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_euler_equals_diffusers(n):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(n)
    check(run_diffusers(scheduler), run_ours("euler", schedules.sigmas(Flow(3.0), "linspace", n)))


@pytest.mark.parametrize("n", [2, 5, 20])
def test_heun_equals_diffusers(n):
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(n)
    theirs = run_diffusers(scheduler)
    check([*theirs[1::2], theirs[-1]], run_ours("heun", schedules.sigmas(Flow(3.0), "linspace", n)))


@pytest.mark.parametrize("n", [2, 5, 20])
def test_dpmpp_2m_equals_diffusers(n):
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    scheduler.set_timesteps(n)  # begins at 0.9997
    check(run_diffusers(scheduler), run_ours("dpmpp_2m", scheduler.sigmas.tolist()))


@pytest.mark.parametrize("n", [2, 5, 20])
def test_unipc_equals_diffusers(n):
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    scheduler.set_timesteps(n)
    check(run_diffusers(scheduler), run_ours("unipc", schedules.sigmas(Flow(3.0), "sgm_uniform", n)))


def test_euler_ancestral_without_noise_is_euler_and_with_it_keeps_the_marginal():
    """ComfyUI's sample_euler_ancestral_RF: noise of the share that signal (1 - s) and noise s ask for. Closed form: on
    x0 = 0 the deviation after each step is exactly sigma."""
    sigmas = schedules.sigmas(Flow(3.0), "linspace", 8)
    check(run_ours("euler", sigmas), run_ours("euler_ancestral", sigmas, eta=0.0))
    noises, shape = [Noise(SEED)], (64, 64, 4)
    draw = lambda: draw_nhwc(noises, *shape)  # noqa: E731
    steps = samplers.of_flow("euler_ancestral")(lambda x, s: mx.zeros_like(x), draw(), sigmas, draw=draw, eta=1.0)
    for (x, _), s in zip(steps, sigmas[1:], strict=True):
        # 16384 draws: the deviation is known to 1 / sqrt(2 * 16384) = 0.55 %; four of those
        assert mx.std(x).item() == pytest.approx(s, rel=0.023, abs=1e-7)


def test_euler_ancestral_step_is_comfyuis():
    """Its arithmetic, written out: renoise = sqrt(s'^2 - down^2 (1 - s')^2 / (1 - down)^2)."""
    s, s_next, eta, x, x0, z = 0.8, 0.55, 0.7, 1.3, -0.4, 0.9
    down = s_next * (1 + (s_next / s - 1) * eta)
    renoise = (s_next**2 - down**2 * (1 - s_next) ** 2 / (1 - down) ** 2) ** 0.5
    want = (1 - s_next) / (1 - down) * (down / s * x + (1 - down / s) * x0) + z * renoise
    fn = samplers.of_flow("euler_ancestral")
    ((got, _),) = fn(lambda *_: mx.array([x0]), mx.array([x]), [s, s_next], draw=lambda: mx.array([z]), eta=eta)
    assert got.item() == pytest.approx(want, rel=1e-6)


def gaussian(mean: float, spread: float):
    """E[x0 | x] for data N(mean, spread^2) in flow form, and the flow's exact map of x from sigma to sigma'."""
    total = lambda s: ((1 - s) ** 2 * spread**2 + s**2) ** 0.5  # noqa: E731

    def denoise(x, s):
        return mean + (1 - s) * spread**2 / total(s) ** 2 * (x - (1 - s) * mean)

    def exact(x, s, s_next):
        return (1 - s_next) * mean + total(s_next) / total(s) * (x - (1 - s) * mean)

    return denoise, exact


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 2)])
def test_order_on_gaussian_data(name, order):
    """Halving the steps' length divides the error by 2^order. From 0.9 to 0.1, both ends away from first-order steps;
    in float64, by numpy arrays in MLX's place."""
    denoise, exact = gaussian(0.7, 0.4)
    errors = []
    for n in (40, 80):
        sigmas = np.linspace(0.9, 0.1, n + 1).tolist()
        *_, (x, _) = samplers.of_flow(name)(denoise, np.array([1.3, -0.8]), sigmas)
        errors.append(np.abs(x - exact(np.array([1.3, -0.8]), 0.9, 0.1)).max())
    assert math.log2(errors[0] / errors[1]) > order - 0.25


def test_every_sampler_either_suits_flow_or_says_which_do():
    suited = {n for n, r in samplers.SAMPLERS.items() if r.flow is not None}
    assert suited == {"euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc"}
    for name in samplers.SAMPLERS.keys() - suited:
        with pytest.raises(Error, match=name) as e:
            samplers.of_flow(name)
        assert "dpmpp_2m" in e.value.fix


def test_sigmas_descend_for_every_spacing():
    for spacing in schedules.FLOW_SPACINGS:
        for n in (2, 8, 30):
            levels = schedules.sigmas(Flow(2.0, "trailing"), spacing, n)
            assert len(levels) == n + 1
            assert levels[0] == pytest.approx(1)
            assert levels[-1] == 0
            assert all(a > b for a, b in pairwise(levels))


def test_a_start_image_is_noised_along_a_line():
    flow = Flow()
    assert [flow.noised(8.0, 4.0, sigma) for sigma in (0.0, 0.25, 1.0)] == [8.0, 7.0, 4.0]
