"""SD3 against diffusers' SD3Transformer2DModel with the same random weights: with and without query and key norms, dual
attention in some layers, odd head counts, depths and sizes."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from mlx.utils import tree_flatten

from mlxdiff.models import sd3

from ..checkpoints import manifest
from .oracle import error, give, nchw, nhwc, quieten, randomize, rounded

SD3 = sd3.Config(
    in_channels=5,
    out_channels=5,
    patch=2,
    positions=11,
    context=26,
    pooled=14,
    heads=3,
    head_dim=12,
    layers=3,
    dual=(),
    qk_norm=False,
)
CASES = {
    "sd3": SD3,
    "sd3.5 large": replace(SD3, heads=5, head_dim=8, layers=2, qk_norm=True),
    "sd3.5 medium": replace(SD3, heads=1, head_dim=20, layers=5, dual=(0, 1, 2), qk_norm=True),
    "dual to the end, one kind of patch": replace(SD3, patch=1, dual=(1, 2), in_channels=6, out_channels=4),
}


def pair(config: sd3.Config, seed: int):
    theirs = SD3Transformer2DModel(
        sample_size=2 * config.patch,
        patch_size=config.patch,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.layers,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context,
        caption_projection_dim=config.heads * config.head_dim,
        pooled_projection_dim=config.pooled,
        pos_embed_max_size=config.positions,
        dual_attention_layers=config.dual,
        qk_norm="rms_norm" if config.qk_norm else None,
    )
    return randomize(theirs, seed), sd3.SD3(config)


def inputs(config: sd3.Config, seed: int, h: int = 6, w: int = 10) -> tuple[np.ndarray, dict]:
    """x (2, c, h, w) and what `prepare` takes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, config.in_channels, h, w), np.float32)
    context = rng.standard_normal((2, 7, config.context), np.float32)
    return x, {"context": context, "pooled": rng.standard_normal((2, config.pooled), np.float32)}


def ready(cond: dict, x: np.ndarray) -> dict:
    return {k: mx.array(v) for k, v in cond.items()} | {"size": x.shape[2:]}


def reference(theirs, x: np.ndarray, t, cond: dict, **kwargs) -> np.ndarray:
    """As diffusers' pipeline calls it, at time 1000 sigma."""
    out = theirs(
        hidden_states=torch.tensor(x),
        timestep=torch.tensor(t, dtype=torch.float32).expand(x.shape[0]) * 1000,
        encoder_hidden_states=torch.tensor(cond["context"]),
        pooled_projections=torch.tensor(cond["pooled"]),
        **kwargs,
    )
    return out.sample.numpy()


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_sd3_equals_diffusers(config):
    theirs, ours = pair(config, 0)
    give(theirs, ours)
    x, cond = inputs(config, 1)
    out = ours(nhwc(x), 0.7125, **ours.prepare([1.0, 0.7125], **ready(cond, x)))
    # Float32 sums in another order: 4e-6 is seen. GELU in the wrong form would make 1e-4.
    assert error(nchw(out), reference(theirs, x, 0.7125, cond)) < 2e-5


@pytest.mark.parametrize(("h", "w"), [(2, 2), (4, 22), (14, 6)])
def test_any_even_size_equals_diffusers(h, w):
    """Up to the whole map of positions, which is cropped about its middle."""
    theirs, ours = pair(SD3, 2)
    give(theirs, ours)
    x, cond = inputs(SD3, 3, h, w)
    out = ours(nhwc(x), 1.0, **ours.prepare([1.0], **ready(cond, x)))
    assert error(nchw(out), reference(theirs, x, 1.0, cond)) < 2e-5


def test_eps_of_norms_is_the_reference():
    """1e-6 in layer norms and query and key norms. Loud weights would hide a wrong one."""
    config = CASES["sd3.5 medium"]
    theirs, ours = pair(config, 4)
    theirs.pos_embed.pos_embed.mul_(0.01)
    give(quieten(theirs, 0.03), ours)
    x, cond = inputs(config, 5)
    out = ours(nhwc(x), 0.5, **ours.prepare(None, **ready(cond, x)))
    assert error(nchw(out), reference(theirs, x, 0.5, cond)) < 1e-5  # of 1e-5 in their place the error is 6e-5


def test_skipped_layers_equal_diffusers():
    config = CASES["sd3.5 medium"]
    theirs, ours = pair(config, 6)
    give(theirs, ours)
    x, cond = inputs(config, 7)
    out = ours(nhwc(x), 0.5, **ours.prepare(None, **ready(cond, x)), skip_layers=(1, 3))
    assert error(nchw(out), reference(theirs, x, 0.5, cond, skip_layers=[1, 3])) < 2e-5


@pytest.mark.parametrize("case", ["sd3", "sd3.5 medium"])
def test_prepared_times_change_nothing(case):
    """A time known beforehand, one that comes as a surprise, and none known; then without the weights behind them."""
    ours = sd3.SD3(CASES[case])
    x, cond = inputs(CASES[case], 8)
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
    config = CASES["sd3.5 medium"]
    theirs, ours = pair(config, 9)
    give(theirs, ours)
    x, cond = inputs(config, 10)
    t = np.array([0.125, 0.875], np.float32)
    out = ours(nhwc(x), mx.array(t), **ours.prepare(None, **ready(cond, x)))
    assert error(nchw(out), reference(theirs, x, t, cond)) < 2e-5
    for i in range(2):  # a batch of one takes its modulations into the norm kernel
        one = {k: v[i : i + 1] for k, v in cond.items()}
        alone = ours(nhwc(x)[i : i + 1], float(t[i]), **ours.prepare([float(t[i])], **ready(one, x)))
        assert error(out[i : i + 1], np.array(alone)) < 1e-5


# Some 50 roundings in a row, which add up as a random walk, and the worst of 600 values: a few eps.
@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "eps"), [(mx.float16, torch.float16, 2**-11), (mx.bfloat16, torch.bfloat16, 2**-8)]
)
@pytest.mark.parametrize("case", ["sd3", "sd3.5 medium"])
def test_half_precision_loses_only_rounding(case, dtype, torch_dtype, eps):
    config = CASES[case]
    theirs, ours = pair(config, 11)
    give(rounded(theirs, torch_dtype), ours, dtype)
    x, cond = inputs(config, 12)
    out = ours(nhwc(x).astype(dtype), 0.5, **ours.prepare([0.5], **ready(cond, x)))
    assert out.dtype == dtype
    assert error(nchw(out), reference(theirs, x, 0.5, cond)) < 8 * eps  # 2 to 4 eps is seen


MEDIUM = sd3.Config(16, 16, 2, 192, 4096, 2048, 24, 64, 24, dual=(), qk_norm=False)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (MEDIUM, "sd3_medium_transformer"),
        (replace(MEDIUM, heads=38, layers=38, qk_norm=True), "sd35_large_transformer"),
        (replace(MEDIUM, positions=384, dual=tuple(range(13)), qk_norm=True), "sd35_medium_transformer"),
    ],
)
def test_parameters_are_those_of_the_published_files(config, name):
    """Names and shapes; none is made, for ours are lazy."""
    ours = {name: list(p.shape) for name, p in tree_flatten(sd3.SD3(config).parameters())}
    o, kh, kw, i = ours["pos_embed.proj.weight"]
    assert ours | {"pos_embed.proj.weight": [o, i, kh, kw]} == manifest(name)["tensors"]
