"""Flux against diffusers' FluxTransformer2DModel with the same random weights, at odd head counts, depths, axes and
sizes."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from mlx.utils import tree_flatten

from mlxdiff.models import flux

from ..checkpoints import manifest
from .bfl import from_diffusers
from .oracle import error, give, nchw, nhwc, quieten, randomize, rounded

DEV = flux.Config(
    in_channels=20,
    out_channels=20,
    context=26,
    pooled=14,
    width=60,
    heads=3,
    hidden=240,
    double=2,
    single=3,
    axes=(4, 6, 10),
    theta=10000.0,
    guidance=True,
)
CASES = {
    "dev": DEV,
    "schnell": replace(DEV, guidance=False, width=80, hidden=320, heads=5, axes=(8, 2, 6), double=3, single=1),
    "fill": replace(DEV, in_channels=44, out_channels=12, width=24, hidden=96, heads=1, axes=(8, 8, 8), double=1),
    "double": replace(DEV, width=18, hidden=72, axes=(2, 2, 2), double=1, single=0),
    "single": replace(DEV, width=70, hidden=280, heads=7, axes=(2, 6, 2), double=0, single=1),
}


def pair(config: flux.Config, seed: int):
    theirs = FluxTransformer2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.double,
        num_single_layers=config.single,
        attention_head_dim=config.width // config.heads,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context,
        pooled_projection_dim=config.pooled,
        guidance_embeds=config.guidance,
        axes_dims_rope=config.axes,
    )
    return randomize(theirs, seed), flux.Flux(config)


def inputs(config: flux.Config, seed: int, h: int = 6, w: int = 10) -> tuple[np.ndarray, dict]:
    """x (2, c, h, w) and what `prepare` takes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, config.in_channels // 4, h, w), np.float32)
    cond = {
        "context": rng.standard_normal((2, 7, config.context), np.float32),
        "pooled": rng.standard_normal((2, config.pooled), np.float32),
    }
    return x, cond | ({"guidance": np.array([3.5, 2.25], np.float32)} if config.guidance else {})


def ready(cond: dict, x: np.ndarray) -> dict:
    return {k: mx.array(v) for k, v in cond.items()} | {"size": x.shape[2:]}


