"""Reused steps of transformers against diffusers' FirstBlockCache, and of U-Nets against diffusers' layers put together
by hand, with the same random weights, at steps of different lengths."""

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig

from mlxdiff.reuse import Reuse

from . import test_flux, test_flux2, test_sd3, test_unet, test_zimage
from .bfl import from_diffusers
from .oracle import error, give, nchw, nhwc

# How far each step goes from where the last one was, and its time: short and long steps, so that some are reused.
STEPS = [(0.0, 1.0), (0.02, 0.9999), (0.02, 0.9998), (1.0, 0.5), (0.01, 0.4999), (0.5, 0.2)]
THRESHOLD = 0.25
FAMILIES = {
    "flux": (test_flux, test_flux.CASES["schnell"], from_diffusers),
    "flux2": (test_flux2, test_flux2.KLEIN, from_diffusers),
    "sd3": (test_sd3, test_sd3.CASES["sd3.5 medium"], dict),
    "zimage": (test_zimage, test_zimage.CONFIG, test_zimage.renamed),
}


def path(x: np.ndarray) -> list[tuple[np.ndarray, float]]:
    rng, places = np.random.default_rng(5), []
    for far, t in STEPS:
        x = x + far * rng.standard_normal(x.shape, np.float32)
        places.append((x, t))
    return places


@pytest.mark.parametrize("name", FAMILIES)
def test_a_transformer_reuses_what_diffusers_reuses(name):
    """The same steps, and the same outputs: as near as those of the whole networks are. A step that is reused is far
    from what the whole network gives there. diffusers 0.42 has the cache for FLUX.1 alone of these: in the others its
    blocks are hooked here, and the rule is numpy's."""
    of, config, rename = FAMILIES[name]
    theirs, ours = of.pair(config, 0)
    give(theirs, ours, rename=rename)
    x, *cond = of.inputs(config, 1)
    text = {"context": mx.array(cond[0]), "size": x.shape[2:]} if of is test_flux2 else of.ready(*cond, x)
    prepared = ours.prepare([t for _, t in STEPS], **text)
    whole = [nchw(ours(nhwc(x), t, **prepared)) for x, t in path(x)]
    reuse, reused = Reuse(THRESHOLD), []
    if name == "flux":
        theirs.enable_cache(FirstBlockCacheConfig(threshold=THRESHOLD))
    else:
        hook(name, theirs, x.shape[2] * x.shape[3] // (1 if name == "flux2" else 4))
    for (here, t), full in zip(path(x), whole, strict=True):
        before = reuse.reused
        out = nchw(ours(nhwc(here), t, **prepared, reuse=reuse))
        reused.append(reuse.reused > before)
        with theirs.cache_context("cond") if name == "flux" else nullcontext():
            want = of.reference(theirs, here, t, *cond)
        print(name, t, error(out, want), error(out, full), reused[-1])
        assert error(out, want) < 2e-5
        assert (error(out, full) > 1e-4) == reused[-1]
    assert any(reused)
    assert not all(reused[1:])
    assert reuse.calls == len(STEPS)


def hook(name: str, theirs: torch.nn.Module, n: int) -> None:
    """Let the last block give what the first one gave and what all others added before, where the rule says so. n: the
    picture's tokens, which come first but in FLUX.2's single blocks."""
    blocks = [
        b for of in ("transformer_blocks", "single_transformer_blocks", "layers") for b in getattr(theirs, of, ())
    ]
    now, held = {}, {}

    def first(module, args, named, out):
        before = named["hidden_states"] if "hidden_states" in named else args[0]
        after = out[1] if isinstance(out, tuple) else out
        now.update(x=after[:, :n], change=(after - before)[:, :n].numpy())

    def last(module, args, named, out):
        y = (out[1] if isinstance(out, tuple) else out).clone()
        place = slice(-n, None) if name == "flux2" else slice(n)
        if held and np.abs(now["change"] - held["change"]).mean() / np.abs(held["change"]).mean() <= THRESHOLD:
            y[:, place] = now["x"] + held["rest"]
        else:
            held.update(change=now["change"], rest=y[:, place] - now["x"])
        return (out[0], y) if isinstance(out, tuple) else y

    blocks[0].register_forward_hook(first, with_kwargs=True)
    blocks[-1].register_forward_hook(last, with_kwargs=True)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "distilled sdxl, uneven depths, no attention in the middle"])
def test_a_unet_reuses_its_deep_levels(name):
    """Of a second step only the last layer of the way up is computed, and what it reads: what enters it comes from the
    first step, what it is joined with from the second."""
    config, extra = test_unet.CASES[name]
    theirs, ours = test_unet.pair(config, extra, 0)
    give(theirs, ours)
    x, cond = test_unet.inputs(config, 1)
    there = x + np.random.default_rng(2).standard_normal(x.shape, np.float32)
    prepared = ours.prepare([901.0, 501.0], **{k: mx.array(v) for k, v in cond.items()})
    reuse = Reuse(1e9)
    first = nchw(ours(nhwc(x), 901.0, **prepared, reuse=reuse))
    assert np.array_equal(first, nchw(ours(nhwc(x), 901.0, **prepared)))
    second = nchw(ours(nhwc(there), 501.0, **prepared, reuse=reuse))

    kept, last = [], theirs.up_blocks[-1].resnets[-1]
    width = config.channels[0]

    def join(module, args):
        """Keep what enters; from the second call on, let in what was kept."""
        kept.append(args[0][:, :width])
        return (torch.cat([kept[0], args[0][:, width:]], 1), *args[1:])

    last.register_forward_pre_hook(join)
    assert error(first, test_unet.reference(theirs, x, 901.0, cond)) < 2e-5
    assert error(second, test_unet.reference(theirs, there, 501.0, cond)) < 2e-5
    assert error(second, nchw(ours(nhwc(there), 501.0, **prepared))) > 1e-3
