"""How storybook's network for line drawings was made (mlxdiff/builtin/lines): a ControlNet that reads edges and
sketches. Torch on one CPU core; everything is seeded. From the repository's root, after `render` and `encode` of
storybook_torch.py have filled RUN:

    python -m tests.recipes.control_torch train RUN OUT --minutes 60
    python -m tests.recipes.control_torch export OUT mlxdiff/builtin/lines
    python -m tests.recipes.control_torch measure OUT mlxdiff/builtin/lines

For another model's weights: `train` with --start FOLDER --known mlxdiff/builtin/lines, for a few minutes.

One network reads both: thin white lines are where `mlxdiff detect canny` finds edges, so they are followed closely;
thick strokes are a hand's, so they say roughly where things are. It has no attention and starts from the model's own
way down. The model does not learn. `train` saves every three minutes, and goes on from there when it is started
again."""

import argparse
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import nn

from mlxdiff import detect
from mlxdiff.train import judge
from mlxdiff.train import measure as world
from mlxdiff.train import storybook as sb
from mlxdiff.train.storybook import sketches
from tests.recipes import cpu
from tests.recipes.storybook_torch import (
    CAPTIONS,
    GRID,
    LATENTS,
    POSITIONS,
    SCHEDULE,
    SHARD,
    SIZE,
    START,
    known_text,
    picture_batch,
    save,
    whitening,
)

BATCH, EMPTY, BLANK = 32, 0.4, 0.04  # shares of empty captions and of empty drawings
NEAR = {"edges": 2, "sketch": 5}  # pixels between a line and its edge in the picture: a hand is not exact

# --- drawings


