"""TAESD's decoder against diffusers' AutoencoderTiny with the same random weights, and read from every form its file
comes in."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from mlxdiff import builtin, families, load, pipeline, store
from mlxdiff.errors import Error
from mlxdiff.images import to_image
from mlxdiff.models import taesd
from tests.checkpoints import full

from .oracle import error, nchw, nhwc, randomize

CHANNELS = families.MODELS["storybook"].networks["vae"].seen
SIZES = {
    "as published": {"latent_channels": 4},
    "of 16 channels": {"latent_channels": 16},
    "another depth": {"num_decoder_blocks": (1, 2, 2), "decoder_block_out_channels": (8, 8, 8), "out_channels": 4},
}


def save(folder, **sizes) -> AutoencoderTiny:
    theirs = randomize(AutoencoderTiny(**{"decoder_block_out_channels": (16,) * 4} | sizes), 0)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_decode_equals_diffusers_in_every_form(tmp_path, sizes):
    """A folder with its config.json, its file alone, and the original's decoder, which counts one layer more. Latents
    reach beyond 3, where the decoder holds them in range."""
    theirs = save(tmp_path / "folder", **sizes)
    held = {k: v.numpy() for k, v in theirs.decoder.layers.state_dict().items()}
    original = {f"{int(k.partition('.')[0]) + 1}.{k.partition('.')[2]}": v for k, v in held.items()}
    z = 3 * np.random.default_rng(1).standard_normal((2, theirs.config.latent_channels, 5, 7), np.float32)
    expected = theirs.decode(torch.tensor(z)).sample
    for path in (
        tmp_path / "folder",
        tmp_path / "folder" / "diffusion_pytorch_model.safetensors",
        full(tmp_path / "taesd_decoder.safetensors", original),
    ):
        ours = store.taesd(path, dtype="float32", offline=True)
        assert error(nchw(ours.decode(nhwc(z))), expected) < 1e-4  # float32 in another order; 1.4e-6 is seen


def test_half_precision_loses_only_rounding(tmp_path):
    theirs = save(tmp_path).half().float()
    z = np.random.default_rng(1).standard_normal((1, 4, 5, 7), np.float32)
    out = store.taesd(tmp_path, dtype="float16", offline=True).decode(nhwc(z))
    assert out.dtype == mx.float16
    # 30 roundings in a row, which add up as a random walk, and the worst of 6720 values: a few of 2^-11.
    assert error(nchw(out), theirs.decode(torch.tensor(z)).sample) < 8 * 2**-11


def test_what_is_no_taesd_is_named(tmp_path):
    save(tmp_path)
    with pytest.raises(Error, match="no TAESD, file or folder 'nowhere'"):
        store.taesd("nowhere", dtype="float32", offline=True)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderTiny", "act_fn": "gelu"}')
    with pytest.raises(Error, match="act_fn = 'gelu'"):
        store.taesd(tmp_path, dtype="float32", offline=True)
    with pytest.raises(Error, match=r"not a TAESD but Stable Diffusion 1\.x"):
        store.taesd(builtin.FOLDER, dtype="float32", offline=True)


def test_a_model_s_previews_are_drawn_with_it(tmp_path):
    """The same pixels as diffusers' decode of the predicted latents; 1 of 255 where a value lies between two."""
    theirs = save(tmp_path, latent_channels=CHANNELS)
    pipe = load("storybook", taesd=tmp_path)
    x0 = next(e.x0 for e in pipe.stream("a red house", seed=1, steps=1) if e.x0 is not None)
    (drawn,) = pipe.preview(x0)
    expected = theirs.decode(torch.tensor(x0).permute(0, 3, 1, 2)).sample[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(drawn, int) - np.asarray(to_image(expected), int)).max() <= 1
    assert drawn.tobytes() != load("storybook").preview(x0)[0].tobytes()  # which its own VAE draws


def test_auto_is_the_family_s_where_the_vae_is_too_large(monkeypatch):
    """The built-in model's VAE is small, and its latents are not Stable Diffusion's: it keeps its own."""
    asked, tiny = [], taesd.Decoder(taesd.Config(latent_channels=CHANNELS, out_channels=3, width=4, blocks=(1,)))
    monkeypatch.setattr(store, "taesd", lambda name, **_: asked.append(name) or tiny)
    load("storybook", taesd="auto")
    assert asked == []
    monkeypatch.setattr(pipeline, "_SMALL_VAE", 0)
    load("storybook", taesd="auto")
    assert asked == ["madebyollin/taesd"]
    known = {f.taesd for f in families.FAMILIES.values()} - {None}  # FLUX.2's has layers that are not read
    assert {name.partition("/")[2] for name in known} == {"taesd", "taesdxl", "taesd3", "taef1"}


def test_a_taesd_of_another_family_is_refused(tmp_path):
    save(tmp_path, latent_channels=16)
    with pytest.raises(Error, match=f"reads latents of 16 channels; storybook has {CHANNELS}"):
        load("storybook", taesd=tmp_path)
