"""How the shipped storybook weights were made: torch on CPU cores, two single-threaded processes that share weights.
Everything is seeded; run the commands in this order, each from the repository root:

    python -m tests.recipes.storybook_torch render RUN        14 shards of 2048 pictures, and what is in them
    python -m tests.recipes.storybook_torch encode RUN        latents and tokens
    python -m tests.recipes.storybook_torch unet RUN --start FOLDER --minutes 105
    python -m tests.recipes.storybook_torch judge RUN --steps 800
    python -m tests.recipes.storybook_torch export RUN FOLDER
    python -m tests.recipes.storybook_torch measure RUN FOLDER

and for a decoder that mends what the network does badly, before and after vae_torch.py trains it:

    python -m tests.recipes.storybook_torch redraw RUN --shards 2 --count 384
    python -m tests.recipes.storybook_torch decoder RUN FOLDER      vae256/ into a model's folder

The autoencoder is vae256/, made by vae_torch.py. The network did not start from nothing but from the model of 128
pixels that was shipped before (`mlxdiff/builtin/storybook` at commit 6633e85; the recipe of that commit made it): its
levels, its text encoder and its words are kept, and one level is put around it. Without --start it starts from the
model that is shipped now, and trains that one on. `unet` saves every four minutes and goes on from there when it is
started again."""

import argparse
import copy
import json
import multiprocessing
import os
import time
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from mlxdiff.train import judge
from mlxdiff.train import storybook as sb
from mlxdiff.train.measure import steepness
from tests.recipes import cpu

SHARD, CAPTIONS, POSITIONS, RANKS = 2048, 8, 40, 2
SIZE, GRID, LATENTS = 256, 32, 8
WORDS = tuple(judge.WORDS.values())
SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction",
}  # fmt: skip
SCALE = 0.18215
BATCH, AVERAGE_EVERY = 32, 8
VAE, START = Path(__file__).parent / "vae256", Path("mlxdiff/builtin/storybook")

# --- networks


def the_vae() -> AutoencoderKL:
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(VAE))  # `from_pretrained` would note this path in exports
    vae.load_state_dict(load_file(VAE / "diffusion_pytorch_model.safetensors"))
    return vae.float()


def new_unet() -> UNet2DConditionModel:
    """The first level is for detail alone: it reads no words and has no attention."""
    return UNet2DConditionModel(
        sample_size=GRID,
        in_channels=LATENTS,
        out_channels=LATENTS,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        block_out_channels=(64, 64, 96, 144),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=2,
        norm_num_groups=16,
    )


NEW = "conv_in.", "conv_out.", "conv_norm_out.", "down_blocks.0.", "up_blocks.3.", "up_blocks.2.upsamplers."


def inner(tensors: dict) -> dict:
    """The U-Net of 128 pixels as the inside of the new one: its first level becomes the second."""
    moved = {}
    for name, tensor in tensors.items():
        if name.startswith("down_blocks."):
            _, level, rest = name.split(".", 2)
            moved[f"down_blocks.{int(level) + 1}.{rest}"] = tensor
        elif not name.startswith(NEW):
            moved[name] = tensor
    return moved


def known_text(start: Path) -> CLIPTextModel:
    return CLIPTextModel.from_pretrained(start / "text_encoder", torch_dtype=torch.float32)