def edges(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) uint8: what `mlxdiff detect canny` makes of it."""
    return np.asarray(detect.run("canny", Image.fromarray(picture)))[..., 0]


def some_edges(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Edges as people bring them: of a larger picture now and then, so that their lines are grey; or a part of them."""
    if rng.random() < 0.3:
        side = int(SIZE * rng.uniform(1.2, 2.5))
        large = edges(cv2.resize(picture, (side, side), interpolation=cv2.INTER_CUBIC))
        found = cv2.resize(large, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    else:
        found = edges(picture)
    if rng.random() < 0.25:
        (top, left), (high, wide) = rng.integers(0, SIZE, 2), rng.integers(SIZE // 8, SIZE // 2, 2)
        found = found.copy()
        found[top : top + high, left : left + wide] = 0
    return found


def sketch(picture: np.ndarray, rng: np.random.Generator, thick: int | None = None) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) uint8, white strokes on black, as a mouse draws: the outlines of what is large, with
    corners cut, bent, moved, and some left out. thick: of the strokes, in pixels."""
    soft = cv2.GaussianBlur(cv2.medianBlur(picture, 5), (0, 0), rng.uniform(1.0, 2.2))
    lines, _ = cv2.findContours(cv2.Canny(soft, 40, 90), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    extents = [np.ptp(line[:, 0], axis=0).max() for line in lines]
    bends = rng.normal(0, rng.uniform(0.5, 3.5), (6, 6, 2)).astype(np.float32)
    bends = cv2.resize(bends, picture.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    shift, scale, rough = rng.normal(0, 2.5, 2), 1 + rng.normal(0, 0.03), rng.uniform(0, 1.2)
    width, cut = int(rng.integers(2, 9)), rng.uniform(1, 4)
    least, missing = rng.choice([18, 18, 30, 45]), rng.choice([0, 0.1, 0.3])
    page = np.zeros(picture.shape[:2], np.uint8)
    for line, extent in zip(lines, extents, strict=True):
        left_out = rng.random() < missing
        corners = cv2.approxPolyDP(line, cut, True)[:, 0]
        points = corners + bends[corners[:, 1], corners[:, 0]] + rng.normal(0, rough, corners.shape)
        points = (points - SIZE / 2) * scale + SIZE / 2 + shift
        if extent == max(extents) or (extent >= least and not left_out):
            eighths = (points * 8).round().astype(np.int32)
            cv2.polylines(page, [eighths], True, 255, width if thick is None else thick, cv2.LINE_AA, 3)
    return page


def some_sketch(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A third are dark on white, as on paper."""
    page = sketch(picture, rng)
    return 255 - page if rng.random() < 0.33 else page


def drawings(pictures: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [0, 1]: edges and sketches by turns."""
    pages = [(some_edges, some_sketch)[k % 2](picture, rng) for k, picture in enumerate(pictures)]
    pages = [page * (rng.random() >= BLANK) for page in pages]
    return picture_batch(np.stack(pages)[..., None].repeat(3, -1)) / 2 + 0.5


# --- network


def new_control() -> ControlNetModel:
    """The convolutions that read the picture are set so that its lines arrive as loud as they are: the usual numbers
    make them a thousand times quieter, and training would first have to undo that."""
    net = ControlNetModel(
        in_channels=LATENTS,
        down_block_types=("DownBlock2D",) * 4,
        mid_block_type="UNetMidBlock2D",
        block_out_channels=(64, 64, 96, 144),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=128,
        attention_head_dim=2,
        conditioning_embedding_out_channels=(8, 16, 24, 32),
    )
    for conv in net.controlnet_cond_embedding.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=(2.8 / conv.weight[0].numel()) ** 0.5)
            nn.init.zeros_(conv.bias)
    return net


def base_unet(folder: Path) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32)
    return unet.requires_grad_(False).eval()


def train(args) -> None:
    """v-prediction as the model was trained; timesteps lean to high noise, where the layout is decided. The first two
    convolutions stay as they were drawn at random, and each drawing serves two noise levels: else the convolutions over
    all pixels take two fifths of a step. Every 10 steps the batch is also given to the model alone: "alone" is its loss
    on those."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cpu.patch()
    args.out.mkdir(parents=True, exist_ok=True)
    mean, into, _ = whitening()
    names = sorted(f.stem[8:] for f in args.run.glob("latents_???.npz"))
    data = [dict(np.load(args.run / f"latents_{name}.npz")) for name in names]
    pictures = [np.load(args.run / f"pictures_{name}.npy", mmap_mode="r") for name in names]
    end = int(data[0]["ids"].max())
    base, text = base_unet(args.start), known_text(args.start).requires_grad_(False).eval()
    net = new_control().to(memory_format=torch.channels_last)
    known = {k: v for k, v in base.state_dict().items() if k in net.state_dict()}
    net.load_state_dict(known, strict=False)
    if args.known is not None:
        net.load_state_dict(ControlNetModel.from_pretrained(args.known).state_dict())
    base.to(torch.bfloat16 if cpu.BFLOAT16 else torch.float32, memory_format=torch.channels_last)
    hint = net.controlnet_cond_embedding
    for conv in (hint.conv_in, hint.blocks[0]):
        conv.requires_grad_(False)
    hint.register_forward_hook(lambda module, given, made: made.repeat(2, 1, 1, 1))
    average = new_control().requires_grad_(False)
    average.load_state_dict(net.state_dict())
    muon, adam = cpu.optimizers([net], args.rate, momentum=0.95, decay=0.0)
    state, step = {"net": net, "average": average, "muon": muon, "adam": adam}, 0
    if (args.out / "control.pt").exists():
        stored = torch.load(args.out / "control.pt")
        step = stored.pop("step")
        for name, part in stored.items():
            state[name].load_state_dict(part)
    resumed, params, averages = step, [*net.parameters()], [*average.parameters()]
    learning = [p for p in params if p.requires_grad]
    alpha_bar = DDIMScheduler(**SCHEDULE).alphas_cumprod
    g, rng = torch.Generator().manual_seed(step + 1), np.random.default_rng(step + 1)
    start = saved = time.time()
    losses, pairs = [], []
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        lr = args.rate * min(1, (step - resumed + 1) / 40) * min(1, (1 - progress) / (1 - args.decay))
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = lr, 0.15 * lr
        k, i = rng.integers(len(data)), np.sort(rng.choice(SHARD, BATCH // 2, replace=False))
        lines, i = drawings(pictures[k][i], rng), np.tile(i, 2)
        x0 = ((torch.from_numpy(data[k]["mean"][i]).float() - mean) @ into).permute(0, 3, 1, 2)
        ids = torch.from_numpy(data[k]["ids"][i, rng.integers(CAPTIONS, size=BATCH)]).long()
        ids[torch.from_numpy(rng.random(BATCH) < EMPTY)] = torch.tensor([end - 1] + [end] * (POSITIONS - 1))
        u = (torch.arange(BATCH) + torch.rand(1, generator=g)) / BATCH
        t = (u**0.65 * 1000).long().clamp(0, 999)[torch.randperm(BATCH, generator=g)]
        a = alpha_bar[t].view(-1, 1, 1, 1)
        noise = torch.randn(BATCH, GRID, GRID, LATENTS, generator=g).permute(0, 3, 1, 2)
        x, v = a.sqrt() * x0 + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * x0
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu.BFLOAT16):
            with torch.no_grad():
                words = text(ids).last_hidden_state
            down, middle = net(x, t, words, lines, return_dict=False)
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            loss = F.mse_loss(base(x.to(base.dtype), t, words.to(base.dtype), **more).sample.float(), v)
            if step % 10 == 0:
                with torch.no_grad():
                    alone = F.mse_loss(base(x.to(base.dtype), t, words.to(base.dtype)).sample.float(), v)
                pairs.append((alone.item(), loss.item()))
        net.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        muon.step()
        adam.step()
        step += 1
        torch._foreach_lerp_(averages, params, 1 - min(0.995, (step + 1) / (step + 12)))
        losses.append(loss.item())
        if step % 25 == 0:
            alone, beside = np.mean(pairs, 0)
            seconds = time.time() - start
            print(
                f"{step:6d}  loss {np.mean(losses):.4f}  alone {alone:.4f}  with {beside:.4f}  lr {lr:.5f}"
                f"  {seconds:.0f} s",
                flush=True,
            )
            losses, pairs = [], []
        if time.time() - saved > 180:
            saved = time.time()
            save({name: part.state_dict() for name, part in state.items()} | {"step": step}, args.out / "control.pt")
    save({name: part.state_dict() for name, part in state.items()} | {"step": step}, args.out / "control.pt")


def export(args) -> None:
    """The public folder in float16."""
    net = new_control()
    net.load_state_dict(torch.load(args.out / "control.pt")["average"])
    net.half().save_pretrained(args.folder)


# --- measure


def found(lines: np.ndarray, picture: np.ndarray, near: int) -> float:
    """The share of a drawing's lines, (H, W), within `near` pixels of an edge of the picture."""
    around = cv2.dilate(edges(picture), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * near + 1,) * 2))
    return float(around[lines > 127].astype(bool).mean()) if (lines > 127).any() else 1.0


@torch.no_grad()
def draw(folder: Path | None, start: Path, prompts: list[str], pages: list[np.ndarray], guidance: float) -> np.ndarray:
    """(B, H, W, 3) uint8 by diffusers: DPM++ 2M on Karras' schedule in 12 steps, seeds from 1000 on, with the network
    of a folder or without one."""
    kind, more = StableDiffusionPipeline, {}
    if folder is not None:
        kind = StableDiffusionControlNetPipeline
        more = {"controlnet": ControlNetModel.from_pretrained(folder, torch_dtype=torch.float32)}
    pipeline = kind.from_pretrained(start, torch_dtype=torch.float32, safety_checker=None, **more)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for k in range(0, len(prompts), 16):
        some = prompts[k : k + 16]
        settings = {"generator": [torch.Generator().manual_seed(1000 + k + j) for j in range(len(some))]}
        if folder is not None:
            settings["image"] = picture_batch(np.stack(pages[k : k + 16])[..., None].repeat(3, -1)) / 2 + 0.5
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu.BFLOAT16):
            size = {"width": SIZE, "height": SIZE, "num_inference_steps": 12}
            drawn.append(pipeline(some, guidance_scale=guidance, output_type="np", **size, **settings).images)
    return (np.concatenate(drawn) * 255).round().astype(np.uint8)


