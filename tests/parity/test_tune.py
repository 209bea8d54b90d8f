"""Training a LoRA against torch: diffusers' networks, peft's layers, AdamW; the same pictures, first values, noise and
times. Gradients of one step and weights after three: 1e-4 of each, since both sides compute in float32."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from mlx.utils import tree_flatten
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from mlxdiff.families import FAMILIES
from mlxdiff.train import batches, inversion, tune

from . import tiny
from .oracle import nchw
from .test_flux2_pipelines import made as klein
from .test_pipelines import DB, NEGATIVE, PROMPT, SEED, SIZE, oracle, psnr

pytestmark = pytest.mark.usefixtures("cache")
RANK, ALPHA, NEAR = 3, 6.0, 1e-4
RATE = 1e-3  # AdamW moves a weight by about this much, however small its gradient is, which may then be rounding alone
DIFFUSION = {"sd1": tiny.sd1, "sd2": tiny.sd2, "sdxl": tiny.sdxl}
FLOW = {
    "sd3.5": lambda folder: tiny.sd3(folder, "3.5"),
    "flux": tiny.flux,
    "klein": klein,
    "zimage": lambda folder: tiny.zimage(folder, "base"),
}
TOKENS = 64  # of a text for FLUX.2, in place of 512: sooner
# conv_out has 4 channels: there, a rank of 6 is too high. SDXL's proj_in is linear in diffusers too.
CONVS = ("conv1", "conv2", "conv", "conv_in", "conv_out", "conv_shortcut", "proj_in")
MORE = {f"{name} with text": {"text_encoder": True} for name in ("sd1", "sdxl")}
MORE |= {"sd1 in all layers": {"layers": ("all",), "rank": 6}, "sdxl with convolutions": {"layers": CONVS}}
MORE |= {"zimage in all layers": {"layers": ("all",)}}  # two of them have other names in diffusers


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> (diffusers pipeline, our pipeline)"""
    with pytest.MonkeyPatch.context() as patch:
        family = FAMILIES["flux2"]
        patch.setitem(FAMILIES, "flux2", replace(family, text=replace(family.text, qwen_tokens=TOKENS)))
        yield tiny.saved(tmp_path_factory.mktemp("tune"), DIFFUSION | FLOW)


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
    for made in run.made.values():
        for layer in made.values():
            layer.up = mx.array(g.normal(size=layer.up.shape).astype(np.float32) * 0.1)
    return run


def with_peft(theirs, run: tune.LoraRun) -> dict[tuple[str, str], torch.nn.Parameter]:
    """Their networks with the same changes; the parameters under our layers' names and leaves."""
    parameters = {}
    for component, made in run.made.items():
        net = getattr(theirs, component)
        prefix = "text_model." if hasattr(net, "text_model") else ""
        targets = [f"{prefix}{path}" for path in made]
        ranks = {f"{prefix}{path}": layer.down.shape[0] for path, layer in made.items()}
        alphas = {path: rank * ALPHA / run.tuning.rank for path, rank in ranks.items()}
        how = {"target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas}
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, **how), net)
        found = {}
        for name, parameter in net.named_parameters():
            if ".lora_" in name:
                path, _, kind = name.removesuffix(".default.weight").rpartition(".lora_")
                path, leaf = path.removeprefix("text_model."), "down" if kind == "A" else "up"
                parameter.data = torch.tensor(theirs_of(made[path][leaf]).reshape(parameter.shape))
                found[f"{component}.{path}", leaf] = parameter
        assert len(found) == 2 * len(made)
        parameters |= found
    return parameters


def theirs_of(value: mx.array) -> np.ndarray:
    """A trained value, or its gradient, in the order of their axes."""
    return np.ascontiguousarray(nchw(value)) if value.ndim == 4 else np.array(value)


def ours_by_name(run: tune.LoraRun, tree: dict) -> dict[tuple[str, str], np.ndarray]:
    """Values of our trainable parameters, or their gradients, under the same names."""
    names = {id(m): f"{component}.{path}" for component, made in run.made.items() for path, m in made.items()}
    at = {path: names[id(m)] for path, m in run.trained.named_modules() if id(m) in names}
    flat = tree_flatten(tree)
    return {(at[path.rpartition(".")[0]], path.rpartition(".")[2]): theirs_of(value) for path, value in flat}


