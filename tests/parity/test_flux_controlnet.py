"""ControlNets of FLUX.1 against diffusers on the same random weights: residuals, and pictures (40 dB as for whole
pipelines)."""

import re

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
    FluxTransformer2DModel,
)
from mlx.utils import tree_flatten
from safetensors.torch import save_file

import mlxdiff
from mlxdiff import convert
from mlxdiff.errors import Error

from . import tiny
from .oracle import error, nhwc, randomize
from .test_controlnet import picture
from .test_flow_pipelines import theirs as oracle_of
from .test_pipelines import DB, NEGATIVE, PROMPT, SEED, psnr

pytestmark = pytest.mark.usefixtures("cache")
SIZE = {"width": 64, "height": 32}
SAME = {"steps": 2, "guidance": 3.5}
KINDS = {
    "instantx": {"num_layers": 2, "num_single_layers": 2},  # 3 blocks of the denoiser share 2
    "doubles alone": {"num_layers": 1, "num_single_layers": 0},
    "union": {"num_layers": 2, "num_single_layers": 1, "num_mode": 7},
    "xlabs": {"num_layers": 2, "num_single_layers": 0, "conditioning_embedding_channels": 16, "patch_size": 2},
}


def net(kind: str, seed: int = 1) -> FluxControlNetModel:
    made = FluxControlNetModel(
        in_channels=64, attention_head_dim=20, num_attention_heads=3, joint_attention_dim=36,
        pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 10), **KINDS[kind],
    )  # fmt: skip
    made = randomize(made, seed)
    if kind == "union":
        torch.nn.init.normal_(made.controlnet_mode_embedder.weight, std=3)
    return tiny.louder(made, 3, ("controlnet_x_embedder.weight", "input_hint_block.blocks", "context_embedder.weight"))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple:
    """(parts of diffusers' pipeline, our pipeline, kind -> ControlNet, kind -> its folder)"""
    root = tmp_path_factory.mktemp("flux-control")
    theirs = tiny.flux(root / "words")
    levels = {"block_out_channels": (8, 8, 16, 24)}  # XLabs' pixels are halved three times, as published latents are
    levels |= {f"{way}_block_types": (f"{kind}Block2D",) * 4 for way, kind in
               (("down", "DownEncoder"), ("up", "UpDecoder"))}  # fmt: skip
    vae = tiny.stir(AutoencoderKL.from_config(theirs.vae.config, **levels), 31)
    vae.encoder.conv_out.weight.data.mul_(8)
    body = FluxTransformer2DModel.from_config(theirs.transformer.config, num_layers=3, num_single_layers=3)
    body = tiny.louder(randomize(body, 34), 4, ("context_embedder.weight",))
    theirs.register_modules(vae=vae, transformer=body)
    theirs.save_pretrained(root / "model")
    nets = {kind: net(kind) for kind in KINDS}
    for kind, made in nets.items():
        made.save_pretrained(root / kind)
    parts = {name: part for name, part in theirs.components.items() if part is not None}
    return parts, mlxdiff.load(root / "model", dtype="float32"), nets, {kind: root / kind for kind in KINDS}


def guided(parts: dict, nets, **settings) -> np.ndarray:
    pipe = FluxControlNetPipeline(**parts, controlnet=nets)
    pipe.set_progress_bar_config(disable=True)
    return oracle_of(pipe, "dev", **({"num_inference_steps": 2, "guidance_scale": 3.5} | SIZE | settings))


def drawn(pipe, *controls, **settings) -> np.ndarray:
    return np.asarray(pipe(PROMPT, seed=SEED, controls=controls, **(SAME | SIZE | settings)).image)


@pytest.mark.parametrize("kind", KINDS)
def test_a_controlnet_draws_as_in_diffusers(models, kind):
    parts, ours, nets, folders = models
    mode = {"control_mode": 2} if kind == "union" else {}
    want = guided(parts, nets[kind], control_image=picture(1, (64, 32)), controlnet_conditioning_scale=0.7, **mode)
    name = f"{folders[kind]}:depth" if kind == "union" else folders[kind]
    assert psnr(drawn(ours, (name, picture(1, (64, 32)), 0.7)), want) > DB
    assert psnr(drawn(ours), want) < DB - 10
    assert psnr(drawn(ours, (name, picture(2, (64, 32)), 0.7)), want) < DB - 10  # another picture


