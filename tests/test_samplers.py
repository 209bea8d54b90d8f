"""Samplers against diffusers' schedulers, step for step, and against the closed form on Gaussian data."""

import importlib
import inspect
import math
import sys
import types
from itertools import pairwise

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch

from mlxdiff import guidance, schedules
from mlxdiff.noise import Noise, draw_nhwc
from mlxdiff.samplers import SAMPLERS, unic
from mlxdiff.schedules import KDIFFUSION, Discrete

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SEED, SHAPE = 7, (5, 7, 4)  # h, w, c
KINDS = {"eps": "epsilon", "v": "v_prediction"}


def network(lib, x, t):
    """Some network, the same in torch and MLX: nonlinear in x, and bent over t by as much as one step shows."""
    return 0.6 * lib.sin(2 * x + t / 170) + 0.5 * x * math.cos(t / 300)


# ---- diffusers


def run_diffusers(scheduler, steps, eta=None):
    """diffusers' pipeline loop: x after each step, in its own form, from SEED's noise."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    scheduler.set_timesteps(steps)
    h, w, c = SHAPE
    x = torch.randn(1, c, h, w, generator=generator) * scheduler.init_noise_sigma
    offered = {"generator": generator} | ({} if eta is None else {"eta": eta})
    extra = {k: v for k, v in offered.items() if k in inspect.signature(scheduler.step).parameters}
    for t in scheduler.timesteps:
        out = network(torch, scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(out, t, x, **extra).prev_sample
        yield x.numpy()


def run_ours(name, scheduler, spacing, steps, prediction, eta=None, final_alpha_one=True):
    """The same run of ours on diffusers' training table: sigmas, and x in VE form, (1, c, h, w), after each step."""
    row = SAMPLERS[name]
    table = scheduler.alphas_cumprod.numpy().astype(np.float64)
    if scheduler.config.get("rescale_betas_zero_snr"):
        table[-1] = 0  # where some schedulers have written 2^-24 already
    schedule = Discrete(table, row.grid, scheduler.config.steps_offset, final_alpha_one)
    sigmas = schedules.sigmas(schedule, spacing, steps)
    noises = [Noise(SEED)]
    x = draw_nhwc(noises, *SHAPE) * schedule.start(sigmas[0], spacing)
    denoise = guidance.denoiser(lambda x, t: network(mx, x, t), schedule, prediction, cond={}, dtype=mx.float32)
    extra = {"draw": lambda: draw_nhwc(noises, *SHAPE), "eta": row.eta if eta is None else eta} if row.noisy else {}
    return sigmas, [np.array(x).transpose(0, 3, 1, 2) for x, _ in row.fn(denoise, x, sigmas, **extra)]


def deviation(theirs, ours, sigmas, ve):
    """The largest difference of any step, relative to the largest value there (or 1), in VE form."""
    assert len(theirs) == len(ours) == len(sigmas) - 1
    worst = 0.0
    for a, b, s in zip(theirs, ours, sigmas[1:], strict=True):
        a = a if ve else a * math.sqrt(1 + s**2)
        worst = max(worst, np.abs(a - b).max() / max(1, np.abs(a).max()))
    return worst


# Both sides work in float32, 6e-8 a rounding, about ten roundings a step; measured 2e-7 to 3e-6. A coefficient or a
# time that is wrong in the third digit shows at 1e-3.
FLOAT32 = 1e-5

CASES = [
    ("euler", "EulerDiscreteScheduler", {}, None),
    ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}, None),
    ("heun", "HeunDiscreteScheduler", {}, None),
    ("dpmpp_2m", "DPMSolverMultistepScheduler", {}, None),
    ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, None),
    ("unipc", "UniPCMultistepScheduler", {}, None),
    ("pndm", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}, None),
    ("pndm", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}, None),
    ("ddim", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}, 0.0),
    ("ddim", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}, 0.5),
    ("ddim", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}, 1.0),
    ("ddpm", "DDPMScheduler", {"clip_sample": False}, None),
    ("lcm", "LCMScheduler", {}, None),
]


