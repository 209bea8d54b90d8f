"""Schedules against diffusers' schedulers, scipy, closed forms and ComfyUI's published definitions."""

import math

import diffusers
import numpy as np
import pytest
import scipy.stats

from mlxdiff.errors import Error
from mlxdiff.schedules import (
    DDIM,
    DDPM,
    KDIFFUSION,
    LOGSNR,
    SPACINGS,
    Discrete,
    alpha_bar,
    beta_quantile,
    betas,
    discrete,
    q_sample,
    q_step,
    sigmas,
    zero_snr,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ROW = {
    "betas": "scaled_linear", "start": 0.00085, "end": 0.012, "steps": 1000,
    "zero_snr": False, "spacing": "leading", "offset": 1, "final_alpha_one": False, "sampler": "ddim",
}  # fmt: skip


def sd(grid=KDIFFUSION, **kwargs):
    """The Stable Diffusion schedule in diffusers' own float32 table, so that spacings can be compared to 1e-6."""
    return Discrete(diffusers.DDPMScheduler(**SD).alphas_cumprod.numpy().astype(np.float64), grid, **kwargs)


@pytest.mark.parametrize("n", [1000, 37])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_betas_equal_diffusers(kind, n):
    theirs = diffusers.DDPMScheduler(n, 0.0001, 0.02, {"cosine": "squaredcos_cap_v2"}.get(kind, kind))
    ours = betas(kind, n, 0.0001, 0.02)
    # diffusers rounds each beta (or 1 - beta, for the cosine a difference of two cosines) to float32: 2^-24
    np.testing.assert_allclose(ours, theirs.betas.numpy(), rtol=3e-7, atol=6e-8)
    # so each factor 1 - beta is off by up to 2^-24, relative to itself, and n of them multiply
    off = np.sum(2**-24 / (1 - ours))
    np.testing.assert_allclose(alpha_bar(ours), theirs.alphas_cumprod.numpy(), rtol=off)


def test_zero_snr_equals_diffusers():
    theirs = diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True).alphas_cumprod.numpy()
    ours = zero_snr(alpha_bar(betas("scaled_linear", 1000, 0.00085, 0.012)))
    assert ours[-1] == theirs[-1] == 0
    # Shifting to zero leaves float32 a few digits at the noisy end: the error stays that of sqrt(alpha_bar), 1e-6.
    np.testing.assert_allclose(np.sqrt(ours), np.sqrt(theirs), rtol=0, atol=2e-6)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_zero_snr_sigma_is_finite_and_diffusers(scheduler):
    theirs = getattr(diffusers, scheduler)(**SD, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    theirs.set_timesteps(5)
    ours = sigmas(discrete({**ROW, "zero_snr": True}, KDIFFUSION), "trailing", 5)
    assert ours[0] == pytest.approx(4096, rel=1e-6)  # sqrt(2^24 - 1)
    np.testing.assert_allclose(ours, theirs.sigmas.numpy(), rtol=1e-4)  # the float32 table, as above


def test_zero_snr_of_the_ddpm_line_leaves_no_signal():
    """diffusers has alpha_bar = 0 there; what 2^-48 leaves of the signal, 2^-24, is below a float32 digit."""
    schedule = discrete({**ROW, "zero_snr": True}, DDIM)
    assert schedule.sigmas[-1] == pytest.approx(2**24)
    assert schedule.t(schedule.sigmas[-1]) == 999


def test_q_sample_is_the_chain():
    """Mean and variance of q_step repeated equal those of q_sample: prod sqrt(1 - beta) and 1 - alpha_bar."""
    b = betas("linear", 50, 0.001, 0.2)
    mean, variance = 1.0, 0.0
    for t, a in enumerate(alpha_bar(b)):
        mean = q_step(mean, 0.0, b[t])
        variance = q_step(math.sqrt(variance), 0.0, b[t]) ** 2 + q_step(0.0, 1.0, b[t]) ** 2  # independent parts
        assert mean == pytest.approx(q_sample(1.0, 0.0, a), rel=1e-12)
        assert variance == pytest.approx(q_sample(0.0, 1.0, a) ** 2, rel=1e-12)


def test_q_sample_equals_diffusers_add_noise():
    import torch

    theirs = diffusers.DDPMScheduler(**SD)
    x0, noise = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 2)).astype(np.float32)
    t = torch.tensor([0, 500, 999])
    expected = theirs.add_noise(torch.tensor(x0), torch.tensor(noise), t).numpy()
    a = alpha_bar(betas("scaled_linear", 1000, 0.00085, 0.012))[t].reshape(3, 1, 1, 1)
    np.testing.assert_allclose(q_sample(x0, noise, a), expected, atol=5e-6)  # float32 table and arithmetic