def test_a_union_is_told_what_it_reads(models):
    """One token among the few of this text: among the 512 of a prompt, and with random weights, it hardly counts."""
    _, _, nets, folders = models
    (ours,) = convert.read(folders["union"], mx.float32).values()
    g = np.random.default_rng(1)
    x, z = (g.standard_normal((1, 16, 4, 8), np.float32) for _ in range(2))
    context, pooled = g.standard_normal((1, 3, 36), np.float32), g.standard_normal((1, 32), np.float32)
    ids = torch.stack([torch.zeros(2, 4), *torch.meshgrid(torch.arange(2.0), torch.arange(4.0), indexing="ij")], -1)
    tokens = [torch.tensor(a).reshape(1, 16, 2, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 8, 64) for a in (x, z)]
    told = {"context": mx.array(context), "pooled": mx.array(pooled), "size": (4, 8), "guidance": 3.5}
    found = {}
    for task in (2, 5):
        doubles, singles = nets["union"](
            tokens[0], tokens[1], torch.tensor([[task]]), 1.0, torch.tensor(context), torch.tensor(pooled),
            torch.tensor([0.6]), ids.reshape(8, 3), torch.zeros(3, 3), torch.tensor([3.5]), return_dict=False,
        )  # fmt: skip
        cond = ours.prepare([0.6], **told, task=task)
        first, second = ours(nhwc(x), 0.6, **cond, hint=ours.hint(nhwc(z)))
        found[task] = [*first, *second]
        for a, b in zip(found[task], [*doubles, *singles], strict=True):
            assert error(a, b.numpy()) < 1e-4  # float32 in another order
    assert error(found[2][0], np.array(found[5][0])) > 0.01


def test_two_controlnets_and_a_second_pass(models):
    """Each draws its own noise for the VAE; in the pass for the negative prompt they add the same."""
    parts, ours, nets, folders = models
    pair = FluxMultiControlNetModel([nets["instantx"], net("instantx", 2)])
    pair.nets[1].save_pretrained(folders["instantx"].with_name("other"))
    settings = {"control_guidance_start": [0.0, 0.3], "control_guidance_end": [0.7, 1.0], "num_inference_steps": 3}
    pictures = [picture(1, (64, 32)), picture(2, (64, 32))]
    want = guided(parts, pair, control_image=pictures, controlnet_conditioning_scale=[0.7, 0.5],
                  negative_prompt=NEGATIVE, true_cfg_scale=2.0, control_mode=[None, None], **settings)  # fmt: skip
    controls = [(folders["instantx"], pictures[0], 0.7, 0, 0.7)]
    controls.append((folders["instantx"].with_name("other"), pictures[1], 0.5, 0.3, 1))
    again = {"steps": 3, "negative": NEGATIVE, "true_cfg": 2.0}
    whole = drawn(ours, *controls, **again)
    assert psnr(whole, want) > DB
    assert psnr(drawn(ours, controls[0], **again), want) < DB - 10
    batch = ours(PROMPT, seed=SEED - 1, count=2, controls=controls, **(SAME | SIZE | again)).images
    assert psnr(np.asarray(batch[1]), whole) > 50
    ours.low_memory = True
    try:
        assert psnr(drawn(ours, *controls, **again), whole) > 50
    finally:
        ours.low_memory = False


def test_the_original_names_of_xlabs_mean_the_same(models, tmp_path):
    _, _, _, folders = models
    (one,) = convert.read(folders["xlabs"], mx.float32).values()
    state, held = {}, dict(tree_flatten(one.parameters()))
    for name, w in held.items():
        if m := re.match(r"input_hint_block\.(conv_in|conv_out|blocks\.(\d))\.(.*)", name):
            number = {"conv_in": 0, "conv_out": 14}.get(m[1], 2 + 2 * int(m[2] or 0))
            name = f"input_hint_block.{number}.{m[3]}"
        name = name.replace("controlnet_x_embedder", "pos_embed_input")
        w = torch.tensor(np.array(w))
        state[name] = w.permute(0, 3, 1, 2).contiguous() if w.ndim == 4 else w
    save_file(state, tmp_path / "single.safetensors")
    (other,) = convert.read(tmp_path / "single.safetensors", mx.float32).values()
    assert one.config.hint == other.config.hint
    assert all((w == held[n]).all() for n, w in tree_flatten(other.parameters()))


def test_what_does_not_fit_is_named(models, tmp_path):
    _, ours, _, folders = models
    with pytest.raises(Error, match=r"no kind was given\. Name one of canny, tile, depth, blur, pose, gray, lq"):
        drawn(ours, (folders["union"], picture(1)))
    with pytest.raises(Error, match="guess is for"):
        drawn(ours, (folders["instantx"], picture(1)), guess=True, true_cfg=2.0, negative="")
    narrow = FluxControlNetModel(
        in_channels=64, num_layers=1, num_single_layers=0, attention_head_dim=20, num_attention_heads=3,
        joint_attention_dim=24, pooled_projection_dim=32, axes_dims_rope=(4, 6, 10),
    )  # fmt: skip
    narrow.save_pretrained(tmp_path)
    with pytest.raises(Error, match="a FLUX ControlNet that has context 24, not 36: it does not fit"):
        drawn(ours, (tmp_path, picture(1)))
