"""How the shipped storybook weights were made: torch on CPU cores, two single-threaded processes that share gradients
(VAE) or weights (U-Net). Everything is seeded; run the commands in this order, each from the repository root:

    python -m tests.recipes.storybook_torch render RUN        15 shards of 4096 pictures, and what is in them
    python -m tests.recipes.storybook_torch vae RUN --minutes 21
    python -m tests.recipes.storybook_torch encode RUN        latents and tokens, whitening
    python -m tests.recipes.storybook_torch unet RUN --minutes 105
    python -m tests.recipes.storybook_torch tune RUN --steps 2000
    python -m tests.recipes.storybook_torch judge RUN --steps 800
    python -m tests.recipes.storybook_torch export RUN FOLDER
    python -m tests.recipes.storybook_torch measure RUN FOLDER

`unet` saves every four minutes and goes on from there when it is started again.

The shipped run differed in three ways. It was steered by hand: weights were averaged (and not gradients) from step 765
on, and t leaned to high noise by u^0.75 (steps 608 to 870) and u^0.85 (after). Its pictures had the sun or moon on
either side of an object in the middle; the model then drew two, and from step 1077 those with it on the left were left
out. The world now draws none of those."""

import argparse
import copy
import json
import os
import time
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mlxdiff.train import bpe, judge
from mlxdiff.train import storybook as sb
from tests.recipes import cpu

SHARD, CAPTIONS, POSITIONS, RANKS = 4096, 8, 40, 2
WORDS = tuple(judge.WORDS.values())
SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction",
}  # fmt: skip
SCALE = 0.18215
AVERAGE_EVERY = 8
# Left and right were not learned at all in the first 39,000 samples: the pictures are as often one as the other, so
# nothing that tells the two sides apart pays by itself, and words for them can only act through it. Showing the left
# more often for a while broke this within 200 steps; then the shares were equal again.
LEANING, LEAN = range(608, 870), (0.62, 0.28, 0.10)

# --- networks


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
    )


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 96, 144),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=2,
        norm_num_groups=16,
    )


def new_text(vocab: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            hidden_act="quick_gelu",
            projection_dim=128,
            bos_token_id=vocab - 2,
            eos_token_id=vocab - 1,
            pad_token_id=vocab - 1,
        )
    )


