"""Guidance by hand-computed forms, against diffusers' rescale_noise_cfg, and by counting the network's runs."""

import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from mlxdiff.errors import Error
from mlxdiff.guidance import denoiser, guide
from mlxdiff.schedules import KDIFFUSION, Discrete, alpha_bar, betas

SCHEDULE = Discrete(alpha_bar(betas("scaled_linear", 1000, 0.00085, 0.012)), KDIFFUSION)
SIGMA = 2.5

rng = np.random.default_rng(0)
X = rng.standard_normal((2, 3, 5, 4)).astype(np.float32) * 2.5


class Net:
    """out = gain * tanh(x): the condition is the gain, one a sample. Keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, *, gain):
        self.calls.append((x.shape[0], t, x.dtype, np.array(x.astype(mx.float32))))
        return gain.astype(x.dtype)[:, None, None, None] * mx.tanh(x)


def gains(*values):
    return {"gain": mx.array(values)}


COND, UNCOND, BOTH = gains(2.0, 3.0), gains(-1.0, 0.5), gains(-1.0, 0.5, 2.0, 3.0)
VP = X / math.sqrt(1 + SIGMA**2)
POSITIVE = np.array([2.0, 3.0])[:, None, None, None] * np.tanh(VP)
NEGATIVE = np.array([-1.0, 0.5])[:, None, None, None] * np.tanh(VP)


def run(net, sigma=SIGMA, prediction="x0", x=X, **kwargs):
    """One call of a denoiser; with the x0 prediction what comes back is the guided output itself."""
    kwargs = {"dtype": mx.float32, **kwargs}
    return np.array(denoiser(net, SCHEDULE, prediction, COND, **kwargs)(mx.array(x), sigma))


# A few float32 operations on values up to 10.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def test_prediction_kinds_recover_x0():
    """A network that answers in each kind for known x0 and noise: in VP form eps, sqrt(a) eps - sqrt(1 - a) x0, x0."""
    x0, noise = rng.standard_normal((2, 2, 3, 5, 4)).astype(np.float32)
    for sigma in (0.03, 1.0, 14.6):
        a = 1 / (1 + sigma**2)
        answers = {"eps": noise, "v": math.sqrt(a) * noise - math.sqrt(1 - a) * x0, "x0": x0}
        for prediction, answer in answers.items():
            got = run(lambda x, t, answer=answer, **_: mx.array(answer), sigma, prediction, x0 + sigma * noise)
            np.testing.assert_allclose(got, x0, rtol=1e-5, atol=1e-5)  # eps: sigma * 6e-8 a rounding


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_network_sees_vp_form_in_its_dtype_and_its_time(dtype):
    net = Net()
    out = denoiser(net, SCHEDULE, "eps", COND, dtype=dtype)(mx.array(X), float(SCHEDULE.sigmas[321]))
    ((_, t, seen_dtype, seen),) = net.calls
    assert (t, seen_dtype) == (321, dtype)
    assert out.dtype == mx.float32
    expected = mx.array(X / np.sqrt(1 + SCHEDULE.sigmas[321] ** 2).astype(np.float32)).astype(dtype)
    np.testing.assert_allclose(seen, np.array(expected.astype(mx.float32)), rtol=2**-7)  # a last digit of bfloat16


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_up_to_scale_1_one_pass_without_the_negative(scale):
    """As diffusers: guidance_scale > 1 or none. 0 is what Turbo models are run with."""
    net = Net()
    np.testing.assert_allclose(run(net, both=BOTH, scale=scale), POSITIVE, **CLOSE)
    np.testing.assert_allclose(run(net, uncond=UNCOND, scale=scale), POSITIVE, **CLOSE)
    assert [batch for batch, *_ in net.calls] == [2, 2]


def test_guidance_as_one_batch_or_as_two_passes():
    expected = NEGATIVE + 7.5 * (POSITIVE - NEGATIVE)
    net = Net()
    one = run(net, both=BOTH, scale=7.5)
    np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-4)  # values up to 20
    assert [batch for batch, *_ in net.calls] == [4]
    net = Net()
    np.testing.assert_array_equal(run(net, uncond=UNCOND, scale=7.5), one)
    assert [batch for batch, *_ in net.calls] == [2, 2]


def test_halves_are_subtracted_in_float32():
    """0.1 and 0.1 + 2^-14 differ in float16 by one digit; seven of it would be rounded away there."""
    low, high = float(np.float16(0.1)), float(np.float16(0.1) + np.float16(2**-14))
    out = denoiser(
        lambda x, t, level: mx.full(x.shape, level, dtype=x.dtype),
        SCHEDULE, "x0", {"level": high}, uncond={"level": low}, scale=1.3, dtype=mx.float16,
    )(mx.array(X), SIGMA)  # fmt: skip
    assert out[0, 0, 0, 0].item() == pytest.approx(low + 1.3 * (high - low), rel=1e-6)


def test_interval_includes_its_first_sigma_and_not_its_last():
    for sigma, batches in [(6.0, [2]), (5.0, [4]), (3.0, [4]), (1.0, [2]), (0.5, [2])]:
        net = Net()
        run(net, sigma, both=BOTH, scale=7.5, interval=(5.0, 1.0))
        assert [batch for batch, *_ in net.calls] == batches, sigma


def test_skipped_layers_are_led_away_from_in_a_pass_of_their_own():
    """guided + skip_scale (positive - skipped); only within its interval, and only where there is guidance."""
    skipped = np.array([1.5, 4.0])[:, None, None, None] * np.tanh(VP)
    expected = NEGATIVE + 7.5 * (POSITIVE - NEGATIVE) + 2.8 * (POSITIVE - skipped)
    how = {"skip": gains(1.5, 4.0), "skip_scale": 2.8, "skip_interval": (3.0, 1.0)}
    net = Net()
    np.testing.assert_allclose(run(net, both=BOTH, scale=7.5, **how), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(run(net, uncond=UNCOND, scale=7.5, **how), expected, rtol=1e-5, atol=1e-4)
    assert [batch for batch, *_ in net.calls] == [4, 2, 2, 2, 2]
    for sigma, scale, batches in [(3.0, 7.5, [4, 2]), (3.1, 7.5, [4]), (1.0, 7.5, [4]), (2.5, 1.0, [2])]:
        net = Net()
        run(net, sigma, both=BOTH, scale=scale, **how)
        assert [batch for batch, *_ in net.calls] == batches, sigma


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescale_equals_diffusers(rescale):
    negative, positive = rng.standard_normal((2, 3, 8, 8, 4)).astype(np.float32)
    positive[1] *= 3  # each image has its own spread
    plain = negative + 7.5 * (positive - negative)
    expected = rescale_noise_cfg(torch.tensor(plain), torch.tensor(positive), guidance_rescale=rescale).numpy()
    got = np.array(guide(mx.array(negative), mx.array(positive), 7.5, rescale))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)  # float32 means of 256 values up to 60
    if rescale == 1:
        np.testing.assert_allclose(got.std(axis=(1, 2, 3)), positive.std(axis=(1, 2, 3)), rtol=1e-5)


def test_unknown_prediction_names_the_known_ones():
    with pytest.raises(Error, match=r"'score'.*eps, v, x0, flow"):
        denoiser(Net(), SCHEDULE, "score", COND, dtype=mx.float32)