def test_t_inverts_sigma():
    schedule = sd()
    for t in (0, 1, 20, 499, 999):
        assert schedule.t(float(schedule.sigma(t))) == t
        assert schedule.t(float(np.float32(schedule.sigmas[t]))) == t  # a float32 sigma is still that step
    for t in (0.25, 7.5, 640.125):
        assert schedule.t(float(schedule.sigma(t))) == pytest.approx(t, abs=1e-9)
        assert sd(LOGSNR).t(float(schedule.sigma(t))) == round(t)
    assert schedule.t(1e-9) == 0
    assert schedule.t(1e9) == 999


def test_interpolation_equals_diffusers_sigma_to_t():
    theirs = diffusers.EulerDiscreteScheduler(**SD)
    log_sigmas = np.log(sd().sigmas)
    for sigma in np.exp(np.linspace(-4, 4, 40)):
        assert sd().t(sigma) == pytest.approx(theirs._sigma_to_t(np.array(sigma), log_sigmas), abs=1e-9)


KINDS = [
    ("EulerDiscreteScheduler", KDIFFUSION),
    ("EulerAncestralDiscreteScheduler", KDIFFUSION),
    ("HeunDiscreteScheduler", KDIFFUSION),
    ("DPMSolverMultistepScheduler", LOGSNR),
    ("UniPCMultistepScheduler", LOGSNR),
    ("DDPMScheduler", DDPM),
    ("DDIMScheduler", DDIM),
]


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30, 50, 333])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(("name", "grid"), KINDS)
def test_step_spacings_equal_diffusers(name, grid, spacing, offset, steps):
    theirs = getattr(diffusers, name)(**SD, timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(steps)
    schedule = sd(grid, offset=offset)
    ours = sigmas(schedule, spacing, steps)
    times = theirs.timesteps.numpy()
    if name == "HeunDiscreteScheduler":  # each inner step stands twice
        times = times[::2]
    assert len(ours) == steps + 1
    got = [schedule.t(s) for s in ours[:-1]]
    if grid is KDIFFUSION:
        levels = theirs.sigmas.numpy()
        levels = levels[[*range(0, len(levels) - 1, 2), -1]] if name == "HeunDiscreteScheduler" else levels
        np.testing.assert_allclose(ours, levels, rtol=3e-7)  # float32 sigmas, and float32 times between the steps
        # Off the whole steps diffusers interpolates sigma but not its logarithm, so its t and ours part slightly: most
        # between steps 0 and 1, where sigma grows by 40 %.
        np.testing.assert_allclose(got, times, rtol=0, atol=0.05 if spacing == "linspace" else 0)
    else:
        np.testing.assert_array_equal(got, times)
        if hasattr(theirs, "sigmas"):
            np.testing.assert_allclose(ours, theirs.sigmas.numpy(), rtol=3e-7)  # float32


@pytest.mark.parametrize("steps", [1, 2, 10, 25, 60])
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@pytest.mark.parametrize(("name", "grid"), [KINDS[0], KINDS[2], KINDS[3], KINDS[4]])
def test_sigma_spacings_equal_diffusers(name, grid, spacing, steps):
    if steps == 1 and grid is KDIFFUSION:
        pytest.skip("diffusers' Euler takes its range from linspace, which for one step is sigma(0) alone")
    theirs = getattr(diffusers, name)(**SD, **{f"use_{spacing}_sigmas": True}, timestep_spacing="linspace")
    theirs.set_timesteps(steps)
    schedule = sd(grid)
    ours = sigmas(schedule, spacing, steps)
    levels, times = theirs.sigmas.numpy(), theirs.timesteps.numpy()
    if name == "HeunDiscreteScheduler":
        levels, times = levels[[*range(0, len(levels) - 1, 2), -1]], times[::2]
    np.testing.assert_allclose(ours, levels, rtol=1e-6)  # float32 sigmas and table ends
    # For whole times diffusers rounds with karras and cuts off the fraction with the other two; ours are rounded.
    tolerance = 1e-3 if grid is KDIFFUSION else 0 if spacing == "karras" else 1
    np.testing.assert_allclose([schedule.t(s) for s in ours[:-1]], times, rtol=0, atol=tolerance)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
def test_lcm_spacing_equals_diffusers(steps):
    theirs = diffusers.LCMScheduler(**SD)
    theirs.set_timesteps(steps)
    schedule = sd(DDPM)
    np.testing.assert_array_equal([schedule.t(s) for s in sigmas(schedule, "lcm", steps)[:-1]], theirs.timesteps)


@pytest.mark.parametrize("steps", [1, 3, 20, 30, 64])
def test_comfyui_spacings_by_their_definition(steps):
    """comfy/samplers.py: simple is sigmas[-(1 + int(i * 1000 / steps))], sgm_uniform sigma(linspace(999, 0)[:-1])."""
    schedule = sd()
    simple = [schedule.sigmas[-(1 + int(i * (1000 / steps)))] for i in range(steps)]
    np.testing.assert_allclose(sigmas(schedule, "simple", steps), [*simple, 0], rtol=1e-12)
    for i, s in enumerate(sigmas(schedule, "sgm_uniform", steps)[:-1]):
        t = 999 * (1 - i / steps)
        low, high = np.log(schedule.sigmas[[math.floor(t), math.ceil(t)]])
        assert math.log(s) == pytest.approx(low + (t % 1) * (high - low), abs=1e-12)


@pytest.mark.parametrize("a", [0.6, 0.3, 2.5])
def test_beta_quantile_equals_scipy(a):
    p = np.concatenate([np.linspace(0, 1, 101), [1e-9, 1 - 1e-9]])
    np.testing.assert_allclose(beta_quantile(p, a), scipy.stats.beta.ppf(p, a, a), rtol=0, atol=1e-14)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("grid", [KDIFFUSION, LOGSNR, DDPM, DDIM])
def test_every_spacing_descends_to_zero_in_the_steps_asked(spacing, grid):
    for rescaled in (False, True):
        schedule = discrete({**ROW, "zero_snr": rescaled, "final_alpha_one": True}, grid)
        for steps in (1, 2, 13, 50):
            levels = sigmas(schedule, spacing, steps)
            assert len(levels) == steps + 1
            assert all(type(s) is float for s in levels)
            assert levels[-1] == 0
            assert np.all(np.diff(levels) < 0)
            assert np.all(np.isfinite(levels))


def test_trailing_has_the_steps_asked_where_arange_has_one_more():
    """arange(1000, 0, -1000 / 61) has 62 points by rounding, the last below step 0; diffusers returns them all."""
    assert len(np.arange(1000, 0, -1000 / 61)) == 62
    assert len(sigmas(sd(), "trailing", 61)) == 62


def test_final_sigma_is_the_first_step_only_for_ddim_models_that_say_so():
    row = {**ROW, "final_alpha_one": False}
    assert sigmas(discrete(row, DDIM), "leading", 10)[-1] == discrete(row, DDIM).sigmas[0]
    assert sigmas(discrete(row, DDPM), "leading", 10)[-1] == 0
    assert sigmas(discrete({**row, "final_alpha_one": True}, DDIM), "leading", 10)[-1] == 0


@pytest.mark.parametrize(("name", "grid"), KINDS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_start_equals_diffusers(name, grid, spacing):
    """diffusers starts at noise * init_noise_sigma, in VP form for the schedulers where that is 1."""
    theirs = getattr(diffusers, name)(**SD, timestep_spacing=spacing)
    theirs.set_timesteps(20)
    schedule = sd(grid)
    s = sigmas(schedule, spacing, 20)[0]
    expected = float(theirs.init_noise_sigma) * (1 if grid is KDIFFUSION else math.sqrt(1 + s**2))
    assert schedule.start(s, spacing) == pytest.approx(expected, rel=1e-6)  # float32


def test_bad_requests_name_the_value_and_the_fix():
    with pytest.raises(Error, match=r"'normal'.*karras"):
        sigmas(sd(), "normal", 20)
    with pytest.raises(Error, match=r"'karas'\. Did you mean karras\?"):
        sigmas(sd(), "karas", 20)
    for steps in (0, -1, 1001):
        with pytest.raises(Error, match=f"{steps} steps"):
            sigmas(sd(), "trailing", steps)
    with pytest.raises(Error, match="1000"):
        sigmas(sd(offset=1), "leading", 1000)  # the noisiest would be step 1000 of 0 to 999
    with pytest.raises(Error, match="'exp'"):
        betas("exp", 1000, 0.1, 0.2)
