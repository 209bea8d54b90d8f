"""Autoencoders for storybook pictures of 256 pixels, trained and compared: torch on one CPU core.

    python -m tests.recipes.vae_torch render RUN --shards 4              pictures to learn from, and 32 to measure with
    python -m tests.recipes.vae_torch train RUN NAME --latents 16 --steps 2000
    python -m tests.recipes.vae_torch train RUN MORE --latents 16 --steps 8000 --start NAME --rate 0.01
    python -m tests.recipes.vae_torch table RUN                          the last line of each run's log
    python -m tests.recipes.vae_torch export RUN NAME FOLDER

vae256/ is the autoencoder of storybook: `--latents 8 --edges 0.3 --steps 8000` on five shards, 98.7 minutes of one core
(logs/vae256.csv). Its decoder was then trained on by itself, in four runs of which each started from the one before, 37
minutes of one core in all (logs/decoder.csv): every one with `--decoder --square 4`, on the first eight shards of
storybook_torch's pictures, linked here as pictures_256_NNN.npy;

    dec   --rate 0.008 --edges 0.5 --steep 0.3 --steps 6000, stopped at 1511
    dec2  --rate 0.008 --edges 0.5 --steep 0.3 --steps 2400, stopped at 1718
    dec3  --rate 0.006 --edges 0.5 --steep 0.3 --steps 1600 --again 0.5
    dec4  --rate 0.006 --edges 0.6 --steep 0.5 --steps 2000 --again 0.6 --seed 4

`--again` reads what storybook_torch's `redraw` wrote (again_NNN.npz of the same first shards, linked too): latents with
the faults of the network beside the pictures that they stand for. Of 32 new renders the whole keeps 34.5 dB on average
and 30.3 at worst, and 0.89 of their crispness (before: 34.4, 30.0 and 0.84).

`train` saves every ten minutes and continues from there when it is started again; a finished run returns at once. A
row of the log is written after five minutes of CPU time or more."""

import argparse
import copy
import csv
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from mlxdiff.train import storybook as sb
from mlxdiff.train.measure import steepness
from tests.recipes import cpu
from tests.recipes.storybook_torch import picture_batch, save, whitening

SHARD, SEED, KEPT, KEPT_SEED = 1024, 10_000_000, 32, 6_000_000
CROP, CROPS, WHOLE_FROM = 128, 4, 0.75  # four crops cost as much as a whole picture of 256
SAVE_EVERY, MEASURE_EVERY = 600, 5  # seconds of wall time, minutes of CPU time: measuring costs a third of a minute
COLUMNS = "step", "minutes", "loss", "rate", "dB", "worst", "crispness"


@dataclass(frozen=True)
class Settings:
    latents: int = 16  # channels of a latent
    channels: tuple[int, ...] = (16, 32, 64, 96)
    attention: bool = True  # in the middle of encoder and decoder
    size: int = 256  # of the pictures that are learned from
    steps: int = 2000
    rate: float = 0.022
    square: float = 0.0  # weight of the squared error beside the pyramid's
    edges: float = 0.0  # weight of the error near edges
    steep: float = 0.0  # weight of edges less or more steep than the picture's
    seed: int = 0  # of the choice of pictures
    start: str | None = None  # the run whose averaged weights this one starts from, or a folder of a finished one
    again: float = 0.0  # share of steps that decode what the network drew (storybook_torch's `redraw`), not the encoder
    decoder: bool = False  # train the decoder alone: the latents stay what a network has learned


def new_vae(s: Settings) -> AutoencoderKL:
    levels = len(s.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=s.channels,
        layers_per_block=1,
        latent_channels=s.latents,
        norm_num_groups=8,
        sample_size=256,
        scaling_factor=1.0,
        mid_block_add_attention=s.attention,
    ).to(memory_format=torch.channels_last)


# --- pictures


def drawn(seed: int, count: int, size: int) -> np.ndarray:
    """(count, size, size, 3) uint8."""
    pictures = np.empty((count, size, size, 3), np.uint8)
    for k in range(count):
        rng = np.random.default_rng(seed + k)
        pictures[k] = sb.render(sb.sample(rng), rng, size)
    return pictures


def render(run: Path, shards: int, size: int) -> None:
    """pictures_SIZE_NNN.npy, and kept.npy, which has 256 pixels at every SIZE. What is there already stays."""
    run.mkdir(parents=True, exist_ok=True)
    plan = {f"pictures_{size}_{k:03d}.npy": (SEED + k * SHARD, SHARD, size) for k in range(shards)}
    for name, of in {"kept.npy": (KEPT_SEED, KEPT, 256), **plan}.items():
        if not (run / name).exists():
            temporary = run / f"new_{name}"
            np.save(temporary, drawn(*of))
            temporary.replace(run / name)


# --- loss and figures


def pyramid_loss(y, x):
    """Squared error, L1 at four scales, L1 of differences at the two finest."""
    loss = 2 * F.mse_loss(y, x)
    for k in range(4):
        loss = loss + F.l1_loss(y, x) * (1 if k == 0 else 0.6)
        if k < 2:
            loss = loss + 0.7 * sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return loss


