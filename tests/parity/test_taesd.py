"""TAESD's decoder against diffusers' AutoencoderTiny with the same random weights, and read from every form its file
comes in."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from mlxdiff import store
from mlxdiff.errors import Error
from tests.checkpoints import full

from .oracle import error, nchw, nhwc, randomize

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
        assert error(nchw(ours.decode(nhwc(z))), expected) < 1e-4  # float32 in another order; 2e-7 is seen


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
    with pytest.raises(Error, match="no TAESD but text_encoder"):
        store.taesd(store.BUILTIN / "storybook", dtype="float32", offline=True)