class Judge(nn.Module):
    """mlxdiff.train.judge.Judge in torch, for training. (B, 3, 128, 128) in [-1, 1] -> logits of each kind of word."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride, 1, bias=False) for a, b, stride in judge.SHAPES)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _ in judge.SHAPES)
        self.hidden, self.heads = nn.Linear(1536, 128), nn.Linear(128, sum(map(len, WORDS)))

    def features(self, x):
        x = F.avg_pool2d(x, 2)
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
    for name, seed, unseen in [*plan, ("unseen", 5_000_000, True)]:
        scenes, pictures = [], np.empty((SHARD, 128, 128, 3), np.uint8)
        for j in range(SHARD):
            rng = np.random.default_rng(seed + j)
            scenes.append(sb.sample(rng, unseen))
            pictures[j] = sb.render(scenes[-1], rng, 128)
        np.save(args.run / f"pictures_{name}.npy", pictures)
        (args.run / f"scenes_{name}.json").write_text(json.dumps([astuple(s) for s in scenes]))
        print(name, flush=True)


def shards(run: Path, pattern: str = "???") -> list[tuple[np.ndarray, list]]:
    files = sorted(run.glob(f"scenes_{pattern}.json"))
    return [(np.load(run / f"pictures_{f.stem[7:]}.npy", mmap_mode="r"), json.loads(f.read_text())) for f in files]


# --- VAE


def pyramid_loss(y, x):
    """Squared error, L1 at four scales, L1 of differences at the two finest."""
    loss = 2 * F.mse_loss(y, x)
    for k in range(4):
        loss = loss + F.l1_loss(y, x) * (1 if k == 0 else 0.6)
        if k < 2:
            loss = loss + 0.7 * sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return loss


def train_vae(args, rank: int) -> None:
    """Crops of 64, whole pictures in the last quarter. The first 128 pictures are kept for validation."""
    rng, data = np.random.default_rng(rank), [pictures for pictures, _ in shards(args.run)]
    vae = new_vae().to(memory_format=torch.channels_last)
    mean_vae, params = copy.deepcopy(vae).requires_grad_(False), list(vae.parameters())
    muon, adam = cpu.optimizers([vae], 0.022, momentum=0.9, decay=0.0)
    start, step = time.time(), 0
    while (progress := cpu.agree((time.time() - start) / (60 * args.minutes))) < 1:
        lr = 0.022 * min(1, (step + 1) / 40) * (1 - progress)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = lr, lr / 20
        whole = progress > 0.75
        k = rng.integers(len(data))
        picks = rng.integers(128 if k == 0 else 0, SHARD, 2 if whole else 8)
        if whole:
            crops = data[k][np.sort(picks)]
        else:
            ys, xs = rng.integers(0, 9, 8) * 8, rng.integers(0, 9, 8) * 8
            crops = np.stack([data[k][i, y : y + 64, x : x + 64] for i, y, x in zip(picks, ys, xs, strict=True)])
        x = picture_batch(crops)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        loss = pyramid_loss(y.float(), x) + 1e-4 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        vae.zero_grad(set_to_none=True)
        loss.backward()
        cpu.average_gradients(params)
        nn.utils.clip_grad_norm_(params, 1.0)
        muon.step()
        adam.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(mean_vae.parameters()), params, 1 - min(0.995, (step + 1) / (step + 20)))
        if rank == 0 and step % 100 == 0:
            print(f"{step:6d}  loss {loss.item():.4f}  lr {lr:.5f}  {time.time() - start:.0f} s", flush=True)
            save(mean_vae.state_dict(), args.run / "vae.pt")
    if rank == 0:
        save(mean_vae.state_dict(), args.run / "vae.pt")


def tune_decoder(args) -> None:
    """The decoder alone, on whole pictures, whenever there is time: the latents stay what the U-Net learns from."""
    rng, data = np.random.default_rng(5), [pictures for pictures, _ in shards(args.run)]
    torch.manual_seed(5)
    cpu.patch()
    vae = new_vae().to(memory_format=torch.channels_last)
    vae.load_state_dict(torch.load(args.run / "vae.pt"))
    parts = vae.decoder, vae.post_quant_conv
    params = [p for part in parts for p in part.parameters()]
    mean_vae = copy.deepcopy(vae).requires_grad_(False)
    mean_params = [p for part in (mean_vae.decoder, mean_vae.post_quant_conv) for p in part.parameters()]
    muon, adam = cpu.optimizers(parts, 0.006, momentum=0.9, decay=0.0)
    for step in range(args.steps):
        lr = 0.006 * min(1, (step + 1) / 20) * (1 - step / args.steps)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = lr, lr / 20
        x = picture_batch(data[rng.integers(len(data))][np.sort(rng.integers(128, SHARD, 3))])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.sample()
            y = vae.decode(z).sample
        loss = pyramid_loss(y.float(), x) + 6 * F.mse_loss(y.float(), x)
        vae.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        muon.step()
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(mean_params, params, 1 - min(0.99, (step + 1) / (step + 20)))
    save(mean_vae.state_dict(), args.run / "vae.pt")


# --- latents and tokens


def encode(args) -> None:
    """latents_NNN.npz: posterior mean and deviation (SHARD, 16, 16, 4) float16, and token ids of eight captions a
    picture. The latents' four channels come out correlated, so their covariance is kept to whiten them."""
    run = args.run
    rng = np.random.default_rng(77)
    scenes = [[sb.Scene(*s) for s in names] for _, names in shards(run)]
    texts = [sb.caption(scene, rng) for shard in scenes[:3] for scene in shard for _ in range(4)]
    bpe.save(run / "tokenizer", bpe.learn([*texts, *[" ".join(sb.captions.STRAY)] * 20], 2000), POSITIONS)
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    vae = new_vae()
    vae.load_state_dict(torch.load(run / "vae.pt"))
    vae = vae.eval().bfloat16().to(memory_format=torch.channels_last)
    for k, (pictures, _) in enumerate(shards(run)):
        mean, deviation = (np.zeros((SHARD, 16, 16, 4), np.float16) for _ in range(2))
        with torch.inference_mode():
            for i in range(0, SHARD, 32):
                posterior = vae.encode(picture_batch(pictures[i : i + 32]).bfloat16()).latent_dist
                mean[i : i + 32] = posterior.mean.float().permute(0, 2, 3, 1).numpy()
                deviation[i : i + 32] = posterior.std.float().permute(0, 2, 3, 1).numpy()
        rng = np.random.default_rng(7_000_000 + k)
        captions = [sb.caption(scene, rng) for scene in scenes[k] for _ in range(CAPTIONS)]
        ids = tokenizer(captions, padding="max_length", truncation=True, max_length=POSITIONS).input_ids
        ids = np.array(ids, np.int16).reshape(SHARD, CAPTIONS, POSITIONS)
        np.savez(run / f"latents_{k:03d}.npz", mean=mean, deviation=deviation, ids=ids)
        if k == 0:
            z = mean.astype(np.float32).reshape(-1, 4)
            np.savez(run / "whitening.npz", mean=z.mean(0), covariance=np.cov(z[::3].T))


