"""Z-Image against diffusers' ZImageTransformer2DModel with the same random weights, at odd head counts, depths, axes,
sizes and lengths of text."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from mlx.utils import tree_flatten

from mlxdiff.families import MODELS
from mlxdiff.models import zimage

from ..checkpoints import manifest
from .oracle import error, give, nchw, nhwc, quieten, randomize, rounded

CONFIG = zimage.Config(
    in_channels=20,
    out_channels=20,
    context=26,
    width=60,
    heads=3,
    hidden=160,
    layers=3,
    refiners=2,
    axes=(4, 6, 10),
    theta=256.0,
    eps=1e-5,
)
CASES = {
    "plain": CONFIG,
    "one refiner": replace(CONFIG, width=80, hidden=213, heads=5, axes=(8, 2, 6), layers=1, refiners=1),
    "wider than its time": replace(CONFIG, width=288, hidden=768, heads=2, axes=(48, 48, 48), layers=1, refiners=1),
}


def pair(config: zimage.Config, seed: int):
    theirs = ZImageTransformer2DModel(
        in_channels=config.in_channels // 4,
        dim=config.width,
        n_layers=config.layers,
        n_refiner_layers=config.refiners,
        n_heads=config.heads,
        n_kv_heads=config.heads,
        cap_feat_dim=config.context,
        axes_dims=list(config.axes),
        axes_lens=[256, 64, 64],
    )
    theirs = randomize(theirs, seed)
    for token in (theirs.x_pad_token, theirs.cap_pad_token):
        torch.nn.init.normal_(token)
    return theirs, zimage.ZImage(config)


def renamed(theirs: dict) -> dict:
    return {k.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer"): v
            for k, v in theirs.items()}  # fmt: skip


def inputs(config: zimage.Config, seed: int, h: int = 6, w: int = 10, lengths: tuple = (7, 45)):
    """x (B, c, h, w) and one text for each sample."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(lengths), config.in_channels // 4, h, w), np.float32)
    return x, [rng.standard_normal((n, config.context), np.float32) for n in lengths]


def ready(texts: list[np.ndarray], x: np.ndarray) -> dict:
    """What `prepare` takes: texts padded with zeros to the longest."""
    lengths = tuple(len(text) for text in texts)
    padded = [np.pad(text, [(0, max(lengths) - len(text)), (0, 0)]) for text in texts]
    return {"context": mx.array(np.stack(padded)), "lengths": lengths, "size": x.shape[2:]}


def reference(theirs, x: np.ndarray, t, texts: list[np.ndarray]) -> np.ndarray:
    """As diffusers' pipeline calls it: time from noise to picture, and the output negated."""
    t = 1 - torch.tensor(t, dtype=torch.float32).expand(len(texts))
    out = theirs([*torch.tensor(x)[:, :, None]], t, [torch.tensor(text) for text in texts]).sample
    return -torch.stack(out)[:, :, 0].numpy()


# Float32 sums in another order; waves of up to 1000 and rotations by angles up to 100, which the reference takes from
# float32 angles: 1000 * 2^-24 = 6e-5, of which little arrives in the picture. 5e-6 is seen.
CLOSE = 2e-5


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_zimage_equals_diffusers(config):
    """Two texts of different lengths in one batch, which need a mask and two sets of rotations."""
    theirs, ours = pair(config, 0)
    give(theirs, ours, rename=renamed)
    x, texts = inputs(config, 1)
    out = ours(nhwc(x), 0.7125, **ours.prepare([1.0, 0.7125], **ready(texts, x)))
    assert error(nchw(out), reference(theirs, x, 0.7125, texts)) < CLOSE


@pytest.mark.parametrize(("h", "w"), [(2, 2), (4, 18), (14, 6), (8, 16), (16, 16), (6, 22)])
@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 70])
def test_any_even_size_and_length_equals_diffusers(h, w, n):
    """8 x 16 latents are exactly 32 tokens, and 6 x 22 are 33."""
    config = CASES["one refiner"]
    theirs, ours = pair(config, 2)
    give(theirs, ours, rename=renamed)
    x, texts = inputs(config, 3, h, w, (n,))
    out = ours(nhwc(x), 1.0, **ours.prepare([1.0], **ready(texts, x)))
    assert error(nchw(out), reference(theirs, x, 1.0, texts)) < CLOSE


