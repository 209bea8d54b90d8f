"""UNet against diffusers' UNet2DConditionModel with the same random weights, at odd sizes, for every kind of block that
the Stable Diffusion families use."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from mlxdiff.models import unet

from .oracle import error, give, nchw, nhwc, quieten, randomize, rounded

SD1 = unet.Config(
    in_channels=4,
    out_channels=4,
    channels=(24, 36, 60),
    layers=(1, 2, 1),
    depth=((1,), (1, 1), ()),
    up_depth=((), (1, 1, 1), (1, 1)),
    mid_depth=1,
    heads=(3, 1, 5),
    context=20,
    groups=12,
    eps=1e-5,
    linear_projection=False,
    time_cond=None,
    added_time=None,
    added=None,
    flip_sin_to_cos=True,
    freq_shift=0,
)
SDXL = replace(
    SD1,
    channels=(20, 30, 50),
    layers=(2, 2, 2),
    depth=((), (1, 1), (3, 3)),
    up_depth=((3, 3, 3), (1, 1, 1), ()),
    mid_depth=3,
    heads=(2, 3, 5),
    groups=10,
    linear_projection=True,
    added_time=8,
    added=11 + 6 * 8,
)
# Ours, and what diffusers is told beside what follows from it.
CASES = {
    "sd1": (SD1, {}),
    "sd1 inpainting": (replace(SD1, in_channels=9), {}),
    "sd1 lcm": (replace(SD1, time_cond=14), {}),
    "sd2": (replace(SD1, linear_projection=True, layers=(2, 1, 1), depth=((2, 2), (1,), ()),
                    up_depth=((), (1, 1), (2, 2, 2)), mid_depth=1), {"transformer_layers_per_block": (2, 1, 1)}),
    "sdxl": (SDXL, {"transformer_layers_per_block": (1, 1, 3)}),
    "sdxl refiner": (
        replace(SDXL, channels=(20, 30, 40, 40), layers=(1, 1, 1, 1), depth=((), (2,), (2,), ()),
                up_depth=((), (2, 2), (2, 2), ()), mid_depth=2, heads=(1, 3, 4, 4), added=11 + 5 * 8),
        {"transformer_layers_per_block": 2},
    ),
    "distilled sd1, no middle": (
        replace(SD1, layers=(1, 1, 1), depth=((1,), (1,), ()), up_depth=((), (1, 1), (1, 1)), mid_depth=None),
        {"mid_block_type": None},
    ),
    "distilled sdxl, uneven depths, no attention in the middle": (
        replace(SDXL, depth=((), (2, 1), (1, 2)), up_depth=((1, 2, 3), (2, 1, 1), ()), mid_depth=0),
        {"transformer_layers_per_block": (1, (2, 1), (1, 2)), "mid_block_type": "UNetMidBlock2D",
         "reverse_transformer_layers_per_block": ((1, 2, 3), (2, 1, 1), 1)},
    ),
}  # fmt: skip


def build(config: unet.Config, extra: dict) -> UNet2DConditionModel:
    text_time = {}
    if config.added is not None:
        text_time = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": config.added_time,
            "projection_class_embeddings_input_dim": config.added,
        }
    return UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.channels,
        layers_per_block=config.layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in config.depth),
        up_block_types=tuple("CrossAttnUpBlock2D" if d else "UpBlock2D" for d in config.up_depth),
        attention_head_dim=config.heads,  # the number of heads, by an old misnomer
        cross_attention_dim=config.context,
        norm_num_groups=config.groups,
        norm_eps=config.eps,
        use_linear_projection=config.linear_projection,
        time_cond_proj_dim=config.time_cond,
        flip_sin_to_cos=config.flip_sin_to_cos,
        freq_shift=config.freq_shift,
        **text_time,
        **extra,
    )


def pair(config: unet.Config, extra: dict, seed: int):
    return randomize(build(config, extra), seed), unet.UNet(config)


def inputs(config: unet.Config, seed: int, h: int = 5, w: int = 7) -> tuple[np.ndarray, dict]:
    """x (2, c, h, w) and what `prepare` takes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, config.in_channels, h, w), np.float32)
    cond = {"context": rng.standard_normal((2, 9, config.context), np.float32)}
    if config.added is not None:
        pooled = {8: 11, 256: 1280}[config.added_time]  # here, and as published
        sizes = (config.added - pooled) // config.added_time
        cond["pooled"] = rng.standard_normal((2, pooled), np.float32)
        cond["time_ids"] = rng.integers(0, 1024, (2, sizes)).astype(np.float32)
    if config.time_cond is not None:
        cond["guidance_embedding"] = rng.standard_normal((2, config.time_cond), np.float32)
    return x, cond