def whitening(run: Path):
    """mean (4,), into (4, 4), back (4, 4): white = (z - mean) @ into, z = white @ back + mean."""
    stored = np.load(run / "whitening.npz")
    values, vectors = np.linalg.eigh(stored["covariance"])
    tensors = stored["mean"], vectors / np.sqrt(values), np.sqrt(values)[:, None] * vectors.T
    return tuple(torch.from_numpy(t.astype(np.float32)) for t in tensors)


# --- U-Net and text encoder


def train_unet(args, rank: int) -> None:
    """Each process trains by itself and every eight steps their weights are averaged: neither waits often for the
    other. v-prediction, timesteps stratified over the batch and leaning to high noise, one caption in ten empty, EMA
    0.998. The rate is constant, then falls to nothing from `--decay` of the time on."""
    run, batch = args.run, 32
    mean, into, _ = whitening(run)
    data = [{k: torch.from_numpy(v) for k, v in np.load(f).items()} for f in sorted(run.glob("latents_???.npz"))]
    for shard, (_, names) in zip(data, shards(run), strict=True):
        shard["side"] = torch.tensor([sb.POSITIONS.index(name[-1]) for name in names])
    end = int(data[0]["ids"].max())  # the last id; the one before it starts a caption
    unet, text = new_unet().to(memory_format=torch.channels_last), new_text(end + 1)
    means = [copy.deepcopy(net).requires_grad_(False) for net in (unet, text)]
    params = [*unet.parameters(), *text.parameters()]
    mean_params = [p for net in means for p in net.parameters()]
    muon, adam = cpu.optimizers([unet, text], args.rate, momentum=0.95, decay=0.01)
    state = {"unet": unet, "text": text, "mean_unet": means[0], "mean_text": means[1], "muon": muon, "adam": adam}
    step = resumed = 0
    if (run / "unet.pt").exists():
        stored = torch.load(run / "unet.pt")
        step = resumed = stored.pop("step")
        for name, part in stored.items():
            state[name].load_state_dict(part)
    alpha_bar = DDIMScheduler(**SCHEDULE).alphas_cumprod
    g = torch.Generator().manual_seed(1000 * step + rank + 1)
    start = saved = time.time()
    progress = 0.0
    while True:
        if step % AVERAGE_EVERY == 0:
            progress = cpu.agree((time.time() - start) / (60 * args.minutes))
        if progress >= 1:
            break
        lr = args.rate * min(1, (step + 1) / 80, (step - resumed + 1) / 20) * min(1, (1 - progress) / (1 - args.decay))
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = lr, 0.15 * lr
        shard = data[torch.randint(len(data), (1,), generator=g).item()]
        i = choose(shard["side"], LEAN if step in LEANING else (1.0, 1.0, 1.0), batch, g)
        z = shard["mean"][i].float() + shard["deviation"][i].float() * torch.randn(batch, 16, 16, 4, generator=g)
        x0 = ((z - mean) @ into).permute(0, 3, 1, 2)
        ids = shard["ids"][i, torch.randint(CAPTIONS, (batch,), generator=g)].long()
        scribble(ids, end, g)
        ids[torch.rand(batch, generator=g) < 0.1] = torch.tensor([end - 1] + [end] * (POSITIONS - 1))
        u = (torch.arange(batch) + torch.rand(1, generator=g)) / batch
        t = (u**0.9 * 1000).long().clamp(0, 999)[torch.randperm(batch, generator=g)]
        a = alpha_bar[t].view(-1, 1, 1, 1)
        noise = torch.randn(batch, 16, 16, 4, generator=g).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            v = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, text(ids).last_hidden_state).sample
        loss = F.mse_loss(v.float(), a.sqrt() * noise - (1 - a).sqrt() * x0)
        for net in (unet, text):
            net.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        muon.step()
        adam.step()
        step += 1
        if step % AVERAGE_EVERY == 0:
            cpu.average_weights(params)
        if rank == 0:
            torch._foreach_lerp_(mean_params, params, 1 - min(0.998, (step + 1) / (step + 12)))
            if step % 50 == 0:
                print(f"{step:6d}  loss {loss.item():.4f}  lr {lr:.5f}  {time.time() - start:.0f} s", flush=True)
            if time.time() - saved > 240:
                saved = time.time()
                save({name: part.state_dict() for name, part in state.items()} | {"step": step}, run / "unet.pt")
    if rank == 0:
        save({name: part.state_dict() for name, part in state.items()} | {"step": step}, run / "unet.pt")