def edge_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The absolute error weighted by how steep the picture is within a pixel; the weights' mean is about one."""
    grey = x.mean(1, keepdim=True)
    steep = F.pad(grey.diff(dim=3).abs(), (0, 1)) + F.pad(grey.diff(dim=2).abs(), (0, 0, 0, 1))
    steep = F.max_pool2d(steep, 3, 1, 1)
    return ((y - x).abs() * steep).mean() / (steep.mean() + 1e-3)


def steep_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """How far the steepest slope around each pixel is from the picture's, wherever within two pixels the edge lies: an
    absolute error alone prefers a soft edge to a sharp one that is a little off."""
    return F.l1_loss(*(F.max_pool2d(slope(p.mean(1, keepdim=True)), 5, 1, 2) for p in (y, x)))


def slope(grey: torch.Tensor) -> torch.Tensor:
    down, right = grey.diff(dim=2)[..., :-1], grey.diff(dim=3)[:, :, :-1]
    return (down.square() + right.square() + 1e-6).sqrt()


def loss_of(vae: AutoencoderKL, x: torch.Tensor, z: torch.Tensor | None, s: Settings) -> torch.Tensor:
    """z: latents to decode, if they are not what the encoder makes of x."""
    prior = 0.0
    with torch.autocast("cpu", torch.bfloat16, enabled=cpu.BFLOAT16):
        if z is None:
            with torch.set_grad_enabled(not s.decoder):
                posterior = vae.encode(x).latent_dist
                z = posterior.sample()
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            prior = 1e-4 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        y = vae.decode(z).sample.float()
    loss = pyramid_loss(y, x) + prior
    if s.square:
        loss = loss + s.square * F.mse_loss(y, x)
    if s.steep:
        loss = loss + s.steep * steep_loss(y, x)
    return loss + s.edges * edge_loss(y, x) if s.edges else loss


@torch.no_grad()
def measure(vae: AutoencoderKL, pictures: np.ndarray) -> tuple[float, float, float]:
    """Mean and worst dB of the reconstructions, and their crispness: 1 is as steep as the pictures."""
    seen = [vae.decode(vae.encode(picture_batch(p[None])).latent_dist.mode()).sample for p in pictures]
    seen = torch.cat(seen).permute(0, 2, 3, 1).clamp(-1, 1).numpy()
    seen = ((seen + 1) * 127.5).round().astype(np.uint8)
    error = np.square((seen.astype(np.float32) - pictures) / 255).mean((1, 2, 3))
    decibels = -10 * np.log10(error)
    return float(decibels.mean()), float(decibels.min()), steepness(seen) / steepness(pictures)


# --- training


def batch(shards: list[np.ndarray], s: Settings, step: int) -> torch.Tensor:
    """Crops, and in the last quarter whole pictures, because the norms' statistics are those of what is seen."""
    rng = np.random.default_rng([s.seed, step])
    pictures = shards[rng.integers(len(shards))]
    if step >= WHOLE_FROM * s.steps:
        return picture_batch(pictures[rng.integers(len(pictures))][None])
    picks, corners = rng.integers(0, len(pictures), CROPS), rng.integers(0, s.size - CROP + 1, (CROPS, 2))
    return picture_batch(
        np.stack([pictures[i, y : y + CROP, x : x + CROP] for i, (y, x) in zip(picks, corners, strict=True)])
    )


