"""Training a LoRA against torch: diffusers' networks, peft's layers, AdamW; the same pictures, first values, noise and
times. Gradients of one step and weights after three: 1e-4 of the largest, since both sides compute in float32."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from mlx.utils import tree_flatten
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import mlxdiff
from mlxdiff.train import inversion, tune

from . import tiny
from .oracle import nchw
from .test_pipelines import DB, NEGATIVE, PROMPT, SEED, SIZE, oracle, psnr

pytestmark = pytest.mark.usefixtures("cache")
RANK, ALPHA, NEAR = 3, 6.0, 1e-4
RATE = 1e-3  # AdamW moves a weight by about this much, however small its gradient is, which may then be rounding alone
KINDS = {"sd1": tiny.sd1, "sd2": tiny.sd2, "sdxl": tiny.sdxl}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    """name -> (diffusers pipeline, our pipeline)"""
    root, made = tmp_path_factory.mktemp("tune"), {}
    for name, make in KINDS.items():
        theirs = make(root / f"{name}-words")
        theirs.set_progress_bar_config(disable=True)
        theirs.save_pretrained(root / name)
        made[name] = theirs, mlxdiff.load(root / name, dtype="float32")
    return made


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    place, g = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(g.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{i}.png")
    (place / "1.txt").write_text("a red fox\n in the snow")
    return place


def started(ours, photos, out, **settings) -> tune.LoraRun:
    """A run whose changes are not 0 at first: else the gradients of half of the weights would be."""
    given = {"prompt": "a blue boat", "size": 32, "rank": RANK, "alpha": ALPHA, "batch": 2, "rate": RATE, "steps": 3}
    run, g = tune.LoraRun(ours, tune.LoraTuning(str(photos), **(given | settings)), out), np.random.default_rng(1)
    for layer in run.made.values():
        layer.up = mx.array(g.normal(size=layer.up.shape).astype(np.float32) * 0.1)
    return run


def with_peft(theirs, run: tune.LoraRun) -> dict[str, torch.nn.Parameter]:
    """Their denoiser with the same changes; the parameters under our names."""
    net = theirs.unet
    net.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(run.pipe.description.family.trained)))
    found = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            path, _, kind = name.removesuffix(".default.weight").rpartition(".lora_")
            leaf = "down" if kind == "A" else "up"
            parameter.data = torch.tensor(np.array(run.made[path][leaf]))
            found[f"{path}.{leaf}"] = parameter
    assert len(found) == 2 * len(run.made)
    return found


def their_loss(theirs, part: tune.Part) -> torch.Tensor:
    """What diffusers' training scripts minimise. x0 and the noise follow from what we mix, which is checked too."""
    scheduler = DDPMScheduler.from_config(theirs.scheduler.config)
    x, target, t = (torch.tensor(a) for a in (nchw(part.x), nchw(part.target), np.array(part.t).astype(int)))
    a = scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    if scheduler.config.prediction_type == "epsilon":
        noise, x0 = target, (x - (1 - a) ** 0.5 * target) / a**0.5
    else:
        noise, x0 = (1 - a) ** 0.5 * x + a**0.5 * target, a**0.5 * x - (1 - a) ** 0.5 * target
        torch.testing.assert_close(scheduler.get_velocity(x0, noise, t), target, atol=1e-4, rtol=0)
    torch.testing.assert_close(scheduler.add_noise(x0, noise, t), x, atol=1e-4, rtol=0)
    args = {k: torch.tensor(np.array(v)) for k, v in part.args.items()}
    added = {"text_embeds": args["pooled"], "time_ids": args["time_ids"]} if "pooled" in args else None
    out = theirs.unet(x, t, args["context"], added_cond_kwargs=added).sample
    return torch.nn.functional.mse_loss(out, target)


