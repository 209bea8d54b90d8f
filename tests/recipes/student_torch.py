"""How storybook's quick LoRA was made: a student that draws in four evaluations, without guidance, what the model draws
in twelve steps with guidance. Torch on one CPU core; run the commands in this order, each from the repository root:

    python -m tests.recipes.student_torch train RUN --minutes 25
    python -m tests.recipes.student_torch export RUN mlxdiff/builtin/quick.safetensors
    python -m tests.recipes.student_torch measure RUN

The model's way from noise to picture is cut into four segments, which begin at the training steps that DDIM visits in
four steps of trailing spacing. `train` first lets the model, the teacher, walk from fresh noise with fresh captions by
DPM++ 2M, and keeps where it stood between the segments (trajectories_*.npz); it needs no pictures. Then the student
learns to reach the end of a segment in one DDIM step. Half of the time it starts where the teacher stood, otherwise
where it went itself: so it learns to undo its own errors. `train` goes on from where it stopped. With another teacher:
a new RUN, --start FOLDER and --known mlxdiff/builtin/quick.safetensors.

The shipped file: `train RUN --shards 3 --minutes 40`, then `--minutes 9 --rate 0.0025 --decay 0`, with three steps of
the teacher in each segment; and for the U-Net of today, from that file, with INSIDE: `--shards 3 --minutes 10 --rate
0.002 --decay 0.2` (logs/student.log)."""

import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize
from transformers import CLIPTokenizer

from mlxdiff.train import storybook as sb
from tests.recipes import cpu
from tests.recipes import storybook_torch as st

STEPS, GUIDANCE, RANK = 4, 4.0, 12
INSIDE = 2, 2, 2, 6  # the teacher's steps in each segment; 3, 3, 3, 3 end 14 % off the closed form on Gaussian data
SHARD, BATCH = 128, 32
HUBER = 0.1  # errors of v above this count linearly, so that edges are not averaged away
WALKS = BATCH // STEPS  # of the student at once in each segment


def noise_levels() -> torch.Tensor:
    """The sigma of every training step."""
    a = DDIMScheduler(**st.SCHEDULE).alphas_cumprod.double()
    return ((1 - a) / a).sqrt()


def times() -> list[int]:
    """Where the student evaluates: DDIM's trailing spacing."""
    return [round(1000 - k * 1000 / STEPS) - 1 for k in range(STEPS)]


def teachers_levels() -> list[float]:
    """The sigmas of the teacher's steps: in each segment even in log sigma. The last step of all goes from the lowest
    training sigma to 0."""
    every = noise_levels()
    ends = [*(float(every[t]) for t in times()), float(every[0])]
    levels = []
    for k, (high, low) in enumerate(pairwise(ends)):
        n = INSIDE[k] - (k == STEPS - 1)
        levels += np.geomspace(high, low, n + 1)[:-1].tolist()
    return [*levels, ends[-1], 0.0]


def teacher_network(start: Path):
    unet = st.new_unet()
    unet.load_state_dict(load_file(start / "unet" / "diffusion_pytorch_model.safetensors"))
    return unet.float().requires_grad_(False).to(memory_format=torch.channels_last)


def time_of(sigma: float) -> float:
    """The inverse of `noise_levels`, with log sigma interpolated."""
    return float(np.interp(np.log(sigma), noise_levels().log().numpy(), np.arange(1000)))


def denoised(v, x, sigma):
    """x0 from a prediction of v at x, which is in VE form."""
    spread = 1 + sigma**2
    return x / spread - sigma / spread**0.5 * v


# --- the teacher's trajectories


@torch.inference_mode()
def trajectories(args) -> list[dict]:
    """Token ids (SHARD, 40), and x between the segments (STEPS + 1, SHARD, 8, 32, 32), the noise first, in shares of
    its spread."""
    tokenizer, text = CLIPTokenizer.from_pretrained(args.start / "tokenizer"), st.known_text(args.start).eval()
    kind = torch.bfloat16 if cpu.BFLOAT16 else torch.float32
    unet = teacher_network(args.start).to(kind)
    for number in range(args.shards):
        path = args.run / f"trajectories_{number:03d}.npz"
        if path.exists():
            continue
        began, rng, g = time.time(), np.random.default_rng(9_000_000 + number), torch.Generator().manual_seed(number)
        captions = ["" if rng.random() < 0.04 else sb.caption(sb.sample(rng), rng) for _ in range(SHARD)]
        padding = {"padding": "max_length", "truncation": True, "max_length": st.POSITIONS, "return_tensors": "pt"}
        ids, empty = (tokenizer(said, **padding).input_ids for said in (captions, [""]))
        stops = []
        for k in range(0, SHARD, BATCH):
            both = torch.cat([ids[k : k + BATCH], empty.expand(BATCH, -1)])
            noise = torch.randn(BATCH, st.GRID, st.GRID, st.LATENTS, generator=g).permute(0, 3, 1, 2)
            stops.append(walk(unet, text(both).last_hidden_state.to(kind), noise))
        whole = torch.cat(stops, 1).half().numpy()
        with open(path.with_suffix(".tmp"), "wb") as f:
            np.savez(f, ids=ids.numpy().astype(np.int16), stops=whole)
        path.with_suffix(".tmp").rename(path)
        print(f"trajectories {number}: {time.time() - began:.0f} s", flush=True)
    files = sorted(args.run.glob("trajectories_???.npz"))
    return [{k: torch.from_numpy(v) for k, v in np.load(f).items()} for f in files]