def compare(name, cls, kwargs, eta, spacing, prediction, steps):
    if spacing == "karras":
        kwargs = {**kwargs, "use_karras_sigmas": True, "timestep_spacing": "linspace"}
    elif spacing != "lcm":
        kwargs = {**kwargs, "timestep_spacing": spacing}
    scheduler = getattr(diffusers, cls)(**SD, **kwargs, prediction_type=KINDS[prediction])
    theirs = list(run_diffusers(scheduler, steps, eta))
    if name == "heun":
        theirs = [*theirs[1::2], theirs[-1]]  # two calls a step, one in the last
    if name == "pndm" and steps > 1:
        del theirs[0]  # two calls in the first step
    final = kwargs.get("set_alpha_to_one", True)
    sigmas, ours = run_ours(name, scheduler, spacing, steps, prediction, eta, final)
    return deviation(theirs, ours, sigmas, ve=SAMPLERS[name].grid is KDIFFUSION)


def spacings(name, cls):
    """The spacings that diffusers' scheduler has. LCM has one of its own; DDIM and PNDM step down by 1000 // steps,
    which is not the distance of their linspace."""
    if name == "lcm":
        return ["lcm"]
    karras = "use_karras_sigmas" in inspect.signature(getattr(diffusers, cls)).parameters
    return ["leading", "trailing"] + ["linspace"] * (name not in ("ddim", "pndm")) + ["karras"] * karras


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(
    ("name", "cls", "kwargs", "eta", "spacing"), [(*case, s) for case in CASES for s in spacings(*case[:2])]
)
def test_step_for_step_with_diffusers(name, cls, kwargs, eta, spacing, prediction):
    if name == "pndm" and prediction == "v":
        pytest.skip("diffusers' PNDM weighs velocities of several times, and converts the sum at one of them")
    for steps in (1, 2, 4, 20):  # 20 divides 1000: with trailing, too, DDIM's stride and distance agree
        if steps == 1 and spacing in ("linspace", "karras") and SAMPLERS[name].grid is KDIFFUSION:
            continue  # diffusers' range is then sigma(0) alone
        assert compare(name, cls, kwargs, eta, spacing, prediction, steps) < FLOAT32, steps


@pytest.mark.parametrize(
    ("name", "cls", "kwargs", "eta", "spacing"),
    # diffusers' Heun and PNDM have no zero SNR
    [
        (*case, s)
        for case in CASES
        if case[0] not in ("heun", "pndm")
        for s in spacings(*case[:2])
        if s in ("leading", "trailing", "lcm")
    ],
)
def test_zero_terminal_snr_with_diffusers(name, cls, kwargs, eta, spacing):
    # diffusers' Euler, x + (x - x0) / sigma * (sigma' - sigma), takes 4096 from 4096 where trailing begins: 4096 * 6e-8
    # = 2.5e-4 of error in theirs, carried on by later steps. Ours, x0 + sigma' / sigma * (x - x0), has none.
    cancels = spacing == "trailing" and name in ("euler", "euler_ancestral")
    steps = 4 if eta == 1.0 else 10  # with eta 1 and 10 steps diffusers' DDIM takes the root of -1e-8
    kwargs = {**kwargs, "rescale_betas_zero_snr": True}
    assert compare(name, cls, kwargs, eta, spacing, "v", steps) < (2e-3 if cancels else FLOAT32)


def brownian(draw):
    """A noise sampler as k-diffusion has it, W(s_next) - W(s) over its deviation, on a path drawn as it is asked for:
    within each step first to the middle, then from the start again to the end."""
    halves = {}

    def between(s, s_next):
        s, s_next = float(s), float(s_next)
        half, w = halves.pop(s, (s, 0.0))
        w = w + math.sqrt(half - s_next) * draw()
        if half == s:
            halves[s] = s_next, w
        return w / math.sqrt(s - s_next)

    return between


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("spacing", ["linspace", "karras", "leading"])
def test_dpmpp_sde_step_for_step_with_diffusers(monkeypatch, spacing, prediction):
    """diffusers' own steps, with its Brownian tree, whose numbers are torchsde's, replaced by the path above."""
    monkeypatch.setitem(
        sys.modules, "torchsde", types.ModuleType("torchsde")
    )  # imported there, needed by the tree only
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    monkeypatch.delitem(sys.modules, module.__name__)
    kwargs = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    scheduler = module.DPMSolverSDEScheduler(**SD, **kwargs, prediction_type=KINDS[prediction])
    h, w, c = SHAPE
    noise = Noise(SEED)
    noise.draw((1, c, h, w))  # the start
    scheduler.set_timesteps(8)
    scheduler.noise_sampler = brownian(lambda: torch.tensor(noise.draw((1, c, h, w))))
    monkeypatch.setattr(scheduler, "set_timesteps", lambda steps: None)  # it would drop the noise sampler
    theirs = list(run_diffusers(scheduler, 8))
    sigmas, ours = run_ours("dpmpp_sde", scheduler, spacing, 8, prediction)
    assert deviation([*theirs[1::2], theirs[-1]], ours, sigmas, ve=True) < FLOAT32


