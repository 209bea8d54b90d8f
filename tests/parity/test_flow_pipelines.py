"""SD3 and FLUX pipelines against diffusers: same weights, prompt, seed and settings, same picture. Bound: 40 dB, as for
the other families; float32 on both sides, so it is far above."""

import re
from dataclasses import replace

import mlx.nn as nn
import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from mlx.utils import tree_flatten
from transformers import CLIPTokenizer, T5Tokenizer

import mlxdiff
from mlxdiff import generate, notes
from mlxdiff.errors import Error
from mlxdiff.models.t5 import T5Encoder
from mlxdiff.pipeline import Pipeline
from mlxdiff.recipe import BITS
from tests import clip_vocab, t5_vocab
from tests.test_convert_flow import apart, nets, single, t5_state, transformer_state
from tests.test_gguf import blocky, packed, unpacked, written

from . import tiny
from .test_pipelines import DB, NEGATIVE, PROMPT, SEED, SIZE, command, oracle, psnr

pytestmark = pytest.mark.usefixtures("cache")
NAMES = {"sd3": ("sd3", "medium"), "sd3.5": ("sd3", "3.5"), "dev": ("flux", "dev"), "schnell": ("flux", "schnell")}
TOKENS = {"sd3": 256, "sd3.5": 256, "dev": 512, "schnell": 256}


@pytest.fixture(scope="module")
def oracles(tmp_path_factory) -> dict:
    """name -> (diffusers pipeline, folder it was saved in)"""
    root, made = tmp_path_factory.mktemp("flow"), {}
    for name, (family, kind) in NAMES.items():
        made[name] = getattr(tiny, family)(root / f"{name}-words", kind), root / name
        made[name][0].set_progress_bar_config(disable=True)
        made[name][0].save_pretrained(root / name)
    return made


def opened(folder, **options) -> Pipeline:
    return mlxdiff.load(folder, dtype="float32", **options)


def ours(folder, prompt=PROMPT, low_memory=False, **settings) -> np.ndarray:
    pipe = opened(folder, low_memory=low_memory)
    return np.asarray(pipe(prompt, seed=SEED, **(SIZE | settings)).image)


def theirs(pipe, name, **settings) -> np.ndarray:
    return oracle(pipe, max_sequence_length=TOKENS[name], **settings)


CFG = {"sd3": {"guidance_scale": 5.0}, "sd3.5": {"guidance_scale": 5.0}}


@pytest.mark.parametrize("name", NAMES)
def test_the_oracles_listen_to_their_prompts(oracles, name):
    """Else the tests below could not fail on a mistake in the text."""
    pipe, same = oracles[name][0], {"num_inference_steps": 5} | CFG.get(name, {"true_cfg_scale": 3.0})
    plain = theirs(pipe, name, negative_prompt=NEGATIVE, **same)
    assert psnr(plain, theirs(pipe, name, negative_prompt="", **same)) < DB - 10
    generator = torch.Generator("cpu").manual_seed(SEED)
    other = pipe("a blue boat", generator=generator, negative_prompt=NEGATIVE, **SIZE, **same).images[0]
    assert psnr(plain, np.asarray(other)) < DB - 10
    t5 = {"prompt_3" if name.startswith("sd3") else "prompt_2": "a blue boat"}  # what T5 alone reads
    assert psnr(plain, theirs(pipe, name, negative_prompt=NEGATIVE, **t5, **same)) < DB - 10
    if name == "dev":
        assert psnr(plain, theirs(pipe, name, negative_prompt=NEGATIVE, guidance_scale=9.0, **same)) < DB - 5


@pytest.mark.parametrize("name", NAMES)
def test_t5_reads_what_the_reference_has_it_read(oracles, name, monkeypatch):
    """The same tokens and as much padding, which counts: no mask hides it. Of schnell as many as its authors' own
    program takes, of the others as many as diffusers takes where it is told nothing."""
    pipe, folder = oracles[name]
    own, ours, want = T5Encoder.__call__, [], []
    monkeypatch.setattr(T5Encoder, "__call__", lambda self, ids: ours.append(np.array(ids)) or own(self, ids))
    opened(folder)(PROMPT, seed=SEED, steps=1, **SIZE)
    encoder = pipe.text_encoder_3 if name.startswith("sd3") else pipe.text_encoder_2
    hook = encoder.register_forward_pre_hook(lambda _, args: want.append(args[0].numpy()))
    try:
        pipe(PROMPT, num_inference_steps=1, **SIZE, **({"max_sequence_length": 256} if name == "schnell" else {}))
    finally:
        hook.remove()
    assert {ids.shape[1] for ids in ours} == {TOKENS[name]}
    assert {tuple(row) for ids in ours for row in ids} == {tuple(row) for ids in want for row in ids}


