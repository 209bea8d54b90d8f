"""Z-Image's pipelines against diffusers: same weights, prompt, seed and settings, same picture. Bound: 40 dB, as for
the other families; float32 on both sides, so it is far above."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline
from mlx.utils import tree_flatten
from safetensors.torch import save_file

from mlxdiff import convert
from mlxdiff.errors import Error
from tests import original
from tests.checkpoints import full
from tests.test_convert import arrays
from tests.test_convert_flow import vae

from . import tiny
from .test_flow_pipelines import opened, ours
from .test_image_to_image import image
from .test_pipelines import DB, NEGATIVE, PROMPT, SEED, SIZE, command, psnr

pytestmark = pytest.mark.usefixtures("cache")
KINDS = ("turbo", "base")
LONG = "a red fox in the snow, " * 8  # more than 32 tokens, where an empty negative prompt has fewer


@pytest.fixture(scope="module")
def oracles(tmp_path_factory) -> dict:
    """kind -> (diffusers pipeline, folder it was saved in)"""
    root, made = tmp_path_factory.mktemp("zimage"), {}
    for kind in KINDS:
        # No shape shows how many groups the VAE's norms have: here as many as in the published one.
        own = vae(45, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)
        pipe = ZImagePipeline(**tiny.zimage(root / f"{kind}-words", kind).components | {"vae": own})
        pipe.vae.encoder.conv_out.weight.data.mul_(12)  # else another image would change the picture by 40 dB only
        pipe.set_progress_bar_config(disable=True)
        pipe.save_pretrained(root / kind)
        made[kind] = pipe, root / kind
    return made


def theirs(pipe, prompt: str = PROMPT, guidance: float = 1.0, **settings) -> np.ndarray:
    """guidance: the usual number, which is one more than theirs."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    drawn = pipe(prompt, generator=generator, guidance_scale=guidance - 1, **SIZE | settings)
    return np.asarray(drawn.images[0])


def test_the_oracles_listen_to_their_prompts(oracles):
    """Else the tests below could not fail on a mistake in the text."""
    for kind in KINDS:
        pipe, same = oracles[kind][0], {"num_inference_steps": 4}
        assert psnr(theirs(pipe, **same), theirs(pipe, "a blue boat", **same)) < 30
    same |= {"guidance": 5.0}
    plain = theirs(pipe, negative_prompt=NEGATIVE, **same)
    assert psnr(plain, theirs(pipe, negative_prompt="", **same)) < 30
    assert psnr(plain, theirs(pipe, negative_prompt=NEGATIVE, **same | {"guidance": 3.0})) < 30


def test_turbo(oracles, cache, tmp_path):
    """Through the command line; nothing about steps, guidance and shift is typed."""
    pipe, folder = oracles["turbo"]
    drawn, said = command(cache, tmp_path / "a.png", PROMPT, "-m", str(folder), process=True)
    request = said["request"]
    assert (request["sampler"], request["schedule"], request["steps"]) == ("euler", "trailing", 8)
    assert psnr(drawn, theirs(pipe, num_inference_steps=8)) > DB


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_guidance_with_a_negative_prompt(oracles, cache, tmp_path, prompt):
    """Both halves in one batch, whose texts have the same padded length, or not; and one after the other."""
    pipe, folder = oracles["base"]
    want = theirs(pipe, prompt, negative_prompt=NEGATIVE, num_inference_steps=4, guidance=5.0)
    typed = (prompt, "-n", NEGATIVE, "-m", str(folder), "--steps", "4", "-g", "5")
    drawn, _ = command(cache, tmp_path / "a.png", *typed)
    assert psnr(drawn, want) > DB
    assert psnr(ours(folder, prompt, True, negative=NEGATIVE, steps=4, guidance=5.0), drawn) > 50


def test_the_default_guidance_is_theirs(oracles, cache, tmp_path):
    """Their default of 5 is 6 here; no negative prompt is an empty one."""
    pipe, folder = oracles["base"]
    generator = torch.Generator("cpu").manual_seed(SEED)
    want = pipe(PROMPT, generator=generator, num_inference_steps=5, **SIZE).images[0]
    drawn, said = command(cache, tmp_path / "a.png", PROMPT, "-m", str(folder), "--steps", "5", process=True)
    assert said["request"]["guidance"] == 6.0
    assert psnr(drawn, np.asarray(want)) > DB