def without_peft(theirs, run: tune.LoraRun) -> None:
    for component in run.made:
        net = getattr(theirs, component)
        for name, module in list(net.named_modules()):
            if hasattr(module, "base_layer"):
                net.set_submodule(name, module.base_layer)


def their_loss(theirs, run: tune.LoraRun, part: batches.Part) -> torch.Tensor:
    """What diffusers' training scripts minimise. x0 and the noise follow from what we mix, which is checked too."""
    x, target, t = torch.tensor(nchw(part.x)), torch.tensor(nchw(part.target)), torch.tensor(np.array(part.t))
    args = {k: torch.tensor(np.array(v)) if isinstance(v, mx.array) else v for k, v in part.args.items()}
    if hasattr(theirs, "transformer"):
        # x = x0 + sigma (noise - x0), and the target is noise - x0: both ends must be as large as what was encoded.
        return torch.nn.functional.mse_loss(velocity(theirs, x, t, args), target)
    t = t.int()
    scheduler = DDPMScheduler.from_config(theirs.scheduler.config)
    a = scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    if scheduler.config.prediction_type == "epsilon":
        noise, x0 = target, (x - (1 - a) ** 0.5 * target) / a**0.5
    else:
        noise, x0 = (1 - a) ** 0.5 * x + a**0.5 * target, a**0.5 * x - (1 - a) ** 0.5 * target
        torch.testing.assert_close(scheduler.get_velocity(x0, noise, t), target, atol=1e-4, rtol=0)
    torch.testing.assert_close(scheduler.add_noise(x0, noise, t), x, atol=1e-4, rtol=0)
    if "caption" in args:
        args |= read(theirs, [run.captions.texts[i] for i in args["caption"]])
    added = {"text_embeds": args["pooled"], "time_ids": args["time_ids"]} if "pooled" in args else None
    out = theirs.unet(x, t, args["context"], added_cond_kwargs=added).sample
    return torch.nn.functional.mse_loss(out, target)