class Judge(nn.Module):
    """mlxdiff.train.judge.Judge in torch, for training. (B, 3, S, S) in [-1, 1] -> logits of each kind of word."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride, 1, bias=False) for a, b, stride in judge.SHAPES)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _ in judge.SHAPES)
        self.hidden, self.heads = nn.Linear(1536, 128), nn.Linear(128, sum(map(len, WORDS)))

    def features(self, x):
        x = F.avg_pool2d(x, x.shape[-1] // 64)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if conv.stride == (1, 1) else x
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x):
        x = F.dropout(self.features(x), 0.1, self.training)
        return self.heads(x).split([len(w) for w in WORDS], 1)


def picture_batch(pictures):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float in [-1, 1], channels last in memory."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def save(value, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)


# --- render


def render(args) -> None:
    """pictures_NNN.npy and scenes_NNN.json; unseen_* hold the held-out pairs, for the judge only."""
    args.run.mkdir(parents=True, exist_ok=True)
    plan = [(f"{k:03d}", 1_000_003 + k * SHARD, False) for k in range(args.shards)]
    jobs = [(args.run, *job) for job in [*plan, ("unseen", 5_000_000, True)]]
    with multiprocessing.Pool(RANKS) as pool:
        for name in pool.imap_unordered(_shard, jobs, 1):
            print(name, flush=True)


def _shard(job) -> str:
    run, name, seed, unseen = job
    scenes, pictures = [], np.empty((SHARD, SIZE, SIZE, 3), np.uint8)
    for j in range(SHARD):
        rng = np.random.default_rng(seed + j)
        scenes.append(sb.sample(rng, unseen))
        pictures[j] = sb.render(scenes[-1], rng, SIZE)
    np.save(run / f"pictures_{name}.npy", pictures)
    (run / f"scenes_{name}.json").write_text(json.dumps([astuple(s) for s in scenes]))
    return name


def shards(run: Path, pattern: str = "???") -> list[tuple[np.ndarray, list]]:
    files = sorted(run.glob(f"scenes_{pattern}.json"))
    return [(np.load(run / f"pictures_{f.stem[7:]}.npy", mmap_mode="r"), json.loads(f.read_text())) for f in files]


# --- latents and tokens


def encode(args) -> None:
    """latents_NNN.npz: the posteriors' means (SHARD, GRID, GRID, LATENTS) float16, and token ids of eight captions a
    picture."""
    tokenizer = CLIPTokenizer.from_pretrained(args.start / "tokenizer")
    every = sorted(p.stem[7:] for p in args.run.glob("scenes_???.json"))
    with multiprocessing.Pool(RANKS) as pool:
        for name in pool.imap_unordered(_encoded, [(args.run, name, tokenizer) for name in every], 1):
            print(name, flush=True)


def _encoded(job) -> str:
    run, name, tokenizer = job
    torch.set_num_threads(1)
    vae = the_vae().eval().to(torch.bfloat16 if cpu.BFLOAT16 else torch.float32, memory_format=torch.channels_last)
    pictures, mean = np.load(run / f"pictures_{name}.npy"), np.zeros((SHARD, GRID, GRID, LATENTS), np.float16)
    with torch.inference_mode():
        for i in range(0, SHARD, 16):
            posterior = vae.encode(picture_batch(pictures[i : i + 16]).to(vae.dtype)).latent_dist
            mean[i : i + 16] = posterior.mean.float().permute(0, 2, 3, 1).numpy()
    scenes, rng = json.loads((run / f"scenes_{name}.json").read_text()), np.random.default_rng(7_000_000 + int(name))
    captions = [sb.caption(sb.Scene(*scene), rng) for scene in scenes for _ in range(CAPTIONS)]
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=POSITIONS).input_ids
    np.savez(run / f"latents_{name}.npz", mean=mean, ids=np.array(ids, np.int16).reshape(SHARD, CAPTIONS, POSITIONS))
    return name


def whitening():
    """mean (8,), into (8, 8), back (8, 8): white = (z - mean) @ into, z = white @ back + mean. Of the covariance over
    the first shard; kept in a file, since a network has learned which way its axes point."""
    stored = np.load(VAE / "whitening.npz")
    return tuple(torch.from_numpy(stored[name]) for name in ("mean", "into", "back"))


# --- U-Net and text encoder


def train_unet(args, rank: int) -> None:
    """v-prediction, timesteps stratified over the batch and leaning to high noise, or to low noise (--lean)."""
    unet, text = new_unet().to(memory_format=torch.channels_last), known_text(args.start)
    known = load_file(args.start / "unet" / "diffusion_pytorch_model.safetensors")
    if "down_blocks.3.resnets.0.conv1.weight" not in known:
        known = inner(known)
    unset = unet.load_state_dict(known, strict=False)
    assert not unset.unexpected_keys
    assert all(name.startswith(NEW) for name in unset.missing_keys)
    text.requires_grad_(not args.words_known)
    alpha_bar = DDIMScheduler(**SCHEDULE).alphas_cumprod

    def loss(x0, ids, g):
        u = (torch.arange(BATCH) + torch.rand(1, generator=g)) / BATCH
        t = (u**args.lean * 1000).long().clamp(0, 999)[torch.randperm(BATCH, generator=g)]
        a = alpha_bar[t].view(-1, 1, 1, 1)
        noise = torch.randn(BATCH, GRID, GRID, LATENTS, generator=g).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            v = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, text(ids).last_hidden_state).sample
        return F.mse_loss(v.float(), a.sqrt() * noise - (1 - a).sqrt() * x0)

    learn(args, rank, {"unet": unet, "text": text}, loss)


def learn(args, rank: int, nets: dict[str, nn.Module], loss) -> None:
    """Lower loss(x0, ids, generator) of whitened latents and captions. Each process trains by itself and every eight
    steps their weights are averaged: neither waits often for the other. One caption in ten is empty; EMA 0.995. The
    rate is constant, then falls to nothing from `--decay` of the time on. All is kept in a file of the first net's
    name."""
    run, file = args.run, args.run / f"{next(iter(nets))}.pt"
    mean, into, _ = whitening()
    data = [{k: torch.from_numpy(v) for k, v in np.load(f).items()} for f in sorted(run.glob("latents_???.npz"))]
    end = int(data[0]["ids"].max())  # the last id; the one before it starts a caption
    means = {f"mean_{name}": copy.deepcopy(net).requires_grad_(False) for name, net in nets.items()}
    params, mean_params = ([p for net in some.values() for p in net.parameters()] for some in (nets, means))
    muon, adam = cpu.optimizers(nets.values(), args.rate, momentum=0.95, decay=0.01)
    state = {**nets, **means, "muon": muon, "adam": adam}
    step = resumed = 0
    if file.exists():
        stored = torch.load(file)
        step = resumed = stored.pop("step")
        for name, part in stored.items():
            state[name].load_state_dict(part)
    g = torch.Generator().manual_seed(1000 * step + rank + 1)
    start = saved = time.time()
    progress = total = 0.0
    while True:
        if step % AVERAGE_EVERY == 0:
            progress = cpu.agree((time.time() - start) / (60 * args.minutes))
        if progress >= 1:
            break
        fall = min(1, (1 - progress) / max(1 - args.decay, 1e-3))
        lr = args.rate * min(1, (step + 1) / 80, (step - resumed + 1) / 20) * fall
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = lr, 0.15 * lr
        shard = data[torch.randint(len(data), (1,), generator=g).item()]
        i = torch.randint(SHARD, (BATCH,), generator=g)
        x0 = ((shard["mean"][i].float() - mean) @ into).permute(0, 3, 1, 2)
        ids = shard["ids"][i, torch.randint(CAPTIONS, (BATCH,), generator=g)].long()
        scribble(ids, end, g)
        ids[torch.rand(BATCH, generator=g) < 0.1] = torch.tensor([end - 1] + [end] * (POSITIONS - 1))
        error = loss(x0, ids, g)
        for net in nets.values():
            net.zero_grad(set_to_none=True)
        error.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        muon.step()
        adam.step()
        step, total = step + 1, total + error.item()
        if step % AVERAGE_EVERY == 0:
            cpu.average_weights(params)
        if rank == 0:
            torch._foreach_lerp_(mean_params, params, 1 - min(0.995, (step + 1) / (step + 12)))
            if step % 50 == 0:
                print(f"{step:6d}  loss {total / 50:.4f}  lr {lr:.5f}  {time.time() - start:.0f} s", flush=True)
                total = 0.0
            if time.time() - saved > 240:
                saved = time.time()
                save({name: part.state_dict() for name, part in state.items()} | {"step": step}, file)
    if rank == 0:
        save({name: part.state_dict() for name, part in state.items()} | {"step": step}, file)


def scribble(ids, end: int, g) -> None:
    """One to three random tokens into three captions of a hundred: pieces of unknown words come to mean nothing."""
    for row in (torch.rand(len(ids), generator=g) < 0.03).nonzero().flatten().tolist():
        k, n = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((1, 8), (1, 4)))
        if ids[row, k] != end:
            noise = torch.randint(end - 1, (n,), generator=g)
            ids[row] = torch.cat([ids[row, :k], noise, ids[row, k:-n]])
            ids[row, -1] = end


# --- pictures drawn again, for the decoder


@torch.no_grad()
def redraw(args) -> None:
    """again_NNN.npz: white latents of the first `--count` pictures of each shard, noised to about a third and drawn to
    the end as a picture is drawn. They have the network's own faults, and the picture they stand for is known."""
    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(args.start, torch_dtype=torch.float32)
    unet, text = pipeline.unet, pipeline.text_encoder
    scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    mean, into, _ = whitening()
    empty = torch.tensor(pipeline.tokenizer("", padding="max_length", max_length=POSITIONS).input_ids)
    for file in sorted(args.run.glob("latents_???.npz"))[: args.shards]:
        g, data, again = torch.Generator().manual_seed(int(file.stem[8:])), np.load(file), []
        for i in range(0, args.count, 32):
            x0 = torch.from_numpy(data["mean"][i : i + 32]).float()
            x0 = ((x0 - mean) @ into).permute(0, 3, 1, 2)
            ids = torch.from_numpy(data["ids"][i : i + 32, 0]).long()
            words = text(torch.cat([empty.expand(len(ids), -1), ids])).last_hidden_state
            scheduler.set_timesteps(15)
            first = 7 + i // 32 % 3  # sigma 1.3, 0.8, 0.5
            scheduler.set_begin_index(first)
            noise = torch.randn(len(x0), GRID, GRID, LATENTS, generator=g).permute(0, 3, 1, 2)
            x = scheduler.add_noise(x0, noise, scheduler.timesteps[first : first + 1].expand(len(x0)))
            for t in scheduler.timesteps[first:]:
                with torch.autocast("cpu", torch.bfloat16, enabled=cpu.BFLOAT16):
                    bare, led = unet(torch.cat([x, x]), t, words).sample.float().chunk(2)
                x = scheduler.step(bare + args.guidance * (led - bare), t, x).prev_sample
            again.append(x.permute(0, 2, 3, 1).numpy().astype(np.float16))
            print(file.stem, i, f"{((x - x0) ** 2).mean().sqrt():.3f}", flush=True)
        np.savez(args.run / f"again_{file.stem[8:]}.npz", latents=np.concatenate(again))