def test_guidance_of_one_is_one_pass(oracles):
    pipe, folder = oracles["base"]
    want = theirs(pipe, num_inference_steps=4, guidance=1.0)
    assert psnr(ours(folder, steps=4, guidance=1.0), want) > DB


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_to_begin_with(oracles, kind):
    own, folder = oracles[kind]
    pipe = ZImageImg2ImgPipeline(**own.components)
    pipe.set_progress_bar_config(disable=True)
    settings = {"strength": 0.6, "num_inference_steps": 7} | ({"guidance": 4.0} if kind == "base" else {})
    want = theirs(pipe, image=image(1), **settings)
    assert psnr(want, theirs(pipe, image=image(2), **settings)) < 30  # the oracle looks at its image
    same = {"image": image(1), "strength": 0.6, "steps": 7} | ({"guidance": 4.0} if kind == "base" else {})
    assert psnr(ours(folder, **same), want) > DB


# ---- single files


def comfy(module) -> dict[str, np.ndarray]:
    """The transformer under ComfyUI's names."""
    held, made = arrays(module), {"norm_final.weight": np.ones(module.config.dim, np.float32)}
    for name, x in held.items():
        if ".attention.to_q." in name:
            made[name.replace("to_q", "qkv")] = np.concatenate([held[name.replace("to_q", f"to_{p}")] for p in "qkv"])
        elif ".attention.to_k." not in name and ".attention.to_v." not in name:
            for theirs, ours in (("all_x_embedder.2-1", "x_embedder"), ("all_final_layer.2-1", "final_layer"),
                                 ("norm_q", "q_norm"), ("norm_k", "k_norm"), ("to_out.0", "out")):  # fmt: skip
                name = name.replace(theirs, ours)
            made[name] = x
    return made


def apart(root, pipe, name: str = "z_image_turbo_bf16"):
    """ComfyUI's three files."""
    full(root / "ae.safetensors", original.vae(arrays(pipe.vae)))
    full(root / "text_encoders" / "qwen_3_4b.safetensors", original.under("model.", arrays(pipe.text_encoder)))
    return full(root / f"{name}.safetensors", comfy(pipe.transformer))


def test_files_of_its_parts(oracles, cache, tmp_path):
    """With a VAE whose norms have as many groups as the published one, since no shape shows their number."""
    own, folder = oracles["turbo"]
    pipe = ZImagePipeline(
        **own.components | {"vae": vae(45, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)}
    )
    pipe.set_progress_bar_config(disable=True)
    want = theirs(pipe, num_inference_steps=8)
    file = apart(tmp_path / "beside", pipe)
    typed = (PROMPT, "--tokenizer", str(folder / "tokenizer"), "-m")
    drawn, _ = command(cache, tmp_path / "a.png", *typed, str(file), process=True)
    assert psnr(drawn, want) > DB
    alone = file.rename(tmp_path / "my-turbo.safetensors")
    given = ("--vae", str(tmp_path / "beside" / "ae.safetensors"), "--text-encoder")
    given += (str(tmp_path / "beside" / "text_encoders" / "qwen_3_4b.safetensors"),)
    drawn, _ = command(cache, tmp_path / "b.png", *typed, str(alone), *given)
    assert psnr(drawn, want) > DB


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
def test_scaled_8_bit_floats(oracles, tmp_path, scale):
    """As ComfyUI's fp8_scaled files have them: each matrix of a layer has one scale. Reference: torch's products, to
    the bit; the fused attention is cut after it was scaled."""
    pipe, held, want = oracles["turbo"][0], {}, {}
    for name, x in comfy(pipe.transformer).items():
        x = torch.from_numpy(np.ascontiguousarray(x))
        held[name] = want[name] = x
        if name.startswith("layers.") and x.ndim == 2:
            own = x.abs().max() / 448  # the largest e4m3
            held[name], held[name.replace("weight", scale)] = (x / own).to(torch.float8_e4m3fn), own
            want[name] = held[name].float() * own
    file = apart(tmp_path, pipe)
    plain = full(tmp_path / "z_image_turbo_numbers.safetensors", {n: x.numpy() for n, x in want.items()})
    save_file({n: x.clone() for n, x in held.items()}, file)
    words = oracles["turbo"][1] / "tokenizer"
    a, b = (convert.convert(f, tmp_path / f.stem, dtype="float32", tokenizer=words) for f in (file, plain))
    assert (a / "transformer.safetensors").read_bytes() == (b / "transformer.safetensors").read_bytes()
    assert psnr(ours(a, steps=4), theirs(pipe, num_inference_steps=4)) > 20  # it is that picture, roughly