@pytest.mark.parametrize("name", ["sd3", "sd3.5"])
def test_sd3(oracles, name):
    pipe, folder = oracles[name]
    want = theirs(pipe, name, negative_prompt=NEGATIVE, num_inference_steps=6, guidance_scale=5.0)
    assert psnr(ours(folder, negative=NEGATIVE, steps=6, guidance=5.0), want) > DB
    assert psnr(ours(folder, negative=NEGATIVE, steps=6, guidance=5.0, low_memory=True), want) > DB
    want = theirs(pipe, name, num_inference_steps=3, guidance_scale=1.0)
    assert psnr(ours(folder, steps=3, guidance=1.0), want) > DB


def test_kontext_draws_from_a_prompt_alone(oracles, tmp_path):
    """As diffusers' pipeline does where it is given no picture. With one: tests/parity/test_editing.py."""
    kontext = FluxKontextPipeline(**oracles["dev"][0].components)
    kontext.set_progress_bar_config(disable=True)
    kontext.save_pretrained(tmp_path / "kontext")
    same = {"num_inference_steps": 3, "guidance_scale": 2.5, "max_area": SIZE["width"] * SIZE["height"]}
    want = kontext(prompt=PROMPT, generator=torch.Generator("cpu").manual_seed(SEED), **SIZE, **same).images[0]
    assert psnr(ours(tmp_path / "kontext", steps=3, guidance=2.5), np.asarray(want)) > DB


SKIP = {"skip_layers": (0, 1), "skip_scale": 4.0, "skip_interval": (0.2, 0.7)}