@pytest.mark.parametrize("lengths", [(5, 5), (5, 30), (32, 33), (70, 3, 40)])
def test_a_batch_equals_its_samples(lengths):
    """Against diffusers, and each sample against a call of its own."""
    theirs, ours = pair(CONFIG, 4)
    give(theirs, ours, rename=renamed)
    x, texts = inputs(CONFIG, 5, lengths=lengths)
    cond = ours.prepare([0.25], **ready(texts, x))
    assert bool(cond["mask"]) == (len({(n + 31) // 32 for n in lengths}) > 1)
    out = ours(nhwc(x), 0.25, **cond)
    assert error(nchw(out), reference(theirs, x, 0.25, texts)) < CLOSE
    for i in range(len(lengths)):
        one = ours.prepare([0.25], **ready(texts[i : i + 1], x))
        assert error(out[i : i + 1], np.array(ours(nhwc(x)[i : i + 1], 0.25, **one))) < 1e-5


def test_it_listens_to_every_part():
    """Else the tests above could not fail on a mistake in it: text, its order, pad tokens, time."""
    theirs, ours = pair(CONFIG, 6)
    give(theirs, ours, rename=renamed)
    x, texts = inputs(CONFIG, 7, lengths=(20,))

    def draw(texts: list[np.ndarray], t: float = 0.5) -> np.ndarray:
        return np.array(ours(nhwc(x), t, **ours.prepare(None, **ready(texts, x))))

    plain = draw(texts)
    for other in (draw([texts[0] * -1]), draw([texts[0][::-1]]), draw([texts[0][:10]]), draw(texts, 0.4)):
        assert error(other, plain) > 0.03
    for name in ("x_pad_token", "cap_pad_token"):
        own, ours[name] = ours[name], mx.zeros_like(ours[name])
        assert error(draw(texts), plain) > 0.03, name
        ours[name] = own


def test_eps_of_norms_is_the_reference():
    """Loud weights would hide a wrong one. The feed-forward's is scaled as its input is."""
    theirs, ours = pair(CONFIG, 8)
    give(quieten(theirs, 0.03), ours, rename=renamed)
    x, texts = inputs(CONFIG, 9)
    out = ours(nhwc(x), 0.5, **ours.prepare(None, **ready(texts, x)))
    assert error(nchw(out), reference(theirs, x, 0.5, texts)) < CLOSE


def test_prepared_times_change_nothing():
    """A time known beforehand, one that comes as a surprise, and none known; then without the weights behind them."""
    ours = zimage.ZImage(CONFIG)
    x, texts = inputs(CONFIG, 10)
    known, unknown = (ours.prepare(ts, **ready(texts, x)) for ts in ([1.0, 0.25], None))
    for t in (0.25, 1.0, 0.125):
        a, b = ours(nhwc(x), t, **known), ours(nhwc(x), t, **unknown)
        assert error(a, np.array(b)) < 1e-5  # one matmul over all times against one a time
    whole = np.array(ours(nhwc(x), 0.25, **known))
    known = ours.prepare([1.0, 0.25], **ready(texts, x))
    ours.release_modulation()
    assert (np.array(ours(nhwc(x), 0.25, **known)) == whole).all()


def test_a_time_per_sample_equals_a_call_per_sample():
    """As training calls it; against diffusers too, which takes the same array."""
    theirs, ours = pair(CONFIG, 11)
    give(theirs, ours, rename=renamed)
    x, texts = inputs(CONFIG, 12)
    t = np.array([0.125, 0.875], np.float32)
    out = ours(nhwc(x), mx.array(t), **ours.prepare(None, **ready(texts, x)))
    assert error(nchw(out), reference(theirs, x, t, texts)) < CLOSE


# Some 60 roundings in a row, which add up as a random walk, and the worst of 600 values: a few eps.
@pytest.mark.parametrize(
    ("dtype", "torch_dtype", "eps"), [(mx.float16, torch.float16, 2**-11), (mx.bfloat16, torch.bfloat16, 2**-8)]
)
def test_half_precision_loses_only_rounding(dtype, torch_dtype, eps):
    theirs, ours = pair(CONFIG, 13)
    give(rounded(theirs, torch_dtype), ours, dtype, renamed)
    x, texts = inputs(CONFIG, 14)
    out = ours(nhwc(x).astype(dtype), 0.5, **ours.prepare([0.5], **ready(texts, x)))
    assert out.dtype == dtype
    assert error(nchw(out), reference(theirs, x, 0.5, texts)) < 8 * eps


def test_a_loud_feed_forward_does_not_overflow_float16():
    """Its output would be about 1e5, which the norm that follows takes away again."""
    theirs, ours = pair(CONFIG, 15)
    outputs = []
    theirs.layers[0].feed_forward.register_forward_hook(lambda module, args, out: outputs.append(out.abs().max()))
    for block in theirs.layers:
        block.feed_forward.w2.weight.mul_(1e5)
    give(rounded(theirs, torch.float16), ours, mx.float16, renamed)
    x, texts = inputs(CONFIG, 16)
    out = ours(nhwc(x).astype(mx.float16), 0.5, **ours.prepare([0.5], **ready(texts, x)))
    assert error(nchw(out), reference(theirs, x, 0.5, texts)) < 8 * 2**-11
    assert outputs[0] > 65504


def test_parameters_are_those_of_the_published_file():
    """Names and shapes. No weight is made: ours are lazy."""
    ours = zimage.ZImage(MODELS["z-image"].networks["transformer"])
    theirs = renamed(manifest("z_image_transformer")["tensors"])
    assert {name: list(p.shape) for name, p in tree_flatten(ours.parameters())} == theirs