def walk(unet, context, noise) -> torch.Tensor:
    """DPM++ 2M of the guided teacher (Lu et al. 2023, algorithm 2); what it keeps is x / sqrt(1 + sigma^2)."""
    levels = teachers_levels()
    x, old, h_old, stops = noise * (1 + levels[0] ** 2) ** 0.5, None, 0.0, [noise]
    ends = np.cumsum(INSIDE)
    for k, (s, s_next) in enumerate(pairwise(levels)):
        seen = (x / (1 + s**2) ** 0.5).to(context.dtype)
        t = torch.full((len(context),), time_of(s))
        v, bare = unet(torch.cat([seen, seen]), t, context).sample.float().chunk(2)
        x0 = denoised(bare + GUIDANCE * (v - bare), x, s)
        h = np.log(s / s_next) if s_next > 0 else np.inf
        middle = x0 if old is None or s_next == 0 else x0 + h / (2 * h_old) * (x0 - old)
        x, old, h_old = middle + s_next / s * (x - middle), x0, h
        if k + 1 in ends:
            stops.append(x / (1 + s_next**2) ** 0.5)
    return torch.stack(stops)


# --- the student


class Lora(nn.Module):
    """A change of low rank, added to a layer's weight: almost as fast as the bare layer."""

    def __init__(self, weight, rank: int):
        super().__init__()
        rank = min(rank, *weight.flatten(1).shape)
        self.down = nn.Parameter(torch.randn(rank, weight[0].numel()) / weight[0].numel() ** 0.5)
        self.up = nn.Parameter(torch.zeros(len(weight), rank))

    def forward(self, weight):
        return weight + (self.up @ self.down).to(weight.dtype).view_as(weight)


def student_network(start: Path, rank: int):
    """The teacher with a Lora in every layer that multiplies."""
    unet = teacher_network(start)
    for _, layer in layers(unet):
        lora = Lora(layer.weight, rank)
        if cpu.BFLOAT16:  # autocast would make it that in every step
            layer.weight.data = layer.weight.data.bfloat16()
        parametrize.register_parametrization(layer, "weight", lora)
    return unet


def layers(unet) -> list[tuple[str, nn.Module]]:
    return [(name, layer) for name, layer in unet.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]


def loras(unet) -> dict[str, torch.Tensor]:
    return {name: p for name, p in unet.named_parameters() if p.requires_grad}