# --- judge


def train_judge(args) -> None:
    """On renders of all pairs, half of them blurred, noisy at random. Written with its norms folded in."""
    torch.manual_seed(0)
    rng, net = np.random.default_rng(0), Judge().to(memory_format=torch.channels_last)
    every = shards(args.run) + shards(args.run, "unseen")
    data = [(pictures, torch.tensor([labels(s) for s in scenes])) for pictures, scenes in every]
    shares = np.array([1.0] * (len(data) - 1) + [2.5])
    adam = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    for step in range(args.steps):
        adam.param_groups[0]["lr"] = 2.5e-3 * min(1, step / 100) * (1 - step / args.steps) + 1e-5
        pictures, answers = data[rng.choice(len(data), p=shares / shares.sum())]
        picks = np.sort(rng.choice(SHARD, 64, replace=False))
        x = picture_batch(pictures[picks])
        if step % 3:
            blur = (1, 4, 2)[step % 3]
            x = F.interpolate(F.avg_pool2d(x, blur), scale_factor=blur, mode="bilinear")
        x = x + torch.randn_like(x) * 0.08 * rng.random()
        loss = sum(F.cross_entropy(guess, answers[picks, k]) for k, guess in enumerate(net(x)))
        adam.zero_grad()
        loss.backward()
        adam.step()
    net.eval()
    tensors = {k: v.half() for k, v in net.state_dict().items() if "batches" not in k}
    for name, tensor in tensors.items():  # to the layout of mlxdiff.train.judge
        if tensor.dim() == 4:
            tensors[name] = tensor.permute(0, 2, 3, 1).contiguous()
    grid = tensors["hidden.weight"].view(-1, 96, 4, 4)  # torch flattens channels first
    tensors["hidden.weight"] = grid.permute(0, 2, 3, 1).flatten(1).contiguous()
    save_file(tensors, args.run / "judge.safetensors")