def close(ours, theirs: torch.Tensor) -> None:
    ours, theirs = np.array(ours), theirs.detach().numpy()
    assert np.abs(theirs).max() > 0
    np.testing.assert_allclose(ours, theirs, atol=NEAR * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_and_three_steps_are_those_of_peft(models, photos, name, tmp_path):
    theirs, ours = models[name]
    run = started(ours, photos, tmp_path / "run")
    parameters = with_peft(theirs, run)
    (data,) = run.encoded()
    aim, parts = tune.Objective(ours.description), []
    for step in range(3):
        parts.append(aim.part(data, np.random.default_rng([0, 11, step]), 2))
    try:
        chosen = torch.optim.AdamW(parameters.values(), RATE, betas=(0.9, 0.99), weight_decay=1e-2)
        for step, part in enumerate(parts):
            want = their_loss(theirs, part)
            chosen.zero_grad()
            want.backward()
            if step == 0:
                value, grads = nn.value_and_grad(run.net, tune.loss)(run.net, [part])
                assert abs(value.item() - want.item()) < NEAR * want.item()
                grads = dict(tree_flatten(grads))
                assert grads.keys() == parameters.keys()
                for path, parameter in parameters.items():
                    close(grads[path], parameter.grad)
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            chosen.step()
        assert [r.step for r in run.steps()] == [1, 2, 3]
        for path, layer in run.made.items():
            close(layer.down, parameters[f"{path}.down"])
            close(layer.up, parameters[f"{path}.up"])
    finally:
        theirs.unet.delete_adapters("default")


@pytest.mark.parametrize("name", KINDS)
def test_what_is_encoded_is_what_diffusers_encodes(models, photos, name, tmp_path):
    """Latents and their spread, and the text; the caption of a file is one line."""
    theirs, ours = models[name]
    run = started(ours, photos, tmp_path / "run")
    (data,) = run.encoded()
    for i, caption in enumerate(("a blue boat", "a red fox in the snow")):
        pixels = np.asarray(Image.open(photos / f"{i}.png")).astype(np.float32) / 127.5 - 1
        found = theirs.vae.encode(torch.tensor(pixels.transpose(2, 0, 1))[None]).latent_dist
        scale = theirs.vae.config.scaling_factor
        close(data.means[i].transpose(2, 0, 1), found.mean[0] * scale)
        close(data.spreads[i].transpose(2, 0, 1), found.std[0] * scale)
        context, _, *pooled = theirs.encode_prompt(caption, device="cpu", num_images_per_prompt=1,
                                                   do_classifier_free_guidance=False)  # fmt: skip
        close(data.args[i]["context"], context)
        if pooled:
            close(data.args[i]["pooled"], pooled[0])
            assert np.array(data.args[i]["time_ids"]).tolist() == [[32, 32, 0, 0, 32, 32]]


@pytest.mark.parametrize("name", KINDS)
def test_diffusers_draws_with_the_file_as_we_do(models, photos, name, tmp_path):
    """At another scale than 1, and with an alpha that is not the rank."""
    theirs, ours = models[name]
    run = started(ours, photos, tmp_path / "ring", trigger="moss")
    for layer in run.made.values():
        layer.up = 4 * layer.up
    run.export()
    settings = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": NEGATIVE}
    bare = oracle(theirs, **settings)
    theirs.load_lora_weights(run.out, adapter_name="ring")
    try:
        theirs.set_adapters(["ring"], [0.7])
        want = oracle(theirs, **settings)
    finally:
        theirs.unload_lora_weights()
    assert psnr(want, bare) < 30  # else the comparison proves nothing
    same = {"steps": 4, "guidance": 5.0, "negative": NEGATIVE, "seed": SEED} | SIZE
    assert psnr(np.asarray(ours(PROMPT, loras=[f"{run.out}:0.7"], **same).image), want) > DB
    with safe_open(run.file, "np") as f:
        notes = f.metadata()
    assert (notes["modelspec.trigger_phrase"], notes["ss_network_dim"]) == ("moss", str(RANK))


# ---- a word


def word(ours, photos, out, **settings) -> inversion.WordRun:
    given = {"word": "<moss>", "initial": "fox snow", "size": 32, "batch": 2, "steps": 1, "vectors": 2}
    (photos / "1.txt").write_text("<moss> in the snow")
    try:
        return inversion.WordRun(ours, inversion.WordTuning(images=str(photos), **(given | settings)), out)
    finally:
        (photos / "1.txt").write_text("a red fox\n in the snow")


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_word_is_taught_as_in_diffusers(models, photos, name, tmp_path):
    """The gradients of its rows are torch's, and diffusers draws with the file as we do."""
    theirs, ours = models[name]
    run = word(ours, photos, tmp_path / "run")
    run.out.mkdir(exist_ok=True)
    run.export()
    part = tune.Objective(ours.description).part(run.encoded(), np.random.default_rng(4), 2)
    sides = [(theirs.tokenizer, theirs.text_encoder, "clip_l")]
    sides += [(theirs.tokenizer_2, theirs.text_encoder_2, "clip_g")] if name == "sdxl" else []
    state, tables = load_file(run.file), []
    before = oracle(theirs, num_inference_steps=4)
    for tok, encoder, key in sides:
        given = state if name == "sd1" else {"<moss>": state[key]}
        theirs.load_textual_inversion(given, token="<moss>", text_encoder=encoder, tokenizer=tok)
        tables.append(encoder.get_input_embeddings().weight)
        tables[-1].requires_grad_(True)
    try:
        prompts = [run.captions[i] for i in part.args["caption"].tolist()]
        assert len(prompts) == 2

        with torch.enable_grad():
            context, _, *pooled = theirs.encode_prompt(prompts, device="cpu", num_images_per_prompt=1,
                                          do_classifier_free_guidance=False)  # fmt: skip
            x, target, t = (torch.tensor(a) for a in (nchw(part.x), nchw(part.target), np.array(part.t)))
            sizes = torch.tensor(np.array(part.args["time_ids"])) if pooled else None
            added = {"text_embeds": pooled[0], "time_ids": sizes} if pooled else None
            out = theirs.unet(x, t, context, added_cond_kwargs=added).sample
            total = torch.nn.functional.mse_loss(out, target)
            total.backward()

        def loss(reader):
            return tune.loss(reader.net, [part._replace(args=run._read(reader, part.args, run_skip))])

        run_skip = ours.resolve("").clip_skip
        value, grads = nn.value_and_grad(run.reader, loss)(run.reader)
        assert abs(value.item() - total.item()) < NEAR * total.item()
        grads = dict(tree_flatten(grads))
        assert len(grads) == len(sides)
        for encoder, table in zip(run.encoders, tables, strict=True):
            close(grads[f"encoders.{encoder}.embeddings.token_embedding.rows"], table.grad[-2:])
        same = {"generator": torch.Generator("cpu").manual_seed(SEED), "num_inference_steps": 4, **SIZE}
        want = np.asarray(theirs("a <moss> fox", guidance_scale=5.0, **same).images[0])
    finally:
        for (tok, encoder, _), table in zip(sides, tables, strict=True):
            table.requires_grad_(False)
            theirs.unload_textual_inversion(text_encoder=encoder, tokenizer=tok)
    settings = {"steps": 4, "guidance": 5.0, "seed": SEED, "embeddings": [f"{run.out}=<moss>"]} | SIZE
    assert psnr(np.asarray(ours("a <moss> fox", **settings).image), want) > DB
    assert psnr(want, before) < DB - 10