def batch_again(shards: list, again: list, s: Settings, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `batch`, and the latents that the network drew for what is shown. One latent stands for 8 x 8 pixels."""
    rng, whole = np.random.default_rng([s.seed, step, 1]), step >= WHOLE_FROM * s.steps
    k, size = rng.integers(len(again)), s.size if whole else CROP
    picks = rng.integers(len(again[k]), size=1 if whole else CROPS)
    corners = rng.integers(0, (s.size - size) // 8 + 1, (len(picks), 2))
    x, z = [], []
    for i, (v, u) in zip(picks, corners, strict=True):
        x.append(shards[k][i, 8 * v : 8 * v + size, 8 * u : 8 * u + size])
        z.append(again[k][i, v : v + size // 8, u : u + size // 8])
    mean, _, back = whitening()
    z = torch.from_numpy(np.stack(z)).float() @ back + mean
    return picture_batch(np.stack(x)), z.permute(0, 3, 1, 2)


def train(run: Path, name: str, s: Settings) -> Iterator[int]:
    """Yield the number of each finished step. A step's batch and noise follow from its number, so a resumed run is the
    same run. minutes are of CPU time."""
    folder = run / name
    folder.mkdir(parents=True, exist_ok=True)
    _same_settings(folder / "settings.json", s)
    shards = [np.load(f, mmap_mode="r") for f in sorted(run.glob(f"pictures_{s.size}_*.npy"))]
    kept = np.load(run / "kept.npy")
    again = [np.load(f)["latents"] for f in sorted(run.glob("again_*.npz"))] if s.again else []  # of the first shards
    torch.manual_seed(0)
    vae = new_vae(s)
    if s.start:
        vae.load_state_dict(started(run, s.start))
    mean = copy.deepcopy(vae).requires_grad_(False)
    params, means = ([p for part in trained(v, s) for p in part.parameters()] for v in (vae, mean))
    muon, adam = cpu.optimizers(trained(vae, s), s.rate, momentum=0.9, decay=0.0)
    parts = {"vae": vae, "mean": mean, "muon": muon, "adam": adam}
    step, minutes, total, since = 0, 0.0, 0.0, 0
    if (folder / "state.pt").exists():
        stored = torch.load(folder / "state.pt")
        step, minutes = stored.pop("step"), stored.pop("minutes")
        for key, part in parts.items():
            part.load_state_dict(stored[key])

    saved, began, measured = time.monotonic(), time.process_time(), minutes
    while step < s.steps:
        torch.manual_seed(step)
        rate = s.rate * min(1, (step + 1) / 40, 2 * (1 - step / s.steps))
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = rate, rate / 20
        drawn_again = again and np.random.default_rng([s.seed, step, 2]).random() < s.again
        x, z = batch_again(shards, again, s, step) if drawn_again else (batch(shards, s, step), None)
        loss = loss_of(vae, x, z, s)
        vae.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        muon.step()
        adam.step()
        step, since, total = step + 1, since + 1, total + loss.item()
        with torch.no_grad():
            torch._foreach_lerp_(means, params, 1 - min(0.995, (step + 1) / (step + 20)))
        if time.monotonic() - saved > SAVE_EVERY or step == s.steps:
            minutes += (time.process_time() - began) / 60
            print(f"{name}: step {step}, {minutes:.1f} minutes, loss {total / since:.4f}", flush=True)
            if minutes - measured >= MEASURE_EVERY or step == s.steps:
                _log(folder / "log.csv", (step, minutes, total / since, rate, *measure(mean, kept)))
                measured, total, since = minutes, 0.0, 0
            state = {key: part.state_dict() for key, part in parts.items()}
            save(state | {"step": step, "minutes": minutes}, folder / "state.pt")
            saved, began = time.monotonic(), time.process_time()
        yield step


def trained(vae: AutoencoderKL, s: Settings) -> list[torch.nn.Module]:
    return [vae.decoder, vae.post_quant_conv] if s.decoder else [vae]


def started(run: Path, start: str) -> dict[str, torch.Tensor]:
    if (folder := Path(start)).is_dir():
        return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).state_dict()
    return torch.load(run / start / "state.pt")["mean"]


def _same_settings(file: Path, s: Settings) -> None:
    text = json.dumps(asdict(s))
    if file.exists() and file.read_text() != text:
        raise SystemExit(f"{file.parent} holds a run with {file.read_text()}: give the same settings or another name.")
    file.write_text(text)


def _log(file: Path, figures: tuple[float, ...]) -> None:
    new = not file.exists()
    with open(file, "a", newline="") as out:
        writer = csv.writer(out)
        if new:
            writer.writerow(COLUMNS)
        writer.writerow([f"{v:.5g}" if isinstance(v, float) else v for v in figures])


def export(run: Path, name: str, folder: Path) -> None:
    """The averaged weights as a public folder in float16."""
    vae = new_vae(Settings(**json.loads((run / name / "settings.json").read_text())))
    vae.load_state_dict(started(run, name))
    vae.half().save_pretrained(folder)


def table(run: Path) -> None:
    print(" ".join(f"{c:>9}" for c in COLUMNS))
    for file in sorted(run.glob("*/log.csv")):
        print(" ".join(f"{v:>9}" for v in list(csv.reader(file.open()))[-1]), file.parent.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds, usual = parser.add_subparsers(dest="command", required=True), Settings()
    for command in ("render", "train", "table", "export"):
        kinds.add_parser(command).add_argument("run", type=Path)
    p = kinds.choices["render"]
    p.add_argument("--shards", type=int, default=4)
    p.add_argument("--size", type=int, default=usual.size)
    p = kinds.choices["export"]
    p.add_argument("name")
    p.add_argument("folder", type=Path)
    p = kinds.choices["train"]
    p.add_argument("name")
    p.add_argument("--channels", type=int, nargs="+", default=usual.channels)
    p.add_argument("--no-attention", dest="attention", action="store_false")
    p.add_argument("--decoder", action="store_true")
    p.add_argument("--start")
    for field in ("latents", "size", "steps", "rate", "square", "edges", "steep", "again", "seed"):
        p.add_argument(f"--{field}", type=type(getattr(usual, field)), default=getattr(usual, field))
    args = vars(parser.parse_args())
    command, run = args.pop("command"), args.pop("run")
    if command == "train":
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        cpu.patch()
        name = args.pop("name")
        for _ in train(run, name, Settings(**args | {"channels": tuple(args["channels"])})):
            pass
    else:
        {"render": render, "table": table, "export": export}[command](run, **args)


if __name__ == "__main__":
    main()