def labels(scene) -> list[int]:
    return [words.index(word) for words, word in zip(WORDS, scene, strict=True)]


# --- export and measure


def the_whitened_vae() -> AutoencoderKL:
    """With the whitening in the 1x1 convolutions beside the latents."""
    mean, into, back = whitening()
    vae = the_vae()
    with torch.no_grad():
        into_conv, out_conv = vae.quant_conv, vae.post_quant_conv
        into_conv.weight[:LATENTS] = torch.einsum("io,ijkl->ojkl", into, into_conv.weight[:LATENTS]) / SCALE
        into_conv.bias[:LATENTS] = (into_conv.bias[:LATENTS] - mean) @ into / SCALE
        into_conv.weight[LATENTS:] = 0  # the posterior's spread is not used after training
        into_conv.bias[LATENTS:] = -6.0
        matrix = out_conv.weight[:, :, 0, 0].clone()
        out_conv.bias += matrix @ mean
        out_conv.weight[:, :, 0, 0] = matrix @ back.T * SCALE
    vae.register_to_config(scaling_factor=SCALE)
    return vae


def decoder(args) -> None:
    """A new decoder into a model's folder, which otherwise stays as it is."""
    the_whitened_vae().half().save_pretrained(args.folder / "vae")


def export(args) -> None:
    """The public folder in float16."""
    stored = torch.load(args.run / "unet.pt")
    tokenizer = CLIPTokenizer.from_pretrained(args.start / "tokenizer")
    unet, text = new_unet(), known_text(args.start)
    unet.load_state_dict(stored["mean_unet"])
    text.load_state_dict(stored["mean_text"])
    pipeline = StableDiffusionPipeline(
        vae=the_whitened_vae(),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(args.folder)
    file = args.folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)  # newer transformers leave out the prefix that files have
    prefixed = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in tensors.items()}
    save_file(prefixed, file, {"format": "pt"})
    for file in (args.start / "tokenizer").iterdir():  # CLIP's own two files, whatever the library wrote
        (args.folder / "tokenizer" / file.name).write_bytes(file.read_bytes())


