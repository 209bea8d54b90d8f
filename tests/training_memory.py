"""What a training step takes at a published network's full width, measured against what is told before it. By hand, for
it takes minutes: `python -m tests.training_memory sdxl 256 --bits 4 --low-memory`. The network has full width and few
layers, and weights that repeat a million random numbers; the step is that of `mlxdiff train lora`."""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mlxdiff import recipe, weights  # before MLX, whose own matrix products are far slower on a CPU

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlxdiff.description import Description, published
from mlxdiff.models import build
from mlxdiff.train import batches, fit, footprint, tune

FEW = {
    "sdxl": {"layers": (1, 1, 1), "depth": ((), (1,), (1,)), "mid_depth": 1, "up_depth": ((1, 1), (1, 1), ())},
    "flux-dev": {"double": 1, "single": 1},
}


def shallow(name: str, dtype: str, bits: int | None, tokens: int | None) -> Description:
    """A published model whose denoiser has few layers. tokens: of a text for FLUX, in place of 512."""
    model = published(name, recipe.recipe(bits, dtype))
    family = model.family
    if tokens is not None:
        family = replace(family, text=replace(family.text, t5_tokens=tokens))
    components = model.components | {family.denoiser: replace(model.net, **FEW[name])}
    return replace(model, family=family, components=components)


def filled(model: Description) -> nn.Module:
    name, numbers = model.family.denoiser, mx.random.normal((1 << 20,), key=mx.random.key(0)) * 0.02
    net, dtype = build.build(model.net), recipe.DTYPES[recipe.component_dtype(model.family, name, model.recipe.dtype)]

    def some(p: mx.array) -> mx.array:
        rows = -(-p.size // numbers.size)
        return mx.broadcast_to(numbers, (rows, numbers.size)).reshape(-1)[: p.size].reshape(p.shape).astype(dtype)

    net.update(tree_map(some, net.parameters()))
    mx.eval(net.parameters())
    weights.quantized(net, recipe.quantization_plan(model.family, name, net, model.recipe.bits))
    mx.eval(net.parameters())
    return net


def peak_of_step(steps: Iterator[fit.Report], weights: int) -> tuple[int, fit.Report]:
    """The peak of the next step, by MLX's own count, and its report. weights: the bytes of the networks at work, with
    what is trained; what else this process holds is no part of the peak."""
    gc.collect()
    mx.clear_cache()
    besides = mx.get_active_memory() - weights
    mx.reset_peak_memory()
    report = next(steps)
    return mx.get_peak_memory() - besides, report


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("model", choices=FEW)
    p.add_argument("size", type=int)
    p.add_argument("--bits", type=int)
    p.add_argument("--dtype", default="float32")
    p.add_argument("--low-memory", action="store_true")
    p.add_argument("--tokens", type=int)
    args = p.parse_args()
    model = shallow(args.model, args.dtype, args.bits, args.tokens)
    tuning = tune.LoraTuning("", prompt="", size=args.size, rank=16, low_memory=args.low_memory, steps=1)
    told = footprint.step(model, tuning, gpu=False)
    net = filled(model)
    made = tune.attach(net, model, model.family.denoiser, tuning)
    if args.low_memory:
        batches.recompute(net)
    aim, size, rng = batches.Objective(model), args.size // model.factor, np.random.default_rng(0)
    mean = mx.array(rng.standard_normal((1, size, size, model.latent_channels), np.float32))
    data = batches.Data([], [], [])
    data.add(mean, 0 * mean, batches.read(model, 1))
    batch = lambda number: ([aim.part(data, np.random.default_rng(number), 1)],)  # noqa: E731
    plan = fit.Plan(tuning.steps, tuning.rate, "adamw", 0, 1.0, 1.0, 0.0, 100, 1e-2, 1)
    with tempfile.TemporaryDirectory() as folder:
        steps = fit.fit(net, batches.loss, batch, plan, Path(folder) / "run")
        trained = sum(v.nbytes for _, v in tree_flatten(net.trainable_parameters()))
        began, cpu = time.perf_counter(), time.process_time()
        seen, report = peak_of_step(steps, told.weights + trained)
        print(
            f"{args.model} {args.size} {model.recipe}{' low' * args.low_memory}: {len(made)} layers changed,"
            f" seen {seen / 1e9:.3f} GB, told {told.peak / 1e9:.3f} ({told.peak / seen:.2f});"
            f" weights {told.weights / 1e9:.3f}, trained {trained / 1e9:.3f}; loss {report.loss:.3g};"
            f" {time.process_time() - cpu:.1f} CPU s, {time.perf_counter() - began:.1f} s",
            flush=True,
        )
        steps.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
