"""Times the same network in torch (diffusers) alternately with ours. torch runs in another process, from the program
text against_torch.txt: no module here imports it. If torch is missing, the benchmark only reports that."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import Error
from ..models import unet
from ..pipeline import Pipeline
from ..request import Request
from .step import spread

PROGRAM = Path(__file__).with_name("against_torch.txt")
T = 500.0  # any training time would do


def check(pipe: Pipeline) -> None:
    """Refuse, before anything is measured, a model that torch has no network for."""
    if pipe.description.family.denoiser != "unet":
        raise Error(f"{pipe.name} has no U-Net, and torch is timed with no other network.", "Leave out `against`.")
    if pipe.description.recipe.bits is not None:
        raise Error(f"{pipe.name} is quantized, which torch cannot read.", "Leave out `against`, or `bits`.")


def compare(pipe: Pipeline, request: Request, batch: int, repeat: int) -> dict:
    """Seconds of one U-Net call, ours and torch's in alternation (A B A B), after a warm-up call of each. If both have
    the same weights (random ones differ), also the distance of the outputs. If torch is missing: the missing
    package."""
    net, values = pipe.networks.get("unet"), inputs(pipe, request, batch)
    arrays = {k: mx.array(v) for k, v in values.items()}
    x = arrays.pop("x").astype(net.conv_in.weight.dtype)
    mx.eval(net.parameters())
    cond = net.prepare([T], **arrays)
    mx.eval(cond)
    file = pipe.networks.folder / "unet.safetensors"

    def call() -> tuple[mx.array, float]:
        begin = time.perf_counter()
        out = net(x, T, **cond)
        mx.eval(out)
        return out, time.perf_counter() - begin

    with tempfile.TemporaryDirectory(prefix="mlxdiff-") as place:
        np.savez(f"{place}/in.npz", **values)
        job = {
            "config": config(pipe.description.net),
            "weights": str(file) if file.is_file() else None,
            "dtype": pipe.description.recipe.dtype,
            "gpu": mx.default_device() == mx.Device(mx.gpu),
            "t": T,
            "inputs": f"{place}/in.npz",
            "output": f"{place}/out.npy",
        }
        with process(job) as lines:
            about = next(lines)
            if "absent" in about:
                return about
            out, _ = call()
            theirs = np.load(job["output"])
            mx.reset_peak_memory()
            pairs = [(call()[1], next(lines)) for _ in range(repeat)]
    ours, error = np.array(out.astype(mx.float32)), None
    if job["weights"] is not None:
        error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return about | {
        "error": error,
        "seconds": spread([a for a, _ in pairs]),
        "torch_seconds": spread([b["seconds"] for _, b in pairs]),
        "ratio": spread([a / b["seconds"] for a, b in pairs]),
        "peak_bytes": mx.get_peak_memory(),
        "torch_peak_bytes": pairs[-1][1]["peak_bytes"],
    }


@contextmanager
def process(job: dict) -> Iterator[Iterator[dict]]:
    """Starts the program. The first item describes it; each further item is its answer to one more request."""
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed below)
    torch = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.read_text(encoding="utf-8"), json.dumps(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )

    def lines() -> Iterator[dict]:
        while True:
            line = torch.stdout.readline()
            if not line:
                errors.seek(0)
                said = errors.read().strip().splitlines() or ["it printed nothing"]
                raise Error(f"torch stopped: {said[-1]}.", "Leave out `against`.")
            yield json.loads(line)
            with suppress(BrokenPipeError):  # it died: reading the next line reports that
                torch.stdin.write("\n")
                torch.stdin.flush()

    try:
        yield lines()
    finally:
        torch.kill()
        torch.wait()
        errors.close()


def inputs(pipe: Pipeline, request: Request, batch: int) -> dict[str, np.ndarray]:
    """Random inputs for one call, in our layout. Both sides use the same inputs."""
    model, rng = pipe.description, np.random.default_rng(0)
    net, size = model.net, model.latent_size(request)
    shapes = {"x": (batch, *size, net.in_channels), "context": (batch, 77, net.context)}
    if net.time_cond is not None:
        shapes["guidance_embedding"] = (batch, net.time_cond)
    if net.added is not None:
        shapes["pooled"] = (batch, model.components["text_encoder_2"].projection)
    values = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    if net.added is not None:
        count = (net.added - shapes["pooled"][1]) // net.added_time
        values["time_ids"] = np.full((batch, count), 512, np.float32)
    return values


def config(ours: unet.Config) -> dict:
    """The arguments of diffusers' UNet2DConditionModel for a Config of ours."""
    middle = {None: None, 0: "UNetMidBlock2D"}
    down = [list(d) if d else 1 for d in ours.depth]
    if not ours.depth[-1] and ours.mid_depth:
        down[-1] = ours.mid_depth  # diffusers uses the last level's depth in the middle
    return {
        "in_channels": ours.in_channels,
        "out_channels": ours.out_channels,
        "block_out_channels": list(ours.channels),
        "layers_per_block": list(ours.layers),
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in ours.depth],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in ours.up_depth],
        "mid_block_type": middle.get(ours.mid_depth, "UNetMidBlock2DCrossAttn"),
        "transformer_layers_per_block": down,
        "reverse_transformer_layers_per_block": [list(d) if d else 1 for d in ours.up_depth],
        "attention_head_dim": list(ours.heads),  # this is the number of heads in these files
        "cross_attention_dim": ours.context,
        "norm_num_groups": ours.groups,
        "norm_eps": ours.eps,
        "use_linear_projection": ours.linear_projection,
        "time_cond_proj_dim": ours.time_cond,
        "addition_embed_type": None if ours.added is None else "text_time",
        "addition_time_embed_dim": ours.added_time,
        "projection_class_embeddings_input_dim": ours.added,
        "flip_sin_to_cos": ours.flip_sin_to_cos,
        "freq_shift": ours.freq_shift,
    }