def measure(args) -> None:
    """Plain captions of scenes that no training shard has, with drawings of their renders: the share of the lines that
    is found again, and the share of the words that the judge sees, beside the model without the network; then the
    drawings alone, with empty prompts. Sheets in OUT: drawing, picture, render."""
    torch.set_num_threads(1)
    referee, scenes = judge.load(judge.shipped()), world.scenes(args.count)
    renders, prompts = world.renders(scenes), [sb.plain(s) for s in scenes]
    bare = draw(None, args.start, prompts, [], args.guidance)
    report("without", None, bare, scenes, referee)
    for kind in NEAR:
        pages = [edges(p) if kind == "edges" else sketch(p, np.random.default_rng(k)) for k, p in enumerate(renders)]
        lines = pages
        if kind == "sketch":
            lines = [sketch(p, np.random.default_rng(k), 1) for k, p in enumerate(renders)]
        told = draw(args.folder, args.start, prompts, pages, args.guidance)
        silent = draw(args.folder, args.start, [""] * (args.count // 4), pages[: args.count // 4], args.guidance)
        for what, drawn in (("without", bare), ("with", told), ("empty prompts", silent)):
            report(f"{kind} {what}", (lines, NEAR[kind]), drawn, scenes, referee)
        n = len(silent[:10])
        rows = [np.stack(pages[:n])[..., None].repeat(3, -1), told[:n], silent[:n], renders[:n]]
        Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows])).save(
            args.out / f"sheet_{kind}.png"
        )
    flat = [np.asarray(sketches.sketch(name))[..., 0] for name in sketches.STROKES]
    said = ["by day", "at sunset", "in the snow at night", ""]
    drawn = [draw(args.folder, args.start, [text] * len(flat), flat, args.guidance) for text in said]
    for text, some in zip(said, drawn, strict=True):
        words = [sb.OBJECTS[row[3]] for row in judge.read(referee, some)]
        seen = [f"{name} seen as {word}" for name, word in zip(sketches.STROKES, words, strict=True)]
        print(f"by hand, {text or 'no words'}: {', '.join(seen)}")
    rows = [np.stack(flat)[..., None].repeat(3, -1), *drawn]
    Image.fromarray(np.concatenate([np.concatenate(list(row), 1) for row in rows])).save(args.out / "sheet_hand.png")


def report(what: str, lines, drawn: np.ndarray, scenes: list, referee) -> None:
    shares = judge.adherence(referee, drawn, scenes[: len(drawn)])
    text = " ".join(f"{kind} {100 * share:.1f}" for kind, share in shares.items())
    if lines is not None:
        pages, near = lines
        shares = [found(page, picture, near) for page, picture in zip(pages, drawn, strict=False)]
        text = f"lines found {100 * np.mean(shares):.1f}; {text}"
    print(f"{what}: {text}", flush=True)


COMMANDS = {"train": train, "export": export, "measure": measure}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("paths", type=Path, nargs=2, metavar="PATH")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--start", type=Path, default=START, help="the folder of the model to draw with")
    parser.add_argument("--known", type=Path, help="the folder of another model's network, to start from")
    parser.add_argument("--rate", type=float, default=0.012)
    parser.add_argument("--decay", type=float, default=0.5)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--guidance", type=float, default=4.0)
    args = parser.parse_args()
    first, second = args.paths
    args.run, args.out, args.folder = (first, second, None) if args.command == "train" else (None, first, second)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
