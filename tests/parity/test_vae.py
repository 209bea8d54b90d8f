"""VAE against diffusers' AutoencoderKL with the same random weights, both ways."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from mlxdiff.models import layers, vae

from .oracle import error, give, nchw, nhwc, quieten, randomize, rounded

SD = vae.Config(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    channels=(12, 20, 28),
    layers=1,
    groups=4,
    scale=0.18215,
    shift=0.0,
    quant_conv=True,
    post_quant_conv=True,
    mid_attention=True,
)
CASES = {
    "sd": SD,
    "two layers, four levels": replace(SD, channels=(8, 12, 12, 36), layers=2, scale=0.13025),
    "16 channels, shifted, no quant convs": replace(
        SD, latent_channels=16, scale=0.3611, shift=0.1159, quant_conv=False, post_quant_conv=False
    ),
    "no attention": replace(SD, mid_attention=False),
}


def build(config: vae.Config) -> AutoencoderKL:
    n = len(config.channels)
    return AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        latent_channels=config.latent_channels,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        norm_num_groups=config.groups,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        scaling_factor=config.scale,
        shift_factor=config.shift,
        use_quant_conv=config.quant_conv,
        use_post_quant_conv=config.post_quant_conv,
        mid_block_add_attention=config.mid_attention,
    )


def pair(config: vae.Config, seed: int):
    return randomize(build(config), seed), vae.VAE(config)


def latents(config: vae.Config, seed: int, h: int = 5, w: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, config.latent_channels, h, w), np.float32)


def decoded(theirs, z: np.ndarray) -> torch.Tensor:
    """As diffusers' pipelines call it: scale and shift are theirs to undo."""
    return theirs.decode(torch.tensor(z) / theirs.config.scaling_factor + theirs.config.shift_factor).sample


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_decode_equals_diffusers(config):
    theirs, ours = pair(config, 0)
    give(theirs, ours)
    z = latents(config, 1)
    assert error(nchw(ours.decode(nhwc(z))), decoded(theirs, z)) < 1e-4  # float32 in another order; 1e-6 is seen


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("h", "w"), [(20, 28), (21, 31)])
def test_encode_equals_diffusers(config, h, w):
    theirs, ours = pair(config, 2)
    give(theirs, ours)
    image = np.random.default_rng(3).uniform(-1, 1, (2, 3, h, w)).astype(np.float32)
    mean, logvar = ours.encode(nhwc(image))
    theirs_mean, theirs_logvar = theirs._encode(torch.tensor(image)).chunk(2, dim=1)  # before clamping, as ours
    assert error(nchw(mean), (theirs_mean - config.shift) * config.scale) < 1e-4
    assert error(nchw(logvar), theirs_logvar) < 1e-4


def test_eps_of_every_norm_is_the_reference():
    """1e-6 everywhere. Loud weights would hide a wrong one."""
    theirs, ours = pair(SD, 0)
    give(quieten(theirs, 0.01), ours)
    z = latents(SD, 1)
    assert error(nchw(ours.decode(nhwc(z))), decoded(theirs, z)) < 1e-4


def test_attention_in_chunks_equals_diffusers(monkeypatch):
    monkeypatch.setattr(layers, "SCORES", 2 * 35 * 4 * 6)  # six of the 35 queries at a time
    theirs, ours = pair(SD, 4)
    give(theirs, ours)
    z = latents(SD, 5)
    assert error(nchw(ours.decode(nhwc(z))), decoded(theirs, z)) < 1e-4


# Some 30 roundings in a row, which add up as a random walk, and the worst of 3360 values: a few eps.
@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "eps"), [(mx.float16, torch.float16, 2**-11), (mx.bfloat16, torch.bfloat16, 2**-8)]
)
def test_half_precision_loses_only_rounding(dtype, torch_dtype, eps):
    theirs, ours = pair(SD, 6)
    give(rounded(theirs, torch_dtype), ours, dtype)
    z = latents(SD, 7)
    out = ours.decode(nhwc(z))  # float32 latents: the decoder's own dtype wins
    assert out.dtype == dtype
    assert error(nchw(out), decoded(theirs, z)) < 8 * eps  # 3 eps is seen