def read(theirs, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Their encoders' text, with gradients."""
    context, _, *pooled = theirs.encode_prompt(prompts, device="cpu", num_images_per_prompt=1,
                                               do_classifier_free_guidance=False)  # fmt: skip
    return {"context": context} | ({"pooled": pooled[0]} if pooled else {})


def velocity(theirs, x: torch.Tensor, t: torch.Tensor, args: dict) -> torch.Tensor:
    """What their network predicts of x (B, c, h, w) at sigma t, called as diffusers' pipelines call it."""
    (B, c, h, w), context, kind = x.shape, args["context"], type(theirs).__name__
    net, n = theirs.transformer, context.shape[1]
    if kind == "StableDiffusion3Pipeline":
        return net(x, context, args["pooled"], 1000 * t).sample
    if kind == "ZImagePipeline":
        texts = [text[:n] for text, n in zip(context, args["lengths"], strict=True)]
        return -torch.stack(net([*x.unsqueeze(2)], 1 - t, texts, return_dict=False)[0]).squeeze(2)
    if kind == "FluxPipeline":
        out = net(
            theirs._pack_latents(x, B, c, h, w), context, args["pooled"], t, guidance=torch.ones(B),
            img_ids=theirs._prepare_latent_image_ids(B, h // 2, w // 2, "cpu", x.dtype), txt_ids=torch.zeros(n, 3),
        ).sample  # fmt: skip
        return theirs._unpack_latents(out, h * theirs.vae_scale_factor, w * theirs.vae_scale_factor,
                                      theirs.vae_scale_factor)  # fmt: skip
    ids = {"img_ids": theirs._prepare_latent_ids(x), "txt_ids": theirs._prepare_text_ids(context)}
    out = net(theirs._pack_latents(x), context, t, guidance=None, **ids).sample
    return out.transpose(1, 2).reshape(B, c, h, w)


def close(ours, theirs: torch.Tensor | None, near: float = NEAR) -> None:
    """The error's length is at most `near` of the whole's. What nothing reads, such as the queries of a last block's
    text, has no gradient on either side."""
    ours, theirs = np.array(ours), np.zeros(ours.shape) if theirs is None else theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) <= near * np.linalg.norm(theirs)


@pytest.mark.parametrize("name", [*DIFFUSION, *FLOW, *MORE])
def test_gradients_and_three_steps_are_those_of_peft(models, photos, name, tmp_path):
    theirs, ours = models[name.partition(" ")[0]]
    run = started(ours, photos, tmp_path / "run", **MORE.get(name, {}))
    (data,) = run.encoded()
    aim, parts = batches.Objective(ours.description), []
    for step in range(3):
        parts.append(aim.part(data, np.random.default_rng([0, 11, step]), 2))
    loss = batches.loss if run.captions is None else run.captions.loss
    try:
        parameters = with_peft(theirs, run)
        chosen = torch.optim.AdamW(parameters.values(), RATE, betas=(0.9, 0.99), weight_decay=1e-2)
        for step, part in enumerate(parts):
            with torch.enable_grad():
                want = their_loss(theirs, run, part)
            chosen.zero_grad()
            want.backward()
            if step == 0:
                value, grads = nn.value_and_grad(run.trained, loss)(run.trained, [part])
                assert abs(value.item() - want.item()) < NEAR * want.item()
                grads = ours_by_name(run, grads)
                assert grads.keys() == parameters.keys()
                for key, parameter in parameters.items():
                    close(grads[key].reshape(parameter.shape), parameter.grad)
                assert sum(np.array(g).any() for g in grads.values()) > 0.8 * len(grads)
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            chosen.step()
        assert [r.step for r in run.steps()] == [1, 2, 3]
        ours_now = ours_by_name(run, run.trained.trainable_parameters())
        # AdamW divides a gradient by its own size: where it is tiny, as in a text encoder, rounding grows with it. Of
        # SDXL with its encoders 3.8e-4 was seen on one kind of processor, and below 1e-4 on others.
        near = 1e-3 if name == "sdxl with text" else NEAR
        for key, parameter in parameters.items():
            close(ours_now[key].reshape(parameter.shape), parameter, near)
    finally:
        without_peft(theirs, run)


@pytest.mark.parametrize("name", [*DIFFUSION, *FLOW])
def test_what_is_encoded_is_what_diffusers_encodes(models, photos, name, tmp_path):
    """Latents and their spread, and the text; the caption of a file is one line."""
    theirs, ours = models[name]
    run = started(ours, photos, tmp_path / "run")
    (data,) = run.encoded()
    for i, caption in enumerate(("a blue boat", "a red fox in the snow")):
        pixels = np.asarray(Image.open(photos / f"{i}.png")).astype(np.float32) / 127.5 - 1
        found = theirs.vae.encode(torch.tensor(pixels.transpose(2, 0, 1))[None]).latent_dist
        mean, spread = latents(theirs, found.mean, found.std)
        close(nchw(data.means[i]), mean)
        close(nchw(data.spreads[i]), spread)
        args = data.args[i]
        if name in DIFFUSION:
            want = read(theirs, [caption])
            close(args["context"], want["context"])
            if "pooled" in want:
                close(args["pooled"], want["pooled"])
                assert np.array(args["time_ids"]).tolist() == [[32, 32, 0, 0, 32, 32]]
        elif name == "zimage":
            close(args["context"][0], theirs.encode_prompt(caption, "cpu", do_classifier_free_guidance=False)[0][0])
        elif name == "klein":
            close(args["context"], theirs.encode_prompt(caption, "cpu", max_sequence_length=TOKENS)[0])
        else:
            long = {"max_sequence_length": 512 if name == "flux" else 256}
            found = theirs.encode_prompt(caption, caption, *[caption] * (name == "sd3.5"), device="cpu", **long)
            close(args["context"], found[0])
            close(args["pooled"], found[1 if name == "flux" else 2])


def latents(theirs, mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """At the model's scale."""
    if type(theirs).__name__ == "Flux2KleinPipeline":
        bn, eps = theirs.vae.bn, theirs.vae.config.batch_norm_eps
        spread = torch.sqrt(bn.running_var + eps).reshape(1, -1, 1, 1)
        mean, std = theirs._patchify_latents(mean), theirs._patchify_latents(std)
        return (mean - bn.running_mean.reshape(1, -1, 1, 1)) / spread, std / spread
    config = theirs.vae.config
    return (mean - (config.shift_factor or 0)) * config.scaling_factor, std * config.scaling_factor


def test_flow_is_trained_at_the_levels_that_published_trainers_draw(models):
    """The closed form of the median: that of the normal, 0.5, shifted; and of SD3, diffusers' own draw."""
    u = np.linspace(0, 1, 2001)[1:-1]
    aim = batches.Objective(models["flux"][1].description)
    mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (1024 - 256)  # of 64 x 64 latents
    assert abs(np.median(aim.sigmas(u, 64 * 64)) - np.exp(mu) / (np.exp(mu) + 1)) < 1e-3
    assert np.median(aim.sigmas(u, 128 * 128)) > np.median(aim.sigmas(u, 64 * 64)) + 0.05
    sd3 = batches.Objective(models["sd3.5"][1].description).sigmas(u, 64 * 64)
    drawn = torch.sigmoid(torch.randn(200_000, generator=torch.Generator().manual_seed(0))).numpy()
    want = np.quantile(3 * drawn / (1 + 2 * drawn), [0.1, 0.5, 0.9])
    np.testing.assert_allclose(np.quantile(sd3, [0.1, 0.5, 0.9]), want, atol=0.01)  # 200000 draws


def their_picture(theirs, name: str) -> np.ndarray:
    if name in ("flux", "klein"):
        long = {"max_sequence_length": 512 if name == "flux" else TOKENS}
        scale = {"guidance_scale": 3.5 if name == "flux" else 4.0}
        kind = {"prompt": PROMPT, "num_inference_steps": 4, "generator": torch.Generator("cpu").manual_seed(SEED)}
        return np.asarray(theirs(**kind, **long, **scale, **SIZE).images[0])
    scale = 4.0 if name == "zimage" else 5.0  # Z-Image writes it one lower
    return oracle(theirs, num_inference_steps=4, guidance_scale=scale, negative_prompt=NEGATIVE)


@pytest.mark.parametrize("name", [*DIFFUSION, *FLOW, *MORE])
def test_diffusers_draws_with_the_file_as_we_do(models, photos, name, tmp_path):
    """At another scale than 1, and with an alpha that is not the rank. What is drawn while training is the same."""
    more = MORE.get(name, {})
    name, text = name.partition(" ")[0], "text_encoder" in more
    theirs, ours = models[name]
    run = started(ours, photos, tmp_path / "ring", trigger="moss", **more)
    for component, made in run.made.items():
        for layer in made.values():
            # With text, that of the encoders alone is left: else the test would not listen to it.
            size = 1 if "layers" in more else 4 if name in DIFFUSION else 8
            layer.up = (0 if text and component == "unet" else size) * layer.up
    run.export()
    bare = their_picture(theirs, name)
    theirs.load_lora_weights(run.out, adapter_name="ring")
    try:
        theirs.set_adapters(["ring"], [0.7])
        want = their_picture(theirs, name)
    finally:
        theirs.unload_lora_weights()
    assert psnr(want, bare) < 30  # else the comparison proves nothing
    same = {"steps": 4, "seed": SEED} | SIZE
    same |= {"guidance": 4.0} if name == "klein" else {} if name == "flux" else {"guidance": 5.0, "negative": NEGATIVE}
    assert psnr(np.asarray(ours(PROMPT, loras=[f"{run.out}:0.7"], **same).image), want) > DB
    with safe_open(run.file, "np") as f:
        notes = f.metadata()
    assert (notes["modelspec.trigger_phrase"], notes["ss_network_dim"]) == ("moss", str(run.tuning.rank))
    if name == "zimage" or more:  # whose text is read by what is trained
        (shown,) = tune.samples(ours, run.tuning, run.networks, [PROMPT], 1, run.out, steps=2)
        held = ours(PROMPT, seed=0, loras=[f"{run.out}"], steps=2, width=32, height=32).image
        assert psnr(np.asarray(Image.open(shown)), np.asarray(held)) > DB


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
    part = batches.Objective(ours.description).part(run.encoded()[0], np.random.default_rng(4), 2)
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
        prompts = [run.captions.texts[i] for i in part.args["caption"].tolist()]
        assert len(prompts) == 2

        with torch.enable_grad():
            args = read(theirs, prompts)
            x, target, t = (torch.tensor(a) for a in (nchw(part.x), nchw(part.target), np.array(part.t)))
            sizes = torch.tensor(np.array(part.args["time_ids"])) if "pooled" in args else None
            added = {"text_embeds": args["pooled"], "time_ids": sizes} if "pooled" in args else None
            out = theirs.unet(x, t, args["context"], added_cond_kwargs=added).sample
            total = torch.nn.functional.mse_loss(out, target)
            total.backward()

        value, grads = nn.value_and_grad(run.reader, run.captions.loss)(run.reader, [part])
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