def reference(theirs, x: np.ndarray, t, cond: dict) -> np.ndarray:
    """As diffusers' pipeline calls it, with its own packing and ids."""
    B, c, h, w = x.shape
    cond = {k: torch.tensor(v) for k, v in cond.items()}
    out = theirs(
        hidden_states=FluxPipeline._pack_latents(torch.tensor(x), B, c, h, w),
        timestep=torch.tensor(t, dtype=torch.float32).expand(B),
        encoder_hidden_states=cond["context"],
        pooled_projections=cond["pooled"],
        guidance=cond.get("guidance"),
        txt_ids=torch.zeros(cond["context"].shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(B, h // 2, w // 2, "cpu", torch.float32),
    ).sample
    return FluxPipeline._unpack_latents(out, 8 * h, 8 * w, 8).numpy()


# Float32 sums in another order, and a wave of 1000 * guidance: float32 knows its angle to 3500 * 2^-24 = 2e-4, of which
# 4e-5 arrives in the picture; 4e-6 is seen without guidance. GELU in the wrong form would make 1e-4.
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_flux_equals_diffusers(config):
    theirs, ours = pair(config, 0)
    give(theirs, ours, rename=from_diffusers)
    x, cond = inputs(config, 1)
    out = ours(nhwc(x), 0.7125, **ours.prepare([1.0, 0.7125], **ready(cond, x)))
    assert error(nchw(out), reference(theirs, x, 0.7125, cond)) < (1e-4 if config.guidance else 2e-5)


@pytest.mark.parametrize(("h", "w"), [(2, 2), (4, 18), (14, 6)])
def test_any_even_size_equals_diffusers(h, w):
    config = CASES["schnell"]
    theirs, ours = pair(config, 2)
    give(theirs, ours, rename=from_diffusers)
    x, cond = inputs(config, 3, h, w)
    out = ours(nhwc(x), 1.0, **ours.prepare([1.0], **ready(cond, x)))
    assert error(nchw(out), reference(theirs, x, 1.0, cond)) < 2e-5


def test_eps_of_norms_is_the_reference():
    """1e-6 in layer norms and query and key norms. Loud weights would hide a wrong one."""
    theirs, ours = pair(CASES["schnell"], 4)
    give(quieten(theirs, 0.03), ours, rename=from_diffusers)
    x, cond = inputs(CASES["schnell"], 5)
    out = ours(nhwc(x), 0.5, **ours.prepare(None, **ready(cond, x)))
    assert error(nchw(out), reference(theirs, x, 0.5, cond)) < 1e-5  # of 1e-5 in their place the error is 6e-5


def test_prepared_times_change_nothing():
    """A time known beforehand, one that comes as a surprise, and none known; then without the weights behind them."""
    ours = flux.Flux(DEV)
    x, cond = inputs(DEV, 6)
    known, unknown = (ours.prepare(ts, **ready(cond, x)) for ts in ([1.0, 0.25], None))
    for t in (0.25, 1.0, 0.125):
        a, b = ours(nhwc(x), t, **known), ours(nhwc(x), t, **unknown)
        assert error(a, np.array(b)) < 1e-5  # one matmul over all times against one a time
    whole = np.array(ours(nhwc(x), 0.25, **known))
    known = ours.prepare([1.0, 0.25], **ready(cond, x))
    ours.release_modulation()
    assert (np.array(ours(nhwc(x), 0.25, **known)) == whole).all()


def test_a_time_per_sample_equals_a_call_per_sample():
    """As training calls it; against diffusers too, which takes the same array."""
    theirs, ours = pair(DEV, 7)
    give(theirs, ours, rename=from_diffusers)
    x, cond = inputs(DEV, 8)
    t = np.array([0.125, 0.875], np.float32)
    out = ours(nhwc(x), mx.array(t), **ours.prepare(None, **ready(cond, x)))
    assert error(nchw(out), reference(theirs, x, t, cond)) < 1e-4
    for i in range(2):  # a batch of one takes its modulations into the norm kernel
        one = {k: v[i : i + 1] for k, v in cond.items()}
        alone = ours(nhwc(x)[i : i + 1], float(t[i]), **ours.prepare([float(t[i])], **ready(one, x)))
        assert error(out[i : i + 1], np.array(alone)) < 1e-5


# Some 70 roundings in a row, which add up as a random walk, and the worst of 600 values: a few eps.
@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "eps"), [(mx.float16, torch.float16, 2**-11), (mx.bfloat16, torch.bfloat16, 2**-8)]
)
@pytest.mark.parametrize("case", ["dev", "schnell"])
def test_half_precision_loses_only_rounding(case, dtype, torch_dtype, eps):
    config = CASES[case]
    theirs, ours = pair(config, 9)
    give(rounded(theirs, torch_dtype), ours, dtype, from_diffusers)
    x, cond = inputs(config, 10)
    out = ours(nhwc(x).astype(dtype), 0.5, **ours.prepare([0.5], **ready(cond, x)))
    assert out.dtype == dtype
    assert error(nchw(out), reference(theirs, x, 0.5, cond)) < 8 * eps  # 2 to 5 eps is seen


def test_float16_text_that_overflows_is_clipped_as_in_diffusers():
    """The published weights push text past 65504 in float16. Here the text's MLPs are that loud."""
    config = CASES["schnell"]
    theirs, ours = pair(config, 11)
    for block in theirs.transformer_blocks:
        block.ff_context.net[2].weight.mul_(2e4)
    give(rounded(theirs, torch.float16), ours, mx.float16, from_diffusers)
    x, cond = inputs(config, 12)
    out = ours(nhwc(x).astype(mx.float16), 0.5, **ours.prepare([0.5], **ready(cond, x)))
    clipped = []
    theirs.transformer_blocks[-1].register_forward_hook(lambda module, args, out: clipped.append(out[0].abs().max()))
    half = reference(theirs.half(), x.astype(np.float16), 0.5, {k: v.astype(np.float16) for k, v in cond.items()})
    assert clipped == [65504]
    assert error(nchw(out), half.astype(np.float32)) < 16 * 2**-11  # both round


PUBLISHED = flux.Config(64, 64, 4096, 768, 3072, 24, 12288, 19, 38, (16, 56, 56), 10000.0, guidance=True)


@pytest.mark.parametrize(
    ("config", "bfl", "diffusers"),
    [
        (PUBLISHED, "flux1-dev", "flux_dev_transformer"),
        (replace(PUBLISHED, guidance=False), "flux1-schnell", "flux_schnell_transformer"),
        (replace(PUBLISHED, in_channels=384), "flux1-fill-dev", "flux_fill_dev_transformer"),
    ],
)
def test_parameters_are_those_of_the_published_files(config, bfl, diffusers):
    """Names and shapes, in both layouts. No weight is made: ours are lazy, theirs have no storage."""
    ours = {name: list(p.shape) for name, p in tree_flatten(flux.Flux(config).parameters())}
    assert ours == manifest(bfl)["tensors"]
    theirs = {name: torch.empty(shape, device="meta") for name, shape in manifest(diffusers)["tensors"].items()}
    assert ours == {name: list(p.shape) for name, p in from_diffusers(theirs).items()}