def train(args) -> None:
    torch.set_num_threads(1)
    cpu.patch()
    args.run.mkdir(parents=True, exist_ok=True)
    data = trajectories(args)
    ids, stops = torch.cat([d["ids"] for d in data]).long(), torch.cat([d["stops"] for d in data], 1)
    text = st.known_text(args.start).eval()
    with torch.no_grad():
        contexts = torch.cat([text(part).last_hidden_state for part in ids.split(64)])
    torch.manual_seed(0)
    unet = student_network(args.start, args.rank)
    params = loras(unet)
    means = {name: p.detach().clone() for name, p in params.items()}
    groups = [[p for name, p in params.items() if name.endswith(end)] for end in ("up", "down")]
    adam = torch.optim.AdamW([{"params": group} for group in groups], betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    step = 0
    stored = args.run / "student.pt"
    if stored.exists():
        known = torch.load(stored)
        for of, kept in ((params, known["params"]), (means, known["means"])):
            torch._foreach_copy_([p.data for p in of.values()], [kept[name] for name in of])
        adam.load_state_dict(known["adam"])
        step = known["step"]
    elif args.known is not None:
        known = load_file(args.known)
        for name, _ in layers(unet):
            for part, there in (("down", "lora_A"), ("up", "lora_B")):
                key = f"{name}.parametrizations.weight.0.{part}"
                tensor = known[f"unet.{name}.{there}.weight"].float().flatten(1)
                params[key].data.copy_(tensor)
                means[key].copy_(tensor)
    every, at = noise_levels().float(), torch.tensor(times())
    sigmas = torch.stack([every[at], torch.cat([every[at[1:]], every[:1]])])  # of the segments: beginning and end
    final = torch.tensor([*([1.0] * (STEPS - 1)), 0.0])  # the teacher's last segment ends at 0
    segment = torch.arange(STEPS).repeat_interleave(WALKS)
    t = at[segment]
    s, s_next = (row[segment].view(-1, 1, 1, 1) for row in sigmas)
    s_end = s_next * final[segment].view(-1, 1, 1, 1)
    ratio = s_next / s
    g = torch.Generator().manual_seed(1000 * step + 1)
    who = torch.randint(len(ids), (BATCH,), generator=g)
    x = stops[segment, who].float() * (1 + s**2).sqrt()
    began = saved = time.time()
    total = torch.zeros(STEPS)

    def keep() -> None:
        st.save({"params": dict(params), "means": means, "adam": adam.state_dict(), "step": step}, stored)

    while (progress := (time.time() - began) / (60 * args.minutes)) < 1:
        rate = args.rate * min(1, (step + 1) / 25, (1 - progress) / (1 - args.decay))
        adam.param_groups[0]["lr"], adam.param_groups[1]["lr"] = rate, rate / 4  # `down` is not zero at first
        target = stops[segment + 1, who].float() * (1 + s_end**2).sqrt()
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu.BFLOAT16):
            v = unet(x / (1 + s**2).sqrt(), t, contexts[who]).sample
        x0 = denoised(v.float(), x, s)
        after = x0 + ratio * (x - x0)
        off = (after - target) / (1 - ratio) * (1 + s**2).sqrt() / s  # the error of v
        loss = ((off**2 + HUBER**2).sqrt() - HUBER).mean((1, 2, 3))
        adam.zero_grad()
        loss.mean().backward()
        nn.utils.clip_grad_norm_(params.values(), 1.0)
        adam.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(means.values()), list(params.values()), 1 - min(0.99, (step + 1) / (step + 12)))
            total += (off**2).mean((1, 2, 3)).view(STEPS, WALKS).mean(1)
            # Each walk goes on to the next segment, from where it came or from where the teacher stood; a new one
            # begins in the place of one that has ended.
            fresh = torch.randint(len(ids), (WALKS,), generator=g)
            taught = torch.rand(BATCH, generator=g).view(-1, 1, 1, 1) < 0.5
            along = torch.where(taught, target, after.detach())[:-WALKS]
            x = torch.cat([stops[0, fresh].float() * (1 + s[:WALKS] ** 2).sqrt(), along])
            who = torch.cat([fresh, who[:-WALKS]])
        if step % 25 == 0:
            parts = " ".join(f"{part:.4f}" for part in (total / 25).tolist())
            print(f"{step:6d}  error of v {parts}  {time.time() - began:.0f} s", flush=True)
            total.zero_()
        if time.time() - saved > 120:
            saved = time.time()
            keep()
    keep()


# --- export and measure


def export(args) -> None:
    """The averaged student as a LoRA file in peft's spelling, in float16."""
    means, tensors = torch.load(args.run / "student.pt")["means"], {}
    for name, layer in layers(st.new_unet()):
        part = f"{name}.parametrizations.weight.0"
        down, up = means[f"{part}.down"], means[f"{part}.up"]
        shapes = layer.weight.shape[1:], (1, 1) * (layer.weight.dim() == 4)
        tensors[f"unet.{name}.lora_A.weight"] = down.view(len(down), *shapes[0])
        tensors[f"unet.{name}.lora_B.weight"] = up.view(*up.shape, *shapes[1])
    args.file.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in tensors.items()}, args.file, {"format": "pt"})
    args.file.chmod(0o644)


def measure(args) -> None:
    """As `storybook_torch measure`, of the student in four steps without guidance."""
    pipeline = StableDiffusionPipeline.from_pretrained(args.start, torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    if args.file is not None:
        pipeline.load_lora_weights(args.file.parent, weight_name=args.file.name)
        pipeline.fuse_lora()
    st.measure(args, pipeline, STEPS)


COMMANDS = {"train": train, "export": export, "measure": measure}


def main() -> None:
    parser = st.parser(__doc__, COMMANDS, minutes=25.0, rate=4e-3, guidance=1.0)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--known", type=Path, help="the LoRA file of another teacher's student, to start from")
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--rank", type=int, default=RANK)
    args = parser.parse_args()
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