def test_what_a_file_is_called_shows_turbo_and_a_scheduler_before_that(oracles, tmp_path):
    """A file has no scheduler. A folder has one, whatever it is called."""
    pipe, folder = oracles["turbo"]
    for name, variant, shift in (("z_image_turbo_bf16", "turbo", 3.0), ("z_image_bf16", "base", 6.0)):
        found = convert.open(apart(tmp_path, pipe, name))
        assert (found.family, found.variant, found.schedule["shift"]) == ("zimage", variant, shift)
        assert (found.unmapped, found.missing) == ({}, [])
    assert convert.open(folder.rename(folder.with_name("plain"))).variant == "turbo"
    folder.with_name("plain").rename(folder)
    assert convert.open(oracles["base"][1]).variant == "base"


def test_missing_parts_are_named(oracles, tmp_path):
    file = apart(tmp_path, oracles["turbo"][0])
    (tmp_path / "ae.safetensors").unlink()
    with pytest.raises(Error, match=r"without vae. Give `vae=ae.safetensors`"):
        convert.convert(file, tmp_path / "out")
    (tmp_path / "text_encoders" / "qwen_3_4b.safetensors").unlink()
    with pytest.raises(Error, match=r"without text_encoder, vae. Give `text_encoder=qwen_3_4b"):
        convert.convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_it_refuses(oracles):
    turbo, base = (opened(oracles[kind][1]) for kind in KINDS)
    for pipe, settings, said in (
        (turbo, {"guidance": 3.5}, "takes no guidance"),
        (turbo, {"negative": "blurry"}, "no place for a negative prompt"),
        (base, {"true_cfg": 3.0, "negative": ""}, "true_cfg is for FLUX"),
        (base, {"sampler": "ddim"}, "not for models of rectified flow"),
        (base, {"width": 38}, "not a multiple of 4"),
        (turbo, {"image": [image(1), image(2)]}, "begins with one picture; 2 were given"),
        (base, {"image": [image(1)] * 5}, "begins with one picture; 5 were given"),
        (turbo, {"references": [("ip-adapter", image(1), 0.6)]}, r"References are for .*; turbo is Z-Image"),
    ):
        with pytest.raises(Error, match=said):
            pipe.resolve(PROMPT, **settings)


@pytest.mark.parametrize("prompt", [PROMPT, "a blue boat", LONG])
def test_eight_bits_draw_nearly_the_same(wide, prompt):
    folder = wide
    want = ours(folder, prompt, steps=3)
    small = opened(folder, bits=8)(prompt, seed=SEED, steps=3, **SIZE).image
    assert psnr(np.asarray(small), want) > 35


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Widths that groups of 32 divide."""
    root = tmp_path_factory.mktemp("wide")
    tiny.zimage(root / "words", axes=(8, 12, 12), width=64).save_pretrained(root / "m")
    return root / "m"


def test_modulation_is_released_and_a_batch_draws_its_members(oracles):
    pipe = opened(oracles["base"][1])
    request = pipe.resolve(LONG, seed=5, steps=2, guidance=3.0, count=2, **SIZE)
    batch = [np.asarray(i) for i in pipe(request).images]
    kept = {k for k, _ in tree_flatten(pipe.networks.get("transformer").parameters())}
    assert not any(part in k for k in kept for part in ("adaLN", "t_embedder", "cap_", "context_refiner", "norm1"))
    alone = np.asarray(pipe(replace(request, seed=6, count=1)).image)
    assert psnr(batch[1], alone) > 50  # a batched matmul may round differently from a single one
    assert psnr(batch[0], batch[1]) < DB