def choose(side, shares, n: int, g):
    """n indices whose scenes have their object left, in the centre and right in these shares."""
    kinds = torch.multinomial(torch.tensor(shares), n, replacement=True, generator=g)
    by_side = [(side == k).nonzero().flatten() for k in range(3)]
    return torch.stack([by_side[k][torch.randint(len(by_side[k]), (), generator=g)] for k in kinds])


def scribble(ids, end: int, g) -> None:
    """One to three random tokens into three captions of a hundred: pieces of unknown words come to mean nothing."""
    for row in (torch.rand(len(ids), generator=g) < 0.03).nonzero().flatten().tolist():
        k, n = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((1, 8), (1, 4)))
        if ids[row, k] != end:
            noise = torch.randint(end - 1, (n,), generator=g)
            ids[row] = torch.cat([ids[row, :k], noise, ids[row, k:-n]])
            ids[row, -1] = end


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


def export(args) -> None:
    """The public folder in float16. The whitening goes into the 1x1 convolutions beside the latents."""
    run = args.run
    mean, into, back = whitening(run)
    vae, stored = new_vae(), torch.load(run / "unet.pt")
    vae.load_state_dict(torch.load(run / "vae.pt"))
    with torch.no_grad():
        into_conv, out_conv = vae.quant_conv, vae.post_quant_conv
        into_conv.weight[:4] = torch.einsum("io,ijkl->ojkl", into, into_conv.weight[:4]) / SCALE
        into_conv.bias[:4] = (into_conv.bias[:4] - mean) @ into / SCALE
        into_conv.weight[4:] = 0  # the posterior's spread is not used after training
        into_conv.bias[4:] = -6.0
        matrix = out_conv.weight[:, :, 0, 0].clone()
        out_conv.bias += matrix @ mean
        out_conv.weight[:, :, 0, 0] = matrix @ back.T * SCALE
    vae.register_to_config(scaling_factor=SCALE)
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    unet, text = new_unet(), new_text(len(tokenizer))
    unet.load_state_dict(stored["mean_unet"])
    text.load_state_dict(stored["mean_text"])
    pipeline = StableDiffusionPipeline(
        vae=vae,
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
    for file in (run / "tokenizer").iterdir():  # CLIP's own two files, whatever the library wrote
        (args.folder / "tokenizer" / file.name).write_bytes(file.read_bytes())


@torch.no_grad()
def measure(args) -> None:
    """Share of the prompts' words that the judge finds, 192 plain captions, 25 DDIM steps; VAE error on new renders."""
    pipeline = StableDiffusionPipeline.from_pretrained(args.folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    referee, rng = judge.load(args.run / "judge.safetensors"), np.random.default_rng(9)
    for name, seed, unseen, count in (("trained pairs", 2026, False, 192), ("held-out pairs", 2027, True, 96)):
        chooser = np.random.default_rng(seed)
        scenes = [sb.sample(chooser, unseen) for _ in range(count)]
        renders = np.stack([sb.render(s, rng, 128) for s in scenes])
        x = picture_batch(renders)
        decoded = pipeline.vae.decode(pipeline.vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((decoded - x) ** 2).mean((1, 2, 3)) / 4
        samples = []
        for k in range(0, count, 16):
            seeds = [torch.Generator().manual_seed(1000 + k + j) for j in range(16)]
            prompts = [sb.plain(s) for s in scenes[k : k + 16]]
            settings = {"guidance_scale": args.guidance, "generator": seeds, "output_type": "np"}
            samples.append(pipeline(prompts, 128, 128, 25, **settings).images)
        decoded = ((decoded.permute(0, 2, 3, 1).numpy() + 1) * 127.5).round().astype(np.uint8)
        samples = (np.concatenate(samples) * 255).round().astype(np.uint8)
        print(f"{name}: VAE {(-10 * error.log10()).mean():.2f} dB")
        for what, pictures in (("renders", renders), ("VAE", decoded), ("samples", samples)):
            shares = judge.adherence(referee, pictures, scenes)
            print(f"  {what}: " + " ".join(f"{kind} {100 * share:.1f}" for kind, share in shares.items()))


PARALLEL = {"vae": train_vae, "unet": train_unet}
SINGLE = {
    "render": render,
    "encode": encode,
    "tune": tune_decoder,
    "judge": train_judge,
    "export": export,
    "measure": measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=(*PARALLEL, *SINGLE))
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--shards", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=21.0)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--decay", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--guidance", type=float, default=4.0)
    args = parser.parse_args()
    if args.command in PARALLEL:
        cpu.run(PARALLEL[args.command], args, RANKS)
    else:
        SINGLE[args.command](args)


if __name__ == "__main__":
    main()