def shipped_sampling(folder: Path) -> StableDiffusionPipeline:
    """A model with the defaults of mlxdiff."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    return pipeline


@torch.no_grad()
def measure(args, pipeline: StableDiffusionPipeline, steps: int) -> None:
    """How the folder's model draws plain captions of random scenes: the share of their words that the judge finds, the
    crispness against renders of the same scenes, the Frechet distance of the judge's features (it falls with the
    number of pictures: compare equal numbers), and the VAE's error on the renders. sheet.png beside the run: samples
    under their renders."""
    pipeline.set_progress_bar_config(disable=True)
    referee, rng = judge.load(args.judge), np.random.default_rng(9)
    for name, seed, unseen, count in (
        ("trained pairs", 2026, False, args.count),
        ("held-out pairs", 2027, True, args.count // 2),
    ):
        chooser = np.random.default_rng(seed)
        scenes = [sb.sample(chooser, unseen) for _ in range(count)]
        renders = np.stack([sb.render(s, rng, SIZE) for s in scenes])
        samples, errors = [], []
        for k in range(0, count, 16):
            x = picture_batch(renders[k : k + 16])
            y = pipeline.vae.decode(pipeline.vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
            errors.append(((y - x) ** 2).mean((1, 2, 3)) / 4)
            some = scenes[k : k + 16]
            seeds = [torch.Generator().manual_seed(1000 + k + j) for j in range(len(some))]
            settings = {"guidance_scale": args.guidance, "generator": seeds, "output_type": "np"}
            settings |= {"height": SIZE, "width": SIZE}
            with torch.autocast("cpu", torch.bfloat16, enabled=cpu.BFLOAT16):
                samples.append(pipeline([sb.plain(s) for s in some], num_inference_steps=steps, **settings).images)
        samples = (np.concatenate(samples) * 255).round().astype(np.uint8)
        errors = -10 * torch.cat(errors).log10()
        print(f"{name}: VAE {errors.mean():.2f} dB, worst {errors.min():.2f}")
        for what, pictures in (("renders", renders), ("samples", samples)):
            shares = judge.adherence(referee, pictures, scenes)
            print(f"  {what}: " + " ".join(f"{kind} {100 * share:.1f}" for kind, share in shares.items()))
        crispness, distance = steepness(samples) / steepness(renders), judge.frechet(referee, samples, renders)
        print(f"  crispness {crispness:.3f}, Frechet distance {distance:.2f}", flush=True)
        rows = [np.concatenate(list(part)[:10], 1) for part in (renders, samples, renders[10:], samples[10:])]
        Image.fromarray(np.concatenate(rows)).save(args.run / f"sheet_{name.split()[0]}.png")


COMMANDS = {
    "render": render,
    "encode": encode,
    "unet": lambda args: cpu.run(train_unet, args, args.ranks),
    "redraw": redraw,
    "judge": train_judge,
    "export": export,
    "decoder": decoder,
    "measure": lambda args: measure(args, shipped_sampling(args.folder), 12),
}


def parser(doc: str, commands, minutes: float, rate: float = 0.01, guidance: float = 4.0) -> argparse.ArgumentParser:
    """The arguments that the recipes on these latents share."""
    shared = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared.add_argument("command", choices=commands)
    shared.add_argument("run", type=Path)
    shared.add_argument("--minutes", type=float, default=minutes)
    shared.add_argument("--start", type=Path, default=START, help="the folder of the model to start from")
    shared.add_argument("--rate", type=float, default=rate)
    shared.add_argument("--decay", type=float, default=0.5)
    shared.add_argument("--judge", type=Path, default=judge.shipped())
    shared.add_argument("--count", type=int, default=192)
    shared.add_argument("--guidance", type=float, default=guidance)
    return shared


def main() -> None:
    own = parser(__doc__, COMMANDS, minutes=105.0)
    own.add_argument("folder", type=Path, nargs="?")
    own.add_argument("--shards", type=int, default=14)
    own.add_argument("--words-known", action="store_true", help="the text encoder learns no more: a tenth faster")
    own.add_argument("--lean", type=float, default=0.85, help="below 1: more of high noise; above: of low noise")
    own.add_argument("--ranks", type=int, default=RANKS, help="processes")
    own.add_argument("--steps", type=int, default=800)
    args = own.parse_args()
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
