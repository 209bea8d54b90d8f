"""ControlNets of Stable Diffusion 3 against diffusers on the same random weights: pictures (40 dB as for whole
pipelines). diffusers samples the VAE from the process's own noise; here it takes the mean, as we do."""

import shutil

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import (
    SD3ControlNetModel,
    SD3MultiControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetInpaintingPipeline,
    StableDiffusion3ControlNetPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from mlx.utils import tree_flatten
from PIL import Image
from safetensors.torch import save_file

import mlxdiff
from mlxdiff import convert
from mlxdiff.errors import Error

from . import tiny
from .oracle import error, nhwc, randomize
from .test_controlnet import picture
from .test_pipelines import DB, NEGATIVE, PROMPT, SEED, oracle, psnr

pytestmark = pytest.mark.usefixtures("cache")
SIZE = {"width": 32, "height": 24}
KINDS = {
    "instantx": {"num_layers": 2},  # 4 blocks of the denoiser share 2, and nothing is added after the last
    "masked": {"num_layers": 3, "extra_conditioning_channels": 1},
    "told": {"num_layers": 3, "force_zeros_for_pooled_projection": False, "qk_norm": "rms_norm",
             "dual_attention_layers": (0,)},
    "stability": {"num_layers": 3, "force_zeros_for_pooled_projection": False, "use_pos_embed": False,
                  "joint_attention_dim": None, "pos_embed_type": None},
}  # fmt: skip


class Edges(VaeImageProcessor):
    """As the card of Stability's network for edges has it."""

    def preprocess(self, image, *rest, **named):
        return super().preprocess(image, *rest, **named) * 127.5 + 0.5


def net(kind: str, seed: int = 1) -> SD3ControlNetModel:
    shape = {"joint_attention_dim": 88, "caption_projection_dim": 36, "pooled_projection_dim": 64}
    made = SD3ControlNetModel(
        sample_size=16, attention_head_dim=12, num_attention_heads=3, pos_embed_max_size=9, **(shape | KINDS[kind])
    )
    return tiny.louder(randomize(made, seed), 3, ("pos_embed_input.proj.weight",))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple:
    """(parts of diffusers' pipeline, our pipeline, kind -> ControlNet, kind -> its folder)"""
    root = tmp_path_factory.mktemp("sd3-control")
    theirs = tiny.sd3(root / "words")
    body = SD3Transformer2DModel.from_config(theirs.transformer.config, num_layers=4)
    theirs.vae.encoder.conv_out.weight.data.mul_(4)
    theirs.register_modules(transformer=randomize(body, 21))
    theirs.save_pretrained(root / "model")
    nets = {kind: net(kind) for kind in KINDS}
    for kind, made in nets.items():
        made.save_pretrained(root / kind)
    parts = {
        name: part for name, part in theirs.components.items() if name not in ("image_encoder", "feature_extractor")
    }
    return parts, mlxdiff.load(root / "model", dtype="float32"), nets, {kind: root / kind for kind in KINDS}


@pytest.fixture(autouse=True)
def mean(monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def guided(parts: dict, nets, edges: bool = False, **settings) -> np.ndarray:
    pipe = StableDiffusion3ControlNetPipeline(**parts, controlnet=nets)
    pipe.set_progress_bar_config(disable=True)
    if edges:
        pipe.image_processor = Edges(vae_scale_factor=pipe.vae_scale_factor, do_normalize=False)
        pipe.image_processor.postprocess = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor).postprocess
    same = {"num_inference_steps": 2, "guidance_scale": 5.0, "negative_prompt": NEGATIVE, "max_sequence_length": 256}
    return oracle(pipe, **(same | SIZE | settings))


def drawn(pipe, *controls, **settings) -> np.ndarray:
    same = {"steps": 2, "guidance": 5.0, "negative": NEGATIVE, "controls": controls}
    return np.asarray(pipe(PROMPT, seed=SEED, **(same | SIZE | settings)).image)


@pytest.mark.parametrize("kind", ["instantx", "told", "stability", "edges"])
def test_a_controlnet_draws_as_in_diffusers(models, kind):
    parts, ours, nets, folders = models
    of, edges = ("stability", True) if kind == "edges" else (kind, False)
    shown = picture(1, (32, 24))
    want = guided(parts, nets[of], edges, control_image=shown, controlnet_conditioning_scale=0.7)
    mode = {"edges": ":canny", "stability": ":depth"}.get(kind, "")
    assert psnr(drawn(ours, (f"{folders[of]}{mode}", shown, 0.7)), want) > DB
    assert psnr(drawn(ours), want) < DB - 10
    assert psnr(drawn(ours, (f"{folders[of]}{mode}", picture(2, (32, 24)), 0.7)), want) < DB - 10


@pytest.mark.parametrize("said", [True, False])
def test_a_controlnet_that_reads_a_mask_draws_as_in_diffusers(models, tmp_path, said):
    """Alimama's. diffusers begins with noise alone; here what the mask leaves out is put back after each step, as in
    its other pipelines for inpainting. The published config.json does not say that the network reads a mask."""
    parts, ours, nets, folders = models
    folder = folders["masked"]
    if not said:
        shutil.copytree(folder, tmp_path / "unsaid")
        folder = tmp_path / "unsaid"
        text = (folder / "config.json").read_text()
        assert '"extra_conditioning_channels": 1' in text
        (folder / "config.json").write_text(text.replace('"extra_conditioning_channels": 1', '"other": 1'))
    hole = Image.new("L", (32, 24))
    hole.paste(255, (9, 4, 23, 17))
    pipe = StableDiffusion3ControlNetInpaintingPipeline(**parts, controlnet=nets["masked"])
    pipe.set_progress_bar_config(disable=True)
    vae, g = pipe.vae.config, torch.Generator("cpu").manual_seed(SEED)
    with torch.no_grad():
        z = pipe.vae.encode(pipe.image_processor.preprocess(picture(4, (32, 24)))).latent_dist
    sample, noise = (torch.randn(z.mean.shape, generator=g) for _ in range(2))
    z = (z.mean + z.std * sample - vae.shift_factor) * vae.scaling_factor
    inside = torch.tensor(np.asarray(hole)[:: pipe.vae_scale_factor, :: pipe.vae_scale_factor] > 127)

    def put_back(pipe, i, t, held):
        s = pipe.scheduler.sigmas[i + 1]
        return {"latents": torch.where(inside, held["latents"], (1 - s) * z + s * noise)}

    same = {"num_inference_steps": 3, "guidance_scale": 5.0, "negative_prompt": NEGATIVE, "max_sequence_length": 256}
    same |= {"latents": noise, "callback_on_step_end": put_back, "controlnet_conditioning_scale": 0.8}
    want = oracle(pipe, control_image=picture(4, (32, 24)), control_mask=hole, **same, **SIZE)
    masked = {"image": picture(4, (32, 24)), "mask": hole, "keep": False, "steps": 3}
    assert psnr(drawn(ours, (folder, "masked", 0.8), **masked), want) > DB
    if said:
        assert psnr(drawn(ours, **masked, strength=1.0), want) < DB - 10
        with pytest.raises(Error, match=r"was made to inpaint: it reads the start image and the mask"):
            drawn(ours, (folder, picture(4, (32, 24)), 0.8), **masked)
        with pytest.raises(Error, match=r"was not made to inpaint: it reads no mask"):
            drawn(ours, (folders["instantx"], "masked", 0.8), **masked)


@pytest.mark.parametrize("kind", ["instantx", "told"])
def test_residuals_equal_diffusers(models, kind):
    _, _, nets, folders = models
    (ours,) = convert.read(folders[kind], mx.float32).values()
    g = np.random.default_rng(1)
    x, z = (g.standard_normal((1, 16, 6, 8), np.float32) for _ in range(2))
    context, pooled = g.standard_normal((1, 5, 88), np.float32), g.standard_normal((1, 64), np.float32)
    shown = torch.tensor(pooled if kind == "told" else np.zeros_like(pooled))
    (want,) = nets[kind](torch.tensor(x), torch.tensor(z), 1.0, torch.tensor(context), shown, torch.tensor([600.0]),
                         return_dict=False)  # fmt: skip
    cond = ours.prepare([0.6], mx.array(context), mx.array(pooled), (6, 8), base=(None, None))
    found = ours(nhwc(x), 0.6, **cond, hint=ours.hint(nhwc(z), 1.5, 0.0))
    for a, b in zip(found, want, strict=True):
        assert error(a, b.numpy()) < 1e-4  # float32 in another order


def test_two_controlnets_a_batch_and_little_memory(models):
    parts, ours, nets, folders = models
    pair = SD3MultiControlNetModel([nets["instantx"], net("instantx", 2)])
    pair.nets[1].save_pretrained(folders["instantx"].with_name("other"))
    pictures = [picture(1, (32, 24)), picture(2, (32, 24))]
    times = {"control_guidance_start": [0.0, 0.3], "control_guidance_end": [0.7, 1.0], "num_inference_steps": 3}
    want = guided(parts, pair, control_image=pictures, controlnet_conditioning_scale=[0.7, 0.5], **times)
    controls = [(folders["instantx"], pictures[0], 0.7, 0, 0.7)]
    controls.append((folders["instantx"].with_name("other"), pictures[1], 0.5, 0.3, 1))
    whole = drawn(ours, *controls, steps=3)
    assert psnr(whole, want) > DB
    assert psnr(drawn(ours, controls[0], steps=3), want) < DB - 10
    same = {"steps": 3, "guidance": 5.0, "negative": NEGATIVE} | SIZE
    batch = ours(PROMPT, seed=SEED - 1, count=2, controls=controls, **same).images
    assert psnr(np.asarray(batch[1]), whole) > 50
    ours.low_memory = True
    try:
        assert psnr(drawn(ours, *controls, steps=3), whole) > 50
    finally:
        ours.low_memory = False


def test_the_original_names_of_stability_mean_the_same(tmp_path):
    """The published head of 64 numbers: no shape shows it."""
    made = randomize(SD3ControlNetModel(sample_size=16, attention_head_dim=64, num_attention_heads=1,
                                        pooled_projection_dim=64, **KINDS["stability"]), 3)  # fmt: skip
    made.save_pretrained(tmp_path / "folder")
    state, new = made.state_dict(), {}
    for name, w in state.items():
        if ".to_q." in name:
            qkv = [state[name.replace("to_q", f"to_{p}")] for p in "qkv"]
            new[name.replace("to_q", "qkv")] = torch.cat(qkv)
        elif ".to_k." not in name and ".to_v." not in name:
            for a, b in [("norm1.linear", "adaLN_modulation.1"), ("to_out.0", "proj"), ("ff.net.0.proj", "mlp.fc1"),
                         ("ff.net.2", "mlp.fc2")]:  # fmt: skip
                name = name.replace(a, b)
            new[name] = w
    save_file(new, tmp_path / "single.safetensors")
    (one,), (other,) = (convert.read(tmp_path / n, mx.float32).values() for n in ("folder", "single.safetensors"))
    assert one.config == other.config
    held = dict(tree_flatten(one.parameters()))
    assert all((w == held[n]).all() for n, w in tree_flatten(other.parameters()))


def test_what_does_not_fit_is_named(models, tmp_path):
    _, ours, _, folders = models
    with pytest.raises(Error, match=r"no kind was given\. Name one of blur, canny, depth"):
        drawn(ours, (folders["stability"], picture(1)))
    with pytest.raises(Error, match="reads one kind of picture"):
        drawn(ours, (f"{folders['instantx']}:canny", picture(1)))
    with pytest.raises(Error, match="guess is for"):
        drawn(ours, (folders["instantx"], picture(1)), guess=True)
    wrong = {"joint_attention_dim": 24, "extra_conditioning_channels": 2}
    said = {"joint_attention_dim": "has context 24, not 88", "extra_conditioning_channels": "reads 18 channels"}
    for name, value in wrong.items():
        shape = {"joint_attention_dim": 88, "caption_projection_dim": 36, "pooled_projection_dim": 64, name: value}
        made = SD3ControlNetModel(sample_size=16, num_layers=1, attention_head_dim=12, num_attention_heads=3,
                                  pos_embed_max_size=9, **shape)  # fmt: skip
        made.save_pretrained(tmp_path / name)
        with pytest.raises(Error, match=f"a Stable Diffusion 3 ControlNet that {said[name]}.*: it does not fit"):
            drawn(ours, (tmp_path / name, picture(1)))