# ---- Gaussian data of deviation C: in both families x0 is known, and so is the way of every sample. Float64.

C = 0.7


def ve_x0(x, s):
    return C**2 / (C**2 + s**2) * x


def flow_x0(x, s):  # x = (1 - s) x0 + s noise
    return (1 - s) * C**2 / ((1 - s) ** 2 * C**2 + s**2) * x


def ve_std(s):
    return math.sqrt(C**2 + s**2)


def flow_std(s):
    return math.sqrt((1 - s) ** 2 * C**2 + s**2)


FAMILIES = {"ve": (ve_x0, ve_std, 14.0, 0.05), "flow": (flow_x0, flow_std, 1.0, 0.03)}


@pytest.mark.parametrize("family", FAMILIES)
def test_order_of_pndm_on_an_even_grid(family):
    """Its first step, Heun's, makes it third: away from 0, where the slope bends."""
    x0, std, high, low = *FAMILIES[family][:2], 0.9, 0.3
    errors = []
    for n in (160, 320, 640):
        *_, (x, _) = SAMPLERS["pndm"].fn(x0, 1.0, np.linspace(high, low, n + 1).tolist())
        errors.append(abs(x - std(low) / std(high)))
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([3, 3], abs=0.15)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_order_of_convergence_on_a_gaussian(name, order, family):
    """x(end) = x(start) std(end) / std(start); twice the steps divide the error by 2^order. One code, both families."""
    x0, std, high, low = FAMILIES[family]
    errors = []
    for n in (40, 80, 160):
        sigmas = (np.linspace(high ** (1 / 7), low ** (1 / 7), n + 1) ** 7).tolist()
        *_, (x, _) = SAMPLERS[name].fn(x0, 1.0, sigmas)
        errors.append(abs(x - std(low) / std(high)))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([order, order], abs=0.05)  # measured 0.99 to 3.02


def spread(name, n, eta, x0=ve_x0, low=0.02):
    """The exact deviation of a sampler's result on VE data: all is linear, so x is its row of weights over the start
    and each draw, one unit vector each, and the result's variance is the sum of their squares."""
    sigmas = (np.linspace(14 ** (1 / 7), low ** (1 / 7), n + 1) ** 7).tolist()
    axes = iter(np.eye(2 * n + 1))
    x = ve_std(14) * next(axes)
    *_, (x, _) = SAMPLERS[name].fn(x0, x, sigmas, draw=lambda: next(axes), eta=eta)
    return math.sqrt(np.sum(x**2))


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize(
    ("name", "order"), [("ddim", 1), ("ddpm", 1), ("euler_ancestral", 1), ("dpmpp_2m_sde", 2), ("dpmpp_sde", 2)]
)
def test_noisy_samplers_keep_the_spread_of_gaussian_data(name, order, eta):
    """At any eta the result has the data's deviation (with what is left at the last sigma), at the sampler's order."""
    errors = [abs(spread(name, n, eta) - ve_std(0.02)) for n in (100, 200, 400)]
    assert errors[-1] < 0.01 * C
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([order, order], abs=0.15)


def test_lcm_keeps_the_spread_exactly_with_a_perfect_consistency_model():
    """f(x, s) = x C / std(s) maps each sample to its end; then any number of steps leaves deviation C."""
    for n in (1, 2, 5):
        end = spread("lcm", n, 1.0, x0=lambda x, s: C / ve_std(s) * x, low=0.0)
        assert end == pytest.approx(C, rel=1e-12)


