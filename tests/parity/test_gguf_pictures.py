"""A denoiser in a GGUF file of four bits draws what a .safetensors file of the numbers in its blocks does, to the bit;
the weights that it was made of draw another picture. Its other networks lie beside it, or are given."""

from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
from transformers import CLIPTokenizer

import mlxdiff
from mlxdiff import Error, convert
from tests import clip_vocab, original, t5_vocab, test_convert
from tests.checkpoints import full
from tests.test_convert import arrays
from tests.test_convert_flow import SD3, clip_state, nets, t5_state, vae
from tests.test_gguf import packed, unpacked, written

from . import tiny
from .bfl import from_diffusers
from .test_flux2_pipelines import made, short
from .test_pipelines import DB, NEGATIVE, PROMPT, SEED, command, oracle, psnr
from .test_zimage_pipelines import comfy

__all__ = ["short"]  # a fixture
pytestmark = pytest.mark.usefixtures("cache", "short")
Made = tuple[dict, dict[str, dict], Path]  # the denoiser, the networks beside it by their files, tokenizers


def sdxl(root: Path) -> Made:
    parts, words = test_convert.nets("sdxl"), clip_vocab.write(root / "words", clip_vocab.trained(186))
    beside = {"clip_l": clip_state(parts["text_encoder"]), "clip_g": clip_state(parts["text_encoder_2"])}
    return original.unet(arrays(parts["unet"])), beside | {"sdxl_vae": arrays(parts["vae"])}, words


def sd35(root: Path) -> Made:
    kinds = {"num_attention_heads": 2, "attention_head_dim": 32, "caption_projection_dim": 64, "num_layers": 2}
    net = diffusers.SD3Transformer2DModel(**SD3, **kinds, dual_attention_layers=(0,), qk_norm="rms_norm")
    parts = nets("sd3.5")
    for name in ("tokenizer", "tokenizer_2"):
        clip_vocab.write(root / "words" / name, clip_vocab.trained(150))
    t5_vocab.write(root / "words" / "tokenizer_3")
    beside = {"clip_l": clip_state(parts["text_encoder"]), "clip_g": clip_state(parts["text_encoder_2"])}
    beside |= {"t5xxl": t5_state(parts["text_encoder_3"]), "sd3_vae": arrays(parts["vae"])}
    return original.sd3(arrays(tiny.stir(net, 5))), beside, root / "words"


def flux2(root: Path) -> Made:
    pipe = made(root / "words", width=64, head=32, text=32)
    text = {"qwen_3_4b": original.under("model.", arrays(pipe.text_encoder.model))}
    net = {k: x.numpy() for k, x in from_diffusers(pipe.transformer.state_dict()).items()}
    return net, text | {"flux2-vae": arrays(pipe.vae)}, root / "words"


def zimage(root: Path) -> Made:
    pipe = tiny.zimage(root / "words", axes=(8, 12, 12), width=64)
    own = vae(45, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)
    text = {"qwen_3_4b": original.under("model.", arrays(pipe.text_encoder))}
    pipe.tokenizer.save_pretrained(root / "tokenizer")
    return comfy(pipe.transformer), text | {"ae": arrays(own)}, root / "tokenizer"


@pytest.mark.parametrize("model", [sdxl, sd35, flux2, zimage])
def test_a_gguf_draws_what_its_numbers_draw(tmp_path, model: Callable[[Path], Made]):
    net, beside, words = model(tmp_path)
    kinds = packed(net, "Q4_0")
    assert sum(kind == "Q4_0" for kind in kinds.values()) > 10
    for name, state in beside.items():
        full(tmp_path / f"{name}.safetensors", state)
    files = {"gguf": written(tmp_path / "packed.gguf", net, kinds=kinds)}
    files["numbers"] = full(tmp_path / "unpacked.safetensors", unpacked(net, kinds))
    files["plain"] = full(tmp_path / "plain.safetensors", net)
    drawn = {}
    for name, file in files.items():
        pipe = mlxdiff.load(file, dtype="float32", tokenizer=words)
        drawn[name] = np.asarray(pipe(PROMPT, seed=SEED, steps=2, width=24, height=16).image)
    assert np.array_equal(drawn["gguf"], drawn["numbers"])
    assert psnr(drawn["gguf"], drawn["plain"]) < DB


def test_a_unet_alone_with_its_parts_is_the_whole_checkpoint(cache, tmp_path):
    """Through the command line, against diffusers; what it lacks is named, and parts may be given by flags."""
    net, beside, words = sdxl(tmp_path)
    alone = written(tmp_path / "alone" / "sdxl-F32.gguf", net)
    with pytest.raises(Error, match=r"holds only unet, without text_encoder, text_encoder_2, vae") as e:
        convert.convert(alone, tmp_path / "out", tokenizer=words)
    for flag in ("`clip=clip_l*.safetensors`", "`clip_g=clip_g*.safetensors`", "`vae=sdxl_vae*.safetensors`"):
        assert flag in e.value.fix
    given = {flag: str(full(tmp_path / f"my-{name}.safetensors", beside[name]))
             for flag, name in (("--vae", "sdxl_vae"), ("--clip", "clip_l"), ("--clip-g", "clip_g"))}  # fmt: skip
    typed = [PROMPT, "-n", NEGATIVE, "-m", str(alone), "--tokenizer", str(words), "-g", "5", "--steps", "4"]
    drawn, _ = command(cache, tmp_path / "a.png", *typed, *(x for pair in given.items() for x in pair))
    toks = [CLIPTokenizer.from_pretrained(words, model_max_length=77, **pad) for pad in ({}, {"pad_token": "!"})]
    scheduler = diffusers.EulerDiscreteScheduler(**test_convert.BETAS, timestep_spacing="leading", steps_offset=1)
    pipe = diffusers.StableDiffusionXLPipeline(
        **test_convert.nets("sdxl"), tokenizer=toks[0], tokenizer_2=toks[1], scheduler=scheduler, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    assert psnr(drawn, oracle(pipe, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=5.0)) > DB