def test_skipped_layers_guide_step_for_step(oracles):
    """Of 7 steps the third to the fifth: 1.4 < i < 4.9. Then in one half after the other, and by default the second."""
    pipe, folder = oracles["sd3.5"]
    names = {"skip_layer_guidance_scale": 4.0, "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.7}
    same, latents = {"negative_prompt": NEGATIVE, "num_inference_steps": 7, "guidance_scale": 4.0}, []

    def keep(pipe, i, t, values):
        latents.append(values["latents"].numpy().transpose(0, 2, 3, 1))
        return values

    want = theirs(pipe, "sd3.5", skip_guidance_layers=[0, 1], callback_on_step_end=keep, **names, **same)
    own = {"negative": NEGATIVE, "steps": 7, "guidance": 4.0}
    events = opened(folder).stream(PROMPT, seed=SEED, **own, **SKIP, **SIZE)
    steps = [e.x for e in events if e.stage == "denoise" and e.step]
    assert len(steps) == len(latents) == 7
    for a, b in zip(latents, steps, strict=True):
        assert np.abs(a - b).max() < 1e-4 * np.abs(a).max()  # float32 in another order; a step guided or not: 0.1
    assert psnr(ours(folder, **own, **SKIP), want) > DB
    assert psnr(ours(folder, low_memory=True, **own, **SKIP), want) > DB
    plain = theirs(pipe, "sd3.5", **same)
    assert psnr(want, plain) < DB - 10
    once = theirs(pipe, "sd3.5", skip_guidance_layers=[0, 1], skip_layer_guidance_scale=12.0, **same)
    assert psnr(ours(folder, skip_layers=(0, 1), skip_scale=12.0, **own), once) > DB
    assert psnr(once, plain) < DB - 10


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral", "unipc"])
def test_skipped_layers_under_every_sampler(oracles, sampler):
    """An interval that holds no step changes nothing; one that does, does."""
    own = {"steps": 5, "guidance": 4.0, "sampler": sampler, "skip_layers": (1,), "skip_scale": 4.0}
    plain = ours(oracles["sd3.5"][1], **own, skip_interval=(0.9, 1.0))
    assert np.array_equal(plain, ours(oracles["sd3.5"][1], **own | {"skip_layers": ()}))
    assert psnr(plain, ours(oracles["sd3.5"][1], **own, skip_interval=(0.0, 1.0))) < DB - 5


def test_sd3_without_t5(oracles, tmp_path):
    """Zeros in its place, whether it was left out of the run or of the folder."""
    pipe, folder = oracles["sd3"]
    own, pipe.text_encoder_3 = pipe.text_encoder_3, None
    try:
        want = theirs(pipe, "sd3", num_inference_steps=4, guidance_scale=5.0)
        pipe.save_pretrained(tmp_path / "without")
    finally:
        pipe.text_encoder_3 = own
    assert psnr(ours(folder, steps=4, guidance=5.0, t5=False), want) > DB
    assert psnr(ours(folder, steps=4, guidance=5.0), want) < DB - 10
    assert psnr(ours(tmp_path / "without", steps=4, guidance=5.0), want) > DB


def test_flux_dev_is_told_its_guidance(oracles):
    pipe, folder = oracles["dev"]
    want = theirs(pipe, "dev", num_inference_steps=6, guidance_scale=4.5)
    assert psnr(ours(folder, steps=6, guidance=4.5), want) > DB


def test_flux_dev_with_a_negative_prompt_and_true_cfg(oracles):
    pipe, folder = oracles["dev"]
    same = {"num_inference_steps": 4, "guidance_scale": 3.5}
    want = theirs(pipe, "dev", negative_prompt=NEGATIVE, true_cfg_scale=3.0, **same)
    assert psnr(ours(folder, steps=4, guidance=3.5, negative=NEGATIVE, true_cfg=3.0), want) > DB
    assert psnr(theirs(pipe, "dev", **same), want) < DB - 10


def test_flux_schnell(oracles):
    pipe, folder = oracles["schnell"]
    assert psnr(ours(folder), theirs(pipe, "schnell", num_inference_steps=4)) > DB


class ExactUniPC(UniPCMultistepScheduler):
    """diffusers cuts the times of flow to whole thousandths for DPM++ and UniPC, which no model was trained for."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.sigmas[:-1] * 1000


def test_unipc_as_diffusers_drives_it(oracles):
    pipe, folder = oracles["sd3"]
    own = pipe.scheduler
    pipe.scheduler = ExactUniPC(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    try:
        want = theirs(pipe, "sd3", num_inference_steps=6, guidance_scale=3.0)
    finally:
        pipe.scheduler = own
    assert psnr(ours(folder, steps=6, guidance=3.0, sampler="unipc", schedule="sgm_uniform"), want) > DB


def test_through_the_command_line(oracles, cache, tmp_path):
    _, folder = oracles["sd3"]
    out, args = tmp_path / "a.png", ["-m", str(folder), "--steps", "4", "-g", "5", "--shift", "2", "--no-t5"]
    drawn, said = command(cache, out, PROMPT, *args, process=True)
    assert (said["request"]["sampler"], said["request"]["schedule"]) == ("euler", "linspace")
    assert (said["request"]["shift"], said["request"]["t5"]) == (2.0, False)
    assert psnr(drawn, ours(folder, steps=4, guidance=5.0, shift=2.0, t5=False)) == float("inf")
    assert psnr(drawn, ours(folder, steps=4, guidance=5.0, t5=False)) < DB


def test_modulation_is_released_and_the_next_run_takes_other_steps(oracles):
    pipe = opened(oracles["dev"][1])
    first = pipe(PROMPT, seed=SEED, steps=3, **SIZE).image
    kept = {k for k, _ in tree_flatten(pipe.networks.get("transformer").parameters())}
    assert kept
    assert not any("mod" in k or "_in." in k.replace("img_in.", "") for k in kept)
    assert not any(name.startswith("text_encoder") for name in pipe.networks._held)
    other = pipe("a blue boat", seed=SEED, steps=4, width=24, height=32).image
    fresh = opened(oracles["dev"][1])("a blue boat", seed=SEED, steps=4, width=24, height=32).image
    assert np.array_equal(np.asarray(other), np.asarray(fresh))
    assert np.array_equal(np.asarray(first), np.asarray(pipe(PROMPT, seed=SEED, steps=3, **SIZE).image))


@pytest.mark.parametrize("name", ["sd3.5", "dev"])
def test_a_batch_draws_its_members(oracles, name):
    pipe = opened(oracles[name][1])
    request = pipe.resolve(PROMPT, seed=5, steps=2, sampler="euler_ancestral", count=2, **SIZE)
    batch = [np.asarray(i) for i in pipe(request).images]
    alone = np.asarray(pipe(replace(request, seed=6, count=1)).image)
    assert psnr(batch[1], alone) > 50  # a batched matmul may round differently from a single one
    assert psnr(batch[0], batch[1]) < DB


KEPT = {
    "sd3": {
        "time_text_embed.timestep_embedder.linear_N",
        "time_text_embed.text_embedder.linear_N",
        "context_embedder",
        "norm_out.linear",
        "proj_out",
    },
    "flux": {
        *(f"{name}_in.{end}_layer" for name in ("time", "vector", "guidance") for end in ("in", "out")),
        "img_in",
        "txt_in",
        "final_layer.adaLN_modulation.N",
        "final_layer.linear",
    },
}


MODULATION = {
    "sd3": {"transformer_blocks.N.normN.linear", "transformer_blocks.N.normN_context.linear"},
    "flux": {"double_blocks.N.img_mod.lin", "double_blocks.N.txt_mod.lin", "single_blocks.N.modulation.lin"},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> dict:
    """family -> (folder, what it draws in full precision); widths that groups of 32 divide"""
    root, made = tmp_path_factory.mktemp("wide"), {}
    for family, kinds in (("sd3", {"dim": 32, "width": 96}), ("flux", {"axes": (8, 12, 12), "width": 64})):
        getattr(tiny, family)(root / f"{family}-words", **kinds).save_pretrained(root / family)
        made[family] = root / family, ours(root / family, steps=3)
    return made


# How near the picture in full precision each recipe comes, for these random weights: what was seen, less 3 dB or more.
LEAST = {3: 14, 4: 16, 5: 22, 6: 24, 8: 35, "mxfp4": 18, "mxfp8": 27, "nvfp4": 16}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_quantized_pipelines(wide, family, bits):
    """Of the transformer all but what every step or token passes through is quantized, its modulations to 8 bits."""
    folder, want = wide[family]
    small = opened(folder, bits=bits)
    net = small.networks.open("transformer")

    def those(test) -> set[str]:
        return {re.sub(r"\d+", "N", p) for p, m in net.named_modules() if test(m)}

    assert those(lambda m: isinstance(m, nn.Linear)) == KEPT[family]
    eight = those(lambda m: isinstance(m, nn.QuantizedLinear) and (m.bits, m.mode) == (8, "affine"))
    assert eight >= MODULATION[family]
    assert (eight == MODULATION[family]) == (bits != 8)
    error = small.description.error
    assert error.keys() >= {"text_encoder", "transformer"}
    assert max(error.values()) < 0.25
    drawn = np.asarray(small(PROMPT, seed=SEED, steps=3, **SIZE).image)
    assert psnr(drawn, want) > LEAST[bits]


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_t5_alone_in_8_bits(wide, family):
    """`text_bits` quantizes T5 and nothing else, in a folder of its own; the picture changes, and as little as with 8
    bits for all."""
    folder, want = wide[family]
    small, t5 = opened(folder, text_bits=8), {"sd3": "text_encoder_3", "flux": "text_encoder_2"}[family]
    assert small.networks.folder != opened(folder).networks.folder
    assert small.description.error.keys() == {t5}
    quantized = [name for name in small.description.components if any(
        isinstance(layer, nn.QuantizedLinear) for layer in small.networks.open(name).modules()
    )]  # fmt: skip
    assert quantized == [t5]
    drawn = np.asarray(small(PROMPT, seed=SEED, steps=3, **SIZE).image)
    assert not np.array_equal(drawn, want)
    assert psnr(drawn, want) > LEAST[8]
    said = [" ".join(notes.of_run(pipe, pipe.resolve(PROMPT, **SIZE))) for pipe in (small, opened(folder))]
    assert [("T5 is in 8 bits. --text-bits 16" in text) for text in said] == [True, False]
    with pytest.raises(Error, match="with text_bits 8, not 4"):
        opened(small.networks.folder, text_bits=4)


def test_long_and_weighted_prompts_run_and_differ(oracles):
    for name, long in (("sd3", 110), ("dev", 0)):
        draw = lambda prompt, folder=oracles[name][1]: ours(folder, prompt, steps=2)  # noqa: E731
        plain = draw("a red fox in the snow")
        assert psnr(plain, draw("(a red fox in the snow:1.0)")) > 50  # weight 1 is no weight
        assert psnr(plain, draw("(a red fox in the snow:3.0)")) < 50  # a few of 512 tokens
        if long:
            assert psnr(plain, draw("a red fox in the snow " + "snow " * long)) < DB


def test_what_these_families_refuse(oracles):
    dev, schnell, sd3 = (opened(oracles[n][1]) for n in ("dev", "schnell", "sd3"))
    for pipe, settings, said in (
        (schnell, {"guidance": 3.5}, "takes no guidance"),
        (dev, {"negative": "blurry"}, "no place for a negative prompt"),
        (dev, {"true_cfg": 3.0}, "no negative prompt to pull from"),
        (dev, {"t5": False}, "t5 is for Stable Diffusion 3"),
        (dev, {"sampler": "ddim"}, "not for models of rectified flow"),
        (dev, {"schedule": "leading"}, "does not exist for rectified flow"),
        (dev, {"width": 36}, "not a multiple of 8"),
        (sd3, {"true_cfg": 3.0}, "true_cfg is for FLUX"),
        (sd3, {"width": 80}, "at most 72 pixels"),
        (sd3, {"clip_skip": 4}, "3 layers"),
        (sd3, {"shift": 0.0}, "Shift must be a number"),
        (sd3, {"skip_layers": (3,)}, "names 3; .* has layers 0 to 2"),
        (sd3, {"skip_layers": (1, -1)}, "names -1"),
        (sd3, {"skip_layers": ("1",)}, "names '1'"),
        (sd3, {"skip_layers": (1,), "guidance": 1.0}, "needs guidance"),
        (dev, {"skip_layers": (1,)}, "skip_layers is for Stable Diffusion 3"),
    ):
        with pytest.raises(Error, match=said):
            pipe.resolve(PROMPT, **settings)


@pytest.mark.parametrize(
    ("name", "typed", "said"),
    [
        ("schnell", ["-g", "3.5"], "takes no guidance"),
        ("dev", ["-n", "blurry"], "no place for a negative prompt"),
        ("dev", ["-W", "36"], "Use 32 or 40"),
        ("dev", ["--sampler", "dpmpp_sde"], "Use one of euler, euler_ancestral, heun, dpmpp_2m, unipc"),
        ("dev", ["--schedule", "leading"], "Use one of linspace"),
        ("sd3", ["--skip-layers", "7", "8", "9"], "has layers 0 to 2"),
        ("sd3", ["--prediction", "v"], "predicts flow"),
    ],
)
def test_what_they_refuse_is_one_line_at_the_command_line(oracles, tmp_path, monkeypatch, capsys, name, typed, said):
    monkeypatch.chdir(tmp_path)
    assert generate.main(["a fox", "-m", str(oracles[name][1]), "--dtype", "float32", "-o", "a.png", *typed]) == 1
    out, err = capsys.readouterr()
    assert (out, len(err.strip().splitlines())) == ("", 1)
    assert said in err
    assert list(tmp_path.iterdir()) == []


# ---- single files under the original authors' names; the weights and the layouts are those of test_convert_flow


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Tokenizers in one folder, as a diffusers model has them, with the 700 words these CLIPs have."""
    root = tmp_path_factory.mktemp("words")
    made = clip_vocab.write(root / "made", clip_vocab.trained(186))
    for name, pad in (("tokenizer", {}), ("tokenizer_2", {"pad_token": "!"})):
        CLIPTokenizer.from_pretrained(made, model_max_length=77, **pad).save_pretrained(root / "sd3" / name)
    t5_vocab.write(root / "sd3" / "tokenizer_3")
    clip_vocab.write(root / "flux" / "tokenizer", clip_vocab.trained(186))
    t5_vocab.write(root / "flux" / "tokenizer_2")
    return root


def test_flux_in_files_of_its_parts(words, cache, tmp_path):
    parts = nets("dev")
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        tokenizer=CLIPTokenizer.from_pretrained(words / "flux" / "tokenizer", model_max_length=77),
        tokenizer_2=T5Tokenizer.from_pretrained(words / "flux" / "tokenizer_2"),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    want = oracle(pipe, num_inference_steps=4, guidance_scale=3.5)
    args = (PROMPT, "--tokenizer", str(words / "flux"), "--steps", "4", "-m")
    beside = apart(tmp_path / "beside", "dev", parts)
    drawn, _ = command(cache, tmp_path / "a.png", *args, str(beside))
    assert psnr(drawn, want) > DB
    alone = beside.rename(tmp_path / "flux.safetensors")
    given = ("--vae", str(tmp_path / "beside" / "ae.safetensors"), "--t5")
    given += (str(tmp_path / "beside" / "t5xxl_fp16.safetensors"), "--clip")
    given += (str(tmp_path / "beside" / "text_encoders" / "clip_l.safetensors"),)
    drawn, _ = command(cache, tmp_path / "b.png", *args, str(alone), *given, process=True)
    assert psnr(drawn, want) > DB


def test_flux_in_gguf_files(words, cache, tmp_path):
    """Transformer and T5 of four bits. Reference: the pipeline with the numbers that their blocks hold; those that they
    were made of draw another picture."""
    parts = blocky()
    for p in parts["transformer"].parameters():  # one large weight in a block leaves few steps for the others
        if p.ndim > 1:
            p.data *= 3
            p.data[:, ::32] *= 4
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        tokenizer=CLIPTokenizer.from_pretrained(words / "flux" / "tokenizer", model_max_length=77),
        tokenizer_2=T5Tokenizer.from_pretrained(words / "flux" / "tokenizer_2"),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    same = {"num_inference_steps": 4, "guidance_scale": 3.5}
    plain = oracle(pipe, **same)
    apart(tmp_path, "dev", parts).unlink()
    states = {"net": transformer_state("dev", parts["transformer"]), "t5xxl": t5_state(parts["text_encoder_2"])}
    for name, state in states.items():
        written(tmp_path / f"{name}.gguf", state, kinds=packed(state, "Q4_0"))
    for old in tmp_path.glob("t5xxl_*"):
        old.unlink()
    for module in (parts["transformer"], parts["text_encoder_2"]):
        state = {n: x.numpy() for n, x in module.state_dict().items()}
        module.load_state_dict({n: torch.tensor(x) for n, x in unpacked(state, packed(state, "Q4_0")).items()})
    want = oracle(pipe, **same)
    args = (PROMPT, "--tokenizer", str(words / "flux"), "--steps", "4", "-m", str(tmp_path / "net.gguf"))
    drawn, _ = command(cache, tmp_path / "a.png", *args)
    assert psnr(drawn, want) > DB
    assert psnr(drawn, plain) < DB - 10


def test_sd3_in_one_file(words, tmp_path):
    """With a T5 narrower than both CLIPs together, which no SD3 has: the reference cuts them."""
    parts = nets("sd3.5")
    toks = [CLIPTokenizer.from_pretrained(words / "sd3" / name) for name in ("tokenizer", "tokenizer_2")]
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=toks[0],
        tokenizer_2=toks[1],
        tokenizer_3=T5Tokenizer.from_pretrained(words / "sd3" / "tokenizer_3"),
        **parts,
    )
    pipe.set_progress_bar_config(disable=True)
    size = {"width": 24, "height": 16}
    want = oracle(pipe, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=5.0, **size)
    file = single(tmp_path / "sd3.safetensors", "sd3.5", parts)
    pipe = opened(file, tokenizer=words / "sd3")
    drawn = pipe(PROMPT, negative=NEGATIVE, seed=SEED, steps=4, guidance=5.0, **size).image
    assert psnr(np.asarray(drawn), want) > DB