def reference(theirs, x: np.ndarray, t, cond: dict) -> np.ndarray:
    cond = {k: torch.tensor(v) for k, v in cond.items()}
    added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]} if "pooled" in cond else None
    out = theirs(
        torch.tensor(x),
        torch.tensor(t),
        cond["context"],
        timestep_cond=cond.get("guidance_embedding"),
        added_cond_kwargs=added,
    )
    return out.sample.numpy()


def ready(cond: dict) -> dict:
    return {k: mx.array(v) for k, v in cond.items()}


@pytest.mark.parametrize(("config", "extra"), CASES.values(), ids=CASES)
def test_unet_equals_diffusers(config, extra):
    theirs, ours = pair(config, extra, 0)
    give(theirs, ours)
    x, cond = inputs(config, 1)
    out = ours(nhwc(x), 481.25, **ours.prepare([999.0, 481.25], **ready(cond)))
    assert error(nchw(out), reference(theirs, x, 481.25, cond)) < 1e-4  # float32 in another order; 1.4e-6 is seen


def test_eps_of_group_norms_is_the_reference():
    """The config's in residual blocks, 1e-6 in transformers. Loud weights would hide a wrong one."""
    theirs, ours = pair(*CASES["sd1"], 0)
    give(quieten(theirs, 0.03), ours)
    x, cond = inputs(SD1, 1)
    out = ours(nhwc(x), 481.25, **ours.prepare(None, **ready(cond)))
    assert error(nchw(out), reference(theirs, x, 481.25, cond)) < 1e-4


@pytest.mark.parametrize(("h", "w"), [(8, 4), (3, 9), (1, 1), (6, 13)])
def test_any_map_size_equals_diffusers(h, w):
    theirs, ours = pair(*CASES["sd1"], 2)
    give(theirs, ours)
    x, cond = inputs(SD1, 3, h, w)
    out = ours(nhwc(x), 7.0, **ours.prepare(None, **ready(cond)))
    assert error(nchw(out), reference(theirs, x, 7.0, cond)) < 1e-4


@pytest.mark.parametrize("case", ["sd1 lcm", "sdxl"])
def test_prepared_times_change_nothing(case):
    """A time known beforehand, one that comes as a surprise, and none known: the same picture."""
    config, _ = CASES[case]
    ours = unet.UNet(config)
    x, cond = inputs(config, 4)
    known, unknown = (ours.prepare(ts, **ready(cond)) for ts in ([999.0, 123.5], None))
    for t in (123.5, 999.0, 11.0):
        a, b = ours(nhwc(x), t, **known), ours(nhwc(x), t, **unknown)
        assert error(a, np.array(b)) < 1e-5  # one matmul over all times against one a time


@pytest.mark.parametrize("case", ["sd1 lcm", "sdxl"])
def test_a_time_per_sample_equals_a_call_per_sample(case):
    """As training calls it; against diffusers too, which takes the same array."""
    config, extra = CASES[case]
    theirs, ours = pair(config, extra, 5)
    give(theirs, ours)
    x, cond = inputs(config, 6)
    t = np.array([17.0, 803.0], np.float32)
    out = ours(nhwc(x), mx.array(t), **ours.prepare(None, **ready(cond)))
    assert error(nchw(out), reference(theirs, x, t, cond)) < 1e-4
    for i in range(2):
        one = {k: v[i : i + 1] for k, v in ready(cond).items()}
        alone = ours(nhwc(x)[i : i + 1], float(t[i]), **ours.prepare(None, **one))
        assert error(out[i : i + 1], np.array(alone)) < 1e-5


def test_gradients_equal_diffusers():
    """What training follows: the slope along x of the mean square of the output, through every kind of layer."""
    theirs, ours = pair(*CASES["sd1"], 9)
    give(theirs, ours)
    x, cond = inputs(SD1, 10)
    x_theirs = torch.tensor(x, requires_grad=True)
    out = theirs(x_theirs, torch.tensor(481.0), torch.tensor(cond["context"])).sample
    out.square().mean().backward()
    slope = mx.grad(lambda x: ours(x, 481.0, **ours.prepare(None, **ready(cond))).square().mean())(nhwc(x))
    assert error(nchw(slope), x_theirs.grad) < 1e-4


# Some 60 roundings in a row, which add up as a random walk, and the worst of 280 values: a few eps.
@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "eps"), [(mx.float16, torch.float16, 2**-11), (mx.bfloat16, torch.bfloat16, 2**-8)]
)
@pytest.mark.parametrize("case", ["sd1", "sdxl"])
def test_half_precision_loses_only_rounding(case, dtype, torch_dtype, eps):
    config, extra = CASES[case]
    theirs, ours = pair(config, extra, 7)
    give(rounded(theirs, torch_dtype), ours, dtype)
    x, cond = inputs(config, 8)
    out = ours(nhwc(x).astype(dtype), 481.0, **ours.prepare([481.0], **ready(cond)))
    assert out.dtype == dtype
    assert error(nchw(out), reference(theirs, x, 481.0, cond)) < 8 * eps  # 4 eps is seen