def test_unic_is_exact_for_x0_quadratic_in_log_sigma():
    """The integral over one step of e^(u - h) q(u) du, for q through the last, this and the next x0, in closed form."""
    h, h_old = 0.4, 0.7
    a, b, c = 1.3, -2.0, 0.9

    def q(u):
        return a + b * u + c * u**2

    def anti(u):  # of e^u q(u)
        return math.exp(u) * (a + b * (u - 1) + c * (u**2 - 2 * u + 2))

    exact = math.exp(-h) * (anti(h) - anti(0))
    middle = q(0) + unic(h, h_old, (q(0) - q(-h_old)) / h_old, q(h) - q(0))
    assert (1 - math.exp(-h)) * middle == pytest.approx(exact, rel=1e-12)


# ---- the contract


def curved(x, s):
    return np.tanh(x / (1 + s)) + 0.1 * np.cos(3 * x)


RUN = [14.0, 6.0, 2.5, 1.0, 0.3, 0.0]


def test_kin_are_equal():
    """eta 0 of DDIM is Euler, eta 0 of DPM++ 2M SDE is DPM++ 2M, and DDPM is DDIM at eta 1."""
    x = np.linspace(-20, 20, 9)

    def last(name, **extra):
        *_, (end, _) = SAMPLERS[name].fn(curved, x, RUN, **extra)
        return end

    draws = iter(np.random.default_rng(0).standard_normal((100, 9)))
    np.testing.assert_array_equal(last("ddim", draw=None, eta=0.0), last("euler"))
    np.testing.assert_array_equal(last("dpmpp_2m_sde", draw=None, eta=0.0), last("dpmpp_2m"))
    assert SAMPLERS["ddpm"].fn is SAMPLERS["ddim"].fn
    assert np.abs(last("ddpm", draw=lambda: next(draws), eta=1.0) - last("euler")).max() > 0.01


@pytest.mark.parametrize("end", [0.0, 0.1])
@pytest.mark.parametrize("name", SAMPLERS)
def test_visits_name_every_sigma_that_is_denoised(name, end):
    """Also when the run hands over above 0, as to a refiner. One (x, x0) a step; the last x is x0 where sigma is 0."""
    row, seen = SAMPLERS[name], []
    sigmas = [*RUN[:-1], end]

    def denoise(x, s):
        seen.append(s)
        return curved(x, s)

    extra = {"draw": lambda: np.ones(3), "eta": row.eta} if row.noisy else {}
    steps = list(row.fn(denoise, np.arange(3.0), sigmas, **extra))
    assert len(steps) == len(sigmas) - 1
    assert set(seen) == set(row.visits(sigmas))
    assert 0 not in seen
    if end == 0:
        np.testing.assert_array_equal(*steps[-1])


@pytest.mark.parametrize("name", ["euler", "ddim", "euler_ancestral", "heun", "dpmpp_sde", "lcm"])
def test_one_step_samplers_can_be_cut_anywhere(name):
    """Two halves of the sigmas in turn are the whole run: what a refiner hand-over relies on."""
    row = SAMPLERS[name]

    def run(parts):
        draws, x = iter(np.random.default_rng(1).standard_normal((100, 5))), np.linspace(-9, 9, 5)
        for part in parts:
            extra = {"draw": lambda: next(draws), "eta": row.eta} if row.noisy else {}
            *_, (x, _) = row.fn(curved, x, part, **extra)
        return x

    np.testing.assert_array_equal(run([RUN]), run([RUN[:3], RUN[2:]]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_is_upcast_and_a_batch_is_its_rows(name):
    row = SAMPLERS[name]

    def run(x):
        noises = [Noise(3) for _ in range(x.shape[0])]
        extra = {"draw": lambda: draw_nhwc(noises, 2, 3, 4), "eta": row.eta} if row.noisy else {}
        *_, (x, x0) = row.fn(lambda x, s: mx.tanh(x), x, RUN, **extra)
        assert x.dtype == x0.dtype == mx.float32
        return np.array(x)

    x = mx.array(np.random.default_rng(2).standard_normal((2, 2, 3, 4)).astype(np.float32)) * RUN[0]
    np.testing.assert_array_equal(run(x)[1:], run(x[1:]))
